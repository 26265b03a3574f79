"""How far a student's distribution over the vocabulary lies from a teacher's, without holding either for all tokens.

The loss is a sum over entries whose weights are known beforehand, so its gradients are taken slice by slice in the
forward pass, those of the head as well: nothing is computed a second time, and the data's own tokens are read off the
same logits.

Suffixes: N entries, V vocabulary, H width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rung.models.logprobs import LogitTransform, compute_dtype, effective_linear
from rung.models.matmul import linear, matmul

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
    """Generalized: beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s (Agarwal et al. 2024, eq. 1)."""

    def between(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
        mixed = torch.logaddexp(teacher_NV + math.log(beta), student_NV + math.log1p(-beta))
        return beta * forward_kl(teacher_NV, mixed) + (1.0 - beta) * forward_kl(student_NV, mixed)

    return between


class Distribution(NamedTuple):
    """Hidden states [N, H] that predict, and the head that reads them."""

    hidden_NH: Tensor
    head: nn.Module
    logit_map: LogitTransform

    def logprobs(self, z_NV: Tensor, temperature: float) -> Tensor:
        """Of products of head and hidden state, in their own type."""
        logits = z_NV * self.logit_map.scale if self.logit_map.scale != 1.0 else z_NV
        if self.logit_map.softcap is not None:
            logits = self.logit_map.softcap * torch.tanh(logits / self.logit_map.softcap)
        return torch.log_softmax(logits / temperature, dim=-1)


class DistillTargets(NamedTuple):
    """What is wanted of each of N entries."""

    divergence: Divergence
    temperature: float
    weight_N: Tensor
    """Of the divergence."""
    target_N: Tensor
    """Tokens of the data, for the cross-entropy."""
    nats_weight_N: Tensor | None
    """Of the cross-entropy, which is at the temperature of the student's own logit map; None leaves it out."""


class DistillOutput(NamedTuple):
    """Sums to be minimized, and nats of each entry without gradient."""

    total: Tensor
    divergence_N: Tensor
    logprob_N: Tensor


def distillation_loss(student: Distribution, teacher: Distribution, goal: DistillTargets) -> DistillOutput:
    """Sum of weight * divergence - nats_weight * log p(target), with one product of the student's head for both.

    Heads of different sizes are compared over the smaller: what lies beyond it is padding of the vocabulary. The
    teacher gets no gradient.
    """
    (weight, bias), (their_weight, their_bias) = _head_tensors(student.head), _head_tensors(teacher.head)
    width = min(len(weight), len(their_weight))
    dtype = compute_dtype(teacher.hidden_NH, their_weight)
    their_weight = their_weight[:width].detach().to(dtype)
    their_bias = None if their_bias is None else their_bias[:width].detach().to(dtype)

    def of(z_NV: Tensor, rows: slice) -> DistillOutput:
        with torch.no_grad():
            expected = linear(teacher.hidden_NH[rows].to(dtype), their_weight, their_bias).to(z_NV.dtype)
            expected = teacher.logprobs(expected, goal.temperature)
        apart = goal.divergence(expected, student.logprobs(z_NV[:, :width], goal.temperature))
        total = (apart * goal.weight_N[rows].to(apart.dtype)).sum()
        if goal.nats_weight_N is None:
            return DistillOutput(total, apart, torch.zeros_like(apart))
        told = student.logprobs(z_NV, student.logit_map.temperature)
        logprob = told.gather(1, goal.target_N[rows, None])[:, 0]
        return DistillOutput(total - (logprob * goal.nats_weight_N[rows].to(apart.dtype)).sum(), apart, logprob)

    learns = torch.is_grad_enabled()
    found = _DistillationLoss.apply(student.hidden_NH, weight, bias, of, learns)  # type: ignore[no-untyped-call]
    return DistillOutput(*found)


class _DistillationLoss(torch.autograd.Function):
    """A sum over entries, read off products z = h W^T + b slice by slice, its gradients taken along the way."""

    @staticmethod
    def forward(
        ctx: Any,
        h_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        of: Callable[[Tensor, slice], DistillOutput],
        learns: bool,
    ) -> DistillOutput:
        compute = compute_dtype(h_NH, weight_VH)
        exact = torch.promote_types(compute, torch.float32)
        weight, bias = weight_VH.to(compute), None if bias_V is None else bias_V.to(compute)
        wanted = tuple(need and learns for need in ctx.needs_input_grad[:3])
        grads = tuple(
            torch.zeros_like(p) if p is not None and want else None
            for p, want in zip((h_NH, weight_VH, bias_V), wanted, strict=True)
        )
        found = DistillOutput(
            *(torch.zeros(shape, dtype=exact, device=h_NH.device) for shape in ((), len(h_NH), len(h_NH)))
        )
        with torch.autocast(h_NH.device.type, enabled=False):
            for at in range(0, len(h_NH), ENTRIES):
                rows = slice(at, at + ENTRIES)
                h = h_NH[rows].to(compute)
                z = linear(h, weight, bias).to(exact).requires_grad_(any(wanted))
                with torch.set_grad_enabled(any(wanted)):
                    own = of(z, rows)
                found.total.add_(own.total.detach())
                found.divergence_N[rows], found.logprob_N[rows] = own.divergence_N.detach(), own.logprob_N.detach()
                if any(wanted):
                    _collect(grads, rows, torch.autograd.grad(own.total, z)[0].to(compute), h, weight)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(found.divergence_N, found.logprob_N)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if g is None else g * grad for g in ctx.saved_tensors), None, None)


def _collect(grads: Sequence[Tensor | None], rows: slice, d_z: Tensor, h: Tensor, weight: Tensor) -> None:
    """Add what a slice's products do to hidden states, weights and bias."""
    of_h, of_weight, of_bias = grads
    if of_h is not None:
        of_h[rows] = matmul(d_z, weight).to(of_h.dtype)
    if of_weight is not None:
        of_weight += matmul(d_z.T, h)
    if of_bias is not None:
        of_bias += d_z.sum(0)


def _head_tensors(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    acting = effective_linear(head)
    return acting.weight, getattr(acting, "bias", None)  # type: ignore[return-value]
