"""Recommendation: which rung of a measured ladder is enough, in numbers and in words.

The rule is non-inferiority with a margin, not significance (decision 0004): a test set that is too small gives "cannot
tell" with the number of examples needed, never a recommendation. The cost is that small test sets rarely recommend the
lowest rung. Pure functions of per-item scores; `commands.climb_results` calls `recommend`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize  # type: ignore[import-untyped,unused-ignore]

from rung.results.base import Estimate
from rung.results.ladder import LadderStep, RungVerdict, Verdict
from rung.scoring import stats
from rung.scoring.intervals import ALPHA, t_quantile
from rung.scoring.significance import Floats, holm
from rung.scoring.stats import Clusters, Weights

Reason = Literal["best", "reaches target", "within margin", "worse", "cannot tell"]

MIN_LOG_P = math.log(1e-12)
"""Smallest p-value with training seeds: quantiles beyond it are not computed."""


@dataclass(frozen=True, slots=True)
class _MeasuredRung:
    name: str
    items: Floats
    """Score of each item, mean over the training seeds."""
    seed_variance: float
    """Variance of the mean score that comes from the training seeds: s^2 / S over the S seeds' own means."""
    seeds: int
    score: Estimate


def recommend(
    rungs: Sequence[tuple[str, ArrayLike]],
    margin: float,
    target: float | None = None,
    *,
    clusters: Clusters = None,
    weights: Weights = None,
    in_nats: bool = False,
    seed: int = 0,
) -> Verdict:
    """Judge a ladder, lowest rung first; each rung is (name, scores [items] or [training seeds, items]).

    A rung is enough when the interval of its paired difference to the best rung excludes being worse by more than
    `margin`, or when the *lower end* of its score's interval reaches `target`: a point score that reaches it by luck is
    not enough. It is worse when that interval lies completely beyond the margin; else the test set cannot tell. The
    best rung has the best mean on these items, the lower rung on a tie. Intervals are 95 % each, not corrected for
    several rungs; p-values of the steps are corrected, and for a step without a difference the text has the detectable
    one.

    Several training seeds add the variance between their means (see `_with_seed_variance`). For perplexity pass nats
    per token, token counts as `weights`, `in_nats` (lower is then better, and the text has perplexities), the logarithm
    of the target, and a margin in nats.
    """
    if not rungs or margin < 0:
        raise ValueError("a verdict needs at least one rung and a margin of at least 0")
    # nats are better when lower
    sign = -1.0 if in_nats else 1.0
    measured_rungs = [_measure(name, scores, clusters, weights, in_nats=in_nats) for name, scores in rungs]
    # max returns the first of equal means: the lower rung
    best = max(measured_rungs, key=lambda m: sign * m.score.mean)
    rung_verdicts = []
    for rung in measured_rungs:
        difference = stats.paired_difference(
            best.items, rung.items, clusters, seed, weights=weights, bounded=_is_bounded(in_nats)
        )
        if rung is best:
            # the best minus itself is exactly zero: no bound for small samples applies
            difference = difference.replace(low=0.0, high=0.0, method="identity", p_value=None)
        else:
            difference = _with_seed_variance(difference, best, rung)
        reason = _reason(rung.score, difference, rung is best, sign, margin, target)
        item_count = None
        if reason == "cannot tell":
            gain = sign * (rung.items - best.items)
            seed_variance = rung.seed_variance + best.seed_variance
            item_count = stats.examples_needed(
                gain, margin, clusters, weights=weights, seed_variance=seed_variance, bounded=_is_bounded(in_nats)
            )
            # more than there are: this many were not enough
            item_count = item_count and _round_up(max(item_count, len(gain) + 1))
        enough = reason not in ("worse", "cannot tell")
        fields = {"difference": difference, "reason": reason, "enough": enough, "examples_needed": item_count}
        rung_verdicts.append(RungVerdict(name=rung.name, score=rung.score, **fields))
    verdict = _conclude(tuple(rung_verdicts), best.name, margin, target, in_nats)
    steps = _steps(measured_rungs, clusters, weights, seed, in_nats=in_nats)
    return verdict.replace(steps=steps, text=f"{verdict.text}{_steps_without_difference(steps, in_nats)}")


def rung_score(
    table: ArrayLike, clusters: Clusters = None, *, weights: Weights = None, seed: int = 0, in_nats: bool = False
) -> Estimate:
    """Score of one rung from [items] or [training seeds, items], with the variance between seeds.

    `seed` is without effect: nothing is drawn.
    """
    return _measure("", table, clusters, weights, in_nats=in_nats).score


