"""The support example: the committed data are what the generator writes, and every answer follows from its record.

Intents are recognized here by words, sentences made from the record as text; nothing of the generator's tables is used.
"""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter, defaultdict
from pathlib import Path

import yaml

HERE = Path(__file__).parents[2] / "examples" / "support"
ROWS = [json.loads(line) for line in (HERE / "data.jsonl").read_text(encoding="ascii").splitlines()]
WORDS = {
    "invoice": r"invoice|bill\b|receipt",
    "refund": r"refund|money|pay me back|return the price",
    "address": r"address|street|office|sister",
    "cancel": r"cancel|stop|call off|take it off|withdraw",
    "delivery": r"where is my|when will|waiting|been delivered|how far along|which day|track|state of order",
}


def intent_of(message: str) -> str:
    """The first whose words are there."""
    return next((name for name, words in WORDS.items() if re.search(words, message.lower())), "person")


def solve(row: dict[str, str]) -> str:
    """The reply in the house style."""
    found = re.fullmatch(
        r"Order (\d+) \| (\w+) \| [\w ]+ \| EUR (\d+) \| (\w+) \| (?:delivered|arrives) on (\d+ \w+)", row["context"]
    )
    assert found is not None
    number, name, price, state, day = found.groups()
    intent = intent_of(row["question"])
    if intent == "delivery":
        said = f"order {number} {'was delivered' if state == 'delivered' else 'arrives'} on {day}."
    elif intent == "cancel":
        said = f"order {number} {'is cancelled.' if state == 'packing' else 'has left us, please send it back.'}"
    elif intent == "address":
        said = f"order {number} {'goes to the new' if state == 'packing' else 'has left us with the old'} address."
    elif intent == "refund" and state == "delivered":
        said = f"EUR {price} for order {number} are on their way."
    elif intent == "refund":
        said = f"order {number} is refunded once it is back."
    elif intent == "invoice":
        said = f"the invoice of order {number} over EUR {price} is attached."
    else:
        said = "a colleague writes to you today."
    return f"[{intent}] Hi {name}, {said}"


def test_the_file_is_what_the_generator_writes(tmp_path: Path) -> None:
    runpy.run_path(str(HERE / "generate.py"))["main"](tmp_path / "data.jsonl")
    assert (tmp_path / "data.jsonl").read_bytes() == (HERE / "data.jsonl").read_bytes()


def test_every_answer_follows_from_record_and_message() -> None:
    wrong = [row for row in ROWS if solve(row) != row["answer"]]
    assert not wrong, wrong[:3]


def test_rows_are_varied_and_grouped() -> None:
    assert len(ROWS) == 1200 and len({row["order"] for row in ROWS}) == 300
    intents = Counter(row["intent"] for row in ROWS)
    assert len(intents) == 6 and min(intents.values()) > 100
    contexts = defaultdict(set)
    for row in ROWS:
        contexts[row["order"]].add(row["context"])
    assert all(len(own) == 1 for own in contexts.values())
    assert len({row["question"] for row in ROWS}) > 900
    assert max(len(f"{row['context']} {row['question']}".split()) for row in ROWS) < 50


def test_the_instruction_of_the_config_is_the_generator_s() -> None:
    config = yaml.safe_load((HERE / "climb.yaml").read_text())
    assert config["evaluation"]["instruction"] == runpy.run_path(str(HERE / "generate.py"))["INSTRUCTION"]
