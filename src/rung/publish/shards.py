"""A plain LoRA folded into its base file by file: no more than one file of the base is in memory, and no model.

What is written is what a merge of the whole model writes: float32, under the base's own names. Every matrix is proved
by products: what was written, read back, times random vectors is the base's product plus the adapter's own.

Suffixes: O outputs, I inputs, R ranks, P vectors.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rung.engine.record import Gate
from rung.errors import GateError, PlanError
from rung.method.files import CONFIG, read_state

LIMIT = 1e-3
"""Of an update's own size; rounding the sum with the base to float32 leaves a hundredth of it."""
VECTORS = 4
INDEX = "model.safetensors.index.json"
_OWN = "base_model.model."


@dataclass(frozen=True, slots=True)
class Update:
    """scale * B A of one linear."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    transposed: bool
    """Whether the base keeps its weight as [I, O] (GPT-2)."""

    def added_to(self, weight: Tensor) -> Tensor:
        """The merged weight, float32."""
        if self.transposed:
            return torch.addmm(weight.float(), self.a_RI.T, self.b_OR.T, alpha=self.scale)
        return torch.addmm(weight.float(), self.b_OR, self.a_RI, alpha=self.scale)

    def of(self, x_IP: Tensor) -> Tensor:
        """What it adds to the outputs, float64."""
        return self.scale * (self.b_OR.double() @ (self.a_RI.double() @ x_IP))


def read_updates(adapter: Path) -> dict[str, Update]:
    """By the names of the modules. Raises `PlanError` for an adapter that is more than sums of B A."""
    config, state = json.loads((adapter / CONFIG).read_text()), read_state(adapter)
    for name in ("use_dora", "modules_to_save"):
        if config.get(name):
            raise PlanError(
                "only a plain LoRA can be merged shard by shard",
                where=str(adapter),
                given=f"{name}: {config[name]}",
            )
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        found = re.fullmatch(re.escape(_OWN) + r"(.+)\.lora_([AB])\.weight", key)
        if config.get("peft_type") != "LORA" or found is None:
            raise PlanError("only a plain LoRA can be merged shard by shard", where=str(adapter), given=key)
        halves.setdefault(found[1], {})[found[2]] = tensor.float()
    transposed = bool(config.get("fan_in_fan_out"))
    return {m: Update(own["A"], own["B"], _scale(config, m), transposed) for m, own in halves.items()}


def merge_shards(base: Path, updates: Mapping[str, Update], target: Path) -> tuple[Gate, float]:
    """Write the merged files into `target`, each proved as it is there; also the largest change of a weight.

    `base` is a folder with config.json and safetensors. Raises `PlanError` where its names are not those of the
    adapter, `GateError` where a written matrix is not what it was made from, or nothing was learned.
    """
    files = sorted(base.glob("*.safetensors"))
    names = {name for file in files for name in _names(file)}
    if lost := sorted(m for m in updates if f"{m}.weight" not in names):
        what = "the base's files name their tensors otherwise: it can only be merged whole"
        raise PlanError(what, where=str(base), given=lost[0])
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
        shutil.copyfile(base / INDEX, target / INDEX)
    gate = Gate("publish.shards", "passed" if worst <= LIMIT else "failed", worst, LIMIT)
    return gate, moved


def _scale(config: Mapping[str, Any], module: str) -> float:
    """Of B A: alpha / rank, or over its root (rsLoRA, Kalajdzievski 2023); modules may have their own of both."""

    def own(patterns: Mapping[str, float] | None, usual: float) -> float:
        return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), usual)

    rank, alpha = own(config.get("rank_pattern"), config["r"]), own(config.get("alpha_pattern"), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _merge(file: Path, updates: Mapping[str, Update], target: Path) -> None:
    tensors: dict[str, Tensor] = {}
    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            tensor, update = opened.get_tensor(name), updates.get(name.removesuffix(".weight"))
            wide = tensor.float() if tensor.is_floating_point() else tensor
            tensors[name] = wide.contiguous() if update is None else update.added_to(tensor)
    save_file(tensors, target, metadata={"format": "pt"})


def _prove(file: Path, updates: Mapping[str, Update], written: Path) -> tuple[float, float]:
    """The largest error of a product over what the update adds to it, and the largest change of a weight."""
    draw = torch.Generator().manual_seed(0)
    worst = moved = 0.0
    with safe_open(file, "pt") as before, safe_open(written, "pt") as after:
        for name in before.keys():
            old, new = before.get_tensor(name), after.get_tensor(name)
            update = updates.get(name.removesuffix(".weight"))
            if update is None:
                if not torch.equal(old.float(), new.float()):
                    raise GateError("gate publish.shards failed: a tensor has changed on its way", where=name)
                continue
            x_IP = torch.randn(update.a_RI.shape[1], VECTORS, generator=draw, dtype=torch.float64)
            change = new.double() - old.double()
            expected = update.of(x_IP)
            found = (change.T if update.transposed else change) @ x_IP
            size = float(expected.abs().max())
            off = float((found - expected).abs().max())
            worst = max(worst, off / size if size else math.inf if off else 0.0)
            moved = max(moved, float(change.abs().max()))
    return worst, moved
