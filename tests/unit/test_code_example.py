"""The code example: the committed data are what the generator writes, and every test follows from the English.

The exercises are read here by words and worked out with loops; nothing of the generator's tables or programs is used.
"""

from __future__ import annotations

import ast
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rung.config.code import CodeLimitsConfig
from rung.scoring.code_answers import run_answers
from rung.types import CodeTests

HERE = Path(__file__).parents[2] / "examples" / "code"
ROWS = [json.loads(line) for line in (HERE / "data.jsonl").read_text(encoding="ascii").splitlines()]
Rules = dict[str, Callable[[Any, str], Any]]

KEEPS: Rules = {
    r"even\b": lambda x, _: x in range(-100, 101, 2),
    r"odd\b": lambda x, _: x in range(-101, 102, 2),
    r"positive|above zero": lambda x, _: x >= 1,
    r"negative|below zero": lambda x, _: x <= -1,
    r"(?:greater than|above) (\d+)": lambda x, k: x >= int(k) + 1,
    r"(?:less than|below) (\d+)": lambda x, k: x <= int(k) - 1,
    r"(?:divisible by|multiples of) (\d+)": lambda x, k: x in range(-30 * int(k), 30 * int(k), int(k)),
    r"(?:start|begin) with '(.)'": lambda x, c: x[0] == c,
    r"that end with '(.)'": lambda x, c: x[-1] == c,
    r"(?:contain|have a) '(.)'": lambda x, c: x.count(c) > 0,
    r"(?:longer|more) than (\d+)": lambda x, k: len(x) >= int(k) + 1,
    r"(?:shorter|fewer) than (\d+)": lambda x, k: len(x) <= int(k) - 1,
    r"exactly (\d+)": lambda x, k: len(x) == int(k),
}
CHANGES: Rules = {
    r"doubled|times two": lambda x, _: x + x,
    r"squared": lambda x, _: x * x,
    r"increased by (\d+)|with (\d+) added": lambda x, j: x + int(j),
    r"reduced by (\d+)|with (\d+) subtracted": lambda x, j: x - int(j),
    r"multiplied by (\d+)|each times (\d+)": lambda x, j: x * int(j),
    r"opposite|negated": lambda x, _: 0 - x,
    r"upper|capital": lambda x, _: "".join(chr(ord(c) - 32) for c in x),
    r"reversed|backwards": lambda x, _: "".join(reversed(x)),
    r"twice": lambda x, _: f"{x}{x}",
    r"'!'": lambda x, _: f"{x}!",
    r"first letter": lambda x, _: next(iter(x)),
}
ENDS: Rules = {
    r"(?:a|the) list of": lambda xs, _: xs,
    r"(?:the sum|the total) of": lambda xs, _: xs[0] + sum(xs[1:]),
    r"(?:the largest|the maximum) of": lambda xs, _: sorted(xs)[-1],
    r"(?:the smallest|the minimum) of": lambda xs, _: sorted(xs)[0],
    r"(?:the number|a count) of": lambda xs, _: len(xs),
    r"one string of|a string that joins": lambda xs, _: "".join(xs),
    r"(?:a|the) sorted list of": lambda xs, _: sorted(xs),
    r"(?:a|the) set of": lambda xs, _: frozenset(xs),
}


def matching(rules: Rules, text: str) -> list[tuple[str, str]]:
    """The rules that a text names, each with its parameter."""
    found = ((rule, re.search(rule, text)) for rule in rules)
    return [(rule, next(filter(None, match.groups()), "")) for rule, match in found if match]


def solve(question: str, items: list[Any], *, ignore: str = "") -> Any:
    """What the exercise asks for of a list; `ignore`: leave out what is kept or what is changed."""
    said = re.search(r"returns (.*)\.$", question)
    assert said is not None
    text, keeps, changes = said[1], matching(KEEPS, said[1]), matching(CHANGES, said[1])
    (end,) = [rule for rule, _ in matching(ENDS, text) if re.match(rule, text)]
    assert len(keeps) <= 1 and len(changes) <= 1
    for rule, parameter in keeps if ignore != "keep" else []:
        items = [x for x in items if KEEPS[rule](x, parameter)]
    for rule, parameter in changes if ignore != "change" else []:
        items = [CHANGES[rule](x, parameter) for x in items]
    return ENDS[end](items, "") if items else None


def cases(row: dict[str, Any]) -> list[tuple[list[Any], Any]]:
    """List and expected result of each test of a row."""
    found = []
    for test in row["tests"]:
        call, expected = re.fullmatch(r"assert \w+(\(.*?\)) == (.*)", test).groups()  # type: ignore[union-attr]
        is_set = expected.startswith("set(")
        value = ast.literal_eval(expected[len("set(") : -1] if is_set else expected)
        found.append((ast.literal_eval(call), frozenset(value) if is_set else value))
    return found


def test_the_file_is_what_the_generator_writes(tmp_path: Path) -> None:
    runpy.run_path(str(HERE / "generate.py"))["main"](tmp_path / "data.jsonl")
    assert (tmp_path / "data.jsonl").read_bytes() == (HERE / "data.jsonl").read_bytes()


def test_every_test_follows_from_the_question() -> None:
    wrong = [row for row in ROWS for items, expected in cases(row) if solve(row["question"], items) != expected]
    assert not wrong, wrong[:3]


@pytest.mark.parametrize(("part", "rules"), [("keep", KEEPS), ("change", CHANGES)])
def test_a_program_that_forgets_a_part_fails(part: str, rules: Rules) -> None:
    rows = [row for row in ROWS if matching(rules, row["question"].partition("returns ")[2])]
    assert len(rows) > 400
    for row in rows:
        assert any(solve(row["question"], items, ignore=part) != expected for items, expected in cases(row)), row


def test_the_worked_programs_pass_in_the_sandbox_and_others_do_not() -> None:
    rows = ROWS[:: len(ROWS) // 12]
    tests = [CodeTests("\n".join(row["tests"])) for row in rows]
    limits = CodeLimitsConfig()
    assert all(result.passed for result in run_answers([row["answer"] for row in rows], tests, limits))
    bare = [row["answer"].partition("\n")[0] + "\n    return 0" for row in rows]
    assert not any(result.passed for result in run_answers(bare, tests, limits))


def test_rows_are_varied_and_whole_combinations_are_held_out() -> None:
    assert len({row["question"] for row in ROWS}) == len(ROWS) > 700
    skills = {row["skill"] for row in ROWS}
    assert len(skills) > 350 and all(row["answer"].count("\n") == 1 for row in ROWS)
    # each part occurs with many others, so that a held-out combination has none that is new
    for name in {part for skill in skills for part in re.split(r"[:,] ", skill)}:
        assert sum(name in re.split(r"[:,] ", skill) for skill in skills) > 10, name
