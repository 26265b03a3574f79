"""AdamW's groups and the course of the learning rate."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rung.config.training import OptimizerConfig
from rung.console import print_status
from rung.errors import PlanError
from rung.methods.protocol import TrainableSet, require_same_keys, require_same_shapes
from rung.training.distributed import SINGLE_PROCESS, World
from rung.training.fsdp import digests, local_rows, local_tensor


def make_optimizer(
    trainable: Mapping[str, nn.Parameter], config: OptimizerConfig, rate_factor: Callable[[str], float] = lambda _: 1.0
) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only; `set_rate` sets the learning rate at every step."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        groups.setdefault((parameter.dim() > 1, rate_factor(name)), []).append(parameter)
    made = [
        {"params": members, "weight_decay": config.weight_decay if matrix else 0.0, "rate_factor": factor}
        for (matrix, factor), members in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    kind = (
        torch.optim.AdamW
        if config.state_dtype == "float32"
        else _eight_bit_adamw(next(iter(trainable.values())).device)
    )
    return kind(made, lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon)


def _eight_bit_adamw(device: torch.device) -> Any:
    """AdamW of bitsandbytes. Raises `PlanError` where the library is not installed."""
    try:
        bnb: Any = import_module("bitsandbytes.optim")
    except ImportError as error:
        raise PlanError(
            "moments in 8 bits need bitsandbytes",
            where="training.optimizer.state_dtype",
            given="int8",
            hint="pip install 'rung[quantized]'",
        ) from error
    if device.type == "cuda":
        return bnb.PagedAdamW8bit
    print_status("moments in 8 bits, without paging: that needs a graphics card")
    return bnb.AdamW8bit


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The run's rate of this step, times each group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]


def train_only(optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], moving: TrainableSet) -> None:
    """Freeze what does not move, and drop its moments: those of layers that come and go would pile up."""
    for name, parameter in trainable.items():
        moves = name in moving.names
        parameter.requires_grad_(moves)
        if moving.restart_moments or not moves:
            optimizer.state.pop(parameter, None)


def learning_rate_at(step: int, *, total: int, peak: float, schedule: str, warmup: float) -> float:
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


WEIGHTS, MOMENTS = "weights.safetensors", "optimizer.safetensors"


@dataclass
class OptimizerState:
    """`moving` gives the model's parameters by name, `factor` the learning rate of each over the run's."""

    parameters: Callable[[], Mapping[str, nn.Parameter]]
    config: OptimizerConfig
    factor: Callable[[str], float]
    world: World = SINGLE_PROCESS
    rows: dict[str, slice] = field(default_factory=dict)
    """Which rows of a parameter are held here, for those that are in parts."""

    def __post_init__(self) -> None:
        self._parts: dict[str, nn.Parameter] = {}
        self.optimizer = make_optimizer(self.local_parameters, self.config, self.factor)

    @property
    def local_parameters(self) -> dict[str, nn.Parameter]:
        """What is held here of each parameter, in the model's own memory."""
        return {**self.parameters(), **self._parts}

    def shard_parameters(self) -> None:
        """The model has been split: from here on only the rows held here are stepped. Moments begin anew."""
        moving = self.parameters()
        self.rows = {name: rows for name, p in moving.items() if (rows := local_rows(p)) is not None}
        self._parts = {name: local_tensor(moving[name]) for name in self.rows}
        self.optimizer = make_optimizer(self.local_parameters, self.config, self.factor)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in (*self.parameters().values(), *self._parts.values()):
            parameter.grad = None

    def release(self) -> None:
        """Nothing is stepped any more: gradients and moments go before the result is written."""
        self.zero_grad()
        self.optimizer.state.clear()
        return_freed_memory()

    def reduce_and_clip(self, clip: float | None) -> Tensor:
        """Make gradients those of the whole step, at most `clip` long; returns how long they were, a scalar."""
        moving = self.parameters()
        for name, part in self._parts.items():
            gradient = moving[name].grad  # summed over the processes as it arrived
            part.grad = gradient.to_local() if isinstance(gradient, DTensor) else None
        replicas = [p for name, p in moving.items() if name not in self._parts]
        self.world.sum_gradients(replicas)
        if not self._parts:
            return torch.nn.utils.clip_grad_norm_(replicas, clip or math.inf)
        split = self.world.sum_values([_squares(self._parts.values())])[0]
        norm = math.sqrt(split + _squares(replicas))
        if clip is not None and norm > clip:
            for parameter in (*replicas, *self._parts.values()):
                if parameter.grad is not None:
                    parameter.grad.mul_(clip / (norm + 1e-6))  # as torch's clip_grad_norm_
        return torch.tensor(norm, dtype=torch.float64)

    def step(self, rate: float) -> None:
        """Move, at the run's rate of this step times each group's own factor."""
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()

    def replica_digests(self) -> dict[str, int]:
        """Digests of what every process holds whole, and so alike."""
        return digests((name, p) for name, p in self.parameters().items() if name not in self.rows)

    def save(self, folder: Path) -> None:
        """Write numbers, moments and the generator's state; other processes than the first write their rows alone."""
        folder.mkdir(exist_ok=True)
        own, first = self.local_parameters, self.world.is_rank0
        mine = {n: p for n, p in own.items() if n in self.rows or first}
        kept = {n: p.detach() for n, p in mine.items() if p.numel() or n not in self.rows}
        save_file(_on_disk(kept), folder / WEIGHTS)
        known = {id(p): n for n, p in own.items()}
        moments: dict[str, Tensor] = {"rng": torch.get_rng_state()} if first else {}
        for number, parameter in enumerate(_numbered_parameters(self.optimizer)):
            in_parts = known[id(parameter)] in self.rows
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensor = torch.as_tensor(value).detach()
                here = tensor.numel() > 0 if in_parts and tensor.dim() else first
                if here:
                    moments[f"{number}.{name}"] = tensor
        save_file(_on_disk(moments), folder / MOMENTS)

    @torch.no_grad()
    def load_weights(self, folder: Path) -> None:
        """Put numbers back. Raises `CheckpointError` unless names and shapes are the same."""
        stored, moving = _CheckpointTensors(folder, WEIGHTS), self.parameters()
        require_same_keys(stored.names(), moving.keys(), "checkpoint")
        require_same_shapes(
            moving, {name: torch.empty(stored.shape(name), device="meta") for name in moving}, "checkpoint"
        )
        for name, parameter in self.local_parameters.items():
            parameter.copy_(stored.read(name, self.rows.get(name)))

    def load(self, folder: Path) -> None:
        """Put back what `save` wrote, in as many processes or in another number of them."""
        self.load_weights(folder)
        stored = _CheckpointTensors(folder, MOMENTS)
        torch.set_rng_state(stored.read("rng"))
        parameters, names = _numbered_parameters(self.optimizer), {id(p): n for n, p in self.local_parameters.items()}
        for parameter in parameters:
            self.optimizer.state[parameter] = {}
        for key in sorted(stored.names() - {"rng"}):
            number, name = key.split(".", 1)
            parameter = parameters[int(number)]
            rows = self.rows.get(names[id(parameter)]) if stored.shape(key) else None
            value = stored.read(key, rows)
            if name == "step":  # torch counts in a float tensor, bitsandbytes in a plain number
                self.optimizer.state[parameter][name] = int(value) if value.dtype is torch.int64 else value
            else:
                self.optimizer.state[parameter][name] = value.to(parameter.device)


