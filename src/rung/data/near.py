"""Near duplicates: word n-grams of held-out rows that also stand in the training rows, with the text that matches.

A flag alone misleads: on GSM8K 80 test questions share an 8-gram with the training questions, and 3 a 13-gram. So each
match carries its text and how much of the row it covers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rung.types import Record

GRAMS = (8, 13)
"""Lengths looked at: 13 as in GPT-3's contamination study (Brown et al. 2020, appendix C), 8 to see what comes near."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Near:
    """A held-out row and the training row that shares most n-grams with it."""

    held_out: str
    train: str
    containment: float
    """Share of the held-out row's n-grams that stand in the training row."""
    matched: str
    """The longest run of shared words."""

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.held_out} ~ {self.train} ({self.containment:.0%}): {self.matched}"


def words(text: str) -> list[str]:
    """Words, casefolded, without punctuation."""
    return _WORD.findall(text.casefold())


def near_duplicates(train: Iterable[Record], held_out: Iterable[Record], n: int) -> tuple[Near, ...]:
    """Held-out rows that share at least one n-gram of words with a training row, most covered first."""
    rows = [(record, _asked(record)) for record in held_out]
    wanted = {gram for _, asked in rows for gram in _grams(asked, n)}
    holders: dict[str, list[Record]] = {}
    for record in train:
        for gram in set(_grams(_asked(record), n)) & wanted:
            holders.setdefault(gram, []).append(record)
    found = [_nearest(record, asked, holders, n) for record, asked in rows]
    return tuple(sorted((x for x in found if x), key=lambda x: -x.containment))


def _nearest(record: Record, asked: list[str], holders: dict[str, list[Record]], n: int) -> Near | None:
    grams = _grams(asked, n)
    votes = Counter(id(r) for gram in set(grams) for r in holders.get(gram, ()))
    if not votes:
        return None
    best = votes.most_common(1)[0][0]
    shared = [any(id(r) == best for r in holders.get(gram, ())) for gram in grams]
    train = next(r for gram in grams for r in holders.get(gram, ()) if id(r) == best)
    start, length = _longest_run(shared)
    text = " ".join(asked[start : start + length + n - 1])
    return Near(str(record.source), str(train.source), sum(shared) / len(grams), text)


def _longest_run(flags: list[bool]) -> tuple[int, int]:
    best = (0, 0)
    start = 0
    for i, flag in enumerate([*flags, False]):
        if not flag:
            best = max(best, (start, i - start), key=lambda run: run[1])
            start = i + 1
    return best


def _asked(record: Record) -> list[str]:
    """The context and the turns before the answer, without system turns: those are shared by design."""
    if record.text is not None:
        return words(record.text)
    turns = [m.content for m in record.messages[:-1] if m.role != "system"]
    return words(" ".join([record.context or "", *turns]))


def _grams(asked: list[str], n: int) -> list[str]:
    return [" ".join(asked[i : i + n]) for i in range(len(asked) - n + 1)]
