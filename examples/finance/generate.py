"""Writes data.jsonl: questions about the filings of companies that do not exist, answered in one house style.

Run `python examples/finance/generate.py [PATH]`. Standard library only, one fixed seed, the same bytes every time.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SEED = 20240607
FILINGS = 300
SHARES = {"lookup": 0.55, "unanswerable": 0.15, "change": 0.10, "compare": 0.12, "sum": 0.08}
NOT_DISCLOSED = "Not disclosed"
INSTRUCTION = (
    "Answer from the filing alone, with the answer and nothing else, in the house style: "
    "an amount as `USD 41 million`, a negative amount as `USD (7) million`, a percentage as `41.5%`, "
    "a change as `up USD 3 million` or `down USD 3 million`, a year as `FY2023`, "
    "a line by its name in the filing as `Cash`, "
    f"and `{NOT_DISCLOSED}` for a line or a year that the filing does not show."
)

MARGIN = "Gross margin"
SYNONYMS = {
    "Revenue": ("turnover", "sales", "total sales"),
    "Cost of sales": ("cost of goods sold", "cost of revenue"),
    "Operating expenses": ("operating costs", "opex"),
    "Operating income": ("operating profit", "profit from operations"),
    "Net income": ("net profit", "profit for the year", "profit after tax"),
    MARGIN: ("gross profit margin", "gross margin percentage"),
    "Cash": ("cash balance", "cash on hand"),
    "Total debt": ("borrowings", "debt"),
    "Inventory": ("stock on hand", "inventories"),
    "Capital expenditure": ("capex", "investment in fixed assets"),
    "Research expense": ("research spending", "R&D costs"),
    "Marketing expense": ("marketing costs", "advertising spending"),
    "Dividends paid": ("dividends", "payout to shareholders"),
}
"""What filings call a line, and what people who ask may call it."""
IDENTITIES = (
    {"Revenue", "Cost of sales", "Operating expenses", "Operating income"},
    {"Revenue", "Cost of sales", MARGIN},
)
"""Lines of which all but one give the last."""

LOOKUP = (
    "What was {company}'s {item} in {year}?",
    "What {item} did {company} report for {year}?",
    "State the {item} of {company} for {year}.",
    "{company}, {year}: {item}?",
    "Give me {company}'s {item} for {year}.",
    "Look up the {item} for {year} in {company}'s filing.",
    "Which figure does {company} show for {item} in {year}?",
    "I need the {item} of {company} in {year}.",
    "For {year}, what is the {item} of {company}?",
    "Tell me the {item} that {company} had in {year}.",
)
CHANGE = (
    "How did {company}'s {item} change from {older} to {newer}?",
    "By how much did {item} move at {company} between {older} and {newer}?",
    "What was the change in {company}'s {item} from {older} to {newer}?",
    "Did {item} go up or down at {company} from {older} to {newer}, and by how much?",
    "Compare {company}'s {item} in {newer} with {older}: what is the difference?",
    "How far did {item} of {company} rise or fall from {older} to {newer}?",
    "Year-over-year change of {item} at {company}, {older} to {newer}?",
    "Give the movement in {company}'s {item} between {older} and {newer}.",
)
SUM = (
    "What do {a} and {b} add up to at {company} in {year}?",
    "What is the total of {a} and {b} for {company} in {year}?",
    "Add {a} and {b} of {company} for {year}.",
    "How much are {a} plus {b} at {company} in {year}?",
    "For {year}, what is the sum of {company}'s {a} and {b}?",
    "Taken together, how large were {a} and {b} at {company} in {year}?",
    "Combine {company}'s {a} with {b} for {year}.",
    "{company}, {year}: {a} plus {b}?",
)
HIGHER_YEAR = (
    "In which year was {company}'s {item} higher, {one} or {other}?",
    "Was {item} of {company} higher in {one} or in {other}?",
    "Which year had the higher {item} at {company}: {one} or {other}?",
    "When did {company} show more {item}, {one} or {other}?",
    "{company}: {item} higher in {one} or {other}?",
    "Of {one} and {other}, which was the better year for {item} at {company}, taking better as higher?",
    "Pick the year with the higher {item} at {company}, {one} or {other}.",
    "Looking at {item}, which year is higher for {company}: {one} or {other}?",
)
LARGER_LINE = (
    "Which was larger at {company} in {year}, {a} or {b}?",
    "For {year}, is {a} or {b} the larger figure of {company}?",
    "Between {a} and {b}, which did {company} show as larger in {year}?",
    "Did {company} have more {a} or more {b} in {year}?",
    "{company}, {year}: which is larger, {a} or {b}?",
    "Name the larger of {a} and {b} at {company} for {year}.",
    "In {year}, which amount of {company} was bigger: {a} or {b}?",
    "Compare {a} and {b} of {company} in {year}: which is larger?",
)
YEAR_WORDS = ("FY{}", "FY{}", "{}", "fiscal {}", "fiscal year {}")


@dataclass(frozen=True)
class Filing:
    """What one company discloses: line -> (newer year, older year), in millions of US dollars or in percent."""

    company: str
    suffix: str
    newer: int
    lines: dict[str, tuple[float, float]]

    def value(self, line: str, year: int) -> float:
        """The figure of a line in one of the two years."""
        return self.lines[line][0 if year == self.newer else 1]

    @property
    def years(self) -> tuple[int, int]:
        """Newer, older."""
        return self.newer, self.newer - 1

    @property
    def amounts(self) -> list[str]:
        """Lines in dollars."""
        return [line for line in self.lines if line != MARGIN]


def two_years(rng: random.Random) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of the newer and the older year: they fit together, and are small enough for a small model to read."""
    ranges = {
        "Revenue": (55, 99),
        "Cost of sales": (24, 48),
        "Operating expenses": (8, 30),
        "Cash": (5, 80),
        "Total debt": (5, 90),
        "Inventory": (4, 35),
        "Capital expenditure": (3, 25),
        "Research expense": (2, 20),
        "Marketing expense": (2, 18),
        "Dividends paid": (1, 14),
    }
    now = {line: rng.randint(low, high) for line, (low, high) in ranges.items()}
    before = {line: max(1, value + rng.choice((-1, 1)) * rng.randint(1, 9)) for line, value in now.items()}
    return _derived(now, rng.randint(1, 9)), _derived(before, rng.randint(1, 9))


