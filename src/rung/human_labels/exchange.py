"""Labels of other tools: Arena's conversations, Argilla's flat records, Label Studio's JSON, and labeled pairs.

The kind of a file is read off its columns. What cannot be read is refused with its row, never left out in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rung.console import print_status
from rung.data.read import RejectedRow, stream_rows
from rung.errors import DataError
from rung.human_labels.data import LabelData, LabeledVote
from rung.human_labels.items import Answer, Item, merge_answers, prompt_id
from rung.human_labels.tasks import LabelKind
from rung.human_labels.votes import Comparison, Vote
from rung.scoring.pairwise import Outcome
from rung.types import Message

Row = Mapping[str, Any]
ARENA_WINNERS: dict[str, tuple[Outcome, bool]] = {
    "model_a": ("first", False),
    "model_b": ("second", False),
    "tie": ("tie", False),
    "tie (bothbad)": ("tie", True),
    "both_bad": ("tie", True),
}
"""Arena's words, and whether they say that both are bad."""
_PROMPTS = ("prompt", "instruction", "question", "input", "text")
HINT = (
    "Arena: model_a, model_b, winner, conversation_a, conversation_b; Argilla: NAME.responses, NAME.responses.users; "
    "Label Studio: data, annotations; pairs: question, first, second, human"
)


class _Builder:
    """Collects items and votes; answers of several rows to one prompt become one item."""

    def __init__(self, source: Path, kind: LabelKind) -> None:
        self.source, self.kind = source, kind
        self.items: dict[str, Item] = {}
        self.people: dict[str, None] = {}
        self.votes: list[LabeledVote] = []

    def add_item(self, item: Item) -> tuple[str, list[int]]:
        """The id of the item of this prompt, and where its answers are among those that were there before."""
        known = self.items.get(item.id)
        pairs = [
            (a.text, name) for a in (*(known.answers if known else ()), *item.answers) for name in a.systems or (None,)
        ]
        answers = merge_answers(pairs)
        self.items[item.id] = replace(known or item, answers=answers)
        index = {answer.text: i for i, answer in enumerate(answers)}
        return item.id, [index[answer.text.strip()] for answer in item.answers]

    def add_vote(
        self, person: object, item: str, shown: Sequence[int], vote: Vote, at: str = "", note: str = ""
    ) -> None:
        name = str(person)
        self.people.setdefault(name)
        self.votes.append(LabeledVote(name, item, tuple(shown), vote, note=note, at=at))

    def data(self) -> LabelData:
        return LabelData(str(self.source), self.kind, self.items, list(self.people), self.votes)


def read_exchange_file(path: Path) -> LabelData:
    """The votes of a file of another tool. Raises `DataError` for other files and for rows that cannot be read."""
    rows = []
    for item in stream_rows(str(path)):
        if isinstance(item, RejectedRow):
            raise DataError(item.reason, where=str(item.source))
        rows.append((str(item.source), item.row))
    if not rows:
        raise DataError("the file has no rows", where=str(path))
    reader = _reader(rows[0][1])
    if reader is None:
        given = ", ".join(map(str, rows[0][1]))
        raise DataError("these are no labels of people", where=str(path), given=f"columns {given}", hint=HINT)
    return reader(path, rows)


Reader = Callable[[Path, Sequence[tuple[str, Row]]], LabelData]


def _reader(row: Row) -> Reader | None:
    if {"model_a", "model_b", "winner"} <= set(row):
        return _read_arena
    if any(str(column).endswith(".responses") for column in row):
        return _read_argilla
    if {"data", "annotations"} <= set(row):
        return _read_label_studio
    if {"question", "first", "second", "human"} <= set(row):
        return _read_pairs
    return None


def _read_arena(path: Path, rows: Iterable[tuple[str, Row]]) -> LabelData:
    builder, left_out = _Builder(path, "compare"), 0
    for where, row in rows:
        if (winner := ARENA_WINNERS.get(str(row.get("winner")))) is None:
            raise DataError("no such winner", where=where, given=row.get("winner"), allowed=", ".join(ARENA_WINNERS))
        conversations = [_turns(row.get(name), name, where) for name in ("conversation_a", "conversation_b")]
        (prompt, first), (other, second) = ((turns[:-1], turns[-1].content) for turns in conversations)
        if prompt != other:  # of several turns: each model answered its own earlier ones
            left_out += 1
            continue
        answers = (Answer(first.strip(), (str(row["model_a"]),)), Answer(second.strip(), (str(row["model_b"]),)))
        item, indices = builder.add_item(Item(prompt, answers))
        if indices[0] != indices[1]:  # equal answers are one, and a tie whatever was clicked
            at = row.get("tstamp")
            seconds = float(at) if isinstance(at, int | float) and 0 <= at < 2**33 else None
            moment = "" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
            builder.add_vote(row.get("judge", "person"), item, indices, _compared(indices, *winner), moment)
    if left_out:
        print_status(f"{left_out:,} votes are on conversations whose earlier turns differ: left out")
    return builder.data()


