"""How far a student's distribution over the vocabulary lies from a teacher's, without holding either for all tokens.

Each entry's divergence depends on its own hidden state alone, so its gradient is taken slice by slice in the forward
pass and kept as one vector an entry. Where the student's head moves, slices are computed again in the backward pass.

Suffixes: N entries, V vocabulary, H width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from rung.model.head import LogitMap, effective_linear

ENTRIES = 128
"""Entries at once: 25 MB a tensor of logits in float32 over a vocabulary of 49,152."""
Divergence = Callable[[Tensor, Tensor], Tensor]
"""From log-probabilities [N, V] of teacher and student to nats [N]."""


def forward_kl(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL(teacher || student) [N]: the student must cover all that the teacher would say (Hinton et al. 2015)."""
    return (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1)


def reverse_kl(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL(student || teacher) [N]: the student keeps to what the teacher would say (Gu et al. 2024)."""
    return (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)


def jensen_shannon(beta: float) -> Divergence:
    """Generalised: beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s (Agarwal et al. 2024, eq. 1)."""

    def between(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
        mixed = torch.logaddexp(teacher_NV + math.log(beta), student_NV + math.log1p(-beta))
        return beta * forward_kl(teacher_NV, mixed) + (1.0 - beta) * forward_kl(student_NV, mixed)

    return between


class Side(NamedTuple):
    """Hidden states that predict, and the head that reads them."""

    hidden_NH: Tensor
    head: nn.Module
    logit_map: LogitMap

    def logprobs(self, hidden_NH: Tensor, temperature: float, width: int) -> Tensor:
        """Of a slice, over the first `width` entries of the vocabulary, float32 or wider."""
        linear = effective_linear(self.head)
        z = F.linear(hidden_NH, linear.weight[:width], None if linear.bias is None else linear.bias[:width])  # type: ignore[index]
        exact = z.to(torch.promote_types(torch.float32, z.dtype))
        logits = exact * self.logit_map.scale if self.logit_map.scale != 1.0 else exact
        if self.logit_map.softcap is not None:
            logits = self.logit_map.softcap * torch.tanh(logits / self.logit_map.softcap)
        return torch.log_softmax(logits / temperature, dim=-1)


def divergence(student: Side, teacher: Side, between: Divergence, *, temperature: float = 1.0) -> Tensor:
    """Nats [N] between distributions at a temperature; the teacher gets no gradient.

    Heads of different sizes are compared over the smaller: what lies beyond it is padding of the vocabulary.
    """
    own, other = (effective_linear(side.head) for side in (student, teacher))
    width = min(len(own.weight), len(other.weight))  # type: ignore[arg-type]

    def of(hidden_NH: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            expected = teacher.logprobs(teacher.hidden_NH[rows], temperature, width)
        return between(expected, student.logprobs(hidden_NH, temperature, width))

    moves = any(p.requires_grad for p in own.parameters())
    slices = [slice(at, at + ENTRIES) for at in range(0, len(student.hidden_NH), ENTRIES)]
    if moves and torch.is_grad_enabled():
        parts = [checkpoint(of, student.hidden_NH[rows], rows, use_reentrant=False) for rows in slices]
        return torch.cat(parts) if parts else student.hidden_NH.new_zeros(0)
    found: Tensor = _Directed.apply(student.hidden_NH, of, slices)  # type: ignore[no-untyped-call]
    return found


class _Directed(torch.autograd.Function):
    """Values of entries that depend on their own hidden state alone, with the gradient taken along the way."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, of: Callable[[Tensor, slice], Tensor], slices: list[slice]) -> Tensor:
        exact = torch.promote_types(torch.float32, hidden_NH.dtype)
        values = torch.zeros(len(hidden_NH), dtype=exact, device=hidden_NH.device)
        wanted = ctx.needs_input_grad[0]
        direction = torch.zeros_like(hidden_NH) if wanted else None
        for rows in slices:
            own = hidden_NH[rows].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                value = of(own, rows)
                if direction is not None:
                    direction[rows] = torch.autograd.grad(value.sum(), own)[0]
            values[rows] = value.detach()
        ctx.save_for_backward(direction)
        return values

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, None, None]:
        (direction,) = ctx.saved_tensors
        return direction * grad_N[:, None].to(direction.dtype), None, None
