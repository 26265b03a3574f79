"""Statistics of pairwise verdicts: win rate, length-controlled win rate, position bias, and trust in the judge.

A judge sees each pair in both orders. It prefers an answer if it does so in both; if the orders disagree the pair is a
tie (Zheng et al. 2023, section 3.4). Ties cost power and remove position bias. Unreadable verdicts are counted, never
scored. Pure functions of verdicts, used by `runs.judge` and `commands.compare`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, zip_longest
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rung.results.base import Estimate
from rung.results.evaluation import JudgeAgreement, Preference
from rung.scoring.agreement import Label, cohen_kappa, krippendorff_alpha, percent_agreement
from rung.scoring.significance import Floats, batch_sizes
from rung.scoring.stats import MIN_RESAMPLED_CLUSTERS, Clusters, expanded_percentiles, score_interval

Outcome = Literal["first", "second", "tie"]
OUTCOMES: tuple[Outcome, ...] = ("first", "second", "tie")
OUTCOME_VALUES = {"first": 1.0, "tie": 0.5, "second": 0.0}
REFITS = 2_000
"""Resamples on which the regression on length is refitted. A fifth of the usual number: each one is a fit."""
RIDGE = 0.01
"""Ridge penalty, which keeps the fit finite where all verdicts go one way."""
MAX_NEWTON_STEPS = 60
MAX_STEP_SIZE = 2.0
"""Limits of Newton's method. Steps in log-odds; longer ones overshoot where almost all verdicts go one way."""


@dataclass(frozen=True, slots=True)
class PairVerdicts:
    """Outcomes of one pair in both orders, in the original order of the answers; None if unreadable."""

    first_shown_first: Outcome | None
    second_shown_first: Outcome | None

    @property
    def outcome(self) -> Outcome | None:
        """The preference if it holds in both orders, else a tie; None if one verdict is unreadable."""
        a, b = self.first_shown_first, self.second_shown_first
        if a is None or b is None:
            return None
        return a if a == b else "tie"


def summarize_preferences(
    verdicts: Sequence[PairVerdicts], lengths: ArrayLike, clusters: Sequence[str], seed: int = 0
) -> Preference:
    """Summarize verdicts on pairs whose answers have `lengths` [P, 2] in characters."""
    sizes = np.asarray(lengths, dtype=np.float64).reshape(-1, 2)
    readable = [i for i, v in enumerate(verdicts) if v.outcome is not None]
    outcomes = [v.outcome for v in verdicts if v.outcome is not None]
    readable_clusters = [clusters[i] for i in readable]
    values = np.array([OUTCOME_VALUES[outcome] for outcome in outcomes])
    length_differences = sizes[readable, 0] - sizes[readable, 1]
    # ties and equal lengths say nothing about a preference for length
    decided = (values != 0.5) & (length_differences != 0)
    longer = (length_differences > 0) == (values == 1.0)
    shown_first = [(s, clusters[i]) for i in readable for s in _prefers_shown_first(verdicts[i])]
    agreements = [float(verdicts[i].first_shown_first == verdicts[i].second_shown_first) for i in readable]
    means = sizes.mean(axis=0) if len(sizes) else np.zeros(2)
    return Preference(
        pairs=len(verdicts),
        unreadable=len(verdicts) - len(readable),
        wins=outcomes.count("first"),
        ties=outcomes.count("tie"),
        losses=outcomes.count("second"),
        win_rate=_rate(values, readable_clusters, seed),
        length_controlled=length_controlled(values, length_differences, readable_clusters, seed) if readable else None,
        consistent=_rate(agreements, readable_clusters, seed),
        shown_first=_rate([s for s, _ in shown_first], [c for _, c in shown_first], seed),
        longer=_rate(longer[decided], list(compress(readable_clusters, decided)), seed),
        characters=(float(means[0]), float(means[1])),
    )


def length_controlled(outcomes: ArrayLike, differences: ArrayLike, clusters: Clusters, seed: int = 0) -> Estimate:
    """Win rate of two answers of one length (Dubois et al. 2024, arXiv 2404.04475, without instruction difficulty).

    Logistic regression of outcomes [P] (1, 0.5, 0) on tanh((difference of lengths) / (its standard deviation)); the
    rate is the sigmoid of the constant. The interval refits on resampled clusters: the error of the fit is in it, which
    an error of predicted preferences leaves out. On neither side is it narrower than that of the raw rate, for refits
    miss what a sample near 0 or 1 did not show. Where all outcomes or all lengths are the same, length explains nothing
    and the raw rate is returned. Below `MIN_RESAMPLED_CLUSTERS` clusters only 0 and 1 bound it.
    """
    y, d = np.asarray(outcomes, dtype=np.float64), np.asarray(differences, dtype=np.float64)
    if len(y) != len(d) or len(y) == 0:
        raise ValueError(f"{len(y)} outcomes and {len(d)} differences of length")
    # equal lengths cannot be standardized, and equal outcomes would leave the rate to the ridge penalty
    if np.ptp(y) == 0 or np.ptp(d) == 0:
        return score_interval(y, clusters, seed=seed)
    # tanh: an extreme difference of length must not dominate the fit
    x = np.tanh(d / d.std(ddof=1))
    cluster_index = np.arange(len(y))
    if clusters is not None:
        cluster_index = np.unique([str(c) for c in clusters], return_inverse=True)[1]
    c = int(cluster_index.max()) + 1
    rate = float(_sigmoid(fit_logistic(x, y, np.ones((1, len(y))))[0, 0]))
    if c < MIN_RESAMPLED_CLUSTERS:
        return Estimate(mean=rate, low=0.0, high=1.0, examples=len(y), clusters=c, method="unbounded")
    rng, rates = np.random.default_rng(seed), []
    for rows in batch_sizes(REFITS, len(y), 1_000_000):
        # counts per cluster as weights: all fits of a slice run as one batch
        cluster_counts = rng.multinomial(c, np.full(c, 1.0 / c), size=rows)
        rates.append(_sigmoid(fit_logistic(x, y, cluster_counts[:, cluster_index].astype(np.float64))[:, 0]))
    low, high = expanded_percentiles(np.concatenate(rates), c)
    raw = score_interval(y, clusters)
    low, high = min(low, max(0.0, rate - (raw.mean - raw.low))), max(high, min(1.0, rate + (raw.high - raw.mean)))
    return Estimate(mean=rate, low=low, high=high, examples=len(y), clusters=c, method="refitted cluster bootstrap")


