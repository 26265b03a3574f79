"""Conversion of lists of turns, as other tools write them, into checked `Message`s.

Everything is validated here, so that the rest of the package can trust a `Record`. All functions raise `DataError`
with the bare reason; `formats` adds the line of the row. Strict on purpose: a field of a turn that nothing reads is
refused, because a row would train something else than it says; a number is taken as a text only where it is certain how
it was written, and counted. `conversations`, `pairs` and `candidates` build rows from these functions.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from rung.config.data import UnknownFields
from rung.data.content_parts import is_parts, joined_parts, split_answer, type_name
from rung.data.read import WrittenFloat, parse_json
from rung.data.template import REASONING_FIELDS
from rung.data.turn_order import with_calls
from rung.errors import DataError
from rung.types import Message, MessageRole, Record

Getter = Callable[[str], Any]
"""Maps Rung's name of a column to the value in the row; None where there is none."""
ROLES: tuple[MessageRole, ...] = get_args(MessageRole)
_ROLES_BY_NAME: dict[str, MessageRole] = {
    **{role: role for role in ROLES},
    # OpenAI's: `function` before tools had ids, `developer` for the system turn of its reasoning models
    **{"function": "tool", "developer": "system"},
    # ShareGPT's and LLaMA-Factory's, then ms-swift's
    **{"human": "user", "gpt": "assistant", "observation": "tool", "tool_response": "tool"},
}
_CALL_ROLES = frozenset({"function_call", "tool_call"})
"""Roles of turns that are a tool call: ShareGPT's and ms-swift's."""
_LIKELY_ROLES: dict[str, MessageRole] = {
    **dict.fromkeys(("user", "human", "prompter", "question", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "ai", "chatgpt", "bard", "bing", "claude"), "assistant"),
}
"""Roles of other names, in lower case, that a message proposes."""


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
    """Counts the fields of turns and converted values; refuses or ignores fields that nothing reads.

    `unknown` is `data.unknown_fields`; `roles` is `data.roles`. The end tokens that are removed from the ends of
    answers are counted too, if they are (`data.control_tokens`).
    """

    def __init__(
        self,
        unknown: UnknownFields = "error",
        roles: Mapping[str, MessageRole] | None = None,
        *,
        removes_end_tokens: bool = True,
    ) -> None:
        self.unknown, self.removes_end_tokens = unknown, removes_end_tokens
        self.roles = dict(roles or {})
        self.converted, self.used_roles = Counter[str](), Counter[str]()
        self.removed_end_tokens = Counter[str]()
        self.read, self.honored = Counter[str](), Counter[str]()
        self.ignored, self.refused = Counter[str](), Counter[str]()

    def role_of(self, role_name: object, name: str) -> MessageRole:
        """The role of a turn by the name that it has in the row. Raises `DataError` for an unknown one."""
        if isinstance(role_name, str):
            if (mapped := self.roles.get(role_name)) is not None:
                self.used_roles[role_name] += 1
                return mapped
            if (role := _ROLES_BY_NAME.get(role_name)) is not None:
                return role
        if role_name is None:
            raise DataError(f"{name} has no role: a turn has role and content, or from and value")
        known = ", ".join([*_ROLES_BY_NAME, *sorted(_CALL_ROLES)])
        remedy = ""
        if isinstance(role_name, str) and role_name:
            likely = _LIKELY_ROLES.get(role_name.lower(), "user")
            quoted = json.dumps(role_name, ensure_ascii=False)
            remedy = f"; say which it is, for example data.roles: {{{quoted}: {likely}}}"
        raise DataError(f"unknown role {role_name!r} in {name}; known: {known}{remedy}")

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

    def answers(self, kind: str) -> None:
        """Count an answer that was a number or a truth value."""
        self.converted[f"answers that were {kind}"] += 1

    def questions(self, kind: str) -> None:
        """Count a question or a tool's result that was a number or a truth value."""
        self.converted[f"questions that were {kind}"] += 1

    def conversions(self) -> tuple[str, ...]:
        """What was converted to text, with counts, as sentences."""
        roles = {f"turns of role {name!r}, read as {self.roles[name]}": n for name, n in self.used_roles.items()}
        return tuple(f"{name}: {count}" for name, count in {**self.converted, **roles}.items())

    def summary(self) -> dict[str, dict[str, int]]:
        """Turns with each field, by what became of it; without fields of no turn.

        Read is what every turn has, honored what changes how a turn is learned or shown; `weight 0` counts the answers
        that are not learned.
        """
        counts = {"read": self.read, "honored": self.honored, "ignored": self.ignored, "refused": self.refused}
        return {name: dict(counter) for name, counter in counts.items() if counter}


