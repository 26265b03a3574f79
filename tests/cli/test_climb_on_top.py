"""Rungs on top of rungs, rungs that are left out, and what the ladder says besides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from processes import inside
from rung.config.run import RunConfig
from rung.errors import PlanError
from rung.runs import checks
from rung.training.run_folder import read_items


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Preferences whose prompts stand in no test."""
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Which of number {i}?", "chosen": "pear", "rejected": "fig tree"} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def climb(config: Path, **settings: Any) -> Path:
    config.write_text(config.read_text() + f"climb: {json.dumps(settings)}\n")
    return config


def test_preferences_on_top_of_a_tuned_rung(config: Path, tmp_path: Path, pairs: Path, capsys: Any) -> None:
    then = {
        "base_rung": "lora",
        "objective": {"kind": "preference"},
        "data": {"path": str(pairs)},
        "training": {"max_steps": 2},
    }
    climb(
        config,
        rungs=["zero_shot", "lora"],
        on_top=[then, {**then, "name": "kto", "objective": {"kind": "preference", "loss": "kto"}}],
    )
    code, out, err = inside(capsys, "climb", config, "--json")
    assert code == 0, err
    ladder = json.loads(out)
    assert [row["rung"] for row in ladder["rows"]] == ["zero_shot", "lora", "lora then dpo", "kto"]
    lora, dpo = ladder["rows"][1:3]
    assert dpo["train_seconds"] > lora["train_seconds"] and dpo["disk_bytes"] > 0 and lora["disk_bytes"] > 0
    own = json.loads((tmp_path / "run" / "rungs" / "lora-then-dpo" / "run.json").read_text())
    assert own["config"]["model"]["name"] == str(tmp_path / "run" / "rungs" / "lora")
    assert own["status"] == "finished" and own["steps"] == 2
    assert dpo["scores"]["exact"]["examples"] == lora["scores"]["exact"]["examples"]  # the same questions
    code, again, err = inside(capsys, "climb", config, "--json")
    assert code == 0 and "rung" not in err.replace("report", "") and json.loads(again)["rows"] == ladder["rows"]


@pytest.mark.parametrize("form", ["as it is", "another case", "a system turn", "a full stop"])
def test_a_rung_on_top_must_not_learn_the_test(
    form: str, config: Path, tmp_path: Path, pairs: Path, questions: Path, capsys: Any
) -> None:
    """And it is said before anything is trained."""
    code, _, _ = inside(capsys, "climb", climb(config, rungs=["zero_shot"]))
    item = read_items(tmp_path / "run" / "rungs" / "zero_shot" / "items.parquet")[0][0]
    asked = json.loads(questions.read_text().splitlines()[int(item["source"].rpartition(" ")[2]) - 1])
    text = f"{asked['context']}\n\n{asked['question']}"
    text = {"another case": text.upper(), "a full stop": text + "."}.get(form, text)
    row = {"prompt": text, "chosen": "pear", "rejected": "fig"}
    if form == "a system turn":
        row["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]  # type: ignore[assignment]
    pairs.write_text(json.dumps(row) + "\n" + ("" if form == "a system turn" else pairs.read_text()))
    then = {"base_rung": "lora", "objective": {"kind": "preference"}, "data": {"path": str(pairs), "validation": 0}}
    own = f"climb={json.dumps({'rungs': ['lora'], 'on_top': [then]})}"
    code, _, err = inside(capsys, "climb", config, own, f"output={tmp_path / 'two'}")
    assert code == 2 and "ask what the test asks" in err and not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ({"objective": {"kind": "preference"}, "data": {"path": "pears.jsonl"}}, "pears.jsonl"),
        ({"objective": {"kind": "preference"}}, "compare nothing"),
        ({"objective": {"kind": "reward"}}, "reward model"),
    ],
)
def test_a_rung_on_top_that_cannot_be_is_an_error_before_anything_is_spent(
    then: dict[str, Any], words: str, config: Path, tmp_path: Path, capsys: Any
) -> None:
    climb(config, rungs=["lora"], on_top=[{"base_rung": "lora", **then}])
    code, _, err = inside(capsys, "climb", config)
    assert code == 2 and words in err and not (tmp_path / "run").exists()


