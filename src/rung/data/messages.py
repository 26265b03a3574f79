"""Conversion of the values of a row into checked turns and compared answers.

Everything is validated here, so that the rest of the package can trust a `Record`. All functions raise `DataError`
with the bare reason; `formats` adds the line of the row. Strict on purpose: a number where text belongs is refused
with a hint instead of converted, because a silently converted label trains the wrong thing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from rung.config.data import Format, LossOn
from rung.data.read import parse_json
from rung.errors import DataError
from rung.types import Candidate, Message, MessageRole, Record, Source

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


def conversation(format: Format, get: Getter) -> tuple[tuple[Message, ...], list[Candidate]]:
    """The checked turns of a row, and in comparison formats all its answers, best first.

    The best answer is that of the last turn; rows without answers end in an empty one.
    """
    candidates = parse_answers(format, get)
    if candidates or format == "prompt_only":
        answer = candidates[0].content if candidates else ""
        messages = (*_prompt(get), Message("assistant", answer))
    else:
        messages = _messages(format, get)
    check_order(messages)
    return messages, candidates


def _messages(format: Format, get: Getter) -> tuple[Message, ...]:
    match format:
        case "messages":
            return from_messages(get("messages"))
        case "sharegpt":
            return (*_system(get), *from_sharegpt(get("conversations")))
        case "alpaca":
            question = _with_input(get("instruction"), "instruction", get)
            answer = text_of(get("output"), "output")
            return (*_system(get), *from_history(get("history")), *_question_answer_turns(question, answer))
        case "prompt_completion":
            prompt, completion = get("prompt"), get("completion")
            if isinstance(prompt, list) and isinstance(completion, list):
                return (*from_messages(prompt, "prompt"), *from_messages(completion, "completion"))
            if isinstance(prompt, list) or isinstance(completion, list):
                raise DataError("prompt and completion must both be text or both be lists of messages")
            return _question_answer_turns(text_of(prompt, "prompt"), text_of(completion, "completion"))
        case _:
            pair = _question_answer_turns(text_of(get("question"), "question"), text_of(get("answer"), "answer"))
            return (*_system(get), *pair)


def _prompt(get: Getter) -> tuple[Message, ...]:
    prompt = get("prompt")
    if isinstance(prompt, list):
        return (*_system(get), *from_messages(prompt, "prompt"))
    question = _with_input(prompt, "prompt", get)
    return (*_system(get), Message("user", question))


def _with_input(value: object, name: str, get: Getter) -> str:
    """The question, followed by the column `input` where there is one."""
    question, extra = text_of(value, name), optional_text(get("input"), "input")
    return f"{question}\n{extra}" if extra else question


def _question_answer_turns(question: str, answer: str) -> tuple[Message, Message]:
    return Message("user", question), Message("assistant", answer)


def _system(get: Getter) -> tuple[Message, ...]:
    system = optional_text(get("system"), "system")
    return (Message("system", system),) if system else ()


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


def from_messages(value: object, name: str = "messages") -> tuple[Message, ...]:
    """A list of {role, content, tool_calls, name} objects, or its JSON text, as turns; their order is not checked."""
    return tuple(_message(item, f"{name}[{i}]") for i, item in enumerate(_list(value, name)))


def from_sharegpt(value: object) -> tuple[Message, ...]:
    """A list of {from, value} objects as turns."""
    turns = []
    for i, item in enumerate(_list(value, "conversations")):
        if not isinstance(item, Mapping):
            raise DataError(f"conversations[{i}] is a {_type_name(item)}, not an object with from and value")
        role, content = item.get("from"), item.get("value")
        # ShareGPT writes a tool call as a turn of a role of its own
        if role == "function_call":
            calls = _json_value(text_of(content, f"value of conversations[{i}]"), f"value of conversations[{i}]")
            turns.append(Message("assistant", "", tool_calls=tool_calls_text(calls)))
        elif isinstance(role, str) and role in _SHAREGPT_ROLES:
            turns.append(_turn(_SHAREGPT_ROLES[role], content, f"conversations[{i}]"))
        else:
            known_roles = ", ".join([*_SHAREGPT_ROLES, "function_call"])
            raise DataError(f"unknown role {role!r} in conversations[{i}]; known: {known_roles}")
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


def _message(item: object, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{name} is a {_type_name(item)}, not an object with role and content")
    role = next((r for r in ROLES if r == item.get("role")), None)
    if role is None:
        raise DataError(f"unknown role {item.get('role')!r} in {name}; known: {', '.join(ROLES)}")
    content = item.get("content")
    if isinstance(content, list):
        content = _joined_parts(content, name)
    calls = item.get("tool_calls")
    if calls and role == "assistant":
        text = "" if content is None else content
        if not isinstance(text, str):
            raise DataError(f"content of {name} is a {_type_name(text)}, not text")
        return Message(role, encodable(text, name), tool_calls=tool_calls_text(calls))
    return _turn(role, content, name, tool=item.get("name") if role == "tool" else None)


def _turn(role: MessageRole, content: object, name: str, tool: object = None) -> Message:
    tool = encodable(tool, "name") if isinstance(tool, str) else None
    if content == "" and role in ("system", "tool"):  # an empty tool result or system prompt carries information
        return Message(role, "", name=tool)
    noun = {"user": "question", "assistant": "answer"}.get(role, "content")
    return Message(role, text_of(content, f"{noun} in {name}"), name=tool)


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
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError("a tool call names no function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # OpenAI writes arguments as JSON text; templates expect the object
        arguments = _json_value(arguments, "arguments of a tool call") if arguments else {}
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


def for_template(message: Message) -> dict[str, Any]:
    """A turn in the form that chat templates expect."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = json.loads(message.tool_calls)
    if message.name:
        turn["name"] = message.name
    return turn


