"""Preference optimization: raise the better of two answers over the other, relative to a reference.

The losses are pure functions of a pair's log-ratios to the reference, summed over the tokens of each answer or divided
by their number. The two answers of a pair share their prompt in the tree, so it is computed once. No reward model is
needed; the reference costs a second forward pass, which is cached by document. `objectives/registry.py` builds it.

Suffixes: D documents of a batch, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from rung.config.objective import REFERENCE_FREE, PreferenceConfig
from rung.models.policy import Policy, sum_by_document
from rung.objectives.pairs import AnswerPairs, answer_pairs, correlation, soft_label_loss
from rung.objectives.protocol import Objective, entries_of
from rung.objectives.sft import nll
from rung.types import Counts, Example, LossTerm, PackedBatch


class PairLogprobs(NamedTuple):
    """Log-probabilities and lengths of the better and the other answer of each pair, [P] each."""

    chosen: Tensor
    """Log-probability of the answer in nats, minus that of the reference if there is one."""
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def per_token(self) -> tuple[Tensor, Tensor]:
        """Both in nats per token."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens

    def exchanged(self) -> PairLogprobs:
        """The same pairs if the other answer of each were the better one."""
        return PairLogprobs(self.rejected, self.chosen, self.rejected_tokens, self.chosen_tokens)


def dpo(pairs: PairLogprobs, config: PreferenceConfig) -> Tensor:
    """-log sigmoid(beta h), h the difference of the log-ratios (Rafailov et al. 2023, eq. 7). ln 2 where h is 0."""
    return -F.logsigmoid(config.resolved_beta * (pairs.chosen - pairs.rejected))


def ipo(pairs: PairLogprobs, config: PreferenceConfig) -> Tensor:
    """(h - 1 / (2 beta))^2 with h in nats per token (Azar et al. 2024, eq. 17)."""
    chosen, rejected = pairs.per_token()
    return (chosen - rejected - 1.0 / (2.0 * config.resolved_beta)).square()


def hinge(pairs: PairLogprobs, config: PreferenceConfig) -> Tensor:
    """max(0, 1 - beta h) (Zhao et al. 2023, SLiC, on the log-ratios)."""
    return torch.relu(1.0 - config.resolved_beta * (pairs.chosen - pairs.rejected))


