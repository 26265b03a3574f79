"""An Ollama folder: a Modelfile whose TEMPLATE was derived from the run's own chat template.

Ollama reads Go templates and no Jinja, and tools that map a model's name to a template frame text otherwise than it was
trained. Here the Jinja template is rendered with sentinels for its turns, what stands around them becomes the Go
template, and four conversations are composed from it again: where one differs from what the run reads, the export is
refused. Tools and reasoning stay with the Jinja template, which llama.cpp reads from the same file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rung.errors import PlanError
from rung.types import Message

Render = Callable[[Sequence[Message], bool], str]
"""The text of a conversation, with the opening of an answer or without it."""
_S, _U, _A = "\ue000system\ue000", "\ue000user\ue000", "\ue000assistant\ue000"
"""Sentinels from Unicode's private area, which no template writes."""


@dataclass(frozen=True, slots=True)
class TurnFrames:
    """What a template writes around the turns of each role."""

    start: str
    """Before the first turn."""
    frames: dict[str, tuple[str, str]]
    """Text before and after the turn by role."""
    default_system: str
    """Written where a conversation has no system turn, in place of one; often empty."""
    opening: str
    """Opens the answer."""
    trims: bool = False
    """Whether the template takes spaces off both ends of a turn, which Go's cannot."""

    def compose(self, turns: Sequence[Message]) -> str:
        """The text of a conversation, as the Go template writes it."""
        has_system = bool(turns) and turns[0].role == "system"
        text = self.start + ("" if has_system else self.default_system)
        for turn in turns:
            before, after = self.frames[turn.role]
            text += before + turn.content + after
        return text + self.opening

    def go_template(self) -> str:
        """The template in Go's language, over Ollama's `.Messages`."""
        parts = [_literal(self.start)]
        if self.default_system:
            # Ollama sets .System from the first system message
            parts.append("{{ if not .System }}" + _literal(self.default_system) + "{{ end }}")
        parts.append("{{ range .Messages }}")
        for number, (role, (before, after)) in enumerate(self.frames.items()):
            test = "if" if number == 0 else "else if"
            parts.append(f'{{{{ {test} eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}')
        parts.append("{{ end }}{{ end }}" + _literal(self.opening))
        return "".join(parts)


def _literal(text: str) -> str:
    """Text as it stands in a Go template: braces would open an action."""
    return text.replace("{{", '{{ "{{" }}')


def read_frames(render: Render, bos: str | None) -> TurnFrames:
    """What a chat template writes around turns, without the BOS that llama.cpp puts in front.

    Raises `PlanError` for a template that Go's cannot follow.
    """

    def bare(turns: Sequence[Message], opens_answer: bool = True) -> str:
        return render(turns, opens_answer).removeprefix(bos or "")

    try:
        frames = _split(bare)
        for turns in _conversations():
            # a template that refuses system turns is followed without them
            if (turns[0].role == "system") <= ("system" in frames.frames) and frames.compose(turns) != bare(turns):
                raise ValueError(f"a conversation of {' '.join(t.role for t in turns)}")
    except (ValueError, KeyError) as error:
        summary = "the chat template cannot be written in Ollama's language"
        hint = "rung export --as gguf: llama.cpp reads the template itself"
        raise PlanError(summary, where="--as ollama", given=str(error), hint=hint) from error
    spaced = [Message("user", "  How much is it?\n")]
    return replace(frames, trims=frames.compose(spaced) != bare(spaced))


def _split(render: Render) -> TurnFrames:
    """Frames from four rendered conversations. Raises `ValueError` where a sentinel is missing."""
    user, system, assistant = Message("user", _U), Message("system", _S), Message("assistant", _A)
    head, _, after_user = _cut(render([user], False), _U)
    before_second, _, opened = _cut(render([user, assistant, user], True), _U, last=True)
    between, _, after_answer = _cut(_cut(before_second, _U)[2], _A)
    after_assistant = _common_start(_cut(render([user, assistant], False), _A)[2], after_answer)
    # the first user turn opens with what precedes every later one
    before_user = _common_end(head, after_answer[len(after_assistant) :])
    after_assistant = after_answer[: len(after_answer) - len(before_user)]
    # templates that open no answer may write what ends a question only before an answer
    after_user = _common_start(_common_start(after_user, between), opened)
    opening, before_assistant = opened[len(after_user) :], between[len(after_user) :]
    frames = {"user": (before_user, after_user), "assistant": (before_assistant, after_assistant)}
    start = head[: len(head) - len(before_user)]
    try:
        with_system = render([system, user], True)
        before_system, _, rest = _cut(with_system, _S)
    # a template that refuses system turns, as Gemma's does
    except Exception:
        return TurnFrames(start, frames, "", opening)
    tail = before_user + _U + after_user + opening
    if not rest.endswith(tail):
        raise ValueError("what follows a system turn")
    # what stands before both a system turn and a default one is the start of every conversation
    common = _common_start(before_system, start) if start else ""
    frames = {"system": (before_system[len(common) :], rest[: len(rest) - len(tail)]), **frames}
    return TurnFrames(common, frames, start[len(common) :], opening)


def _cut(text: str, sentinel: str, *, last: bool = False) -> tuple[str, str, str]:
    parts = text.rpartition(sentinel) if last else text.partition(sentinel)
    if parts[1] != sentinel:
        raise ValueError("a turn that the template leaves out")
    return parts


def _common_start(first: str, second: str) -> str:
    return os.path.commonprefix([first, second])


def _common_end(first: str, second: str) -> str:
    return _common_start(first[::-1], second[::-1])[::-1]


def _conversations() -> list[list[Message]]:
    """Conversations that are composed again: one turn, with a system turn, several turns, and braces."""
    user, answer = Message("user", "How much is it?"), Message("assistant", "12 euros.")
    system = Message("system", "Be brief.")
    long = [user, answer, user, answer, Message("user", "Two\n\nlines {{ }}")]
    return [[user], [system, user], [user, answer, user], [system, *long]]


def modelfile(gguf: str, frames: TurnFrames, stops: Sequence[str]) -> str:
    """The text of a Modelfile. Raises `PlanError` for a template or stop with three quotation marks, which end it."""
    template = frames.go_template()
    if any('"""' in text for text in (template, *stops)):
        summary = "a Modelfile cannot hold this template or stop: it has three quotation marks in a row"
        raise PlanError(summary, where="--as ollama", hint="rung export --as gguf")
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""', "PARAMETER temperature 0"]
    # Ollama takes what stands between the quotation marks as it is: it knows no escapes
    lines += [f'PARAMETER stop """{stop}"""' if '"' in stop else f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"
