"""The weights of a run as a stream: the files of its base, with the updates of a LoRA added row by row.

Nothing is loaded as a whole, so a model larger than memory can be merged and exported; the price is that only a plain
LoRA on safetensors files can be read in this way. `commands/merge_shards.py` and `gguf_file.py` read from here.

Suffixes: O outputs, I inputs, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rung.errors import PlanError
from rung.methods.adapter_files import CONFIG, lora_updates, other_than_plain_lora, read_state
from rung.training.run_folder import read_json

FLOAT32_ROUNDOFF = 2.0**-24
"""Relative error of one rounding in float32: half a unit in the last place."""
ROWS_PER_PROOF = 512
"""Rows of a matrix that are compared at once: the comparison is in float64 and needs several copies."""
INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class LoraUpdate:
    """The update scale * first @ second of one weight: B A, or its transpose if the base keeps [I, O] (GPT-2)."""

    first: Tensor
    second: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that the update is added to."""
        return len(self.first), self.second.shape[1]

    def rows(self, rows: slice) -> LoraUpdate:
        """The update of some rows of the weight."""
        return LoraUpdate(self.first[rows], self.second, self.scale)

    def added_to(self, weight: Tensor) -> Tensor:
        """The merged weight, float32."""
        return torch.addmm(weight.float(), self.first, self.second, alpha=self.scale)

    def error(self, before: Tensor, after: Tensor) -> float:
        """The largest error of `after`, in float64, over the rounding allowed at that entry; infinite if one is NaN.

        A sum of R products and a weight, each rounded, is off by at most R + 2 roundings of the sum of their sizes
        (Higham 2002, section 3.1).
        """
        first, second = self.first.double(), self.second.double()
        allowed = FLOAT32_ROUNDOFF * (len(second) + 2)
        worst = 0.0
        for start in range(0, len(before), ROWS_PER_PROOF):
            rows = slice(start, start + ROWS_PER_PROOF)
            before_rows, first_rows = before[rows].double(), first[rows]
            error = (after[rows].double() - (before_rows + self.scale * (first_rows @ second))).abs()
            size = before_rows.abs() + abs(self.scale) * (first_rows.abs() @ second.abs())
            # clamp_min: an exact zero allows no error at all, and 0 / 0 would count as an infinite one.
            largest = float((error / (allowed * size).clamp_min(torch.finfo(torch.float32).tiny)).max())
            # max() would drop a NaN, since every comparison with it is false.
            worst = max(worst, largest) if math.isfinite(largest) else math.inf
        return worst


def read_updates(adapter: Path) -> dict[str, LoraUpdate]:
    """The updates of a saved adapter by module name.

    Raises `PlanError` for an adapter other than a plain LoRA, `CheckpointError` if parts of it are missing.
    """
    config, state = read_json(adapter / CONFIG), read_state(adapter)
    if (other := other_than_plain_lora(state, config)) is not None:
        raise PlanError("only a plain LoRA can be merged tensor by tensor", where=str(adapter), given=other)
    updates = {}
    for module, saved in lora_updates(state, config, str(adapter)).items():
        a_RI, b_OR = saved.a_RI.float(), saved.b_OR.float()
        updates[module] = LoraUpdate(*((a_RI.T, b_OR.T) if saved.transposed else (b_OR, a_RI)), saved.scale)
    return updates


def model_files(folder: Path) -> list[Path]:
    """The files that transformers reads: others in the folder may hold the same weights under other names."""
    if (folder / INDEX).exists():
        return sorted({folder / name for name in read_json(folder / INDEX)["weight_map"].values()})
    return [folder / SINGLE_FILE] if (folder / SINGLE_FILE).exists() else sorted(folder.glob("*.safetensors"))


@dataclass(frozen=True)
class ModelWeights:
    """The weights of a model folder with the updates of a LoRA, read row by row in float32.

    Raises `PlanError` where the updates are of other names or shapes than the weights.
    """

    folder: Path
    updates: Mapping[str, LoraUpdate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problem = "the base's files name their tensors otherwise: it can only be merged whole"
        for module, update in self.updates.items():
            if (shape := self.shapes.get(f"{module}.weight")) != update.shape:
                raise PlanError(problem, where=str(self.folder), given=f"{module}: {shape}")

    @cached_property
    def _handles(self) -> dict[str, Any]:
        handles = [safe_open(str(file), "pt") for file in model_files(self.folder)]
        return {str(name): handle for handle in handles for name in handle.keys()}  # type: ignore[no-untyped-call]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by name, in the order of the files."""
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._handles.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor with its update, float32."""
        weight = self._handles[name].get_slice(name)[start:stop]
        update = self.updates.get(name.removesuffix(".weight"))
        return weight.float() if update is None else update.rows(slice(start, stop)).added_to(weight)

    def blocks(self, name: str, rows: int) -> Iterator[Tensor]:
        """The tensor in blocks of rows."""
        for start in range(0, self.shapes[name][0], rows):
            yield self.rows(name, start, min(start + rows, self.shapes[name][0]))
