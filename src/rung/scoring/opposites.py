"""Opposites that stand beside a number: `at least 5` and `at most 5`, `10 BC` and `10 AD`, `40 N` and `40 S`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rung.scoring.quantities import Number, numbers_agree, parse_numeral

# axis: the words of its one side and of its other side, before a number
_BEFORE = {
    "bound": (
        r"at least|(?:no|not) (?:less|fewer|lower|smaller|under) than|(?:more|greater|larger|higher|longer|later) than"
        r"|over|above|after|exceeding|minimum(?: of)?",
        r"at most|(?:no|not) (?:more|greater|larger|higher|longer|later) than"
        r"|(?:less|fewer|lower|smaller|shorter|earlier) than|under|below|before|up to|maximum(?: of)?",
    ),
    "era": (r"A\.?D\b\.?", r"B\.?C\b\.?"),
}
# and behind one
_BEHIND = {
    "bound": (
        r"(?:or|and) (?:more|above|over|greater|higher|larger|longer|later)\b|\+(?!\s*\d)",
        r"(?:or|and) (?:less|fewer|below|under|lower|smaller|shorter|earlier)\b",
    ),
    "era": (r"(?:A\.?D|C\.?E)\b", r"B\.?C(?:\.?E)?\b"),
    "latitude": (r"(?-i:N)\b|north(?:ern)?\b", r"(?-i:S)\b|south(?:ern)?\b"),
    "longitude": (r"(?-i:E)\b|east(?:ern)?\b", r"(?-i:W)\b|west(?:ern)?\b"),
    "height": (r"above\b", r"below\b"),
    "time": (r"(?:late|later|after|hence|from now)\b", r"(?:early|earlier|before|ago)\b"),
    "place": (r"ahead\b", r"behind\b"),
    "turn": (r"clockwise\b", r"(?:counter-?|anti-?)clockwise\b"),
}
_NUMBER = r"(?<![\w,.])(\d[\d,]{0,30}(?:\.\d{1,30})?)"


def _sides(words: dict[str, tuple[str, str]]) -> str:
    return "|".join(f"({side})" for sides in words.values() for side in sides)


_BEFORE_NUMBER = re.compile(rf"\b(?:{_sides(_BEFORE)})\s+(?:[a-z]{{3}}\s)?[^\w\s,.;]{{0,3}}{_NUMBER}", re.IGNORECASE)
# a unit may stand between: `5 minutes late`
_BEHIND_NUMBER = re.compile(rf"{_NUMBER}\s?[\u00b0%]?\s?(?:[a-z]{{1,12}}\s)??(?:{_sides(_BEHIND)})", re.IGNORECASE)


class Side(NamedTuple):
    """One of two opposites, and the number beside which it stands."""

    axis: str
    sign: int
    number: Number


def sides(text: str) -> list[Side]:
    """The opposites beside the numbers of a text."""
    found: list[tuple[int, Side]] = []
    for match in _BEFORE_NUMBER.finditer(text):
        *words, number = match.groups()
        found.append((match.start(), _side(_BEFORE, words, number)))
    for match in _BEHIND_NUMBER.finditer(text):
        number, *words = match.groups()
        found.append((match.start(), _side(_BEHIND, words, number)))
    return [side for _, side in sorted(found, key=lambda pair: pair[0])]


def _side(axes: dict[str, tuple[str, str]], words: Sequence[str | None], number: str) -> Side:
    which = next(i for i, word in enumerate(words) if word)
    return Side(list(axes)[which // 2], -1 if which % 2 else 1, parse_numeral(number))


def contradicts(text: str, wanted: Iterable[Side], numbers: Sequence[Number] = ()) -> bool:
    """Whether a text has the opposite side beside the same number; a text without a side leaves it to the question.

    `numbers` are those that the text states in place of the wanted ones, such as 5,000,000 for 5 million.
    """
    stated = sides(text)
    for side in wanted:
        same = [s for s in stated if s.axis == side.axis and _is_one_of(s.number, (side.number, *numbers))]
        if same and same[-1].sign != side.sign:
            return True
    return False


def _is_one_of(number: Number, numbers: Iterable[Number]) -> bool:
    return any(numbers_agree(number, other) for other in numbers)
