"""Runs whose answers a server draws: they learn the toy task, and what cannot be trusted ends them with one message."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from processes import inside, log, start
from vllm_server import Engine


@pytest.fixture
def rewarded(config: Path, tmp_path: Path, vllm: Engine) -> Path:
    """The config of a run whose answers are better the more small letters they have, drawn by a server in float32."""
    (tmp_path / "mine.py").write_text("def few(answer, row):\n    return sum(map(str.islower, answer)) / 4\n")
    text = config.read_text().replace("learning_rate: 1.0e-2", "learning_rate: 4.0e-2")
    text = text.replace("examples_per_step: 8", "examples_per_step: 6")
    reward = f"{{kind: function, path: '{tmp_path}/mine.py:few'}}"
    server = f"{{url: '{vllm.url}', model: base, dtype: float32}}"
    rollout = f"{{num_generations: 8, max_new_tokens: 5, server: {server}}}"
    config.write_text(text + f"objective: {{kind: grpo, beta: 0.01, reward: {reward}, rollout: {rollout}}}\n")
    return config


PPO = (
    "objective.kind=ppo",
    "objective.rollout.num_iterations=2",
    "objective.rollout.num_minibatches=2",
    "training.schedule=constant",
)


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_toy_reward_is_climbed(kind: str, rewarded: Path, tmp_path: Path, vllm: Engine, capsys: Any) -> None:
    """As it is with answers of this process; validation is answered there too."""
    settings: tuple[str, ...] = (
        "training.max_steps=7",
        "data.validation=0.02",
        "training.schedule=constant",
        "training.eval_every=7",
    )
    settings = (*PPO, "training.max_steps=32", "data.validation=0") if kind == "ppo" else settings
    if kind == "grpo":  # test_ppo.py has the other one
        local = ("objective.rollout.server=null", f"output={tmp_path}/here")
        code, _, err = inside(capsys, "train", rewarded, *settings, *local)
        assert code == 0 and not vllm.requests, err
    code, _, err = inside(capsys, "train", rewarded, *settings)
    assert code == 0, err
    for run in ("here", "run")[kind == "ppo" :]:
        rewards = [e["reward"] for e in log(tmp_path / run) if "rollout_seconds" in e]
        assert min(rewards[-2:]) > max(rewards[:2]) + 0.7, rewards
    steps, manifest = log(tmp_path / "run"), json.loads((tmp_path / "run" / "run.json").read_text())
    entries = [e for e in steps if "rollout_seconds" in e]
    # the same weights in another engine: what is drawn has the policy's probabilities, in every step of a rollout
    steps = [e for e in steps if "ratio" in e]  # PPO may leave the rest of a rollout
    assert all(abs(e["importance_ratio"] - 1.0) < 1e-3 and e["importance_truncated"] == 0.0 for e in steps)
    assert max(e["importance_ratio_max"] for e in steps) < 1.001 and "gate movement: passed" in err
    assert manifest["rollout_server"] == {"url": vllm.url, "model": "base"}
    (gate,) = (g for g in manifest["gates"] if g["name"] == "rollout.distribution")
    assert gate["state"] == "passed" and gate["limit"] == "largest 0.002"
    assert "a resumed run gets other ones" in err
    assert f"base at {vllm.url}" in (tmp_path / "run" / "report.html").read_text()
    # one adapter a rollout and a validation, none of which stays
    paths = [path for path, _ in vllm.requests]
    loads = len(entries) + (kind == "grpo")
    assert paths.count("/load_lora_adapter") == paths.count("/unload_lora_adapter") == loads
    assert not vllm.adapters and not (tmp_path / "run" / "sampler").exists()


def test_a_server_that_dies_and_comes_back(rewarded: Path, tmp_path: Path, vllm: Engine, capsys: Any) -> None:
    """One message, a folder that goes on, and an adapter of the time before that is unloaded at the next start."""
    settings = ("training.max_steps=4", "data.validation=0")
    vllm.rules["die_after"] = 15
    code, _, err = inside(capsys, "train", rewarded, *settings)
    assert code == 3 and "the server answers nobody" in err and "go on with: rung train --resume" in err
    run = tmp_path / "run"
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["status"] == "failed" and not (run / "adapter").exists() and len(log(run)) == 2
    assert not vllm.adapters and not (run / "sampler").exists()
    adapter = next(path for path in (run / "checkpoints").iterdir() if path.is_dir())
    assert adapter.is_dir()
    vllm.rules, vllm.completed = {}, 0
    # the server moved meanwhile: where it is may change, what it answers with may not
    moved = f"objective.rollout.server.url={vllm.url.replace('127.0.0.1', 'localhost')}"
    code, _, err = inside(capsys, "train", rewarded, *settings, moved, "--resume")
    assert code == 0 and "resumed from step-00000002" in err, err
    manifest = json.loads((run / "run.json").read_text())
    assert [e["step"] for e in log(run)] == [1, 2, 3, 4] and "localhost" in manifest["rollout_server"]["url"]
    other = "objective.rollout.server.importance_sampling_cap=3"
    code, _, err = inside(capsys, "train", rewarded, *settings, other, "--resume")
    assert code == 3 and "importance_sampling_cap" in err


def test_a_stale_server_ends_the_run(rewarded: Path, tmp_path: Path, vllm: Engine, capsys: Any) -> None:
    """Its first adapter is the base still; the second rollout is refused before anything is learned from it."""
    vllm.rules["stale"] = True
    code, _, err = inside(capsys, "train", rewarded, "training.max_steps=4", "data.validation=0")
    assert code == 3 and "gate rollout.distribution failed" in err and "those of the base" in err, err
    run = tmp_path / "run"
    gates = {g["name"]: g["state"] for g in json.loads((run / "run.json").read_text())["gates"]}
    assert gates["rollout.distribution"] == "failed" and len(log(run)) == 1 and not (run / "adapter").exists()
    assert not vllm.adapters


def test_text_in_place_of_tokens_is_refused(rewarded: Path, tmp_path: Path, vllm: Engine, capsys: Any) -> None:
    vllm.rules["reply"] = lambda reply: reply["choices"][0].pop("token_ids")
    code, _, err = inside(capsys, "train", rewarded, "training.max_steps=2")
    assert code == 3 and "it has no token ids" in err and "text is never tokenized again" in err
    assert err.count("an answer cannot be used") == 1 and not vllm.adapters
    assert not list((tmp_path / "run").glob("log.jsonl"))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("method={kind: full}", "plain LoRA updates"),
        ("method={kind: head}", "plain LoRA updates"),
        ("method={kind: mixture, rank: 4}", "plain LoRA updates"),
        ("method={kind: bottleneck}", "plain LoRA updates"),
        ("method={kind: prompt}", "plain LoRA updates"),
        ("method={kind: peft, config: {peft_type: IA3}}", "plain LoRA updates"),
        ("method={kind: lora, dora: true}", "dora"),
        ("method={kind: lora, modules_to_save: [lm_head]}", "modules_to_save"),
        ("method={kind: lora, rank: 4, alpha: 8, rank_pattern: {down: 8}}", "one scale"),
        ("model={student_of: TINY, layers: first}", "its base is made here"),
        ("model={name: ADAPTER}", "rung merge ADAPTER FOLDER"),
        ("objective.rollout.server.mount=/elsewhere:/data", "does not see this folder"),
        ("objective.rollout.server.model=other", "no such model"),
        ("objective.rollout.batch=8", "server.concurrency"),
    ],
)
def test_what_a_server_cannot_do(
    setting: str, words: str, rewarded: Path, tiny_base: Path, tmp_path: Path, vllm: Engine, capsys: Any
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    setting = setting.replace("TINY", str(tiny_base)).replace("ADAPTER", str(adapter))
    code, _, err = inside(capsys, "train", rewarded, setting)
    assert code in (2, 3) and words.replace("ADAPTER", str(adapter)) in err, err
    assert not (tmp_path / "run").exists() and not [r for r in vllm.requests if r[0] != "/models"]


def test_a_server_that_is_not_there(
    rewarded: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rung.inference.vllm_client.ADAPTER_RETRIES", 0)  # they wait for a second and a half
    code, _, err = inside(capsys, "train", rewarded, "objective.rollout.server.url=http://127.0.0.1:9/v1")
    assert code == 3 and "cannot be reached" in err and "loading" not in err and not (tmp_path / "run").exists()


def test_the_plan_counts_no_decoding_here(rewarded: Path, capsys: Any) -> None:
    stages = []
    for setting in ((), ("objective.rollout.server=null",)):
        code, out, err = inside(capsys, "plan", rewarded, *setting, "--json")
        assert code == 0, err
        stages.append("rollouts" in out)
    assert stages == [False, True]


@pytest.mark.soak
def test_a_killed_run_leaves_no_adapter(rewarded: Path, tmp_path: Path, vllm: Engine, capsys: Any) -> None:
    """Killed while the server answers: the adapter stays loaded until the next start, which unloads it."""
    vllm.rules["slow"] = 0.3
    with start("train", rewarded, "training.max_steps=3") as running:
        while running.poll() is None and not vllm.adapters:
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
    (left,) = vllm.adapters
    vllm.rules = {}
    code, _, err = inside(capsys, "train", rewarded, "training.max_steps=3", "--resume")
    assert code == 0 and f"unloaded {left}" in err and not vllm.adapters, err
    assert not (tmp_path / "run" / "sampler").exists()


def test_a_student_answers_here(rewarded: Path, tiny_base: Path, capsys: Any) -> None:
    server = "{url: 'http://127.0.0.1:9/v1', model: base}"
    distill = f"objective={{kind: distill, teacher: {tiny_base}, on_policy: 0.5, rollout: {{server: {server}}}}}"
    code, _, err = inside(capsys, "train", rewarded, distill)
    assert code == 2 and "rollout.server is for grpo and ppo" in err
