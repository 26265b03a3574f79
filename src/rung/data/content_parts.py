"""Content in parts, such as [{"type": "text", "text": ...}]: joined to text, its reasoning and calls set apart.

OpenAI, Anthropic and LLaMA-Factory's v1 write turns so. Only text, reasoning and calls are read; pictures and other
parts are refused by name. `messages` reads the content of every turn through these functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from rung.data.read import parse_json
from rung.errors import DataError

_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
"""Types of text parts: those of chat completions, and of OpenAI's responses."""
_REASONING_PARTS = ("reasoning", "thinking")
_CALL_PARTS = ("tool_call", "tool_use")
_ORDER = {**dict.fromkeys(_REASONING_PARTS, 0), **dict.fromkeys(_TEXT_PARTS, 1), **dict.fromkeys(_CALL_PARTS, 2)}
"""Reasoning comes before the text of an answer, calls behind it: another order would be lost."""


def is_parts(value: object) -> TypeGuard[list[Mapping[str, Any]]]:
    """Whether a value is content in parts, such as [{"type": "text", "text": ...}], and no list of turns."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(part, Mapping) and "type" in part and not {"role", "from"} & set(part) for part in value)


def joined_parts(parts: Sequence[object], name: str) -> str:
    """The text of the parts. Raises `DataError` for parts of another type."""
    texts: list[str] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else f"bare {type_name(part)}"
        text = _text(part, kind) if isinstance(part, Mapping) and kind in _TEXT_PARTS else None
        if text is None:
            remedy = "only text is read: leave the row out (data.rejects: drop), or the part"
            if kind == "tool_result":
                remedy = "write each result as a turn of role tool"
            raise DataError(f"{name} has parts that are not text, of the type {kind}; {remedy}")
        texts.append(text)
    return "".join(texts)


def split_answer(parts: list[Mapping[str, Any]], name: str) -> tuple[list[Mapping[str, Any]] | str, dict[str, Any]]:
    """The text parts of an answer, and the fields `reasoning_content` and `tool_calls` of its other parts.

    Raises:
        DataError: the parts are in an order that these fields do not keep, or a part has no text.
    """
    kinds = [str(part["type"]) for part in parts]
    if not {*_REASONING_PARTS, *_CALL_PARTS} & set(kinds):
        return parts, {}
    positions = [_ORDER.get(kind, 1) for kind in kinds]
    if positions != sorted(positions):
        remedy = "give each part of the answer a turn of its own"
        raise DataError(f"the parts of {name} are in the order {', '.join(kinds)}; {remedy}")
    fields: dict[str, Any] = {}
    reasoning = [_text(part, kind) for part, kind in zip(parts, kinds, strict=True) if kind in _REASONING_PARTS]
    if None in reasoning:
        raise DataError(f"a part of the reasoning of {name} has no text")
    if reasoning:
        fields["reasoning_content"] = "".join(map(str, reasoning))
    calls = [part for part, kind in zip(parts, kinds, strict=True) if kind in _CALL_PARTS]
    if calls:
        fields["tool_calls"] = [_call(part, name) for part in calls]
    texts = [part for part, position in zip(parts, positions, strict=True) if position == 1]
    return texts or "", fields


def _text(part: Mapping[str, Any], kind: str) -> str | None:
    # OpenAI's name, LLaMA-Factory's, and Anthropic's of reasoning
    values = [part[field] for field in ("text", "value", kind) if isinstance(part.get(field), str)]
    return values[0] if values else None


def _call(part: Mapping[str, Any], name: str) -> object:
    """A call as `tool_calls` has it."""
    if "value" not in part:
        return {key: value for key, value in part.items() if key not in ("type", "id")}
    value = part["value"]
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise DataError(f"a call in {name} is not JSON: {error}") from error
    return value


def type_name(value: object) -> str:
    """The type of a JSON value, as messages name it."""
    if isinstance(value, bool):
        return "truth value"
    if isinstance(value, int | float):
        return "number"
    return {"dict": "object", "str": "text", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)