def fit_logistic(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Constant and slope [B, 2] of a logistic regression of y [P] on x [P], for each row of weights [B, P].

    The minimum of sum w (log(1 + e^z) - y z) + RIDGE / 2 (a^2 + b^2), z = a + b x, by Newton's method.
    """
    coefficients = np.zeros((len(weights), 2))
    for _ in range(MAX_NEWTON_STEPS):
        p = _sigmoid(coefficients[:, :1] + coefficients[:, 1:] * x)
        residuals, v = weights * (p - y), weights * p * (1.0 - p)
        g0, g1 = residuals.sum(axis=1) + RIDGE * coefficients[:, 0], residuals @ x + RIDGE * coefficients[:, 1]
        h00, h01, h11 = v.sum(axis=1) + RIDGE, v @ x, v @ x**2 + RIDGE
        step = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0], axis=1) / (h00 * h11 - h01**2)[:, None]
        size = np.abs(step).max(axis=1, keepdims=True)
        coefficients -= step * np.minimum(1.0, MAX_STEP_SIZE / np.maximum(size, 1e-300))
        # all fits of the batch have converged
        if size.max() < 1e-10:
            break
    return coefficients


def win_share(answer: str, opponents: Sequence[str], outcomes: Mapping[tuple[str, str], Outcome | None]) -> float:
    """Share of the comparisons with `opponents` that an answer wins, from 0 to 1; a tie counts half.

    With all other answers as opponents it is MaxWins (Jiang et al. 2023), divided by the number of comparisons.
    `outcomes` holds each pair of answers in one order; None, an unreadable verdict, is won by neither. An equal answer
    ties. Without opponents the share is 0. An answer that beats one, ties with one and loses to one has 0.5.
    """
    values = [0.5 if other == answer else _value(answer, other, outcomes) for other in opponents]
    return sum(values) / len(values) if values else 0.0


def _value(answer: str, other: str, outcomes: Mapping[tuple[str, str], Outcome | None]) -> float:
    if (answer, other) in outcomes:
        outcome = outcomes[answer, other]
        return 0.0 if outcome is None else OUTCOME_VALUES[outcome]
    outcome = outcomes[other, answer]
    return 0.0 if outcome is None else 1.0 - OUTCOME_VALUES[outcome]


def check_judge(
    verdicts: Sequence[PairVerdicts], people: Sequence[Sequence[Label]], clusters: Sequence[str], min_kappa: float
) -> JudgeAgreement:
    """Check a judge: it is trusted if the lower end of its kappa with the majority of people reaches `min_kappa`."""
    majorities = [majority(labels) for labels in people]
    usable = [i for i, m in enumerate(majorities) if m is not None and verdicts[i].outcome is not None]
    undecided = sum(m is None for m in majorities)
    counts = {"unreadable": sum(v.outcome is None for v in verdicts), "undecided": undecided, "pairs": len(usable)}
    if not usable:
        summary = "none of the labelled pairs has both a majority and a verdict"
        return JudgeAgreement(trusted=False, reason=summary, **counts, kappa=None, agreement=None, people=None)
    label_pairs = [(verdicts[i].outcome, majorities[i]) for i in usable]
    usable_clusters = [clusters[i] for i in usable]
    kappa = cohen_kappa([a for a, _ in label_pairs], [b for _, b in label_pairs], usable_clusters)
    several_raters = max(len([x for x in labels if x is not None]) for labels in people) > 1
    padded = list(zip(*zip_longest(*people), strict=True))
    alpha = krippendorff_alpha(padded, clusters) if several_raters else None
    # the lower end, so that a few labels cannot make a judge trusted by luck
    trusted = kappa.low >= min_kappa
    reason = f"kappa with people {kappa.mean:.2f} [{kappa.low:.2f}, {kappa.high:.2f}] on {len(usable)} labelled pairs"
    reason += "" if trusted else f": its lower end does not reach {min_kappa:g}"
    agreement = percent_agreement(label_pairs, usable_clusters)
    return JudgeAgreement(trusted=trusted, reason=reason, **counts, kappa=kappa, agreement=agreement, people=alpha)


def majority(labels: Sequence[Label]) -> Label:
    """The label of more than half of the raters with a label; None if there is none."""
    existing = [label for label in labels if label is not None]
    return next((label for label in existing if 2 * existing.count(label) > len(existing)), None)


def _prefers_shown_first(verdicts: PairVerdicts) -> list[float]:
    """1 for each verdict for the answer shown first, 0 for each verdict for the other."""
    answers_in_front = ((verdicts.first_shown_first, "first"), (verdicts.second_shown_first, "second"))
    return [float(verdict == first) for verdict, first in answers_in_front if verdict not in (None, "tie")]


def _rate(values: ArrayLike, clusters: Sequence[str], seed: int) -> Estimate | None:
    shares = np.asarray(values, dtype=np.float64)
    return score_interval(shares, clusters, seed=seed) if len(shares) else None


def _sigmoid(z: Floats) -> NDArray[np.float64]:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * z)))
