"""Where virtual tokens stand inside a conversation: before what a turn says.

Their ids lie beyond the vocabulary, so no text can write them. A template never sees ids: it gets a mark instead, a
code point that Unicode reserves for use within a program, and `Chat.encode` puts the ids where the mark came out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rung.config.method import MethodConfig, inserted_token_ids
from rung.errors import DataError
from rung.types import Source

MARKS = {"user": "\ufdd0", "assistant": "\ufdd1"}
"""By role; noncharacters, which no text should hold (The Unicode Standard, section 23.7)."""
_ANY = re.compile(f"([{''.join(MARKS.values())}])")


@dataclass(frozen=True, slots=True)
class PromptPositions:
    """`ids` by role, at least one: each turn of that role begins with them."""

    ids: Mapping[str, tuple[int, ...]]

    @property
    def first(self) -> int:
        """The lowest of the ids: real tokens stand below it."""
        return min(min(ids) for ids in self.ids.values())

    def with_marks(self, turns: Sequence[Mapping[str, Any]], at: Source | None) -> list[dict[str, Any]]:
        """Turns as a template gets them. Raises `DataError` where the text itself holds a mark."""
        for turn in turns:
            if found := _ANY.search(turn["content"]):
                raise DataError(
                    "the text holds a code point that is not a character",
                    where=str(at) if at else None,
                    given=f"U+{ord(found[0]):04X}",
                    hint="remove it: it marks where virtual tokens stand",
                )
        return [{**turn, "content": self._mark(turn["role"]) + turn["content"]} for turn in turns]

    def with_answer_mark(self, text: str, turns: Sequence[Mapping[str, Any]], lead: str, *, generation: bool) -> str:
        """What a template made of marked turns, with a mark where the answer to come begins.

        `lead` is what the template writes before an answer without opening it by that: it belongs to the answer.
        Raises `DataError` when marks were lost on the way.
        """
        if len(_ANY.findall(text)) != sum(turn["role"] in self.ids for turn in turns):
            raise DataError(
                "the chat template leaves out or repeats the beginning of a turn, where virtual tokens should stand",
                hint="put all of them in front, or set model.template to a .jinja file that keeps every turn",
            )
        opening = self._mark("assistant")
        if opening and lead:
            text = text.replace(lead + opening, opening + lead)
        return text + opening if generation else text

    def split_at_marks(self, text: str) -> list[str]:
        """Text and marks in turn, `[text, mark, text, ..., text]`."""
        return _ANY.split(text)

    def ids_of_mark(self, mark: str) -> tuple[int, ...]:
        """The ids that a mark stands for."""
        return next(ids for role, ids in self.ids.items() if MARKS[role] == mark)

    def _mark(self, role: str) -> str:
        return MARKS[role] if role in self.ids else ""


def without_marks(text: str) -> str:
    """The text as a person reads it."""
    return _ANY.sub("", text)


def virtual_token_positions(method: MethodConfig, vocab_size: int) -> PromptPositions | None:
    """Virtual tokens that a method puts inside conversations, as ids from `vocab_size` on; None for most methods."""
    ids = inserted_token_ids(method, vocab_size)
    return PromptPositions(ids) if ids else None
