"""Linears with a low-rank part, gated activations and norms that keep less for the backward pass than autograd would.

Each is a pure function on tensors with a hand-written backward pass; `models/fused_modules.py` puts them under
a model's modules.
What they compute is what transformers and peft compute, up to the order of sums.

Suffixes: N rows (tokens), I inputs, O outputs, R ranks of all parts side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from rung.models.matmul import linear, matmul

Activation = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
"""A function and its backward pass (gradient, input) -> gradient."""

ACTIVATIONS: dict[str, Activation] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_pytorch_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
}
"""By the names transformers gives them."""


class LinearParams(NamedTuple):
    """One linear: y = x W^T + bias + scale * (x A^T) B^T (Hu et al. 2021, eq. 3)."""

    weight: Tensor  # [O, I]; may be bfloat16 beside float32 inputs: it is widened for the product, which is exact
    bias: Tensor | None = None  # [O]
    a: Tensor | None = None  # [R, I]
    b: Tensor | None = None  # [O, R]
    scale: float = 1.0


def linears(x: Tensor, parts: Sequence[LinearParams]) -> tuple[Tensor, ...]:
    """Several linears of one input [..., I]: the low-rank products of all go as one, the input is kept once.

    An input that `rms_norm` made is not kept at all: the backward pass makes it again.
    """
    normed: _NormInput | None = getattr(x, _NORM_INPUTS, None)
    outputs = _Linears.apply(x, normed, tuple(p.scale for p in parts), *_flat(parts))  # type: ignore[no-untyped-call]
    # Shaped out here: a view made inside a function may not be changed in place, and some models clamp their queries.
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def gated_linear(gate: Tensor, up: Tensor, activation: Activation, part: LinearParams) -> Tensor:
    """linear(activation(gate) * up) (Shazeer 2020, eq. 5 before its first two products); keeps gate and up alone."""
    return _GatedLinear.apply(gate, up, activation, part.scale, *_flat([part]))  # type: ignore[no-any-return, no-untyped-call]


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up, for a linear that computes by itself; keeps gate and up alone."""
    return _Gated.apply(gate, up, activation)  # type: ignore[no-any-return, no-untyped-call]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """(offset + weight) * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, eq. 4); Gemma's offset is 1.

    Computes in float32 or wider. Keeps its input and one number a row.
    """
    y, rstd = _RmsNorm.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call]
    if torch.is_grad_enabled():
        setattr(y, _NORM_INPUTS, _NormInput(x.detach(), weight.detach(), rstd, offset))
    return y  # type: ignore[no-any-return]


_NORM_INPUTS = "_rung_normed"


class _NormInput(NamedTuple):
    """What an output of `rms_norm` can be made from again."""

    x: Tensor
    weight: Tensor
    rstd: Tensor
    offset: float

    def make(self) -> Tensor:
        y = self.x * self.rstd  # in the type of rstd, at least float32
        y.mul_(self.weight if not self.offset else self.weight.to(y.dtype) + self.offset)
        return y.to(self.x.dtype if self.offset else torch.promote_types(self.x.dtype, self.weight.dtype))


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, normed: _NormInput | None, scales: tuple[float, ...], *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        parts = _parts(flat, scales)
        x_NI = x.reshape(-1, x.shape[-1]).to(_compute_dtype(x, parts))
        outputs, low_NR = _forward(x_NI, parts)
        ctx.scales, ctx.shape, ctx.dtype, ctx.compute = scales, x.shape, x.dtype, x_NI.dtype
        ctx.offset = None if normed is None else normed.offset
        kept = None
        if any(ctx.needs_input_grad[3:]):
            kept = [x_NI] if normed is None else [normed.x, normed.weight, normed.rstd]
        ctx.kept = len(kept or ())
        ctx.save_for_backward(*(kept or ()), low_NR, *flat)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputation counts the readings
        kept, (low_NR, *flat) = saved[: ctx.kept], saved[ctx.kept :]
        x_NI = kept[0] if ctx.kept == 1 else None
        if ctx.kept > 1:
            x_NI = _NormInput(kept[0], kept[1], kept[2], ctx.offset).make().view(-1, ctx.shape[-1]).to(ctx.compute)
        parts = _parts(flat, ctx.scales)
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        d_x, d_flat = _backward(grads, x_NI, low_NR, parts, need_x, need)
        return (None if d_x is None else d_x.view(ctx.shape).to(ctx.dtype)), None, None, *d_flat


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, activation: Activation, scale: float, *flat: Tensor | None
    ) -> Tensor:
        parts = _parts(flat, (scale,))
        hidden = activation[0](gate).mul_(up)
        x_NI = hidden.view(-1, hidden.shape[-1]).to(_compute_dtype(hidden, parts))
        (output,), low_NR = _forward(x_NI, parts)
        ctx.activation, ctx.scale = activation, scale
        ctx.save_for_backward(gate, up, low_NR, *flat)
        return output.view(*gate.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, low_NR, *flat = ctx.saved_tensors
        parts = _parts(flat, (ctx.scale,))
        need = ctx.needs_input_grad[4:]
        act, act_backward = ctx.activation
        rows = grad.reshape(-1, grad.shape[-1])
        need_hidden = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        activated = act(gate)
        hidden = (activated * up).view(-1, up.shape[-1]).to(grad.dtype) if any(need) else None
        d_hidden, d_flat = _backward([rows], hidden, low_NR, parts, need_hidden, need)
        del hidden
        if d_hidden is None:
            return None, None, None, None, *d_flat
        d_hidden = d_hidden.view(up.shape).to(up.dtype)
        d_up = activated.mul_(d_hidden)
        return act_backward(d_hidden.mul_(up), gate), d_up, None, None, *d_flat


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation[0](gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        act, act_backward = ctx.activation
        return act_backward(grad * up, gate), act(gate).mul_(grad), None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.offset = offset
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, rstd)
        return _NormInput(x, weight, rstd, offset).make(), rstd

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        x, weight, rstd = ctx.saved_tensors
        unit = x * rstd
        grad = grad.to(unit.dtype)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * unit).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None, None
        d_unit = grad * (weight.to(unit.dtype) + ctx.offset if ctx.offset else weight)
        along = torch.linalg.vecdot(d_unit, unit, dim=-1)[..., None].div_(x.shape[-1])
        d_x = d_unit.sub_(unit.mul_(along)).mul_(rstd)
        return d_x.to(x.dtype), d_weight, None, None


def _flat(parts: Sequence[LinearParams]) -> list[Tensor | None]:
    """Autograd sees tensors only as arguments of their own."""
    return [tensor for p in parts for tensor in (p.weight, p.bias, p.a, p.b)]


def _parts(flat: Sequence[Tensor | None], scales: Sequence[float]) -> list[LinearParams]:
    parts = []
    for i, scale in enumerate(scales):
        weight, bias, a, b = flat[4 * i : 4 * i + 4]
        assert weight is not None  # noqa: S101 -- for the type checker: every part has one
        parts.append(LinearParams(weight, bias, a, b, scale))
    return parts


def _compute_dtype(x: Tensor, parts: Sequence[LinearParams]) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(x.dtype, parts[0].weight.dtype)


def _forward(x_NI: Tensor, parts: Sequence[LinearParams]) -> tuple[list[Tensor], Tensor | None]:
    """The outputs, and x A^T of every adapted part side by side."""
    dtype = x_NI.dtype
    adapted = [p.a for p in parts if p.a is not None]
    low_NR = linear(x_NI, torch.cat(adapted).to(dtype)) if adapted else None
    outputs, at = [], 0
    for p in parts:
        weight = p.weight.to(dtype)
        y = linear(x_NI, weight, None if p.bias is None else p.bias.to(dtype))
        if p.b is not None and low_NR is not None:
            rank = p.b.shape[1]
            y.addmm_(low_NR[:, at : at + rank], p.b.to(dtype).T, alpha=p.scale)
            at += rank
        outputs.append(y)
    return outputs, low_NR


def _backward(
    grads: Sequence[Tensor | None],
    x_NI: Tensor | None,
    low_NR: Tensor | None,
    parts: Sequence[LinearParams],
    need_x: bool,
    need: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the input and of each tensor of each part, in the order of `_flat`."""
    d_x: Tensor | None = None
    d_flat: list[Tensor | None] = [None] * (4 * len(parts))
    d_low = None if low_NR is None else torch.zeros_like(low_NR)
    at = 0
    for i, (g_NO, p) in enumerate(zip(grads, parts, strict=True)):
        columns = slice(at, at + (0 if p.b is None else p.b.shape[1]))
        at = columns.stop
        if g_NO is None:
            continue
        dtype = g_NO.dtype
        need_weight, need_bias, _, need_b = need[4 * i : 4 * i + 4]
        if p.b is not None and low_NR is not None and d_low is not None:
            d_low[:, columns] = matmul(g_NO, p.b.to(dtype)).mul_(p.scale)
            if need_b:
                d_flat[4 * i + 3] = matmul(low_NR[:, columns].T, g_NO).T.mul(p.scale).to(p.b.dtype)
        if need_weight and x_NI is not None:
            d_flat[4 * i] = matmul(g_NO.T, x_NI).to(p.weight.dtype)
        if need_bias and p.bias is not None:
            d_flat[4 * i + 1] = g_NO.sum(0).to(p.bias.dtype)
        if need_x:
            weight = p.weight.to(dtype)
            along = matmul(g_NO, weight)
            d_x = along if d_x is None else d_x.add_(along)
    adapted = [(i, p.a) for i, p in enumerate(parts) if p.a is not None]
    if d_low is not None and d_x is not None:
        d_x.addmm_(d_low, torch.cat([a for _, a in adapted]).to(d_low.dtype))
    if d_low is not None and x_NI is not None:
        d_a = torch.split(matmul(d_low.T, x_NI), [len(a) for _, a in adapted])
        for (i, a), rows in zip(adapted, d_a, strict=True):
            d_flat[4 * i + 2] = rows.to(a.dtype) if need[4 * i + 2] else None
    return d_x, d_flat
