"""Which rung of a measured ladder is enough, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # type: ignore[import-untyped,unused-ignore]

from rung.scoring.significance import Floats, holm
from rung.scoring.stats import (
    ALPHA,
    Clusters,
    Difference,
    Interval,
    Z,
    clustered_error,
    detectable_difference,
    examples_needed,
    is_binary,
    paired_difference,
    score_interval,
    sign_flip_p_value,
)

Reason = Literal["best", "reaches target", "within margin", "worse", "cannot tell"]
Estimate = TypeVar("Estimate", Interval, Difference)


@dataclass(frozen=True, slots=True)
class RungVerdict:
    """One rung against the best one."""

    name: str
    score: Interval
    difference: Difference
    """This rung minus the best, in points of the metric; all zeros for the best itself."""
    reason: Reason
    examples_needed: int | None
    """About how many test items would tell, where this test set cannot; None when it can or no number would."""

    @property
    def enough(self) -> bool:
        """Whether this rung may be stopped at."""
        return self.reason not in ("worse", "cannot tell")


@dataclass(frozen=True, slots=True)
class LadderStep:
    """One rung against the one below it."""

    lower: str
    upper: str
    difference: Difference
    """Upper minus lower, in points of the metric, with the p-value of this test alone."""
    p_holm: float
    """The p-value corrected for all steps of the ladder (Holm 1979)."""
    detectable: float | None
    """The smallest true difference that these items would show with 80 % power; None where nothing is known of it."""

    @property
    def differs(self) -> bool:
        """Whether the two surely differ, however many steps were tested."""
        return self.p_holm <= ALPHA

    def to_json(self) -> dict[str, Any]:
        """Plain objects."""
        return {**asdict(self), "difference": self.difference.to_json(), "differs": self.differs}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the ladder says."""

    recommended: str | None
    """The lowest rung that is enough; None when a rung below it cannot be told either way."""
    safe: str | None
    """The lowest rung that is enough, whether or not a lower one might be too."""
    best: str
    rungs: tuple[RungVerdict, ...]
    examples_needed: int | None
    text: str
    steps: tuple[LadderStep, ...] = ()
    """Each rung against the one below it, lowest first."""

    def to_json(self) -> dict[str, Any]:
        """Plain objects, for `climb --json`."""
        rungs = [
            {**asdict(r), "score": r.score.to_json(), "difference": r.difference.to_json(), "enough": r.enough}
            for r in self.rungs
        ]
        return {**asdict(self), "rungs": rungs, "steps": [step.to_json() for step in self.steps]}


@dataclass(frozen=True, slots=True)
class _MeasuredRung:
    name: str
    items: Floats
    """Score of each item, mean over the training seeds."""
    seed_variance: float
    """Variance of the mean score that comes from the training seeds: s^2 / S over the S seeds' own means."""
    seeds: int
    score: Interval


def recommend(
    rungs: Sequence[tuple[str, ArrayLike]],
    margin: float,
    target: float | None = None,
    *,
    clusters: Clusters = None,
    weights: ArrayLike | None = None,
    in_nats: bool = False,
    seed: int = 0,
) -> Verdict:
    """Judge a ladder, lowest rung first; each rung is (name, scores [items] or [training seeds, items]).

    A rung is enough when the interval of its paired difference to the best rung excludes being worse by more than
    `margin`, or when the *lower end* of its score's interval reaches `target`: a point score that reaches it by luck is
    not enough. It is worse when that interval lies wholly beyond the margin; else the test set cannot tell. The best is
    the best mean on these same items, the lower rung on a tie. Intervals are 95 % each, not corrected for many rungs;
    the p-values of the steps are, and where a step shows no difference the text says how large a one would have shown.

    Several training seeds add the variance between their means (see `_widened`). For perplexity pass nats per token,
    token counts as `weights`, `in_nats` (lower is then better, and the text speaks of perplexity), the logarithm of
    the target, and a margin in nats.
    """
    if not rungs or margin < 0:
        raise ValueError("a verdict needs at least one rung and a margin of at least 0")
    sign = -1.0 if in_nats else 1.0
    measured = [_measure(name, scores, clusters, weights, seed) for name, scores in rungs]
    best = max(measured, key=lambda m: sign * m.score.mean)
    judged = []
    for rung in measured:
        difference = paired_difference(best.items, rung.items, clusters, seed, weights=weights)
        if rung is best:
            difference = replace(difference, low=0.0, high=0.0, method="identity", p_value=None)
        else:
            difference = _with_seed_variance(difference, best, rung)
        reason = _reason(rung.score, difference, rung is best, sign, margin, target)
        needed = None
        if reason == "cannot tell":
            gain = sign * (rung.items - best.items)
            noise = rung.seed_variance + best.seed_variance
            needed = examples_needed(gain, margin, clusters, weights=weights, seed_variance=noise)
            needed = needed and _rounded_up(max(needed, len(gain) + 1))
        judged.append(RungVerdict(rung.name, rung.score, difference, reason, needed))
    found = _conclude(tuple(judged), best.name, margin, target, in_nats)
    steps = _steps(measured, clusters, weights, seed)
    return replace(found, steps=steps, text=f"{found.text}{_steps_without_difference(steps, in_nats)}")


