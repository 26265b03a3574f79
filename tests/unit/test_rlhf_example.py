"""The examples of preferences and of problems with a right answer: their files, and the people by rule."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parents[2] / "examples"
HOUSE = runpy.run_path(str(HERE / "rlhf" / "house.py"))
FILES = ("logged", "preferences", "prompts", "heldout")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = {name: read(HERE / "rlhf" / f"{name}.jsonl") for name in FILES}


def test_the_files_are_what_the_generators_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runpy.run_path(str(HERE / "rlhf" / "generate.py"))["main"](tmp_path)
    for name in FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (HERE / "rlhf" / f"{name}.jsonl").read_bytes()
    monkeypatch.setattr(sys, "argv", ["generate.py", str(tmp_path / "problems.jsonl")])
    runpy.run_path(str(HERE / "verifiable" / "generate.py"), run_name="__main__")
    assert (tmp_path / "problems.jsonl").read_bytes() == (HERE / "verifiable" / "data.jsonl").read_bytes()


def test_no_order_stands_in_two_files() -> None:
    orders = [{row["order"] for row in ROWS[name]} for name in FILES]
    assert sum(map(len, orders)) == len(set.union(*orders))


def test_the_house_finds_no_fault_with_its_own_answers_and_some_with_every_near_miss() -> None:
    for row in [*ROWS["prompts"], *ROWS["heldout"]]:
        assert HOUSE["faults"](row["answer"], {"expected": row["answer"]}) == []
    careful = [bool(re.match(r"\[\w+\] Hi \w+, [^!]+\.$", row["answer"])) for row in ROWS["logged"]]
    assert 0.15 < sum(careful) / len(careful) < 0.45
    for row in ROWS["preferences"]:
        best, *others = row["answers"]
        assert all(HOUSE["faults"](other, {"expected": best}) for other in others)
        assert row["scores"] == [0.0, -1.0, -1.0, -1.0] and len(set(row["answers"])) == 4


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("[refund] Hi Mara, EUR 24 for order 4812 are on their way.", []),
        ("Hi Mara, EUR 24 for order 4812 are on their way.", ["names no intent"]),
        ("[cancel] Hi Mara, EUR 24 for order 4812 are on their way.", ["names another intent"]),
        ("[refund] EUR 24 for order 4812 are on their way.", ["does not greet by name"]),
        (
            "[refund] Hi Mara, EUR 42 for order 4812 are on their way.",
            ["has other numbers", "says something else of the order"],
        ),
        ("[refund] Hi Mara, EUR 24 for order 4812 are on their way. Bye.", ["says more than is asked"]),
    ],
)
def test_what_counts_as_a_fault(answer: str, found: list[str]) -> None:
    expected = "[refund] Hi Mara, EUR 24 for order 4812 are on their way."
    assert HOUSE["faults"](answer, {"expected": expected}) == found


def test_ranking_and_judging(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = "[cancel] Hi Mara, order 4812 is cancelled.", "order 4812 is cancelled."
    rows = [
        {"prompt": "Stop it.", "context": f"c{i}", "expected": good, "answers": answers}
        for i, answers in enumerate(([bad, good], [good, good], [bad, bad]))
    ]
    (tmp_path / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    HOUSE["rank"](str(tmp_path / "candidates.jsonl"), str(tmp_path / "ranked.jsonl"))
    assert [row["scores"] for row in read(tmp_path / "ranked.jsonl")] == [[-2.0, 0.0]]
    numbers = {"scores": [0.5], "log_ratios": [2.0], "tokens": [9]}
    for name, answers in (("before", [bad, bad]), ("after", [good, bad])):
        lines = [{**rows[i], "answers": [answer], **numbers} for i, answer in enumerate(answers)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    HOUSE["judge"](str(tmp_path / "before.jsonl"), str(tmp_path / "after.jsonl"))
    *_, before, after = capsys.readouterr().out.splitlines()
    assert before.startswith("| before | +0.50 | 2.00 | 0.00 [") and before.endswith("|  | 9.0 |")
    assert after.startswith("| after | +0.50 | 2.00 | 0.50 [") and "| 0.75 [" in after


def test_every_problem_is_worked_out_right() -> None:
    rows = read(HERE / "verifiable" / "data.jsonl")
    assert len(rows) == len({row["question"] for row in rows}) == 1500
    for row in rows:
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", row["worked"])
        assert len(steps) == int(row["kind"][0]) and steps[-1][-1] == row["answer"]
        for a, sign, b, result in steps:
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(result) >= 0
        numbers = sorted(int(n) for n in re.findall(r"\d+", row["question"]))
        used = sorted([int(steps[0][0]), *(int(step[2]) for step in steps)])
        assert numbers == used
