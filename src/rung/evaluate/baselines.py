"""What stands around a question: nothing for a tuned model, the best honest prompt for an untuned one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rung.data.chat import in_context
from rung.data.records import distinct
from rung.errors import DataError
from rung.types import Message, Record


@dataclass(frozen=True, slots=True)
class Framing:
    """How each question is put."""

    instruction: str | None = None
    shots: tuple[Record, ...] = ()
    context: bool = True
    """Whether the row's own context stands in the prompt."""

    def turns(self, record: Record) -> tuple[Message, ...]:
        """All turns up to the answer: instruction, worked examples, the question."""
        own = [m for m in self._asked(record) if m.role != "system"]
        system = [self.instruction, *(m.content for m in record.messages if m.role == "system")]
        head = "\n\n".join(text for text in system if text)
        worked = [turn for shot in self.shots for turn in (*self._without_system(shot), shot.messages[-1])]
        return (*((Message("system", head),) if head else ()), *worked, *own)

    def _without_system(self, record: Record) -> list[Message]:
        return [m for m in self._asked(record) if m.role != "system"]

    def _asked(self, record: Record) -> list[Message]:
        """The turns before the answer, the context in front of the first question."""
        turns = list(record.messages[:-1])
        if record.context and self.context:
            first = next(i for i, m in enumerate(turns) if m.role == "user")
            turns[first] = replace(turns[first], content=in_context(record.context, turns[first].content))
        return turns


def choose_shots(train: Sequence[Record], count: int, seed: int) -> tuple[Record, ...]:
    """Worked examples drawn from the training split, from different groups as long as there are enough.

    Raises `DataError` when the split has fewer rows than asked for.
    """
    if not count:
        return ()
    found = distinct(train)  # a weighted row stands in the split several times
    usable = found[[not train[int(i)].bad for i in found]]
    if len(usable) < count:
        raise DataError(
            f"{count} worked examples are wanted and the training split has {len(usable)} rows", where="evaluate.shots"
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
