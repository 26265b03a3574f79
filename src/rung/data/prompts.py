"""Rows as prompts alone: for objectives whose answers the policy makes itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rung.data.chat import Chat, Preflight
from rung.data.tokenise import Overflow
from rung.errors import DataError
from rung.types import Example, Record

PROBED = 8
"""Tokens at the end of a prompt that the gates look at."""


@dataclass(frozen=True)
class Prompted:
    """Prompts in the order of their records; the `row` of each is its place here."""

    examples: list[Example]
    records: list[Record]
    """Of each prompt."""
    dropped: int

    @property
    def rows(self) -> list[list[Example]]:
        """A prompt each."""
        return [[example] for example in self.examples]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each."""
        return np.array([len(e) for e in self.examples], dtype=np.int64)

    def summary(self) -> dict[str, Any]:
        """Counts for `run.json`."""
        lengths = self.lengths
        counts = {"examples": len(lengths), "tokens": int(lengths.sum()), "supervised_tokens": 0}
        return {**counts, "longest": int(lengths.max()), "dropped": self.dropped, "trimmed": 0}

    def preflight(self) -> Preflight:
        """What gate 1 has to say: there is nothing supervised that could be wrong."""
        n = len(self.examples)
        return Preflight(n, 0, int(self.lengths.sum()), 0, normalised=0, boundary_checked=0, boundary_differences=0)


def prompts(chat: Chat, records: Sequence[Record], *, longest: int, overflow: Overflow) -> Prompted:
    """Every question as the template puts it, up to where the answer begins, at most `longest` tokens.

    Raises `DataError` for rows without turns, and for prompts that are too long unless `overflow` is `drop`.
    """
    kept: list[Example] = []
    own: list[Record] = []
    long: list[tuple[Record, int]] = []
    for record in records:
        if not record.messages:
            hint = "give rows with a question"
            raise DataError("plain text has no question to answer", where=str(record.source), hint=hint)
        ids = chat.prompt_ids(record.messages[:-1], context=record.context, tools=record.tools)
        if len(ids) > longest:
            long.append((record, len(ids)))
            continue
        whole = np.array(ids, dtype=np.int32)
        # the end of it as if it were an answer, for the gates alone: what is learned from are answers of the policy
        supervised = np.arange(len(whole)) >= max(1, len(whole) - PROBED)
        kept.append(Example(whole, supervised, record.source, record.weight, record.group, record.task, row=len(kept)))
        own.append(record)
    if long and overflow != "drop":
        lines = [f"{record.source}: {length} tokens" for record, length in long[:10]]
        raise DataError(
            f"{len(long)} of {len(records)} prompts leave no room for an answer",
            given=f"at most {longest} tokens",
            hint="\n  ".join([*lines, "a smaller max_new_tokens leaves more; data.overflow: drop leaves them out"]),
        )
    if not kept:
        raise DataError("no prompt is left", given=f"{len(long)} dropped for their length")
    return Prompted(kept, own, len(long))
