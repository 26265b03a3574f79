"""Compared and labeled answers of a row: pairs, rankings, ratings and single answers marked as good or bad.

An answer is text or an assistant turn, whose tool calls and reasoning belong to it: two answers that differ only in a
call are different. Scores order answers; their scale is that of the data. All functions raise `DataError` with the bare
reason; `formats` adds the line of the row. `conversations` calls `parse_answers`.
"""

from __future__ import annotations

import math
from typing import Any

from rung.config.data import Format
from rung.data.content_parts import is_parts
from rung.data.messages import Getter, TurnFields, from_messages, number_of, short_repr, text_of
from rung.errors import DataError
from rung.types import Candidate, Message

_LABELS = {"true": 1.0, "1": 1.0, "false": 0.0, "0": 0.0}
"""Labels as text, as csv files have them."""


def parse_answers(format: Format, get: Getter, fields: TurnFields) -> list[Candidate]:
    """The answers of a row of a comparison format without pairs, best first; an empty list for other formats.

    A ranking of k answers scores k - 1 down to 0; ratings keep their scores; a labeled answer scores 1 or 0. Raises
    `DataError` for rows that compare nothing.
    """
    if format == "ranked":
        answers = [parse_answer(value, "ranked", fields) for value in _answer_list(get("ranked"), "ranked")]
        candidates = [_candidate(answer, float(len(answers) - 1 - rank)) for rank, answer in enumerate(answers)]
    elif format == "rated":
        answers = [parse_answer(value, "answers", fields) for value in _answer_list(get("answers"), "answers")]
        scores = [_score(value) for value in _answer_list(get("scores"), "scores")]
        if len(answers) != len(scores):
            raise DataError(f"{len(answers)} answers and {len(scores)} scores")
        # a stable sort: equal ratings keep the order of the file
        candidates = sorted(map(_candidate, answers, scores), key=lambda candidate: -candidate.score)
    elif format == "unpaired_preference":
        return [_candidate(parse_answer(get("completion"), "completion", fields), parse_label(get("label")))]
    else:
        return []
    return _checked(candidates)


def pair_candidates(get: Getter, chosen: Message, rejected: Message) -> list[Candidate]:
    """The answers of a pair, which score 1 and 0, or their margin and 0. Raises `DataError` for equal answers."""
    margin = 1.0 if get("margin") in (None, "") else _score(get("margin"))
    if margin <= 0.0:
        raise DataError(f"the margin is {margin:g}: the chosen answer would be no better than the rejected one")
    if chosen == rejected:
        raise DataError("chosen and rejected are the same")
    return _checked([_candidate(chosen, margin), _candidate(rejected, 0.0)])


def _checked(candidates: list[Candidate]) -> list[Candidate]:
    if len(candidates) < 2:
        raise DataError("one answer has nothing to be compared with")
    # equal answers with different scores would push one sequence up and down at once
    if len({(c.content, c.tool_calls, c.reasoning) for c in candidates}) < len(candidates):
        raise DataError("two of the answers are the same")
    if candidates[0].score == candidates[-1].score:
        raise DataError("all answers have the same score")
    return candidates


def parse_label(value: object) -> float:
    """1 for a good and 0 for a bad answer: truth values, 1 and 0, and both as text."""
    label = _LABELS.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None
    if label is None:
        raise DataError(f"label is {short_repr(value)}, not true or false")
    return label


def _candidate(message: Message, score: float) -> Candidate:
    return Candidate(message.content, score, message.tool_calls, message.reasoning)


def parse_answer(value: object, name: str, fields: TurnFields) -> Message:
    """An answer from text, from text parts, from a message, or from a list with one message."""
    # TRL's conversational format: chosen and rejected are lists of messages
    if isinstance(value, list) and len(value) == 1 and not is_parts(value):
        value = value[0]
    if isinstance(value, dict):
        if not {"role", "from"} & set(value):
            raise DataError(f"{name} is an object without a role: write its text as {name}")
        (message,) = from_messages([value], name, fields)
        if message.role != "assistant":
            raise DataError(f"{name} is a turn of the {message.role}, not an answer")
        return message
    return Message("assistant", text_of(value, name, fields.answers))


def _score(value: object) -> float:
    if not math.isfinite(number := number_of(value)):
        raise DataError(f"a score is {short_repr(value)}, not a number")
    return number


def _answer_list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name} is no list")
    return value
