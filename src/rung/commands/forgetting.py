"""`rung eval RUN --forgetting DATA`: scores of a run and of its base on other data, paired item by item.

Both models answer the same prompts in the same process, so the difference is paired and small losses show. The base of
an adapter run is the run with the adapter switched off, which costs no second model; the base of a full run is loaded
beside it. `climb.py` measures every tuned rung in this way when `climb.forgetting` names data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

from rung.commands.compare import paired_results
from rung.config.data import DataConfig
from rung.config.evaluation import EvaluationConfig
from rung.config.io import is_config_name, load_config
from rung.config.run import RunConfig
from rung.console import print_status
from rung.data.chat import ChatTemplate
from rung.data.formats import load_records, naming_config
from rung.data.records import Records
from rung.data.tokenize import tokenize_records
from rung.errors import ConfigError
from rung.evaluation.evaluate import PERPLEXITY, Evaluation, ScoredItem, evaluate, prompt_ids
from rung.evaluation.prompting import PromptFormat
from rung.models.document_values import values_by_document
from rung.models.policy import Policy, sum_by_document
from rung.planning.memory import tokens_per_micro_batch
from rung.results.evaluation import ForgettingComparison
from rung.runs.dataset import read_splits, with_contexts
from rung.runs.load import config_of_run, dequantize_if_configured, open_base, open_run, target_kind, test_records
from rung.types import PackedBatch

RESULT_FILE = "forgetting.json"
"""The forgetting result in the folder of a tuned rung."""
EvaluatedModel = tuple[Policy, ChatTemplate, AbstractContextManager[None]]
"""A model, its chat template, and a context manager that is entered while it answers (adapter on or off)."""


def measure_forgetting(run: str, data: str, *, limit: int | None = None) -> ForgettingComparison:
    """Perplexity and scores of a run and of its base on `data`, with paired differences: run minus base.

    `data` is a data file, of which all rows are used, or a config, of which the test split is used with its own metrics
    and instruction. Both models get the same prompts. Plain text has perplexity only, over all its tokens; texts longer
    than the model's context are dropped and counted. Raises `ConfigError` if `run` is not a run, `DataError` if no row
    is left.
    """
    path = Path(run)
    if (kind := target_kind(path)) != "run":
        hint = f"its runs stand in {path / 'rungs'}" if kind == "climb" else "a base has learned nothing to forget for"
        raise ConfigError("this is not a run", where="--forgetting", given=run, hint=hint)
    config, tuned_run = config_of_run(path), open_run(path)
    policy, chat = tuned_run.policy, tuned_run.chat
    records, evaluation, seed = forgetting_task(config, data, limit)
    dequantize_if_configured(policy, config)
    # The run's limit for both models, so that they drop the same texts and stay paired.
    max_tokens = policy.base.context - policy.method.virtual_tokens
    # One after the other: the generator loads the base of a full run only when the run's scores are there.
    models = _evaluated_models(path, policy, chat)
    after, before = (_measure(model, records, evaluation, max_tokens) for model in models)
    if dropped_count := len(records) - len(after.items):
        print_status(f"{dropped_count:,} of {len(records):,} texts are longer than the model's context and left out")
    scores = paired_results(before, after, seed)
    return ForgettingComparison(target=run, forgetting=data, **scores, dropped=dropped_count)


ForgettingTask = tuple[Records, EvaluationConfig, int]
"""Records, the evaluation settings under which they are asked and scored, and the seed of the intervals."""


def forgetting_task(config: RunConfig, data: str, limit: int | None) -> ForgettingTask:
    """Records, evaluation settings and seed for `data`: those of a config file, or a data file with those of `config`.

    Raises `DataError` and `ConfigError` if there are no records.
    """
    if is_config_name(data):
        task = load_config(data).config
        if limit is not None:
            task = task.model_copy(update={"evaluation": task.evaluation.model_copy(update={"limit": limit})})
        records, evaluation, seed = test_records(task, read_splits(task)), task.evaluation, task.seed
    else:
        with naming_config("a config in its place", data):
            loaded = load_records(DataConfig(path=data), data)
        records = _sample_records(loaded.records, limit)
        # Instruction and stop texts of the config were written for its own task, not for this data.
        evaluation = config.evaluation.model_copy(update={"instruction": None, "stop": ()})
        seed = config.seed
    # Perplexity is always measured: it moves long before an answer changes.
    metrics = tuple(dict.fromkeys([*evaluation.metrics, PERPLEXITY]))
    return records, evaluation.model_copy(update={"metrics": metrics}), seed


def read_forgetting(folder: Path, data: str | None) -> ForgettingComparison | None:
    """The stored result on this data; None if there is none, or one on other data."""
    try:
        result = ForgettingComparison.model_validate_json((folder / RESULT_FILE).read_text())
    except (OSError, ValueError):  # missing or torn: to be measured
        return None
    return result if result.forgetting == data else None


def check_room(task: ForgettingTask, chat: ChatTemplate, context: int) -> None:
    """Raise `DataError` for a prompt that leaves no room for its answer. Plain text is dropped later instead."""
    records, evaluation, _ = task
    if records[0].text is None:
        prompts, prompt_format = _records_without_passages(records, evaluation), PromptFormat(evaluation.instruction)
        prompt_ids(chat, prompts, prompt_format, context - evaluation.max_new_tokens)


def _records_without_passages(records: Records, evaluation: EvaluationConfig) -> Records:
    # No passages on other data: a library belongs to the task that it was built for.
    return records if evaluation.context == "given" else with_contexts("withheld", records, None)


def _evaluated_models(path: Path, policy: Policy, chat: ChatTemplate) -> Iterator[EvaluatedModel]:
    """The run, then its base: the same weights with the adapter off, or for a full run the base itself."""
    yield policy, chat, nullcontext()
    if (path / "adapter").is_dir():
        yield policy, chat.without_virtual_tokens(), policy.method.disabled()
    else:
        base = open_base(config_of_run(path).model)
        yield base.policy, base.chat, nullcontext()


def _sample_records(records: Records, limit: int | None) -> Records:
    """At most `limit` rows, drawn with a fixed seed, in their original order."""
    if limit is None or limit >= len(records):
        return records
    # Independent of the config's seed, so that all rungs and runs are measured on the same rows.
    return records.select(np.sort(np.random.default_rng(2).permutation(len(records))[:limit]))


def _measure(model: EvaluatedModel, records: Records, evaluation: EvaluationConfig, max_tokens: int) -> Evaluation:
    policy, chat, adapter_state = model
    with adapter_state:
        if records[0].text is not None:
            return _perplexity_of_texts(policy, chat, records, max_tokens)
        # the labels are those of the task, and other rows have other answers
        evaluation = evaluation.model_copy(update={"choices": None})
        prompt_format = PromptFormat(evaluation.instruction)
        records = _records_without_passages(records, evaluation)
        return evaluate(policy, chat, records, prompt_format, evaluation, title="forgetting")


def _perplexity_of_texts(policy: Policy, chat: ChatTemplate, records: Records, max_tokens: int) -> Evaluation:
    """Perplexity of plain texts; every token but the first is predicted."""
    # both models read the same tokens, and nobody has to decide what the author of the texts meant
    chat = chat.with_control_tokens(chat.control_tokens or "text")
    documents = list(tokenize_records(chat, records, loss_on="all", max_length=max_tokens, overflow="drop").examples)
    budget = tokens_per_micro_batch(policy.base.shape, policy.device.type)

    def nats_of(batch: PackedBatch) -> list[float]:
        return sum_by_document(batch, -policy.logprobs(batch)).tolist()

    items = []
    for d, nats in zip(documents, values_by_document([policy], documents, budget, nats_of), strict=True):
        items.append(ScoredItem(source=str(d.source), group=d.group, nats=nats, answer_tokens=d.predictions))
    return Evaluation(tuple(items), 0.0, (PERPLEXITY,))
