"""Answers by Rung, as `rung eval` makes them: `.venv/bin/python -m benchmarks.ours_eval JOB.json RESULT.json`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import peak, reset_peak, resident
from rung.config.evaluation import EvaluationConfig
from rung.config.model import ModelConfig
from rung.config.objective import RolloutConfig
from rung.models.generate import Sampling, generate
from rung.runs.load import open_base

IMPORTED = resident()


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Answer all prompts with the settings that an evaluation or a rollout has by default."""
    policy = open_base(ModelConfig(name=job["base"], dtype="float32")).policy
    sampling, batch, stops = Sampling(job["max_new_tokens"]), EvaluationConfig().batch, job["stop_ids"]
    if job["answers"] > 1:
        sampling = Sampling(job["max_new_tokens"], 1.0, job["seed"], job["answers"])
        batch, stops = RolloutConfig().batch, []
    reset_peak()
    started = time.perf_counter()
    answers = generate(policy, job["prompts"], stop_ids=stops, sampling=sampling, batch_size=batch)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "answers": [a.ids for a in answers],
        "imported_bytes": IMPORTED,
        "peak_bytes": peak(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answer(json.loads(Path(sys.argv[1]).read_text()))))
