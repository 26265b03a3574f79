"""Matrix products by the fastest exact routine of the machine.

torch sends float32 products on a processor to MKL, which leaves AVX-512 alone on processors that are not Intel's;
oneDNN, which torch carries too, does not ask for the vendor. Measured on an AMD EPYC of family 26 at this package's
shapes: 330 to 430 GFLOP/s against 165 to 195, and no slower when held to AVX2. Both compute in float32 throughout.

oneDNN and torch's layer above it each remember what they made for a shape, up to 1,024 shapes of a megabyte, and every
micro-batch has a length of its own: the heap of a run would grow by gigabytes. A step uses some twenty-five shapes;
about that many are remembered here, and making one anew costs less than a millisecond.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

# Read by the libraries at their first product, which is not before this import.
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """X W^T + bias, [N, O]. Records nothing for autograd. Operands share one type; any strides will do."""
    if _onednn_supports(x_NI):
        return torch.ops.mkldnn._linear_pointwise(_without_gaps(x_NI), _without_gaps(weight_OI), bias_O, "none", [], "")  # type: ignore[no-any-return]
    if bias_O is not None:
        return torch.addmm(bias_O, x_NI, weight_OI.T)
    return x_NI @ weight_OI.T


def matmul(a_NK: Tensor, b_KM: Tensor) -> Tensor:
    """A b, [N, M]."""
    return linear(a_NK, b_KM.T)


def _onednn_supports(x: Tensor) -> bool:
    """Whether oneDNN multiplies this; it has no float64, and bfloat16 goes there by itself."""
    return x.dtype is torch.float32 and x.device.type == "cpu" and x.numel() > 0 and bool(torch.backends.mkldnn.enabled)


def _without_gaps(matrix: Tensor) -> Tensor:
    """Without gaps between rows or columns: oneDNN takes those a thousand times slower."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()
