"""Rows of each format as conversations: the checked turns of a row and its compared answers.

One function per shape of row; `messages` reads the turns and `candidates` the answers. `formats` calls `conversation`.
"""

from __future__ import annotations

from rung.config.data import Format
from rung.data.candidates import parse_answers, parse_label
from rung.data.messages import (
    Getter,
    TurnFields,
    check_order,
    from_history,
    from_messages,
    from_sharegpt,
    optional_text,
    text_of,
)
from rung.errors import DataError
from rung.types import Candidate, Message


def conversation(format: Format, get: Getter, fields: TurnFields) -> tuple[tuple[Message, ...], list[Candidate]]:
    """The checked turns of a row, and in comparison formats all its answers, best first.

    The best answer is that of the last turn; rows without answers end in an empty one.
    """
    if format == "unpaired_preference" and get("messages") is not None:
        messages = from_messages(get("messages"), "messages", fields)
        check_order(messages)
        answer = messages[-1]
        return messages, [Candidate(answer.content, parse_label(get("label")), answer.tool_calls, answer.reasoning)]
    candidates = parse_answers(format, get, fields)
    if candidates:
        best = candidates[0]
        messages = (
            *_prompt(get, fields),
            Message("assistant", best.content, best.tool_calls, reasoning=best.reasoning),
        )
    elif format == "prompt_only":
        messages = (*_prompt(get, fields), Message("assistant", ""))
    else:
        messages = _messages(format, get, fields)
    check_order(messages)
    return messages, candidates


def _messages(format: Format, get: Getter, fields: TurnFields) -> tuple[Message, ...]:
    match format:
        case "messages":
            return from_messages(get("messages"), "messages", fields)
        case "sharegpt":
            return (*_system(get), *from_sharegpt(get("conversations"), fields))
        case "alpaca":
            question = _with_input(get("instruction"), "instruction", get)
            answer = text_of(get("output"), "output")
            return (*_system(get), *from_history(get("history")), *_question_answer_turns(question, answer))
        case "prompt_completion":
            prompt, completion = get("prompt"), get("completion")
            if isinstance(prompt, list) and isinstance(completion, list):
                turns = from_messages(prompt, "prompt", fields), from_messages(completion, "completion", fields)
                return (*turns[0], *turns[1])
            if isinstance(prompt, list) or isinstance(completion, list):
                raise DataError("prompt and completion must both be text or both be lists of messages")
            return _question_answer_turns(text_of(prompt, "prompt"), text_of(completion, "completion"))
        case _:
            pair = _question_answer_turns(text_of(get("question"), "question"), text_of(get("answer"), "answer"))
            return (*_system(get), *pair)


def _prompt(get: Getter, fields: TurnFields) -> tuple[Message, ...]:
    prompt = get("prompt")
    if isinstance(prompt, list):
        return (*_system(get), *from_messages(prompt, "prompt", fields))
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
