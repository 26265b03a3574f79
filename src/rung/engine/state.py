"""How far a run is, and its own numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from rung.engine.record import peak_memory_bytes
from rung.spec.engine import EngineSpec


@dataclass
class Progress:
    """What changes as a run goes on, besides weights and optimiser: all of it is JSON."""

    step: int = 0
    """Optimiser steps taken, skipped ones included."""
    seconds: float = 0.0
    tokens: int = 0
    loss: float = math.nan
    skipped: int = 0
    best: float | None = None
    """Lowest validation loss so far, in nats per token."""
    best_step: int = 0
    misses: int = 0
    """Measurements in a row that did not improve the best."""
    validation: float | None = None
    objective: dict[str, float] = field(default_factory=dict)
    """What the objective learned besides parameters."""
    method: dict[str, Any] = field(default_factory=dict)
    """What the method keeps besides parameters."""


Watch = Callable[[float], str | None]
"""Hears of a validation loss; says why the run should end there, if it should."""


def nobody(loss: float) -> str | None:
    """Watches nothing."""
    return None


def total_steps(spec: EngineSpec, rows: int, repeats: int = 1) -> int:
    """Optimiser steps of a whole run over this many rows, each window of them learned from so many times."""
    per_epoch = -(-rows // spec.examples_per_step)
    total = math.ceil(spec.epochs * per_epoch - 1e-9) * repeats
    return min(total, spec.max_steps or total)


def rows_of_step(step: int, rows: int, per_step: int, seed: int) -> list[int]:
    """Numbers of the rows of a step counted from 0: a pure function of seed and step."""
    epoch, place = divmod(step, -(-rows // per_step))
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return [int(row) for row in order[place * per_step : (place + 1) * per_step]]


def summary(progress: Progress, moving: Mapping[str, nn.Parameter]) -> Mapping[str, Any]:
    """The run's own numbers for `run.json`; times are without loading, evaluation and saving."""
    return {
        "steps": progress.step,
        "train_seconds": round(progress.seconds, 3),
        "tokens_per_second": round(progress.tokens / progress.seconds, 1) if progress.seconds else None,
        "tokens": progress.tokens,
        "peak_memory_bytes": peak_memory_bytes(),
        "trainable_parameters": sum(p.numel() for p in moving.values()),
        "train_loss": progress.loss,
        "validation_loss": progress.validation,
        "best_step": progress.best_step,
    }
