"""Answers that are compared: pairs, rankings and ratings as scored alternatives, the best one first."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rung.data import turns
from rung.errors import DataError
from rung.spec.data import Format
from rung.types import Rival

SHOWN = 60
"""Characters of a wrong value that a message repeats."""


def rated(format: Format, get: Callable[[str], Any]) -> list[Rival]:
    """The answers of a row of a comparing format, best first; none for other formats.

    A pair scores 1 and 0, or its margin and 0; a ranking of k answers k - 1 down to 0; ratings as they are given; a
    labelled answer 1 or 0.
    Raises `DataError` for rows that compare nothing.
    """
    if format == "preference":
        margin = 1.0 if get("margin") is None else _score(get("margin"))
        if margin <= 0.0:
            raise DataError(f"the margin is {margin:g}: the chosen answer would be no better than the rejected one")
        found = [Rival(_answer(get("chosen"), "chosen"), margin), Rival(_answer(get("rejected"), "rejected"), 0.0)]
        if found[0].content == found[1].content:
            raise DataError("chosen and rejected are the same")
    elif format == "ranked":
        texts = [_answer(value, "ranked") for value in _list(get("ranked"), "ranked")]
        found = [Rival(text, float(len(texts) - 1 - place)) for place, text in enumerate(texts)]
    elif format == "rated":
        texts = [_answer(value, "answers") for value in _list(get("answers"), "answers")]
        scores = [_score(value) for value in _list(get("scores"), "scores")]
        if len(texts) != len(scores):
            raise DataError(f"{len(texts)} answers and {len(scores)} scores")
        found = sorted(map(Rival, texts, scores), key=lambda r: -r.score)
    elif format == "label":
        return [Rival(_answer(get("completion"), "completion"), _label(get("label")))]
    else:
        return []
    if len(found) < 2:
        raise DataError("one answer has nothing to be compared with")
    if len({r.content for r in found}) < len(found):
        raise DataError("two of the answers are the same")
    if found[0].score == found[-1].score:
        raise DataError("all answers have the same score")
    return found


def weight(value: object) -> float:
    """How often a row counts; a number as text will do. Raises `DataError` unless it is positive and finite."""
    number = 1.0 if value is None else _number(value)
    if not 0 < number < math.inf:
        raise DataError(f"weight is {_short(value)}, not a positive number")
    return number


def _number(value: object) -> float:
    """NaN for what is none: true and false, words, an integer that no float reaches."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _answer(value: object, name: str) -> str:
    """A text, a message, or a list of one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        (message,) = turns.from_messages([value], name)
        if message.role != "assistant":
            raise DataError(f"{name} is a turn of the {message.role}, not an answer")
        return message.content
    return turns.text_of(value, name)


def _label(value: object) -> float:
    if value not in (0, 1):  # True and False among them
        raise DataError(f"label is {value!r}, not true or false")
    return float(bool(value))


def _score(value: object) -> float:
    if isinstance(value, str) or not math.isfinite(number := _number(value)):
        raise DataError(f"a score is {_short(value)}, not a number")
    return number


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name} is no list")
    return value
