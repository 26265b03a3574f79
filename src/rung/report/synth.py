"""HTML page about a folder of `rung synth`: yield, cost, rounds, and rows with what was left out.

It has the form of the report of a run (`html.py`): no scripts, no external resources, the same folder gives the same
bytes. `synth.teach` and `synth.improve` write it as their last file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from rung.files import write_bytes
from rung.report.formatting import format_duration, format_estimate
from rung.report.html import page_template
from rung.results.base import Estimate
from rung.results.synth import ConstitutionResult, ImproveResult, RevisionRound, SynthResult

REPORT_FILE = "report.html"
ROWS_SHOWN = 12
"""Rows that the page shows, and rejected questions of each filter."""
_BY_RULES = "Answers by written rules"
Rows = Iterable[Mapping[str, Any]]


def write_teach_page(folder: Path, result: SynthResult, config: Mapping[str, Any], rows: Rows, rejected: Rows) -> None:
    """Write `report.html` about rows that a teacher wrote."""
    is_enough = result.wanted is None or result.rows >= result.wanted
    cost = result.cost
    facts = {
        "teacher": config["synth"]["teacher"]["model"],
        "requests": f"{cost.requests:,}",
        "tokens read": f"{cost.prompt_tokens:,}",
        "tokens written": f"{cost.answer_tokens:,}",
        "answering": format_duration(cost.seconds),
        "money": "" if cost.money is None else f"{cost.money:.4f}",
        "diversity": f"{result.diversity:.2f}",
        "of the seeds": "" if result.diversity_of_seeds is None else f"{result.diversity_of_seeds:.2f}",
    }
    filters = [{"cells": ["kept", f"{result.rows:,}", f"{result.rows / result.tried:.0%}"], "chosen": False}]
    for name, count in result.rejected.items():
        filters.append({"cells": [name, f"{count:,}", f"{count / result.tried:.0%}"], "chosen": False})
    shown = [_example(row) for row in islice(rows, ROWS_SHOWN)]
    note = "The first filter that a question does not pass is counted; docs/synth/teach.md defines each."
    parts = {
        "kind": "made rows",
        "tone": "good" if is_enough else "warn",
        "kicker": "Rows that a model wrote" if is_enough else "Fewer rows than were asked for",
        "said": f"{result.rows:,} rows of {result.tried:,} questions",
        "command": f"rung data check {result.output}",
        "table": {"title": "Yield", "heads": ["", "questions", "share"], "rows": filters, "note": note},
        "examples": [{"title": "Rows", "items_shown": shown}, *_left_out(rejected)],
    }
    _write(folder, parts | {"facts": facts}, config)


def write_improve_page(folder: Path, result: ImproveResult, config: Mapping[str, Any]) -> None:
    """Write `report.html` about rounds of a model that learned from its own answers."""
    heads = ["round", "rows", *(f"pass@{k}" for k in result.rounds[0].pass_at), "gain", "all right", "none right"]
    rows = []
    for r in result.rounds:
        gain = "" if r.gain is None else format_estimate(r.gain, signed=True)
        scores = [format_estimate(estimate) for estimate in r.pass_at.values()]
        cells = [str(r.number), f"{r.rows:,}", *scores, gain, f"{r.all_right:.0%}", f"{r.all_wrong:.0%}"]
        rows.append({"cells": cells, "chosen": r.number == result.best})
    facts: dict[str, str] = {"stopped": result.reason, "judge": "" if result.judge is None else result.judge.reason}
    if result.test is not None:
        for name in ("start", "best"):
            facts[f"test, {name}"] = format_estimate(Estimate(**result.test[name]["1"]))
        facts["difference"] = format_estimate(Estimate(**result.test["gain"]), signed=True)
    note = "pass@k on the validation split; gains are paired by question, intervals are 95 %."
    parts: dict[str, Any] = {
        "kind": "own answers",
        "tone": "good" if result.best else "warn",
        "kicker": "A model that learned from its own right answers",
        "said": f"round {result.best} of {len(result.rounds) - 1} is best" if result.best else "no round was better",
        "command": f"rung eval {result.output}",
        "table": {"title": "Rounds", "heads": heads, "rows": rows, "note": note},
        "examples": [],
    }
    _write(folder, parts | {"facts": facts}, config)


def write_constitution_page(
    folder: Path, result: ConstitutionResult, config: Mapping[str, Any], rows: Rows, rejected: Rows
) -> None:
    """Write `report.html` about rows by a constitution."""
    synth, critic = config["synth"], result.critic
    facts = {"teacher": synth["teacher"]["model"], "critic": (synth["critic"] or synth["teacher"])["model"]}
    facts["agreement with people"] = "not measured: no human_labels" if critic is None else critic.reason
    if result.probability is not None:
        facts["probability of the chosen answer"] = f"{result.probability:.2f}"
        facts["of the answer shown first"] = f"{result.shown_first:.2f}"
        facts["same in both orders"] = f"{result.consistent:.0%}"
    for name, cost in result.costs.items():
        facts[f"{name}: requests"] = f"{cost.requests:,}" if cost.requests else ""
        written = "not counted" if cost.uncounted else f"{cost.answer_tokens:,}"
        facts[f"{name}: tokens written"] = written if cost.requests else ""
        facts[f"{name}: money"] = "" if cost.money is None else f"{cost.money:.4f}"
    facts["left out"] = ", ".join(f"{name} {count:,}" for name, count in result.rejected.items())
    is_distrusted = critic is not None and not critic.trusted
    shown = [_example(row) for row in islice(rows, ROWS_SHOWN)]
    parts: dict[str, Any] = {
        "kind": "constitution",
        "tone": "warn" if is_distrusted or critic is None else "good",
        "kicker": "NOT TRUSTED: the critic agrees with people no more than chance" if is_distrusted else _BY_RULES,
        "said": f"{result.rows:,} rows from {result.seeds:,} questions",
        "command": f"rung data check {result.output}",
        "table": _rounds_table(result.rounds) if result.rounds else None,
        "examples": [{"title": "Rows", "items_shown": shown}, *_left_out(rejected)],
    }
    _write(folder, parts | {"facts": facts}, config)


def _rounds_table(rounds: Iterable[RevisionRound]) -> dict[str, Any]:
    rows = []
    for r in rounds:
        counts = [f"{n:,}" if r.number else "" for n in (r.revised, r.unchanged)]
        rows.append({"cells": [str(r.number), *counts, f"{r.refusing:.0%}", f"{r.words:.0f}"], "chosen": False})
    heads = ["round", "revised", "unchanged", "refusing", "words"]
    note = "Answers after each round; round 0 are the first answers."
    return {"title": "Rounds", "heads": heads, "rows": rows, "note": note}


def _write(folder: Path, parts: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)
    page = page_template("synth_template.html").render(title=folder.resolve().name, config=text, **parts)
    write_bytes(folder / REPORT_FILE, page.encode("utf-8", "replace"))  # a model may write lone surrogates


def _example(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as question, context and answers."""
    made = row.get("made", {})
    source = f"question {made.get('number')}"
    if rule := made.get("rule"):
        source += f", {rule}"
    if attributes := made.get("attributes"):
        source += ", " + ", ".join(f"{name}: {value}" for name, value in attributes.items())
    answers = [("before", made["before"])] if "before" in made else []
    if "messages" in row:
        first, *others = row["messages"]
        answers += [(turn["role"], turn["content"]) for turn in others]
        return {"question": first["content"], "context": row.get("context"), "answers": answers, "source": source}
    question = row.get("question", row.get("prompt"))
    question = question if isinstance(question, str) else json.dumps(question, ensure_ascii=False)
    answers += [(name, row[name]) for name in ("answer", "chosen", "rejected") if name in row]
    return {"question": question, "context": row.get("context"), "answers": answers, "source": source}


def _left_out(rejected: Rows) -> Sequence[dict[str, Any]]:
    """A section for each filter with the first questions that it left out."""
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for row in rejected:
        items = by_filter.setdefault(row["filter"], [])
        if len(items) < ROWS_SHOWN:
            answers = [("reason", row["reason"]), *(("answer", answer) for answer in row.get("answers", ()))]
            source = f"question {row['number']}"
            item = {"question": row.get("question", ""), "context": row.get("context"), "answers": answers}
            items.append(item | {"source": source})
    return [{"title": f"Left out: {name}", "items_shown": items} for name, items in by_filter.items()]