def _turns(value: Any, name: str, where: str) -> tuple[Message, ...]:
    try:
        turns = tuple(Message(turn["role"], _content(turn["content"])) for turn in value)
    except (TypeError, KeyError):
        raise DataError(f"{name} is no list of turns with role and content", where=where) from None
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise DataError(f"{name} does not end with an answer", where=where)
    return turns


def _content(value: Any) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(value, list):
        return "\n".join(str(part["text"]) for part in value if part.get("type") == "text")
    return str(value)


def _compared(indices: Sequence[int], outcome: Outcome, is_bad: bool = False) -> Vote:
    first, second = indices
    if first > second:
        first, second = second, first
        outcome = {"first": "second", "second": "first", "tie": "tie"}[outcome]  # type: ignore[assignment]
    return Vote("compare", outcome=Comparison(first, second, outcome, is_bad), is_bad=is_bad)


def _read_pairs(path: Path, rows: Sequence[tuple[str, Row]]) -> LabelData:
    """Rows of `evaluation.judge.human_labels`, whose people have numbers."""
    builder = _Builder(path, "compare")
    for where, row in rows:
        texts = [row.get(name) for name in ("question", "first", "second")]
        if not all(isinstance(text, str) for text in texts):
            raise DataError("a labeled pair has texts in question, first and second", where=where)
        question, first, second = map(str, texts)
        context, group = (None if row.get(name) is None else str(row[name]) for name in ("context", "group"))
        systems = [tuple(filter(None, [row.get(name)])) for name in ("first_system", "second_system")]
        answers = tuple(Answer(text.strip(), names) for text, names in zip((first, second), systems, strict=True))
        item, indices = builder.add_item(Item((Message("user", question),), answers, context, group))
        labels = row["human"] if isinstance(row["human"], list) else [row["human"]]
        for number, label in enumerate(labels, 1):
            if label not in ("first", "second", "tie", None):
                raise DataError(
                    "not what a person could have said", where=where, given=label, allowed="first, second, tie"
                )
            if label is not None and indices[0] != indices[1]:
                builder.add_vote(f"person {number}", item, indices, _compared(indices, label))
    return builder.data()


def _read_argilla(path: Path, rows: Sequence[tuple[str, Row]]) -> LabelData:
    question = next(str(c).removesuffix(".responses") for c in rows[0][1] if str(c).endswith(".responses"))
    first = next((value for _, row in rows for value in row.get(f"{question}.responses") or ()), None)
    is_ranking = isinstance(first, list)
    builder = _Builder(path, "rank" if is_ranking else "rate")
    for where, row in rows:
        responses = row.get(f"{question}.responses") or []
        users = row.get(f"{question}.responses.users") or [f"person {i + 1}" for i in range(len(responses))]
        states = row.get(f"{question}.responses.status") or ["submitted"] * len(responses)
        if not len(responses) == len(users) == len(states):
            raise DataError("responses, users and status differ in number", where=where)
        prompt = (Message("user", _prompt(row, where)),)
        for value, user, state in zip(responses, users, states, strict=True):
            if state != "submitted":  # a draft, or discarded
                continue
            if is_ranking:
                names, ranks = _ranking(value, where)
                answers = tuple(Answer(_argilla_text(row, name, where), _systems(name)) for name in names)
                item, indices = builder.add_item(Item(prompt, answers))
                vote = Vote("rank", ranks=dict(zip(indices, ranks, strict=True)))
            else:
                if not isinstance(value, int):
                    raise DataError("a rating is no whole number", where=where, given=value)
                answers = (Answer(_argilla_answer(row, question, where)),)
                item, indices = builder.add_item(Item(prompt, answers))
                vote = Vote("rate", score=value)
            builder.add_vote(user, item, indices, vote)
    return builder.data()


def _prompt(row: Row, where: str) -> str:
    name = next((name for name in _PROMPTS if isinstance(row.get(name), str)), None)
    if name is None:
        raise DataError("no column has the prompt", where=where, allowed=", ".join(_PROMPTS))
    return str(row[name])


def _ranking(value: Any, where: str) -> tuple[list[str], list[int]]:
    try:
        names, ranks = [str(each["value"]) for each in value], [int(each["rank"]) for each in value]
    except (TypeError, KeyError, ValueError):
        raise DataError("a ranking is no list of value and rank", where=where, given=value) from None
    return names, ranks


