"""Rows of each format as conversations: the checked turns of a row and its compared answers.

One function per shape of row; `messages` reads the turns, `candidates` and `pairs` the answers. `formats` calls
`conversation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rung.config.data import Format
from rung.data.candidates import pair_candidates, parse_answer, parse_answers, parse_label
from rung.data.content_parts import is_parts
from rung.data.messages import (
    Getter,
    TurnFields,
    from_history,
    from_messages,
    optional_text,
    text_of,
    turns_of_text,
)
from rung.data.pairs import Pair, Turns, read_pair, transcript_turns, with_shared
from rung.data.soft_labels import with_probability
from rung.data.turn_order import check_order
from rung.errors import DataError
from rung.types import Candidate, Message


class Conversation(NamedTuple):
    """The checked turns of a row, and in comparison formats all its answers, best first.

    The best answer is that of the last turn; rows without answers end in an empty one.
    """

    messages: Turns
    candidates: list[Candidate]
    probability: float | None = None
    """Of a pair with a soft label: probability that the first answer is the better one, from 0.5 to 1."""


def conversation(format: Format, get: Getter, fields: TurnFields) -> Conversation:
    """The turns and the answers of a row."""
    if format == "unpaired_preference" and get("messages") is not None:
        messages = from_messages(get("messages"), "messages", fields)
        check_order(messages)
        answer, label = messages[-1], parse_label(get("label"))
        return Conversation(messages, [Candidate(answer.content, label, answer.tool_calls, answer.reasoning)])
    if format == "preference":
        prompt, pair = _compared(get, fields)
        candidates = pair_candidates(get, pair.chosen, pair.rejected)
    else:
        candidates = parse_answers(format, get, fields)
        prompt = _prompt(get, fields) if candidates or format == "prompt_only" else ()
    # before the turns are built: the answer that the label prefers is the best one
    candidates, probability = with_probability(candidates, get("probability")) if candidates else ([], None)
    if candidates:
        best = candidates[0]
        messages = (*prompt, Message("assistant", best.content, best.tool_calls, reasoning=best.reasoning))
    elif format == "prompt_only":
        messages = (*prompt, Message("assistant", ""))
    else:
        messages = _messages(format, get, fields)
    check_order(messages, "conversations" if format == "sharegpt" else "messages")
    return Conversation(messages, candidates, probability)


def _compared(get: Getter, fields: TurnFields) -> tuple[Turns, Pair]:
    """The prompt of a pair, from its column or the beginning that both answers share, and the pair.

    Without `chosen` the last answer of `messages` is the better one, as ms-swift writes pairs.
    """
    if get("chosen") is None and get("messages") is not None:
        rejected = get("rejected")
        if isinstance(rejected, list) and len(rejected) > 1 and not is_parts(rejected):
            pair = read_pair(lambda name: get("messages" if name == "chosen" else name), fields)
            return pair.shared, pair
        *turns, chosen = from_messages(get("messages"), "messages", fields)
        if chosen.role != "assistant":
            raise DataError(f"messages ends with a turn of the {chosen.role}, not with the better answer")
        return tuple(turns), Pair((), chosen, parse_answer(get("rejected"), "rejected", fields))
    pair, given = read_pair(get, fields), _given_prompt(get, fields)
    if not given and not pair.shared:
        remedy = "name the column of the prompt, for example data.map: {prompt: question}"
        raise DataError(f"no prompt, and chosen and rejected are no conversations; {remedy}")
    if pair.shared and not given:
        system = _system(get)  # in a column of its own, or at the beginning of the conversations, or in both
        return (pair.shared if pair.shared[:1] == system else (*system, *pair.shared)), pair
    return with_shared(given, pair.shared) if pair.shared else given, pair


def _given_prompt(get: Getter, fields: TurnFields) -> Turns:
    """The prompt of a pair from the columns `prompt`, `conversations`, `instruction` or `messages`, if there is one."""
    if get("prompt") is not None:
        return _prompt(get, fields)
    if get("conversations") is not None:
        return (*_system(get), *from_messages(get("conversations"), "conversations", fields))
    if get("instruction") is not None:
        question = _with_input(get("instruction"), "instruction", get, fields)
        return (*_system(get), *from_history(get("history"), fields), Message("user", question))
    if get("messages") is not None:
        turns = from_messages(get("messages"), "messages", fields)
        # UltraFeedback repeats the better conversation in this column
        return turns if turns[-1].role == "user" else ()
    return ()


def _messages(format: Format, get: Getter, fields: TurnFields) -> Turns:
    match format:
        case "messages":
            return from_messages(get("messages"), "messages", fields)
        case "sharegpt":
            return (*_system(get), *from_messages(get("conversations"), "conversations", fields))
        case "alpaca":
            question = _with_input(get("instruction"), "instruction", get, fields)
            answer = text_of(get("output"), "output", fields.answers)
            history = from_history(get("history"), fields)
            return (*_system(get), *history, *_question_answer_turns(question, answer))
        case "prompt_completion":
            return _prompt_completion(get("prompt"), get("completion"), fields)
        case _:
            question = text_of(get("question"), "question", fields.questions)
            answer = text_of(get("answer"), "answer", fields.answers)
            return (*_system(get), *_question_answer_turns(question, answer))


def _prompt_completion(prompt: object, completion: object, fields: TurnFields) -> Turns:
    prompt = turns_of_text(prompt, "prompt", fields)
    if isinstance(prompt, list):  # a completion alone may be meant as JSON
        completion = turns_of_text(completion, "completion", fields)
    if isinstance(prompt, list) and not is_parts(prompt):
        turns = from_messages(prompt, "prompt", fields)
        if isinstance(completion, list) and not is_parts(completion):
            return (*turns, *from_messages(completion, "completion", fields))
        return (*turns, Message("assistant", text_of(completion, "completion", fields.answers)))
    if isinstance(completion, list) and not is_parts(completion):
        raise DataError("prompt and completion must both be text or both be lists of messages")
    question = text_of(prompt, "prompt", fields.questions)
    return _question_answer_turns(question, text_of(completion, "completion", fields.answers))


def _prompt(get: Getter, fields: TurnFields) -> Turns:
    prompt: Any = turns_of_text(get("prompt"), "prompt", fields)
    # OpenAI's pairs have the prompt and its tools in one object
    if isinstance(prompt, Mapping) and "messages" in prompt:
        prompt = prompt["messages"]
    if isinstance(prompt, list) and not is_parts(prompt):
        return (*_system(get), *from_messages(prompt, "prompt", fields))
    is_transcript = isinstance(prompt, str) and prompt.rstrip().endswith("\n\nAssistant:")
    if is_transcript and (turns := transcript_turns(prompt, "prompt")) is not None:
        fields.converted["prompts that were transcripts of Human and Assistant"] += 1
        return (*_system(get), *turns[:-1])
    return (*_system(get), Message("user", _with_input(prompt, "prompt", get, fields)))


def _with_input(value: object, name: str, get: Getter, fields: TurnFields) -> str:
    """The question, followed by the column `input` where there is one."""
    question = text_of(value, name, fields.questions)
    extra = optional_text(get("input"), "input", fields.questions)
    return f"{question}\n{extra}" if extra else question


def _question_answer_turns(question: str, answer: str) -> tuple[Message, Message]:
    return Message("user", question), Message("assistant", answer)


def _system(get: Getter) -> Turns:
    system = optional_text(get("system"), "system")
    return (Message("system", system),) if system else ()
