"""Content in parts: text, reasoning and calls as OpenAI, Anthropic and LLaMA-Factory's v1 write them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rung.data.messages import TurnFields, from_messages
from rung.errors import DataError
from rung.types import Message

CALL = {"name": "f", "arguments": {"x": 1}}


def answer(*parts: dict[str, Any], **more: Any) -> Message:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": list(parts), **more}]
    return from_messages(turns, "messages", TurnFields())[1]


def part(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


@pytest.mark.parametrize(
    ("parts", "content", "reasoning", "called"),
    [
        ([part("text", text="a"), part("text", text="b")], "ab", None, []),
        ([part("text", value="a")], "a", None, []),
        ([part("reasoning", value="r"), part("text", value="a")], "a", "r", []),
        ([part("thinking", thinking="r", signature="s"), part("text", text="a")], "a", "r", []),
        ([part("tool_call", value=json.dumps(CALL))], "", None, ["f"]),
        ([part("reasoning", value="r"), *[part("tool_call", value=json.dumps(CALL))] * 2], "", "r", ["f", "f"]),
        ([part("text", text="a"), part("tool_use", id="t", name="f", input={"x": 1})], "a", None, ["f"]),
    ],
)
def test_parts_of_an_answer(
    parts: list[dict[str, Any]], content: str, reasoning: str | None, called: list[str]
) -> None:
    turn = answer(*parts)
    calls = [call["function"] for call in json.loads(turn.tool_calls or "[]")]
    assert (turn.content, turn.reasoning, [call["name"] for call in calls]) == (content, reasoning, called)
    assert all(call["arguments"] == {"x": 1} for call in calls)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([part("text", text="a"), part("reasoning", value="r")], "give each part of the answer a turn of its own"),
        ([part("tool_call", value="{"), part("tool_call", value="{}")], "is not JSON"),
        ([part("reasoning"), part("text", text="a")], "has no text"),
        ([part("image_url", image_url="i")], "only text is read"),
        ([part("reasoning", value="r"), part("image_url", image_url="i")], "only text is read"),
    ],
)
def test_parts_that_would_lose_something_are_refused(parts: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        answer(*parts)
    assert reason in caught.value.summary


def test_parts_beside_fields_that_say_the_same_are_refused() -> None:
    with pytest.raises(DataError, match="reasoning_content as a field and in the parts"):
        answer(part("reasoning", value="r"), part("text", text="a"), reasoning_content="s")


def test_results_in_parts_say_where_results_are_written() -> None:
    turn = {"role": "user", "content": [part("tool_result", tool_use_id="t", content="3")]}
    with pytest.raises(DataError, match="write each result as a turn of role tool"):
        from_messages([turn], "messages", TurnFields())
