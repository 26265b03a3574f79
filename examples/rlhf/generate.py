"""Writes what the pipeline reads: answers as they were given, preferences, prompts, and questions held out.

Run `python examples/rlhf/generate.py [FOLDER]`. The shop and its house style are those of examples/support, with
other orders; no order stands in two files. Standard library only, one fixed seed, the same bytes every time.
"""

from __future__ import annotations

import json
import random
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEED = 20240915
HERE = Path(__file__).parent
SHOP = runpy.run_path(str(HERE.parent / "support" / "generate.py"))
INTENTS = tuple(SHOP["SHARES"])
SIZES = {"logged": 320, "preferences": 120, "prompts": 480, "heldout": 160}
"""Rows of each file, in this order from the same stream of orders."""
CARELESS = 0.75
"""Share of the logged answers that are right and not in the house style."""
Row = dict[str, Any]


def questions(rng: random.Random) -> Iterator[Row]:
    """Customers' messages with the answer in the house style, two of each order."""
    taken: set[int] = set()
    while True:
        order = SHOP["make_order"](rng, taken)
        for intent in sorted(rng.sample(INTENTS, 2)):
            yield {
                "context": order.record,
                "question": SHOP["message"](intent, order, rng),
                "answer": SHOP["answer"](intent, order),
                "order": f"order-{order.number}",
            }


def styles(answer: str) -> list[str]:
    """The same said otherwise: right, and not in the house style."""
    tag, name, said = re.fullmatch(r"\[(\w+)\] Hi (\w+), (.+)", answer).groups()
    return [
        f"Hi {name}, {said}",
        f"[{tag}] {said}",
        f"[{tag}] Hello {name}! Thank you for your message, {said}",
        f"[{tag}] Hi {name}, {said} Please let us know if there is anything else we can do for you.",
        f"Dear customer, {said}",
    ]


def near_misses(answer: str, rng: random.Random) -> list[str]:
    """Three answers that are nearly right: two in another style, one with something wrong in it."""
    tag, name, said = re.fullmatch(r"\[(\w+)\] Hi (\w+), (.+)", answer).groups()
    other = rng.choice([intent for intent in INTENTS if intent != tag])
    stranger = rng.choice([known for known in SHOP["NAMES"] if known != name])
    wrong = [f"[{other}] Hi {name}, {said}", f"[{tag}] Hi {stranger}, {said}"]
    if number := re.search(r"\d{4}", said):
        wrong.append(answer.replace(number[0], str(rng.randint(1000, 9999))))
    return [*rng.sample(styles(answer), 2), rng.choice(wrong)]


def logged(row: Row, rng: random.Random) -> Row:
    """As it was answered by people of different care."""
    return {**row, "answer": rng.choice(styles(row["answer"]))} if rng.random() < CARELESS else row


def preference(row: Row, rng: random.Random) -> Row:
    """The house's answer above its near misses, which are equally bad."""
    answers = [row["answer"], *near_misses(row["answer"], rng)]
    return {
        "prompt": row["question"],
        "context": row["context"],
        "answers": answers,
        "scores": [0.0, -1.0, -1.0, -1.0],
        "order": row["order"],
    }


CHANGED = {"logged": logged, "preferences": preference}
"""Files whose answers are not all in the house style."""


def main(folder: Path) -> None:
    """Write the files."""
    rng = random.Random(SEED)
    stream = questions(rng)
    for name, size in SIZES.items():
        rows = [next(stream) for _ in range(size)]
        if name in CHANGED:
            rows = [CHANGED[name](row, rng) for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
