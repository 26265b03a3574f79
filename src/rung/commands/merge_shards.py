"""Merging a plain LoRA into its base tensor by tensor, with one matrix in memory and no model.

The result is that of a merge of the whole model: float32 under the base's own tensor names. In place of a comparison of
answers every matrix is read back and compared with W + s B A in float64, within the bound of float32 rounding. Only a
plain LoRA on safetensors files can be merged in this way; everything else needs the model. `merge.py` calls it for
`--by-shard` and for models that do not fit into memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from rung.errors import GateError
from rung.exporting.weights import INDEX, LoraUpdate, ModelWeights, model_files
from rung.files import safetensors_header
from rung.training.run_folder import Gate, read_json


def merge_shards(base: Path, updates: Mapping[str, LoraUpdate], target: Path) -> tuple[Gate, float]:
    """Write the merged files into `target` and prove each one; returns the gate and the largest change of a weight.

    `base` is a folder with config.json and safetensors. Raises `PlanError` if its names or shapes are not those of the
    adapter, `GateError` if nothing was learned or a tensor has changed that should not.
    """
    files = model_files(base)
    ModelWeights(base, updates)  # which refuses updates of other names or shapes
    largest_error = largest_change = 0.0
    for file in files:
        _merge(file, updates, target / file.name)
        error, change = _prove(file, updates, target / file.name)
        largest_error, largest_change = max(largest_error, error), max(largest_change, change)
    if largest_change == 0:
        raise GateError("gate publish.shards failed: the adapter adds nothing, or it is lost", where=str(base))
    config = read_json(base / "config.json")
    # The older name of `dtype`; both together would contradict each other.
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
    if (base / INDEX).exists():
        index = read_json(base / INDEX)
        total_size = sum(_size(dtype, shape) for file in files for _, dtype, shape in _headers(file))
        index["metadata"] = {**index.get("metadata", {}), "total_size": total_size}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return Gate.at_most("publish.shards", largest_error, 1.0), largest_change


def _headers(file: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Name, dtype and shape of every tensor as it is written: float32 if the base has any float dtype."""
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():
            tensor = tensors.get_slice(name)
            dtype = tensor.get_dtype()
            # Every float dtype of the format has an F in its name: F16, BF16, F64, F8_E4M3.
            yield name, "F32" if "F" in dtype else dtype, tensor.get_shape()


def _size(dtype: str, shape: list[int]) -> int:
    # BOOL has no number in its name and takes a byte. Float dtypes are F32 here, so F8_E4M3 is never seen.
    return math.prod(shape) * int(re.sub(r"\D", "", dtype) or 8) // 8


def _merge(file: Path, updates: Mapping[str, LoraUpdate], target: Path) -> None:
    """Write the header, then one tensor after another: the library's own writer needs all of them in memory."""
    entries = ((name, dtype, shape, _size(dtype, shape)) for name, dtype, shape in _headers(file))
    with safe_open(file, "pt") as tensors, target.open("wb") as out:
        out.write(safetensors_header(entries, {"format": "pt"}))
        for name in tensors.keys():
            tensor, update = tensors.get_tensor(name), updates.get(name.removesuffix(".weight"))
            float_tensor = tensor.float() if tensor.is_floating_point() else tensor
            merged = float_tensor if update is None else update.added_to(tensor)
            out.write(merged.contiguous().view(-1).view(torch.uint8).numpy().data)


def _prove(file: Path, updates: Mapping[str, LoraUpdate], written: Path) -> tuple[float, float]:
    """The largest error over the allowed rounding, and the largest change of a weight."""
    largest_error = largest_change = 0.0
    with safe_open(file, "pt") as before, safe_open(written, "pt") as after:
        for name in before.keys():
            old, new = before.get_tensor(name), after.get_tensor(name)
            update = updates.get(name.removesuffix(".weight"))
            # A tensor without an update is only converted, so it must be equal and not merely close.
            if update is None:
                if not torch.equal(old.float() if old.is_floating_point() else old, new):
                    raise GateError("gate publish.shards failed: a tensor has changed on its way", where=name)
                continue
            largest_error = max(largest_error, update.error(old, new))
            largest_change = max(largest_change, float((new - old.float()).abs().max()))
    return largest_error, largest_change
