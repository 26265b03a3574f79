"""A model that learns from those of its own answers that a verifier accepts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from processes import inside
from rung.config.io import load_synth_config
from rung.config.synth import ImproveRunConfig
from rung.files import lock_file
from rung.inference.journal import Journal
from rung.scoring.stats import pass_at_k
from rung.synth.improve import Improvement, SampledQuestion, _conversation, _pair
from rung.training.run_folder import LOCK_FILE
from rung.types import Message, Record, Source


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def improve(config: Path, tmp_path: Path) -> Path:
    """Two rounds of a tiny model that is rewarded for writing an `e`, which it soon does nearly always."""
    reward = tmp_path / "reward.py"
    reward.write_text("def has_e(answer, row):\n    return float('e' in answer)\n")
    text = config.read_text().replace("evaluation: {metrics: [exact, numeric, perplexity], ", "evaluation: {")
    text = (
        text.replace("test: 0.25", "test: 0.25, validation: 0.25")
        .replace("1.0e-2", "3.0e-2")
        .replace("instruction: Name the fruit.", "stop: [t, n]")
    )
    text = text.replace("training: {", "training: {epochs: 8, ").replace("max_steps: 6, ", "")
    synth = (
        f"synth: {{kind: improve, verifier: {{kind: function, path: '{reward}:has_e'}}, rounds: 2, samples: 4, "
        "temperature: 0.5, pairs: true}\n"
    )
    config.write_text(synth + text)
    return config


def test_rounds_that_improve(improve: Path, tmp_path: Path, capsys: Any) -> None:
    code, out, err = inside(capsys, "synth", "improve", improve, "--json")
    assert code == 0, err
    result, run = json.loads(out), tmp_path / "run"
    first, second = result["rounds"][:2]
    assert second["gain"]["low"] > 0 and second["pass_at"]["1"]["mean"] > first["pass_at"]["1"]["mean"]
    assert list(first["pass_at"]) == ["1", "2", "4"] and first["pass_at"]["4"]["mean"] >= first["pass_at"]["1"]["mean"]
    assert result["best"] == max(
        range(len(result["rounds"])), key=lambda i: result["rounds"][i]["pass_at"]["1"]["mean"]
    )
    assert result["output"] == str(run / f"round-{result['best']}" / "run")
    assert result["test"]["gain"]["mean"] > 0 and result["test"]["questions"] > 5
    rows = lines(run / "round-1" / "rows.jsonl")
    assert len(rows) == second["rows"] and all("e" in row["answer"] for row in rows)
    assert all(row["context"].startswith("box") and row["made"] == {"round": 1, "hint": False} for row in rows)
    counts = [
        sum(other["question"] == row["question"] and other["context"] == row["context"] for other in rows)
        for row in rows
    ]
    assert max(counts) <= 4
    pairs = lines(run / "round-1" / "pairs.jsonl")
    assert pairs and all("e" in pair["chosen"] and "e" not in pair["rejected"] for pair in pairs)
    trained = json.loads((run / "round-1" / "run" / "run.json").read_text())
    assert trained["data"]["splits"]["made"] == {"round": 1, "rows": len(rows), "verifier": "function"}
    originals = trained["data"]["splits"]["train"]["rows"] - len(rows)  # the rows of the data are learned too
    assert originals > 40
    assert trained["config"]["model"]["name"] == json.loads(json.dumps(str(load_synth_config(improve).model.name)))
    page = (run / "report.html").read_text()
    assert "pass@4" in page and "chosen" in page and result["reason"] in page
    # finished: nothing is sampled or trained again
    stamp = (run / "round-1" / "run" / "run.json").stat().st_mtime_ns
    code, out, err = inside(capsys, "synth", "improve", improve)
    assert code == 0 and "pass@1" in out and "the validation split chose round" in out
    assert "train 1/" not in err and (run / "round-1" / "run" / "run.json").stat().st_mtime_ns == stamp
    code, _, err = inside(capsys, "synth", "improve", improve, "synth.samples=2")
    assert code == 3 and "another config" in err


def test_a_preview_writes_nothing(improve: Path, tmp_path: Path, capsys: Any) -> None:
    code, out, err = inside(capsys, "synth", "improve", improve, "--preview", 3)
    assert code == 0 and out.count("question: ") == 3 and "accepted" in out, err
    assert not (tmp_path / "run").exists()


def test_failures_are_asked_again_with_a_hint(
    improve: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STaR: the answer stands behind the question where it is asked, and not where it is learned."""
    loaded = load_synth_config(improve, ["synth.hint=true"])
    assert isinstance(loaded, ImproveRunConfig)
    improvement = Improvement(loaded)
    record = improvement.questions[0]
    hinted, bare = (_conversation(record, hint=hint).turns[-1].content for hint in (True, False))
    assert hinted.startswith(bare) and f"The answer is: {record.answer}" in hinted and record.answer not in bare
    # half of the questions have no accepted answer; behind a hint all have one
    asked: list[bool] = []

    def answered(model: Any, records: Any, journal: Journal, number: int, part: int, *, hint: bool = False) -> Any:
        asked.append(hint)
        return [
            SampledQuestion(r, ("e", "x"), (hint or i % 2 == 0, False), (True, True)) for i, r in enumerate(records)
        ]

    monkeypatch.setattr(improvement, "_sampled", answered)
    made = improvement._made_rows(1, tmp_path / "round-1")
    assert asked == [False, True] and len(made) == len(improvement.questions)
    rows = lines(tmp_path / "round-1" / "rows.jsonl")
    assert sum(row["made"]["hint"] for row in rows) == len(rows) // 2
    assert all("The answer is" not in row["question"] for row in rows)
    assert all(record.messages[-1].content == "e" for record in made)