class _CheckpointTensors:
    """Tensors of a checkpoint: whole, or by rows in the folders of several processes, in their order."""

    def __init__(self, folder: Path, file: str) -> None:
        places = sorted(folder.glob("part-*")) or [folder]
        self.files: list[Any] = [safe_open(place / file, "pt") for place in places]
        self.where: dict[str, list[int]] = {}
        for number, opened in enumerate(self.files):
            for name in opened.keys():
                self.where.setdefault(name, []).append(number)

    def names(self) -> set[str]:
        return set(self.where)

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [tuple(self.files[n].get_slice(name).get_shape()) for n in self.where[name]]
        return (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """All of a tensor, or some rows; nothing else is read from the disk."""
        if rows is None and len(self.where[name]) == 1:
            whole: Tensor = self.files[self.where[name][0]].get_tensor(name)
            return whole
        rows = slice(0, self.shape(name)[0]) if rows is None else rows
        found, begin = [], 0
        for number in self.where[name]:
            part = self.files[number].get_slice(name)
            count = part.get_shape()[0]
            start, stop = max(rows.start - begin, 0), min(rows.stop - begin, count)
            if start < stop:
                found.append(part[start:stop])
            begin += count
        return torch.cat(found) if found else self.files[self.where[name][0]].get_tensor(name)[:0]


def _squares(parameters: Iterable[nn.Parameter]) -> float:
    return sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None)


def _on_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous().cpu() for name, value in tensors.items()}


def _numbered_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def return_freed_memory() -> None:
    """Return freed memory to the system, where the allocator can (glibc): what was many small tensors stays else."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
