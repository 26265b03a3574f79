"""A climb that is killed again and again ends with the ladder of one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zygote import Zygote

KILLS = 10


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    tmp_path = tmp_path_factory.mktemp("zygote")
    found = Zygote(tmp_path / "zygote.log", RUNG_CACHE=str(tmp_path / "cache"))
    yield found
    found.close()


def said(run: Path) -> list[dict[str, Any]]:
    """The ladder and the curve without what a clock or the system's memory says; paths of one length."""
    ladder = json.loads((run / "run.json").read_text())["ladder"]
    measured = (
        "rung",
        "sees",
        "scores",
        "gain",
        "trainable_parameters",
        "prompt_tokens",
        "rows",
        "score",
        "disk_bytes",
    )
    rows = (*ladder["rows"], *ladder.get("curve", ()))
    kept = [{name: row[name] for name in (*measured, "score") if name in row} for row in rows]
    models = [(model["model"], model["parameters"], model.get("license")) for model in ladder["models"]]
    return [*kept, {"verdict": ladder["verdict"], "diagnoses": ladder["diagnoses"], "models": models}]


def test_killed_ten_times_at_random(zygote: Zygote, config: Path, other_base: Path, tmp_path: Path) -> None:
    """Between rungs, trials, points of the curve, bases, and rows that are one rung's own."""
    rows = [{"context": f"crate {i}", "question": f"which fruit, {i}?", "answer": "apples"} for i in range(40)]
    (tmp_path / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"data": {"path": str(tmp_path / "made.jsonl")}}
    other = {"model": {"name": str(other_base)}}
    climb = {
        "rungs": [
            *("zero_shot", {"kind": "few_shot", **own, **other}, "lora"),
            {"kind": "lora", "name": "made on the other", **own, **other},
        ],
        "search": {"trials": 4, "learning_rate": [1e-4, 1e-1]},
        "curve": [8],
        "on_top": [{"base_rung": "made on the other", "objective": {"kind": "sft"}}],
    }
    ends_as_one_that_was_left_alone(zygote, config, tmp_path, climb, KILLS)


def ends_as_one_that_was_left_alone(
    zygote: Zygote, config: Path, tmp_path: Path, climb: dict[str, Any], kills: int
) -> None:
    config.write_text(config.read_text() + f"climb: {json.dumps(climb)}\n")
    settings = ("training.max_steps=4", "data.validation=0.2", "training.checkpoint_every=1")
    began = time.monotonic()
    assert zygote.run("climb", config, *settings, f"output={tmp_path / 'whole'}") == 0, zygote.log.read_text()[-3000:]
    took = time.monotonic() - began
    run, chance, landed = tmp_path / "other", np.random.default_rng(5), 0
    for _ in range(kills):
        child = zygote.start("climb", config, *settings, f"output={run}")
        # early at first: the whole climb is timed beside other tests, and without them ends before a late kill
        time.sleep(chance.uniform(0.05, 0.12 if landed < 3 else 0.3) * took)
        os.kill(child, signal.SIGKILL)
        landed += zygote.wait(child) == -signal.SIGKILL
    assert landed >= min(3, kills - 2)  # later ones find less and less to do
    assert zygote.run("climb", config, *settings, f"output={run}") == 0, zygote.log.read_text()[-3000:]
    assert said(run) == said(tmp_path / "whole")
