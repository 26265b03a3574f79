"""Pairs of answers whose prompt may stand inside them: the shared beginning of `chosen` and `rejected`.

Two conversations of a pair differ in their last turn alone, so what they share is the prompt (the shape of HH-RLHF,
UltraFeedback and TRL). A beginning is shared turn by turn, never letter by letter: two answers that begin with the same
word have no prompt in common. `conversations` puts the given prompt and the shared beginning together.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rung.data.candidates import parse_answer
from rung.data.content_parts import is_parts
from rung.data.messages import Getter, TurnFields, from_messages, turns_of_text
from rung.errors import DataError
from rung.types import Message, MessageRole

Turns = tuple[Message, ...]
_TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.S)
"""Start of a conversation as text, as HH-RLHF writes it (Bai et al. 2022, arXiv 2204.05862)."""
_MARK = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")
_ROLE_OF_MARK: dict[str, MessageRole] = {"Human": "user", "Assistant": "assistant"}


class Pair(NamedTuple):
    """The better and the worse answer, and the turns that both begin with."""

    shared: Turns
    chosen: Message
    rejected: Message


def read_pair(get: Getter, fields: TurnFields) -> Pair:
    """The columns `chosen` and `rejected`: answers, or conversations that differ in their last turn.

    Raises:
        DataError: one is a conversation and the other an answer, or they do not differ in their last turn alone.
    """
    chosen, rejected = (_turns(get(name), name, fields) for name in ("chosen", "rejected"))
    if len(chosen) == len(rejected) == 1:
        return Pair((), chosen[0], rejected[0])
    if 1 in (len(chosen), len(rejected)):
        conversation, answer = ("chosen", "rejected") if len(chosen) > 1 else ("rejected", "chosen")
        raise DataError(f"{conversation} is a conversation, and {answer} is an answer alone")
    count = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if count is None:
        if len(chosen) == len(rejected):
            raise DataError("chosen and rejected are the same")
        longer = "chosen" if len(chosen) > len(rejected) else "rejected"
        raise DataError(f"chosen and rejected differ only in that {longer} goes on")
    if count == 0:
        raise DataError("chosen and rejected share no beginning, so there is no prompt")
    if len(chosen) != count + 1 or len(rejected) != count + 1:
        raise DataError(f"chosen and rejected differ from turn {count + 1} on, not in their last turn alone")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1].role != "assistant":
            raise DataError(f"{name} ends with a turn of the {turns[-1].role}, not with an answer")
    return Pair(chosen[:-1], chosen[-1], rejected[-1])


def with_shared(given: Turns, shared: Turns) -> Turns:
    """The prompt from the turns of a prompt column and the shared beginning, which may repeat one another.

    Raises:
        DataError: they say different things.
    """
    if not given or given == shared[: len(given)]:
        return shared
    if given[-len(shared) :] == shared:
        return given  # the prompt has turns before them, for example a system turn
    # UltraFeedback repeats the first question of a conversation as its prompt, and other sets the last one
    system, asked = given[:-1], given[-1]
    questions = [turn.content.strip() for turn in shared if turn.role == "user"]
    if all(turn.role == "system" for turn in system) and asked.content.strip() in (questions[:1] + questions[-1:]):
        return shared if shared[: len(system)] == system else (*system, *shared)
    raise DataError("the prompt is not the beginning that chosen and rejected share")


def transcript_turns(text: str, name: str) -> Turns | None:
    r"""The turns of a text such as "\n\nHuman: ...\n\nAssistant: ..."; None for other texts.

    The last turn may be empty: a prompt ends where the answer begins. Raises `DataError` for another empty turn.
    """
    if not _TRANSCRIPT.match(text):
        return None
    _, *pieces = _MARK.split(text)
    turns = [Message(_ROLE_OF_MARK[mark], content.strip()) for mark, content in zip(*[iter(pieces)] * 2, strict=True)]
    if (empty := next((i for i, turn in enumerate(turns[:-1]) if not turn.content), None)) is not None:
        raise DataError(f"turn {empty + 1} of {name} is empty")
    return tuple(turns)


def _turns(value: object, name: str, fields: TurnFields) -> Turns:
    value = turns_of_text(value, name, fields)
    if isinstance(value, str) and (turns := transcript_turns(value, name)) is not None:
        if not turns[-1].content:
            raise DataError(f"the last turn of {name} is empty")
        return turns
    if isinstance(value, list) and len(value) > 1 and not is_parts(value):
        return from_messages(value, name, fields)
    return (parse_answer(value, name, fields),)
