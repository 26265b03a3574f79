"""`rung eval`: scores a run or a base on the test split of a task.

A task is a config: its data, metrics, instruction and context. A run has one of its own, a base needs `--config`. For a
run the test items are also searched in its training rows (contamination), which means reading the training data again.
`cli` and `rung.evaluate` call `evaluate`; `compare.py` uses the same task for two systems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rung.config.io import ConfigSource, resolve_config
from rung.config.model_catalog import CATALOG
from rung.config.objective import RewardConfig
from rung.config.run import RunConfig
from rung.console import print_status
from rung.data.contamination import contamination
from rung.data.records import Records
from rung.errors import ConfigError, RungError, did_you_mean
from rung.evaluation.choices import label_choices, with_labels
from rung.evaluation.evaluate import Evaluation, ScoredItem
from rung.evaluation.reward_model import score_reward_model
from rung.files import is_run_folder
from rung.results.evaluation import EvaluationResult, RewardModelHealth
from rung.runs.dataset import load_library, read_splits, tokenize_held_out, with_contexts
from rung.runs.load import config_of_run, open_reward_model, open_target, refuse_climb, score, target_kind, test_records
from rung.runs.server import check_evaluation_server
from rung.runs.train import micro_batch_tokens
from rung.training.run_folder import RunFolder, is_climb, read_manifest


def evaluate(
    target: str | Path, *, config: ConfigSource | None = None, overrides: Sequence[str] = (), limit: int | None = None
) -> EvaluationResult:
    """Score a run or a base on the test split of `config`, or by default of the run's own config.

    A rung that has its own training data is scored on the test split of its ladder. A run that is scored on its own
    whole task stores the result in its folder. Raises `ConfigError` for a base without a task.
    """
    path, target = Path(target), str(target)
    # The task first: a missing config or unreadable data is then an error before a model is loaded.
    is_run = is_run_folder(path)
    task, originals, records, retrieval = evaluation_task(target, config=config, overrides=overrides, limit=limit)
    header = {"target": target, "task": task_name(config, target)}
    # Only a score on the whole task of the run may become the run's own: another config or a limit is a trial.
    is_own_score = is_run and config is None and limit is None
    if is_run and isinstance(task.objective, RewardConfig):
        health = _reward_model_health(path, task, records)
        metrics = {"reward": health.to_json(), "examples": len(records)}
        if is_own_score:
            _store_metrics(path, metrics)
        return EvaluationResult.model_validate({**header, **metrics, "summary": str(health)})
    result = evaluate_on_task(target, task, records)
    metrics = {**result.summary(), **retrieval}
    # A user waits for the retrieval as well as for the answer.
    metrics["seconds_per_query"] += retrieval.get("retrieval", {}).get("seconds_per_query", 0.0)
    if (server := task.evaluation.server) is not None:
        metrics["server"] = server.address
    contamination_result = {"contamination": contamination_of(path, result, originals)} if is_run else {}
    if is_own_score:
        # `items.parquet` belongs to the climb that the run may be part of.
        result.write(path / "eval.parquet")
        _store_metrics(path, metrics, **contamination_result)
    return EvaluationResult.model_validate({**header, **metrics, **contamination_result})


def _store_metrics(run: Path, metrics: Mapping[str, Any], **facts: Any) -> None:
    manifest = read_manifest(run)
    RunFolder(run, manifest).update(metrics={**manifest.get("metrics", {}), **metrics}, **facts)


def task_name(config: ConfigSource | None, target: str) -> str:
    """The name of a task in results: the config's file or output, or the run itself."""
    if config is None:
        return target
    return str(config) if isinstance(config, str | Path) else resolve_config(config).output


def contamination_of(run: Path, result: Evaluation, records: Records) -> dict[str, Any]:
    """Test items that occur in the training rows of a run, by tier, with the scores without them and of them alone.

    If the training rows can no longer be read, `unknown` says why.
    """
    try:
        train = read_splits(config_of_run(run)).train
    except RungError as error:
        # Data that was moved since the training is no reason to withhold the scores.
        return {"unknown": error.summary}
    matches = contamination(train, records)
    tiers: dict[str, Any] = {}
    for tier in matches.tiers:
        flagged = matches.flagged(tier)
        tiers[tier] = {"items": len(flagged), "examples": matches.examples(tier)}
        if flagged:
            tiers[tier]["scores_without"] = _scores(result, [i for i in result.items if i.source not in flagged])
            tiers[tier]["scores_of_them"] = _scores(result, [i for i in result.items if i.source in flagged])
    return {"items": matches.items, "train_rows": matches.train, "tiers": tiers}