def renders_unchanged(rendered: str, message: Message, answer_prefix: str) -> bool:
    """Whether a template wrote the answer of the row unchanged, ignoring white space.

    `answer_prefix` is what it writes before every answer. Tool calls pass: templates write them in their own form.
    """
    # white space is ignored because many templates strip answers
    rendered, content, prefix = ("".join(text.split()) for text in (rendered, message.content, answer_prefix))
    return bool(message.tool_calls) or rendered in (content, prefix + content)


def unstable_template_error(source: Source, turn: int, loss_on: LossOn, *, rewrites_history: bool) -> DataError:
    """The error for a template whose training text differs from its inference text."""
    fault = "opens this answer otherwise than it writes it"
    if rewrites_history:
        fault = "rewrites earlier turns when a later one comes"
    hint = "set model.template to a .jinja file that keeps the history as it was generated"
    if loss_on == "assistant_turns":
        hint = f"set data.loss_on: answer, or give each turn a row of its own; or {hint}"
    summary = f"turn {turn + 1}: the template {fault}, so the training text is not what the model will see"
    return DataError(summary, where=str(source), hint=hint)


def rewritten_answer_error(source: Source, turn: int, rendered: str) -> DataError:
    """The error for an answer that a template changes."""
    summary = f"turn {turn + 1}: the template writes another answer than the row has"
    hint = "set model.template to a .jinja file that keeps answers whole, reasoning included, or change the rows"
    return DataError(summary, where=str(source), given=repr(rendered), hint=hint)


MAX_SHOWN_CHARACTERS = 60
"""Characters of a wrong value quoted in a message."""


def parse_answers(format: Format, get: Getter) -> list[Candidate]:
    """The answers of a row of a comparison format, best first; an empty list for other formats.

    A pair scores 1 and 0, or its margin and 0; a ranking of k answers k - 1 down to 0; ratings keep their scores; a
    labelled answer scores 1 or 0. Raises `DataError` for rows that compare nothing.
    """
    if format == "preference":
        margin = 1.0 if get("margin") is None else _score(get("margin"))
        if margin <= 0.0:
            raise DataError(f"the margin is {margin:g}: the chosen answer would be no better than the rejected one")
        chosen, rejected = _answer(get("chosen"), "chosen"), _answer(get("rejected"), "rejected")
        if chosen == rejected:
            raise DataError("chosen and rejected are the same")
        candidates = [Candidate(chosen, margin), Candidate(rejected, 0.0)]
    elif format == "ranked":
        texts = [_answer(value, "ranked") for value in _answer_list(get("ranked"), "ranked")]
        candidates = [Candidate(text, float(len(texts) - 1 - rank)) for rank, text in enumerate(texts)]
    elif format == "rated":
        texts = [_answer(value, "answers") for value in _answer_list(get("answers"), "answers")]
        scores = [_score(value) for value in _answer_list(get("scores"), "scores")]
        if len(texts) != len(scores):
            raise DataError(f"{len(texts)} answers and {len(scores)} scores")
        # a stable sort: equal ratings keep the order of the file
        candidates = sorted(map(Candidate, texts, scores), key=lambda r: -r.score)
    elif format == "unpaired_preference":
        return [Candidate(_answer(get("completion"), "completion"), _label(get("label")))]
    else:
        return []
    if len(candidates) < 2:
        raise DataError("one answer has nothing to be compared with")
    # equal texts with different scores would push one sequence up and down at once
    if len({r.content for r in candidates}) < len(candidates):
        raise DataError("two of the answers are the same")
    if candidates[0].score == candidates[-1].score:
        raise DataError("all answers have the same score")
    return candidates


def parse_weight(value: object) -> float:
    """How often a row counts; numbers in text are accepted. Raises `DataError` unless it is positive and finite."""
    number = 1.0 if value is None else _number(value)
    if not 0 < number < math.inf:
        raise DataError(f"weight is {_short_repr(value)}, not a positive number")
    return number


def _number(value: object) -> float:
    """The value as float; NaN for booleans, words, and integers beyond the range of floats."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _short_repr(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def _answer(value: object, name: str) -> str:
    """An answer as text, as a message, or as a list with one message."""
    # TRL's conversational format: chosen and rejected are lists of messages
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        (message,) = from_messages([value], name)
        if message.role != "assistant":
            raise DataError(f"{name} is a turn of the {message.role}, not an answer")
        return message.content
    return text_of(value, name)


def _label(value: object) -> float:
    if value not in (0, 1):  # True and False among them
        raise DataError(f"label is {value!r}, not true or false")
    return float(bool(value))


def _score(value: object) -> float:
    if isinstance(value, str) or not math.isfinite(number := _number(value)):
        raise DataError(f"a score is {_short_repr(value)}, not a number")
    return number


def _answer_list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name} is no list")
    return value


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
            raise DataError(f"references is the text {_short_repr(value)}, not a list of answers") from error
    return tuple(text_of(item, "reference") for item in _answer_list(value, "references"))


def expected_text(record: Record) -> str:
    """The expected answer; for a tool call its JSON text."""
    return record.answer or record.messages[-1].tool_calls or ""
