"""Weights that stay in their safetensors files until a process reads the rows that it holds.

A base that several processes share in parts must not be in the memory of any of them as a whole: 141 GB for 70 billion
parameters. Here the model is built on torch's meta device, which holds shapes and no values; every parameter knows the
bytes of its file (`StoredTensor`), and `read_rows` reads some rows of it. Buffers, such as rotary frequencies, are
computed when the model is built, because no file has them. A trained model goes back the same way, one tensor at a
time. `models/load.py` builds such a model, `training/fsdp.py` shards it and reads the rows, `runs/train.py` writes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel

from rung.errors import ConfigError, PlanError
from rung.files import check_safetensors, read_safetensors_header, safetensors_header
from rung.models.base_folder import INDEX_FILE, check_json, is_finite
from rung.models.base_model import require_all_weights
from rung.models.targets import layer_number

WEIGHTS_FILE = "model.safetensors"
READ_BYTES = 64 * 2**20
"""Bytes of a file in the memory of the host at one time."""
SHARD_BYTES = 5 * 10**9
"""Largest safetensors file of a model that is written tensor by tensor, unless one tensor is larger."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ATTRIBUTE = "_rung_stored_tensor"


class ShardedLoading(NamedTuple):
    """How a base is loaded that several processes share in parts."""

    trains_base: bool
    """Whether the matrices outside the layers are shared in parts as well; otherwise every process holds them whole."""
    on_rank0: Callable[[Callable[[], Any]], Any]
    """Runs a function in the first process and returns its value in all, for what reads whole files."""


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file, and what its parameter is once it is read."""

    name: str
    file: Path
    start: int
    """The first byte of its data in the file."""
    dtype: torch.dtype
    """In the file."""
    shape: tuple[int, ...]
    loaded: torch.dtype
    """Dtype of a base that is loaded as a whole; rows are rounded to it first, so that both ways give one model."""
    device: torch.device
    """Where the parameter belongs."""


def stored_tensor(parameter: Tensor) -> StoredTensor | None:
    """Where the values of a parameter are that is not read yet; None for any other parameter."""
    return getattr(parameter, _ATTRIBUTE, None) if parameter.is_meta else None


def is_in_parts(model: nn.Module) -> bool:
    """Whether several ranks share the model, each with some rows."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads of a model's folder: `model.safetensors`, else those of its index.

    Others beside them belong to an optimizer, an adapter or another tool. Raises `ConfigError` for a folder without.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = check_json(folder / INDEX_FILE, "fetch it again with all files of the model")
    if index is None:
        given = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:3])
        summary = "this folder has no weights under the names that transformers reads"
        raise ConfigError(summary, where=str(folder), given=given, allowed=f"{WEIGHTS_FILE} or {INDEX_FILE}")
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def headers_digest(folder: Path) -> str:
    """SHA-256 over names, sizes and headers of a model's safetensors files, without their data."""
    described = [(file.name, file.stat().st_size, read_safetensors_header(file)) for file in weight_files(folder)]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within the context, modules are built with parameters on the meta device and with real buffers."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # unchanged: a tied parameter stays one object
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def leave_in_files(
    model: PreTrainedModel, folder: Path, loaded: torch.dtype, device: torch.device, *, trains_base: bool
) -> None:
    """Tell every parameter of a model on the meta device where its values are, and read those that are never shared.

    These are all parameters outside the layers, with `trains_base` only vectors. Raises `ConfigError` unless the
    tensors of the files are those of the model, `PlanError` for tensors that only a whole load converts, and for two of
    one tied parameter that differ.
    """
    expected = model.state_dict(keep_vars=True)
    sources = _sources_by_id(model, expected, folder, loaded, device)
    read: dict[int, Tensor] = {}
    for name, value in expected.items():
        if id(value) not in sources:
            continue
        source = sources[id(value)]
        setattr(value, _ATTRIBUTE, source)
        is_in_parts = layer_number(f".{name}") is not None or (trains_base and value.dim() > 1)
        if not isinstance(value, nn.Parameter) or not is_in_parts:
            if id(value) not in read:
                read[id(value)] = _read_whole(value, source)
            _replace(model, name, read[id(value)])


def _sources_by_id(
    model: PreTrainedModel, expected: Mapping[str, Tensor], folder: Path, loaded: torch.dtype, device: torch.device
) -> dict[int, StoredTensor]:
    """Where the values of every parameter are, by its identity: tied parameters are one object."""
    sources = dict[int, StoredTensor]()
    unexpected, mismatched, misshapen = list[str](), list[tuple[str, torch.Size, torch.Size]](), set[int]()
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    for name, source in _stored_tensors(folder, loaded, device).items():
        target = _name_in_model(model, name, expected)
        if target is None:
            unexpected += [] if any(pattern.search(name) for pattern in ignored) else [name]
            continue
        value = expected[target]
        if isinstance(source, str):
            if isinstance(value, nn.Parameter):
                raise _unread_dtype(name, source)
        elif value.shape != source.shape:
            mismatched.append((name, torch.Size(source.shape), value.shape))
            misshapen.add(id(value))
        else:
            _require_same_bytes(sources.setdefault(id(value), source), source)
    # a buffer that no file has was computed when the model was built
    present = sources.keys() | misshapen
    missing = [n for n, v in expected.items() if isinstance(v, nn.Parameter) and id(v) not in present]
    if missing and unexpected:
        summary = "the tensors of this base have other names than those of its model, which only a whole load converts"
        hint = "leave model.sharded out, or save the base once with transformers"
        raise PlanError(summary, where="model.sharded", given=unexpected[0], hint=hint)
    report = {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}
    require_all_weights(report, folder)
    return sources


