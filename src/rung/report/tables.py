"""Terminal output of ladders, runs, evaluations and comparisons.

The ladder adapts to the terminal: 120 columns hold one line per rung, 80 hold two by putting intervals below their
means; narrower ones lose columns, never digits. Without a terminal the width is fixed, so that logs can be compared.
Functions return lines and print nothing. `cli` and `commands.ladder` call them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rung.report.formatting import (
    decimals,
    empty_table,
    encodable_on_terminal,
    format_bounds,
    format_bytes,
    format_count,
    format_duration,
    format_fixed,
    format_loss,
    format_p_value,
    format_significant,
    name_value_table,
    render_lines,
)
from rung.report.summaries import (
    LadderRow,
    artifact_folder,
    commands_after_climb,
    commands_after_run,
    contamination_text,
    gates_text,
    ladder_rows,
    loss_unit,
    method_text,
    retrieved_text,
)

Json = Mapping[str, Any]
_TONE = {"good": "green", "bad": "red", "recommended": "bold green", "safe": "bold yellow", "best": "bold"}


def ladder_lines(ladder: dict[str, Any]) -> list[str]:
    """The ladder, the verdict, the path of the report and next commands."""
    metrics = list(ladder["ladder"][0]["scores"])
    rows = ladder_rows([(row["rung"], row) for row in ladder["ladder"]], metrics, ladder["verdict"])
    verdict = ladder["verdict"]
    verdict_text = Text(verdict["text"], style=_TONE["recommended" if verdict.get("recommended") else "safe"])
    size = f"{ladder['examples']} held-out questions in {ladder['clusters']} clusters; intervals are 95 %, gains paired"
    retrieval_texts = [Text(line, style="dim") for line in _retrieval_lines(ladder["ladder"])]
    notes = [entry["text"] for name in ("notes", "forgotten") for entry in ladder.get(name, ())]
    note_texts = [Text(text) for text in (*_next_rung_lines(ladder), *notes)]
    skipped_texts = [
        Text(f"not measured: {entry['rung']}, {entry['why']}", style="dim") for entry in ladder.get("left", ())
    ]
    facts = [Text(size, style="dim"), *retrieval_texts, *skipped_texts]
    lines = render_lines(
        lambda console: [_fitting_layout(rows, metrics, console), *facts, Text(), verdict_text, *note_texts]
    )
    return ["", *lines, *_report_and_commands(str(ladder["report"]), commands_after_climb(ladder))]


def _next_rung_lines(ladder: Json) -> list[str]:
    return [ladder["further"]["text"]] if ladder.get("further") else []


def _retrieval_lines(rows: Sequence[Json]) -> list[str]:
    """Hit rates of retrieval; rungs with the same result share a line."""
    rungs: dict[str, list[str]] = {}
    for row in rows:
        if row.get("retrieval"):
            rungs.setdefault(retrieved_text(row["retrieval"]), []).append(row["rung"])
    return [
        f"{', '.join(names)}: the right passage is among those retrieved for {text}" for text, names in rungs.items()
    ]


def run_lines(manifest: dict[str, Any], output: str, report: str) -> list[str]:
    """Status of a run, its measurements, the folder of its weights and next commands."""
    data, config = manifest.get("data", {}), manifest.get("config", {})
    validation = f", validation {format_loss(manifest['validation_loss'])}" if manifest.get("validation_loss") else ""
    unit = loss_unit(config)
    lines = {"gates": gates_text(manifest.get("gates", ()))}
    if manifest.get("steps"):
        speed = f"{manifest['tokens_per_second']:,.0f} tokens/s, " if manifest.get("tokens_per_second") else ""
        lines |= {
            "trained": f"{format_count(manifest.get('trainable_parameters'))} parameters, "
            + method_text(config.get("method", {}))
            + (f"; {manifest['moves']}" if manifest.get("moves") else ""),
            "loss": f"{format_loss(manifest.get('train_loss'))} in the last step{validation} {unit}",
            "speed": f"{speed}{manifest['steps']:,} steps, {manifest.get('tokens', 0):,} tokens in "
            f"{format_duration(manifest.get('train_seconds'))}",
            "memory": _memory(manifest),
        }
    if rows := data.get("splits", {}).get("train", {}).get("rows"):
        supervised = data.get("train", {}).get("supervised_tokens", 0)
        lines["data"] = f"{rows:,} rows, {supervised:,} supervised tokens" if supervised else f"{rows:,} prompts"
    if manifest.get("status") == "finished":
        lines[artifact_folder(manifest, "").strip("/")] = artifact_folder(manifest, output)
    if error := manifest.get("error"):
        lines["error"] = str(error)
    return [
        "",
        encodable_on_terminal(f"{manifest.get('status')}: {output}"),
        *name_value_table(lines),
        *_report_and_commands(report, commands_after_run(manifest, output)),
    ]


def _memory(manifest: Json) -> str:
    """Peak memory, compared with the plan if there is one."""
    plan, steps = manifest.get("plan"), manifest.get("peak_memory_bytes")
    if not plan:
        return f"{format_bytes(steps)} at the peak"
    peak = max(value for value in plan["measured"].values() if value)
    # relative to what the plan can predict: the footprint of the libraries is measured, not planned
    relative_error = (plan["peak_bytes"] - peak) / max(1, peak - plan["footprint_bytes"])
    planned = format_bytes(plan["peak_bytes"])
    return f"{format_bytes(peak)} at the peak; planned {planned} ({relative_error:+.0%} of what is not the libraries')"


def dry_run_lines(result: dict[str, Any]) -> list[str]:
    """Data and settings of a dry run."""
    splits, train, preflight = result["splits"], result["train"], result["preflight"]
    parts = ", ".join(f"{splits[part]['rows']:,} {part}" for part in ("train", "validation", "test"))
    read_count = sum(s.get("kept", 0) for s in splits.get("sets", ()))
    rejected_count = sum(s.get("rejected", 0) for s in splits.get("sets", ()))
    share = train["supervised_tokens"] / train["tokens"] if train["tokens"] else 0.0
    lines = {
        "rows": f"{read_count:,} read, {rejected_count:,} rejected; {parts}" if read_count else parts,
        "tokens": f"{train['tokens']:,} in training rows"
        + (f", {train['supervised_tokens']:,} supervised ({share:.0%})" if share else ": prompts alone")
        + f"; the longest row has {train['longest']:,}",
        "preflight": f"{preflight['failing']:,} of {preflight['rows']:,} rows fail",
        "trainable": f"{format_count(result['trainable_parameters'])} parameters ({result['trainable_parameters']:,})",
        "steps": f"{result['steps_per_epoch']:,} an epoch, {result['tokens_per_micro_batch']:,} tokens at once, "
        f"learning rate {result['learning_rate']:g}",
        "memory": f"{format_bytes(result['plan']['needed_bytes'])} at the peak, as far as it can be known beforehand",
    }
    return ["", *name_value_table(lines), "", "Nothing was written. Without --dry-run this trains."]


def score_lines(result: dict[str, Any]) -> list[str]:
    """Scores with intervals and the cost of a query; for a reward model its health."""
    if "reward" in result:
        return ["", encodable_on_terminal(f"{result['target']}: {result['summary']}")]
    lines = {}
    for name, estimate in result["scores"].items():
        digits = decimals([estimate])
        lines[name] = f"{format_fixed(estimate['mean'], digits)} {format_bounds(estimate, digits)}"
    cost = f"{result['prompt_tokens']:,.0f} prompt tokens, {format_significant(result['seconds_per_query'])} s"
    size = f"{result['examples']:,} held-out questions in {result['clusters']:,} clusters, 95 % intervals"
    if retrieval := result.get("retrieval"):
        lines["retrieved"] = f"the right passage for {retrieved_text(retrieval)}"
    if "contamination" in result:
        lines |= contamination_text(result["contamination"])
    output = ["", encodable_on_terminal(f"{result['target']}: {size}"), *name_value_table({**lines, "a query": cost})]
    if cut_off := result.get("cut_off"):
        output += [
            "",
            f"{cut_off:,} answers were cut at evaluation.max_new_tokens: raise it, or they count as they stand.",
        ]
    return output


def _fitting_layout(rows: Sequence[LadderRow], metrics: Sequence[str], console: Console) -> Table:
    """The most detailed layout that fits the width of the terminal."""
    layouts = [
        _wide(rows, metrics, gap=1),
        _wide(rows, metrics, gap=0),
        _stacked(rows, metrics, with_second="interval"),
        _stacked(rows, metrics, with_second="mean"),
        _stacked(rows, metrics),
        _stacked(rows, metrics, with_cost=False),
    ]
    # measured without a limit: rich would shrink a table to the console before it is compared
    unbounded = console.options.update(max_width=10_000)
    return next((t for t in layouts if Measurement.get(console, unbounded, t).maximum <= console.width), layouts[-1])


def _wide(rows: Sequence[LadderRow], metrics: Sequence[str], *, gap: int) -> Table:
    """One line per rung; two metrics with their intervals, further metrics are in the report."""
    heads = ["rung", *(f"{metric}\n[95 %]" for metric in metrics[:2]), "gain on the\nrung below", "train-\nable"]
    ladder = empty_table([*heads, "training\ntime", "peak\nmemory", "prompt\ntokens", "per\nquery"], gap)
    for row in rows:
        scores = [Text(str(cell)) for cell in row.scores[:2]]
        cost = [row.trainable, row.train, row.memory, row.tokens, row.seconds]
        ladder.add_row(_label(row), *scores, _gain(row, " "), *map(Text, cost))
    return ladder


def _stacked(rows: Sequence[LadderRow], metrics: Sequence[str], with_second: str = "", with_cost: bool = True) -> Table:
    """Two lines per rung: the interval below the mean, the time below the size."""
    second = metrics[1:2] if with_second else ()
    heads = ["rung", f"{metrics[0]}\n[95 %]", *(m + "\n[95 %]" * (with_second == "interval") for m in second)]
    ladder = empty_table(
        [*heads, "gain on the\nrung below", *(["trainable,\ntime", "peak\nmemory", "per\nquery"] * with_cost)], 0
    )
    for row in rows:
        cells = [Text(f"{row.scores[0].mean}\n{row.scores[0].bounds}")]
        for cell in row.scores[1 : 1 + len(second)]:
            cells.append(Text(f"{cell.mean}\n{cell.bounds}" if with_second == "interval" else cell.mean))
        cells.append(_gain(row, "\n"))
        if with_cost:
            cells += map(Text, (f"{row.trainable}\n{row.train}", row.memory, f"{row.tokens} tok\n{row.seconds}"))
        ladder.add_row(_label(row, "\n"), *cells)
    return ladder


def _gain(row: LadderRow, separator: str) -> Text:
    return Text(separator.join(filter(None, (row.gain.mean, row.gain.bounds))), style=_TONE.get(row.gain.tone, ""))


def _label(row: LadderRow, line_break: str = "") -> Text:
    """The name, marked if the verdict points at it; plain text even if it contains rich markup."""
    mark = "> " if row.note in ("recommended", "safe") else "  "
    note = f"{line_break}  {row.note}" if line_break and row.note else ""
    return Text(f"{mark}{row.rung}{note}", style=_TONE.get(row.note, ""))


def _report_and_commands(report: str, commands: Sequence[str]) -> list[str]:
    """Path of the report and next commands; commands are never wrapped, so that they can be copied."""
    lines = [f"report  {report}", *(f"{'' if i else 'next':<6}  {command}" for i, command in enumerate(commands))]
    return ["", *map(encodable_on_terminal, lines)]


NOTABLE_LENGTH_EFFECT = 0.1
"""Difference between the raw and the length-controlled win rate from which the output mentions length."""


def comparison_lines(result: Json) -> list[str]:
    """Comparison of two systems: each metric, then the judge's preferences."""
    size = f"{result['examples']:,} held-out questions in {result['clusters']:,} clusters, 95 % intervals, paired"
    lines = ["", encodable_on_terminal(f"{result['target']} against {result['baseline']}: {size}")]
    lines += name_value_table({name: metric_text(name, metric) for name, metric in result["metrics"].items()})
    if judge := result.get("judge"):
        lines += [
            "",
            encodable_on_terminal(f"preferred by the judge {judge['model']}"),
            *name_value_table(_judge(judge)),
        ]
    return lines


