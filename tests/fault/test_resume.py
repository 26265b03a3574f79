"""A run that is killed in the middle of an epoch and taken up again is the run that was left alone, bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from processes import log
from zygote import Zygote

ROLLOUT = "num_generations: 4, max_new_tokens: 6, num_iterations: 1, num_minibatches: 1"
OWN_ANSWERS = f"reward: {{kind: function, path: '%s:few'}}, rollout: {{{ROLLOUT}}}"
OBJECTIVES = {
    "sft": "{kind: sft}",
    "dpo": "{kind: preference, beta: 0.5}",
    "ppo": f"{{kind: ppo, adaptive_kl: {{target: 0.5, horizon: 50}}, {OWN_ANSWERS}}}",
    "grpo": f"{{kind: grpo, beta: 0.01, {OWN_ANSWERS}}}",
}
METHODS = {
    "lora": "{kind: lora, rank: 4}",
    "lora with dropout": "{kind: lora, rank: 4, dropout: 0.1}",
    "full": "{kind: full}",
    "prompt": "{kind: prompt, virtual_tokens: 3}",
}
STEPS, SAVED = 20, 7


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    folder = tmp_path_factory.mktemp("zygote")
    found = Zygote(folder / "log", RUNG_CACHE=str(folder / "cache"))
    yield found
    found.close()


def trained(run: Path) -> dict[str, torch.Tensor]:
    """Everything that the run publishes, by file and name."""
    files = sorted(file for kind in ("adapter", "model") for file in (run / kind).glob("*.safetensors"))
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


REFUSED = {("ppo", "lora with dropout"), ("grpo", "lora with dropout")}
"""Their answers would not be those of the policy that is compared with them."""


@pytest.mark.parametrize(("objective", "method"), sorted(set(product(OBJECTIVES, METHODS)) - REFUSED))
def test_killed_at_a_third_and_taken_up_again(
    objective: str, method: str, request: pytest.FixtureRequest, zygote: Zygote, tmp_path: Path
) -> None:
    config: Path = request.getfixturevalue("compared" if objective == "dpo" else "config")
    (tmp_path / "mine.py").write_text("def few(answer, row):\n    return -len(answer) / 8\n")
    aim = OBJECTIVES[objective].replace("%s", str(tmp_path / "mine.py"))
    settings = (
        f"objective={aim}",
        f"method={METHODS[method]}",
        f"training.max_steps={STEPS}",
        "training.epochs=9",
        f"training.checkpoint_every={SAVED}",
        "training.eval_every=5",
    )
    assert zygote.run("train", config, *settings, f"output={tmp_path / 'whole'}") == 0, zygote.log.read_text()[-3000:]
    run, began = tmp_path / "run", time.monotonic()
    child = zygote.start("train", config, *settings)
    while not list(run.glob(f"checkpoints/step-*{SAVED}/manifest.json")) and time.monotonic() < began + 120:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    zygote.wait(child)
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    said_before = len(zygote.log.read_text())
    assert zygote.run("train", config, *settings, "--resume") == 0, zygote.log.read_text()[-3000:]
    resumed = re.search(r"resumed from step-(\d+)", zygote.log.read_text()[said_before:])
    assert resumed is not None and int(resumed[1]) in (SAVED, 2 * SAVED)
    first, second = trained(tmp_path / "whole"), trained(run)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    told = [[{k: v for k, v in e.items() if "seconds" not in k} for e in log(f)] for f in (tmp_path / "whole", run)]
    assert told[0] == told[1]
