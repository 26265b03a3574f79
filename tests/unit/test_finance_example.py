"""The finance example: the committed data are what the generator writes, and every answer follows from its filing.

Answers are recomputed here by a second reading: context and question are parsed as text, nothing of the generator's
tables is used.
"""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "examples" / "finance"
ROWS = [json.loads(line) for line in (HERE / "data.jsonl").read_text(encoding="ascii").splitlines()]
ABSENT = "Not disclosed"
NAMES = {
    "Revenue": ["revenue", "turnover", "sales", "total sales"],
    "Cost of sales": ["cost of sales", "cost of goods sold", "cost of revenue"],
    "Operating expenses": ["operating expenses", "operating costs", "opex"],
    "Operating income": ["operating income", "operating profit", "profit from operations"],
    "Net income": ["net income", "net profit", "profit for the year", "profit after tax"],
    "Gross margin": ["gross margin", "gross profit margin", "gross margin percentage"],
    "Cash": ["cash", "cash balance", "cash on hand"],
    "Total debt": ["total debt", "borrowings", "debt"],
    "Inventory": ["inventory", "stock on hand", "inventories"],
    "Capital expenditure": ["capital expenditure", "capex", "investment in fixed assets"],
    "Research expense": ["research expense", "research spending", "r&d costs"],
    "Marketing expense": ["marketing expense", "marketing costs", "advertising spending"],
    "Dividends paid": ["dividends paid", "dividends", "payout to shareholders"],
}
LINE_OF = {name: line for line, names in NAMES.items() for name in names}
ANY_LINE = re.compile("|".join(rf"\b{re.escape(n)}\b" for n in sorted(LINE_OF, key=len, reverse=True)))
FIGURE = r"USD \(?\d+\)? million|\d+\.\d%"


def number(text: str) -> float:
    value = float(re.search(r"[\d.]+", text)[0])  # type: ignore[index]
    return -value if "(" in text else value


def read(context: str) -> dict[tuple[str, int], float]:
    """(line, year) -> figure, whatever the layout: a year stands right before its figure, or `in FY` after it."""
    found: dict[tuple[str, int], float] = {}
    spots = list(ANY_LINE.finditer(context.lower()))
    for spot, following in zip_longest(spots, spots[1:]):
        rest = context[spot.end() : following.start() if following else None]
        pairs = re.findall(rf"FY(20\d\d):? ({FIGURE})", rest)
        pairs += [(year, value) for value, year in re.findall(rf"({FIGURE}) in FY(20\d\d)", rest)]
        found |= {(LINE_OF[spot[0]], int(year)): number(value) for year, value in pairs}
    return found


def money(value: float) -> str:
    return f"USD {f'({-value:.0f})' if value < 0 else f'{value:.0f}'} million"


def solve(row: dict[str, str]) -> str:
    """The answer in the house style, from the words of the question and the figures of the filing."""
    facts = read(row["context"])
    lines = [LINE_OF[m[0]] for m in ANY_LINE.finditer(row["question"].lower())]
    years = sorted({int(y) for y in re.findall(r"20\d\d", row["question"])})
    if any((line, year) not in facts for line in lines for year in years):
        return ABSENT
    figures = [facts[line, year] for line in lines for year in years]
    if len(lines) == 2:
        (year,) = years
        if re.search(r"larger|bigger|more", row["question"]):
            return lines[figures[1] > figures[0]]
        return money(sum(figures))
    (line,) = lines
    if len(years) == 2:
        older, newer = figures
        if re.search(r"higher|more|better", row["question"]):
            return f"FY{years[newer > older]}"
        way = "up" if newer > older else "down"
        return f"{way} {money(abs(newer - older))}"
    return f"{figures[0]:.1f}%" if line == "Gross margin" else money(figures[0])


def test_the_committed_file_is_what_the_generator_writes() -> None:
    generator = runpy.run_path(str(HERE / "generate.py"))
    assert generator["as_text"]() == (HERE / "data.jsonl").read_bytes().decode("ascii")
    assert generator["INSTRUCTION"] in (HERE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["lookup", "unanswerable", "change", "compare", "sum"])
def test_every_answer_follows_from_its_filing(kind: str) -> None:
    rows = [row for row in ROWS if row["kind"] == kind]
    assert len(rows) > 100
    wrong = [(row, solve(row)) for row in rows if solve(row) != row["answer"]]
    assert not wrong[:3]


def test_the_reader_sees_every_figure_of_every_filing() -> None:
    for row in ROWS:
        facts = read(row["context"])
        assert len(facts) in (6, 8)
        assert len({year for _, year in facts}) == 2
        older, newer = (
            dict(sorted((line, v) for (line, y), v in facts.items() if y == year)) for year in _years(facts)
        )
        assert older.keys() == newer.keys()
        assert all(older[line] != newer[line] for line in older)  # a change is never zero, a year always higher


def _years(facts: dict[tuple[str, int], float]) -> list[int]:
    return sorted({year for _, year in facts})


def test_shapes_shares_and_no_duplicates() -> None:
    assert len(ROWS) >= 1_500
    assert all(list(row) == ["context", "question", "answer", "filing", "kind"] for row in ROWS)
    assert len({(row["context"], row["question"]) for row in ROWS}) == len(ROWS)
    assert len({row["question"] for row in ROWS}) == len(ROWS)  # a question names its company: no overlap of splits
    assert set(Counter(row["filing"] for row in ROWS).values()) == {5, 6}
    assert len({row["context"] for row in ROWS}) == len({row["filing"] for row in ROWS})
    shares = {kind: count / len(ROWS) for kind, count in Counter(row["kind"] for row in ROWS).items()}
    wanted = {"lookup": 0.55, "unanswerable": 0.15, "change": 0.10, "compare": 0.12, "sum": 0.08}
    assert shares == pytest.approx(wanted, abs=0.002)


def test_texts_stay_short() -> None:
    for row in ROWS:
        assert len(row["context"]) < 360
        assert len(row["answer"].split()) <= 4
        assert len(re.findall(r"\d|[A-Za-z]+|[^\w\s]|\n", row["context"])) < 125


def test_numeric_reads_the_house_style() -> None:
    from rung.scoring.metrics import numeric

    spoken = {"lookup": r"(?:USD )?(\(?[\d.]+\)?)", "sum": r"USD (\d+)", "change": r"(?:up|down) USD \d+"}
    for row in ROWS:
        assert numeric(row["answer"], row["answer"]) == 1.0
        if pattern := spoken.get(row["kind"]):
            bare = re.search(pattern, row["answer"])
            assert bare is not None
            assert numeric(bare[bare.lastindex or 0], row["answer"]) == 1.0
            assert numeric(ABSENT, row["answer"]) == 0.0
        if row["kind"] == "change":
            turned = {"up": "down", "down": "up"}[row["answer"].split()[0]] + row["answer"].removeprefix(
                "up"
            ).removeprefix("down")
            assert numeric(turned, row["answer"]) == 0.0
