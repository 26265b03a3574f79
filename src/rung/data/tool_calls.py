"""Tool calls in the form that a chat template writes, read back, so that calls are compared and not their text.

A call is the same whatever the order of its arguments, the white space and the template, so metrics and rewards compare
parsed calls. How a template writes a call is found by rendering a probe, not configured per model. Three forms cover
the templates of the field: JSON objects (Qwen, Llama 3, Granite), a name followed by a JSON object (Mistral, DeepSeek,
gpt-oss), and one element for each argument (Qwen3-Coder, GLM). Another form is not read, and its rows are refused where
calls would have to be compared.
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rung.data.read import parse_json

Calls = list[dict[str, Any]]
"""Parsed calls, each {name, arguments}."""
Reader = Callable[[str], Calls]

PROBE_NAME = "rung_probe"
_PROBE_ARGUMENTS = {"first_key": "first value", "second_key": "second value"}
PROBE_ID = "call{:05d}"
MARK = 16
"""Characters before and after a call that are compared: enough for a tag."""
UNREADABLE: dict[str, Any] = {"name": "", "arguments": {}}
"""In place of a call that was opened and cannot be read; no function has this name."""
_ARGUMENT_KEYS = ("arguments", "parameters")
_PYTHON_VALUES = {"True": True, "False": False, "None": None}
"""What templates write that put values into text as Python does."""
_DECODER = json.JSONDecoder()
_BRACKET = re.compile(r"[{\[]")


def probe_calls(count: int) -> str:
    """Tool calls as a `Message` holds them, for `tool_call_reader`."""
    function = {"name": PROBE_NAME, "arguments": _PROBE_ARGUMENTS}
    return json.dumps([{"type": "function", "id": PROBE_ID.format(i), "function": function} for i in range(count)])


def tool_call_reader(one_call: str, two_calls: str | None) -> Reader | None:
    """How to read the calls of a template that writes `probe_calls(1)` and `probe_calls(2)` as these answers.

    `two_calls` is None for a template that refuses them, and has one call where the template writes only the first.
    None where no form reads the probes back.
    """
    probe = {"name": PROBE_NAME, "arguments": _PROBE_ARGUMENTS}
    for reader in (_json_reader(one_call, two_calls), _name_and_json_reader(one_call), _argument_reader(one_call)):
        if reader is None or reader(one_call) != [probe]:
            continue
        if two_calls is None or reader(two_calls) in ([probe], [probe, probe]):
            return reader
    return None


def calls_of_message(tool_calls: str) -> Calls:
    """The calls of a `Message`."""
    return [
        {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        for call in json.loads(tool_calls)
    ]


def canonical_calls(calls: Calls) -> str:
    """Text that is equal for equal calls: keys sorted, whole numbers as integers, calls of one turn in any order."""
    return "[" + ", ".join(sorted(json.dumps(_plain(call), sort_keys=True, ensure_ascii=False) for call in calls)) + "]"


def same_but_for_types(first: Calls, second: Calls) -> bool:
    """Whether calls are equal where an argument's text and its JSON value count as one: `"3"` and 3."""
    return canonical_calls([_typed(call) for call in first]) == canonical_calls([_typed(call) for call in second])


def _json_reader(one_call: str, two_calls: str | None) -> Reader | None:
    """The reader of calls that are JSON, between what the template writes before and after each of them.

    JSON without these marks is no call: no server would run it.
    """
    around = [_texts_around_calls(text) for text in (one_call, two_calls) if text is not None]
    if len(around[0]) != 1:
        return None
    before, after = (texts[0] for texts in zip(*around[0], strict=True))
    if len(around) > 1 and len(around[1]) > 1:
        # what stands before the first call alone, such as an empty thought, is no mark of a call
        before = os.path.commonprefix([before[::-1], around[1][1][0][::-1]])[::-1]
        after = os.path.commonprefix([after, around[1][0][1]])
    keys = [key for key in _ARGUMENT_KEYS if f'"{key}"' in one_call]
    opening, closing = before.strip().rpartition("\n")[2][-MARK:], after.strip().partition("\n")[0][:MARK]

    def read(text: str) -> Calls:
        calls, opened = [], text.count(opening) if opening else 0
        for value, start, end in _json_values(text):
            if text[:start].rstrip().endswith(opening) and text[end:].lstrip().startswith(closing):
                found = _calls_in(value, keys)
                calls += found
                # under another name of the arguments than the template's no server would find them
                opened -= bool(found)
        # a call that was opened and cannot be read is a wrong call, not none
        return calls if opened <= 0 else [*calls, UNREADABLE]

    return read


