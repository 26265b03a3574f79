"""Linears with a low-rank part, gated activations and norms that store less for the backward pass than autograd.

Each is a pure function on tensors with a hand-written backward pass. It computes what transformers and peft compute, up
to the order of sums. peft's forward stores four tensors for a linear where one is enough; the cost is that the
gradients are written by hand, and `tests/reference/test_fused_modules.py` compares them with transformers and peft.
`models/fused_modules.py` installs the functions in a model.

Suffixes: N rows (tokens), I inputs, O outputs, R sum of the ranks of all linears in a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from rung.models import pointwise
from rung.models.matmul import add_matmul_, linear, matmul, product_dtype, scaled_matmul
from rung.models.pointwise import on_card

Activation = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
"""An activation and its backward pass: (gradient, input) -> gradient."""

_GELU_TANH = (partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh"))
ACTIVATIONS: dict[str, Activation] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_pytorch_tanh": _GELU_TANH,
}
"""Keys are the names in transformers."""


_Settings = tuple[float, Callable[[Tensor, torch.dtype], Tensor] | None]
"""Scale and `dequantize` of a linear."""


class LinearParams(NamedTuple):
    """One linear: y = x W^T + bias + scale * (x A^T) B^T (Hu et al. 2021, eq. 3)."""

    weight: Tensor  # [O, I]; a bfloat16 weight is widened for a float32 input, which is exact
    bias: Tensor | None = None  # [O]
    a: Tensor | None = None  # [R, I]
    b: Tensor | None = None  # [O, R]
    scale: float = 1.0
    dequantize: Callable[[Tensor, torch.dtype], Tensor] | None = None
    """Makes the dense matrix of a quantized weight: for each product anew, forward and backward, and freed after it."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [O, I] in the type of the product."""
        return self.weight.to(dtype) if self.dequantize is None else self.dequantize(self.weight, dtype)

    @property
    def settings(self) -> _Settings:
        """What is not a tensor."""
        return self.scale, self.dequantize


