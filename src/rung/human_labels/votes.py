"""What a person says of a task: the four kinds of votes, read from what a page sends and kept as JSON.

A vote refers to answers by their indices in the item, never by the order in which they were shown, so that no reader of
the database has to know that order to understand a vote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rung.errors import DataError
from rung.human_labels.tasks import LabelKind, Task

if TYPE_CHECKING:
    from rung.scoring.pairwise import Outcome  # loads scipy, which the page does not need

SIDES = ("left", "right", "tie", "both_bad")
"""What a comparison may say of the two answers as they are shown."""
MAX_TEXT = 100_000
"""Characters of a corrected answer."""
MAX_NOTE = 5_000
Kind = Literal["rank", "compare", "rate", "correct", "skipped"]


class Comparison(NamedTuple):
    """Two answers of an item and which of them a person prefers."""

    first: int
    second: int
    outcome: Outcome
    is_both_bad: bool = False


class Vote(NamedTuple):
    """One vote. Fields that its kind does not have are None."""

    kind: Kind
    ranks: Mapping[int, int] | None = None
    """Of `rank`: rank of each answer, 1 for the best, equal ranks for ties."""
    outcome: Comparison | None = None
    """Of `compare`."""
    score: int | None = None
    """Of `rate`."""
    text: str | None = None
    """Of `correct`."""
    is_bad: bool = False
    """Of `rank` and `compare`: no answer is good enough to be learned from."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the database."""
        values: dict[str, Any] = {"kind": self.kind}
        if self.ranks is not None:
            values |= {"ranks": {str(i): rank for i, rank in self.ranks.items()}, "bad": self.is_bad}
        if self.outcome is not None:
            values |= {"first": self.outcome.first, "second": self.outcome.second, "outcome": self.outcome.outcome}
            values["bad"] = self.is_bad
        return values | {n: v for n, v in (("score", self.score), ("text", self.text)) if v is not None}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Vote:
        """The vote of `to_json`."""
        is_bad = bool(values.get("bad", False))
        ranks = {int(i): int(rank) for i, rank in values["ranks"].items()} if "ranks" in values else None
        outcome = None
        if "outcome" in values:
            outcome = Comparison(int(values["first"]), int(values["second"]), values["outcome"], is_bad)
        return Vote(values["kind"], ranks, outcome, values.get("score"), values.get("text"), is_bad)

    def comparisons(self) -> list[Comparison]:
        """Every pair of answers that the vote compares."""
        if self.outcome is not None:
            return [self.outcome]
        if self.ranks is None:
            return []
        pairs = combinations(sorted(self.ranks), 2)
        return [Comparison(i, k, _outcome(self.ranks[i], self.ranks[k]), self.is_bad) for i, k in pairs]


SKIPPED = Vote("skipped")


def _outcome(first_rank: int, second_rank: int) -> Outcome:
    return "tie" if first_rank == second_rank else "first" if first_rank < second_rank else "second"


def parse_vote(kind: LabelKind, task: Task, shown: Sequence[int], scale: int, form: Mapping[str, str]) -> Vote:
    """The vote in the fields of a form. Raises `DataError` for anything that the page cannot send.

    `choice` is a side of `SIDES`; `rank_0`, `rank_1`… are the ranks of the answers in the order in which they are
    shown; `score` is a number from 1 to `scale`; `text` is the corrected answer; `skip` skips the task.
    """
    if form.get("skip"):
        return SKIPPED
    if kind == "compare":
        return _comparison(shown, form.get("choice", ""))
    if kind == "rank":
        return _ranking(shown, form)
    if kind == "rate":
        return Vote("rate", score=_number(form.get("score", ""), 1, scale, "score"))
    text = form.get("text", "").replace("\r\n", "\n").strip()
    if not text:
        raise DataError("the corrected answer is empty", hint="skip the task if there is no good answer")
    if len(text) > MAX_TEXT:
        raise DataError("the corrected answer is too long", given=len(text), allowed=f"{MAX_TEXT:,} characters")
    return Vote("correct", text=text)


def _comparison(shown: Sequence[int], choice: str) -> Vote:
    if choice not in SIDES:
        raise DataError("no such choice", given=choice, allowed=", ".join(SIDES))
    first, second = sorted(shown)
    is_bad = choice == "both_bad"
    if choice in ("tie", "both_bad"):
        return Vote("compare", outcome=Comparison(first, second, "tie", is_bad), is_bad=is_bad)
    preferred = shown[0] if choice == "left" else shown[1]
    return Vote("compare", outcome=Comparison(first, second, "first" if preferred == first else "second"))


def _ranking(shown: Sequence[int], form: Mapping[str, str]) -> Vote:
    given = [_number(form.get(f"rank_{place}", ""), 1, len(shown), "rank") for place in range(len(shown))]
    # 1, 3, 3 is 1, 2, 2: ranks say which answers are better, not by how much
    dense = {rank: number for number, rank in enumerate(sorted(set(given)), 1)}
    ranks = {answer: dense[rank] for answer, rank in zip(shown, given, strict=True)}
    return Vote("rank", ranks=dict(sorted(ranks.items())), is_bad=form.get("bad") == "1")


def _number(text: str, low: int, high: int, name: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 4 and low <= int(text) <= high):
        raise DataError(f"every answer needs a {name}" if not text else f"no such {name}", given=text or None)
    return int(text)
