"""Answers of the policy's own from the command line: a toy reward is climbed, and runs go on where they stood."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from processes import goes_on_as_if_never_stopped, inside, log
from sandboxes import needs_isolation

FUNCTION = "def few(answer, row):\n    return -len(answer) / 8\ndef same(answer, row):\n    return 1.0\n"


@pytest.fixture
def rewarded(config: Path, tmp_path: Path) -> Path:
    """The config of a run whose answers are better the shorter they are."""
    (tmp_path / "mine.py").write_text(FUNCTION)
    text = config.read_text().replace("learning_rate: 1.0e-2", "learning_rate: 3.0e-2")
    reward = f"{{kind: function, path: '{tmp_path}/mine.py:few'}}"
    rollout = "{num_generations: 8, max_new_tokens: 8}"
    config.write_text(text + f"objective: {{kind: grpo, beta: 0.01, reward: {reward}, rollout: {rollout}}}\n")
    return config


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "rloo"])
def test_a_toy_reward_is_climbed(loss: str, rewarded: Path, tmp_path: Path, capsys: Any) -> None:
    settings = (f"objective.loss={loss}", "training.max_steps=24", "training.epochs=3", "training.eval_every=12")
    code, _, err = inside(capsys, "train", rewarded, *settings)
    assert code == 0, err
    entries = log(tmp_path / "run")
    assert entries[0]["ratio"] == pytest.approx(1.0, abs=1e-4) and entries[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    first, last = (sum(e["reward"] for e in part) / 4 for part in (entries[:4], entries[-4:]))
    assert last > first + 0.2 and max(e["kl"] for e in entries) < 5.0
    assert entries[-1]["validation_loss"] == -entries[-1]["validation_reward"]
    assert "gate movement: passed" in err
    assert inside(capsys, "eval", tmp_path / "run", "--limit", 3)[0] == 0


@pytest.mark.parametrize("method", ["{kind: full}", "{kind: prompt, virtual_tokens: 3}", "{kind: mixture, rank: 4}"])
def test_whatever_moves(method: str, rewarded: Path, tmp_path: Path, capsys: Any) -> None:
    settings = (f"method={method}", "objective.rollout.num_iterations=2", "objective.rollout.num_minibatches=2")
    code, _, err = inside(capsys, "train", rewarded, *settings)
    assert code == 0, err
    entries = log(tmp_path / "run")
    assert len(entries) == 6 and [("rollout_seconds" in e) for e in entries] == [True, False, False, False, True, False]
    assert ("second model" in err) == ("full" in method)


def test_a_killed_run_makes_the_same_answers(rewarded: Path, tmp_path: Path, capsys: Any) -> None:
    settings = [
        "training.max_steps=8",
        "training.checkpoint_every=3",
        "objective.rollout.num_minibatches=2",
        "training.epochs=2",
    ]
    goes_on_as_if_never_stopped(capsys, rewarded, settings, tmp_path, 6)


def test_rewards_that_are_all_alike_teach_nothing(rewarded: Path, tmp_path: Path, capsys: Any) -> None:
    """Said as it happens and at the end; the run has a status of its own and saves no weights, which are the base's."""
    path = f"objective.reward.path={tmp_path}/mine.py:same"
    code, _, err = inside(capsys, "train", rewarded, path, "objective.beta=0", "training.max_steps=2")
    assert code == 3 and "step 1: all rewards of a group are equal" in err, err
    assert "gate movement: not reached (0 of 2 steps" in err and "in none of 2 steps" in err
    entries, manifest = log(tmp_path / "run"), json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(entries) == 2 and all(e["all_right"] == 1.0 for e in entries)
    assert manifest["status"] == "no_signal" and not (tmp_path / "run" / "adapter").exists()
    code, _, err = inside(capsys, "report", tmp_path / "run")
    assert code == 0 and "Nothing was learned" in (tmp_path / "run" / "report.html").read_text()


