"""Items that people label: a prompt with the answers of one or several systems.

Equal answers to one prompt are one answer: nobody is asked whether a text is better than itself. `candidates` reads
items from files and run folders, `tasks` makes them into what a person is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

from rung.types import Message

MODEL_FAMILIES = (
    *("chatgpt", "gpt-3", "gpt-4", "gpt-5", "openai", "claude", "anthropic", "gemini", "llama", "mistral", "mixtral"),
    *("qwen", "tongyi", "deepseek", "smollm", "phi-2", "phi-3", "phi-4", "gemma", "vicuna", "alpaca", "pandalm"),
)
"""Names in an answer that tell a person which model wrote it."""
MAX_ANSWERS = 26
"""Answers of one item: each has a letter as its key."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One text, and the systems that wrote it."""

    text: str
    systems: tuple[str, ...] = ()
    """Names of runs, rungs or models; empty where the source names none."""


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and its distinct answers."""

    prompt: tuple[Message, ...]
    answers: tuple[Answer, ...]
    context: str | None = None
    group: str | None = None
    """Items of one group are one cluster in intervals."""
    expected: str | None = None
    """The expected answer, which nobody is shown: it would decide in place of the person."""
    id: str = field(default="")

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", prompt_id(self.prompt, self.context))

    @property
    def cluster(self) -> str:
        """The group, or else the item itself."""
        return self.group if self.group is not None else self.id

    @property
    def question(self) -> str:
        """The last turn of the user."""
        return next((turn.content for turn in reversed(self.prompt) if turn.role == "user"), "")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the database."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Item:
        """The item of `to_json`."""
        prompt = tuple(Message(**turn) for turn in values["prompt"])
        answers = tuple(Answer(answer["text"], tuple(answer["systems"])) for answer in values["answers"])
        return Item(**{**values, "prompt": prompt, "answers": answers})


def prompt_id(prompt: Sequence[Message], context: str | None) -> str:
    """64 bits of SHA-256 of the turns and the context, as 16 hexadecimal digits."""
    parts = [context or "", *(f"{turn.role}\0{turn.content}\0{turn.tool_calls or ''}" for turn in prompt)]
    return sha256("\0\0".join(parts).encode(errors="surrogatepass")).hexdigest()[:16]


def merge_answers(answers: Iterable[tuple[str, str | None]]) -> tuple[Answer, ...]:
    """Distinct texts in order, each with the systems that wrote it; white space at the ends does not count."""
    systems: dict[str, list[str]] = {}
    for text, system in answers:
        names = systems.setdefault(text.strip(), [])
        if system is not None and system not in names:
            names.append(system)
    return tuple(Answer(text, tuple(names)) for text, names in systems.items())


def items_that_name_models(items: Iterable[Item]) -> list[str]:
    """Ids of items with an answer in which the name of a model family or of one of the systems stands.

    Such an answer is not blind: a person may prefer the name.
    """
    return [item.id for item in items if any(_names_model(answer, item) for answer in item.answers)]


def _names_model(answer: Answer, item: Item) -> bool:
    systems = {name.lower() for other in item.answers for name in other.systems}
    text, asked = answer.text.lower(), item.question.lower()
    # a question about a model may well be answered with its name
    names = [name for name in {*MODEL_FAMILIES, *systems} if name in text and name not in asked]
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in names)
