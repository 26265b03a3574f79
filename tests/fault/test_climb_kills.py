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

CLIMB = {
    "rungs": ["zero_shot", "few_shot", "lora", "full"],
    "search": {"trials": 4, "learning_rate": [1e-4, 1e-1]},
    "curve": [8],
    "on_top": [{"base_rung": "lora", "objective": {"kind": "sft"}}],
}
KILLS = 10


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Zygote]:
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
    rows = (*ladder["rows"], *ladder["curve"])
    kept = [{name: row[name] for name in (*measured, "score") if name in row} for row in rows]
    return [*kept, {"verdict": ladder["verdict"], "diagnoses": ladder["diagnoses"]}]


def test_killed_ten_times_at_random(zygote: Zygote, config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text() + f"climb: {json.dumps(CLIMB)}\n")
    settings = ("training.max_steps=4", "data.validation=0.2", "training.checkpoint_every=1")
    began = time.monotonic()
    assert zygote.run("climb", config, *settings, f"output={tmp_path / 'whole'}") == 0, zygote.log.read_text()[-3000:]
    took = time.monotonic() - began
    run, chance, landed = tmp_path / "other", np.random.default_rng(5), 0
    for _ in range(KILLS):
        child = zygote.start("climb", config, *settings, f"output={run}")
        # early at first: the whole climb is timed beside other tests, and without them ends before a late kill
        time.sleep(chance.uniform(0.05, 0.12 if landed < 3 else 0.3) * took)
        os.kill(child, signal.SIGKILL)
        landed += zygote.wait(child) == -signal.SIGKILL
    assert landed >= 3  # later ones find less and less to do
    assert zygote.run("climb", config, *settings, f"output={run}") == 0, zygote.log.read_text()[-3000:]
    assert said(run) == said(tmp_path / "whole")