def text_of(value: object, name: str, numbers: Callable[[str], None] | None = None) -> str:
    """The value as text that can be used for training; parts of the type text are joined.

    With `numbers`, numbers and truth values are accepted as their JSON text, and `numbers` counts their type.

    Raises:
        DataError: it is missing, empty, not text, or not encodable.
    """
    if value is None:
        raise DataError(f"no {name}")
    if isinstance(value, bool | int | float):
        if numbers is None:
            raise DataError(f'{name} is the {type_name(value)} {value}, not text: quote it ("{value}")')
        return _number_text(value, name, numbers)
    if is_parts(value):
        value = joined_parts(value, name)
    if not isinstance(value, str):
        is_answers = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
        remedy = "; other accepted answers go into the column references" if is_answers and name == "answer" else ""
        if isinstance(value, Mapping):
            remedy = "; write it as text, such as its JSON in quotes: its spaces and the order of its keys are learned"
        raise DataError(f"{name} is {_a_type(value)}, not text{remedy}")
    if not value.strip():
        is_question = name in ("prompt", "question", "instruction")
        remedy = ": ask something, or write answers to nothing as plain text, in a column text" if is_question else ""
        raise DataError(f"empty {name}{remedy}")
    return encodable(value, name)


def _number_text(value: bool | int | float, name: str, numbers: Callable[[str], None]) -> str:
    if isinstance(value, float) and not isinstance(value, WrittenFloat):
        # a column of whole numbers with gaps is stored as 7.0 by many programs
        reason = "and whether it was written so is unknown: store the column as text"
        raise DataError(f"{name} is the number {value} of a binary file, {reason}")
    numbers("true or false" if isinstance(value, bool) else "numbers")
    return value.text if isinstance(value, WrittenFloat) else json.dumps(value)


def optional_text(value: object, name: str, numbers: Callable[[str], None] | None = None) -> str | None:
    """Like `text_of`, but a missing or empty value is None."""
    return None if value is None or value == "" else text_of(value, name, numbers)


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
    """A list of {role, content, ...} or {from, value, ...} objects, or its JSON text, as turns in any order.

    A call that is a turn of its own, as ShareGPT and ms-swift write them, is part of an answer or a call before it.
    """
    turns: list[Message] = []
    for i, item in enumerate(_list(value, name)):
        turn = _message(item, f"{name}[{i}]", fields)
        if turns and _is_call_turn(item, fields) and turns[-1].role == "assistant":
            turns[-1] = with_calls(turns[-1], turn, f"{name}[{i}]")
            fields.converted["calls in turns of their own, read as part of the turn before"] += 1
        else:
            turns.append(turn)
    return tuple(turns)


def _is_call_turn(item: object, fields: TurnFields) -> bool:
    role = (item.get("role") or item.get("from")) if isinstance(item, Mapping) else None
    return isinstance(role, str) and role in _CALL_ROLES and role not in fields.roles


def from_history(value: object, fields: TurnFields) -> tuple[Message, ...]:
    """Alpaca's list of [question, answer] pairs as turns."""
    turns: list[Message] = []
    for i, pair in enumerate(_list(value, "history") if value else ()):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise DataError(f"history[{i}] is not a pair of question and answer")
        name = f"history[{i}]"
        turns += [_turn("user", pair[0], name, fields), _turn("assistant", pair[1], name, fields)]
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


