"""The order of turns: what other tools write as turns of their own, and what a refusal says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rung.data.messages import TurnFields, from_messages
from rung.data.turn_order import check_order
from rung.errors import DataError

CALL = {"name": "f", "arguments": {"x": 1}}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
RESULT = {"role": "tool", "content": "1"}


def call(content: Any = CALL, **more: Any) -> dict[str, Any]:
    return {"role": "tool_call", "content": content, **more}


def read(*turns: dict[str, Any], fields: TurnFields | None = None) -> list[tuple[str, str, list[str]]]:
    messages = from_messages(list(turns), "messages", fields or TurnFields())
    check_order(messages)
    names = ([c["function"]["name"] for c in json.loads(m.tool_calls or "[]")] for m in messages)
    return [(m.role, m.content, called) for m, called in zip(messages, names, strict=True)]


@pytest.mark.parametrize("content", [CALL, [CALL], json.dumps(CALL), json.dumps([CALL])])
def test_a_call_of_its_own_may_be_an_object_a_list_or_their_text(content: Any) -> None:
    assert read(USER, call(content), RESULT, ANSWER)[1] == ("assistant", "", ["f"])


def test_parallel_calls_in_turns_of_their_own_are_one_turn() -> None:
    """ms-swift writes one turn for each call, and one for each result."""
    fields = TurnFields()
    turns = read(USER, call(), call({"name": "g", "arguments": {}}), RESULT, RESULT, ANSWER, fields=fields)
    assert turns[1] == ("assistant", "", ["f", "g"]) and [role for role, *_ in turns[2:]] == [
        "tool",
        "tool",
        "assistant",
    ]
    assert fields.conversions() == ("calls in turns of their own, read as part of the turn before: 1",)


def test_a_call_behind_an_answer_belongs_to_it() -> None:
    assert read(USER, {**ANSWER, "content": "I look"}, call(), RESULT, ANSWER)[1] == ("assistant", "I look", ["f"])
    with pytest.raises(DataError, match="only one of the two is learned"):
        read(USER, {**ANSWER, "weight": 0}, call(), RESULT, ANSWER)


@pytest.mark.parametrize(
    ("turns", "remedy"),
    [
        ([USER, USER, ANSWER], "put both texts into one turn"),
        ([USER, ANSWER, ANSWER], "put both texts into one turn"),
        ([USER, call(), ANSWER], "put the result of the call between them, as a turn of role tool"),
        ([USER, RESULT, ANSWER], "without a call, put its text into the user's turn"),
        ([USER, call(), RESULT, USER, ANSWER], "an answer of the assistant is missing"),
        ([USER, {"role": "system", "content": "s"}, ANSWER], "put it first, or into a turn of the user"),
        ([ANSWER], "texts that answer nothing are plain text, in a column text"),
    ],
)
def test_another_order_says_what_to_write(turns: list[dict[str, Any]], remedy: str) -> None:
    with pytest.raises(DataError) as caught:
        read(*turns)
    assert "wrong role order" in caught.value.summary and caught.value.summary.endswith(remedy)
