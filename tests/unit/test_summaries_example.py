"""The summaries example: the committed data are what the generator writes, and every summary follows from its report.

Reports are read here by patterns; of the generator's tables only the wordings of one and the same thing are used.
"""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

HERE = Path(__file__).parents[2] / "examples" / "summaries"
GENERATE = runpy.run_path(str(HERE / "generate.py"))
CHECK = runpy.run_path(str(HERE / "facts.py"))
ROWS = [json.loads(line) for line in (HERE / "data.jsonl").read_text(encoding="ascii").splitlines()]
LOSS = r"(?:cost us|write off) (\d+ \w+)|(\d+ \w+) were lost"
CHOSEN = r"(?:agreed|decided) to (.+?)(?: instead)?\."
TURNED_DOWN = r"(?:idea|proposed|wanted) to (.+?)(?:\.|, but| was)"
NEXT = r"([A-Z]\w+ [A-Z]\w+) (?:will|has promised to|to) ([^.]+?) by (\d+ \w+)\."


def wordings(text: str) -> tuple[str, ...]:
    """All wordings of an option or a step."""
    groups = [group for incident in GENERATE["INCIDENTS"] for group in (*incident.options, *incident.steps)]
    (found,) = [group for group in groups if text in group]
    return found


def test_the_file_is_what_the_generator_writes(tmp_path: Path) -> None:
    GENERATE["main"](tmp_path / "data.jsonl")
    assert (tmp_path / "data.jsonl").read_bytes() == (HERE / "data.jsonl").read_bytes()


@pytest.mark.parametrize("row", ROWS[::4], ids=range(len(ROWS[::4])))
def test_every_summary_follows_from_its_report(row: dict[str, str]) -> None:
    place, _, loss, decision, who, step, date = CHECK["STYLE"].fullmatch(row["answer"]).groups()
    report = row["context"]
    assert place in report
    (losses,) = re.findall(LOSS, report)
    assert loss in losses
    (chosen,), (other,) = re.findall(CHOSEN, report), re.findall(TURNED_DOWN, report)
    assert decision in wordings(chosen) and decision not in wordings(other)
    ((person, action, day),) = re.findall(NEXT, report)
    # routine names people and dates too, and never the one who acts
    assert (person, day) == (who, date) and step in wordings(action) and report.count(who) == 1


def test_rows_are_varied() -> None:
    assert len(ROWS) == 320 and len({row["context"] for row in ROWS}) == 320
    places = Counter(row["answer"].partition(":")[0] for row in ROWS)
    assert len(places) == 21 and min(places.values()) > 3
    lengths = [len(row["context"].split()) for row in ROWS]
    assert 80 < min(lengths) and max(lengths) < 170
    same_words = [re.search(r"Decision: (.+?)\.", row["answer"])[1] in row["context"] for row in ROWS]  # type: ignore[index]
    assert 0.3 < sum(same_words) / len(ROWS) < 0.7


def test_the_instruction_of_the_config_is_the_generator_s() -> None:
    config = yaml.safe_load((HERE / "climb.yaml").read_text())
    assert config["evaluation"]["instruction"] == GENERATE["INSTRUCTION"]


EXPECTED = "Line 2: torn conveyor belt; 340 bottles lost. Decision: change the belt at night. Next: Mara Lind to "
EXPECTED += "order two spare belts by 6 May."


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("", "", None),
        ("change the belt at night", "replace the belt in the night shift", None),
        ("Line 2", "Line 3", "place"),
        ("340 bottles", "40 bottles", "loss"),
        ("change the belt at night", "patch the belt for now", "decision"),
        ("change the belt", "patch the belt for now, change the belt", "decision"),
        ("Mara Lind", "Jonas Weber", "who"),
        ("order two spare belts", "check the belts of all lines", "step"),
        ("6 May", "16 May", "date"),
    ],
)
def test_which_facts_are_right(old: str, new: str, wrong: str | None) -> None:
    found = CHECK["right_facts"](EXPECTED.replace(old, new) if old else EXPECTED, EXPECTED)
    assert [name for name, right in found.items() if not right] == ([wrong] if wrong else [])


def test_the_table_of_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rungs" / "lora").mkdir(parents=True)
    answers = [EXPECTED, EXPECTED.replace("6 May", "7 May"), "A belt was torn."]
    rows = [{"answer": answer, "expected": EXPECTED} for answer in answers]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rungs" / "lora" / "items.parquet")
    CHECK["main"](str(tmp_path), "lora")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| lora | 0.67 | 0.67 | 0.67 | 0.67 | 0.67 | 0.33 | 0.67 | 0.33 [0.01, 0.91] | 18 |")