class EvaluationTask(NamedTuple):
    """A task, its test items and its retrieval."""

    task: RunConfig
    originals: Records
    """Test items as they are in the data; contamination is searched in these."""
    records: Records
    """Test items with the context that the model sees: their own, none, or retrieved passages."""
    retrieval: dict[str, Any]
    """Hit rate of the retrieval; empty if nothing is retrieved."""


def _no_task_error(target: str) -> ConfigError:
    """The error for a target that is no run, where no config names a task: a base, or the mistyped path of a run."""
    folder = Path(target).parent
    runs = [str(p) for p in folder.iterdir() if is_run_folder(p)] if folder.is_dir() else []
    suggestion = did_you_mean(target, runs)
    hint = "name one with --config CONFIG" + (f", or did you mean {suggestion}?" if suggestion else "")
    if Path(target).exists() or target in CATALOG or target_kind(target) == "server":
        return ConfigError("a base has no task of its own", given=target, hint=hint)
    return ConfigError("no run is here, and a base has no task of its own", given=target, hint=hint)


def evaluation_task(
    target: str, *, config: ConfigSource | None, overrides: Sequence[str], limit: int | None
) -> EvaluationTask:
    """The task that `target` is scored on. Raises `ConfigError` for a base without a task."""
    refuse_climb(target)
    if overrides and config is None:
        raise ConfigError("overrides go with --config", given=" ".join(overrides))
    if config is None and not is_run_folder(target):
        raise _no_task_error(target)
    task = _task_of_run(Path(target)) if config is None else resolve_config(config, overrides)
    if limit is not None:
        task = task.model_copy(update={"evaluation": task.evaluation.model_copy(update={"limit": limit})})
    splits = read_splits(task)
    records, context = test_records(task, splits), task.evaluation.context
    if choices := label_choices(task.evaluation, splits.train, records):
        evaluation = with_labels(task.evaluation, choices)
        task = task.model_copy(update={"evaluation": evaluation})
    if context != "retrieved":
        return EvaluationTask(task, records, with_contexts(context, records, None), {})
    library = load_library(task, splits)
    # The hit rate reads the rows as they came, since a retrieved context replaces their own (docs/decisions/0020).
    return EvaluationTask(task, records, library.with_passages_all(records), {"retrieval": library.hit_rate(records)})


def _task_of_run(run: Path) -> RunConfig:
    """The task of a run: its config, for a rung with rows of its own with the data of its ladder, whose test it has.

    Raises `ConfigError` for a run without a test split.
    """
    task = config_of_run(run)
    if task.data.test != 0:
        return task
    ladder = _ladder_of(run)
    if ladder is None:
        hint = "name a task that has one with --config CONFIG: rows that the run learned from are no test"
        raise ConfigError("this run has no test split to be scored on", where=str(run), given="data.test: 0", hint=hint)
    print_status(f"scored on the test split of the ladder {ladder}: this rung has its own training data, and no test")
    config = config_of_run(ladder)
    # the seed too: it draws the items of evaluation.limit
    return task.model_copy(update={"data": config.data, "seed": config.seed})


def _ladder_of(run: Path) -> Path | None:
    """The folder of the climb whose rung a run is; None for any other run."""
    # a rung stands in rungs/NAME, with several training seeds in rungs/NAME/seed-N
    folder = next((parent for parent in run.resolve().parents[:2] if parent.name == "rungs"), None)
    return folder.parent if folder is not None and is_climb(folder.parent) else None


def _scores(result: Evaluation, items: Sequence[ScoredItem]) -> dict[str, Any] | None:
    """Scores of some of the items; None if there are none."""
    if not items:
        return None
    subset = replace(result, items=tuple(items))
    return {name: subset.interval(name).to_json() for name in result.metrics}


def evaluate_on_task(target: str, task: RunConfig, records: Records) -> Evaluation:
    """Scores of a run or a base. The model is not kept, so the next one finds its memory free."""
    # before the model is loaded: what the server cannot answer for, and a server that is not there
    check_evaluation_server(task, config_of_run(Path(target)) if is_run_folder(target) else None)
    return score(open_target(target, task.model), task, records)


def _reward_model_health(path: Path, task: RunConfig, records: Records) -> RewardModelHealth:
    """The health of a reward model on held-out comparisons."""
    policy, chat, objective, _ = open_reward_model(path)
    examples = tokenize_held_out(task, chat, records, policy.base).examples
    return score_reward_model(policy, objective, examples, micro_batch_tokens(task, policy.base))
