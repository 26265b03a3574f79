"""What Rung raises. Every message says where, what was given, what is allowed and what to do.

The command line turns each class into its exit code: 2 when the user's input is at fault, 3 when
Rung refuses. Anything that is not a `RungError` is a bug and exits 1.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import ClassVar

INPUT_AT_FAULT = 2
REFUSED = 3


class RungError(Exception):
    """Base of all. `summary` is one line; the other parts are printed below it, indented."""

    exit_code: ClassVar[int] = INPUT_AT_FAULT

    def __init__(
        self,
        summary: str,
        *,
        where: str | None = None,
        given: object = None,
        allowed: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.summary = summary
        self.where = where
        self.given = given
        self.allowed = allowed
        self.hint = hint
        super().__init__(self._render())

    def _render(self) -> str:
        head = f"{self.where}: {self.summary}" if self.where else self.summary
        lines = [head]
        if self.given is not None:
            lines.append(f"  given: {_shorten(self.given)}")
        if self.allowed:
            lines.append(f"  allowed: {self.allowed}")
        if self.hint:
            lines.append(f"  {self.hint}")
        return "\n".join(lines)


class ConfigError(RungError):
    """The config cannot be what the user meant."""


class DataError(RungError):
    """A data file or a row in it cannot be used."""


class PlanError(RungError):
    """The combination is unsupported or does not fit."""

    exit_code = REFUSED


class CheckpointError(RungError):
    """A run folder or checkpoint is missing, occupied, damaged or of another base."""

    exit_code = REFUSED


class GateError(RungError):
    """A gate measured something that must not be."""

    exit_code = REFUSED


class NoSignalError(GateError):
    """A run ended without anything to learn from: every group of answers had equal rewards."""


def did_you_mean(word: str, known: list[str]) -> str | None:
    """The nearest of `known`, or None when nothing is near."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return near[0] if near else None


def _shorten(value: object, limit: int = 300) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