def _derived(drawn: dict[str, int], below: int) -> dict[str, float]:
    gross = drawn["Revenue"] - drawn["Cost of sales"]
    income = gross - drawn["Operating expenses"]
    margin = round(100 * gross / drawn["Revenue"], 1)
    return {**drawn, "Operating income": income, "Net income": income - below, MARGIN: margin}


def make_filing(rng: random.Random, taken: set[str]) -> Filing:
    """A filing of three or four lines whose figures differ between its years and are never 0."""
    name = ""
    while not name or name in taken:
        parts = [rng.choice(("zel", "quo", "bri", "tav", "nor", "mek", "lus", "fen", "dra", "ost", "vik", "yar"))]
        parts += [rng.choice(("vo", "ri", "na", "mu", "te", "lo", "ka", "si")) for _ in range(rng.randint(1, 2))]
        name = "".join([*parts, rng.choice(("rix", "dan", "wen", "tol", "mar", "bek", "san", "lux"))]).capitalize()
    taken.add(name)
    suffix = rng.choice(("Ltd", "Group", "Holdings", "Foods", "Energy", "Labs", "Logistics", "Tools"))
    now, before = two_years(rng)
    usable = [line for line in SYNONYMS if now[line] != before[line] and now[line] and before[line]]
    chosen = sorted(rng.sample(usable, rng.choice((3, 4))), key=list(SYNONYMS).index)
    return Filing(name, suffix, rng.randint(2015, 2024), {line: (now[line], before[line]) for line in chosen})


def figure(line: str, value: float) -> str:
    """A figure as a filing prints it and as the house style wants it: USD 41 million, USD (7) million, 41.5%."""
    if line == MARGIN:
        return f"{value:.1f}%"
    return f"USD ({abs(int(value))}) million" if value < 0 else f"USD {int(value)} million"


def render(filing: Filing, rng: random.Random) -> str:
    """The text of a filing, in one of four layouts."""
    head = f"{filing.company} {filing.suffix}"
    one, other = filing.years if rng.random() < 0.7 else filing.years[::-1]
    cells = {
        line: (figure(line, filing.value(line, one)), figure(line, filing.value(line, other))) for line in filing.lines
    }

    def table() -> str:
        rows = [f"{line} | FY{one} {a} | FY{other} {b}" for line, (a, b) in cells.items()]
        return "\n".join([f"{head} - annual report", *rows])

    def by_line() -> str:
        rows = [f"{line}: {a} in FY{one}, {b} in FY{other}." for line, (a, b) in cells.items()]
        return " ".join([f"{head}.", *rows])

    def prose() -> str:
        rows = [f"{line} was {a} in FY{one} and {b} in FY{other}." for line, (a, b) in cells.items()]
        return " ".join([f"{head} reports its year.", *rows])

    def by_year() -> str:
        rows = [f"{line}, FY{year}: {pair[i]}" for i, year in enumerate((one, other)) for line, pair in cells.items()]
        return "\n".join([head, *rows])

    return rng.choice((table, by_line, prose, by_year))()


def said(line: str, rng: random.Random) -> str:
    """A line as a person asks for it: mostly by the filing's own name."""
    name = line if rng.random() < 0.7 else rng.choice(SYNONYMS[line])
    return name if name.startswith("R&D") else name.lower()


def in_words(year: int, rng: random.Random) -> str:
    """A year as a person writes it."""
    return rng.choice(YEAR_WORDS).format(year)


def derivable(line: str, filing: Filing) -> bool:
    """Whether a missing line follows from the lines shown, so that `not disclosed` would be a matter of opinion."""
    return any(line in identity and identity - {line} <= filing.lines.keys() for identity in IDENTITIES)