def paired_gain(
    lower: ArrayLike,
    upper: ArrayLike,
    clusters: Clusters = None,
    *,
    weights: Weights = None,
    seed: int = 0,
    in_nats: bool = False,
) -> Estimate:
    """Paired difference of two rungs, upper minus lower, the spread between training seeds included, with its p-value.

    The p-value is that of sign flips over clusters; with several training seeds the level at which the interval with
    their spread reaches zero, if that is larger.
    """
    first, second = (_measure("", table, clusters, weights, in_nats=in_nats) for table in (lower, upper))
    return _gain(first, second, clusters, weights, seed, in_nats=in_nats)


def _gain(
    first: _MeasuredRung, second: _MeasuredRung, clusters: Clusters, weights: Weights, seed: int, *, in_nats: bool
) -> Estimate:
    difference = stats.paired_difference(
        first.items, second.items, clusters, seed, weights=weights, bounded=_is_bounded(in_nats)
    )
    # exact where possible
    p = stats.sign_flip_p_value(first.items, second.items, clusters, weights=weights, seed=seed)
    # flipping signs cannot represent the variance between seeds, which makes no difference surer
    if first.seed_variance + second.seed_variance > 0.0:
        p = max(p, _p_value_with_seeds(first, second, clusters, weights))
    return _with_seed_variance(difference, first, second).replace(p_value=p)


def _p_value_with_seeds(first: _MeasuredRung, second: _MeasuredRung, clusters: Clusters, weights: Weights) -> float:
    """The level at which the interval of `_with_seed_variance`, with Student's t for the items, just reaches zero."""
    gain = second.items - first.items
    mean = float(np.average(gain, weights=None if weights is None else np.asarray(weights, dtype=np.float64)))
    c = len(stats.cluster_sums(clusters, gain)[0])
    of_items = stats.clustered_error(gain, clusters, weights=weights) ** 2 * c / max(1, c - 1)
    of_seeds, df = _seed_variance(first, second)

    def excess(log_level: float) -> float:
        tail = 1 - math.exp(log_level) / 2
        half = math.hypot(
            float(t_quantile(max(1, c - 1), tail)) * math.sqrt(of_items),
            float(t_quantile(df, tail)) * math.sqrt(of_seeds),
        )
        return half - abs(mean)

    # the interval at this level is still too short: as good as zero
    if excess(MIN_LOG_P) < 0:
        return math.exp(MIN_LOG_P)
    return 1.0 if mean == 0.0 else math.exp(float(optimize.brentq(excess, MIN_LOG_P, 0.0)))


def _is_bounded(in_nats: bool) -> bool | None:
    # nats within 0 and 1 are no shares; other scores show by themselves whether they are
    return False if in_nats else None


def _steps(
    rungs: Sequence[_MeasuredRung], clusters: Clusters, weights: Weights, seed: int, *, in_nats: bool
) -> tuple[LadderStep, ...]:
    pairs = list(pairwise(rungs))
    gains = [_gain(first, second, clusters, weights, seed, in_nats=in_nats) for first, second in pairs]
    corrected = holm([gain.p_value for gain in gains if gain.p_value is not None])
    steps = []
    for (first, second), gain, p in zip(pairs, gains, corrected, strict=True):
        variance, df = _seed_variance(first, second)
        detectable = stats.detectable_difference(
            second.items - first.items,
            clusters,
            weights=weights,
            seed_variance=variance,
            seed_degrees_of_freedom=df,
            tests=len(pairs),
            bounded=_is_bounded(in_nats),
        )
        fields = {"difference": gain, "p_holm": p, "differs": p <= ALPHA, "detectable": detectable}
        steps.append(LadderStep(lower=first.name, upper=second.name, **fields))
    return tuple(steps)


def _steps_without_difference(steps: Sequence[LadderStep], in_nats: bool) -> str:
    """The steps without a significant difference, each with the smallest difference that would be detected."""
    descriptions = []
    for step in steps:
        if not step.differs:
            size = "unknown"
            if step.detectable is not None:
                size = f"{math.expm1(step.detectable):.1%}" if in_nats else f"{step.detectable:.2g}"
            facts = f"p = {step.p_holm:.2g}, smallest that would show: {size}"
            descriptions.append(f"{step.upper} and {step.lower} ({facts})")
    return f" No sure difference between {'; between '.join(descriptions)}." if descriptions else ""


def _measure(
    name: str, scores: ArrayLike, clusters: Clusters, weights: Weights, *, in_nats: bool = False
) -> _MeasuredRung:
    table = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    seeds, items = len(table), table.mean(axis=0)
    # weighted as the score itself, or seeds would scatter around another mean
    means = np.average(table, axis=1, weights=None if weights is None else np.asarray(weights, dtype=np.float64))
    variance = float(means.var(ddof=1)) / seeds if seeds > 1 else 0.0
    score = stats.score_interval(items, clusters, weights=weights, bounded=_is_bounded(in_nats))
    rung = _MeasuredRung(name, items, variance, seeds, score)
    return replace(rung, score=_with_seed_variance(score, rung))


