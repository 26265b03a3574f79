"""What verdicts on pairs of answers add up to: how often the first is preferred, and what the judge goes by.

A judge sees each pair in both orders. It prefers an answer when it does so in both; where the orders disagree the pair
is a tie (Zheng et al. 2023, section 3.4). What could not be read is counted and never scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rung.scoring.agreement import Label, cohen_kappa, krippendorff_alpha, percent_agreement
from rung.scoring.significance import Floats
from rung.scoring.stats import Clusters, Interval, expanded_percentiles, score_interval

Outcome = Literal["first", "second", "tie"]
OUTCOMES: tuple[Outcome, ...] = ("first", "second", "tie")
VALUE = {"first": 1.0, "tie": 0.5, "second": 0.0}
REFITS = 2_000
"""Resamples on which the regression on length is fitted anew."""
RIDGE = 0.01
"""Half of it times the squared coefficients keeps the fit finite where all verdicts go one way."""
STEPS = 60
LONGEST_STEP = 2.0
"""Of Newton's method, in units of log-odds: a longer one overshoots where almost all verdicts go one way."""


@dataclass(frozen=True, slots=True)
class PairVerdicts:
    """What a judge said of one pair, each with the answers named as given and not as shown; None: unreadable."""

    first_shown_first: Outcome | None
    second_shown_first: Outcome | None

    @property
    def outcome(self) -> Outcome | None:
        """The pair's: a preference that holds in both orders, else a tie; None where one could not be read."""
        a, b = self.first_shown_first, self.second_shown_first
        if a is None or b is None:
            return None
        return a if a == b else "tie"


@dataclass(frozen=True, slots=True)
class Preference:
    """Of all pairs. Shares are None where there is nothing to take them of."""

    pairs: int
    unreadable: int
    """Pairs that one of the orders has no readable verdict on; they are in nothing below."""
    wins: int
    ties: int
    losses: int
    win_rate: Interval | None
    """Share of pairs in which the first answer is preferred, a tie counting half."""
    length_controlled: Interval | None
    """The same were both answers of one length, see `length_controlled`."""
    consistent: Interval | None
    """Share of pairs with the same verdict in both orders."""
    shown_first: Interval | None
    """Share of single verdicts, ties left out, for the answer that was shown first: 0.5 without position bias."""
    longer: Interval | None
    """Share of preferences for the longer answer, of pairs whose lengths differ: 0.5 without a taste for length."""
    characters: tuple[float, float]
    """Mean length of the first answers and of the second."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return _plain_values(self)


@dataclass(frozen=True, slots=True)
class JudgeAgreement:
    """Whether a judge was checked against people, and what that showed."""

    trusted: bool
    reason: str
    pairs: int = 0
    """Labelled pairs with a majority and a readable verdict."""
    unreadable: int = 0
    undecided: int = 0
    """Pairs whose people have no majority; left out."""
    kappa: Interval | None = None
    """Cohen's, of the judge and the majority of people."""
    agreement: Interval | None = None
    """Share of pairs on which they say the same."""
    people: Interval | None = None
    """Krippendorff's alpha among the people: what a judge can hardly surpass. None with one label a pair."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return _plain_values(self)


def summarize_preferences(
    verdicts: Sequence[PairVerdicts], lengths: ArrayLike, clusters: Sequence[str], seed: int = 0
) -> Preference:
    """Sum up verdicts on pairs whose answers have `lengths` [P, 2] in characters."""
    sizes = np.asarray(lengths, dtype=np.float64).reshape(-1, 2)
    read = [i for i, v in enumerate(verdicts) if v.outcome is not None]
    outcomes = [v.outcome for v in verdicts if v.outcome is not None]
    own = [clusters[i] for i in read]
    values = np.array([VALUE[outcome] for outcome in outcomes])
    apart = sizes[read, 0] - sizes[read, 1]
    decided = (values != 0.5) & (apart != 0)
    shown = [(s, c) for i, c in zip(read, own, strict=True) for s in _prefers_shown_first(verdicts[i])]
    same = [float(verdicts[i].first_shown_first == verdicts[i].second_shown_first) for i in read]
    means = sizes.mean(axis=0) if len(sizes) else np.zeros(2)
    return Preference(
        pairs=len(verdicts),
        unreadable=len(verdicts) - len(read),
        wins=outcomes.count("first"),
        ties=outcomes.count("tie"),
        losses=outcomes.count("second"),
        win_rate=_rate(values, own, seed),
        length_controlled=length_controlled(values, apart, own, seed) if read else None,
        consistent=_rate(same, own, seed),
        shown_first=_rate([s for s, _ in shown], [c for _, c in shown], seed),
        longer=_rate(
            ((apart > 0) == (values == 1.0))[decided].astype(np.float64),
            [c for c, kept in zip(own, decided.tolist(), strict=True) if kept],
            seed,
        ),
        characters=(float(means[0]), float(means[1])),
    )


def length_controlled(outcomes: ArrayLike, apart: ArrayLike, clusters: Clusters, seed: int = 0) -> Interval:
    """Win rate of two answers of one length (Dubois et al. 2024, arXiv 2404.04475, without instruction difficulty).

    Logistic regression of outcomes [P] (1, 0.5, 0) on tanh((difference of lengths) / (its standard deviation)); the
    rate is the sigmoid of the constant. The interval refits on resampled clusters: the error of the fit is in it, which
    an error of predicted preferences leaves out. Where all outcomes or all lengths are the same, length explains
    nothing and the raw rate is returned.
    """
    y, d = np.asarray(outcomes, dtype=np.float64), np.asarray(apart, dtype=np.float64)
    if len(y) != len(d) or len(y) == 0:
        raise ValueError(f"{len(y)} outcomes and {len(d)} differences of length")
    if np.ptp(y) == 0 or np.ptp(d) == 0:
        return score_interval(y, clusters, binary=bool(np.isin(y, (0.0, 1.0)).all()), seed=seed)
    x = np.tanh(d / d.std(ddof=1))
    at = np.arange(len(y)) if clusters is None else np.unique([str(c) for c in clusters], return_inverse=True)[1]
    c = int(at.max()) + 1
    rng, rates = np.random.default_rng(seed), []
    rows = max(1, 1_000_000 // len(y))
    for start in range(0, REFITS, rows):
        drawn = rng.multinomial(c, np.full(c, 1.0 / c), size=min(rows, REFITS - start))
        rates.append(_sigmoid(fit_logistic(x, y, drawn[:, at].astype(np.float64))[:, 0]))
    rate = float(_sigmoid(fit_logistic(x, y, np.ones((1, len(y))))[0, 0]))
    low, high = expanded_percentiles(np.concatenate(rates), c) if c > 1 else (0.0, 1.0)
    return Interval(rate, low, high, len(y), c, "refitted cluster bootstrap")


def fit_logistic(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Constant and slope [B, 2] of a logistic regression of y [P] on x [P], for each row of weights [B, P].

    The minimum of sum w (log(1 + e^z) - y z) + RIDGE / 2 (a^2 + b^2), z = a + b x, by Newton's method.
    """
    found = np.zeros((len(weights), 2))
    for _ in range(STEPS):
        p = _sigmoid(found[:, :1] + found[:, 1:] * x)
        off, v = weights * (p - y), weights * p * (1.0 - p)
        g0, g1 = off.sum(axis=1) + RIDGE * found[:, 0], off @ x + RIDGE * found[:, 1]
        h00, h01, h11 = v.sum(axis=1) + RIDGE, v @ x, v @ x**2 + RIDGE
        step = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0], axis=1) / (h00 * h11 - h01**2)[:, None]
        size = np.abs(step).max(axis=1, keepdims=True)
        found -= step * np.minimum(1.0, LONGEST_STEP / np.maximum(size, 1e-300))
        if size.max() < 1e-10:
            break
    return found


