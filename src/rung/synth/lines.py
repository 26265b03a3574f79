"""What `rung synth` prints: yield by filter, cost, and the rows of a preview."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rung.console import add_text_row
from rung.report.formatting import empty_table, format_duration, format_estimate, render_lines
from rung.report.synth import REPORT_FILE
from rung.results.base import Estimate
from rung.results.evaluation import JudgeAgreement
from rung.results.synth import ConstitutionResult, ImproveResult, SynthCost, SynthResult

PREVIEW_CHARACTERS = 300
"""Characters of a text that a preview shows."""


def synth_lines(result: SynthResult) -> list[str]:
    """Lines for people about rows, filters, diversity and cost."""
    lines = [f"{result.rows:,} rows in {result.output}, from {result.tried:,} questions"]
    if result.wanted is not None and result.rows < result.wanted:
        remedy = "synth.attempts allows more questions, and with questions: seeds more seeds do"
        lines.append(f"fewer than the {result.wanted:,} that were asked for: {remedy}")
    if result.rejected:
        counts = ", ".join(f"{name} {count:,}" for name, count in result.rejected.items())
        lines.append(f"left out by filter: {counts} (rejected.jsonl has the reasons)")
    seeds = f", {result.diversity_of_seeds:.2f} in as many seeds" if result.diversity_of_seeds is not None else ""
    shown = f"{result.compared_questions:,} questions"
    lines.append(f"diversity: {result.diversity:.2f} of the word pairs of {shown} are distinct{seeds}")
    lines += cost_lines("cost", result.cost)
    lines.append(f"report  {Path(result.output).parent / REPORT_FILE}")
    return lines + _judge_lines(result.judge)


def _judge_lines(judge: JudgeAgreement | None) -> list[str]:
    """Whether people agree with the judge that decided."""
    return [] if judge is None else [f"judge: {'trusted' if judge.trusted else 'NOT TRUSTED'}, {judge.reason}"]


def cost_lines(name: str, cost: SynthCost) -> list[str]:
    """Requests, tokens, time and money of one model."""
    tokens = f"{cost.prompt_tokens:,} tokens read and {cost.answer_tokens:,} written"
    if cost.uncounted and not (cost.prompt_tokens or cost.answer_tokens):
        tokens = "tokens that the server did not count"
    elif cost.uncounted:
        tokens += f", without {cost.uncounted:,} replies whose tokens the server did not count"
    money = "" if cost.money is None else f", {cost.money:.4f} in money"
    lines = [f"{name}: {cost.requests:,} requests, {tokens}, {format_duration(cost.seconds)} of answering{money}"]
    return [*lines, f"{cost.failed:,} requests failed for good"] if cost.failed else lines


def constitution_lines(result: ConstitutionResult) -> list[str]:
    """Lines for people about rows, rounds, the critic and costs."""
    helpful = f", {result.helpful:,} of them helpful rows as they are" if result.helpful else ""
    lines = [f"{result.rows:,} rows in {result.output}{helpful}, from {result.seeds:,} questions"]
    if result.rounds:
        table = empty_table(["round", "revised", "unchanged", "refusing", "words"])
        for r in result.rounds:
            counts = [f"{n:,}" if r.number else "\u2013" for n in (r.revised, r.unchanged)]
            add_text_row(table, str(r.number), *counts, f"{r.refusing:.0%}", f"{r.words:.0f}")
        lines += render_lines(lambda console: [table])
    if result.probability is not None:
        text = f"probability of the chosen answer: {result.probability:.2f} on average"
        lines.append(f"{text}; {result.shown_first:.2f} for the answer shown first, where 0.50 is no bias")
        lines.append(f"the same preference in both orders: {result.consistent:.0%} of the pairs")
    if result.rejected:
        counts = [f"{name} {count:,}" for name, count in result.rejected.items()]
        lines.append(f"left out by filter: {', '.join(counts)} (rejected.jsonl has the reasons)")
    for name, cost in result.costs.items():
        if cost.requests:
            lines += cost_lines(name, cost)
    if result.critic is None:
        lines.append("critic: not measured, synth.human_labels names no pairs that people labeled")
    else:
        lines.append(f"critic: {'trusted' if result.critic.trusted else 'NOT TRUSTED'}, {result.critic.reason}")
    return [*lines, f"report  {Path(result.output).parent / REPORT_FILE}"]


def revision_lines(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines for people with the answers of a preview, their rounds or comparisons."""
    lines = []
    for item in items:
        lines.append(f"question: {_shown(item['question'])}")
        lines += [f"    {name}: {_shown(item[name])}" for name in ("answer", "first", "second", "rule") if name in item]
        for number, done in enumerate(item.get("rounds", ()), start=1):
            lines.append(f"    {number}. {_shown(done['rule'])}")
            lines += [f"       {name}: {_shown(done[name])}" for name in ("critique", "revision") if done[name]]
        if item.get("unchanged"):
            lines.append(f"    revisions without a change: {item['unchanged']}")
        if "probability_of_first" in item:
            lines.append(f"    probability that the first is better: {item['probability_of_first']:.3f}")
        if "left_out_by" in item:
            lines.append(f"    left out by {item['left_out_by']}: {item['reason']}")
    return [*lines, "nothing was written"]


def preview_lines(rows: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines for people with each row, and each question that was left out with its reason."""
    lines = []
    for row in rows:
        lines.append(f"row {row['made']['number']}")
        lines += [f"    {name}: {_shown(value)}" for name, value in row.items() if name != "made"]
    for row in rejected:
        lines.append(f"left out {row['number']} by {row['filter']}: {row['reason']}")
        lines += [f"    {name}: {_shown(row[name])}" for name in ("question", "answers") if name in row]
    return [*lines, f"{len(rows):,} rows, {len(rejected):,} questions left out; nothing was written"]


def improve_lines(result: ImproveResult) -> list[str]:
    """A table of the rounds, and what the best one is worth on the test split."""
    table = empty_table(
        ["round", "rows", *(f"pass@{k}" for k in result.rounds[0].pass_at), "gain", "all right", "none"]
    )
    for r in result.rounds:
        cells = [str(r.number), f"{r.rows:,}" if r.number else "\u2013", *map(format_estimate, r.pass_at.values())]
        gain = "\u2013" if r.gain is None else format_estimate(r.gain, signed=True)
        add_text_row(table, *cells, gain, f"{r.all_right:.0%}", f"{r.all_wrong:.0%}")
    lines = render_lines(lambda console: [table])
    lines.append(f"the validation split chose round {result.best}: {result.output} ({result.reason})")
    if result.test is not None:
        both = [Estimate(**result.test[name]["1"]) for name in ("start", "best")]
        gain = format_estimate(Estimate(**result.test["gain"]), signed=True)
        text = " to ".join(map(format_estimate, both))
        lines.append(f"test, {result.test['questions']:,} questions: pass@1 from {text}, {gain}")
    return lines + _judge_lines(result.judge)


def sampled_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines for people with sampled answers and what the verifier said of each."""
    lines = []
    for row in rows:
        lines.append(f"question: {_shown(row['question'])}")
        for answer, accepted in zip(row["answers"], row["accepted"], strict=True):
            lines.append(f"    {'accepted' if accepted else 'not     '}  {_shown(answer)}")
    return [*lines, "nothing was written"]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= PREVIEW_CHARACTERS else text[:PREVIEW_CHARACTERS] + " ..."
