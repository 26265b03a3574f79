"""Several adapters into one: pure functions on the true updates, in float32 or wider.

An update of one matrix is held as its factors, D = B A with the scale already in B, or as the matrix itself. peft's own
routine merges A and B apart, which adds terms that no adapter had, and keeps a scale that no longer fits.

Suffixes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rung.errors import CheckpointError

CombineMethod = Literal["sum", "ties", "dare", "magnitude"]


class LowRankFactors(NamedTuple):
    """One update: D = B A."""

    b_OR: Tensor
    a_RI: Tensor

    @property
    def dense(self) -> Tensor:
        """The matrix [O, I]."""
        return self.b_OR @ self.a_RI


class TruncatedFactors(NamedTuple):
    """A matrix as factors of a stated rank, and what that lost: the norm of the rest over the norm of the whole."""

    factors: LowRankFactors
    lost: float


def lora_factors(state: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, LowRankFactors]:
    """The updates of a saved LoRA by module name, each with its own scale (rank and alpha patterns, rsLoRA) in B.

    Raises `CheckpointError` for an adapter that is no plain LoRA.
    """
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("lora_bias"):
        raise CheckpointError(
            "only plain LoRA adapters can be fused",
            where=where,
            given="DoRA" if config.get("use_dora") else config.get("peft_type"),
        )
    found: dict[str, LowRankFactors] = {}
    for key, a in state.items():
        if not key.endswith(".lora_A.weight"):
            if ".lora_" not in key:
                raise CheckpointError("a module trained whole cannot be fused", where=where, given=key)
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = state.get(key.replace(".lora_A.", ".lora_B."))
        if b is None:
            raise CheckpointError("a tensor is missing", where=where, given=key.replace(".lora_A.", ".lora_B."))
        alpha = _pattern_value(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        scale = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        found[name] = LowRankFactors(scale * b.float(), a.float())
    targets = config.get("target_modules")
    missing = set(targets) - found.keys() if isinstance(targets, list) else set()
    orphans = [k for k in state if k.endswith(".lora_B.weight") and k.replace(".lora_B.", ".lora_A.") not in state]
    if orphans or any("." in name for name in missing):  # roles alone are no names
        raise CheckpointError("a tensor is missing", where=where, given=[*orphans, *sorted(missing)][:2])
    return found


def concatenate(updates: Sequence[LowRankFactors], weights: Sequence[float]) -> LowRankFactors:
    """sum_i w_i D_i exactly, in the sum of the ranks."""
    b = torch.cat([w * u.b_OR for w, u in zip(weights, updates, strict=True)], dim=1)
    return LowRankFactors(b, torch.cat([u.a_RI for u in updates]))


def combine(
    updates: Sequence[Tensor],
    weights: Sequence[float],
    how: CombineMethod,
    *,
    density: float,
    generator: torch.Generator,
) -> Tensor:
    """One matrix from several [O, I]."""
    weighted = [w * d for w, d in zip(weights, updates, strict=True)]
    if how == "sum":
        return torch.stack(weighted).sum(0)
    if how == "magnitude":
        return torch.stack([trim(d, density) for d in weighted]).sum(0)
    if how == "dare":
        return torch.stack([drop_and_rescale(d, density, generator) for d in weighted]).sum(0)
    return ties([trim(d, density) for d in weighted])


def trim(update: Tensor, density: float) -> Tensor:
    """The share `density` of entries that are largest in magnitude; zero elsewhere."""
    kept = max(1, round(density * update.numel()))
    threshold = update.abs().flatten().kthvalue(update.numel() - kept + 1).values
    return update * (update.abs() >= threshold)


def drop_and_rescale(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Entries kept with probability `density` and scaled up by its inverse (Yu et al. 2023, section 3)."""
    kept = torch.rand(update.shape, generator=generator, dtype=update.dtype) < density
    return update * kept / density


def ties(updates: Sequence[Tensor]) -> Tensor:
    """Of trimmed updates: elect the sign of the larger mass, average what agrees (Yadav et al. 2023, algorithm 1)."""
    stacked = torch.stack(list(updates))
    elected = stacked.sum(0).sign()
    agrees = (stacked.sign() == elected) & (elected != 0)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def truncate(update: Tensor, rank: int) -> TruncatedFactors:
    """The best approximation of this rank, its singular values shared out to both factors (Eckart and Young 1936)."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    whole = float(s.norm())
    lost = float(s[rank:].norm()) / whole if whole else 0.0
    return TruncatedFactors(LowRankFactors(u[:, :rank] * root, root[:, None] * vh[:rank]), lost)


def truncate_product(factors: LowRankFactors, rank: int) -> TruncatedFactors:
    """The same for a product of factors, without ever making the matrix."""
    q_b, r_b = torch.linalg.qr(factors.b_OR)
    q_a, r_a = torch.linalg.qr(factors.a_RI.T)
    small = truncate(r_b @ r_a.T, rank)
    return TruncatedFactors(LowRankFactors(q_b @ small.factors.b_OR, small.factors.a_RI @ q_a.T), small.lost)


def _pattern_value(pattern: Mapping[str, float], name: str, default: float) -> float:
    """Peft's rule: a key stands for modules whose name ends with it."""
    return next((value for key, value in pattern.items() if name == key or name.endswith(f".{key}")), default)
