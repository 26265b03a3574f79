"""Dates, times of day and ratios in a text: `3:30 pm`, `May 3, 2023`, `2023-05-03`, `16:9`.

Their numbers are parts of one value: none of them alone is what the text says. A date of figures with slashes is kept
in the order in which it is written, since 3/5/2023 is in March or in May.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from rung.scoring.quantities import MONTH

UNSTATED = -1
"""The year or day of a date that has none."""

_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
_NAMED = re.compile(
    rf"\b({MONTH})\ {_DAY}(?!\d|[.,]\d|\ ?%)(?:,?\ ((?:1\d|20)\d\d)\b)?"
    rf"|(?<![\d.,])\b{_DAY}\ (?:of\ )?({MONTH})(?:,?\ ((?:1\d|20)\d\d)\b)?"
    rf"|\b({MONTH}),?\ ((?:1\d|20)\d\d)\b",
    re.IGNORECASE,
)
_FIGURES = re.compile(
    r"(?<![\w./-])(?:([12]\d{3})([-/.])(\d{1,2})\2(\d{1,2})|(\d{1,2})([-/.])(\d{1,2})\6((?:\d\d){1,2}))(?![\w/-]|\.\d)"
)
_TIME = re.compile(
    r"(?<![\w:.,/])(\d{1,2})(?::([0-5]\d)(?::([0-5]\d))?(?![\d:])(?:\s?([ap])\.?m\b\.?)?|\s?([ap])\.?m\b\.?)",
    re.IGNORECASE,
)
_RATIO = re.compile(r"(?<![\w:.,])\d{1,15}(?:\.\d{1,15})?(?:(?::|\s:\s)\d{1,15}(?:\.\d{1,15})?){1,4}(?![\w:])")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


class Moment(NamedTuple):
    """A date, time or ratio and where it stands."""

    start: int
    end: int
    kind: str
    """`date` (year, month, day), `figures` (as written), `time`, `clock` (with am or pm, of 24 hours) or `ratio`."""
    numbers: tuple[int, ...]


def moments(text: str) -> list[Moment]:
    """All dates, times and ratios of a text, in order, none within another."""
    kept: list[Moment] = []
    for moment in sorted(
        (*_named(text), *_figures(text), *_times(text), *_ratios(text)), key=lambda m: (m.start, -m.end)
    ):
        if not kept or moment.start >= kept[-1].end:
            kept.append(moment)
    return kept


def _named(text: str) -> Iterator[Moment]:
    for match in _NAMED.finditer(text):
        groups = match.groups()
        month = groups[0] or groups[4] or groups[6]
        day, year = groups[1] or groups[3], groups[2] or groups[5] or groups[7]
        numbers = (int(year or UNSTATED), _MONTHS.index(month[:3].lower()) + 1, int(day or UNSTATED))
        yield Moment(match.start(), match.end(), "date", numbers)


def _figures(text: str) -> Iterator[Moment]:
    for match in _FIGURES.finditer(text):
        year, _, month, day, *rest = match.groups()
        if year:
            yield Moment(match.start(), match.end(), "date", (int(year), int(month), int(day)))
        else:
            yield Moment(match.start(), match.end(), "figures", (int(rest[0]), int(rest[2]), int(rest[3])))


def _times(text: str) -> Iterator[Moment]:
    for match in _TIME.finditer(text):
        hour, minute, second = int(match[1]), int(match[2] or 0), int(match[3] or 0)
        half = (match[4] or match[5] or "").lower()
        if half and 0 < hour <= 12:
            yield Moment(match.start(), match.end(), "clock", (hour % 12 + 12 * (half == "p"), minute, second))
        elif not half and hour < 24:
            yield Moment(match.start(), match.end(), "time", (hour, minute, second))


def _ratios(text: str) -> Iterator[Moment]:
    for match in _RATIO.finditer(text):
        parts = [Fraction(part) for part in match[0].replace(" ", "").split(":")]
        # 4:2 is 2:1
        whole = [int(part * math.lcm(*(p.denominator for p in parts))) for part in parts]
        divisor = math.gcd(*whole) or 1
        yield Moment(match.start(), match.end(), "ratio", tuple(number // divisor for number in whole))
