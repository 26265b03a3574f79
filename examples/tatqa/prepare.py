"""Turns TAT-QA's nested JSON into question/context/answer rows for `climb.yaml`.

Run `python examples/tatqa/prepare.py tatqa_dataset_dev.json rows.jsonl`. Standard library only.

A context becomes text by one rule: the table first, a line a row, its cells stripped and joined by ` | `, empty rows
left out; then the paragraphs in their order, a line each. An answer becomes text by another: a list is joined by
`; `, a number is written without a trailing `.0`, and its scale follows it as `%` or as a word.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def context_text(entry: dict[str, Any]) -> str:
    """Table, then paragraphs."""
    rows = [" | ".join(cell.strip() for cell in row) for row in entry["table"]["table"] if any(map(str.strip, row))]
    paragraphs = sorted(entry["paragraphs"], key=lambda paragraph: paragraph["order"])
    return "\n".join([*rows, *(" ".join(paragraph["text"].split()) for paragraph in paragraphs)])


def answer_text(answer: Any, scale: str) -> str:
    """One line, scale included: -22.22 and percent is -22.22%, ["$1,496.5"] and million is $1,496.5 million."""
    parts = answer if isinstance(answer, list) else [answer]
    text = "; ".join(f"{part:g}" if isinstance(part, float | int) else " ".join(str(part).split()) for part in parts)
    if not scale:
        return text
    return f"{text.rstrip('%')}%" if scale == "percent" else f"{text} {scale}"


def rows(entries: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """One row a question; `source` names the context, which is the cluster."""
    for entry in entries:
        context, uid = context_text(entry), entry["table"]["uid"]
        for asked in entry["questions"]:
            answer = answer_text(asked["answer"], asked["scale"])
            question = " ".join(asked["question"].split())
            yield {"context": context, "question": question, "answer": answer, "source": uid}


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    written = [json.dumps(row) for row in rows(json.loads(source.read_text(encoding="utf-8")))]
    target.write_text("\n".join(written) + "\n", encoding="utf-8")
