"""Scores of classifiers: macro-F1 with its interval, scores of each class, log-loss, calibration, accuracy at coverage.

Pure functions of labels and probabilities, used by `evaluation.choices`. Accuracy is the metric `exact`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rung.results.base import Estimate
from rung.results.evaluation import ClassScore
from rung.scoring.significance import Floats, batch_sizes
from rung.scoring.stats import MIN_RESAMPLED_CLUSTERS, SAMPLES, Clusters, cluster_sums, expanded_percentiles

CALIBRATION_BINS = 15
"""Guo et al. 2017 (arXiv 1706.04599), section 4."""
COVERAGES = (0.5, 0.8, 0.9, 1.0)
"""Shares of the items, the surest first, of which accuracy is reported."""


def class_scores(expected: Sequence[str], answered: Sequence[str]) -> list[ClassScore]:
    """Precision, recall and F1 of each label that is expected or answered, the most frequent expected label first.

    A label that is never answered has precision 0, one that is never expected recall 0 (as scikit-learn's
    `zero_division=0`).
    """
    labels = sorted({*expected, *answered}, key=lambda label: (-list(expected).count(label), label))
    scores = []
    for label in labels:
        right = sum(e == a == label for e, a in zip(expected, answered, strict=True))
        support, predicted = expected.count(label), answered.count(label)
        scores.append(
            ClassScore(
                label=label,
                examples=support,
                precision=right / predicted if predicted else 0.0,
                recall=right / support if support else 0.0,
                f1=2 * right / (support + predicted) if support + predicted else 0.0,
            )
        )
    return scores


def macro_f1(expected: Sequence[str], answered: Sequence[str], clusters: Clusters = None, seed: int = 0) -> Estimate:
    """Mean F1 over the labels that are expected or answered, with an interval of resampled clusters.

    F1 of a label is 2 TP / (support + predicted), which counts add up to, so a replicate is a sum of the counts of its
    clusters. A label that does not occur in a replicate does not count there. Below `MIN_RESAMPLED_CLUSTERS` clusters
    only 0 and 1 bound it.
    """
    labels = sorted({*expected, *answered})
    index = {label: i for i, label in enumerate(labels)}
    n, k = len(expected), len(labels)
    counts = np.zeros((n, 3, k))
    for row, (e, a) in enumerate(zip(expected, answered, strict=True)):
        counts[row, 0, index[e]] += float(e == a)
        counts[row, 1, index[e]] += 1.0
        counts[row, 2, index[a]] += 1.0
    sums = np.stack(cluster_sums(clusters, *counts.reshape(n, 3 * k).T), axis=1)
    c = len(sums)
    value = float(_mean_f1(sums.sum(axis=0)[None], k)[0])
    if c < MIN_RESAMPLED_CLUSTERS:
        return Estimate(mean=value, low=0.0, high=1.0, examples=n, clusters=c, method="unbounded")
    rng = np.random.default_rng(seed)
    parts = []
    for rows in batch_sizes(SAMPLES, max(c, 3 * k)):
        parts.append(_mean_f1(rng.multinomial(c, np.full(c, 1.0 / c), size=rows) @ sums, k))
    low, high = expanded_percentiles(np.concatenate(parts), c)
    bounds = {"low": max(0.0, min(low, value)), "high": min(1.0, max(high, value))}
    return Estimate(mean=value, **bounds, examples=n, clusters=c, method="cluster bootstrap")


def _mean_f1(sums: Floats, k: int) -> Floats:
    """Mean F1 of each row of counts [B, 3 * K]: true positives, support, predictions."""
    right, support, predicted = (sums[:, i * k : (i + 1) * k] for i in range(3))
    total = support + predicted
    f1 = np.divide(2 * right, total, out=np.zeros_like(total), where=total > 0)
    return np.asarray(f1.sum(axis=1) / np.maximum((total > 0).sum(axis=1), 1))


def expected_calibration_error(confidence: ArrayLike, is_right: ArrayLike) -> float:
    """Mean distance of confidence and accuracy over `CALIBRATION_BINS` bins of equal width (Guo et al. 2017, eq. 3)."""
    p, right = np.asarray(confidence, dtype=np.float64), np.asarray(is_right, dtype=np.float64)
    bins = np.clip(np.ceil(p * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    sizes = np.bincount(bins, minlength=CALIBRATION_BINS)
    gaps = np.abs(np.bincount(bins, p, CALIBRATION_BINS) - np.bincount(bins, right, CALIBRATION_BINS))
    return float(gaps.sum() / max(1, sizes.sum()))


def accuracy_at_coverage(confidence: ArrayLike, is_right: ArrayLike) -> dict[float, float]:
    """Accuracy on the share of the items with the highest confidence, for each of `COVERAGES`."""
    p, right = np.asarray(confidence, dtype=np.float64), np.asarray(is_right, dtype=np.float64)
    order: NDArray[np.intp] = np.argsort(-p, kind="stable")
    counts = {share: max(1, round(share * len(p))) for share in COVERAGES}
    return {share: float(right[order[:count]].mean()) for share, count in counts.items()}
