"""Conversion of lists of turns, as other tools write them, into checked `Message`s.

Everything is validated here, so that the rest of the package can trust a `Record`. All functions raise `DataError`
with the bare reason; `formats` adds the line of the row. Strict on purpose: a number where text belongs is refused
with a hint instead of converted, and so is a field of a turn that nothing reads, because both would train something
else than the row says. `conversations` and `candidates` build rows from these functions.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from rung.config.data import UnknownFields
from rung.data.read import parse_json
from rung.data.template import REASONING_FIELDS
from rung.errors import DataError
from rung.types import Message, MessageRole, Record

Getter = Callable[[str], Any]
"""Maps Rung's name of a column to the value in the row; None where there is none."""
ROLES: tuple[MessageRole, ...] = get_args(MessageRole)
_SHAREGPT_ROLES: dict[str, MessageRole] = {"human": "user", "user": "user", "gpt": "assistant"}
_SHAREGPT_ROLES |= {"assistant": "assistant", "system": "system", "observation": "tool", "tool": "tool"}
# Roles that may follow a role. A system turn comes first only: many templates refuse it elsewhere.
_NEXT_ROLES: dict[MessageRole | None, tuple[MessageRole, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


_ARGUMENT_FIELDS = ("arguments", "parameters", "args", "input")
"""Names of the arguments of a call: OpenAI's, Llama's, LangChain's and Anthropic's."""
_WEIGHT_FIELDS = ("weight", "loss", "train", "training", "loss_weight")
"""Fields that say whether an answer is learned: OpenAI's 0 or 1, and truth values under the names of other trainers."""
_KNOWN_FIELDS = frozenset({"role", "content", "from", "value", *_WEIGHT_FIELDS})
_ROLE_FIELDS: dict[MessageRole, frozenset[str]] = {
    "system": frozenset(),
    "user": frozenset(),
    "assistant": frozenset({"tool_calls", "function_call", *REASONING_FIELDS}),
    "tool": frozenset({"tool_call_id", "name"}),
}


class TurnFields:
    """Counts the fields of turns, and refuses or ignores those that nothing reads (`data.unknown_fields`).

    It also counts the end tokens that are removed from the ends of answers, if they are (`data.control_tokens`).
    """

    def __init__(self, unknown: UnknownFields = "error", *, removes_end_tokens: bool = True) -> None:
        self.unknown, self.removes_end_tokens = unknown, removes_end_tokens
        self.removed_end_tokens = Counter[str]()
        self.read, self.honored = Counter[str](), Counter[str]()
        self.ignored, self.refused = Counter[str](), Counter[str]()

    def check(self, turn: Mapping[str, Any], role: MessageRole, name: str) -> None:
        """Raise `DataError` for a field with a value that no turn of this role has, unless they are to be ignored."""
        known_fields = _KNOWN_FIELDS | _ROLE_FIELDS[role]
        for field, value in turn.items():
            # an empty field says nothing: exports write null refusals and empty lists of calls into every turn
            if value is None or value in ("", [], {}):
                continue
            if field in _ROLE_FIELDS[role] or (field in _WEIGHT_FIELDS and role == "assistant"):
                self.honored[f"{field} 0" if field in _WEIGHT_FIELDS and value in (0, "0") else field] += 1
            elif field in known_fields:
                self.read[field] += 1
            elif self.unknown == "ignore":
                self.ignored[field] += 1
            else:
                self.refused[field] += 1
                remedy = "data.unknown_fields: ignore leaves such fields out"
                if "loss" in field or "mask" in field or "weight" in field:
                    remedy = "name it weight, 0 or 1, if it says whether the answer is learned"
                raise DataError(f"{name} has a field {field!r} that is not read for role {role}; {remedy}")

    def summary(self) -> dict[str, dict[str, int]]:
        """Turns with each field, by what became of it; without fields of no turn.

        Read is what every turn has, honored what changes how a turn is learned or shown; `weight 0` counts the answers
        that are not learned.
        """
        counts = {"read": self.read, "honored": self.honored, "ignored": self.ignored, "refused": self.refused}
        return {name: dict(counter) for name, counter in counts.items() if counter}


def text_of(value: object, name: str) -> str:
    """The value as text that can be used for training.

    Raises:
        DataError: it is missing, empty, not text, or not encodable.
    """
    if value is None:
        raise DataError(f"no {name}")
    # not converted: a program that wrote numbers may have turned `007` into 7 before
    if isinstance(value, bool | int | float):
        raise DataError(f'{name} is the {_type_name(value)} {value}, not text: quote it ("{value}")')
    if not isinstance(value, str):
        raise DataError(f"{name} is a {_type_name(value)}, not text")
    if not value.strip():
        raise DataError(f"empty {name}")
    return encodable(value, name)


def optional_text(value: object, name: str) -> str | None:
    """Like `text_of`, but a missing or empty value is None."""
    return None if value is None or value == "" else text_of(value, name)


def key_text(value: object, column_kind: str, name: str) -> str:
    """The value of a group or task column as text."""
    if value is None or value == "" or isinstance(value, list | dict):
        raise DataError(f"no value in the {column_kind} column {name!r}")
    return encodable(str(value), name)


def encodable(value: str, name: str) -> str:
    """Refuse lone surrogates, which JSON escapes allow and no tokenizer accepts."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} holds half a character (a lone surrogate) at position {error.start}") from error
    return value


def from_messages(value: object, name: str, fields: TurnFields) -> tuple[Message, ...]:
    """A list of {role, content, ...} objects, or its JSON text, as turns; their order is not checked."""
    return tuple(_message(item, f"{name}[{i}]", fields) for i, item in enumerate(_list(value, name)))


def from_sharegpt(value: object, fields: TurnFields) -> tuple[Message, ...]:
    """A list of {from, value, ...} objects as turns."""
    turns = []
    for i, item in enumerate(_list(value, "conversations")):
        name = f"conversations[{i}]"
        if not isinstance(item, Mapping):
            raise DataError(f"{name} is a {_type_name(item)}, not an object with from and value")
        role, content = item.get("from"), item.get("value")
        # ShareGPT writes a tool call as a turn of a role of its own
        if role == "function_call":
            fields.check(item, "assistant", name)
            calls = _json_value(text_of(content, f"value of {name}"), f"value of {name}")
            turns.append(Message("assistant", "", tool_calls_text(calls), is_learned=_is_learned(item, name)))
        elif isinstance(role, str) and role in _SHAREGPT_ROLES:
            fields.check(item, _SHAREGPT_ROLES[role], name)
            turn = {**item, "role": _SHAREGPT_ROLES[role], "content": content}
            turns.append(_message(turn, name, fields=None))
        else:
            known_roles = ", ".join([*_SHAREGPT_ROLES, "function_call"])
            raise DataError(f"unknown role {role!r} in {name}; known: {known_roles}")
    return tuple(turns)


def from_history(value: object) -> tuple[Message, ...]:
    """Alpaca's list of [question, answer] pairs as turns."""
    turns: list[Message] = []
    for i, pair in enumerate(_list(value, "history") if value else ()):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise DataError(f"history[{i}] is not a pair of question and answer")
        turns += [_turn("user", pair[0], f"history[{i}]"), _turn("assistant", pair[1], f"history[{i}]")]
    return tuple(turns)


def tool_calls_text(value: object) -> str:
    """Tool calls as JSON text; a bare {name, arguments} is wrapped, and arguments in JSON text are parsed."""
    value = _json_value(value, "tool_calls") if isinstance(value, str) else value
    calls = value if isinstance(value, list) else [value]
    return encodable(json.dumps([_tool_call(call) for call in calls], ensure_ascii=False), "tool_calls")


def tools_text(value: object) -> str | None:
    """Tool schemas as JSON text, or None without tools."""
    value = _json_value(value, "tools") if isinstance(value, str) and value else value
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError("tools is not a list of objects")
    # stored as text: as nested columns a parquet file would add every tool's null fields to all (FAILURES 8)
    return encodable(json.dumps(value, ensure_ascii=False), "tools")


def wrapped_functions(value: object) -> list[dict[str, Any]] | None:
    """OpenAI's older list of function schemas as tools."""
    value = _json_value(value, "functions") if isinstance(value, str) and value else value
    return [{"type": "function", "function": schema} for schema in value] if isinstance(value, list) else None


def check_order(messages: Sequence[Message]) -> None:
    """Refuse conversations that cannot be trained on.

    Raises:
        DataError: no assistant turn, a last turn of another role, or turns in an order that no template supports.
    """
    if not any(m.role == "assistant" for m in messages):
        raise DataError("no assistant turn")
    previous: Message | None = None
    for i, message in enumerate(messages):
        if message.role not in _NEXT_ROLES[previous.role if previous else None]:
            position_text = f"after {previous.role}" if previous else "at the start"
            raise DataError(f"wrong role order: turn {i + 1} is {message.role} {position_text}")
        if message.role == "tool" and previous and previous.role == "assistant" and not previous.tool_calls:
            raise DataError(f"wrong role order: turn {i + 1} is tool, but the turn before calls none")
        previous = message
    if messages[-1].role != "assistant":
        raise DataError(f"the last turn is {messages[-1].role}, not assistant")


def _message(item: object, name: str, fields: TurnFields | None) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{name} is a {_type_name(item)}, not an object with role and content")
    # OpenAI's names: `function` before tools had ids, `developer` for the system turn of its reasoning models
    role_name = {"function": "tool", "developer": "system"}.get(str(item.get("role")), item.get("role"))
    role = next((r for r in ROLES if r == role_name), None)
    if role is None:
        raise DataError(f"unknown role {item.get('role')!r} in {name}; known: {', '.join(ROLES)}")
    if fields is not None:
        fields.check(item, role, name)
    content = item.get("content")
    if isinstance(content, list):
        content = _joined_parts(content, name)
    is_learned = _is_learned(item, name)
    if role != "assistant":
        tool, call_id = (optional_text(item.get(key), key) for key in ("name", "tool_call_id"))
        is_tool = role == "tool"
        return _turn(role, content, name, tool if is_tool else None, call_id if is_tool else None)
    calls = item.get("tool_calls") or item.get("function_call")
    if item.get("tool_calls") and item.get("function_call"):
        raise DataError(f"{name} has both tool_calls and function_call")
    reasoning = _reasoning(item, name)
    if calls:
        text = "" if content is None else content
        if not isinstance(text, str):
            raise DataError(f"content of {name} is a {_type_name(text)}, not text")
        calls_text = tool_calls_text(calls)
        return Message(role, encodable(text, name), calls_text, reasoning=reasoning, is_learned=is_learned)
    return replace(_turn(role, content, name), reasoning=reasoning, is_learned=is_learned)


def _is_learned(item: Mapping[str, Any], name: str) -> bool:
    """Whether an answer is to be learned, by its weight of 0 or 1 or a truth value."""
    values = {field: item[field] for field in _WEIGHT_FIELDS if item.get(field) not in (None, "")}
    for field, value in values.items():
        if value not in (0, 1):  # truth values are 0 and 1 too
            hint = "a turn is learned or not; the column weight says how often a row counts"
            raise DataError(f"{field} of {name} is {short_repr(value)}, not 0 or 1: {hint}")
    if len({bool(value) for value in values.values()}) > 1:
        raise DataError(f"{name} says both that it is learned and that it is not: {', '.join(values)}")
    return all(values.values())


def _reasoning(item: Mapping[str, Any], name: str) -> str | None:
    """The reasoning before an answer, under any of its names."""
    texts = {text for field in REASONING_FIELDS if (text := optional_text(item.get(field), f"{field} of {name}"))}
    if len(texts) > 1:
        raise DataError(f"{name} has two different texts as reasoning")
    return texts.pop() if texts else None


def _turn(
    role: MessageRole, content: object, name: str, tool: str | None = None, call_id: str | None = None
) -> Message:
    if content == "" and role in ("system", "tool"):  # an empty tool result or system prompt carries information
        return Message(role, "", name=tool, tool_call_id=call_id)
    noun = {"user": "question", "assistant": "answer"}.get(role, "content")
    return Message(role, text_of(content, f"{noun} in {name}"), name=tool, tool_call_id=call_id)


def _joined_parts(parts: Sequence[object], name: str) -> str:
    texts = [p.get("text") for p in parts if isinstance(p, Mapping) and p.get("type", "text") == "text"]
    if len(texts) != len(parts) or not all(isinstance(t, str) for t in texts):
        raise DataError(f"content of {name} has parts that are not text")
    return "".join(str(t) for t in texts)


def _tool_call(call: object) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise DataError(f"a tool call is a {_type_name(call)}, not an object")
    # OpenAI nests name and arguments under `function`, other exports do not
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError("a tool call names no function")
    known_fields = {"name", "id", "type", "index", *_ARGUMENT_FIELDS, *(("function",) if function is not call else ())}
    unknown_fields = sorted({*call, *function} - known_fields)
    if any(fields.get(name) for name in unknown_fields for fields in (call, function)):
        raise DataError(f"a tool call has a field {unknown_fields[0]!r}, which nothing reads")
    values = [function[name] for name in _ARGUMENT_FIELDS if function.get(name) is not None]
    if len(values) > 1:
        raise DataError(
            f"a tool call has its arguments twice: {', '.join(n for n in _ARGUMENT_FIELDS if n in function)}"
        )
    arguments = values[0] if values else {}
    if isinstance(arguments, str):
        # OpenAI writes arguments as JSON text; templates expect the object
        arguments = _json_value(arguments, "arguments of a tool call") if arguments else {}
    if not isinstance(arguments, Mapping):
        raise DataError(f"arguments of a tool call are a {_type_name(arguments)}, not an object")
    call_id = {key: value for key, value in call.items() if key == "id"} if "function" in call else {}
    return {**call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _list(value: object, name: str) -> list[Any]:
    if isinstance(value, str):
        value = _json_value(value, name)
    if not isinstance(value, list):
        raise DataError(f"no {name}" if value is None else f"{name} is a {_type_name(value)}, not a list")
    if not value:
        raise DataError(f"empty {name}")
    return value


def _json_value(value: str, name: str) -> Any:
    try:
        return parse_json(value)
    except ValueError as error:
        raise DataError(f"{name} is not JSON: {error}") from error


def _type_name(value: object) -> str:
    if isinstance(value, bool):
        return "truth value"
    if isinstance(value, int | float):
        return "number"
    return {"dict": "object", "str": "text", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)


MAX_SHOWN_CHARACTERS = 60
"""Characters of a wrong value quoted in a message."""


def parse_weight(value: object) -> float:
    """How often a row counts; numbers in text are accepted. Raises `DataError` unless it is positive and finite."""
    number = 1.0 if value is None else number_of(value)
    if not 0 < number < math.inf:
        raise DataError(f"weight is {short_repr(value)}, not a positive number")
    return number


def number_of(value: object) -> float:
    """The value as float; NaN for booleans, words, and integers beyond the range of floats."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def short_repr(value: object) -> str:
    """A wrong value as messages quote it."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def parse_references(value: object) -> tuple[str, ...]:
    """Further accepted answers: a list of texts, in csv its JSON text. Empty without a value.

    Raises:
        DataError: it is no list, or one of them is no text.
    """
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"references is the text {short_repr(value)}, not a list of answers") from error
    if not isinstance(value, list):
        raise DataError("references is no list")
    return tuple(text_of(item, "reference") for item in value)


def message_to_json(message: Message) -> dict[str, Any]:
    """A turn as `from_messages` reads it, with every field that is set."""
    fields = {
        "tool_calls": json.loads(message.tool_calls) if message.tool_calls else None,
        "name": message.name,
        "reasoning_content": message.reasoning,
        "tool_call_id": message.tool_call_id,
        "weight": None if message.is_learned else 0,
    }
    present = {name: value for name, value in fields.items() if value is not None}
    return {"role": message.role, "content": message.content, **present}


def expected_text(record: Record) -> str:
    """The expected answer; for a tool call its JSON text."""
    return record.answer or record.messages[-1].tool_calls or ""