def robust(pairs: PairLogprobs, config: PreferenceConfig) -> Tensor:
    """DPO without the bias of labels of which a share e is wrong (Chowdhury et al. 2024, eq. 11)."""
    h, e = config.resolved_beta * (pairs.chosen - pairs.rejected), config.label_smoothing
    return (-(1.0 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1.0 - 2.0 * e)


def simpo(pairs: PairLogprobs, config: PreferenceConfig) -> Tensor:
    """-log sigmoid(beta (h - margin)) with h in nats per token, no reference (Meng et al. 2024, eq. 6)."""
    chosen, rejected = pairs.per_token()
    return -F.logsigmoid(config.resolved_beta * (chosen - rejected - config.margin))


def orpo(pairs: PairLogprobs, config: PreferenceConfig) -> Tensor:
    """-beta log sigmoid of the difference of log-odds, no reference (Hong et al. 2024, eq. 7)."""
    chosen, rejected = pairs.per_token()
    return -config.resolved_beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def apo_zero(pairs: PairLogprobs, config: PreferenceConfig) -> Tensor:
    """Raise better answers and lower others, each independently (D'Oosterlinck et al. 2024, eq. 6)."""
    chosen, rejected = (torch.sigmoid(config.resolved_beta * logratio) for logratio in pairs[:2])
    return 1.0 - chosen + rejected


def sigmoid_norm(pairs: PairLogprobs, config: PreferenceConfig) -> Tensor:
    """DPO on log-ratios per token, which removes the advantage of length (Meng et al. 2024, section 4.4)."""
    chosen, rejected = pairs.per_token()
    return -F.logsigmoid(config.resolved_beta * (chosen - rejected))


PER_TOKEN = frozenset({"ipo", "simpo", "orpo", "sigmoid_norm"})
"""Losses that compare nats per token."""
LOSSES: dict[str, Callable[[PairLogprobs, PreferenceConfig], Tensor]] = {
    loss.__name__: loss for loss in (dpo, ipo, hinge, robust, simpo, orpo, apo_zero, sigmoid_norm)
}
"""By the name in the config, which is that of the function."""


def paired_loss(pairs: PairLogprobs, probability_P: Tensor | None, config: PreferenceConfig) -> Tensor:
    """The loss of each pair [P] in nats, expected over its label; None as probability: all labels are certain."""
    loss = LOSSES[config.loss]
    right_P = loss(pairs, config)
    if probability_P is None:
        return right_P
    return soft_label_loss(right_P, loss(pairs.exchanged(), config), probability_P)


def kto(ratio_D: Tensor, good_D: Tensor, reference_point: Tensor, config: PreferenceConfig) -> Tensor:
    """1 - sigmoid of the margin of a good answer above the reference point, or of a bad one below it, [D].

    Ethayarajh et al. 2024, eq. 8; the reference point is the KL divergence to the reference, at least 0.
    """
    above_D = config.resolved_beta * (ratio_D - reference_point)
    weight_D = torch.where(good_D, 1.0, config.undesirable_weight)
    return weight_D * (1.0 - torch.sigmoid(torch.where(good_D, above_D, -above_D)))


def make_preference_objective(config: PreferenceConfig) -> Objective:
    """The objective for a loss: paired, or unpaired for KTO."""
    return UnpairedPreference(config) if config.loss == "kto" else PairedPreference(config)


class PairedPreference(Objective):
    """Sum over rows of the mean loss of a row's pairs (Ouyang et al. 2022, eq. 1), each with the row's weight."""

    compares_answers, min_answers = True, 2
    config: PreferenceConfig

    def count(self, batch: PackedBatch) -> Counts:
        """Weights of the rows, and of the tokens of their best answers."""
        pairs = answer_pairs(batch)
        # Answers that no other answer beats: only these are targets of the SFT term.
        shares = pairs.win_probabilities(batch.sequences)
        tokens = sum(share * d.weight * d.predictions for share, d in zip(shares, batch.documents, strict=True))
        return Counts(tokens=float(tokens), sequences=float(batch.sequences), pairs=sum(pairs.weight))

    def loss(self, policy: Policy, batch: PackedBatch) -> list[LossTerm]:
        """One term of the pairs, and one of the best answers' tokens if `sft_weight` is above 0."""
        pairs, reference_D = answer_pairs(batch), None
        # The reference runs first, while no activations of the policy are stored.
        if self.config.loss not in REFERENCE_FREE:
            reference_D = policy.reference_sums(batch)
        logprobs_N = policy.logprobs(batch)
        chosen_P, rejected_P = pairs.indices(logprobs_N.device)
        policy_D = sum_by_document(batch, logprobs_N)
        tokens_D = sum_by_document(batch, torch.ones_like(logprobs_N))
        ratio_D = policy_D if reference_D is None else policy_D - reference_D.to(policy_D.dtype)
        pair_logprobs = PairLogprobs(ratio_D[chosen_P], ratio_D[rejected_P], tokens_D[chosen_P], tokens_D[rejected_P])
        losses_P = paired_loss(pair_logprobs, pairs.soft_labels(ratio_D), self.config)
        self._record_batch(pairs, pair_logprobs, policy_D.detach()[chosen_P], policy_D.detach()[rejected_P])
        terms = [LossTerm((losses_P * losses_P.new_tensor(pairs.weight)).sum(), "pairs", self.config.loss)]
        if self.config.sft_weight:
            shares = pairs.win_probabilities(batch.sequences)
            terms.append(cross_entropy(batch, logprobs_N, shares, self.config.sft_weight))
        return terms

    def summarize(self, metrics: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Of the pairs with a preferred answer: the margin of the loss, accuracy, log-probabilities, and lengths."""
        margin, length_difference = metrics["margin"], metrics["chosen_tokens"] - metrics["rejected_tokens"]
        return {
            "margin": float(margin.mean()),
            "accuracy": float((margin > 0).double().mean()),
            "chosen_logprob": float(metrics["chosen"].mean()),
            "rejected_logprob": float(metrics["rejected"].mean()),
            "length_ratio": float(metrics["chosen_tokens"].sum() / metrics["rejected_tokens"].sum()),
            "length_correlation": correlation(margin, length_difference),
        }

    def _record_batch(self, pairs: AnswerPairs, pair_logprobs: PairLogprobs, chosen: Tensor, rejected: Tensor) -> None:
        first, second = pair_logprobs.per_token() if self.config.loss in PER_TOKEN else pair_logprobs[:2]
        margin = (self.config.resolved_beta * (first - second)).detach()
        tokens = {"chosen_tokens": pair_logprobs.chosen_tokens, "rejected_tokens": pair_logprobs.rejected_tokens}
        if metrics := pairs.of_preferred({"margin": margin, "chosen": chosen, "rejected": rejected, **tokens}):
            self.batch_metrics.append(metrics)


class UnpairedPreference(Objective):
    """KTO: each answer is good or bad independently; in a row with several answers the best is good.

    The reference point is the mean log-ratio of answers after the prompts of other rows, computed before each step
    (Ethayarajh et al. 2024, section 4.1). A validation loss uses that of the last step.
    """

    compares_answers = True
    config: PreferenceConfig
    reference_point = torch.zeros(())
    """In nats; 0 until the first step: policy and reference are still equal."""

    def count(self, batch: PackedBatch) -> Counts:
        """Weights of the answers, and of the tokens of the good ones."""
        weight = sum(document.weight for document in batch.documents)
        tokens = sum(d.weight * d.predictions for d in compress(batch.documents, is_good_answer(batch)))
        return Counts(tokens=float(tokens), sequences=float(batch.sequences), pairs=float(weight))

    def kl_examples(self, examples: Sequence[Example]) -> list[Example]:
        """Each prompt with an answer of the next row, unless it is longer than the longest document of the step."""
        rows: dict[int, list[Example]] = {}
        for i, e in enumerate(examples):
            # A document without a row is a group of its own.
            rows.setdefault(e.row if e.row >= 0 else -1 - i, []).append(e)
        groups, max_length = list(rows.values()), max(map(len, examples), default=0)
        mismatched = []
        for group, next_group in zip(groups, [*groups[1:], *groups[:1]], strict=True):
            for k, e in enumerate(group if next_group is not group else []):
                answer = next_group[k % len(next_group)]
                prompt_end, answer_start = int(e.supervised.argmax()), int(answer.supervised.argmax())
                ids = np.concatenate([e.ids[:prompt_end], answer.ids[answer_start:]])
                # Longer rows could exceed the memory that was planned for the step.
                if len(ids) <= max_length:
                    supervised = np.concatenate([e.supervised[:prompt_end], answer.supervised[answer_start:]])
                    # Row -1: a mismatched answer belongs to no group and may be packed anywhere.
                    mismatched.append(replace(e, ids=ids, supervised=supervised, row=-1))
        return mismatched

    def prepare(self, policy: Policy, batches: Iterable[PackedBatch]) -> None:
        """Mean log-ratio of mismatched answers in nats, at least 0."""
        ratios = []
        for batch in batches:
            logprobs_N = policy.logprobs(batch)
            ratios.append(sum_by_document(batch, logprobs_N - policy.reference_logprobs(batch).to(logprobs_N.dtype)))
        # A KL divergence is not negative; the estimate from a few answers may be.
        self.reference_point = torch.cat(ratios).mean().clamp(min=0.0)

    def loss(self, policy: Policy, batch: PackedBatch) -> list[LossTerm]:
        """One term of the answers, and one of the good answers' tokens if `sft_weight` is above 0."""
        reference_D = policy.reference_sums(batch)
        logprobs_N, is_good = policy.logprobs(batch), is_good_answer(batch)
        ratio_D = sum_by_document(batch, logprobs_N) - reference_D.to(logprobs_N.dtype)
        good_D = torch.tensor(is_good, device=ratio_D.device)
        weight_D = ratio_D.new_tensor([document.weight for document in batch.documents])
        losses_D = kto(ratio_D, good_D, self.reference_point.to(ratio_D), self.config)
        self.batch_metrics.append({"ratio": ratio_D.detach(), "good": good_D})
        terms = [LossTerm((losses_D * weight_D).sum(), "pairs", "kto")]
        if self.config.sft_weight and any(is_good):
            terms.append(cross_entropy(batch, logprobs_N, is_good, self.config.sft_weight))
        return terms

    def summarize(self, metrics: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Mean rewards beta r of good and bad answers, their difference, and the reference point in nats."""
        reward, is_good = self.config.resolved_beta * metrics["ratio"], metrics["good"] > 0
        masks = {"good": is_good, "bad": ~is_good}
        means = {name: float(reward[mask].mean()) for name, mask in masks.items() if mask.any()}
        margin = {"margin": means["good"] - means["bad"]} if len(means) == 2 else {}
        rewards = {f"{name}_reward": value for name, value in means.items()}
        return {**margin, **rewards, "reference_point": float(self.reference_point)}


def is_good_answer(batch: PackedBatch) -> list[bool]:
    """Whether each document's answer is good: labeled above 0, or the best of a row with several."""
    rows: dict[int, list[float]] = {}
    for d in batch.documents:
        rows.setdefault(d.row, []).append(d.score or 0.0)
    scored = [(d.score or 0.0, rows[d.row]) for d in batch.documents]
    return [score == max(scores) if len(scores) > 1 else score > 0.0 for score, scores in scored]


def cross_entropy(batch: PackedBatch, logprobs_N: Tensor, shares: Sequence[float], weight: float) -> LossTerm:
    """Weighted cross-entropy of the tokens of documents, each times the share [D] of its document; 0 leaves it out."""
    is_target = [share > 0.0 for share in shares]
    index = entries_of(batch, is_target).to(logprobs_N.device)
    weight_N = batch.loss.weight[index]
    if any(0.0 < share < 1.0 for share in shares):
        predictions = [d.predictions for d in compress(batch.documents, is_target)]
        share_N = np.repeat(list(compress(shares, is_target)), predictions)
        weight_N = weight_N * torch.from_numpy(share_N).to(logprobs_N)
    return LossTerm(weight * nll(logprobs_N[index], weight_N), "tokens", "sft")


def _log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) of a log-probability. If rounding made it 0, the largest p below 1 is used."""
    below_zero = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    # expm1: 1 - exp(x) would cancel for p near 1.
    return below_zero - torch.log(-torch.expm1(below_zero))
