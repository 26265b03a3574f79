"""The data of a config: splits, contexts and tokens, ready for training or measurement.

What the model sees before a question is written into the record before anything is tokenized, cached or asked, so that
training and test cannot differ (docs/decisions/0020); the price is a second copy of the rows on disk. Reading and
splitting is in `data`, retrieval in `evaluation/retrieval.py`. `runs/train.py`, the climb and `rung eval` call it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rung.config.evaluation import Context, RetrievalConfig
from rung.config.method import front_virtual_tokens
from rung.config.objective import CodeRewardConfig, JudgeRewardConfig, ModelRewardConfig, VerifierConfig
from rung.config.run import RunConfig
from rung.console import print_status, status
from rung.data.cache import cached_examples
from rung.data.chat import ChatTemplate
from rung.data.prompt_positions import virtual_token_positions
from rung.data.records import Records
from rung.data.splits import Splits, load_data
from rung.data.token_store import TokenizedDataset, describe_notes
from rung.data.tokenize import Preflight, PromptDataset, preflight, tokenize_prompts, without_failing_rows
from rung.errors import DataError
from rung.evaluation.retrieval import Library, read_documents, row_contexts
from rung.models.base_model import BaseModel
from rung.objectives.registry import make_objective
from rung.scoring.code_answers import CODE, require_tests
from rung.scoring.code_sandbox import require_isolation
from rung.scoring.math_answers import require_math_verify
from rung.scoring.verifiers import needs_expected_answer
from rung.types import Example


@dataclass(frozen=True)
class RunData:
    """The data of a config, tokenized; rungs with the same tokens share it."""

    splits: Splits
    chat: ChatTemplate
    train: TokenizedDataset | PromptDataset
    validation: TokenizedDataset | PromptDataset | None
    preflight: Preflight
    teacher_prompt: Callable[[Example], NDArray[np.int32]] | None = None
    """What a teacher reads before the answer of a document, where that is not what the student reads."""

    def summary(self) -> dict[str, Any]:
        """Counts for `run.json`."""
        parts = {"train": self.train, "validation": self.validation}
        counts = {name: part.summary() for name, part in parts.items() if part is not None}
        return {"splits": self.splits.summary(), **counts, "preflight": self.preflight.to_json()}


def read_splits(config: RunConfig) -> Splits:
    """The three splits of the data. Needs no model, so bad data and missing extras are refused before one is loaded."""
    if "math" in config.evaluation.metrics:
        require_math_verify("evaluation.metrics")
    if isinstance(config.objective.reward, VerifierConfig) and config.objective.reward.kind == "math":
        require_math_verify("objective.reward.kind")
    if CODE in config.evaluation.metrics:
        require_isolation("evaluation.metrics")
    with status("reading data"):
        splits = load_data(config.data, config.seed)
    if CODE in config.evaluation.metrics:
        require_tests(chain(splits.validation, splits.test), "evaluation.metrics")
    for loaded in (*splits.notes["sets"], *splits.notes["held_out_files"].values()):
        if loaded.get("made_by", {}).get("trusted") is False:
            print_status(f"{loaded['path']}: NOT TRUSTED, people do not agree with the critic that made these rows")
        for token, answers in loaded.get("removed_end_tokens", {}).items():
            print_status(f"{loaded['path']}: {answers:,} answers ended in {token}, which is removed")
    return splits


def load_library(config: RunConfig, splits: Splits | None = None) -> Library:
    """The passages for retrieval: documents, or the contexts of the rows. Raises `DataError` if there are none."""
    retrieval = config.evaluation.retrieve or RetrievalConfig()
    with status("indexing documents"):
        if retrieval.documents is None:
            # All rows, whatever `data.limit` says: fewer passages would make the search easier (docs/log.md).
            if splits is None or config.data.limit is not None:
                splits = load_data(config.data.model_copy(update={"limit": None}), config.seed)
            contexts = row_contexts((splits.train, splits.validation, splits.test))
            return Library.from_documents(contexts, retrieval, "data.path")
        return Library.from_documents(read_documents(retrieval), retrieval, retrieval.documents)


def with_contexts(context: Context, records: Records, library: Library | None) -> Records:
    """Records whose context is what the model sees: their own, none, or passages of the library."""
    if context == "given":
        return records
    if context == "withheld" or library is None:
        return Records.from_records(replace(record, context=None) for record in records)
    return library.with_passages_all(records)


def tokenize_splits(config: RunConfig, splits: Splits, base: BaseModel, library: Library | None = None) -> RunData:
    """Tokenized training and validation data, cached, with gate 1 passed and with the contexts of the evaluation."""
    positions = virtual_token_positions(config.method, base.vocab_size)
    chat = ChatTemplate.of_model(base.tokenizer, config.model, base.end_ids, positions)
    chat = chat.with_control_tokens(config.data.control_tokens)
    max_tokens = max_document_tokens(config, base)
    context = config.evaluation.context
    if context == "retrieved" and library is None:
        library = load_library(config, splits)
    # A tuned model must be trained on what it will be asked.
    prompted_splits = [with_contexts(context, part, library) for part in (splits.train, splits.validation)]
    splits = replace(splits, train=prompted_splits[0], validation=prompted_splits[1])
    objective = make_objective(config.objective)
    # A policy that is rewarded for its own answers trains on prompts alone.
    if objective.rollout is not None and objective.uses_rewards:
        return _prompt_only_data(config, splits, chat, max_tokens - objective.rollout.max_new_tokens)
    train = tokenize_for_objective(config, chat, splits.train, max_tokens)
    validation = tokenize_for_objective(config, chat, splits.validation, max_tokens) if splits.validation else None
    _check_ids(train.examples, base)
    if validation is not None:
        _check_ids(validation.examples, base)
        preflight(chat, validation)
    return RunData(splits, chat, train, validation, preflight(chat, train))


def _check_ids(examples: Sequence[Example], base: BaseModel) -> None:
    """Raise `DataError` for a token without an embedding: some tokenizers have more tokens than the model."""
    embedding_rows = int(base.model.get_input_embeddings().weight.shape[0])
    # No pass over the data for the usual tokenizer, which cannot give such a token.
    if len(base.tokenizer) <= embedding_rows:
        return
    for example in examples:
        if (largest_id := int(example.ids.max())) >= embedding_rows:
            summary = "the tokenizer gives a token that the model has no embedding of"
            given = f"{base.tokenizer.convert_ids_to_tokens(largest_id)!r}, id {largest_id}"
            allowed = f"ids below {embedding_rows}, though the tokenizer has {len(base.tokenizer)}"
            raise DataError(summary, where=str(example.source), given=given, allowed=allowed)


def max_document_tokens(config: RunConfig, base: BaseModel) -> int:
    """Largest number of tokens of a document."""
    # Virtual tokens in front take positions of the context; those inside the text are part of the document.
    room = base.context - front_virtual_tokens(config.method)
    # virtual tokens are computed once for all documents, so they need one set of rotary frequencies
    if front_virtual_tokens(config.method) and base.rope_boundary is not None:
        room = base.rope_boundary - front_virtual_tokens(config.method)
    return min(config.data.max_length or room, room)


def tokenize_for_objective(
    config: RunConfig, chat: ChatTemplate, records: Records, max_tokens: int
) -> TokenizedDataset:
    """The tokenized records of a run, as its objective needs them.

    Raises:
        DataError: a row has too few answers, or a soft label that the loss cannot use.
    """
    objective = make_objective(config.objective)
    _refuse_soft_labels(config, records)
    data = config.data
    tokenize = partial(
        cached_examples, chat, records, loss_on=data.loss_on, overflow=data.overflow, rejects=data.rejects
    )
    with status("tokenizing"):
        dataset = tokenize(max_length=max_tokens, with_candidates=objective.compares_answers)
        if data.rejects == "drop":
            dataset = without_failing_rows(chat, dataset)
    _print_notes(dataset.columns.notes, chat)
    if (incomplete_row := dataset.first_row_with_fewer(objective.min_answers)) is not None:
        hint = "labelled answers are for loss: kto; pairs, rankings and ratings for all others"
        raise DataError("this row has one answer and nothing to compare it with", where=str(incomplete_row), hint=hint)
    return dataset


def _refuse_soft_labels(config: RunConfig, records: Records) -> None:
    """Raise `DataError` for a pair with a probability that the loss cannot use: it would be dropped."""
    blocker = config.objective.soft_label_blocker
    labeled = (r for r in records if r.probability is not None) if blocker else iter(())
    if (record := next(labeled, None)) is not None:
        summary = f"this pair has a probability that the loss cannot use: {blocker}"
        hint = "take objective.loss: dpo, which uses it, or leave the column out of the file"
        raise DataError(summary, where=str(record.source), given=f"probability {record.probability:g}", hint=hint)


def _print_notes(notes: Mapping[str, Any], chat: ChatTemplate) -> None:
    for name, text in describe_notes(notes, chat.control_tokens).items():
        print_status(f"{name}: {text}")


def tokenize_held_out(config: RunConfig, chat: ChatTemplate, records: Records, base: BaseModel) -> TokenizedDataset:
    """Tokenized held-out rows, made as the training data of the run."""
    dataset = tokenize_for_objective(config, chat, records, max_document_tokens(config, base))
    _check_ids(dataset.examples, base)
    return dataset


def _require_answers_to_judge(validation: Records) -> None:
    """Raise `DataError` for a held-out row without an answer: a policy gives it one answer, which has no group."""
    for record in validation:
        if not record.answer or record.is_undesirable:
            summary = (
                "a judge compares the answer to a held-out question with its expected answer, and this row has none"
            )
            raise DataError(
                summary, where=str(record.source), hint="set data.validation: 0, or give these rows answers"
            )


def _prompt_only_data(config: RunConfig, splits: Splits, chat: ChatTemplate, max_tokens: int) -> RunData:
    """Prompts for a policy that samples the answers. Raises `DataError` if a reward needs answers that are missing."""
    source = config.objective.reward
    if isinstance(source, CodeRewardConfig):
        require_tests(chain(splits.train, splits.validation), "objective.reward.kind")
    # Checked now, since a missing answer would otherwise show at the first rollout that reaches the row.
    if source is not None and not isinstance(source, ModelRewardConfig) and needs_expected_answer(source):
        for record in (*splits.train, *splits.validation):
            if record.is_prompt_only or record.is_undesirable:
                summary = "this reward compares with the expected answer, and this row has none"
                raise DataError(summary, where=str(record.source), given=f"objective.reward.kind: {source.kind}")
            if source.kind in ("regex", "judge") and record.messages[-1].tool_calls:
                what = "a pattern" if source.kind == "regex" else "a judge"
                summary = f"{what} cannot compare tool calls, and this row ends in one"
                hint = "take objective.reward: {kind: exact}, which compares parsed calls, or {kind: function}"
                raise DataError(summary, where=str(record.source), hint=hint)
            # now and not at the first rollout: a template may write calls in a form that is not read
            chat.expected_calls(record)
    if isinstance(source, JudgeRewardConfig):
        _require_answers_to_judge(splits.validation)
    rejects, overflow = config.data.rejects, config.data.overflow
    tokenize = partial(tokenize_prompts, chat, max_length=max_tokens, overflow=overflow, rejects=rejects)
    with status("tokenizing"):
        train, validation = tokenize(splits.train), tokenize(splits.validation) if splits.validation else None
    _print_notes(train.notes, chat)
    return RunData(splits, chat, train, validation, train.preflight())
