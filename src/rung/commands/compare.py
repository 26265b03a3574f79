"""`rung eval RUN --baseline OTHER`: two systems on the same questions, with paired differences and an optional judge.

Pairing by question removes the variance between questions from the difference, so fewer items are needed than for two
separate scores. The price is that both systems answer here and now: stored results of another day are not compared.
Why the judge is part of the task: docs/decisions/0021. `cli` and `rung.compare` call `compare`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rung.commands.evaluate import evaluate_on_task, evaluation_task, task_name
from rung.config.io import ConfigSource
from rung.errors import ConfigError
from rung.evaluation.evaluate import PERPLEXITY, Evaluation
from rung.evaluation.judge import AnswerPair
from rung.files import write_text
from rung.results.evaluation import ComparisonResult, MetricComparison
from rung.runs.judge import judge_pairs
from rung.runs.load import refuse_climb
from rung.scoring.recommendation import paired_gain
from rung.scoring.stats import detectable_difference


def compare(
    target: str,
    baseline: str,
    *,
    config: ConfigSource | None = None,
    overrides: Sequence[str] = (),
    limit: int | None = None,
    output: Path | None = None,
) -> ComparisonResult:
    """Score two systems on one task; with `evaluation.judge` in the task, also have their answers judged.

    Differences are target minus baseline. `output` is a file for all judged pairs. Raises `ConfigError` for an output
    without a judge, and if it exists already.
    """
    refuse_climb(baseline, where="--baseline")
    task, _, records, _ = evaluation_task(target, config=config, overrides=overrides, limit=limit)
    judge = task.evaluation.judge
    if output is not None and judge is None:
        hint = "name an evaluation.judge in the task's config"
        raise ConfigError("no pair is judged, so there is none to write", where="--output", given=output, hint=hint)
    # Refused now and not after hours of answers and paid verdicts.
    if output is not None and output.exists():
        raise ConfigError("this file exists already", where="--output", given=output)
    # One after the other, so that only one model is in memory.
    target_evaluation = evaluate_on_task(target, task, records)
    baseline_evaluation = evaluate_on_task(baseline, task, records)
    scores = paired_results(baseline_evaluation, target_evaluation, task.seed)
    result = ComparisonResult(target=target, baseline=baseline, task=task_name(config, target), **scores)
    if (server := task.evaluation.server) is not None:
        result = result.replace(server=server.address)
    if judge is None:
        return result
    # strict: a missing item would pair all later answers with the wrong question.
    items = zip(target_evaluation.items, baseline_evaluation.items, strict=True)
    pairs = [AnswerPair(a.question, a.answer, b.answer, a.source, a.context, a.expected, a.group) for a, b in items]
    judgement = judge_pairs(judge, pairs, task.seed)
    if output is not None:
        write_text(output, "".join(line + "\n" for line in judgement.lines()))
    return result.replace(judge=judgement.result)


def paired_results(before: Evaluation, after: Evaluation, seed: int) -> dict[str, Any]:
    """`paired_scores` of every metric, and the number of items and of their clusters."""
    metrics = {name: paired_scores(before, after, name, seed) for name in after.metrics}
    return {"metrics": metrics, "examples": len(after.items), "clusters": len(set(after.clusters))}


def paired_scores(before: Evaluation, after: Evaluation, metric: str, seed: int) -> MetricComparison:
    """Both scores, and after minus before with the smallest detectable difference; perplexity in nats per token."""
    scores, weights, clusters = (before.scores(metric), after.scores(metric)), after.weights(metric), after.clusters
    # Clusters are the same on both sides, token counts only with the same tokenizer: those of `after` weight the items.
    in_nats = metric == PERPLEXITY
    difference = paired_gain(*scores, clusters, weights=weights, seed=seed, in_nats=in_nats)
    bounded = False if in_nats else None
    detectable = detectable_difference(scores[1] - scores[0], clusters, weights=weights, bounded=bounded)
    scores_of = {"before": before.interval(metric), "after": after.interval(metric)}
    return MetricComparison(**scores_of, difference=difference, detectable=detectable)
