"""Writes data.jsonl: arithmetic word problems with one or two steps, each with its number and the way to it.

Run `python examples/verifiable/generate.py [PATH]`. Standard library only, one fixed seed, the same bytes every time.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SEED = 20240902
PROBLEMS = 1500
NAMES = ("Mara", "Jonas", "Aylin", "Tomas", "Ines", "Pavel", "Lucia", "Henrik", "Samira", "Otto", "Nadia", "Emil")
THINGS = ("apples", "books", "stamps", "marbles", "pens", "shells", "coins", "cards", "stickers", "plums")
ASK = "How many {thing} does {name} have now? End with the number."
ONE = (
    ("{name} has {a} {thing} and gets {b} more.", "+"),
    ("{name} has {a} {thing} and gives {b} away.", "-"),
    ("{name} finds {b} {thing} and had {a} before.", "+"),
    ("{name} had {a} {thing} and lost {b} of them.", "-"),
)
TWO = (
    ("{name} has {a} {thing}, gets {b} more and gives {c} away.", "+-"),
    ("{name} has {a} {thing}, loses {b} and finds {c}.", "-+"),
)


def problem(rng: random.Random) -> dict[str, str]:
    """One row: the question, the number, the way to it, and how many steps that takes."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    text, signs = rng.choice(rng.choice((ONE, ONE, TWO)))
    a = rng.randint(4, 20)
    b = rng.randint(1, a - 1)
    c = rng.randint(1, 9) if signs == "-+" else rng.randint(1, a + b)
    now, steps = a, []
    for sign, number in zip(signs, (b, c), strict=False):
        after = now + number if sign == "+" else now - number
        steps.append(f"{now} {sign} {number} = {after}")
        now = after
    told = text.format(name=name, thing=thing, a=a, b=b, c=c)
    return {
        "question": f"{told} {ASK.format(name=name, thing=thing)}",
        "answer": str(now),
        "worked": ", ".join(steps),
        "kind": f"{len(steps)} step{'s' * (len(steps) > 1)}",
    }


def rows() -> list[dict[str, str]]:
    """Different questions, in the order of the draw."""
    rng = random.Random(SEED)
    found: dict[str, dict[str, str]] = {}
    while len(found) < PROBLEMS:
        row = problem(rng)
        found.setdefault(row["question"], row)
    return list(found.values())


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("data.jsonl"))
    target.write_text("".join(json.dumps(row) + "\n" for row in rows()))