def _systems(name: str) -> tuple[str, ...]:
    """The system of a ranked value: its name, unless that is a number alone (answer-1, reply_2)."""
    return (
        ()
        if re.fullmatch(r"(answer|response|reply|generation|output|completion)s?[-_ ]?\d+", name.lower())
        else (name,)
    )


def _argilla_text(row: Row, name: str, where: str) -> str:
    """The text of a ranked value: its field has the same name, or one with other separators (reply-1, reply_1)."""
    fields = {str(field).replace("_", "-").lower(): value for field, value in row.items()}
    text = fields.get(name.replace("_", "-").lower())
    if not isinstance(text, str):
        raise DataError(f"no field has the text of {name!r}", where=where, given=", ".join(map(str, row)))
    return text.strip()


def _argilla_answer(row: Row, question: str, where: str) -> str:
    names = ("answer", "response", "completion", "output", "generation")
    name = next((name for name in names if isinstance(row.get(name), str)), None)
    if name is None:
        raise DataError(f"no column has the answer that {question!r} rates", where=where, allowed=", ".join(names))
    return str(row[name]).strip()


def _read_label_studio(path: Path, rows: Sequence[tuple[str, Row]]) -> LabelData:
    is_ranking = '"ranker"' in json.dumps([row["annotations"] for _, row in rows])
    builder = _Builder(path, "rank" if is_ranking else "compare")
    for where, row in rows:
        values = row["data"]
        prompt = (Message("user", _prompt(values, where)),)
        texts = _studio_texts(values, is_ranking, _sides(row["annotations"]), where)
        answers = tuple(Answer(text.strip()) for text in texts.values())
        item, indices = builder.add_item(Item(prompt, answers, id=prompt_id(prompt, "\0".join(texts.values()))))
        places = dict(zip(texts, indices, strict=True))
        for annotation in row["annotations"]:
            person = annotation.get("completed_by", "person")
            person = person.get("email", person.get("id")) if isinstance(person, dict) else person
            results = [
                result.get("value", {})
                for result in annotation.get("result", ())
                if not annotation.get("was_cancelled")
            ]
            for value in results:
                if "selected" in value and not is_ranking:
                    if value["selected"] not in ("left", "right"):
                        raise DataError("no such side", where=where, given=value["selected"], allowed="left, right")
                    outcome: Outcome = "first" if value["selected"] == "left" else "second"
                    builder.add_vote(person, item, indices, _compared(indices, outcome))
                elif "ranker" in value:
                    order = _studio_order(value["ranker"], places, where)
                    ranks = {places[name]: rank for rank, name in enumerate(order, 1)}
                    builder.add_vote(person, item, indices, Vote("rank", ranks=ranks))
    return builder.data()


def _sides(annotations: Any) -> list[str]:
    """The columns of the left and the right text, which a result of the pairwise tag names."""
    results = (result for annotation in annotations for result in annotation.get("result", ()))
    return next((str(result["to_name"]).split(",") for result in results if result.get("to_name")), [])


def _studio_texts(values: Row, is_ranking: bool, sides: Sequence[str], where: str) -> dict[str, str]:
    """The answers of a task by the name under which results refer to them."""
    if is_ranking:
        items = next((value for value in values.values() if isinstance(value, list)), None)
        try:
            return {str(each["id"]): str(each.get("body") or each.get("title")) for each in items or ()}
        except (TypeError, KeyError, AttributeError):
            raise DataError("the ranked items have no id and body", where=where) from None
    names = [name for name, value in values.items() if isinstance(value, str) and name not in (*_PROMPTS, "context")]
    # the first column need not be the left one
    known = [side for side in sides if isinstance(values.get(side), str)]
    names = known if len(known) == 2 else [name for name in ("text1", "text2") if name in values] or names
    if len(names) != 2:
        raise DataError("a pair has two texts beside its prompt", where=where, given=", ".join(names))
    return {name: str(values[name]) for name in names}


def _studio_order(value: Any, places: Mapping[str, int], where: str) -> list[str]:
    """The ids from best to worst; with buckets those of the one that is not the pile of what was not ranked."""
    if isinstance(value, dict) and sum(bool(each) for name, each in value.items() if name != "_") > 1:
        raise DataError("items are in several buckets, and none is a ranking of all", where=where, given=list(value))
    buckets = [each for name, each in value.items() if name != "_"] if isinstance(value, dict) else [value]
    order = next((bucket for bucket in buckets if bucket), value.get("_") if isinstance(value, dict) else value)
    if not isinstance(order, list) or not set(map(str, order)) <= set(places):
        raise DataError("a ranking names items that are not there", where=where, given=order)
    return [str(each) for each in order]