def linears(x: Tensor, params: Sequence[LinearParams]) -> tuple[Tensor, ...]:
    """Several linears of one input [..., I]: one product with all A matrices; the input is stored once.

    An input computed by `rms_norm` is not stored: the backward pass recomputes it.
    """
    if torch.is_grad_enabled():
        norm_input: _NormInput | None = getattr(x, _NORM_INPUT_ATTRIBUTE, None)
        outputs = _Linears.apply(x, norm_input, tuple(p.settings for p in params), *_tensors_of(params))  # type: ignore[no-untyped-call]
    else:  # one token of an answer is so little work that autograd's bookkeeping shows
        outputs, _ = _forward(_as_rows(x, params[0]), params)
    # Reshaped outside the function: autograd forbids in-place changes of a view made inside it, and some models clamp
    # their queries in place.
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def gated_linear(gate: Tensor, up: Tensor, activation: Activation, params: LinearParams) -> Tensor:
    """linear(activation(gate) * up) (Shazeer 2020, eq. 5 without its first two products); stores only gate and up."""
    if torch.is_grad_enabled():
        return _GatedLinear.apply(gate, up, activation, params.settings, *_tensors_of([params]))  # type: ignore[no-any-return, no-untyped-call]
    (output,), _ = _forward(_as_rows(pointwise.gate(gate, up, activation[0]), params), [params])
    return output.view(*gate.shape[:-1], output.shape[-1])


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up, for a linear with its own forward; stores only gate and up."""
    return _Gated.apply(gate, up, activation)  # type: ignore[no-any-return, no-untyped-call]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """(offset + weight) * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, eq. 4); Gemma's offset is 1.

    Computes in float32 or wider. Stores its input and one number a row.
    """
    if not torch.is_grad_enabled():
        return pointwise.normalize(x, weight, eps, offset)[0]
    y, rstd = _RmsNorm.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call]
    # An attribute of the output tensor: `linears` finds the norm's input there and need not store the output.
    setattr(y, _NORM_INPUT_ATTRIBUTE, _NormInput(x.detach(), weight.detach(), rstd, offset))
    return y  # type: ignore[no-any-return]


_NORM_INPUT_ATTRIBUTE = "_rung_normed"


class _NormInput(NamedTuple):
    """The tensors from which an output of `rms_norm` is recomputed."""

    x: Tensor
    weight: Tensor
    rstd: Tensor
    offset: float

    def recompute(self) -> Tensor:
        return pointwise.scale_normalized(self.x, self.rstd, self.weight, self.offset)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_input: _NormInput | None, settings: Sequence[_Settings], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        params = _unflatten(tensors, settings)
        x_NI = _as_rows(x, params[0])
        outputs, low_NR = _forward(x_NI, params)
        ctx.settings, ctx.shape, ctx.dtype, ctx.product_dtype = settings, x.shape, x.dtype, x_NI.dtype
        ctx.offset = None if norm_input is None else norm_input.offset
        inputs = None
        # With frozen weights and no adapter the input gradient needs no input, so nothing is stored.
        if any(ctx.needs_input_grad[3:]):
            inputs = [x_NI] if norm_input is None else [norm_input.x, norm_input.weight, norm_input.rstd]
        ctx.input_count = len(inputs or ())
        ctx.save_for_backward(*(inputs or ()), low_NR, *tensors)
        # An output that is not used gets None instead of a tensor of zeros.
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: checkpointing counts accesses
        inputs, (low_NR, *tensors) = saved[: ctx.input_count], saved[ctx.input_count :]
        x_NI = inputs[0] if ctx.input_count == 1 else None
        if ctx.input_count > 1:
            norm_input = _NormInput._make((*inputs, ctx.offset))
            x_NI = norm_input.recompute().view(-1, ctx.shape[-1]).to(ctx.product_dtype)
        params = _unflatten(tensors, ctx.settings)
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        d_x, d_tensors = _backward(grads, x_NI, low_NR, params, need_x, needs)
        return (None if d_x is None else d_x.view(ctx.shape).to(ctx.dtype)), None, None, *d_tensors


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, activation: Activation, settings: _Settings, *tensors: Any
    ) -> Tensor:
        params = _unflatten(tensors, [settings])
        x_NI = _as_rows(pointwise.gate(gate, up, activation[0]), params[0])
        (output,), low_NR = _forward(x_NI, params)
        ctx.activation, ctx.settings = activation, settings
        ctx.save_for_backward(gate, up, low_NR, *tensors)
        return output.view(*gate.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, low_NR, *tensors = ctx.saved_tensors
        params = _unflatten(tensors, [ctx.settings])
        needs = ctx.needs_input_grad[4:]
        act, act_backward = ctx.activation
        grad_NO = grad.reshape(-1, grad.shape[-1])
        need_hidden = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        # On a card the activation is computed twice, within kernels that read the gate in any case.
        activated = None if on_card(gate) else act(gate)
        # Recomputed only if a gradient of the last linear needs it.
        hidden = None
        if any(needs):
            hidden = pointwise.gate(gate, up, act) if activated is None else activated * up
            hidden = hidden.view(-1, up.shape[-1]).to(grad.dtype)
        d_hidden, d_tensors = _backward([grad_NO], hidden, low_NR, params, need_hidden, needs)
        # Freed before the next tensors of the same size are made.
        del hidden
        if d_hidden is None:
            return None, None, None, None, *d_tensors
        d_hidden = d_hidden.view(up.shape).to(up.dtype)
        if activated is None:
            return *pointwise.gate_backward(d_hidden, gate, up, act, act_backward), None, None, *d_tensors
        # In place: `activated` and `d_hidden` are not needed afterwards.
        d_up = activated.mul_(d_hidden)
        return act_backward(d_hidden.mul_(up), gate), d_up, None, None, *d_tensors


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return pointwise.gate(gate, up, activation[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *pointwise.gate_backward(grad, gate, up, *ctx.activation), None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        y, rstd = pointwise.normalize(x, weight, eps, offset)
        ctx.offset = offset
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, rstd)
        return y, rstd

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        x, weight, rstd = ctx.saved_tensors
        return *pointwise.normalize_backward(grad, x, weight, rstd, ctx.offset, *ctx.needs_input_grad[:2]), None, None


def _as_rows(x: Tensor, params: LinearParams) -> Tensor:
    """The input of a linear as a matrix [N, I] in the type of the product."""
    # a quantized weight has the type of its storage: bytes, which promote to the type of x
    return x.reshape(-1, x.shape[-1]).to(product_dtype(x, params.weight))


def _tensors_of(params: Sequence[LinearParams]) -> list[Tensor | None]:
    """Tensors as separate arguments: autograd does not look into tuples."""
    return [tensor for p in params for tensor in (p.weight, p.bias, p.a, p.b)]


def _unflatten(tensors: Sequence[Tensor | None], settings: Sequence[_Settings]) -> list[LinearParams]:
    return [LinearParams._make((*tensors[4 * i : 4 * i + 4], *own)) for i, own in enumerate(settings)]


def _forward(x_NI: Tensor, params: Sequence[LinearParams]) -> tuple[list[Tensor], Tensor | None]:
    """The outputs, and x A^T of all adapters side by side."""
    dtype = x_NI.dtype
    low_rank = _low_rank_matrices(params, dtype)
    # One product for all adapters instead of one narrow product for each.
    low_NR = None if low_rank.a_RI is None else linear(x_NI, low_rank.a_RI)
    outputs, start = [], 0
    for p, b in zip(params, low_rank.b, strict=True):
        y = linear(x_NI, p.dense(dtype), None if p.bias is None else p.bias.to(dtype))
        if b is not None and low_NR is not None:
            y.addmm_(low_NR[:, start : start + b.shape[1]], b.T, alpha=p.scale)
            start += b.shape[1]
        outputs.append(y)
    return outputs, low_NR


class _LowRankMatrices(NamedTuple):
    """The matrices of all adapters of a call in the type of the product."""

    a_RI: Tensor | None
    b: list[Tensor | None]  # [O, R] of each linear


def _low_rank_matrices(params: Sequence[LinearParams], dtype: torch.dtype) -> _LowRankMatrices:
    a_matrices = [p.a for p in params if p.a is not None]
    if not a_matrices:
        return _LowRankMatrices(None, [None] * len(params))
    if not on_card(a_matrices[0]):
        b = [None if p.b is None else p.b.to(dtype) for p in params]
        return _LowRankMatrices(torch.cat(a_matrices).to(dtype), b)
    # One launch for all of them, written side by side.
    a_RI = a_matrices[0].new_empty(sum(map(len, a_matrices)), a_matrices[0].shape[1], dtype=dtype)
    b = [None if p.b is None else torch.empty_like(p.b, dtype=dtype) for p in params]
    copies = [*torch.split(a_RI, [len(a) for a in a_matrices]), *(copy for copy in b if copy is not None)]
    torch._foreach_copy_(copies, [*a_matrices, *(p.b for p in params if p.b is not None)])
    return _LowRankMatrices(a_RI, b)


def _backward(
    grads: Sequence[Tensor | None],
    x_NI: Tensor | None,
    low_NR: Tensor | None,
    params: Sequence[LinearParams],
    need_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the input and of each tensor, in the order of `_tensors_of`."""
    d_x: Tensor | None = None
    d_tensors: list[Tensor | None] = [None] * (4 * len(params))
    if all(g is None for g in grads):
        return None, d_tensors
    dtype = next(g.dtype for g in grads if g is not None)
    low_rank = _low_rank_matrices(params, dtype)
    d_low = None
    if low_NR is not None:  # columns of an output without a gradient stay zero
        d_low = torch.zeros_like(low_NR) if any(g is None for g in grads) else torch.empty_like(low_NR)
    start = 0
    for i, (g_NO, p, b) in enumerate(zip(grads, params, low_rank.b, strict=True)):
        columns = slice(start, start + (0 if b is None else b.shape[1]))
        start = columns.stop
        if g_NO is None:
            continue
        need_weight, need_bias, _, need_b = needs[4 * i : 4 * i + 4]
        if b is not None and low_NR is not None and d_low is not None:
            scaled_matmul(g_NO, b, p.scale, out=d_low[:, columns])
            if need_b:
                d_tensors[4 * i + 3] = _low_rank_product(g_NO, low_NR[:, columns], p.scale)
        if need_weight and x_NI is not None:
            d_tensors[4 * i] = matmul(g_NO.T, x_NI).to(p.weight.dtype)
        if need_bias and p.bias is not None:
            d_tensors[4 * i + 1] = g_NO.sum(0).to(p.bias.dtype)
        # The first linear of a model has no input gradient to compute.
        if need_x:
            d_x = add_matmul_(d_x, g_NO, p.dense(dtype))
    if d_low is not None and d_x is not None and low_rank.a_RI is not None:
        d_x.addmm_(d_low, low_rank.a_RI)
    if d_low is not None and x_NI is not None:
        _split_by_adapter(matmul(d_low.T, x_NI), params, needs, d_tensors)
    _convert_to(d_tensors, _tensors_of(params))
    return d_x, d_tensors