def check_judge(
    verdicts: Sequence[PairVerdicts], people: Sequence[Sequence[Label]], clusters: Sequence[str], least: float
) -> JudgeAgreement:
    """Whether a judge agrees with people: the lower end of its kappa with their majority reaches `least`."""
    majorities = [majority(labels) for labels in people]
    kept = [i for i, m in enumerate(majorities) if m is not None and verdicts[i].outcome is not None]
    undecided = sum(m is None for m in majorities)
    unreadable = sum(v.outcome is None for v in verdicts)
    if not kept:
        return JudgeAgreement(
            False, "none of the labelled pairs has both a majority and a verdict", 0, unreadable, undecided
        )
    both = [(verdicts[i].outcome, majorities[i]) for i in kept]
    own = [clusters[i] for i in kept]
    kappa = cohen_kappa([a for a, _ in both], [b for _, b in both], own)
    several = max(len([x for x in labels if x is not None]) for labels in people) > 1
    width = max(map(len, people))
    padded = [[*labels, *[None] * (width - len(labels))] for labels in people]
    alone = krippendorff_alpha(padded, clusters) if several else None
    trusted = kappa.low >= least
    reason = f"kappa with people {kappa.mean:.2f} [{kappa.low:.2f}, {kappa.high:.2f}] on {len(kept)} labelled pairs"
    reason += "" if trusted else f": its lower end does not reach {least:g}"
    return JudgeAgreement(trusted, reason, len(kept), unreadable, undecided, kappa, percent_agreement(both, own), alone)


def majority(labels: Sequence[Label]) -> Label:
    """What more than half of those who said something said; None where there is no such label."""
    given = [label for label in labels if label is not None]
    return next((label for label in given if 2 * given.count(label) > len(given)), None)


def _prefers_shown_first(verdicts: PairVerdicts) -> list[float]:
    """1 for each verdict for the answer shown first, 0 for each for the other."""
    found = []
    for verdict, leading in ((verdicts.first_shown_first, "first"), (verdicts.second_shown_first, "second")):
        if verdict is not None and verdict != "tie":
            found.append(float(verdict == leading))
    return found


def _rate(values: ArrayLike, clusters: Sequence[str], seed: int) -> Interval | None:
    shares = np.asarray(values, dtype=np.float64)
    if not len(shares):
        return None
    return score_interval(shares, clusters, binary=bool(np.isin(shares, (0.0, 1.0)).all()), seed=seed)


def _sigmoid(z: Floats) -> NDArray[np.float64]:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * z)))


def _plain_values(found: Preference | JudgeAgreement) -> dict[str, Any]:
    own = {field.name: getattr(found, field.name) for field in fields(found)}
    return {name: value.to_json() if isinstance(value, Interval) else value for name, value in own.items()}
