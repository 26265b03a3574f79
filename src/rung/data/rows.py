"""Records as rows of a file: the columns of Rung's formats, so that what a command writes is read as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rung.data.chat import turns_with_context
from rung.data.messages import message_to_json
from rung.types import CodeTests, Message, Record


def prompt_value(turns: Sequence[Message]) -> str | list[dict[str, Any]]:
    """The value of a column `prompt`: a single question as text, other turns as messages."""
    if len(turns) == 1 and turns[0].role == "user":
        return turns[0].content
    return [message_to_json(turn) for turn in turns]


def answer_row(turns: Sequence[Message], answer: str, **columns: Any) -> dict[str, Any]:
    """A row that ends in an answer: `question` and `answer`, or `messages`; columns without a value are left out.

    The format `messages` has no column for a context, which stands in the first turn of the user there.
    """
    prompt, further = prompt_value(turns), present(columns)
    if isinstance(prompt, str):
        return {"question": prompt, **further, "answer": answer}
    spoken = [*turns_with_context(turns, further.pop("context", None)), Message("assistant", answer)]
    return {**further, "messages": [message_to_json(turn) for turn in spoken]}


def preference_row(turns: Sequence[Message], chosen: str, rejected: str, **columns: Any) -> dict[str, Any]:
    """A row of two answers: `prompt`, `chosen` and `rejected`; columns without a value are left out."""
    return {"prompt": prompt_value(turns), **present(columns), "chosen": chosen, "rejected": rejected}


def columns_of(record: Record) -> dict[str, Any]:
    """What a record has beside its turns: context, group, task, tools and tests."""
    tests = record.tests or CodeTests("")
    tools = json.loads(record.tools) if record.tools else None
    columns = {"context": record.context, "group": record.group, "task": record.task, "tools": tools}
    return columns | {"tests": tests.source or None, "test_setup": tests.setup or None}


def present(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that have a value."""
    return {name: value for name, value in columns.items() if value is not None}
