"""Types of GGUF files: which kind of numbers each tensor gets, and the rounding itself.

The mix of a type such as q4_k_m is that of llama-quantize, so that a file is what its name says everywhere. Blocks of
256 values need rows of a multiple of 256; where a model has others, llama.cpp takes a wider kind with blocks of 32, and
so does this module (`WrittenFile.matrix_bytes` says how much of what).

Sources: src/llama-quant.cpp of llama.cpp; the numbers are rounded by the packages gguf and libgguf, which agree bit by
bit where both can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, LlamaFileType, quants
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from rung.errors import PlanError

_NUMPY_KINDS = {Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1}
"""Kinds that the gguf package rounds to; libgguf rounds to all."""


@dataclass(frozen=True, slots=True)
class FileType:
    """A type of file: llama.cpp's number for it and the kind of most of its matrices."""

    number: LlamaFileType
    kind: Kind

    @property
    def is_quantized(self) -> bool:
        """Whether matrices are in blocks with a scale each."""
        return self.kind not in (Kind.F32, Kind.F16, Kind.BF16)


FILE_TYPES: Mapping[str, FileType] = {
    "f32": FileType(LlamaFileType.ALL_F32, Kind.F32),
    "f16": FileType(LlamaFileType.MOSTLY_F16, Kind.F16),
    "bf16": FileType(LlamaFileType.MOSTLY_BF16, Kind.BF16),
    "q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, Kind.Q8_0),
    "q6_k": FileType(LlamaFileType.MOSTLY_Q6_K, Kind.Q6_K),
    "q5_k_m": FileType(LlamaFileType.MOSTLY_Q5_K_M, Kind.Q5_K),
    "q5_k_s": FileType(LlamaFileType.MOSTLY_Q5_K_S, Kind.Q5_K),
    "q5_1": FileType(LlamaFileType.MOSTLY_Q5_1, Kind.Q5_1),
    "q5_0": FileType(LlamaFileType.MOSTLY_Q5_0, Kind.Q5_0),
    "q4_k_m": FileType(LlamaFileType.MOSTLY_Q4_K_M, Kind.Q4_K),
    "q4_k_s": FileType(LlamaFileType.MOSTLY_Q4_K_S, Kind.Q4_K),
    "q4_1": FileType(LlamaFileType.MOSTLY_Q4_1, Kind.Q4_1),
    "q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, Kind.Q4_0),
    "q3_k_l": FileType(LlamaFileType.MOSTLY_Q3_K_L, Kind.Q3_K),
    "q3_k_m": FileType(LlamaFileType.MOSTLY_Q3_K_M, Kind.Q3_K),
    "q3_k_s": FileType(LlamaFileType.MOSTLY_Q3_K_S, Kind.Q3_K),
    "q2_k": FileType(LlamaFileType.MOSTLY_Q2_K, Kind.Q2_K),
}
"""By the name that llama.cpp, Ollama and the hub use, largest first."""
_WIDER_KIND = {
    Kind.Q2_K: Kind.Q4_0,
    Kind.Q3_K: Kind.Q4_0,
    Kind.Q4_K: Kind.Q5_0,
    Kind.Q5_K: Kind.Q5_1,
    Kind.Q6_K: Kind.Q8_0,
}
_NEVER_QUANTIZED = ("position_embd", "token_types")


@dataclass(frozen=True, slots=True)
class TensorRole:
    """What the mix of a type depends on."""

    name: str
    """In GGUF."""
    shape: tuple[int, ...]
    layers: int
    is_head: bool
    """The output head, or the embedding that is the head as well."""
    query_groups: int
    """Query heads for each key head."""

    @property
    def part(self) -> str:
        """`attn_v` of `blk.3.attn_v.weight`."""
        return self.name.split(".")[-2]

    @property
    def layer(self) -> int:
        """Number of the layer; 0 outside of layers."""
        parts = self.name.split(".")
        return int(parts[1]) if parts[0] == "blk" else 0

    @property
    def is_matrix(self) -> bool:
        """Whether it may be stored in fewer than 32 bits."""
        is_weight = self.name.endswith(".weight") and not self.part.endswith("_norm")
        return is_weight and len(self.shape) == 2 and self.part not in _NEVER_QUANTIZED


def require_writable(name: str) -> FileType:
    """The type of this name. Raises `PlanError` for an unknown one, and for one whose package is missing."""
    file_type = FILE_TYPES.get(name.lower())
    if file_type is None:
        raise PlanError("there is no such type of GGUF file", where="--type", given=name, allowed=", ".join(FILE_TYPES))
    if file_type.kind not in _NUMPY_KINDS:
        _libgguf()
    return file_type