def sampled(answers: str, accepted: Sequence[bool], stopped: Sequence[bool] | None = None) -> SampledQuestion:
    turns = (Message("user", "q"), Message("assistant", "x"))
    record = Record(turns, Source("here", 1), "c", group="g")
    return SampledQuestion(record, tuple(answers), tuple(accepted), tuple(stopped or [True] * len(answers)))


def test_which_answers_are_kept() -> None:
    question = sampled("bacad", (True, True, True, True, False))
    assert question.kept(2) == ["a", "b"] and question.kept(9) == ["a", "b", "c"] and question.passed == 4
    pair = {"prompt": "q", "context": "c", "group": "g", "chosen": "a", "rejected": "d"}
    assert _pair(question) == pair
    for without_two_sides in (
        sampled("b", (True,)),
        sampled("b", (False,)),
        sampled("ab", (True, False), (True, False)),
    ):
        assert _pair(without_two_sides) is None


def test_pass_at_k_is_that_of_the_samples(improve: Path) -> None:
    loaded = load_synth_config(improve)
    assert isinstance(loaded, ImproveRunConfig)
    improvement = Improvement(loaded)
    rng = np.random.default_rng(0)
    questions = [
        SampledQuestion(r, tuple("abcd"), tuple(bool(x) for x in rng.random(4) < 0.4), (True,) * 4)
        for r in improvement.questions
    ]
    found = improvement._pass_at(questions)
    for k in (1, 2, 4):
        expected = np.mean([pass_at_k(4, sum(q.accepted), k) for q in questions])
        assert found[k].mean == pytest.approx(expected)
    assert found[4].mean == pytest.approx(np.mean([any(q.accepted) for q in questions]))


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        (("synth.verifier={kind: code}",), 2, "no tests to run"),
        (("synth.verifier={kind: function, path: 'none.py:f'}",), 2, "synth.verifier.path"),
        (("synth.verifier={kind: model, run: nowhere}",), 2, "synth.verifier.run"),
        (("synth.verifier={kind: regex, pattern: zzzz}",), 2, "no answer was accepted"),
        (("data.validation=0",), 2, "compared on the validation split"),
        (("evaluation.context=retrieved",), 2, "retrieves no passages"),
        (("synth.samples=1",), 2, "greater than or equal to 2"),
        (("objective.kind=sft",), 2, "objective is not a setting of rung synth improve"),
        (("synth.kind=teach",), 2, "rung synth teach"),
    ],
)
def test_what_cannot_improve(
    settings: tuple[str, ...], code: int, said: str, improve: Path, tmp_path: Path, capsys: Any
) -> None:
    found, _, err = inside(capsys, "synth", "improve", improve, *settings)
    assert found == code and said in err, err
    assert (tmp_path / "run").exists() == ("zzzz" in settings[0])  # which is known after a round of samples


def test_the_folder_is_locked_before_data_are_read(improve: Path, tmp_path: Path, capsys: Any) -> None:
    """Another config could begin in the folder while a large file was read, and its rounds passed as ours."""
    lock = lock_file(tmp_path / "run" / LOCK_FILE)
    try:
        code, _, err = inside(capsys, "synth", "improve", improve, "data.path=nowhere.jsonl")
        assert code == 3 and "another process is at work here" in err and "nowhere" not in err, err
    finally:
        lock.remove()
    code, _, err = inside(capsys, "synth", "improve", improve, "data.path=nowhere.jsonl")
    assert code == 2 and "nowhere" in err and not list((tmp_path / "run").iterdir()), err
