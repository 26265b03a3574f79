"""`rung eval RUN --forgetting DATA`: what a run and its base make of other data, item by item."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from rung.commands.compare import paired_scores
from rung.config.data import DataConfig
from rung.config.evaluation import EvaluationConfig
from rung.config.io import load_config
from rung.config.run import RunConfig
from rung.console import print_status
from rung.data.chat import ChatTemplate
from rung.data.formats import load_records
from rung.data.records import Records
from rung.data.tokenize import tokenize_records
from rung.errors import ConfigError
from rung.evaluation.evaluate import PERPLEXITY, Evaluation, ScoredItem, evaluate, prompt_ids
from rung.evaluation.prompting import PromptFormat
from rung.models.policy import Policy, sum_by_document
from rung.planning.memory import tokens_per_micro_batch
from rung.results import ForgettingComparison
from rung.runs.dataset import read_splits, with_contexts
from rung.runs.load import (
    LoadedRun,
    config_of_run,
    dequantize_if_configured,
    open_base,
    open_run,
    target_kind,
    test_records,
)
from rung.training.step import values_by_document
from rung.types import Record

RESULT_FILE = "forgetting.json"
"""Beside a tuned rung's result: what it and its base make of other data."""
EvaluatedModel = tuple[Policy, ChatTemplate, AbstractContextManager[None]]
"""A model, how it reads, and what must be in force while it does."""


def measure_forgetting(run: str, data: str, *, limit: int | None = None) -> ForgettingComparison:
    """Perplexity and scores of a run and of its base on `data`, paired: run minus base.

    `data` is a data file, all of whose rows count, or a config, whose test split does under its own metrics and
    instruction. Both models get the same prompts. Plain text has perplexity alone, over all its tokens; what is longer
    than the model's context is left out and counted. Raises `ConfigError` where `run` is none, `DataError` where
    nothing is left.
    """
    path = Path(run)
    if (kind := target_kind(path)) != "run":
        hint = f"its runs stand in {path / 'rungs'}" if kind == "climb" else "a base has learned nothing to forget for"
        raise ConfigError("this is not a run", where="--forgetting", given=run, hint=hint)
    config, tuned = config_of_run(path), open_run(path)
    records, evaluation, seed = forgetting_task(config, data, limit)
    dequantize_if_configured(tuned.policy, config)
    max_tokens = tuned.policy.base.context - tuned.policy.method.virtual_tokens
    models = _evaluated_models(path, tuned)
    after, before = (_measure_model(model, records, evaluation, max_tokens) for model in models)
    if dropped_count := len(records) - len(after.items):
        print_status(f"{dropped_count:,} of {len(records):,} texts are longer than the model's context and left out")
    return ForgettingComparison.model_validate(
        {
            "target": run,
            "forgetting": data,
            "metrics": {name: paired_scores(before, after, name, seed) for name in after.metrics},
            "examples": len(after.items),
            "clusters": len(set(after.clusters)),
            "dropped": dropped_count,
        }
    )


ForgettingTask = tuple[Records, EvaluationConfig, int]
"""Items, how they are asked and scored, and a seed."""


def forgetting_task(config: RunConfig, data: str, limit: int | None) -> ForgettingTask:
    """Items of other data, how they are asked and scored, and a seed: a config's own, of a data file those of a run.

    Raises `DataError` and `ConfigError` where there are none.
    """
    if Path(data).suffix in (".yaml", ".yml"):
        task = load_config(data).config
        if limit is not None:
            task = task.model_copy(update={"evaluation": task.evaluation.model_copy(update={"limit": limit})})
        records, evaluation, seed = test_records(task, read_splits(task)), task.evaluation, task.seed
    else:
        records, evaluation, seed = (
            _sample_records(load_records(DataConfig(path=data), data).records, limit),
            config.evaluation,
            config.seed,
        )
        evaluation = evaluation.model_copy(update={"instruction": None})
    return (
        records,
        evaluation.model_copy(update={"metrics": tuple(dict.fromkeys([*evaluation.metrics, PERPLEXITY]))}),
        seed,
    )


def read_forgetting(folder: Path, data: str | None) -> dict[str, Any]:
    """What was kept of these data; empty where that is still to be measured."""
    try:
        result: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return result if result.get("forgetting") == data else {}


def check_forgetting_room(task: ForgettingTask, chat: ChatTemplate, context: int) -> None:
    """Raise `DataError` for a prompt that leaves no room for its answer; of plain text what is too long is left out."""
    records, evaluation, _ = task
    if records[0].text is None:
        prompt_ids(
            chat,
            _prompt_records(records, evaluation),
            PromptFormat(evaluation.instruction),
            context - evaluation.max_new_tokens,
        )


def _prompt_records(records: Sequence[Record], evaluation: EvaluationConfig) -> Sequence[Record]:
    return records if evaluation.context == "given" else with_contexts("withheld", Records.from_records(records), None)


def _evaluated_models(path: Path, tuned: LoadedRun) -> Iterator[EvaluatedModel]:
    """The run, then its base: the same weights with the adapter off, or the base itself of a whole model."""
    yield tuned.policy, tuned.chat, nullcontext()
    if (path / "adapter").is_dir():
        yield tuned.policy, tuned.chat.without_virtual_tokens(), tuned.policy.method.disabled()
        return
    base = open_base(config_of_run(path).model)
    yield base.policy, base.chat, nullcontext()


def _sample_records(records: Records, limit: int | None) -> Records:
    """At most so many rows, by a fixed draw, in their order."""
    if limit is None or limit >= len(records):
        return records
    return records.select(np.sort(np.random.default_rng(2).permutation(len(records))[:limit]))


def _measure_model(
    model: EvaluatedModel, records: Sequence[Record], evaluation: EvaluationConfig, max_tokens: int
) -> Evaluation:
    policy, chat, adapter_state = model
    with adapter_state:
        if records[0].text is not None:
            return _plain_text_perplexity(policy, chat, records, max_tokens)
        return evaluate(
            policy,
            chat,
            _prompt_records(records, evaluation),
            PromptFormat(evaluation.instruction),
            evaluation,
            title="forgetting",
        )


def _plain_text_perplexity(
    policy: Policy, chat: ChatTemplate, records: Sequence[Record], max_tokens: int
) -> Evaluation:
    """Perplexity of plain texts, every token but the first predicted."""
    documents = list(tokenize_records(chat, records, loss_on="all", max_length=max_tokens, overflow="drop").examples)
    budget = tokens_per_micro_batch(policy.base.shape, policy.device.type)
    nats = values_by_document(
        [policy], documents, budget, lambda batch: sum_by_document(batch, -policy.logprobs(batch)).tolist()
    )
    items = tuple(
        ScoredItem(
            source=str(document.source),
            group=document.group,
            question="",
            context=None,
            expected="",
            answer="",
            scores={},
            prompt_tokens=0,
            stopped=True,
            nats=document_nats,
            answer_tokens=document.predictions,
        )
        for document, document_nats in zip(documents, nats, strict=True)
    )
    return Evaluation(items, 0.0, (PERPLEXITY,))