def rung_score(
    table: ArrayLike, clusters: Clusters = None, *, weights: ArrayLike | None = None, seed: int = 0
) -> Interval:
    """Score of one rung from [items] or [training seeds, items], the spread between seeds included."""
    return _measure("", table, clusters, weights, seed).score


def paired_gain(
    lower: ArrayLike,
    upper: ArrayLike,
    clusters: Clusters = None,
    *,
    weights: ArrayLike | None = None,
    seed: int = 0,
) -> Difference:
    """Paired difference of two rungs, upper minus lower, the spread between training seeds included, with its p-value.

    The p-value is that of sign flips over clusters; with several training seeds that of Welch's t, whose error has the
    seeds' variance beside the clustered one.
    """
    first, second = (_measure("", table, clusters, weights, seed) for table in (lower, upper))
    return _gain(first, second, clusters, weights, seed)


def _gain(
    first: _MeasuredRung, second: _MeasuredRung, clusters: Clusters, weights: ArrayLike | None, seed: int
) -> Difference:
    found = paired_difference(first.items, second.items, clusters, seed, weights=weights)
    noise = first.seed_variance + second.seed_variance
    if noise == 0.0:
        p = sign_flip_p_value(first.items, second.items, clusters, weights=weights, seed=seed)
    else:
        total = clustered_error(second.items - first.items, clusters, weights=weights) ** 2 + noise
        p = 2 * float(special.stdtr(_degrees_of_freedom(total, first, second), -abs(found.mean) / math.sqrt(total)))
    return replace(_with_seed_variance(found, first, second), p_value=p)


def _steps(
    measured: Sequence[_MeasuredRung], clusters: Clusters, weights: ArrayLike | None, seed: int
) -> tuple[LadderStep, ...]:
    pairs = list(zip(measured, measured[1:], strict=False))
    gains = [_gain(first, second, clusters, weights, seed) for first, second in pairs]
    corrected = holm([gain.p_value for gain in gains if gain.p_value is not None])
    return tuple(
        LadderStep(first.name, second.name, gain, p, _detectable(first, second, clusters, weights))
        for (first, second), gain, p in zip(pairs, gains, corrected, strict=True)
    )


def _detectable(
    first: _MeasuredRung, second: _MeasuredRung, clusters: Clusters, weights: ArrayLike | None
) -> float | None:
    noise = first.seed_variance + second.seed_variance
    return detectable_difference(second.items - first.items, clusters, weights=weights, seed_variance=noise)


def _steps_without_difference(steps: Sequence[LadderStep], in_nats: bool) -> str:
    """The steps that show no difference, each with what these items would have shown."""
    told = []
    for step in steps:
        if not step.differs:
            least = step.detectable
            size = "unknown" if least is None else f"{math.expm1(least):.1%}" if in_nats else f"{least:.2g}"
            told.append(f"{step.upper} and {step.lower} (p = {step.p_holm:.2g}, smallest that would show: {size})")
    return f" No sure difference between {'; between '.join(told)}." if told else ""


def _measure(name: str, scores: ArrayLike, clusters: Clusters, weights: ArrayLike | None, seed: int) -> _MeasuredRung:
    table = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    seeds, items = len(table), table.mean(axis=0)
    means = np.average(table, axis=1, weights=None if weights is None else np.asarray(weights, dtype=np.float64))
    variance = float(means.var(ddof=1)) / seeds if seeds > 1 else 0.0
    score = score_interval(items, clusters, binary=is_binary(items), weights=weights, seed=seed)
    measured = _MeasuredRung(name, items, variance, seeds, score)
    return replace(measured, score=_with_seed_variance(score, measured))


