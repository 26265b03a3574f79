"""Positions of virtual tokens inside a conversation: at the beginning of the turns of a role.

Their ids lie beyond the vocabulary, so no text can contain them (decision 0016). A template never sees ids: it gets a
mark, a code point that Unicode reserves for internal use, and `ChatTemplate.encode` puts the ids where the mark comes
out. So any template works that keeps the beginning of a turn. `virtual_token_positions`
builds them from the method.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rung.config.method import MethodConfig, inserted_token_ids
from rung.errors import DataError

MARKS = {"user": "\ufdd0", "assistant": "\ufdd1"}
"""Mark of each role; noncharacters, which no text should contain (The Unicode Standard, section 23.7)."""
_ANY_MARK = re.compile(f"([{''.join(MARKS.values())}])")


@dataclass(frozen=True, slots=True)
class PromptPositions:
    """`ids` by role, at least one: each turn of that role begins with them."""

    ids: Mapping[str, tuple[int, ...]]

    @property
    def first_id(self) -> int:
        """The lowest virtual id; ids of real tokens are smaller."""
        return min(min(ids) for ids in self.ids.values())

    def with_marks(self, turns: Sequence[Mapping[str, Any]], where: str | None) -> list[dict[str, Any]]:
        """Turns as the template receives them. Raises `DataError` where the text itself contains a mark."""
        for turn in turns:
            if match := _ANY_MARK.search(turn["content"]):
                summary, code_point = "the text holds a code point that is not a character", f"U+{ord(match[0]):04X}"
                hint = "remove it: it marks where virtual tokens stand"
                raise DataError(summary, where=where, given=code_point, hint=hint)
        return [{**turn, "content": self._mark(turn["role"]) + turn["content"]} for turn in turns]

    def with_answer_mark(self, text: str, turns: Sequence[Mapping[str, Any]], prefix: str, *, generation: bool) -> str:
        """The rendered text of marked turns, with a mark where the next answer begins.

        `prefix` is what the template writes before an answer but not in the generation prompt: it belongs to
        the answer.
        Raises `DataError` when marks were lost on the way.
        """
        # a template that strips or repeats content would silently drop or double virtual tokens
        if len(_ANY_MARK.findall(text)) != sum(turn["role"] in self.ids for turn in turns):
            fault = "the chat template leaves out or repeats the beginning of a turn, where virtual tokens should stand"
            hint = "put all of them in front, or set model.template to a .jinja file that keeps every turn"
            raise DataError(fault, hint=hint)
        opening = self._mark("assistant")
        if opening and prefix:
            # in generation the model writes the prefix itself, behind the virtual tokens: keep that order in training
            text = text.replace(prefix + opening, opening + prefix)
        return text + opening if generation else text

    def split_at_marks(self, text: str) -> list[str]:
        """Text and marks alternating, `[text, mark, text, ..., text]`."""
        return _ANY_MARK.split(text)

    def ids_of_mark(self, mark: str) -> tuple[int, ...]:
        """The virtual ids of a mark."""
        return next(ids for role, ids in self.ids.items() if MARKS[role] == mark)

    def _mark(self, role: str) -> str:
        return MARKS[role] if role in self.ids else ""


def virtual_token_positions(method: MethodConfig, vocab_size: int) -> PromptPositions | None:
    """Virtual tokens that a method puts inside conversations, as ids from `vocab_size` on; None for most methods."""
    ids = inserted_token_ids(method, vocab_size)
    return PromptPositions(ids) if ids else None
