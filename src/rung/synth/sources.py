"""What a teacher begins with: seeds, passages, labels, and the questions that must never be among its rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from rung.config.data import DataConfig
from rung.config.evaluation import RetrievalConfig
from rung.config.synth import TeachConfig
from rung.console import print_status
from rung.data.chat import turns_with_context
from rung.data.columns import SYNONYMS
from rung.data.formats import LoadedRows, proposes_data_settings
from rung.data.rows import columns_of
from rung.data.splits import load_sets
from rung.errors import DataError
from rung.evaluation.retrieval import read_documents, split_passages
from rung.inference.ask import Conversation
from rung.synth.filters import LeakFilter, Rejection, check_refusal
from rung.synth.requests import WorkedExample
from rung.types import Message, Record, Source

_ANSWERS = {
    name for known in ("answer", "completion", "output", "chosen", "messages") for name in (known, *SYNONYMS[known])
}


@dataclass(frozen=True, slots=True)
class Seed:
    """A row of the task."""

    record: Record

    @property
    def turns(self) -> tuple[Message, ...]:
        """Its turns before the answer."""
        return self.record.messages[:-1]

    @property
    def question(self) -> str:
        """The last question."""
        return self.record.question

    @property
    def answer(self) -> str:
        """The answer; empty where there is none."""
        return self.record.answer

    @property
    def context(self) -> str | None:
        """The context of the question."""
        return self.record.context

    @property
    def source(self) -> str:
        """File and line."""
        return str(self.record.source)

    @property
    def conversation(self) -> Conversation:
        """Its question as a user asks it, with the context."""
        return Conversation(tuple(turns_with_context(self.turns, self.context)))

    @property
    def worked_example(self) -> WorkedExample:
        """The seed as an example; as a text, its answer is the label."""
        return WorkedExample(self.question, self.answer, self.context, self.answer, self.source)


@dataclass(frozen=True)
class TeachSources:
    """Everything that requests are made of."""

    seeds: Sequence[Seed]
    passages: Sequence[str]
    labels: Sequence[str]
    never: LeakFilter
    """The questions that must not occur."""

    @staticmethod
    def read(config: TeachConfig) -> TeachSources:
        """Read the files of a config. Raises `DataError` for seeds that cannot be used."""
        with_answers = config.questions == "made"
        seeds = read_seeds(config.seeds, with_answers=with_answers, where="synth.seeds") if config.seeds else []
        passages: list[str] = []
        if config.documents:
            documents = RetrievalConfig(documents=config.documents.path, column=config.documents.column)
            texts = read_documents(documents, "synth.documents")
            # without overlap: the same sentence would be asked about twice
            passages = [p for text in texts for p in split_passages(text, config.documents.chunk_words, 0)]
        labels = config.makes.labels or (
            tuple(dict.fromkeys(s.answer for s in seeds)) if config.makes.kind == "labels" else ()
        )
        if config.makes.kind == "labels" and (strange := {s.answer for s in seeds} - set(labels)):
            summary = "a seed has a label that is not among synth.makes.labels"
            raise DataError(summary, where=config.seeds, given=sorted(strange)[0], allowed=", ".join(labels))
        never = LeakFilter(record for path in config.never for record in read_records(path, "synth.never"))
        sources = TeachSources(seeds, passages, labels, never)
        for seed in seeds:
            if (leak := sources.check_leak(seed.turns, seed.context)) is not None:
                hint = "take the row out of the seeds: they stand before the teacher's requests"
                raise DataError("a seed asks what synth.never names", where=seed.source, given=leak.reason, hint=hint)
        return sources

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that requests are made of, and of what must not occur."""
        seeds = [[[asdict(turn) for turn in seed.record.messages], columns_of(seed.record)] for seed in self.seeds]
        content = [seeds, list(self.passages), list(self.labels), self.never.questions]
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def seed_order(self, seed: int) -> NDArray[np.int64]:
        """The order in which seeds are answered: files are often sorted, and a part of them may be enough."""
        return np.random.default_rng([seed, 8]).permutation(len(self.seeds))

    def passage_order(self, seed: int) -> NDArray[np.int64]:
        """The order in which passages are asked about: each once before any is asked about again."""
        return np.random.default_rng([seed, 7]).permutation(len(self.passages))

    def answer_examples(self, config: TeachConfig) -> dict[str, WorkedExample]:
        """Seeds as worked examples of answers, by source; explanations have another form than the seeds' answers."""
        if config.makes.kind == "explanations":
            return {}
        return {seed.source: seed.worked_example for seed in self.seeds}

    @cached_property
    def seeds_refuse(self) -> bool:
        """Whether the task itself has answers that decline: then declining is no fault."""
        return any(check_refusal(seed.answer) is not None for seed in self.seeds)

    def check_leak(self, turns: Sequence[Message], context: str | None) -> Rejection | None:
        """`leak`: the question, with its context, is one of the files that must not occur."""
        return self.never.check(made_record(turns, context, 0))


def made_record(turns: Sequence[Message], context: str | None, number: int) -> Record:
    """A question that was made, as a row without an answer."""
    return Record((*turns, Message("assistant", "")), Source("made", number), context)


def read_seeds(path: str, *, with_answers: bool, where: str) -> list[Seed]:
    """The rows of a file as seeds; `where` is the setting that names it. Raises `DataError` for unusable rows."""
    seeds = []
    for record in read_records(path, where):
        if record.text is not None or not record.messages:
            raise DataError("plain text has no question", where=str(record.source), hint="give rows with questions")
        if record.tools:
            summary = "a teacher writes text, and this seed offers tools"
            raise DataError(summary, where=str(record.source), hint=f"leave such rows out of {where}")
        if record.is_undesirable or record.is_excluded or (with_answers and not record.answer):
            continue
        seeds.append(Seed(record))
    longer = sum(len(seed.turns) > 1 for seed in seeds)
    if with_answers and longer:
        print_status(f"{longer:,} of {len(seeds):,} seeds have turns before their question, which examples leave out")
    if not seeds:
        missing = "no row has an answer, and new rows are made after the example of whole ones"
        raise DataError(missing if with_answers else "there are no seeds", where=path)
    return seeds


def _read_prompts(path: str) -> list[LoadedRows] | None:
    """Rows without answers, in a column `prompt` or `question`; None where there is neither."""
    for columns in ({}, {"prompt": "question"}):
        try:
            loaded = load_sets(DataConfig(path=path, format="prompt_only", map=columns))
        except DataError:
            continue
        # with a column of answers the rows were to be read with them, and another error says why they were not
        return None if any(_ANSWERS & set(map(str.lower, rows.detection.unused)) for rows in loaded) else loaded
    return None


def read_records(path: str, place: str) -> list[Record]:
    """All rows of the file that the setting `place` names; prompts alone where it has no format with answers."""
    try:
        loaded = load_sets(DataConfig(path=path))
    except DataError as error:
        prompts = _read_prompts(path)
        if prompts is None and proposes_data_settings(error):
            remedy = "give its columns the names question and answer"
            if "rows cannot be used" in error.summary:  # its columns are right
                remedy = "\n  ".join([*str(error.hint).split("\n  ")[:-1], "mend them, or leave them out"])
            hint = f"{remedy}; {place} takes files alone, without settings of data"
            raise DataError(error.summary, where=error.where, given=error.given, hint=hint) from None
        if prompts is None:
            raise
        loaded = prompts
    return [record for rows in loaded for record in rows.records]
