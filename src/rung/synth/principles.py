"""The requests of a constitution: critique, revision and comparison, with worked examples before them.

A critique and a revision are asked for in the dialogue itself, behind the answer, as turns of a user (Bai et al. 2022,
section 3.1). The texts are part of the result: another word gives other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rung.config.constitution import PrincipleConfig
from rung.data.chat import turns_with_context
from rung.data.read import RejectedRow, stream_rows
from rung.errors import DataError
from rung.inference.ask import Conversation
from rung.types import Message

CRITIQUE = "Say in a few sentences in what way your last answer breaks this rule: {rule}"
REVISION = (
    "Write your last answer anew, so that it follows this rule: {rule} Reply with the new answer and nothing else."
)
COMPARISON = "Here are a conversation and two answers to its last turn. Which answer follows this rule better: {rule}"
REASONS = "Give your reasons in a few sentences, without a verdict yet."
CHOICE = "Which answer is better? Reply with A or B and nothing else."
OPTIONS = ("A", "B")
"""A: the answer that is shown first is better; B: the one that is shown second."""
_REVISED = ("rule", "question", "answer", "revision")
_SPEAKERS = {"user": "Human", "assistant": "Assistant"}
_COMPARED = ("rule", "question", "first", "second", "better")


def critique_request(rule: PrincipleConfig) -> str:
    """The turn that asks for a critique of the answer before it."""
    return _put(rule.critique or CRITIQUE, rule)


def revision_request(rule: PrincipleConfig) -> str:
    """The turn that asks for a better answer."""
    return _put(rule.revision or REVISION, rule)


def _put(text: str, rule: PrincipleConfig) -> str:
    """A request with the rule in it; a rule without a full stop would run on into what follows."""
    sentence = rule.rule if rule.rule[-1] in ".!?:" else f"{rule.rule}."
    return text.replace("{rule}", sentence)


@dataclass(frozen=True, slots=True)
class AnswerComparison:
    """Two answers to one conversation."""

    turns: tuple[Message, ...]
    context: str | None
    first: str
    second: str

    def request(self, rule: PrincipleConfig, *, swapped: bool, instruction: str) -> Message:
        """The turn that shows both answers and asks which is better."""
        shown_first, shown_second = (self.second, self.first) if swapped else (self.first, self.second)
        turns = turns_with_context(self.turns, self.context)
        text = "\n\n".join(f"{_SPEAKERS.get(turn.role, turn.role.capitalize())}: {turn.content}" for turn in turns)
        parts = [_put(rule.comparison or COMPARISON, rule), f"[Conversation]\n{text}"]
        parts += [f"[Answer A]\n{shown_first}", f"[Answer B]\n{shown_second}", instruction]
        return Message("user", "\n\n".join(parts))


@dataclass(frozen=True)
class Transcripts:
    """Worked examples of revisions and of comparisons, as turns before a request."""

    revisions: Sequence[Mapping[str, str]] = ()
    comparisons: Sequence[Mapping[str, str]] = ()
    principles: tuple[PrincipleConfig, ...] = ()

    @staticmethod
    def read(path: str | None, principles: tuple[PrincipleConfig, ...], *, critiques: bool) -> Transcripts:
        """Read the rows of a file. Raises `DataError` for a row that is neither form."""
        if path is None:
            return Transcripts(principles=principles)
        revisions: list[dict[str, str]] = []
        comparisons: list[dict[str, str]] = []
        for item in stream_rows(path):
            if isinstance(item, RejectedRow):
                raise DataError(item.reason, where=str(item.source))
            is_comparison = "better" in item.row
            names = _COMPARED if is_comparison else (*_REVISED, *(("critique",) if critiques else ()))
            row = {name: _text(item.row, name, str(item.source)) for name in names}
            if is_comparison and row["better"] not in ("first", "second"):
                raise DataError("not an answer", where=str(item.source), given=row["better"], allowed="first, second")
            (comparisons if is_comparison else revisions).append(row)
        return Transcripts(revisions, comparisons, principles)

    def before_revision(self, *, critiques: bool) -> list[Message]:
        """Turns of whole critiques and revisions."""
        turns = []
        for row in self.revisions:
            rule = self._principle(row["rule"])
            turns += [Message("user", row["question"]), Message("assistant", row["answer"])]
            if critiques:
                turns += [Message("user", critique_request(rule)), Message("assistant", row["critique"])]
            turns += [Message("user", revision_request(rule)), Message("assistant", row["revision"])]
        return turns

    def before_comparison(self) -> list[Message]:
        """Turns of comparisons; every other one is shown in the other order, or one letter would always be right."""
        turns = []
        for number, row in enumerate(self.comparisons):
            swapped = bool(number % 2)
            pair = AnswerComparison((Message("user", row["question"]),), None, row["first"], row["second"])
            option = OPTIONS[(row["better"] == "second") != swapped]
            request = pair.request(self._principle(row["rule"]), swapped=swapped, instruction=CHOICE)
            turns += [request, Message("assistant", option)]
        return turns

    def _principle(self, rule: str) -> PrincipleConfig:
        """The principle of this rule; a rule that is none of them is put in the words of the default."""
        return next((p for p in self.principles if p.rule == rule), PrincipleConfig(rule=rule))


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(text := row.get(name), str) or not text.strip():
        hint = f"a worked example has {', '.join(_REVISED)} and critique, or {', '.join(_COMPARED)}"
        raise DataError(f"no text in column {name}", where=where, given=text, hint=hint)
    return text


def critique_dialogue(examples: Sequence[Message], answered: Sequence[Message], rule: PrincipleConfig) -> Conversation:
    """Worked examples, the dialogue with its answer, and the request for a critique."""
    return Conversation((*examples, *answered, Message("user", critique_request(rule))))


def revision_dialogue(
    examples: Sequence[Message], answered: Sequence[Message], rule: PrincipleConfig, critique: str | None
) -> Conversation:
    """The dialogue of the critique with its reply, and the request for a better answer."""
    criticized = critique_dialogue(examples, answered, rule).turns if critique is not None else (*examples, *answered)
    reply = (Message("assistant", critique),) if critique is not None else ()
    return Conversation((*criticized, *reply, Message("user", revision_request(rule))))