def _texts_around_calls(text: str) -> list[tuple[str, str]]:
    """The text before and after each JSON value with a call."""
    spans = [(start, end) for value, start, end in _json_values(text) if _calls_in(value, _ARGUMENT_KEYS)]
    return [(text[:start].rstrip(), text[end:].lstrip()) for start, end in spans]


def _json_values(text: str) -> Iterator[tuple[Any, int, int]]:
    """JSON objects and lists in a text, outermost ones, each with its start and end."""
    position = 0
    while match := _BRACKET.search(text, position):
        try:
            value, position = _DECODER.raw_decode(text, match.start())
        except RecursionError:
            return  # every further bracket would nest almost as deeply: minutes for a text that is no call
        except ValueError:
            position = match.start() + 1
            continue
        yield value, match.start(), position


def _calls_in(value: Any, keys: Sequence[str]) -> Calls:
    """The calls in a JSON value; `keys` are the names of their arguments."""
    if isinstance(value, list):
        return [call for item in value for call in _calls_in(item, keys)]
    if not isinstance(value, Mapping):
        return []
    function = value.get("function", value)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return []
    arguments = next((function[key] for key in keys if key in function), None)
    if isinstance(arguments, str):
        # OpenAI writes arguments as JSON text
        arguments = _typed(arguments)
    return [{"name": function["name"], "arguments": arguments}] if isinstance(arguments, Mapping) else []


def _name_and_json_reader(one_call: str) -> Reader | None:
    """The reader of names that JSON arguments follow, with what stands around the name in the probe."""
    before, name, after = one_call.partition(PROBE_NAME)
    start = after.find("{")
    if not name or start < 0:
        return None
    # the last characters before the name are enough to find it, and are the same before a second call
    opening = re.escape(before[-8:])
    # some templates write the id of the call here, which differs from call to call
    separator = re.escape(after[:start]).replace(re.escape(PROBE_ID.format(0)), r"[\w\-]*")
    pattern = re.compile(rf"{opening}([\w.\-]+){separator}(?=\{{)")

    def read(text: str) -> Calls:
        calls = []
        for match in pattern.finditer(text):
            try:
                arguments, _ = _DECODER.raw_decode(text, match.end())
            except (ValueError, RecursionError):
                continue
            calls.append({"name": match[1], "arguments": arguments})
        return calls

    return read


def _argument_reader(one_call: str) -> Reader | None:
    """The reader of calls with one element for each argument; values that are JSON are read as JSON."""
    keys, values = list(_PROBE_ARGUMENTS), list(_PROBE_ARGUMENTS.values())
    order = (PROBE_NAME, keys[0], values[0], keys[1], values[1])
    pieces, rest = [], one_call
    for text in order:
        before, match, rest = rest.partition(text)
        if not match:
            return None
        pieces.append(before)
    opening, after_name, after_key, between, after_second_key = pieces
    # what closes an argument is what follows both the first and the last
    closing = os.path.commonprefix([between, rest])
    if not (after_key and closing) or after_second_key != after_key:
        return None
    call = re.compile(rf"{re.escape(opening[-8:])}([\w.\-]+)(?=\W)")
    first_key, next_key = re.compile(re.escape(after_name)), re.compile(re.escape(between[len(closing) :]))
    argument = re.compile(rf"(.+?){re.escape(after_key)}(.*?){re.escape(closing)}", re.DOTALL)

    def read(text: str) -> Calls:
        calls = []
        for match in call.finditer(text):
            arguments, position = {}, first_key.match(text, match.end())
            while position and (element := argument.match(text, position.end())):
                arguments[element[1]] = _typed(element[2])
                position = next_key.match(text, element.end())
            calls.append({"name": match[1], "arguments": arguments})
        return calls

    return read


def _typed(value: Any) -> Any:
    """The value with texts that are JSON replaced by what they mean."""
    if isinstance(value, Mapping):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    if isinstance(value, str) and value in _PYTHON_VALUES:
        return _PYTHON_VALUES[value]
    try:
        return parse_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