def _with_seed_variance(estimate: Estimate, *sources: _MeasuredRung) -> Estimate:
    """Add the variance between training seeds to an interval over items.

    half' = t_f / z * sqrt(half^2 + z^2 v), v the sum of s^2 / S over the sources, and f the Welch-Satterthwaite degrees
    of freedom (half / z)^2 + v squared over sum (s^2 / S)^2 / (S - 1): two seeds that agree widen little, two that
    do not widen a lot.
    """
    noise = sum(m.seed_variance for m in sources)
    if noise == 0.0 or not math.isfinite(estimate.high - estimate.low):
        return estimate
    total = ((estimate.high - estimate.low) / 2 / Z) ** 2 + noise
    stretch = float(special.stdtrit(_degrees_of_freedom(total, *sources), 1 - ALPHA / 2)) / Z
    below, above = (
        stretch * math.hypot(side, Z * math.sqrt(noise))
        for side in (estimate.mean - estimate.low, estimate.high - estimate.mean)
    )
    method = f"{estimate.method} and training seeds"
    return replace(estimate, low=estimate.mean - below, high=estimate.mean + above, method=method)


def _degrees_of_freedom(total: float, *sources: _MeasuredRung) -> float:
    """Degrees of freedom of a variance part of which is that between seeds (Welch and Satterthwaite)."""
    return total**2 / sum(m.seed_variance**2 / (m.seeds - 1) for m in sources if m.seed_variance)


def _reason(
    score: Interval, difference: Difference, is_best: bool, sign: float, margin: float, target: float | None
) -> Reason:
    surely = score.low if sign > 0 else -score.high
    worst, kindest = sorted((sign * difference.low, sign * difference.high))
    if target is not None and surely >= sign * target:
        return "reaches target"
    if is_best:
        return "best"
    if worst >= -margin:
        return "within margin"
    return "worse" if kindest < -margin else "cannot tell"


def _conclude(rungs: tuple[RungVerdict, ...], best: str, margin: float, target: float | None, in_nats: bool) -> Verdict:
    by = f"{math.expm1(margin):.0%}" if in_nats else f"{margin:g}"
    goal = None if target is None else f"{math.exp(target) if in_nats else target:g}"

    def shown(score: Interval) -> str:
        mean, low, high = (math.exp(x) if in_nats else x for x in (score.mean, score.low, score.high))
        return f"{mean:.3f} [{low:.3f}, {high:.3f}], {score.examples} examples, {score.clusters} clusters"

    if all(r.score.mean == 0.0 for r in rungs) and not any(r.reason == "reaches target" for r in rungs):
        text = f"No rung scores at all: {shown(rungs[0].score)}. Look at the answers before climbing higher."
        return Verdict(None, None, best, rungs, None, text)
    height = next(i for i, r in enumerate(rungs) if r.enough)  # the best rung always is
    safe, undecided = rungs[height], [r for r in rungs[:height] if r.reason == "cannot tell"]
    why = {
        "best": "no rung scores higher" + (f" and every lower one is worse by more than {by}" if height else ""),
        "reaches target": f"its interval lies at or beyond the target {goal}",
        "within margin": f"it is not worse than {best} by more than {by}",
    }
    needed = max((r.examples_needed or 0 for r in undecided), default=0) or None
    if not undecided:
        text = f"{safe.name} is enough: {shown(safe.score)}; {why[safe.reason]}."
    else:
        names = " and ".join(r.name for r in undecided)
        more = "more examples alone will not do, it takes more training seeds or another margin"
        if needed:
            more = f"needs about {needed} examples (has {safe.score.examples})"
        text = f"Cannot tell whether {names} would be enough: {more}. {safe.name} is safe: {shown(safe.score)}."
    if target is not None and not any(r.reason == "reaches target" for r in rungs):
        text += f" No rung is sure to reach the target {goal}."
    return Verdict(None if undecided else safe.name, safe.name, best, rungs, needed, text)


def _rounded_up(n: int) -> int:
    """Two significant digits: the estimate is no better than that."""
    unit = int(10 ** max(0, math.floor(math.log10(n)) - 1))
    return -(-n // unit) * unit