def _split_by_adapter(
    d_a_RI: Tensor, params: Sequence[LinearParams], needs: Sequence[bool], d_tensors: list[Tensor | None]
) -> None:
    """Put the rows of each adapter in the place of its A."""
    indices = [i for i, p in enumerate(params) if p.a is not None]
    sizes = [len(p.a) for p in params if p.a is not None]
    for i, rows in zip(indices, torch.split(d_a_RI, sizes), strict=True):
        d_tensors[4 * i + 2] = rows if needs[4 * i + 2] else None


def _low_rank_product(grad_NO: Tensor, low_NR: Tensor, scale: float) -> Tensor:
    """The gradient [O, R] of B. The narrow operand first is faster on a processor; a card has the result by rows."""
    if on_card(grad_NO):
        return scaled_matmul(grad_NO.T, low_NR, scale)
    return matmul(low_NR.T, grad_NO).T.mul(scale)


def _convert_to(gradients: list[Tensor | None], parameters: Sequence[Tensor | None]) -> None:
    """Convert each gradient in the list to the type of its parameter; on a card all in one launch."""
    both = enumerate(zip(gradients, parameters, strict=True))
    pairs = {i: (g, p.dtype) for i, (g, p) in both if g is not None and p is not None and g.dtype != p.dtype}
    if not pairs:
        return
    sources = [gradient for gradient, _ in pairs.values()]
    if on_card(sources[0]):
        converted = [torch.empty_like(gradient, dtype=dtype) for gradient, dtype in pairs.values()]
        torch._foreach_copy_(converted, sources)
    else:
        converted = [gradient.to(dtype) for gradient, dtype in pairs.values()]
    for i, gradient in zip(pairs, converted, strict=True):
        gradients[i] = gradient
