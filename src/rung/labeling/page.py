"""What the page shows: texts as paragraphs and code, the answers of a slot without their systems, and progress.

Answers of models are hostile text. They are never markup: the template escapes every value, and characters that would
turn a text round or hide a part of it are shown as escapes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from statistics import median
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from rung import report
from rung.console import visible
from rung.human_labels.store import CastVote, LabelStore
from rung.human_labels.tasks import Slot
from rung.human_labels.votes import Vote

_NEVER_EDITED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_FENCE = re.compile(r"^```[^\n]*\n(.*?)(?:^```[ \t]*$|\Z)", re.M | re.S)
LEAST_TIMED = 3
"""Votes after which the time that is left is shown."""


class Block(NamedTuple):
    """A part of a text. Each has its own direction, so that a page may mix Arabic and English."""

    kind: Literal["text", "code"]
    text: str


def blocks(text: str) -> list[Block]:
    """A text as paragraphs and fenced code; no other markup is read, so mathematics stays as it was written."""
    text = _unix_lines(text)
    found, end = [], 0
    for fence in _FENCE.finditer(text):
        found += _paragraphs(text[end : fence.start()])
        found.append(Block("code", fence[1].rstrip("\n")))
        end = fence.end()
    return found + _paragraphs(text[end:])


def _paragraphs(text: str) -> list[Block]:
    return [Block("text", part.strip("\n")) for part in re.split(r"\n[ \t]*\n", text) if part.strip()]


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def editable(text: str) -> Markup:
    """A text as a person edits and sends it back: without the characters that `visible` shows as escapes.

    An escape would be stored as a part of the corrected answer. The marks U+061C, U+200E and U+200F stay: Arabic and
    Hebrew need them, and they turn no other text round.
    """
    return escape(_NEVER_EDITED.sub("", _unix_lines(text)))


@dataclass(frozen=True)
class ShownAnswer:
    """An answer as a person sees it."""

    letter: str
    blocks: list[Block]
    editable: Markup


@dataclass(frozen=True)
class Progress:
    """How far a person is."""

    done: int
    total: int
    time_left: str

    @property
    def percent(self) -> int:
        """Done in percent."""
        return round(100 * self.done / max(1, self.total))


def progress(store: LabelStore, person: int) -> Progress:
    """How far a person is, and the time left at the median time of a task."""
    done, seconds = store.progress(person)
    total = len(store.slots[person])
    left = (total - len(done)) * median(seconds) if len(seconds) >= LEAST_TIMED else None
    return Progress(len(done), total, _time_left(left) if left else "")


def _time_left(seconds: float) -> str:
    """A time as rough as it is known: 806 seconds are 14 min."""
    minutes = ceil(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours < 10 else f"{hours} h"


def task_page(store: LabelStore, person: int, position: int, message: str = "") -> str:
    """The page of one slot of a person."""
    slot = store.slots[person][position]
    revision, cast, note = store.vote(person, position)
    last = store.last_vote(person)
    item, kind = slot.task.item, store.settings.kind
    answers = [
        ShownAnswer(letter, blocks(item.answers[i].text), editable(item.answers[i].text))
        for letter, i in zip(ascii_uppercase, slot.shown, strict=False)
    ]
    turns = [(turn.role, blocks(turn.content)) for turn in item.prompt]
    return _render(
        "task.html",
        store,
        person,
        position=position,
        turns=turns,
        context=blocks(item.context) if item.context else [],
        answers=answers,
        chosen=_chosen(cast, slot) if cast else {},
        note=editable(note),
        revision=revision,
        form_token=store.form_token(person),
        message=message,
        title=f"Task {position + 1}",
        kind=kind,
        scale=store.settings.scale,
        previous=position - 1 if position else None,
        following=position + 1 if position + 1 < len(store.slots[person]) else None,
        last="" if last is None else f"{last[0]}-{last[1]}",
    )


def _chosen(cast: CastVote, slot: Slot) -> dict[str, Any]:
    """The vote that a person has cast, in the fields of the form."""
    vote: Vote = cast.vote
    if vote.ranks is not None:
        ranks = vote.ranks
        return {f"rank_{place}": ranks[answer] for place, answer in enumerate(slot.shown)} | {"bad": vote.is_bad}
    if vote.outcome is not None:
        if vote.outcome.outcome == "tie":
            return {"choice": "both_bad" if vote.is_bad else "tie"}
        preferred = vote.outcome.first if vote.outcome.outcome == "first" else vote.outcome.second
        return {"choice": "left" if preferred == slot.shown[0] else "right"}
    text = editable(vote.text) if vote.text else None
    values = {"score": vote.score, "text": text, "skip": vote.kind == "skipped"}
    return {name: value for name, value in values.items() if value}


def done_page(store: LabelStore, person: int) -> str:
    """The page of a person who has voted on everything, with the tasks that were skipped."""
    skipped = [cast.position for cast in store.votes() if cast.person == person and cast.vote.kind == "skipped"]
    return _render("done.html", store, person, title="Done", skipped=sorted(skipped), can_undo=True)


def message_page(title: str, text: str) -> str:
    """A page for a person whom the server does not know, or for an error."""
    return environment().get_template("message.html").render(title=title, text=text)


def _render(name: str, store: LabelStore, person: int, **values: Any) -> str:
    common = {"name": store.people[person], "progress": progress(store, person), "guide": blocks(store.settings.guide)}
    return environment().get_template(name).render(**common, **values)


@cache
def environment() -> Environment:
    """The templates of this folder, in which all values are escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_shown)
    templates.trim_blocks = templates.lstrip_blocks = True
    return templates


def _shown(value: Any) -> Any:
    """Text as `visible` shows it, which the template then escapes; markup of the templates as it is."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def static_file(name: Literal["label.css", "label.js"]) -> bytes:
    """A file that the pages load; the style has the colors of the report."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    if name == "label.css":
        text = (Path(report.__file__).parent / "colors.css").read_text(encoding="utf-8") + text
    return text.encode()


def first_open_position(store: LabelStore, person: int, after: int = -1) -> int | None:
    """The next slot without a vote after a position, or else before it; None where all have one."""
    done, _ = store.progress(person)
    positions: Sequence[int] = sorted(set(range(len(store.slots[person]))) - set(done))
    return next((position for position in positions if position > after), next(iter(positions), None))
