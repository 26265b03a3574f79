"""A run that is killed at any moment ends with the weights of one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from processes import start
from zygote import Zygote

SETTINGS = (
    "training.max_steps=12",
    "training.epochs=12",
    "training.checkpoint_every=1",
    "training.eval_every=3",
    "training.patience=9",
)
"""A save after each step, and a second one whenever the validation loss is the best so far."""


@pytest.fixture
def zygote(config: Path, tmp_path: Path) -> Iterator[Zygote]:
    found = Zygote(tmp_path / "zygote.log", RUNG_CACHE=str(tmp_path / "cache"))
    yield found
    found.close()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def begun(run: Path, until: float) -> bool:
    """Wait for the manifest, or for a moment."""
    while not (there := (run / "run.json").exists()) and time.monotonic() < until:
        time.sleep(0.001)
    return there


def sweep(zygote: Zygote, config: Path, folder: Path, kills: int, seed: int) -> list[str]:
    """Kill as many runs; where each of them was, by its manifest. Every one must end as if nothing had happened.

    Moments are drawn from a little before a run's folder is there to about its end, whose distance is learned on the
    way: a machine is not as fast all the time.
    """
    assert zygote.run("train", config, *SETTINGS, f"output={folder / 'first'}") == 0, zygote.log.read_text()
    child = zygote.start("train", config, *SETTINGS, f"output={folder / 'whole'}")
    began = time.monotonic()
    assert begun(folder / "whole", began + 120)
    before, began = time.monotonic() - began, time.monotonic()
    assert zygote.wait(child) == 0
    took, expected = time.monotonic() - began, weights(folder / "whole")
    found, chance = [], np.random.default_rng(seed)
    for number in range(kills):
        run = folder / f"killed-{number}"
        child = zygote.start("train", config, *SETTINGS, f"output={run}")
        early = chance.uniform() < 0.1
        if not begun(run, time.monotonic() + (chance.uniform() * before if early else 120.0)):
            assert early
        elif not early:
            time.sleep(chance.uniform() * took)
        os.kill(child, signal.SIGKILL)
        zygote.wait(child)
        there = (run / "run.json").exists()
        found.append(json.loads((run / "run.json").read_text())["status"] if there else "not begun")
        took *= 0.95 if found[-1] == "finished" else 1.01
        code = zygote.run("train", config, *SETTINGS, f"output={run}", *(["--resume"] if there else []))
        assert code == 0, (found, zygote.log.read_text()[-3000:])
        own = weights(run)
        assert own.keys() == expected.keys() and all(torch.equal(own[n], expected[n]) for n in own)
        assert not [p.name for p in run.rglob(".*")]
    return found


def test_killed_at_random_moments(zygote: Zygote, config: Path, tmp_path: Path) -> None:
    assert "running" in sweep(zygote, config, tmp_path, 10, seed=1)


@pytest.mark.soak
def test_killed_at_two_hundred_random_moments(zygote: Zygote, config: Path, tmp_path: Path) -> None:
    assert sweep(zygote, config, tmp_path, 200, seed=2).count("running") > 100


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_says_so(end: signal.Signals, config: Path, tmp_path: Path) -> None:
    settings = ("training.max_steps=400", "training.epochs=400")
    with start("train", config, *settings) as running:
        log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(end)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "--resume" in err
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert manifest["status"] == "interrupted" and manifest["steps"] == int(saved.name.removeprefix("step-"))