Asked = tuple[str, str]
"""Question and answer."""


def ask_lookup(filing: Filing, rng: random.Random) -> Asked:
    """One figure."""
    line, year = rng.choice(list(filing.lines)), rng.choice(filing.years)
    return _lookup_text(filing, line, year, rng), figure(line, filing.value(line, year))


def ask_unanswerable(filing: Filing, rng: random.Random) -> Asked:
    """A line or a year that is not there, in the words of a lookup or of a change."""
    if rng.random() < 0.6:
        missing = [line for line in SYNONYMS if line not in filing.lines and not derivable(line, filing)]
        line, year = rng.choice(missing), rng.choice(filing.years)
    else:
        line, year = rng.choice(list(filing.lines)), rng.choice((filing.newer + 1, filing.newer - 2, filing.newer - 3))
    if rng.random() < 0.8 or line == MARGIN:
        return _lookup_text(filing, line, year, rng), NOT_DISCLOSED
    years = (year - 1, year) if year in (filing.newer, filing.newer + 1) else (year, year + 1)
    return _change_text(filing, line, years, rng), NOT_DISCLOSED


def ask_change(filing: Filing, rng: random.Random) -> Asked:
    """Direction and size of the change from the older to the newer year."""
    line = rng.choice(filing.amounts)
    newer, older = filing.years
    change = filing.value(line, newer) - filing.value(line, older)
    way = "up" if change > 0 else "down"
    return (
        _change_text(filing, line, (older, newer), rng),
        f"{way} {figure(line, abs(change))}",
    )


def ask_sum(filing: Filing, rng: random.Random) -> Asked:
    """Two lines of one year, both positive."""
    year = rng.choice(filing.years)
    a, b = rng.sample([line for line in filing.amounts if filing.value(line, year) > 0], 2)
    total = filing.value(a, year) + filing.value(b, year)
    words = {"company": filing.company, "a": said(a, rng), "b": said(b, rng), "year": in_words(year, rng)}
    return rng.choice(SUM).format(**words), figure(a, total)


def ask_compare(filing: Filing, rng: random.Random) -> Asked:
    """The higher of two years, or the larger of two lines."""
    year = rng.choice(filing.years)
    a, b = rng.sample(filing.amounts, 2)
    if rng.random() < 0.6 or filing.value(a, year) == filing.value(b, year):
        line, years = rng.choice(filing.amounts), rng.sample(filing.years, 2)
        high = max(years, key=lambda year: filing.value(line, year))
        style = rng.choice(YEAR_WORDS)
        words = {"one": style.format(years[0]), "other": style.format(years[1])}
        question = rng.choice(HIGHER_YEAR).format(company=filing.company, item=said(line, rng), **words)
        return question, f"FY{high}"
    words = {"company": filing.company, "a": said(a, rng), "b": said(b, rng), "year": in_words(year, rng)}
    larger = max(a, b, key=lambda line: filing.value(line, year))
    return rng.choice(LARGER_LINE).format(**words), larger


def _lookup_text(filing: Filing, line: str, year: int, rng: random.Random) -> str:
    return rng.choice(LOOKUP).format(company=filing.company, item=said(line, rng), year=in_words(year, rng))


def _change_text(filing: Filing, line: str, years: tuple[int, int], rng: random.Random) -> str:
    style = rng.choice(YEAR_WORDS)
    words = {"older": style.format(years[0]), "newer": style.format(years[1])}
    return rng.choice(CHANGE).format(company=filing.company, item=said(line, rng), **words)


ASK: dict[str, Callable[[Filing, random.Random], Asked]] = {
    "lookup": ask_lookup,
    "unanswerable": ask_unanswerable,
    "change": ask_change,
    "compare": ask_compare,
    "sum": ask_sum,
}


def rows() -> list[dict[str, str]]:
    """All rows: five or six questions a filing, the kinds dealt from one deck so that their shares are exact."""
    rng = random.Random(SEED)
    sizes = [rng.choice((5, 6)) for _ in range(FILINGS)]
    deck = [kind for kind, share in SHARES.items() for _ in range(round(share * sum(sizes)))]
    deck += ["lookup"] * (sum(sizes) - len(deck))
    rng.shuffle(deck)
    taken: set[str] = set()
    out = []
    for number, size in enumerate(sizes, start=1):
        filing = make_filing(rng, taken)
        context, seen = render(filing, rng), set()
        for kind in (deck.pop() for _ in range(size)):
            question, answer = ASK[kind](filing, rng)
            while question in seen:
                question, answer = ASK[kind](filing, rng)
            seen.add(question)
            filed = f"filing-{number:03d}"
            out.append({"context": context, "question": question, "answer": answer, "filing": filed, "kind": kind})
    return out


def as_text() -> str:
    """The bytes of data.jsonl."""
    return "".join(json.dumps(row) + "\n" for row in rows())


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("data.jsonl")
    target.write_text(as_text(), encoding="ascii", newline="\n")
