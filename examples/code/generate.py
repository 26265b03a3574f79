"""Writes data.jsonl: small programming exercises, each with a worked program and with tests.

An exercise joins three parts: which items of a list are kept, what becomes of each, and what is returned. `skill` names
the parts, so that `data: {group: skill}` holds out whole combinations: the test asks for none that training has shown.

Run `python examples/code/generate.py [PATH]`. Standard library only, one fixed seed, the same bytes every time.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

SEED = 20261130
PER_SKILL = 2
TESTS = 3
OPENINGS = ("Write a Python function `{head}` that returns {what}.", "Define `{head}` in Python. It returns {what}.")


@dataclass(frozen=True)
class Part:
    """One part of an exercise."""

    name: str
    phrases: tuple[str, ...]
    """Ways to say it; with the parameters {k}, {j} and {c}."""
    code: str
    """Python, with the item {v} and the parameters; of an end with {items}, the generator expression before it."""


@dataclass(frozen=True)
class Family:
    """Exercises on lists of one type."""

    nouns: tuple[str, ...]
    """What the list is called; its items have the name without the last letter."""
    keeps: tuple[Part, ...]
    changes: tuple[Part, ...]
    ends: tuple[Part, ...]


NUMBERS = Family(
    ("numbers", "prices", "scores", "weights", "ages", "points", "values", "amounts"),
    (
        Part("all", ("",), ""),
        Part("even", (" that are even",), "{v} % 2 == 0"),
        Part("odd", (" that are odd",), "{v} % 2 == 1"),
        Part("positive", (" that are positive", " that are above zero"), "{v} > 0"),
        Part("negative", (" that are negative", " that are below zero"), "{v} < 0"),
        Part("above", (" that are greater than {k}", " that are above {k}"), "{v} > {k}"),
        Part("below", (" that are less than {k}", " that are below {k}"), "{v} < {k}"),
        Part("divisible", (" that are divisible by {k}", " that are multiples of {k}"), "{v} % {k} == 0"),
    ),
    (
        Part("same", ("",), "{v}"),
        Part("double", (", each doubled", ", each times two"), "{v} * 2"),
        Part("square", (", each squared",), "{v} ** 2"),
        Part("plus", (", each increased by {j}", ", with {j} added to each"), "{v} + {j}"),
        Part("minus", (", each reduced by {j}", ", with {j} subtracted from each"), "{v} - {j}"),
        Part("times", (", each multiplied by {j}", ", each times {j}"), "{v} * {j}"),
        Part("opposite", (", each with the opposite sign", ", each negated"), "-{v}"),
    ),
    (
        Part("list", ("a list of", "the list of"), "[{items}]"),
        Part("sum", ("the sum of", "the total of"), "sum({items})"),
        Part("largest", ("the largest of", "the maximum of"), "max({items})"),
        Part("smallest", ("the smallest of", "the minimum of"), "min({items})"),
        Part("count", ("the number of", "a count of"), "len([{items}])"),
    ),
)
WORDS = Family(
    ("words", "names", "titles", "labels", "tags", "tools"),
    (
        Part("all", ("",), ""),
        Part("starts", (" that start with '{c}'", " that begin with '{c}'"), '{v}.startswith("{c}")'),
        Part("ends", (" that end with '{c}'",), '{v}.endswith("{c}")'),
        Part("contains", (" that contain '{c}'", " that have a '{c}' in them"), '"{c}" in {v}'),
        Part("longer", (" longer than {k} letters", " with more than {k} letters"), "len({v}) > {k}"),
        Part("shorter", (" shorter than {k} letters", " with fewer than {k} letters"), "len({v}) < {k}"),
        Part("length", (" of exactly {k} letters", " with exactly {k} letters"), "len({v}) == {k}"),
    ),
    (
        Part("same", ("",), "{v}"),
        Part("upper", (", each in upper case", ", each in capital letters"), "{v}.upper()"),
        Part("reversed", (", each reversed", ", each spelled backwards"), "{v}[::-1]"),
        Part("twice", (", each repeated twice", ", each written twice"), "{v} * 2"),
        Part("marked", (", each followed by '!'", ", each with '!' at the end"), '{v} + "!"'),
        Part("first", (", each cut to its first letter",), "{v}[0]"),
    ),
    (
        Part("list", ("a list of", "the list of"), "[{items}]"),
        Part("joined", ("one string of", "a string that joins"), '"".join({items})'),
        Part("sorted", ("a sorted list of", "the sorted list of"), "sorted({items})"),
        Part("set", ("a set of", "the set of"), "set({items})"),
        Part("count", ("the number of", "a count of"), "len([{items}])"),
    ),
)
FAMILIES = {"numbers": NUMBERS, "words": WORDS}
VERBS = {
    **{"list": ("pick", "collect"), "sum": ("total", "add_up"), "largest": ("top", "highest"), "count": ("count",)},
    **{"smallest": ("lowest", "least"), "joined": ("join", "glue"), "sorted": ("sort", "order"), "set": ("unique",)},
}
VOCABULARY = (
    *("apple", "anchor", "arena", "boat", "banana", "brush", "candle", "canoe", "chair", "cello", "door", "drum"),
    *("eagle", "engine", "ferry", "flute", "garden", "grape", "hammer", "house", "iris", "island", "jar", "kettle"),
    *("lamp", "lemon", "maple", "nest", "oar", "onion", "pear", "piano", "queen", "river", "rope", "saddle", "sofa"),
    *("stone", "table", "tent", "train", "umbrella", "violin", "wagon", "whale", "yarn", "zebra", "ant", "ear", "sea"),
)


@dataclass(frozen=True)
class Exercise:
    """One function to write: its parts, and the names and parameters that they are about."""

    keep: Part
    change: Part
    end: Part
    function: str
    noun: str
    parameters: dict[str, Any]

    def program(self) -> str:
        """The worked program."""
        item = self.noun[:-1]
        code = {**self.parameters, "v": item}
        only = f" if {self.keep.code.format(**code)}" if self.keep.code else ""
        items = f"{self.change.code.format(**code)} for {item} in {self.noun}{only}"
        return f"def {self.function}({self.noun}):\n    return {self.end.code.format(items=items)}"

    def result(self, items: list[Any]) -> Any:
        """What the worked program returns; None where it has nothing to take the largest or smallest of."""
        scope: dict[str, Any] = {}
        exec(self.program(), scope)  # noqa: S102 - our own text
        try:
            return scope[self.function](items)
        except ValueError:
            return None

    def question(self, rng: random.Random) -> str:
        """The exercise in English."""
        keep, change, end = (rng.choice(part.phrases) for part in (self.keep, self.change, self.end))
        what = f"{end} the {self.noun}{keep}{change}".format(**self.parameters)
        return rng.choice(OPENINGS).format(head=f"{self.function}({self.noun})", what=what)

    def others(self, family: Family) -> Iterator[Exercise]:
        """The exercises in which one part is another, which the tests have to tell from this one."""
        # what becomes of the items does not change their count
        changes = () if self.end.name == "count" else family.changes
        for name, parts in (("keep", family.keeps), ("change", changes), ("end", family.ends)):
            for part in parts:
                if part != getattr(self, name):
                    yield Exercise(**{**vars(self), name: part})


def makes_sense(keep: Part, change: Part, end: Part) -> bool:
    """False for a list as it is, and for a count of items that were changed, or of all."""
    if end.name == "count":
        return change.name == "same" and keep.name != "all"
    return keep.name != "all" or change.name != "same" or end.name != "list"


def draw_exercise(rng: random.Random, keep: Part, change: Part, end: Part, family: Family) -> Exercise:
    """Names and parameters. 3 is the least divisor: the multiples of 2 are the even numbers."""
    noun = rng.choice(family.nouns)
    parameters = {"k": rng.randint(3, 7), "j": rng.randint(3, 9), "c": rng.choice("aenrst")}
    return Exercise(keep, change, end, f"{rng.choice(VERBS[end.name])}_{noun}", noun, parameters)


def draw_items(rng: random.Random, family: Family) -> list[Any]:
    """The list of one test."""
    if family is WORDS:
        return [rng.choice(VOCABULARY) for _ in range(8)]
    return [rng.randint(-12, 24) for _ in range(8)]


def draw_tests(rng: random.Random, exercise: Exercise, family: Family) -> list[str] | None:
    """Assertions that no exercise with another part passes; None where the draws do not tell them apart."""
    lists = [draw_items(rng, family) for _ in range(TESTS)]
    expected = [exercise.result(items) for items in lists]
    if not all(expected):  # nothing kept, or a result that a wrong program gives too easily
        return None
    for other in exercise.others(family):
        if [other.result(items) for items in lists] == expected:
            return None
    return [
        f"assert {exercise.function}({items}) == {write(result)}" for items, result in zip(lists, expected, strict=True)
    ]


def write(result: Any) -> str:
    """Python for a value; sets in the order of their items, which repr leaves to the hash."""
    return f"set({sorted(result)})" if isinstance(result, set) else repr(result)


def draw_row(rng: random.Random, name: str, parts: tuple[Part, Part, Part]) -> dict[str, Any] | None:
    """A row for these parts; None where forty draws give no tests that tell it from its neighbors."""
    for _ in range(40):
        exercise = draw_exercise(rng, *parts, FAMILIES[name])
        if tests := draw_tests(rng, exercise, FAMILIES[name]):
            skill = f"{name}: {', '.join(part.name for part in parts)}"
            return {"question": exercise.question(rng), "answer": exercise.program(), "tests": tests, "skill": skill}
    return None


def make_rows() -> list[dict[str, Any]]:
    """Two rows for every combination of parts, no question twice."""
    rng = random.Random(SEED)
    rows: dict[str, dict[str, Any]] = {}
    for name, family in FAMILIES.items():
        for parts in product(family.keeps, family.changes, family.ends):
            drawn = [draw_row(rng, name, parts) for _ in range(PER_SKILL) if makes_sense(*parts)]
            rows.update({row["question"]: row for row in drawn if row is not None})
    return list(rows.values())


def main(path: Path) -> None:
    """Write the file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows()), encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data.jsonl")