def test_a_rung_on_top_of_one_that_retrieves(config: Path, tmp_path: Path, pairs: Path, capsys: Any) -> None:
    """It sees in training what it will see in the test."""
    then = {"base_rung": "lora", "objective": {"kind": "sft"}, "training": {"max_steps": 1}}
    rungs = ["zero_shot", "rag", {"kind": "lora", "context": "retrieved"}]
    climb(config, rungs=rungs, on_top=[then])
    code, out, err = inside(capsys, "climb", config, "evaluation.context=withheld", "evaluation.shots=0", "--json")
    assert code == 0, err
    run = json.loads((tmp_path / "run" / "rungs" / "lora-then-sft" / "run.json").read_text())
    below = json.loads((tmp_path / "run" / "rungs" / "lora" / "run.json").read_text())
    assert run["config"]["evaluation"]["context"] == "retrieved"
    assert run["data"]["train"]["tokens"] == below["data"]["train"]["tokens"]
    assert json.loads(out)["rows"][-1]["sees"] == "retrieved passages"


def test_nothing_that_fits_is_said(config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "free_memory", lambda device: 1000)
    search = {"trials": 2, "learning_rate": [1e-4, 1e-2]}
    climb(config, rungs=["lora"], search=search)
    for _ in range(2):  # and a second start is no other
        code, _, err = inside(capsys, "climb", config, "data.validation=0.2")
        assert code == 3 and "no rung could be measured" in err and "needs" in err and "trial" not in err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"rungs": ["zero_shot"], "on_top": [{"base_rung": "lora", "objective": {"kind": "preference"}}]},
            "no tuned rung",
        ),
        ({"rungs": ["lora"], "on_top": [{"base_rung": "lora", "objective": {"kind": "prefrence"}}]}, "prefrence"),
        (
            {"rungs": ["lora"], "on_top": [{"base_rung": "lora", "name": "LoRA", "objective": {"kind": "preference"}}]},
            "folder",
        ),
        ({"rungs": ["lora"], "on_top": [{"objective": {"kind": "preference"}}]}, "base_rung"),
        ({"rungs": ["lora"], "stop_at_target": True}, "target"),
    ],
)
def test_nonsense_is_refused_before_anything_is_spent(
    config: Path, tmp_path: Path, capsys: Any, settings: dict[str, Any], words: str
) -> None:
    code, _, err = inside(capsys, "climb", climb(config, **settings))
    assert code == 2 and words in err
    assert not (tmp_path / "run").exists()


def test_it_stops_at_the_target_when_asked(config: Path, capsys: Any, tmp_path: Path) -> None:
    climb(config, rungs=["zero_shot", "few_shot", "lora"], target=1e9, stop_at_target=True)
    code, out, err = inside(capsys, "climb", config, "evaluation.metrics=[perplexity]", "--json")
    assert code == 0, err
    ladder = json.loads(out)
    assert [row["rung"] for row in ladder["rows"]] == ["zero_shot"]
    assert [left["rung"] for left in ladder["skipped_rungs"]] == ["few_shot", "lora"]
    assert "surely reaches the target" in ladder["skipped_rungs"][0]["why"]
    code, out, _ = inside(capsys, "climb", config, "evaluation.metrics=[perplexity]")
    assert code == 0 and "not measured: lora" in out
    assert "surely reaches the target" in (tmp_path / "run" / "report.html").read_text()


def test_what_does_not_fit_is_left_out_with_the_reason(
    config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = {"base_rung": "full", "objective": {"kind": "sft"}}
    climb(config, rungs=["zero_shot", "full", "lora"], on_top=[then])
    before = checks.refuse_if_too_large

    def refuse(run_config: RunConfig, device: Any, *, beyond: bool) -> None:
        if run_config.method.kind == "full":
            raise checks.DoesNotFitError("this run needs 9 GB at its peak")
        before(run_config, device, beyond=beyond)

    monkeypatch.setattr(checks, "refuse_if_too_large", refuse)
    code, out, err = inside(capsys, "climb", config, "--json")
    assert code == 0, err
    ladder = json.loads(out)
    assert [row["rung"] for row in ladder["rows"]] == ["zero_shot", "lora"]
    left = {one["rung"]: one["why"] for one in ladder["skipped_rungs"]}
    assert "needs 9 GB" in left["full"] and "stands on full" in left["full then sft"]
    assert issubclass(checks.DoesNotFitError, PlanError)
