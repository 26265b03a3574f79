"""Rungs on top of rungs, rungs that are left out, and what the ladder says besides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from processes import inside
from rung import planned
from rung.engine.items import read_items
from rung.errors import PlanError
from rung.spec.run import RunSpec


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
        "above": "lora",
        "objective": {"kind": "preference"},
        "data": {"path": str(pairs)},
        "engine": {"max_steps": 2},
    }
    climb(
        config,
        rungs=["zero_shot", "lora"],
        then=[then, {**then, "name": "kto", "objective": {"kind": "preference", "loss": "kto"}}],
    )
    code, out, err = inside(capsys, "climb", config, "--json")
    assert code == 0, err
    ladder = json.loads(out)
    assert [row["rung"] for row in ladder["ladder"]] == ["zero_shot", "lora", "lora then dpo", "kto"]
    lora, dpo = ladder["ladder"][1:3]
    assert dpo["train_seconds"] > lora["train_seconds"] and dpo["disk_bytes"] > 0 and lora["disk_bytes"] > 0
    own = json.loads((tmp_path / "run" / "rungs" / "lora-then-dpo" / "run.json").read_text())
    assert own["spec"]["model"]["name"] == str(tmp_path / "run" / "rungs" / "lora")
    assert own["status"] == "finished" and own["steps"] == 2
    assert dpo["scores"]["exact"]["examples"] == lora["scores"]["exact"]["examples"]  # the same questions
    code, again, err = inside(capsys, "climb", config, "--json")
    assert code == 0 and "rung" not in err.replace("report", "") and json.loads(again)["ladder"] == ladder["ladder"]


def test_a_rung_on_top_must_not_learn_the_test(
    config: Path, tmp_path: Path, pairs: Path, questions: Path, capsys: Any
) -> None:
    code, _, _ = inside(capsys, "climb", climb(config, rungs=["zero_shot"]))
    item = read_items(tmp_path / "run" / "rungs" / "zero_shot" / "items.parquet")[0][0]
    asked = json.loads(questions.read_text().splitlines()[int(item["source"].rpartition(" ")[2]) - 1])
    row = {"prompt": f"{asked['context'].upper()}\n\n{asked['question']}", "chosen": "pear", "rejected": "fig"}
    pairs.write_text(pairs.read_text() + json.dumps(row) + "\n")
    then = {"above": "lora", "objective": {"kind": "preference"}, "data": {"path": str(pairs), "validation": 0}}
    code, _, err = inside(
        capsys,
        "climb",
        config,
        f"climb={json.dumps({'rungs': ['lora'], 'then': [then]})}",
        f"output={tmp_path / 'two'}",
    )
    assert code == 2 and "ask what the test asks" in err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rungs": ["zero_shot"], "then": [{"above": "lora", "objective": {"kind": "preference"}}]}, "no tuned rung"),
        ({"rungs": ["lora"], "then": [{"above": "lora", "objective": {"kind": "prefrence"}}]}, "prefrence"),
        (
            {"rungs": ["lora"], "then": [{"above": "lora", "name": "LoRA", "objective": {"kind": "preference"}}]},
            "folder",
        ),
        ({"rungs": ["lora"], "then": [{"objective": {"kind": "preference"}}]}, "above"),
        ({"rungs": ["lora"], "stop": True}, "target"),
    ],
)
def test_nonsense_is_refused_before_anything_is_spent(
    config: Path, tmp_path: Path, capsys: Any, settings: dict[str, Any], words: str
) -> None:
    code, _, err = inside(capsys, "climb", climb(config, **settings))
    assert code == 2 and words in err
    assert not (tmp_path / "run").exists()


def test_it_stops_at_the_target_when_asked(config: Path, capsys: Any, tmp_path: Path) -> None:
    climb(config, rungs=["zero_shot", "few_shot", "lora"], target=1e9, stop=True)
    code, out, err = inside(capsys, "climb", config, "evaluate.metrics=[perplexity]", "--json")
    assert code == 0, err
    ladder = json.loads(out)
    assert [row["rung"] for row in ladder["ladder"]] == ["zero_shot"]
    assert [left["rung"] for left in ladder["left"]] == ["few_shot", "lora"]
    assert "surely reaches the target" in ladder["left"][0]["why"]
    code, out, _ = inside(capsys, "climb", config, "evaluate.metrics=[perplexity]")
    assert code == 0 and "not measured: lora" in out
    assert "surely reaches the target" in (tmp_path / "run" / "report.html").read_text()


def test_what_does_not_fit_is_left_out_with_the_reason(
    config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = {"above": "full", "objective": {"kind": "sft"}}
    climb(config, rungs=["zero_shot", "full", "lora"], then=[then])
    before = planned.refuse_hopeless

    def refuse(spec: RunSpec, device: Any, *, beyond: bool) -> None:
        if spec.method.kind == "full":
            raise planned.DoesNotFitError("this run needs 9 GB at its peak")
        before(spec, device, beyond=beyond)

    monkeypatch.setattr(planned, "refuse_hopeless", refuse)
    code, out, err = inside(capsys, "climb", config, "--json")
    assert code == 0, err
    ladder = json.loads(out)
    assert [row["rung"] for row in ladder["ladder"]] == ["zero_shot", "lora"]
    left = {one["rung"]: one["why"] for one in ladder["left"]}
    assert "needs 9 GB" in left["full"] and "stands on full" in left["full then sft"]
    assert issubclass(planned.DoesNotFitError, PlanError)
