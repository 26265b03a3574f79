"""A config's data, ready to be learned from or measured on."""

from __future__ import annotations
from rung.data.tokenize import preflight

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rung.data.cache import cached_examples
from rung.data.chat import Chat
from rung.data.token_store import Tokenised
from rung.data.tokenize import Preflight
from rung.data.splits import load_data
from rung.data.tokenize import Prompted, prompts
from rung.data.records import Records
from rung.data.splits import Splits
from rung.console import stage
from rung.errors import DataError
from rung.evaluation.retrieval import Library, own_contexts, read_documents
from rung.models.base_model import Base
from rung.objectives.registry import OBJECTIVES
from rung.runs.load import inserted_in
from rung.scoring.verifiers import expects
from rung.config.evaluation import Context, RetrieveSpec
from rung.config.method import in_front
from rung.config.objective import ModelRewardSpec
from rung.config.run import RunSpec
from rung.types import Example


@dataclass(frozen=True)
class Data:
    """A config's data, read once and used by every rung."""

    splits: Splits
    chat: Chat
    train: Tokenised | Prompted
    validation: Tokenised | Prompted | None
    preflight: Preflight

    def summary(self) -> dict[str, Any]:
        """Counts for `run.json`."""
        parts = {"train": self.train, "validation": self.validation}
        counts = {name: part.summary() for name, part in parts.items() if part is not None}
        return {"splits": self.splits.summary(), **counts, "preflight": self.preflight.to_json()}


def read_splits(spec: RunSpec) -> Splits:
    """The three parts of the data. Needs no model, so bad data is found before anything is loaded."""
    with stage("reading data"):
        return load_data(spec.data, spec.seed)


def library_of(spec: RunSpec, splits: Splits | None = None) -> Library:
    """What passages are retrieved from; rows are read where they are not at hand. Raises `DataError` for nothing."""
    own = spec.evaluate.retrieve or RetrieveSpec()
    with stage("indexing documents"):
        if own.documents is None:
            if splits is None or spec.data.limit is not None:  # fewer rows must not make the search easier
                splits = load_data(spec.data.model_copy(update={"limit": None}), spec.seed)
            return Library.of(own_contexts((splits.train, splits.validation, splits.test)), own, "data.path")
        return Library.of(read_documents(own), own, own.documents)


def as_asked(context: Context, records: Records, library: Library | None) -> Records:
    """Records with what stands before their questions: their own contexts, none, or passages of the library."""
    if context == "given":
        return records
    if context == "withheld" or library is None:
        return Records.of(replace(record, context=None) for record in records)
    return library.shown_all(records)


def tokenise(spec: RunSpec, splits: Splits, base: Base, library: Library | None = None) -> Data:
    """Examples for training and validation, through the cache, with gate 1 passed; their contexts as they are asked."""
    chat = Chat(base.tokenizer, spec.model.template, inserted_in(spec.method, base))
    longest = room_of(spec, base)
    context = spec.evaluate.context
    if context == "retrieved" and library is None:
        library = library_of(spec, splits)
    # a tuned model must be trained on what it will be asked
    asked = [as_asked(context, part, library) for part in (splits.train, splits.validation)]
    splits = replace(splits, train=asked[0], validation=asked[1])
    objective = OBJECTIVES[spec.objective.kind](spec.objective)
    if objective.rollout is not None and objective.judged:
        return _prompted(spec, splits, chat, longest - objective.rollout.max_new_tokens)
    train = documents(spec, chat, splits.train, longest)
    validation = documents(spec, chat, splits.validation, longest) if splits.validation else None
    for part in (train, validation):
        if part is not None:
            _check_ids(part.examples, base)
    if validation is not None:
        preflight(chat, validation)
    return Data(splits, chat, train, validation, preflight(chat, train))


def _check_ids(examples: Sequence[Example], base: Base) -> None:
    """Raise `DataError` for a token that the model has no embedding of: some tokenizers name more than there are."""
    rows = int(base.model.get_input_embeddings().weight.shape[0])
    if len(base.tokenizer) <= rows:
        return
    for example in examples:
        if (beyond := int(example.ids.max())) >= rows:
            raise DataError(
                "the tokenizer gives a token that the model has no embedding of",
                where=str(example.source),
                given=f"{base.tokenizer.convert_ids_to_tokens(beyond)!r}, id {beyond}",
                allowed=f"ids below {rows}, though the tokenizer has {len(base.tokenizer)}",
            )


def room_of(spec: RunSpec, base: Base) -> int:
    """Tokens that a document may have."""
    room = base.context - in_front(spec.method)
    return min(spec.data.max_length or room, room)


def documents(spec: RunSpec, chat: Chat, records: Records, longest: int) -> Tokenised:
    """What a run learns from or is measured on, as its config says. Raises `DataError` for rows of too few answers."""
    objective = OBJECTIVES[spec.objective.kind](spec.objective)
    with stage("tokenising"):
        found = cached_examples(
            chat,
            records,
            loss_on=spec.data.loss_on,
            max_length=longest,
            overflow=spec.data.overflow,
            rivals=objective.compares,
        )
    if (lonely := found.fewer_than(objective.at_least)) is not None:
        hint = "labelled answers are for loss: kto; pairs, rankings and ratings for all others"
        raise DataError("this row has one answer and nothing to compare it with", where=str(lonely), hint=hint)
    return found


def held_out(spec: RunSpec, chat: Chat, records: Records, base: Base) -> Tokenised:
    """Documents of held-out rows as they are asked, made as the run's own were."""
    found = documents(spec, chat, records, room_of(spec, base))
    _check_ids(found.examples, base)
    return found


def _prompted(spec: RunSpec, splits: Splits, chat: Chat, longest: int) -> Data:
    """The questions alone, for a policy that answers them itself. Raises `DataError` where rewards want answers."""
    source = getattr(spec.objective, "reward", None)
    if source is not None and not isinstance(source, ModelRewardSpec) and expects(source):
        for record in (*splits.train, *splits.validation):
            if record.unanswered or record.bad:
                what = "this reward compares with the expected answer, and this row has none"
                raise DataError(what, where=str(record.source), given=f"objective.reward.kind: {source.kind}")
    with stage("tokenising"):
        train = prompts(chat, splits.train, longest=longest, overflow=spec.data.overflow)
        held = splits.validation
        validation = prompts(chat, held, longest=longest, overflow=spec.data.overflow) if held else None
    return Data(splits, chat, train, validation, train.preflight())
