"""Divergence between a student's and a teacher's distribution over the vocabulary, without logits for all tokens.

The loss is a sum over entries whose weights are known beforehand, so the forward pass computes its gradients slice by
slice, including those of the head: nothing is computed twice, and the cross-entropy of the data's tokens comes from
the same logits. The cost: gradients are computed even where no backward pass follows, unless gradients are disabled.
`objectives/distill.py` calls it.

Suffixes: N entries, V vocabulary, H width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rung.models.logprobs import LogitTransform, head_tensors
from rung.models.matmul import linear, matmul, product_dtype, wide_zeros

ENTRIES_PER_SLICE = 128
"""Entries in one slice: 25 MB for a float32 tensor of logits over a vocabulary of 49,152."""
Divergence = Callable[[Tensor, Tensor], Tensor]
"""From log-probabilities [N, V] of teacher and student to nats [N]."""


def forward_kl(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL(teacher || student) [N]: mass-covering (Hinton et al. 2015)."""
    return (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1)


def reverse_kl(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL(student || teacher) [N]: mode-seeking (Gu et al. 2024)."""
    return (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)


def jensen_shannon(beta: float) -> Divergence:
    """Generalized: beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s (Agarwal et al. 2024, eq. 1)."""

    def divergence(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
        mixed = torch.logaddexp(teacher_NV + math.log(beta), student_NV + math.log1p(-beta))
        return beta * forward_kl(teacher_NV, mixed) + (1.0 - beta) * forward_kl(student_NV, mixed)

    return divergence


def divergence_function(kind: str, beta: float) -> Divergence:
    """The divergence that a config names; `beta` is for `jsd`."""
    return {"forward": forward_kl, "reverse": reverse_kl, "jsd": jensen_shannon(beta)}[kind]


class Distribution(NamedTuple):
    """Hidden states [N, H] at the predictions, and the output head that reads them."""

    hidden_NH: Tensor
    head: nn.Module
    logit_map: LogitTransform

    def logprobs(self, z_NV: Tensor, temperature: float) -> Tensor:
        """Log-probabilities from products of head and hidden state, in the type of `z_NV`."""
        # Not `LogitTransform.apply_`: that works in place, and autograd needs `z_NV` unchanged.
        logits = z_NV * self.logit_map.scale if self.logit_map.scale != 1.0 else z_NV
        if self.logit_map.softcap is not None:
            logits = self.logit_map.softcap * torch.tanh(logits / self.logit_map.softcap)
        return torch.log_softmax(logits / temperature, dim=-1)


class DistillTargets(NamedTuple):
    """Divergence, weights and target token of each of N entries."""

    divergence: Divergence
    temperature: float
    weight_N: Tensor
    """Weight of the divergence."""
    target_N: Tensor
    """Tokens of the data, for the cross-entropy."""
    nats_weight_N: Tensor | None
    """Weight of the cross-entropy, at the temperature of the student's logit map; None leaves it out."""


class DistillOutput(NamedTuple):
    """The sum to minimize, and nats of each entry without gradient."""

    total: Tensor
    divergence_N: Tensor
    logprob_N: Tensor


SliceLoss = Callable[[Tensor, slice], DistillOutput]
"""From head products [N, V] of a slice of the entries to its loss."""


def distillation_loss(student: Distribution, teacher: Distribution, targets: DistillTargets) -> DistillOutput:
    """Sum of weight * divergence - nats_weight * log p(target), with one product of the student's head for both.

    Heads of different sizes are compared over the smaller vocabulary; the rest is padding. The teacher gets no
    gradient.
    """
    (weight, bias), (teacher_weight, teacher_bias) = head_tensors(student.head), head_tensors(teacher.head)
    width = min(len(weight), len(teacher_weight))
    # Computed once here, because `slice_loss` runs for every slice.
    dtype = product_dtype(teacher.hidden_NH, teacher_weight)
    teacher_weight = teacher_weight[:width].detach().to(dtype)
    teacher_bias = None if teacher_bias is None else teacher_bias[:width].detach().to(dtype)

    def slice_loss(z_NV: Tensor, rows: slice) -> DistillOutput:
        with torch.no_grad():
            teacher_NV = linear(teacher.hidden_NH[rows].to(dtype), teacher_weight, teacher_bias).to(z_NV.dtype)
            teacher_NV = teacher.logprobs(teacher_NV, targets.temperature)
        divergence_N = targets.divergence(teacher_NV, student.logprobs(z_NV[:, :width], targets.temperature))
        total = (divergence_N * targets.weight_N[rows].to(divergence_N.dtype)).sum()
        if targets.nats_weight_N is None:
            return DistillOutput(total, divergence_N, torch.zeros_like(divergence_N))
        student_NV = student.logprobs(z_NV, student.logit_map.temperature)
        logprob_N = student_NV.gather(1, targets.target_N[rows, None])[:, 0]
        cross_entropy = (logprob_N * targets.nats_weight_N[rows].to(divergence_N.dtype)).sum()
        return DistillOutput(total - cross_entropy, divergence_N, logprob_N)

    # Read here: inside `Function.forward` autograd is always off.
    with_grad = torch.is_grad_enabled()
    output = _DistillationLoss.apply(slice_loss, with_grad, student.hidden_NH, weight, bias)  # type: ignore[no-untyped-call]
    return DistillOutput(*output)


class _DistillationLoss(torch.autograd.Function):
    """A sum over entries of products z = h W^T + b, slice by slice; the forward pass computes the gradients."""

    @staticmethod
    def forward(ctx: Any, slice_loss: SliceLoss, with_grad: bool, *tensors: Any) -> DistillOutput:
        h_NH, weight_VH, bias_V = tensors
        dtype = product_dtype(h_NH, weight_VH)
        wide_dtype = torch.promote_types(dtype, torch.float32)
        weight, bias = weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
        needs_grad = tuple(need and with_grad for need in ctx.needs_input_grad[2:])
        wanted = zip(tensors, needs_grad, strict=True)
        # Float32 whatever the head is stored in: the slices' gradients of it are added up.
        grads = tuple(wide_zeros(p) if p is not None and want else None for p, want in wanted)
        n, factory = len(h_NH), {"dtype": wide_dtype, "device": h_NH.device}
        output = DistillOutput(torch.zeros((), **factory), torch.zeros(n, **factory), torch.zeros(n, **factory))
        with torch.autocast(h_NH.device.type, enabled=False):
            # Only one slice of logits exists at a time: memory does not grow with the number of entries.
            for start in range(0, len(h_NH), ENTRIES_PER_SLICE):
                rows = slice(start, start + ENTRIES_PER_SLICE)
                h = h_NH[rows].to(dtype)
                z = linear(h, weight, bias).to(wide_dtype).requires_grad_(any(needs_grad))
                with torch.set_grad_enabled(any(needs_grad)):
                    slice_output = slice_loss(z, rows)
                total, divergence_N, logprob_N = (part.detach() for part in slice_output)
                output.total.add_(total)
                output.divergence_N[rows], output.logprob_N[rows] = divergence_N, logprob_N
                if any(needs_grad):
                    (d_z,) = torch.autograd.grad(slice_output.total, z)
                    _accumulate_grads(grads, rows, d_z, h, weight)
        # The gradients themselves are saved; the backward pass only multiplies them by the incoming scalar.
        ctx.save_for_backward(*(g if g is None else g.to(p.dtype) for g, p in zip(grads, tensors, strict=True)))
        ctx.mark_non_differentiable(output.divergence_N, output.logprob_N)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else g * grad for g in ctx.saved_tensors)


def _accumulate_grads(grads: Sequence[Tensor | None], rows: slice, wide_d_z: Tensor, h: Tensor, weight: Tensor) -> None:
    """Add the gradients of one slice to those of hidden states, weight and bias; products in the dtype of `h`."""
    grad_h, grad_weight, grad_bias = grads
    d_z = wide_d_z.to(h.dtype)
    if grad_h is not None:
        grad_h[rows] = matmul(d_z, weight).to(grad_h.dtype)
    if grad_weight is not None:
        grad_weight += matmul(d_z.T, h)
    if grad_bias is not None:
        grad_bias += wide_d_z.sum(0)
