"""`rung eval RUN --baseline OTHER`: the same questions to both, differences paired, and a judge if the task has one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rung.commands.evaluate import evaluate_on_task, evaluation_task
from rung.commands.judge import judge_pairs
from rung.errors import ConfigError
from rung.evaluation.evaluate import Evaluation
from rung.evaluation.judge import AnswerPair
from rung.files import write_text
from rung.scoring.recommendation import paired_gain
from rung.scoring.stats import detectable_difference
from rung.training.run_folder import is_climb


def compare_on_task(
    target: str, other: str, *, config: str | None, overrides: Sequence[str], limit: int | None, output: Path | None
) -> dict[str, Any]:
    """Score both on one task; with `evaluation.judge`, also say whose answers are preferred.

    Differences are target minus other. `output` takes every pair with what was said of it. Raises `ConfigError` for an
    output without a judge, and where it exists already.
    """
    if is_climb(Path(other)):
        hint = f"its runs stand in {Path(other) / 'rungs'}"
        raise ConfigError("this is a climb, not a run", where="--baseline", given=other, hint=hint)
    task, _, records, _ = evaluation_task(target, config=config, overrides=overrides, limit=limit)
    judge = task.evaluation.judge
    if output is not None and judge is None:
        hint = "name an evaluation.judge in the task's config"
        raise ConfigError("no pair is judged, so there is none to write", where="--output", given=output, hint=hint)
    if output is not None and output.exists():
        raise ConfigError("this file exists already", where="--output", given=output)
    ours, theirs = evaluate_on_task(target, task, records), evaluate_on_task(other, task, records)
    metrics = {name: paired_scores(theirs, ours, name, task.seed) for name in ours.metrics}
    result = {
        "target": target,
        "against": other,
        "task": config or target,
        "metrics": metrics,
        "examples": len(ours.items),
        "clusters": len(set(ours.clusters)),
    }
    if judge is None:
        return result
    found = judge_pairs(judge, _answer_pairs(ours, theirs), task.seed)
    if output is not None:
        write_text(output, "".join(line + "\n" for line in found.lines()))
    return {**result, "judge": {"model": judge.model, **found.to_json()}}


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


def _answer_pairs(ours: Evaluation, theirs: Evaluation) -> list[AnswerPair]:
    return [
        AnswerPair(own.question, own.answer, other.answer, own.source, own.context, own.expected, own.group)
        for own, other in zip(ours.items, theirs.items, strict=True)
    ]
