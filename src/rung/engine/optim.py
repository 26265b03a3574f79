"""AdamW's groups and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from rung.spec.engine import OptimiserSpec


def make_optimiser(trainable: Mapping[str, nn.Parameter], spec: OptimiserSpec) -> torch.optim.AdamW:
    """AdamW with decay on matrices only. The learning rate is set at every step by `rate_at`."""
    matrices = [p for p in trainable.values() if p.dim() > 1]
    others = [p for p in trainable.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=(spec.beta1, spec.beta2), eps=spec.epsilon
    )


def rate_at(step: int, *, total: int, peak: float, schedule: str, warmup: float) -> float:
    """Learning rate of the step counted from 0.

    It rises linearly over ceil(warmup * total) steps, the first of them already above 0, and then follows the schedule
    over the steps that remain: cosine and linear would reach 0 one step after the last.
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    if schedule == "constant":
        return peak
    done = (step - rising) / max(1, total - rising)
    return peak * (0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done)
