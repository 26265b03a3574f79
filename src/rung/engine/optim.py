"""AdamW's groups and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from rung.engine.progress import say
from rung.errors import PlanError
from rung.method.base import Moving
from rung.spec.engine import OptimiserSpec


def make_optimiser(
    trainable: Mapping[str, nn.Parameter], spec: OptimiserSpec, rate_factor: Callable[[str], float] = lambda _: 1.0
) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only; `set_rate` sets the learning rate at every step."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        groups.setdefault((parameter.dim() > 1, rate_factor(name)), []).append(parameter)
    made = [
        {"params": members, "weight_decay": spec.weight_decay if matrix else 0.0, "rate_factor": factor}
        for (matrix, factor), members in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    kind = torch.optim.AdamW if spec.moments == "float32" else _in_eight_bits(next(iter(trainable.values())).device)
    return kind(made, lr=0.0, betas=(spec.beta1, spec.beta2), eps=spec.epsilon)


def _in_eight_bits(device: torch.device) -> Any:
    """AdamW of bitsandbytes. Raises `PlanError` where the library is not installed."""
    try:
        bnb: Any = import_module("bitsandbytes.optim")
    except ImportError as error:
        raise PlanError(
            "moments in 8 bits need bitsandbytes",
            where="engine.optimiser.moments",
            given="int8",
            hint="pip install 'rung[quantised]'",
        ) from error
    if device.type == "cuda":
        return bnb.PagedAdamW8bit
    say("moments in 8 bits, without paging: that needs a graphics card")
    return bnb.AdamW8bit


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """The run's rate of this step, times each group's own factor."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["rate_factor"]


def move_only(optimiser: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], moving: Moving) -> None:
    """Freeze what does not move, and drop its moments: those of layers that come and go would pile up."""
    for name, parameter in trainable.items():
        moves = name in moving.names
        parameter.requires_grad_(moves)
        if moving.anew or not moves:
            optimiser.state.pop(parameter, None)


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
