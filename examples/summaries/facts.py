"""Which facts the summaries of a climb get right, which ROUGE-L sees only as words among others.

    python examples/summaries/facts.py runs/summaries-climb few_shot lora

A decision or a step counts in either of its wordings; a decision does not count beside the option that was turned down.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rung.scoring.stats import score_interval

INCIDENTS = runpy.run_path(str(Path(__file__).with_name("generate.py")))["INCIDENTS"]
OPTIONS = [wordings for incident in INCIDENTS for wordings in incident.options]
STEPS = [wordings for incident in INCIDENTS for wordings in incident.steps]
STYLE = re.compile(r"(.+?): (.+?); (\d+ \w+) lost\. Decision: (.+?)\. Next: (\w+ \w+) to (.+?) by (\d+ \w+)\.")
FACTS = ("place", "loss", "decision", "who", "step", "date")


def named(texts: list[tuple[str, ...]], answer: str) -> list[tuple[str, ...]]:
    """The options or steps that an answer names, each with its wordings."""
    return [wordings for wordings in texts if any(words in answer for words in wordings)]


def right_facts(answer: str, expected: str) -> dict[str, bool]:
    """Each fact of the expected summary, and whether the answer has it."""
    place, _, loss, decision, who, step, date = STYLE.fullmatch(expected).groups()
    right = {"place": place, "loss": loss, "who": who, "date": date}
    found = {name: re.search(rf"\b{re.escape(text)}\b", answer) is not None for name, text in right.items()}
    found["decision"] = named(OPTIONS, answer) == named(OPTIONS, decision)
    found["step"] = named(STEPS, answer) == named(STEPS, step)
    return {name: found[name] for name in FACTS}


def table_row(rung: str, items: list[dict[str, Any]]) -> str:
    """A rung's line: the share of summaries with each fact, in the style, and with all facts; words of a summary."""
    facts = [right_facts(item["answer"], item["expected"]) for item in items]
    shares = [f"{np.mean([f[name] for f in facts]):.2f}" for name in FACTS]
    style = np.mean([STYLE.fullmatch(item["answer"]) is not None for item in items])
    sure = score_interval([float(all(f.values())) for f in facts], range(len(items)), binary=True)
    words = np.mean([len(item["answer"].split()) for item in items])
    cells = [rung, *shares, f"{style:.2f}", f"{sure.mean:.2f} [{sure.low:.2f}, {sure.high:.2f}]", f"{words:.0f}"]
    return f"| {' | '.join(cells)} |"


def main(climb: str, *rungs: str) -> None:
    """A table of the rungs."""
    heads = ["rung", *FACTS, "in the style", "all facts [95 %]", "words"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for rung in rungs:
        print(table_row(rung, pq.read_table(Path(climb) / "rungs" / rung / "items.parquet").to_pylist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