def kind_of(file_type: FileType, role: TensorRole) -> Kind:
    """The kind of numbers of a tensor in a file of this type, as llama-quantize chooses it."""
    if not role.is_matrix:
        return Kind.F32
    if not file_type.is_quantized:
        return file_type.kind
    return _fitting_kind(_mixed_kind(file_type, role), role.shape[1])


def _mixed_kind(file_type: FileType, role: TensorRole) -> Kind:
    kind, number = file_type.kind, file_type.number
    if role.is_head:
        if role.shape[1] % GGML_QUANT_SIZES[kind][0] or kind is Kind.Q8_0:
            return Kind.Q8_0
        return Kind.Q6_K
    if role.part in ("attn_v", "attn_qkv"):
        return _value_kind(file_type, role)
    if role.part == "ffn_down":
        return _down_kind(file_type, role)
    if role.part == "attn_output":
        return {
            LlamaFileType.MOSTLY_Q2_K: Kind.Q3_K,
            LlamaFileType.MOSTLY_Q3_K_M: Kind.Q4_K,
            LlamaFileType.MOSTLY_Q3_K_L: Kind.Q5_K,
        }.get(number, kind)
    return kind


def _value_kind(file_type: FileType, role: TensorRole) -> Kind:
    kind = {
        LlamaFileType.MOSTLY_Q2_K: Kind.Q4_K if role.query_groups >= 4 else Kind.Q3_K,
        LlamaFileType.MOSTLY_Q3_K_M: Kind.Q5_K if role.layer < 2 else Kind.Q4_K,
        LlamaFileType.MOSTLY_Q3_K_L: Kind.Q5_K,
        LlamaFileType.MOSTLY_Q4_K_S: Kind.Q5_K if role.layer < 4 else Kind.Q4_K,
        LlamaFileType.MOSTLY_Q4_K_M: Kind.Q6_K if _gets_more_bits(role) else Kind.Q4_K,
        LlamaFileType.MOSTLY_Q5_K_M: Kind.Q6_K if _gets_more_bits(role) else Kind.Q5_K,
    }.get(file_type.number, file_type.kind)
    # the 70B models, whose value matrices are small
    return Kind.Q5_K if role.layers == 80 and role.query_groups == 8 and kind in (Kind.Q3_K, Kind.Q4_K) else kind


def _down_kind(file_type: FileType, role: TensorRole) -> Kind:
    return {
        LlamaFileType.MOSTLY_Q2_K: Kind.Q3_K,
        LlamaFileType.MOSTLY_Q3_K_M: Kind.Q5_K if role.layer < role.layers // 16 else Kind.Q4_K,
        LlamaFileType.MOSTLY_Q3_K_L: Kind.Q5_K,
        LlamaFileType.MOSTLY_Q4_K_S: Kind.Q5_K if role.layer < role.layers // 8 else Kind.Q4_K,
        LlamaFileType.MOSTLY_Q4_K_M: Kind.Q6_K if _gets_more_bits(role) else Kind.Q4_K,
        LlamaFileType.MOSTLY_Q5_K_M: Kind.Q6_K if _gets_more_bits(role) else Kind.Q5_K,
    }.get(file_type.number, file_type.kind)


def _gets_more_bits(role: TensorRole) -> bool:
    """The first and last eighth of the layers, and every third between."""
    layer, eighth = role.layer, role.layers // 8
    return layer < eighth or layer >= 7 * role.layers // 8 or (layer - eighth) % 3 == 2


def _fitting_kind(kind: Kind, columns: int) -> Kind:
    """The kind, or a wider one whose blocks divide a row."""
    if columns % GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    wider = _WIDER_KIND.get(kind, Kind.F16)
    return wider if columns % GGML_QUANT_SIZES[wider][0] == 0 else Kind.F16


def stored_bytes(kind: Kind, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    block, size = GGML_QUANT_SIZES[kind]
    return int(math.prod(shape) // block * size)


def quantize(values: NDArray[np.float32], kind: Kind) -> NDArray[Any]:
    """Rows of values in this kind of numbers; quantized ones as bytes."""
    if kind in _NUMPY_KINDS:
        return quants.quantize(values, kind)  # type: ignore[no-any-return]
    rows, columns = values.shape
    data = _libgguf().quantize_rows_raw(kind, np.ascontiguousarray(values), rows, columns)
    return np.frombuffer(data, dtype=np.uint8)


def _libgguf() -> Any:
    try:
        return import_module("libgguf")
    except ImportError as error:
        raise PlanError("this type needs libgguf", where="--type", hint="pip install 'rung[export]'") from error
