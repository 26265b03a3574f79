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
ABSENT = "Not disclosed in this filing."
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
FIGURE = r"\(\d+\)|-?\d+(?:\.\d)?%?"


def number(text: str) -> float:
    return -float(text.strip("()")) if text.startswith("(") else float(text.rstrip("%"))


def read(context: str) -> dict[tuple[str, int], float]:
    """(line, year) -> figure, whatever the layout."""
    found: dict[tuple[str, int], float] = {}
    columns: list[int] = []
    for piece in re.split(r"\n|(?<=\.) (?=FY)", context):
        if re.match(r"line\b|figures of", piece.lower()):  # the header of a table
            columns = [int(y) for y in re.findall(r"20\d\d", piece)]
            continue
        if section := re.match(r"FY(20\d\d): ", piece):  # one year's list
            columns, piece = [int(section[1])], piece[section.end() :]
        if opening := re.search(r"reports for fiscal (20\d\d)", piece):  # prose
            columns = [int(opening[1])]
        lower = piece.lower()
        spots = list(ANY_LINE.finditer(lower))
        for spot, following in zip_longest(spots, spots[1:]):
            rest = lower[spot.end() : following.start() if following else None]
            named = re.findall(rf"fy(20\d\d) ({FIGURE})", rest) + re.findall(r"(20\d\d): (-?[\d.]+%?)\)", rest)
            plain = re.findall(FIGURE, re.sub(r"\(20\d\d: .*?\)", "", rest)) if columns else []
            named += list(zip(map(str, columns), plain, strict=False))
            found |= {(LINE_OF[spot[0]], int(year)): number(value) for year, value in named}
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
            return f"Larger in FY{year}: {lines[figures[1] > figures[0]]}."
        return f"{lines[0]} + {lines[1]}, FY{year}: {money(sum(figures))}."
    (line,) = lines
    if len(years) == 2:
        older, newer = figures
        if re.search(r"higher|more|better", row["question"]):
            return f"{line}, higher year: FY{years[newer > older]}."
        way = "up" if newer > older else "down"
        return f"{line}, FY{years[0]} to FY{years[1]}: {way} {money(abs(newer - older))}."
    shown = f"{figures[0]:.1f}%" if line == "Gross margin" else money(figures[0])
    return f"{line}, FY{years[0]}: {shown}."


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
        assert len(facts) in (8, 10)
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
    wanted = {"lookup": 0.55, "unanswerable": 0.15, "change": 0.12, "compare": 0.10, "sum": 0.08}
    assert shares == pytest.approx(wanted, abs=0.002)


def test_texts_stay_short() -> None:
    # With SmolLM2's tokenizer and single digits, contexts have 54 to 107 tokens and answers 6 to 23.
    for row in ROWS:
        assert len(row["context"]) < 320
        assert len(row["answer"].split()) <= 11
        assert len(re.findall(r"\d|[A-Za-z]+|[^\w\s]|\n", row["context"])) < 115


def test_numeric_reads_the_house_style() -> None:
    from rung.scoring.metrics import numeric

    spoken = {"lookup": r": (?:USD )?(\(?[\d.]+\)?)", "sum": r": USD (\d+)", "change": r"(?:up|down) USD \d+"}
    for row in ROWS:
        assert numeric(row["answer"], row["answer"]) == 1.0
        if pattern := spoken.get(row["kind"]):
            bare = re.search(pattern, row["answer"])
            assert bare is not None
            assert numeric(bare[bare.lastindex or 0], row["answer"]) == 1.0
            assert numeric(ABSENT, row["answer"]) == 0.0
        if row["kind"] == "change":
            turned = row["answer"].replace(": up", ": ?").replace(": down", ": up").replace(": ?", ": down")
            assert numeric(turned, row["answer"]) == 0.0