def _unread_dtype(name: str, dtype: str) -> PlanError:
    summary = f"{name} has a dtype that a base in parts is not read from"
    hint = "leave model.sharded out, or save the base once with transformers in bfloat16"
    return PlanError(summary, where="model.sharded", given=dtype, allowed=", ".join(_DTYPES), hint=hint)


def _require_same_bytes(first: StoredTensor, second: StoredTensor) -> None:
    """Raise `PlanError` for two tensors of one tied parameter that differ: a whole load does not tie them then."""
    if first.name == second.name:
        return
    same = first.dtype is second.dtype
    size, done = first.dtype.itemsize * math.prod(first.shape), 0
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        while same and done < size:
            count = min(READ_BYTES, size - done)
            same, done = one.read(count) == other.read(count), done + count
    if not same:
        summary = "the config ties two tensors of this base, and its files have another value for each"
        hint = "set tie_word_embeddings to false in config.json, or save the base without the one that is not used"
        raise PlanError(summary, where="model.name", given=f"{first.name}, {second.name}", hint=hint)


def read_rows(source: StoredTensor, rows: slice | None, out: Tensor) -> None:
    """Read some rows of a tensor, or all of it, into `out`, which has their shape; no other byte is read.

    Raises `ConfigError` for a value that is NaN or infinite.
    """
    count = source.shape[0] if source.shape else 1
    rows = slice(0, count) if rows is None else rows
    row_elements = out.new_empty(source.shape, device="meta").numel() // max(1, count)
    flat, width = out.reshape(-1), source.dtype.itemsize
    step = max(1, READ_BYTES // width)
    with source.file.open("rb", buffering=0) as stream:
        stream.seek(source.start + rows.start * row_elements * width)
        for start in range(0, flat.numel(), step):
            part = torch.empty(min(step, flat.numel() - start), dtype=source.dtype)
            _read_into(stream, part, source)
            if not is_finite(part):
                summary = f"weight {source.name} holds a value that is not finite"
                hint = "the file is damaged, or the training that made it diverged: take another copy or checkpoint"
                raise ConfigError(summary, where="model.name", given=str(source.file), hint=hint)
            flat[start : start + len(part)].copy_(part.to(source.loaded))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a file of the model has, by name, as this process holds them; tied ones once."""
    names_by_id: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names_by_id.setdefault(id(tensor), name)
    return {name: tensors[name] for name in names_by_id.values()}


def write_model(folder: Path, model: PreTrainedModel, gather: Callable[[Tensor], Tensor]) -> None:
    """Write config and weights as transformers does, one tensor at a time; `gather` makes a whole one of a part.

    Every rank that holds a part has to gather the same tensors meanwhile, in the order of `model_tensors`.
    """
    tensors = model_tensors(model)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    groups: list[list[str]] = [[]]
    for name in tensors:
        if groups[-1] and sum(tensors[n].nbytes for n in (*groups[-1], name)) > SHARD_BYTES:
            groups.append([])
        groups[-1].append(name)
    files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        files = [WEIGHTS_FILE]
    for file, names in zip(files, groups, strict=True):
        _write_file(folder / file, {name: tensors[name] for name in names}, gather)
    if len(groups) > 1:
        weight_map = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        metadata = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        content = {"metadata": metadata, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_file(file: Path, tensors: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]) -> None:
    dtypes = {dtype: name for name, dtype in _DTYPES.items()}
    entries = [(name, dtypes[tensor.dtype], tensor.shape, tensor.nbytes) for name, tensor in tensors.items()]
    with file.open("wb") as stream:
        stream.write(safetensors_header(entries, {"format": "pt"}))
        for tensor in tensors.values():
            whole = gather(tensor).detach().cpu().contiguous()
            stream.write(memoryview(whole.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def _read_into(stream: Any, part: Tensor, source: StoredTensor) -> None:
    view = memoryview(part.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while view:
        count = stream.readinto(view)
        if not count:
            raise ConfigError("this file is cut off", where=str(source.file), given=source.name)
        view = view[count:]


def _read_whole(parameter: Tensor, source: StoredTensor) -> Tensor:
    value = torch.empty(parameter.shape, dtype=parameter.dtype, device=source.device)
    read_rows(source, None, value)
    return nn.Parameter(value, requires_grad=False) if isinstance(parameter, nn.Parameter) else value


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    (owner._parameters if isinstance(value, nn.Parameter) else owner._buffers)[attribute] = value  # type: ignore[assignment]


def _name_in_model(model: PreTrainedModel, name: str, expected: Collection[str]) -> str | None:
    """The name by which the model knows a tensor: GPT-2's files leave out the prefix of the trunk, others add it."""
    prefix = f"{model.base_model_prefix}."
    return next((n for n in (name, f"{prefix}{name}", name.removeprefix(prefix)) if n in expected), None)


def _stored_tensors(folder: Path, loaded: torch.dtype, device: torch.device) -> dict[str, StoredTensor | str]:
    """The tensors of a model's files by name; of one with a dtype that is not read, its dtype alone."""
    tensors: dict[str, StoredTensor | str] = {}
    for file in weight_files(folder):
        _, data_start = read_safetensors_header(file)
        for name, entry in check_safetensors(file).items():
            if (dtype := _DTYPES.get(entry["dtype"])) is None:
                tensors[name] = str(entry["dtype"])
                continue
            start = data_start + int(entry["data_offsets"][0])
            tensors[name] = StoredTensor(name, file, start, dtype, tuple(entry["shape"]), loaded, device)
    return tensors
