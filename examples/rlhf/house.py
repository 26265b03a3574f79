"""The people of this example, by rule: they rank answers, and judge them in the end.

    python examples/rlhf/house.py rank CANDIDATES OUTPUT     # rows of `rung generate`, with a score for each answer
    python examples/rlhf/house.py judge SFT OTHER ...        # held-out answers of several runs, side by side

An answer is as good as it has few faults; what counts as one is read off the order and the question's kind, and
nothing of a reward model is used.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rung.scoring.stats import score_interval

Row = dict[str, Any]


def faults(answer: str, row: Row) -> list[str]:
    """What the house would not have sent to this customer."""
    tag, name, said = re.fullmatch(r"\[(\w+)\] Hi (\w+), (.+)", row["expected"]).groups()
    found = []
    if not re.match(r"\[\w+\] ", answer):
        found.append("names no intent")
    elif not answer.startswith(f"[{tag}] "):
        found.append("names another intent")
    if f"Hi {name}, " not in answer:
        found.append("does not greet by name")
    if set(re.findall(r"\d+", answer)) != set(re.findall(r"\d+", said)):
        found.append("has other numbers")
    if said not in answer:
        found.append("says something else of the order")
    if len(answer.split()) > len(row["expected"].split()):
        found.append("says more than is asked")
    return found


def read(path: str) -> list[Row]:
    """Rows of a file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def rank(candidates: str, output: str) -> None:
    """Score the answers of each prompt; prompts whose answers are all equally good compare nothing."""
    kept = []
    for row in read(candidates):
        scores = [-float(len(faults(answer, row))) for answer in row["answers"]]
        if len(set(scores)) > 1:
            kept.append({key: row[key] for key in ("prompt", "context", "answers")} | {"scores": scores})
    Path(output).write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    print(f"{len(kept)} prompts with answers of different worth in {output}")


def judge(*paths: str) -> None:
    """A table; wins are against the first file, question by question, a tie counting half."""
    first = read(paths[0])
    before = np.array([len(faults(row["answers"][0], row)) for row in first])
    clusters = [row["context"] for row in first]
    print("| answers of | reward | nats from the reference | without fault [95 %] | wins [95 %] | tokens |")
    print("|---|---|---|---|---|---|")
    for path in paths:
        rows = read(path)
        counts = np.array([len(faults(row["answers"][0], row)) for row in rows])
        clean = score_interval((counts == 0).astype(float), clusters, binary=True)
        wins = score_interval(np.where(counts == before, 0.5, counts < before), clusters, binary=False)
        mean = {key: float(np.mean([row[key][0] for row in rows])) for key in ("scores", "log_ratios", "tokens")}
        cells = [
            Path(path).stem,
            f"{mean['scores']:+.2f}",
            f"{mean['log_ratios']:.2f}",
            f"{clean.mean:.2f} [{clean.low:.2f}, {clean.high:.2f}]",
            f"{wins.mean:.2f} [{wins.low:.2f}, {wins.high:.2f}]" if path != paths[0] else "",
            f"{mean['tokens']:.1f}",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    {"rank": rank, "judge": judge}[sys.argv[1]](*sys.argv[2:])