def forgetting_lines(result: Json) -> list[str]:
    """Comparison of a run with its base on unrelated data."""
    size = f"{result['examples']:,} rows in {result['clusters']:,} clusters, 95 % intervals, run minus base"
    lines = ["", encodable_on_terminal(f"{result['target']} on {result['forgetting']}: {size}")]
    lines += name_value_table({name: metric_text(name, metric) for name, metric in result["metrics"].items()})
    if result["dropped"]:
        lines.append(f"  {result['dropped']:,} texts were longer than the model's context and left out")
    return lines


def metric_text(name: str, comparison: Json) -> str:
    """Both scores and their difference; if it is not significant, the smallest difference that would be."""
    before, after, difference = comparison["before"], comparison["after"], comparison["difference"]
    digits = decimals([before, after])
    after_text, before_text = (
        f"{format_fixed(score['mean'], digits)} {format_bounds(score, digits)}" for score in (after, before)
    )
    p_text = format_p_value(difference["p_value"])
    change = change_text(name, comparison) + (f", {p_text}" if p_text else "")
    # a large p-value does not show equality: name what these items could have detected
    if difference["p_value"] is not None and difference["p_value"] > 0.05:
        detectable = comparison["detectable"]
        change += "; no sure difference" + (f", one of {detectable:.2g} would show" if detectable is not None else "")
    return f"{after_text} against {before_text}\n{change}"