def turns_of_text(value: object, name: str, fields: TurnFields) -> object:
    """The turns that a text is as JSON, as tables have them, counted by `fields`; other values as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        parsed = parse_json(value)
    except (ValueError, RecursionError):
        return value
    if isinstance(parsed, Mapping) and isinstance(parsed.get("messages"), list):
        if parsed.get("tools"):
            raise DataError(f"{name} is the JSON of messages with their tools: write the tools in a column tools")
        parsed = parsed["messages"]
    turns = parsed if isinstance(parsed, list) else [parsed]
    # an answer may be JSON: it is a conversation where each of its objects has a known role and a content
    if not turns or not all(isinstance(turn, Mapping) and _is_turn(turn, fields) for turn in turns):
        return value
    fields.converted[f"texts in {name} that were turns as JSON"] += 1
    return parsed


def _is_turn(item: Mapping[str, Any], fields: TurnFields) -> bool:
    roles = {*_ROLES_BY_NAME, *_CALL_ROLES, *fields.roles}
    return any(
        item.get(role) in roles and content in item for role, content in (("role", "content"), ("from", "value"))
    )


def _message(item: object, name: str, fields: TurnFields) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{name} is {_a_type(item)}, not an object with role and content, or from and value")
    role_name = _one_of(item, ("role", "from"), name)
    content = _one_of(item, ("content", "value"), name)
    # ShareGPT writes a tool call as a turn of a role of its own
    if _is_call_turn(item, fields):
        fields.check(item, "assistant", name)
        is_json = isinstance(content, list | Mapping) and not is_parts(content)
        calls = content if is_json else _json_value(text_of(content, f"content of {name}"), f"content of {name}")
        return Message("assistant", "", tool_calls_text(calls), is_learned=_is_learned(item, name))
    role = fields.role_of(role_name, name)
    fields.check(item, role, name)
    is_learned = _is_learned(item, name)
    if role != "assistant":
        tool, call_id = (optional_text(item.get(key), key) for key in ("name", "tool_call_id"))
        is_tool = role == "tool"
        return _turn(role, content, name, fields, tool if is_tool else None, call_id if is_tool else None)
    if is_parts(content):
        content, given = split_answer(content, name)
        if twice := next((field for field in given if item.get(field)), None):
            raise DataError(f"{name} has {twice} as a field and in the parts of its content")
        item = {**item, **given}
    calls = item.get("tool_calls") or item.get("function_call")
    if item.get("tool_calls") and item.get("function_call"):
        raise DataError(f"{name} has both tool_calls and function_call")
    reasoning = _reasoning(item, name)
    if calls:
        text = "" if content is None else joined_parts(content, name) if isinstance(content, list) else content
        if not isinstance(text, str):
            raise DataError(f"content of {name} is {_a_type(text)}, not text")
        calls_text = tool_calls_text(calls)
        return Message(role, encodable(text, name), calls_text, reasoning=reasoning, is_learned=is_learned)
    return replace(_turn(role, content, name, fields), reasoning=reasoning, is_learned=is_learned)


def _one_of(item: Mapping[str, Any], names: tuple[str, str], name: str) -> Any:
    """The value of a field that has two names; an object with different values under both is refused."""
    values = [item[field] for field in names if item.get(field) is not None]
    if len(values) > 1 and values[0] != values[1]:
        raise DataError(f"{name} has different values as {names[0]} and {names[1]}")
    return values[0] if values else None


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
    role: MessageRole,
    content: object,
    name: str,
    fields: TurnFields,
    tool: str | None = None,
    call_id: str | None = None,
) -> Message:
    if isinstance(content, list):
        content = joined_parts(content, f"content of {name}")
    if content == "" and role in ("system", "tool"):  # an empty tool result or system prompt carries information
        return Message(role, "", name=tool, tool_call_id=call_id)
    noun = {"user": "question", "assistant": "answer"}.get(role, "content")
    numbers = {"assistant": fields.answers, "system": None}.get(role, fields.questions)
    return Message(role, text_of(content, f"{noun} in {name}", numbers), name=tool, tool_call_id=call_id)


def _tool_call(call: object) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise DataError(f"a tool call is {_a_type(call)}, not an object")
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
        raise DataError(f"arguments of a tool call are {_a_type(arguments)}, not an object")
    call_id = {key: value for key, value in call.items() if key == "id"} if "function" in call else {}
    return {**call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _list(value: object, name: str) -> list[Any]:
    if isinstance(value, str):
        if value.strip()[:1] not in ("[", "{"):
            raise DataError(f"{name} is text and is not JSON: write a list of turns, each with its role and content")
        value = _json_value(value, name)
    if not isinstance(value, list):
        remedy = "; write one object for each turn, with its role and content"
        raise DataError(f"no {name}" if value is None else f"{name} is {_a_type(value)}, not a list{remedy}")
    if not value:
        raise DataError(f"empty {name}")
    return value


def _json_value(value: str, name: str) -> Any:
    try:
        return parse_json(value)
    except ValueError as error:
        raise DataError(f"{name} is not JSON: {error}") from error


def _a_type(value: object) -> str:
    name = type_name(value)
    return name if name == "null" else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


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


def parse_references(value: object, fields: TurnFields) -> tuple[str, ...]:
    """Further accepted answers: a list of texts, in csv its JSON text. Empty without a value.

    Raises:
        DataError: it is no list, or one of them is no text.
    """
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise DataError(f"references is the text {short_repr(value)}, not a list of answers") from error
    if not isinstance(value, list):
        raise DataError("references is no list")
    return tuple(text_of(item, "reference", fields.answers) for item in value)


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
