"""Matrix products by the fastest exact routine of the machine.

torch sends float32 products on a processor to its BLAS (MKL on x86), which uses AVX-512 on Intel processors only;
oneDNN, part of the same torch, does not check the vendor. Which one is faster depends on the processor:
`models/matmul_routine.py` measures it once a machine, and `use_routine` sets it for the process. Both compute in
float32 throughout, but add in another order, so a run keeps the routine that it began with.

oneDNN and torch's layer above it each cache what they prepared for a shape, up to 1,024 shapes of a megabyte, and every
micro-batch has another length: the heap of a run would grow by gigabytes. A micro-batch uses about twenty-five shapes
in float32 and more in bfloat16; the caches are limited to about that many, and preparing a shape again takes half a
millisecond. The cost is a private operator of torch and two environment variables (decision 0012). The fused functions
and heads multiply here.
"""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor

from rung.models.pointwise import on_card

# The libraries read these at their first product, which comes after this import. `setdefault` keeps a user's value.
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

Routine = Literal["onednn", "blas"]
_routine: Routine = "onednn"


def use_routine(routine: Routine) -> None:
    """Compute later float32 products of this process by this routine."""
    global _routine
    _routine = routine


def routine_in_use() -> Routine:
    """The routine of float32 products on this processor; without oneDNN there is only the BLAS."""
    return _routine if has_onednn() else "blas"


def has_onednn() -> bool:
    """Whether this torch was built with oneDNN, and nobody switched it off."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)  # type: ignore[no-untyped-call]


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias, [N, O], outside autograd. The operands have one dtype and any strides."""
    if _takes_onednn(x_NI):
        return onednn_linear(x_NI, weight_OI, bias_O)
    # Other dtypes and devices: torch's own routine.
    if bias_O is not None:
        return torch.addmm(bias_O, x_NI, weight_OI.T)
    return x_NI @ weight_OI.T


def onednn_linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`linear` by oneDNN, for float32 on a processor."""
    return torch.ops.mkldnn._linear_pointwise(_packed(x_NI), _packed(weight_OI), bias_O, "none", [], "")  # type: ignore[no-any-return]


def matmul(a_NK: Tensor, b_KM: Tensor) -> Tensor:
    """Compute a b, [N, M]."""
    return linear(a_NK, b_KM.T)


def scaled_matmul(a_NK: Tensor, b_KM: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Compute scale * a b, [N, M]; on a card in one launch."""
    if on_card(a_NK):
        ignored = a_NK.new_empty(1, 1)  # beta = 0: not read
        if out is None:
            return torch.addmm(ignored, a_NK, b_KM, beta=0, alpha=scale)
        return torch.addmm(ignored, a_NK, b_KM, beta=0, alpha=scale, out=out)
    product = matmul(a_NK, b_KM).mul_(scale)
    return product if out is None else out.copy_(product)


def add_matmul_(total_NM: Tensor | None, a_NK: Tensor, b_KM: Tensor) -> Tensor:
    """Add a b to the total in place; without a total the product. On a card in one launch."""
    if total_NM is None:
        return matmul(a_NK, b_KM)
    return total_NM.addmm_(a_NK, b_KM) if on_card(a_NK) else total_NM.add_(matmul(a_NK, b_KM))


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The autocast dtype if autocast is on, else the wider of the two: a bfloat16 weight is widened when it is used."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return torch.promote_types(x.dtype, weight.dtype)


def wide_zeros(tensor: Tensor) -> Tensor:
    """Zeros of its shape to add to, in float32 or wider: many small addends are lost in 16 bits."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _takes_onednn(x: Tensor) -> bool:
    """Whether to call oneDNN: it has no float64, and torch sends bfloat16 to it already."""
    return (
        _routine == "onednn" and x.dtype is torch.float32 and x.device.type == "cpu" and x.numel() > 0 and has_onednn()
    )


def _packed(matrix: Tensor) -> Tensor:
    """Copy a matrix that has gaps between rows or columns: oneDNN is a thousand times slower with gaps."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()
