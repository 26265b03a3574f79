"""Elementwise functions that become one kernel each on a card.

torch launches a kernel for every operation, and each reads and writes its tensors: beside the products of an 8B layer
that is half as much time again (arithmetic, not measured). `torch.compile` makes one kernel of a function without
products, and a reduction over the last dimension stays in it. On a processor the functions run as they are written,
with the bits and the speed that they have there. Where Triton is missing, a card runs them as written too.

Every function is pure and runs outside autograd. Suffixes: N rows (tokens), H width, T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._triton import has_triton

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def on_card(tensor: Tensor) -> bool:
    """Whether launches cost more than arithmetic: on an NVIDIA card."""
    return tensor.device.type == "cuda"


RECOMPILE_LIMIT = 64
"""Variants of one function that are compiled: widths, types and options of several models in one process. Torch's limit
of 8 is that of one model, and beyond it a function runs as it is written, without a word in most logs."""
FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""The functions of this module as they are written, by name."""


def pointwise(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, compiled for tensors on a card; its first argument is a tensor."""
    FUNCTIONS[function.__name__] = function

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return _run(function, *args, **kwargs)

    return call


def _run(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    first: Any = args[0]
    if not (on_card(first) and has_triton()):
        return function(*args, **kwargs)
    # What compiled code must not depend on: it would be compiled anew for training, evaluation and backward passes.
    detached: Any = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
        return compiled(function)(*detached, **kwargs)  # type: ignore[no-any-return]


@cache
def compiled(function: Callable[..., Any], *, dynamic: bool | None = None) -> Callable[..., Any]:
    """A function compiled at its first call, and again at the first row of another length.

    From then on the length is a variable; the width of the model stays a constant, so a reduction over it is one pass.
    """
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(function, dynamic=dynamic)


def _by_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as matrices: rows and heads in any number are one dimension, so that one kernel serves all shapes."""
    return tuple(tensor.reshape(-1, tensor.shape[-1]) if on_card(tensor) else tensor for tensor in tensors)


def _shaped(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows in the shape of the input, and no view: FSDP's hooks on a module's output would be lost with one."""
    if rows.shape == torch.Size(shape):
        return rows
    return torch.ops.aten._unsafe_view(rows, list(shape))  # type: ignore[no-any-return]


def scale_normalized(x: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> Tensor:
    """(offset + weight) * x * rstd, in the type in which transformers returns it."""
    x_NH, rstd_N1 = _by_rows(x, rstd)
    return _shaped(_scaled_rows(x_NH, rstd_N1, weight, offset), x.shape)


def normalize(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The output of `rms_norm`, and 1 / rms of each row."""
    (x_NH,) = _by_rows(x)
    y, rstd = _normalized_rows(x_NH, weight, eps, offset)
    return _shaped(y, x.shape), _shaped(rstd, (*x.shape[:-1], 1))


def normalize_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input and weight of `normalize`."""
    grad_NH, x_NH, rstd_N1 = _by_rows(grad, x, rstd)
    d_x, d_weight = _rows_backward(grad_NH, x_NH, weight, rstd_N1, offset, needs_x, needs_weight)
    return None if d_x is None else _shaped(d_x, x.shape), d_weight


@pointwise
def _scaled_rows(x: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> Tensor:
    return _scale_normalized(x, rstd, weight, offset)


@pointwise
def _normalized_rows(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    rstd = _inverse_rms(x, eps)
    return _scale_normalized(x, rstd, weight, offset), rstd


@pointwise
def _rows_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    normalized = x * rstd
    grad = grad.to(normalized.dtype)
    d_weight = (grad * normalized).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype) if needs_weight else None
    if not needs_x:
        return None, d_weight
    d_unit = grad * (weight.to(normalized.dtype) + offset if offset else weight)
    projection = torch.linalg.vecdot(d_unit, normalized, dim=-1)[..., None].div_(x.shape[-1])
    return d_unit.sub_(normalized.mul_(projection)).mul_(rstd).to(x.dtype), d_weight


@pointwise
def gate(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up."""
    return activation(gate).mul_(up)


@pointwise
def gate_backward(
    d_hidden: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: Callable[[Tensor], Tensor],
    activation_backward: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The gradients of `gate` and `up`."""
    return activation_backward(d_hidden * up, gate), activation(gate).mul_(d_hidden)


@pointwise
def rotate(x_1HTD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, eq. 34) in transformers' order: the halves of a head are the pairs."""
    return x_1HTD * cos_1TD[:, None] + _rotate_half(x_1HTD) * sin_1TD[:, None]


@pointwise
def rotate_backward(grad_1HTD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
    """The transpose of `rotate`."""
    return grad_1HTD * cos_1TD[:, None] - _rotate_half(grad_1HTD * sin_1TD[:, None])


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row, in float32 or wider."""
    x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # The norm squared instead of x * x: no second tensor of the size of x.
    norm: Tensor = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _scale_normalized(x: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> Tensor:
    y = x * rstd  # in the type of rstd, at least float32
    y.mul_(weight if not offset else weight.to(y.dtype) + offset)
    return y.to(x.dtype if offset else torch.promote_types(x.dtype, weight.dtype))


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
