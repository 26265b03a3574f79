"""Writing GGUF files piece by piece: one block of a tensor is in memory, never a model.

The header needs the size of every tensor, which its shape and kind give before anything is read.
`commands/export_gguf.py` calls `GgufModel.write` and `write_adapter`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFWriter
from gguf import GGMLQuantizationType as Kind

from rung.errors import PlanError
from rung.exporting.gguf_layout import (
    Architecture,
    StoredTensor,
    architecture_of,
    interleaved_rows,
    rope_factors,
    stored_tensors,
    write_hyperparameters,
)
from rung.exporting.gguf_vocabulary import GgufVocabulary
from rung.exporting.quantization import FileType, TensorRole, kind_of, quantize, stored_bytes
from rung.exporting.weights import LoraUpdate, ModelWeights

BLOCK_VALUES = 2**23
"""Values of a tensor that are converted at once: 32 MiB in float32."""
QUANTIZATION_VERSION = 2
"""Version of ggml's block formats."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What a file holds."""

    path: Path
    matrix_bytes: Mapping[str, int]
    """Bytes of the matrices by kind, for example Q4_K and Q6_K."""

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class GgufModel:
    """A model in the parts that a file is made of."""

    weights: ModelWeights
    config: Any
    """Its transformers config."""
    vocabulary: GgufVocabulary
    facts: Mapping[str, str]
    """General keys: name, description, license."""

    @cached_property
    def _roles(self) -> dict[str, TensorRole]:
        tensors = stored_tensors(self.config, architecture_of(self.config), self.weights)
        return {tensor.name: _role(tensor, tensors, self.config) for tensor in tensors}

    def planned_bytes(self, file_type: FileType) -> int:
        """Bytes of the tensors in a file of this type."""
        return sum(stored_bytes(kind_of(file_type, role), role.shape) for role in self._roles.values())

    def write(self, path: Path, file_type: FileType) -> WrittenFile:
        """Write a file of this type. Raises `PlanError` for a model that llama.cpp computes otherwise."""
        architecture, roles = architecture_of(self.config), self._roles
        tensors = stored_tensors(self.config, architecture, self.weights)
        kinds = {name: kind_of(file_type, role) for name, role in roles.items()}
        with closing(GGUFWriter(path=None, arch=MODEL_ARCH_NAMES[architecture.gguf])) as writer:
            self._add_keys(writer, architecture, file_type)
            factors = rope_factors(self.config)
            for name, factor in factors.items():
                writer.add_tensor_info(name, factor.shape, factor.dtype, factor.nbytes)
            for tensor in tensors:
                size = stored_bytes(kinds[tensor.name], tensor.shape)
                kind = kinds[tensor.name]
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
            _write_header(writer, path)
            for factor in factors.values():
                writer.write_tensor_data(factor)
            for tensor in tensors:
                _write_tensor(writer, tensor, self.weights, kinds[tensor.name])
        matrix_bytes: Counter[str] = Counter()
        for name, role in roles.items():
            matrix_bytes[kinds[name].name] += stored_bytes(kinds[name], role.shape) * role.is_matrix
        return WrittenFile(path, {kind: size for kind, size in matrix_bytes.most_common() if size})

    def _add_keys(self, writer: GGUFWriter, architecture: Architecture, file_type: FileType) -> None:
        for name, text in self.facts.items():
            writer.add_string(f"general.{name}", text)
        writer.add_file_type(file_type.number)
        writer.add_quantization_version(QUANTIZATION_VERSION)
        write_hyperparameters(writer, self.config, architecture)
        self.vocabulary.write(writer)


def _role(tensor: StoredTensor, tensors: list[StoredTensor], config: Any) -> TensorRole:
    has_head = any(other.name == "output.weight" for other in tensors)
    head = "output.weight" if has_head else "token_embd.weight"
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    groups = config.num_attention_heads // key_heads
    return TensorRole(tensor.name, tensor.shape, config.num_hidden_layers, tensor.name == head, groups)


def _write_header(writer: GGUFWriter, path: Path) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = _open_file(writer)
    writer.write_padding(file, file.tell())


def _open_file(writer: GGUFWriter) -> IO[bytes]:
    if writer.fout is None:
        raise RuntimeError("the header is written first")
    file: IO[bytes] = writer.fout[0]
    return file


def _write_tensor(writer: GGUFWriter, tensor: StoredTensor, weights: ModelWeights, kind: Kind) -> None:
    """Write one tensor in blocks; the writer's own function needs it whole."""
    file, written = _open_file(writer), 0
    for block in tensor.blocks(weights, BLOCK_VALUES):
        data = quantize(block.contiguous().numpy(), kind)
        file.write(np.ascontiguousarray(data).tobytes())
        written += data.nbytes
    if written != stored_bytes(kind, tensor.shape):
        raise RuntimeError(f"{tensor.name}: {written} bytes, and its shape needs {stored_bytes(kind, tensor.shape)}")
    writer.write_padding(file, written)


def write_adapter(path: Path, weights: ModelWeights, config: Any, facts: Mapping[str, str]) -> WrittenFile:
    """Write the updates of the weights as an adapter in float32, for the base in GGUF.

    llama.cpp divides one alpha by the rank of each matrix, so the true scale goes into B and alpha cancels the rank.
    """
    architecture = architecture_of(config)
    places = {tensor.source: tensor for tensor in stored_tensors(config, architecture, weights)}
    writer = GGUFWriter(path=None, arch=MODEL_ARCH_NAMES[architecture.gguf])
    with closing(writer):
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        for name, text in facts.items():
            writer.add_string(f"general.{name}", text)
        ranks = {len(update.second) for update in weights.updates.values()}
        # with several ranks no alpha cancels them all; llama.cpp takes 0 as a scale of 1
        writer.add_float32("adapter.lora.alpha", float(ranks.pop()) if len(ranks) == 1 else 0.0)
        total = 0
        for module, update in weights.updates.items():
            place = places.get(f"{module}.weight")
            if place is None:
                raise PlanError("GGUF has no place for the update of this module", given=module)
            a_RI, b_OR = _adapter_factors(update, place, architecture)
            writer.add_tensor(f"{place.name}.lora_a", a_RI)
            writer.add_tensor(f"{place.name}.lora_b", b_OR)
            total += a_RI.nbytes + b_OR.nbytes
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return WrittenFile(path, {Kind.F32.name: total})


def _adapter_factors(
    update: LoraUpdate, place: StoredTensor, architecture: Architecture
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A [R, I] and B [O, R] in the order of llama.cpp, with the scale in B."""
    b_OR, a_RI = update.first * update.scale, update.second
    if place.change == "transpose":
        # the base keeps [I, O]: its update is A^T B^T
        b_OR, a_RI = update.second.T * update.scale, update.first.T
    if place.change == "interleave_halves":
        b_OR = b_OR[interleaved_rows(len(b_OR), place.heads)]
    return a_RI.contiguous().numpy(), b_OR.contiguous().numpy()
