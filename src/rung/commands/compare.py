"""`rung eval RUN --baseline OTHER`: the same questions to both, differences paired, and a judge if the task has one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rung.commands.evaluate import evaluate_on_task, evaluation_task, task_name
from rung.commands.judge import judge_pairs
from rung.config.io import ConfigSource
from rung.errors import ConfigError
from rung.evaluation.evaluate import Evaluation
from rung.evaluation.judge import AnswerPair
from rung.files import write_text
from rung.results import ComparisonResult
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
    """Score two systems on one task; with `evaluation.judge`, also say whose answers are preferred.

    Differences are target minus baseline. `output` is a file for every judged pair. Raises `ConfigError` for an output
    without a judge, and where it exists already.
    """
    refuse_climb(baseline, where="--baseline")
    task, _, records, _ = evaluation_task(target, config=config, overrides=overrides, limit=limit)
    judge = task.evaluation.judge
    if output is not None and judge is None:
        hint = "name an evaluation.judge in the task's config"
        raise ConfigError("no pair is judged, so there is none to write", where="--output", given=output, hint=hint)
    if output is not None and output.exists():
        raise ConfigError("this file exists already", where="--output", given=output)
    target_evaluation, baseline_evaluation = (
        evaluate_on_task(target, task, records),
        evaluate_on_task(baseline, task, records),
    )
    metrics = {
        name: paired_scores(baseline_evaluation, target_evaluation, name, task.seed)
        for name in target_evaluation.metrics
    }
    result = {
        "target": target,
        "baseline": baseline,
        "task": task_name(config, target),
        "metrics": metrics,
        "examples": len(target_evaluation.items),
        "clusters": len(set(target_evaluation.clusters)),
    }
    if judge is None:
        return ComparisonResult.model_validate(result)
    judgement = judge_pairs(judge, _answer_pairs(target_evaluation, baseline_evaluation), task.seed)
    if output is not None:
        write_text(output, "".join(line + "\n" for line in judgement.lines()))
    return ComparisonResult.model_validate({**result, "judge": {"model": judge.model, **judgement.to_json()}})


def paired_scores(before: Evaluation, after: Evaluation, metric: str, seed: int) -> dict[str, Any]:
    """Both scores, and after minus before with what would have shown; in nats a token for perplexity."""
    scores, weights, clusters = (before.scores(metric), after.scores(metric)), after.weights(metric), after.clusters
    difference = paired_gain(*scores, clusters, weights=weights, seed=seed)
    return {
        "before": before.interval(metric).to_json(),
        "after": after.interval(metric).to_json(),
        "difference": difference.to_json(),
        "detectable": detectable_difference(scores[1] - scores[0], clusters, weights=weights),
    }


def _answer_pairs(target_evaluation: Evaluation, baseline_evaluation: Evaluation) -> list[AnswerPair]:
    return [
        AnswerPair(
            target_item.question,
            target_item.answer,
            baseline_item.answer,
            target_item.source,
            target_item.context,
            target_item.expected,
            target_item.group,
        )
        for target_item, baseline_item in zip(target_evaluation.items, baseline_evaluation.items, strict=True)
    ]
