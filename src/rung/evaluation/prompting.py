"""What stands around a question: nothing for a tuned model, the best honest prompt for an untuned one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rung.config.climb import ExampleSelection
from rung.data.chat import with_context
from rung.data.records import distinct_conversations
from rung.errors import DataError
from rung.evaluation.retrieval import Bm25Index, query_words
from rung.types import Message, Record

Shots = tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How each question is put, behind the context that its record has."""

    instruction: str | None = None
    shots: Shots = ()
    """Worked examples in front of every question: encoded once for all."""
    nearest_shots: Callable[[Record], Shots] | None = None
    """Worked examples of each question's own, instead."""

    def turns(self, record: Record) -> tuple[Message, ...]:
        """All turns up to the answer: instruction, worked examples, the question."""
        own = [m for m in _prompt_turns(record) if m.role != "system"]
        system = [self.instruction, *(m.content for m in record.messages if m.role == "system")]
        head = "\n\n".join(text for text in system if text)
        shots = self.nearest_shots(record) if self.nearest_shots else self.shots
        worked = [turn for shot in shots for turn in (*_without_system(shot), shot.messages[-1])]
        return (*((Message("system", head),) if head else ()), *worked, *own)


def _without_system(record: Record) -> list[Message]:
    return [m for m in _prompt_turns(record) if m.role != "system"]


def _prompt_turns(record: Record) -> list[Message]:
    """The turns before the answer, the context in front of the first question."""
    turns = list(record.messages[:-1])
    if record.context:
        first = next(i for i, m in enumerate(turns) if m.role == "user")
        turns[first] = replace(turns[first], content=with_context(record.context, turns[first].content))
    return turns


def choose_shots(train: Sequence[Record], count: int, seed: int, choose: ExampleSelection = "random") -> Shots:
    """A fixed set of worked examples out of the training split: drawn, or with `coverage` those of `covering`.

    Drawn ones are from different groups as long as there are enough. Raises `DataError` when the split has fewer rows
    than asked for.
    """
    if not count:
        return ()
    usable = _usable_records(train, count)
    if choose == "coverage":
        return tuple(
            train[int(usable[i])] for i in coverage_shots([query_words(train[int(i)].question) for i in usable], count)
        )
    order = usable[np.random.default_rng([seed, 1]).permutation(len(usable))].tolist()
    chosen: dict[int, Record] = {}
    groups: set[str | None] = set()
    for i in order:
        if len(chosen) == count:
            break
        record = train[i]
        if record.group is None or record.group not in groups:
            chosen[i] = record
            groups.add(record.group)
    rest = (i for i in order if i not in chosen)
    return (*chosen.values(), *(train[next(rest)] for _ in range(count - len(chosen))))


def nearest_shots(train: Sequence[Record], count: int) -> Callable[[Record], Shots]:
    """For a question the `count` training rows whose questions score highest by BM25, the nearest last.

    The nearest stands next to the question (Liu et al. 2022, arXiv 2101.06804, section 2). Of rows that score alike the
    earlier is nearer, those without a common word included, so there are always `count`. Raises `DataError` when the
    split has fewer rows than asked for.
    """
    usable = _usable_records(train, count)
    index = Bm25Index([query_words(train[int(i)].question) for i in usable])

    def nearest(record: Record) -> Shots:
        order = np.argsort(-index.scores(query_words(record.question)), kind="stable")[:count]
        return tuple(train[int(usable[i])] for i in order[::-1])

    return nearest


def coverage_shots(texts: Sequence[Sequence[str]], count: int) -> list[int]:
    """Numbers of `count` texts that together cover the words of all: weighted maximum coverage, greedily.

    A word weighs as many texts as it stands in; each step takes the text whose words not yet covered weigh most, of
    equal ones the earliest. What is covered weighs at least 1 - 1/e of what any `count` texts could cover (Nemhauser,
    Wolsey and Fisher 1978, section 4; for worked examples: Gupta et al. 2023, arXiv 2305.14907). Where nothing is left
    to cover, all words count anew.
    """
    from scipy.sparse import csr_array

    number: dict[str, int] = {}
    rows = [sorted({number.setdefault(word, len(number)) for word in text}) for text in texts]
    ends = np.cumsum([0, *map(len, rows)])
    columns = np.array([column for row in rows for column in row], dtype=np.int64)
    holds = csr_array((np.ones(len(columns)), columns, ends), shape=(len(rows), max(1, len(number))))
    weights: NDArray[np.float64] = np.bincount(columns, minlength=max(1, len(number))).astype(np.float64)
    left, free = weights.copy(), np.ones(len(rows), dtype=bool)
    chosen: list[int] = []
    for _ in range(min(count, len(rows))):
        gains = np.where(free, holds @ left, -1.0)
        if gains.max() == 0.0:
            left = weights.copy()
            gains = np.where(free, holds @ left, -1.0)
        taken = int(gains.argmax())
        chosen.append(taken)
        free[taken] = False
        left[rows[taken]] = 0.0
    return chosen


def _usable_records(train: Sequence[Record], count: int) -> NDArray[np.int64]:
    found = distinct_conversations(train)  # a weighted row stands in the split several times
    usable: NDArray[np.int64] = found[[not train[int(i)].is_undesirable for i in found]]
    if len(usable) < count:
        raise DataError(
            f"{count} worked examples are wanted and the training split has {len(usable)} rows",
            where="evaluation.shots",
        )
    return usable