def _with_seed_variance(estimate: Estimate, *sources: _MeasuredRung) -> Estimate:
    """Add the variance between training seeds to an interval over items.

    half' = sqrt(half^2 + (t_f sqrt(v))^2), v and f of `_seed_variance`: each part keeps the quantile of its own degrees
    of freedom, which covers at least 0.95 (Banerjee 1960). One t for the sum (Welch and Satterthwaite) covers 0.87 with
    two seeds that scatter three times as much as the items. Two seeds that agree widen little, two that do not a lot.
    """
    variance, df = _seed_variance(*sources)
    # an infinite interval cannot be widened
    if variance == 0.0 or not math.isfinite(estimate.high - estimate.low):
        return estimate
    mean, of_seeds = estimate.mean, float(t_quantile(df)) * math.sqrt(variance)
    # each side on its own: intervals near 0 and 1 are not symmetric
    left, right = (math.hypot(side, of_seeds) for side in (mean - estimate.low, estimate.high - mean))
    return estimate.replace(low=mean - left, high=mean + right, method=f"{estimate.method} and training seeds")


def _seed_variance(*sources: _MeasuredRung) -> tuple[float, float]:
    """Variance that comes from training seeds, and its degrees of freedom: S - 1 of one source, of two by Welch."""
    variance = sum(m.seed_variance for m in sources)
    parts = sum(m.seed_variance**2 / (m.seeds - 1) for m in sources if m.seeds > 1)
    return variance, variance**2 / parts if parts > 0 else math.inf


def _reason(
    score: Estimate, difference: Estimate, is_best: bool, sign: float, margin: float, target: float | None
) -> Reason:
    # the bound on the unfavorable side
    certain_score = score.low if sign > 0 else -score.high
    lower_bound, upper_bound = sorted((sign * difference.low, sign * difference.high))
    if target is not None and certain_score >= sign * target:
        return "reaches target"
    if is_best:
        return "best"
    if lower_bound >= -margin:
        return "within margin"
    return "worse" if upper_bound < -margin else "cannot tell"


def _conclude(rungs: tuple[RungVerdict, ...], best: str, margin: float, target: float | None, in_nats: bool) -> Verdict:
    margin_text = f"{math.expm1(margin):.0%}" if in_nats else f"{margin:g}"
    target_text = None if target is None else f"{math.exp(target) if in_nats else target:g}"

    def score_text(score: Estimate) -> str:
        mean, low, high = (math.exp(x) if in_nats else x for x in (score.mean, score.low, score.high))
        return f"{mean:.3f} [{low:.3f}, {high:.3f}], {score.examples} examples, {score.clusters} clusters"

    if all(r.score.mean == 0.0 for r in rungs) and not any(r.reason == "reaches target" for r in rungs):
        text = f"No rung scores at all: {score_text(rungs[0].score)}. Look at the answers before climbing higher."
        return Verdict(recommended=None, safe=None, best=best, rungs=rungs, examples_needed=None, text=text)
    safe_index = next(i for i, r in enumerate(rungs) if r.enough)  # exists: the best rung is always enough
    safe, undecided = rungs[safe_index], [r for r in rungs[:safe_index] if r.reason == "cannot tell"]
    lower_text = f" and every lower one is worse by more than {margin_text}" if safe_index else ""
    reasons = {
        "best": f"no rung scores higher{lower_text}",
        "reaches target": f"its interval lies at or beyond the target {target_text}",
        "within margin": f"it is not worse than {best} by more than {margin_text}",
    }
    examples_needed = max((r.examples_needed or 0 for r in undecided), default=0) or None
    if not undecided:
        text = f"{safe.name} is enough: {score_text(safe.score)}; {reasons[safe.reason]}."
    else:
        names = " and ".join(r.name for r in undecided)
        remedy = "more examples alone will not do, it takes more training seeds or another margin"
        if examples_needed:
            remedy = f"needs about {examples_needed} examples (has {safe.score.examples})"
        text = f"Cannot tell whether {names} would be enough: {remedy}. {safe.name} is safe: {score_text(safe.score)}."
    if target is not None and not any(r.reason == "reaches target" for r in rungs):
        text += f" No rung is sure to reach the target {target_text}."
    conclusion = {"recommended": None if undecided else safe.name, "safe": safe.name, "best": best}
    return Verdict(**conclusion, rungs=rungs, examples_needed=examples_needed, text=text)


def _round_up(n: int) -> int:
    """Round up to two significant digits: the estimate is not more precise."""
    unit = int(10 ** max(0, math.floor(math.log10(n)) - 1))
    return -(-n // unit) * unit