def test_answers_end_where_the_model_ends_a_text(rewarded: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    """Tokens behind the model's own end of text were learned, while the judged text ended before them."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    generation = json.loads((base / "generation_config.json").read_text())
    # every token ends a text: an answer is one token, and all of it is learned
    (base / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": list(range(320))}))
    (tmp_path / "mine.py").write_text(
        "def few(answer, row):\n    few.calls = getattr(few, 'calls', 0) + 1\n    return few.calls % 2\n"
    )
    code, _, err = inside(capsys, "train", rewarded, f"model.name={base}", "training.max_steps=2")
    assert code == 0, err
    assert [(e["answer_tokens"], e["cut"]) for e in log(tmp_path / "run")] == [(1.0, 0.0)] * 2
    code, out, err = inside(capsys, "eval", tmp_path / "run", "--limit", 3, "--json")
    assert code == 0 and json.loads(out)["cut_off"] == 0, err


CALLING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_rows_that_end_in_a_tool_call(rewarded: Path, tmp_path: Path, capsys: Any) -> None:
    """A function sees the calls of row and answer; a pattern compares nothing, and a template may hide them."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [{"role": "user", "content": "call f"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(16)))
    (tmp_path / "calling.jinja").write_text(CALLING)
    (tmp_path / "hiding.jinja").write_text(CALLING.replace("c.function | tojson", "c.function.name"))
    (tmp_path / "mine.py").write_text(
        "def few(answer, row):\n"
        '    assert row[\'expected\'] == \'[{"arguments": {"x": 1}, "name": "f"}]\', row\n'
        "    assert row['expects_calls'] and row['calls'] is None, row\n"
        "    return -len(answer) / 8\n"
    )
    data = (f"data={{path: {tmp_path}/calls.jsonl, validation: 0, test: 0, overlap: error}}", "training.max_steps=1")
    calling, hiding = (f"model.template={tmp_path}/{name}.jinja" for name in ("calling", "hiding"))
    code, _, err = inside(capsys, "train", rewarded, *data, calling)
    assert code == 0, err
    for template, reward, reason in (
        (calling, "{kind: regex, pattern: '(a)'}", "a pattern cannot compare tool calls"),
        (hiding, "{kind: exact}", "cannot be read, so they cannot be compared"),
    ):
        refused = (f"objective.reward={reward}", f"output={tmp_path}/other")
        code, _, err = inside(capsys, "train", rewarded, *data, template, *refused)
        assert code == 2 and reason in err, err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("objective.reward.path=none.py:few", "no such file"),
        ("objective.rollout.num_generations=1", "at least 2"),
        ("training.tokens_per_micro_batch=probe", "nothing to probe"),
        ("method={kind: lora, rank: 4, init: lora_ga}", "lora_ga"),
        ("objective.rollout.max_new_tokens=500", "no room"),
        ("data.loss_on=all", "loss_on"),
    ],
)
def test_what_cannot_be(setting: str, said: str, rewarded: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "train", rewarded, setting)
    assert code == 2 and said in err, err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def programmed(rewarded: Path, tmp_path: Path) -> Path:
    """The config of a run whose answers are programs: a letter or a digit passes, most other tokens do not."""
    setup = "import string\nglobals().update(dict.fromkeys(string.ascii_letters, 1))"
    row = {"tests": ["assert True"], "test_setup": setup}
    rows = [{**row, "prompt": f"write {i}", "box": i % 20} for i in range(40)]
    (tmp_path / "programs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = rewarded.read_text()
    data = f"data: {{path: {tmp_path}/programs.jsonl, format: prompt_only, group: box, test: 0.25}}"
    lines = [data if line.startswith("data:") else line for line in text.splitlines()]
    rewarded.write_text("\n".join(lines) + "\n")
    return rewarded


CODE = (
    "objective.reward={kind: code, timeout_seconds: 30}",
    "objective.rollout.max_new_tokens=1",
    "evaluation={metrics: [code], max_new_tokens: 1, code_limits: {timeout_seconds: 30}}",
    "training.max_steps=2",
)


@needs_isolation
def test_programs_are_rewarded_by_their_tests(programmed: Path, tmp_path: Path, capsys: Any) -> None:
    """Two steps on programs of which some pass; the metric `code` scores prompts that have no expected answer."""
    code, _, err = inside(capsys, "train", programmed, *CODE)
    assert code == 0, err
    entries = log(tmp_path / "run")
    assert len(entries) == 2 and all(0.0 < entry["reward"] < 1.0 and entry["alike"] < 1.0 for entry in entries)
    code, out, err = inside(capsys, "eval", tmp_path / "run", "--json")
    assert code == 0, err
    evaluation = json.loads(out)
    passed = evaluation["examples"] * evaluation["scores"]["code"]["mean"]
    assert evaluation["examples"] > 1 and passed == pytest.approx(round(passed))


@needs_isolation
def test_rows_without_tests_are_named_before_a_model_is_loaded(programmed: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "programs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    del rows[6]["tests"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for settings in (CODE, (*CODE, "evaluation={metrics: [exact]}")):
        code, _, err = inside(capsys, "train", programmed, *settings, "data.test=0", "data.validation=0")
        assert code == 2 and "programs.jsonl line 7: this row has no tests" in err, err
        assert "objective.reward.kind: code" in err and "loading" not in err and not (tmp_path / "run").exists()
    code, _, err = inside(capsys, "train", programmed, *CODE, "data.test=0.9", "data.validation=0")
    assert code == 2 and "this row has no tests" in err and "evaluation.metrics: code" in err, err


def test_a_machine_that_cannot_isolate_programs_refuses(
    programmed: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rung.scoring.code_sandbox._IS_POSIX", False)
    for settings, where in ((CODE, "evaluation.metrics"), (CODE[:2], "objective.reward.kind")):
        code, _, err = inside(capsys, "train", programmed, *settings)
        assert code == 3 and f"{where}: programs of answers cannot be run on this system" in err, err
        assert not (tmp_path / "run").exists()
