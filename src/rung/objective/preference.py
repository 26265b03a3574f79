"""Preference optimisation: the better of two answers becomes likelier than the other, measured against a reference.

The losses are pure functions of a pair's log-ratios to the reference, summed over the tokens of each answer or divided
by their number. The two answers of a pair share their prompt in the tree, so it is computed once.

Suffixes: D documents of a batch, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from rung.errors import DataError
from rung.model.policy import Policy
from rung.objective.base import Objective
from rung.objective.sft import nll
from rung.spec.objective import FREE, PreferenceSpec
from rung.types import Counts, Example, LossTerm, PackedBatch


class Sides(NamedTuple):
    """What is known of the better and the other answer of each pair, [P] each."""

    better: Tensor
    """Log-probability of the answer, in nats; of the reference taken off where there is one."""
    other: Tensor
    better_tokens: Tensor
    other_tokens: Tensor

    def per_token(self) -> tuple[Tensor, Tensor]:
        """Both in nats per token."""
        return self.better / self.better_tokens, self.other / self.other_tokens


def dpo(sides: Sides, spec: PreferenceSpec) -> Tensor:
    """-log sigmoid(beta h), h the difference of the log-ratios (Rafailov et al. 2023, eq. 7). ln 2 where h is 0."""
    return -F.logsigmoid(spec.beta * (sides.better - sides.other))


def ipo(sides: Sides, spec: PreferenceSpec) -> Tensor:
    """(h - 1 / (2 beta))^2 with h in nats per token (Azar et al. 2024, eq. 17)."""
    better, other = sides.per_token()
    return (better - other - 1.0 / (2.0 * spec.beta)).square()


def hinge(sides: Sides, spec: PreferenceSpec) -> Tensor:
    """max(0, 1 - beta h) (Zhao et al. 2023, SLiC, on the log-ratios)."""
    return torch.relu(1.0 - spec.beta * (sides.better - sides.other))


def robust(sides: Sides, spec: PreferenceSpec) -> Tensor:
    """DPO without the bias of labels of which a share e is wrong (Chowdhury et al. 2024, eq. 11)."""
    h, e = spec.beta * (sides.better - sides.other), spec.label_smoothing
    return (-(1.0 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1.0 - 2.0 * e)


def simpo(sides: Sides, spec: PreferenceSpec) -> Tensor:
    """-log sigmoid(beta (h - margin)) with h in nats per token, no reference (Meng et al. 2024, eq. 6)."""
    better, other = sides.per_token()
    return -F.logsigmoid(spec.beta * (better - other - spec.margin))


def orpo(sides: Sides, spec: PreferenceSpec) -> Tensor:
    """-beta log sigmoid of the difference of log-odds, no reference (Hong et al. 2024, eq. 7)."""
    better, other = sides.per_token()
    return -spec.beta * F.logsigmoid(_log_odds(better) - _log_odds(other))


def apo_zero(sides: Sides, spec: PreferenceSpec) -> Tensor:
    """Better answers up, others down, each on its own (D'Oosterlinck et al. 2024, eq. 6)."""
    return 1.0 - torch.sigmoid(spec.beta * sides.better) + torch.sigmoid(spec.beta * sides.other)


def sigmoid_norm(sides: Sides, spec: PreferenceSpec) -> Tensor:
    """DPO on log-ratios per token: length alone wins nothing (Meng et al. 2024, section 4.4)."""
    better, other = sides.per_token()
    return -F.logsigmoid(spec.beta * (better - other))


LOSSES: dict[str, Callable[[Sides, PreferenceSpec], Tensor]] = {
    "dpo": dpo,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "simpo": simpo,
    "orpo": orpo,
    "apo_zero": apo_zero,
    "sigmoid_norm": sigmoid_norm,
}


def kto(ratio_D: Tensor, good_D: Tensor, reference_point: Tensor, spec: PreferenceSpec) -> Tensor:
    """1 - sigmoid of how far a good answer lies above the reference point, or a bad one below it [D].

    Ethayarajh et al. 2024, eq. 8; the reference point is the KL divergence to the reference, at least 0.
    """
    above_D = spec.beta * (ratio_D - reference_point)
    weight_D = torch.where(good_D, 1.0, spec.bad_weight)
    return weight_D * (1.0 - torch.sigmoid(torch.where(good_D, above_D, -above_D)))


def preference(spec: PreferenceSpec) -> Objective:
    """The objective of a loss: of pairs, or of single answers."""
    return Unpaired(spec) if spec.loss == "kto" else Paired(spec)


class Paired(Objective):
    """Sum of the losses of all pairs of each row; the divisor is the sum of the pairs' weights."""

    compares = True

    def __init__(self, spec: PreferenceSpec) -> None:
        self.spec = spec
        self.seen: list[dict[str, Tensor]] = []

    def count(self, batch: PackedBatch) -> Counts:
        """Weights of the pairs, and of the tokens of the best answers."""
        better, other = pairs(batch)
        documents = batch.documents
        best = set(better.tolist()) - set(other.tolist())
        learned = sum(documents[i].weight * int(documents[i].supervised[1:].sum()) for i in best)
        weight = sum(documents[i].weight for i in better.tolist())
        return Counts(tokens=float(learned), sequences=float(batch.sequences), pairs=float(weight))

    def loss(self, policy: Policy, batch: PackedBatch) -> list[LossTerm]:
        """One term a pair, and one for the best answers' tokens where `sft` is above 0."""
        better, other = pairs(batch)
        logprobs_N, owner_N = policy.logprobs(batch), batch.loss.owner
        better_P, other_P = (torch.from_numpy(side).to(owner_N.device) for side in (better, other))
        own_D = by_document(batch, logprobs_N)
        tokens_D = by_document(batch, torch.ones_like(logprobs_N))
        ratio_D = own_D
        if self.spec.loss not in FREE:
            ratio_D = own_D - by_document(batch, policy.reference_logprobs(batch).to(own_D.dtype))
        sides = Sides(ratio_D[better_P], ratio_D[other_P], tokens_D[better_P], tokens_D[other_P])
        weight_P = own_D.new_tensor([batch.documents[int(i)].weight for i in better])
        losses_P = LOSSES[self.spec.loss](sides, self.spec)
        self._see(sides, own_D.detach(), better_P, other_P)
        terms = [LossTerm((losses_P * weight_P).sum(), "pairs", self.spec.loss)]
        if self.spec.sft_weight:
            best_D = torch.zeros(batch.sequences, dtype=torch.bool, device=owner_N.device)
            best_D[better_P] = True
            best_D[other_P] = False
            chosen_N = best_D[owner_N]
            value = nll(logprobs_N[chosen_N], batch.loss.weight[chosen_N])
            terms.append(LossTerm(self.spec.sft_weight * value, "tokens", "sft"))
        return terms

    def report(self) -> Mapping[str, float]:
        """Of the pairs: the margin in nats, how many stand the right way, log-probabilities, lengths."""
        if not self.seen:
            return {}
        found = {name: torch.cat([own[name] for own in self.seen]).double() for name in self.seen[0]}
        self.seen = []
        margin, longer = found["margin"], found["better_tokens"] - found["other_tokens"]
        spread = margin.std(correction=0) * longer.std(correction=0)
        covariance = ((margin - margin.mean()) * (longer - longer.mean())).mean()
        return {
            "margin": float(margin.mean()),
            "accuracy": float((margin > 0).double().mean()),
            "chosen_logprob": float(found["better"].mean()),
            "rejected_logprob": float(found["other"].mean()),
            "length_ratio": float(found["better_tokens"].sum() / found["other_tokens"].sum()),
            "length_correlation": float(covariance / spread) if float(spread) else 0.0,
        }

    def _see(self, sides: Sides, own_D: Tensor, better_P: Tensor, other_P: Tensor) -> None:
        self.seen.append(
            {
                "margin": (self.spec.beta * (sides.better - sides.other)).detach(),
                "better": own_D[better_P],
                "other": own_D[other_P],
                "better_tokens": sides.better_tokens,
                "other_tokens": sides.other_tokens,
            }
        )


class Unpaired(Objective):
    """KTO: each answer on its own, good or bad; of a row with several the best is good.

    The reference point is the mean log-ratio of answers behind prompts of other rows, read before each step
    (Ethayarajh et al. 2024, section 4.1). A validation loss takes that of the last step.
    """

    compares = True

    def __init__(self, spec: PreferenceSpec) -> None:
        self.spec = spec
        self.reference_point = torch.zeros(())
        self.seen: list[tuple[Tensor, Tensor]] = []

    def count(self, batch: PackedBatch) -> Counts:
        """Weights of the answers."""
        weight = sum(document.weight for document in batch.documents)
        learned = sum(int(document.supervised[1:].sum()) for document in batch.documents)
        return Counts(tokens=float(learned), sequences=float(batch.sequences), pairs=float(weight))

    def beside(self, examples: Sequence[Example]) -> list[Example]:
        """Each prompt with an answer of the next row."""
        starts = [int(e.supervised.argmax()) for e in examples]
        mixed = []
        for i, e in enumerate(examples):
            others = (j % len(examples) for j in range(i + 1, i + len(examples)))
            other = next((j for j in others if e.row < 0 or examples[j].row != e.row), None)
            if other is not None:
                answer, at = examples[other], starts[other]
                ids = np.concatenate([e.ids[: starts[i]], answer.ids[at:]])
                supervised = np.concatenate([e.supervised[: starts[i]], answer.supervised[at:]])
                mixed.append(replace(e, ids=ids, supervised=supervised, row=-1))
        return mixed

    def prepare(self, policy: Policy, batches: Iterable[PackedBatch]) -> None:
        """Mean log-ratio of mismatched answers in nats, at least 0."""
        ratios = []
        for batch in batches:
            logprobs_N = policy.logprobs(batch)
            ratios.append(by_document(batch, logprobs_N - policy.reference_logprobs(batch).to(logprobs_N.dtype)))
        self.reference_point = torch.cat(ratios).mean().clamp(min=0.0)

    def loss(self, policy: Policy, batch: PackedBatch) -> list[LossTerm]:
        """One term an answer."""
        logprobs_N = policy.logprobs(batch)
        ratio_D = by_document(batch, logprobs_N - policy.reference_logprobs(batch).to(logprobs_N.dtype))
        good_D = torch.tensor(good(batch), device=ratio_D.device)
        weight_D = ratio_D.new_tensor([document.weight for document in batch.documents])
        losses_D = kto(ratio_D, good_D, self.reference_point.to(ratio_D), self.spec)
        self.seen.append((ratio_D.detach(), good_D))
        terms = [LossTerm((losses_D * weight_D).sum(), "pairs", "kto")]
        if self.spec.sft_weight:
            chosen_N = good_D[batch.loss.owner]
            value = nll(logprobs_N[chosen_N], batch.loss.weight[chosen_N])
            terms.append(LossTerm(self.spec.sft_weight * value, "tokens", "sft"))
        return terms

    def report(self) -> Mapping[str, float]:
        """Rewards beta r of good and of bad answers, their difference, and the reference point in nats."""
        if not self.seen:
            return {}
        ratio, is_good = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        self.seen = []
        reward = self.spec.beta * ratio.double()
        means = {
            name: float(reward[which].mean()) for name, which in (("good", is_good), ("bad", ~is_good)) if which.any()
        }
        margin = {"margin": means["good"] - means["bad"]} if len(means) == 2 else {}
        rewards = {f"{name}_reward": value for name, value in means.items()}
        return {**margin, **rewards, "reference_point": float(self.reference_point)}


def good(batch: PackedBatch) -> list[bool]:
    """Whether each document's answer is a good one: labelled so, or the best of a row of several."""
    best: dict[int, float] = {}
    for document in batch.documents:
        best[document.row] = max(best.get(document.row, 0.0), document.score)
    return [document.score > 0.0 and document.score == best[document.row] for document in batch.documents]


def by_document(batch: PackedBatch, values_N: Tensor) -> Tensor:
    """Sums over the supervised tokens of each document, [D]."""
    return values_N.new_zeros(batch.sequences).index_add(0, batch.loss.owner, values_N)


def pairs(batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
    """Documents of the better and of the other answer of every pair of a row that scores tell apart, int64 [P] each.

    Raises `DataError` for a batch without any.
    """
    rows: dict[int, list[int]] = {}
    for i, document in enumerate(batch.documents):
        rows.setdefault(document.row, []).append(i)
    score = [document.score for document in batch.documents]
    found = [(a, b) for row in rows.values() for a in row for b in row if score[a] > score[b]]
    if not found:
        raise DataError(
            "these rows compare nothing",
            where=str(batch.documents[0].source),
            hint="objective.kind: preference needs pairs, rankings or ratings (data.format)",
        )
    better, other = np.array(found, dtype=np.int64).T
    return better, other


def _log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p))."""
    return logprob - torch.log(-torch.expm1(logprob))
