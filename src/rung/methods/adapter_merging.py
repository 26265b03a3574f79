"""Merging several adapters into one: pure functions on the updates B A, in float32 or wider.

An update of one matrix is stored as its factors, D = B A with the scale in B, or as the full matrix. peft's routine
merges A and B separately, which adds cross terms that no adapter had, and keeps a scale that no longer fits. The cost
here is a full matrix and an SVD for every method except `sum`. `commands/merge_adapters.py` uses them.

Suffixes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rung.errors import CheckpointError
from rung.methods.adapter_files import lora_updates, other_than_plain_lora

CombineMethod = Literal["sum", "ties", "dare", "magnitude"]


class LowRankFactors(NamedTuple):
    """One update: D = B A."""

    b_OR: Tensor
    a_RI: Tensor

    @property
    def dense(self) -> Tensor:
        """The matrix [O, I]."""
        return self.b_OR @ self.a_RI


def split_singular_values(u: Tensor, s: Tensor, vh: Tensor) -> LowRankFactors:
    """Factors of U diag(s) V^T, with the roots of the singular values in both."""
    root = s.sqrt()
    return LowRankFactors(u * root, root[:, None] * vh)


class TruncatedFactors(NamedTuple):
    """Factors of a given rank, and the loss: the norm of the discarded part over the norm of the matrix."""

    factors: LowRankFactors
    lost: float


def lora_factors(state: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, LowRankFactors]:
    """Updates of a saved LoRA by module name, with each module's scale (rank and alpha patterns, rsLoRA) in B.

    Raises `CheckpointError` for an adapter other than plain LoRA.
    """
    if (other := other_than_plain_lora(state, config)) is not None:
        raise CheckpointError("only plain LoRA adapters can be fused", where=where, given=other)
    updates = lora_updates(state, config, where).items()
    return {name: LowRankFactors(u.scale * u.b_OR.float(), u.a_RI.float()) for name, u in updates}


def concatenate(updates: Sequence[LowRankFactors], weights: Sequence[float]) -> LowRankFactors:
    """sum_i w_i D_i exactly; its rank is the sum of the ranks."""
    b = torch.cat([w * u.b_OR for w, u in zip(weights, updates, strict=True)], dim=1)
    return LowRankFactors(b, torch.cat([u.a_RI for u in updates]))


def combine(
    updates: Sequence[Tensor], weights: Sequence[float], how: CombineMethod, density: float, generator: torch.Generator
) -> Tensor:
    """Combine several matrices [O, I] into one."""
    weighted = [w * d for w, d in zip(weights, updates, strict=True)]
    if how in ("magnitude", "ties"):
        weighted = [trim(d, density) for d in weighted]
    if how == "dare":
        weighted = [drop_and_rescale(d, density, generator) for d in weighted]
    return ties(weighted) if how == "ties" else torch.stack(weighted).sum(0)


def trim(update: Tensor, density: float) -> Tensor:
    """Keep the share `density` of entries with the largest magnitude; set the others to zero."""
    kept_count = max(1, round(density * update.numel()))
    threshold = update.abs().flatten().kthvalue(update.numel() - kept_count + 1).values
    return update * (update.abs() >= threshold)


def drop_and_rescale(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE: keep each entry with probability `density` and divide by it (Yu et al. 2023, section 3)."""
    # The caller's generator: the same seed gives the same merged adapter.
    mask = torch.rand(update.shape, generator=generator, dtype=update.dtype) < density
    return update * mask / density


def ties(updates: Sequence[Tensor]) -> Tensor:
    """TIES: elect the sign with the larger mass, average the entries with it (Yadav et al. 2023, algorithm 1)."""
    stacked = torch.stack(list(updates))
    elected_sign = stacked.sum(0).sign()
    # Where positive and negative mass cancel exactly no sign is elected, and the result is 0.
    agrees = (stacked.sign() == elected_sign) & (elected_sign != 0)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def truncate(update: Tensor, rank: int) -> TruncatedFactors:
    """The best approximation of this rank, singular values split between the factors (Eckart and Young 1936)."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    norm = float(s.norm())
    lost = float(s[rank:].norm()) / norm if norm else 0.0
    return TruncatedFactors(split_singular_values(u[:, :rank], s[:rank], vh[:rank]), lost)


def truncate_product(factors: LowRankFactors, rank: int) -> TruncatedFactors:
    """`truncate` for a product of factors, without the full matrix: QR of both, SVD of the small core."""
    # Q has orthonormal columns, so the singular values of B A are those of the small R_b R_a^T.
    q_b, r_b = torch.linalg.qr(factors.b_OR)
    q_a, r_a = torch.linalg.qr(factors.a_RI.T)
    core = truncate(r_b @ r_a.T, rank)
    return TruncatedFactors(LowRankFactors(q_b @ core.factors.b_OR, core.factors.a_RI @ q_a.T), core.lost)
