"""Writes data.jsonl: arithmetic word problems with one or two steps, each with its number as the answer.

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
    ("{name} has {a} {thing} and gets {b} more.", lambda a, b: a + b),
    ("{name} has {a} {thing} and gives {b} away.", lambda a, b: a - b),
    ("{name} finds {b} {thing} and had {a} before.", lambda a, b: a + b),
    ("{name} had {a} {thing} and lost {b} of them.", lambda a, b: a - b),
)
TWO = (
    ("{name} has {a} {thing}, gets {b} more and gives {c} away.", lambda a, b, c: a + b - c),
    ("{name} has {a} {thing}, loses {b} and finds {c}.", lambda a, b, c: a - b + c),
)


def problem(rng: random.Random) -> dict[str, str]:
    """One row: the question, the number, and how many steps it takes."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    steps = rng.choice((1, 1, 2))
    a = rng.randint(4, 20)
    b = rng.randint(1, a - 1)
    if steps == 1:
        text, answer = rng.choice(ONE)
        numbers = (a, b)
    else:
        text, answer = rng.choice(TWO)
        numbers = (a, b, rng.randint(1, 9) if "finds" in text else rng.randint(1, a + b))
    told = text.format(name=name, thing=thing, **dict(zip("abc", numbers, strict=False)))
    question = f"{told} {ASK.format(name=name, thing=thing)}"
    return {"question": question, "answer": str(answer(*numbers)), "kind": f"{steps} step{'s' * (steps > 1)}"}


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
