"""Prompt formats: instruction and worked examples around a question.

A tuned model gets the bare question, as in its training. An untuned one gets the best prompt that the training split
allows, so that tuning is compared with honest prompting. Worked examples come from the training split only. Fixed
examples are encoded once for all questions; nearest examples fit better but cost their prompt at every question.
`commands.climb_prompts` chooses the format, `evaluate` applies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rung.config.evaluation import ExampleSelection
from rung.data.chat import turns_with_context
from rung.data.records import distinct_conversations
from rung.errors import DataError
from rung.evaluation.retrieval import Bm25Index
from rung.scoring.words import search_words
from rung.types import Message, Record

Shots = tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """The prompt of each question: instruction, worked examples, then the question behind its context."""

    instruction: str | None = None
    shots: Shots = ()
    """Worked examples before every question, encoded once for all."""
    nearest_shots: Callable[[Record], Shots] | None = None
    """Worked examples chosen for each question instead."""
    choices: tuple[str, ...] = ()
    """Labels that the instruction lists."""

    def turns(self, record: Record) -> tuple[Message, ...]:
        """All turns before the answer: instruction, worked examples, question."""
        # One system turn in front: templates refuse a second one, or one after the examples.
        labels = "\n".join(["Answer with one of these labels:", *self.choices]) if self.choices else None
        system_parts = [self.instruction, labels, *(m.content for m in record.messages if m.role == "system")]
        system_text = "\n\n".join(text for text in system_parts if text)
        shots = self.nearest_shots(record) if self.nearest_shots else self.shots
        example_turns = [turn for shot in shots for turn in (*_question_turns(shot), shot.messages[-1])]
        system_turns = (Message("system", system_text),) if system_text else ()
        return (*system_turns, *example_turns, *_question_turns(record))


def _question_turns(record: Record) -> list[Message]:
    """The turns before the answer without those of the system, with the context in the first question."""
    return [m for m in turns_with_context(record.messages[:-1], record.context) if m.role != "system"]


def choose_shots(train: Sequence[Record], count: int, seed: int, selection: ExampleSelection = "random") -> Shots:
    """A fixed set of worked examples from the training split: random, or with `coverage` those of `coverage_shots`.

    Random examples come from different groups as long as there are enough. Raises `DataError` when the split has too
    few rows.
    """
    if not count:
        return ()
    usable = _usable_records(train, count)
    if selection == "coverage":
        return tuple(train[int(usable[i])] for i in coverage_shots(_words(train, usable), count))
    # a permutation, not a sample: a larger count extends the smaller set
    order = usable[np.random.default_rng([seed, 1]).permutation(len(usable))].tolist()
    shots: dict[int, Record] = {}
    groups: set[str | None] = set()
    for i in order:
        if len(shots) == count:
            break
        record = train[i]
        if record.group is None or record.group not in groups:
            shots[i] = record
            groups.add(record.group)
    # fewer groups than examples: fill up with rows of groups that are already represented
    spare = (i for i in order if i not in shots)
    return (*shots.values(), *(train[next(spare)] for _ in range(count - len(shots))))


def nearest_shots(train: Sequence[Record], count: int) -> Callable[[Record], Shots]:
    """For each question the `count` training rows whose questions score highest by BM25, the nearest last.

    The nearest is next to the question (Liu et al. 2022, arXiv 2101.06804, section 2). Of rows with equal scores the
    earlier is nearer, rows without a common word included, so there are always `count`. Raises `DataError` when the
    split has too few rows.
    """
    usable = _usable_records(train, count)
    index = Bm25Index(_words(train, usable))

    def nearest(record: Record) -> Shots:
        # a stable sort, so that ties do not depend on numpy's algorithm
        order = np.argsort(-index.scores(search_words(record.question)), kind="stable")[:count]
        return tuple(train[int(usable[i])] for i in order[::-1])

    return nearest


def coverage_shots(texts: Sequence[Sequence[str]], count: int) -> list[int]:
    """Indices of `count` texts that together cover the words of all: greedy weighted maximum coverage.

    The weight of a word is the number of texts that contain it; each step takes the text with the largest weight of
    words not covered yet, the earliest of equal ones. The covered weight is at least 1 - 1/e of what any `count` texts
    could cover (Nemhauser, Wolsey and Fisher 1978, section 4; for worked examples: Gupta et al. 2023, arXiv
    2305.14907). Once everything is covered, all words count again.
    """
    # imported here: only this choice of examples needs scipy.sparse
    from scipy.sparse import csr_array

    word_index: dict[str, int] = {}
    rows = [sorted({word_index.setdefault(word, len(word_index)) for word in text}) for text in texts]
    ends = np.cumsum([0, *map(len, rows)])
    columns = np.array([column for row in rows for column in row], dtype=np.int64)
    # sparse: a dense matrix of 10,000 texts by 30,000 words would take 2.4 GB
    incidence = csr_array((np.ones(len(columns)), columns, ends), shape=(len(rows), max(1, len(word_index))))
    weights = incidence.sum(axis=0)
    remaining, available = weights.copy(), np.ones(len(rows), dtype=bool)
    indices: list[int] = []
    for _ in range(min(count, len(rows))):
        gains = np.where(available, incidence @ remaining, -1.0)
        if gains.max() == 0.0:
            remaining = weights.copy()
            gains = np.where(available, incidence @ remaining, -1.0)
        best = int(gains.argmax())
        indices.append(best)
        available[best] = False
        remaining[rows[best]] = 0.0
    return indices


def _words(train: Sequence[Record], rows: NDArray[np.int64]) -> list[list[str]]:
    """Words of the questions."""
    return [search_words(train[int(i)].question) for i in rows]


def _usable_records(train: Sequence[Record], count: int) -> NDArray[np.int64]:
    distinct = distinct_conversations(train)  # a weighted row is in the split several times
    # an answer that is missing, labeled as undesirable or not to be learned is no example to follow
    records = (train[int(i)] for i in distinct)
    unusable = [record.is_undesirable or record.is_excluded or record.is_prompt_only for record in records]
    usable: NDArray[np.int64] = distinct[np.logical_not(unusable)]
    if len(usable) < count:
        summary = f"{count} worked examples are wanted and the training split has {len(usable)} rows with an answer"
        raise DataError(summary, where="evaluation.shots")
    return usable
