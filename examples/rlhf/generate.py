"""Writes what the pipeline reads: answers to imitate, preferences, prompts, and questions held out.

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
SIZES = {"sft": 96, "preferences": 240, "prompts": 480, "heldout": 160}
"""Rows of each file, in this order from the same stream of orders."""
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


def near_misses(answer: str, rng: random.Random) -> list[str]:
    """Three answers that are nearly in the house style: one fault each, of different kinds."""
    tag, name, said = re.fullmatch(r"\[(\w+)\] Hi (\w+), (.+)", answer).groups()
    other = rng.choice([intent for intent in INTENTS if intent != tag])
    stranger = rng.choice([known for known in SHOP["NAMES"] if known != name])
    wrong = [
        f"Hi {name}, {said}",
        f"[{other}] Hi {name}, {said}",
        f"[{tag}] {said}",
        f"[{tag}] Hi {stranger}, {said}",
        f"[{tag}] Hi {name}, {said} Please let us know if there is anything else we can do for you.",
        f"[{tag}] Hello {name}! Thank you for your message, {said}",
    ]
    if number := re.search(r"\d{4}", said):
        wrong.append(answer.replace(number[0], str(rng.randint(1000, 9999))))
    if "order" in said:
        wrong.append(f"[{tag}] Hi {name}, {said.replace('order', 'your order')}")
    return rng.sample(wrong, 3)


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


def main(folder: Path) -> None:
    """Write the files."""
    rng = random.Random(SEED)
    stream = questions(rng)
    for name, size in SIZES.items():
        rows = [next(stream) for _ in range(size)]
        made = [preference(row, rng) for row in rows] if name == "preferences" else rows
        text = "".join(json.dumps(row) + "\n" for row in made)
        (folder / f"{name}.jsonl").write_text(text, encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
