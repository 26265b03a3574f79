"""All that moves in a run, as this process holds it: numbers, gradients, moments, and how they are kept on disk."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rung.engine.distributed import ALONE, World
from rung.engine.optim import make_optimiser, set_rate
from rung.engine.parts import digests, held_here, rows_here
from rung.method.base import same_keys, same_shapes
from rung.spec.engine import OptimiserSpec

WEIGHTS, MOMENTS = "weights.safetensors", "optimiser.safetensors"


@dataclass
class Holding:
    """`moving` gives the model's parameters by name, `factor` the learning rate of each over the run's."""

    moving: Callable[[], Mapping[str, nn.Parameter]]
    spec: OptimiserSpec
    factor: Callable[[str], float]
    world: World = ALONE
    rows: dict[str, slice] = field(default_factory=dict)
    """Which rows of a parameter are held here, for those that are in parts."""

    def __post_init__(self) -> None:
        self._parts: dict[str, nn.Parameter] = {}
        self.optimiser = make_optimiser(self.own, self.spec, self.factor)

    @property
    def own(self) -> dict[str, nn.Parameter]:
        """What is held here of each parameter, in the model's own memory."""
        return {**self.moving(), **self._parts}

    def take_parts(self) -> None:
        """The model has been split: from here on only the rows held here are stepped. Moments begin anew."""
        moving = self.moving()
        self.rows = {name: rows for name, p in moving.items() if (rows := rows_here(p)) is not None}
        self._parts = {name: held_here(moving[name]) for name in self.rows}
        self.optimiser = make_optimiser(self.own, self.spec, self.factor)

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in (*self.moving().values(), *self._parts.values()):
            parameter.grad = None

    def let_go(self) -> None:
        """Nothing is stepped any more: gradients and moments go before the result is written."""
        self.clear()
        self.optimiser.state.clear()
        give_back()

    def gather(self, clip: float | None) -> Tensor:
        """Make gradients those of the whole step, at most `clip` long; returns how long they were, a scalar."""
        moving = self.moving()
        for name, part in self._parts.items():
            gradient = moving[name].grad  # summed over the processes as it arrived
            part.grad = gradient.to_local() if isinstance(gradient, DTensor) else None
        replicas = [p for name, p in moving.items() if name not in self._parts]
        self.world.add_up_gradients(replicas)
        if not self._parts:
            return torch.nn.utils.clip_grad_norm_(replicas, clip or math.inf)
        split = self.world.total([_squares(self._parts.values())])[0]
        norm = math.sqrt(split + _squares(replicas))
        if clip is not None and norm > clip:
            for parameter in (*replicas, *self._parts.values()):
                if parameter.grad is not None:
                    parameter.grad.mul_(clip / (norm + 1e-6))  # as torch's clip_grad_norm_
        return torch.tensor(norm, dtype=torch.float64)

    def step(self, rate: float) -> None:
        """Move, at the run's rate of this step times each group's own factor."""
        set_rate(self.optimiser, rate)
        self.optimiser.step()

    def replicas(self) -> dict[str, int]:
        """Digests of what every process holds whole, and so alike."""
        return digests((name, p) for name, p in self.moving().items() if name not in self.rows)

    def save(self, folder: Path) -> None:
        """Write numbers, moments and the generator's state; other processes than the first write their rows alone."""
        folder.mkdir(exist_ok=True)
        own, first = self.own, self.world.first
        mine = {n: p for n, p in own.items() if n in self.rows or first}
        kept = {n: p.detach() for n, p in mine.items() if p.numel() or n not in self.rows}
        save_file(_on_disk(kept), folder / WEIGHTS)
        known = {id(p): n for n, p in own.items()}
        moments: dict[str, Tensor] = {"rng": torch.get_rng_state()} if first else {}
        for number, parameter in enumerate(_numbered(self.optimiser)):
            in_parts = known[id(parameter)] in self.rows
            for name, value in self.optimiser.state.get(parameter, {}).items():
                tensor = torch.as_tensor(value).detach()
                here = tensor.numel() > 0 if in_parts and tensor.dim() else first
                if here:
                    moments[f"{number}.{name}"] = tensor
        save_file(_on_disk(moments), folder / MOMENTS)

    @torch.no_grad()
    def load_weights(self, folder: Path) -> None:
        """Put numbers back. Raises `CheckpointError` unless names and shapes are the same."""
        stored, moving = _Stored(folder, WEIGHTS), self.moving()
        same_keys(stored.names(), moving.keys(), "checkpoint")
        same_shapes(moving, {name: torch.empty(stored.shape(name), device="meta") for name in moving}, "checkpoint")
        for name, parameter in self.own.items():
            parameter.copy_(stored.read(name, self.rows.get(name)))

    def load(self, folder: Path) -> None:
        """Put back what `save` wrote, in as many processes or in another number of them."""
        self.load_weights(folder)
        stored = _Stored(folder, MOMENTS)
        torch.set_rng_state(stored.read("rng"))
        parameters, names = _numbered(self.optimiser), {id(p): n for n, p in self.own.items()}
        for parameter in parameters:
            self.optimiser.state[parameter] = {}
        for key in sorted(stored.names() - {"rng"}):
            number, name = key.split(".", 1)
            parameter = parameters[int(number)]
            rows = self.rows.get(names[id(parameter)]) if stored.shape(key) else None
            value = stored.read(key, rows)
            if name == "step":  # torch counts in a float tensor, bitsandbytes in a plain number
                self.optimiser.state[parameter][name] = int(value) if value.dtype is torch.int64 else value
            else:
                self.optimiser.state[parameter][name] = value.to(parameter.device)


class _Stored:
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


def _numbered(optimiser: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def give_back() -> None:
    """Return freed memory to the system, where the allocator can (glibc): what was many small tensors stays else."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
