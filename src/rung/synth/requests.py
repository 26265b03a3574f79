"""The conversations in which a teacher is asked for questions, answers and dialogues.

Examples are earlier turns of the conversation, in the form in which an answer is wanted, so that untuned and small
models follow it and nothing has to be parsed. The texts are part of the result: another word gives other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rung.data.chat import turns_with_context, with_context
from rung.inference.ask import Conversation
from rung.types import Message

QUESTION_SYSTEM = "You write questions for a data set. Reply with one question and nothing else."
TEXT_SYSTEM = "You write texts for a data set. Reply with one text and nothing else."
ABOUT = " The data set is about: {task}"
NEW_QUESTION = "Write a new question."
NEW_QUESTION_ABOUT = "Write a question that this text answers."
NEW_TEXT = "Write a text with the label: {label}"
NEXT_QUESTION = "Write the next question of this person, who has read the answer."
WITH_ATTRIBUTES = " Take into account: {attributes}."
EXPLAIN = "Give your reasons first. End with a line that begins with `Answer:` and states the answer alone."
ANSWER_LINE = "Answer:"


@dataclass(frozen=True, slots=True)
class WorkedExample:
    """A row that stands before a request: a seed, or one that was made before."""

    question: str
    answer: str
    context: str | None = None
    label: str | None = None
    """The label of the text in `question`, where texts are made."""
    source: str = ""


def question_request(
    task: str | None, examples: Sequence[WorkedExample], passage: str | None, attributes: Mapping[str, str]
) -> Conversation:
    """Ask for a question, about a passage if there is one."""
    turns = [_system(QUESTION_SYSTEM, task)]
    for example in examples:
        turns += [Message("user", _question_prompt(example.context, {})), Message("assistant", example.question)]
    return Conversation((*turns, Message("user", _question_prompt(passage, attributes))))


def text_request(
    task: str | None, examples: Sequence[WorkedExample], label: str, attributes: Mapping[str, str]
) -> Conversation:
    """Ask for a text that has a label; the examples are texts with theirs."""
    turns = [_system(TEXT_SYSTEM, task)]
    for example in examples:
        prompt = NEW_TEXT.format(label=example.label)
        turns += [Message("user", prompt), Message("assistant", example.question)]
    return Conversation((*turns, Message("user", NEW_TEXT.format(label=label) + _in_words(attributes))))


def answer_request(
    task: str | None,
    examples: Sequence[WorkedExample],
    turns: Sequence[Message],
    passage: str | None,
    *,
    explain: bool = False,
) -> Conversation:
    """Ask for the answer to the last of `turns`, behind worked examples and with the passage before the question."""
    instruction = " ".join(filter(None, [task, EXPLAIN if explain else None]))
    before = [Message("system", instruction)] if instruction else []
    for example in examples:
        question = with_context(example.context, example.question) if example.context else example.question
        before += [Message("user", question), Message("assistant", example.answer)]
    return Conversation((*before, *turns_with_context(turns, passage)))


def next_question_request(task: str | None, turns: Sequence[Message], passage: str | None) -> Conversation:
    """Ask for the next question of a dialogue, whose turns so far end in an answer (Xu et al. 2023, self-chat)."""
    spoken = "\n\n".join(f"{'Question' if turn.role == 'user' else 'Answer'}: {turn.content}" for turn in turns)
    text = with_context(passage, spoken) if passage is not None else spoken
    return Conversation((_system(QUESTION_SYSTEM, task), Message("user", f"{text}\n\n{NEXT_QUESTION}")))


def final_answer(text: str) -> str | None:
    """What stands behind the last `Answer:` at the beginning of a line; None without one."""
    lines = [line for line in text.splitlines() if line.strip().startswith(ANSWER_LINE)]
    return lines[-1].strip().removeprefix(ANSWER_LINE).strip() or None if lines else None


def _system(text: str, task: str | None) -> Message:
    return Message("system", text + (ABOUT.format(task=task) if task else ""))


def _question_prompt(passage: str | None, attributes: Mapping[str, str]) -> str:
    if passage is None:
        return NEW_QUESTION + _in_words(attributes)
    return with_context(passage, NEW_QUESTION_ABOUT + _in_words(attributes))


def _in_words(attributes: Mapping[str, str]) -> str:
    values = ", ".join(f"{name}: {value}" for name, value in attributes.items())
    return WITH_ATTRIBUTES.format(attributes=values) if values else ""