def change_text(name: str, comparison: Json) -> str:
    """After minus before with its interval; for perplexity in nats."""
    difference = comparison["difference"]
    digits = decimals([difference])
    unit = " nats a token" if name == "perplexity" else ""
    return f"{format_fixed(difference['mean'], digits, signed=True)} {format_bounds(difference, digits)}{unit}"


def _judge(judge: Json) -> dict[str, str]:
    lines = {}
    if judge["win_rate"] is not None:
        counts = f"{judge['wins']:,} won, {judge['ties']:,} tied, {judge['losses']:,} lost"
        lines["win rate"] = f"{_rate(judge['win_rate'])}; {counts}"
        controlled, raw = judge["length_controlled"], judge["win_rate"]
        length_matters = abs(controlled["mean"] - raw["mean"]) > NOTABLE_LENGTH_EFFECT
        lines["of one length"] = _rate(controlled) + ("; length makes much of the difference" if length_matters else "")
        lines["both orders"] = f"agree in {_rate(judge['consistent'])} of the pairs"
        if judge["shown_first"] is not None:
            lines["shown first"] = f"preferred in {_rate(judge['shown_first'])} of the verdicts"
        if judge["longer"] is not None:
            lines["longer"] = f"preferred in {_rate(judge['longer'])} of the decided pairs"
    first, second = judge["characters"]
    lines["characters"] = f"{first:,.0f} against {second:,.0f} in an answer"
    lines["unreadable"] = f"{judge['unreadable']:,} of {judge['pairs']:,} pairs"
    trust = judge["trust"]
    lines["trusted" if trust["trusted"] else "NOT TRUSTED"] = trust["reason"]
    return lines


def _rate(share: Json) -> str:
    # at least two decimals, or 0.5 looks like a round guess
    digits = max(2, decimals([share])) if math.isfinite(share["mean"]) else 2
    return f"{format_fixed(share['mean'], digits)} {format_bounds(share, digits)}"
