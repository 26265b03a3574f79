"""One Triton kernel for the head on a card: log-sum-exp, the target's logit, and the gradient in place of the logits.

Between the two products of a tile, `models/logprobs.py` would launch some twenty elementwise kernels, each of which
reads and writes all logits. This kernel has one program an entry: a first pass over the vocabulary keeps a running
maximum and sum (Milakov and Gimelshein 2018, algorithm 3), a second one overwrites each logit with the gradient of
log p(target) with respect to the head's product. So a tile holds the whole vocabulary and costs three launches. It is
imported only where Triton is; the tests run it in Triton's interpreter.

N entries of a tile, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Vocabulary entries that a program holds at once: 16 floats for each of its 256 threads."""
WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _logits(z, scale, softcap, inverse_temperature, has_softcap: tl.constexpr):  # type: ignore[no-untyped-def]
    """The map of `LogitTransform`."""
    logits = z.to(tl.float32) * scale
    if has_softcap:
        # tanh(x) = 2 sigmoid(2 x) - 1: the interpreter has no tanh
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
    return logits * inverse_temperature


@triton.jit  # type: ignore[untyped-decorator]
def _log_softmax_gradient(  # type: ignore[no-untyped-def]  # noqa: PLR0913 -- pointers and numbers of one launch
    z_ptr,
    target_ptr,
    factor_ptr,
    lse_ptr,
    logit_ptr,
    scale,
    softcap,
    inverse_temperature,
    vocabulary: tl.constexpr,
    has_softcap: tl.constexpr,
    has_factor: tl.constexpr,
    writes_gradient: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # 64 bits: a tile may have more than 2^31 bytes
    z_ptr += row * vocabulary
    target = tl.load(target_ptr + row)
    # before the first pass, whose reductions all warps wait for: the second pass overwrites it
    target_z = tl.load(z_ptr + target)
    maximum, total = -float("inf"), 0.0
    for start in range(0, vocabulary, block):
        columns = start + tl.arange(0, block)
        inside = columns < vocabulary
        z = tl.load(z_ptr + columns, mask=inside, other=0.0)
        logits = tl.where(inside, _logits(z, scale, softcap, inverse_temperature, has_softcap), -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=0))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(logits - new_maximum), axis=0)
        maximum = new_maximum
    lse = maximum + tl.log(total)
    tl.store(lse_ptr + row, lse)
    tl.store(logit_ptr + row, _logits(target_z, scale, softcap, inverse_temperature, has_softcap))
    if writes_gradient:
        factor = scale * inverse_temperature
        if has_factor:
            factor *= tl.load(factor_ptr + row)
        for start in range(0, vocabulary, block):
            columns = start + tl.arange(0, block)
            inside = columns < vocabulary
            z = tl.load(z_ptr + columns, mask=inside, other=0.0)
            logits = _logits(z, scale, softcap, inverse_temperature, has_softcap)
            probability = tl.exp(logits - lse)
            gradient = tl.where(columns == target, 1.0 - probability, -probability) * factor
            if has_softcap:
                capped = logits / (inverse_temperature * softcap)
                gradient *= 1.0 - capped * capped
            tl.store(z_ptr + columns, gradient.to(z_ptr.dtype.element_ty), mask=inside)


def log_softmax_gradient_(
    z_NV: Tensor,
    target_N: Tensor,
    *,
    scale: float,
    softcap: float | None,
    temperature: float,
    factor_N: Tensor | None = None,
    writes_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and target logit, float32 [N] each, of the products `z_NV` of a head (contiguous, 16 or 32 bits).

    The logits are softcap * tanh(scale * z / softcap) / temperature. With `writes_gradient`, z is overwritten with the
    gradient of log p(target) with respect to z, times `factor_N`.
    """
    entries, vocabulary = z_NV.shape
    lse_N, logit_N = (torch.empty(entries, dtype=torch.float32, device=z_NV.device) for _ in range(2))
    if not entries:
        return lse_N, logit_N
    options: dict[str, Any] = {"has_softcap": softcap is not None, "has_factor": factor_N is not None}
    # the kernel reads one number a program: a gradient that was expanded has a stride of 0
    target_N, factor_N = target_N.contiguous(), None if factor_N is None else factor_N.contiguous()
    _log_softmax_gradient[(entries,)](
        *(z_NV, target_N, lse_N if factor_N is None else factor_N, lse_N, logit_N),
        *(scale, 1.0 if softcap is None else softcap, 1.0 / temperature),
        **options,
        vocabulary=vocabulary,
        writes_gradient=writes_gradient,
        block=min(BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=WARPS,
    )
    return lse_N, logit_N
