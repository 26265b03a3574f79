"""A plain LoRA folded into its base tensor by tensor: no more than one matrix is in memory, and no model.

What is written is what a merge of the whole model writes: float32, under the base's own names. Every matrix is proved:
read back, no number of it is further from W + s B A in float64 than rounding in float32 can take it.

Suffixes: O outputs, I inputs, R ranks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rung.errors import GateError, PlanError
from rung.files import safetensors_header
from rung.methods.adapter_files import CONFIG, lora_updates, other_than_plain_lora, read_state
from rung.training.run_folder import Gate

ROUNDING = 2.0**-24
"""Of a sum or a product in float32, over its size."""
ROWS = 512
"""Of a matrix that are proved at once."""
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class LoraUpdate:
    """scale * B A of one linear."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    transposed: bool
    """Whether the base keeps its weight as [I, O] (GPT-2)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it is added to."""
        outputs, inputs = len(self.b_OR), self.a_RI.shape[1]
        return (inputs, outputs) if self.transposed else (outputs, inputs)

    def added_to(self, weight: Tensor) -> Tensor:
        """The merged weight, float32."""
        first, second = self._factors()
        return torch.addmm(weight.float(), first, second, alpha=self.scale)

    def error(self, before: Tensor, after: Tensor) -> float:
        """The largest error of `after`, in float64, over what rounding allows there; infinite where one is no number.

        A sum of R products and a weight, each rounded, is off by at most R + 2 roundings of the sum of their sizes
        (Higham 2002, section 3.1).
        """
        first, second = (factor.double() for factor in self._factors())
        allowed = ROUNDING * (self.a_RI.shape[0] + 2)
        worst = 0.0
        for start in range(0, len(before), ROWS):
            rows = slice(start, start + ROWS)
            old, own = before[rows].double(), first[rows]
            off = (after[rows].double() - (old + self.scale * (own @ second))).abs()
            size = old.abs() + abs(self.scale) * (own.abs() @ second.abs())
            found = float((off / (allowed * size).clamp_min(torch.finfo(torch.float32).tiny)).max())
            worst = max(worst, found) if math.isfinite(found) else math.inf
        return worst

    def _factors(self) -> tuple[Tensor, Tensor]:
        return (self.a_RI.T, self.b_OR.T) if self.transposed else (self.b_OR, self.a_RI)


def read_updates(adapter: Path) -> dict[str, LoraUpdate]:
    """By the names of the modules.

    Raises `PlanError` for an adapter that is more than sums of B A, `CheckpointError` where parts of it are missing.
    """
    config, state = json.loads((adapter / CONFIG).read_text()), read_state(adapter)
    if (other := other_than_plain_lora(state, config)) is not None:
        raise PlanError("only a plain LoRA can be merged shard by shard", where=str(adapter), given=other)
    return {
        module: LoraUpdate(update.a_RI.float(), update.b_OR.float(), update.scale, update.transposed)
        for module, update in lora_updates(state, config, str(adapter)).items()
    }


def merge_shards(base: Path, updates: Mapping[str, LoraUpdate], target: Path) -> tuple[Gate, float]:
    """Write the merged files into `target`, each proved as it is there; also the largest change of a weight.

    `base` is a folder with config.json and safetensors. Raises `PlanError` where its names or shapes are not those of
    the adapter, `GateError` where nothing was learned or a tensor has changed that should not.
    """
    files = _files(base)
    _require_fitting(base, files, updates)
    worst = moved = 0.0
    for file in files:
        _merge(file, updates, target / file.name)
        off, change = _prove(file, updates, target / file.name)
        worst, moved = max(worst, off), max(moved, change)
    if moved == 0:
        raise GateError("gate publish.shards failed: the adapter adds nothing, or it is lost", where=str(base))
    config = json.loads((base / "config.json").read_text())
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
    if (base / INDEX).exists():
        index = json.loads((base / INDEX).read_text())
        index["metadata"] = {**index.get("metadata", {}), "total_size": sum(map(_bytes_of_tensors, files))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return Gate("publish.shards", "passed" if worst <= 1.0 else "failed", worst, 1.0), moved


def _files(base: Path) -> list[Path]:
    """Those that transformers reads: others may hold the same weights under other names."""
    if (base / INDEX).exists():
        return sorted({base / name for name in json.loads((base / INDEX).read_text())["weight_map"].values()})
    return [base / WHOLE] if (base / WHOLE).exists() else sorted(base.glob("*.safetensors"))


def _require_fitting(base: Path, files: list[Path], updates: Mapping[str, LoraUpdate]) -> None:
    shapes = {name: tuple(shape) for file in files for name, _, shape in _headers(file)}
    what = "the base's files name their tensors otherwise: it can only be merged whole"
    for module, update in updates.items():
        if shapes.get(f"{module}.weight") != update.shape:
            raise PlanError(what, where=str(base), given=f"{module}: {shapes.get(f'{module}.weight')}")


def _headers(file: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Name, type and shape of every tensor as it is written: float32 where the base has any float."""
    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            own = opened.get_slice(name)
            kind = own.get_dtype()
            yield name, "F32" if "F" in kind else kind, own.get_shape()  # F16, BF16, F64, F8_E4M3 and the like


def _bytes_of_tensors(file: Path) -> int:
    return sum(_size(kind, shape) for _, kind, shape in _headers(file))


def _size(kind: str, shape: list[int]) -> int:
    bits = int(re.sub(r"\D", "", kind) or 8)  # BOOL has no number
    return math.prod(shape) * bits // 8


def _merge(file: Path, updates: Mapping[str, LoraUpdate], target: Path) -> None:
    """Header first, then one tensor after another: the library's own writer wants all of them at once."""
    entries = ((name, kind, shape, _size(kind, shape)) for name, kind, shape in _headers(file))
    header = safetensors_header(entries, {"format": "pt"})
    with safe_open(file, "pt") as opened, target.open("wb") as out:
        out.write(header)
        for name in opened.keys():
            tensor, update = opened.get_tensor(name), updates.get(name.removesuffix(".weight"))
            wide = tensor.float() if tensor.is_floating_point() else tensor
            merged = wide if update is None else update.added_to(tensor)
            out.write(merged.contiguous().view(-1).view(torch.uint8).numpy().data)


def _prove(file: Path, updates: Mapping[str, LoraUpdate], written: Path) -> tuple[float, float]:
    """The largest error over what rounding allows, and the largest change of a weight."""
    worst = moved = 0.0
    with safe_open(file, "pt") as before, safe_open(written, "pt") as after:
        for name in before.keys():
            old, new = before.get_tensor(name), after.get_tensor(name)
            update = updates.get(name.removesuffix(".weight"))
            if update is None:
                if not torch.equal(old.float() if old.is_floating_point() else old, new):
                    raise GateError("gate publish.shards failed: a tensor has changed on its way", where=name)
                continue
            worst = max(worst, update.error(old, new))
            moved = max(moved, float((new - old.float()).abs().max()))
    return worst, moved
