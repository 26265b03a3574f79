"""From drawn tokens to the text that a client gets: what may be sent already, and why an answer ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rung.data.chat import ChatTemplate
from rung.models.slot_batch import DrawnToken

FinishReason = Literal["stop", "length"]
HALF_CHARACTER = "\ufffd"
"""What a decoder writes for bytes whose rest is in tokens to come."""


@dataclass
class AnswerText:
    """One answer as it grows."""

    chat: ChatTemplate
    max_new_tokens: int
    stop_texts: Sequence[str] = ()
    is_turn: bool = True
    """Whether the text is a turn of the template, whose own stops and framing are left out; else a plain completion."""
    tokens: list[DrawnToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    sent: int = 0
    """Characters that were given out."""

    def add(self, drawn: DrawnToken) -> str:
        """Add a token; return the text that can be sent now. `finish_reason` is set by the last one."""
        self.tokens.append(drawn)
        is_end = drawn.token in self.chat.generation_stop_ids
        text, is_stopped = self._text()
        if is_end or is_stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_new_tokens:
            self.finish_reason = "length"
        safe = text if self.finish_reason else text[: len(text) - self._held(text)]
        new, self.sent = safe[self.sent :], max(self.sent, len(safe))
        return new

    @property
    def text(self) -> str:
        """The whole text so far, before a stop text."""
        return self._text()[0]

    def _text(self) -> tuple[str, bool]:
        ids = [drawn.token for drawn in self.tokens]
        if self.is_turn:
            text = self.chat.assistant_text(ids)
        else:
            end = next((i for i, token in enumerate(ids) if token in self.chat.generation_stop_ids), len(ids))
            text = self.chat.decode([ids[:end]], mid_document=True)[0]
        places = [place for stop in self.stop_texts if (place := text.find(stop)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def _held(self, text: str) -> int:
        """Characters at the end that may still change, or become a stop text."""
        held = len(text) - len(text.rstrip(HALF_CHARACTER))
        for stop in self.stop_texts:
            longest = min(len(stop) - 1, len(text))
            held = max(held, next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0))
        return held
