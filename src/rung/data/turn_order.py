"""Which turns may follow which, and what to do with a conversation in another order.

Chat templates refuse or drop turns in an order that they do not know, so it is checked before any template is asked.
`conversations` checks every row; `messages` joins the calls that other tools write as turns of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from rung.errors import DataError
from rung.types import Message, MessageRole

# Roles that may follow a role. A system turn comes first only: many templates refuse it elsewhere.
_NEXT_ROLES: dict[MessageRole | None, tuple[MessageRole, ...]] = {
    None: ("system", "user", "assistant"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def check_order(messages: Sequence[Message], column: str = "messages") -> None:
    """Refuse conversations that cannot be trained on.

    Raises:
        DataError: no assistant turn, a last turn of another role, or turns in an order that no template supports.
    """
    remedy = f"rows without answers are read with data: {{format: prompt_only, map: {{prompt: {column}}}}}"
    if not any(m.role == "assistant" for m in messages):
        raise DataError(f"no assistant turn; {remedy}")
    previous: Message | None = None
    start = next((i for i, message in enumerate(messages) if message.role != "system"), 0)
    # a greeting is an answer to nobody: something must be asked after it
    if messages[start].role == "assistant" and (
        messages[start].tool_calls or not any(m.role == "user" for m in messages)
    ):
        remedy = "texts that answer nothing are plain text, in a column text"
        raise DataError(f"wrong role order: turn {start + 1} is assistant at the start; {remedy}")
    for i, message in enumerate(messages):
        if message.role not in _NEXT_ROLES[previous.role if previous else None]:
            position_text = f"after {previous.role}" if previous else "at the start"
            remedy = _order_remedy(previous, message)
            raise DataError(f"wrong role order: turn {i + 1} is {message.role} {position_text}; {remedy}")
        if message.role == "tool" and previous and previous.role == "assistant" and not previous.tool_calls:
            raise DataError(f"wrong role order: turn {i + 1} is tool, but the turn before calls none")
        previous = message
    if messages[-1].role != "assistant":
        raise DataError(f"the last turn is {messages[-1].role}, not assistant; {remedy}")


def _order_remedy(previous: Message | None, message: Message) -> str:
    if message.role == "system":
        return "put it first, or into a turn of the user"
    if message.role == "tool" or previous is None:
        return "a turn of a tool follows the call that it answers; without a call, put its text into the user's turn"
    if previous.tool_calls:
        return "put the result of the call between them, as a turn of role tool"
    return "put both texts into one turn" if message.role == previous.role else "an answer of the assistant is missing"


def with_calls(turn: Message, call: Message, name: str) -> Message:
    """An answer with the calls of the turn behind it. Raises `DataError` where one of both is learned alone."""
    if turn.is_learned != call.is_learned:
        raise DataError(
            f"{name} is a call of the turn before, and only one of the two is learned: give both one weight"
        )
    calls = [*json.loads(turn.tool_calls or "[]"), *json.loads(call.tool_calls or "[]")]
    return replace(turn, tool_calls=json.dumps(calls, ensure_ascii=False))
