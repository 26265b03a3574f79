"""Lines for the terminal. The ladder fits 120 columns, and 80 by putting intervals below their means."""

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
    """The ladder, the verdict in words, the report and what to try next."""
    metrics = list(ladder["ladder"][0]["scores"])
    rows = ladder_rows([(row["rung"], row) for row in ladder["ladder"]], metrics, ladder["verdict"])
    verdict = ladder["verdict"]
    told = Text(verdict["text"], style=_TONE["recommended" if verdict.get("recommended") else "safe"])
    size = f"{ladder['examples']} held-out questions in {ladder['clusters']} clusters; intervals are 95 %, gains paired"
    looked = [Text(line, style="dim") for line in _retrieval_lines(ladder["ladder"])]
    noted = [one["text"] for name in ("notes", "forgotten") for one in ladder.get(name, ())]
    said = [Text(text) for text in (*_next_rung_lines(ladder), *noted)]
    left = [Text(f"not measured: {one['rung']}, {one['why']}", style="dim") for one in ladder.get("left", ())]
    facts = [Text(size, style="dim"), *looked, *left]
    drawn = render_lines(lambda room: [_fitting_layout(rows, metrics, room), *facts, Text(), told, *said])
    return ["", *drawn, *_report_and_commands(str(ladder["report"]), commands_after_climb(ladder))]


def _next_rung_lines(ladder: Json) -> list[str]:
    return [ladder["further"]["text"]] if ladder.get("further") else []


def _retrieval_lines(rows: Sequence[Json]) -> list[str]:
    """How well passages were retrieved; rungs that found the same share a line."""
    rungs: dict[str, list[str]] = {}
    for row in rows:
        if row.get("retrieval"):
            rungs.setdefault(retrieved_text(row["retrieval"]), []).append(row["rung"])
    return [
        f"{', '.join(names)}: the right passage is among those retrieved for {text}" for text, names in rungs.items()
    ]


def run_lines(manifest: dict[str, Any], output: str, report: str) -> list[str]:
    """How a run ended, what it measured, where its weights are and what to try next."""
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
        learned = data.get("train", {}).get("supervised_tokens", 0)
        lines["data"] = f"{rows:,} rows, {learned:,} supervised tokens" if learned else f"{rows:,} prompts"
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
    """The peak, beside what was planned where the run planned."""
    plan, steps = manifest.get("plan"), manifest.get("peak_memory_bytes")
    if not plan:
        return f"{format_bytes(steps)} at the peak"
    peak = max(value for value in plan["measured"].values() if value)
    off = (plan["peak_bytes"] - peak) / max(1, peak - plan["footprint_bytes"])
    planned = format_bytes(plan["peak_bytes"])
    return f"{format_bytes(peak)} at the peak; planned {planned} ({off:+.0%} of what is not the libraries')"


def dry_run_lines(found: dict[str, Any]) -> list[str]:
    """What a run would train on, and how."""
    splits, train, preflight = found["splits"], found["train"], found["preflight"]
    parts = ", ".join(f"{splits[part]['rows']:,} {part}" for part in ("train", "validation", "test"))
    read = sum(s.get("kept", 0) for s in splits.get("sets", ()))
    rejected = sum(s.get("rejected", 0) for s in splits.get("sets", ()))
    share = train["supervised_tokens"] / train["tokens"] if train["tokens"] else 0.0
    lines = {
        "rows": f"{read:,} read, {rejected:,} rejected; {parts}" if read else parts,
        "tokens": f"{train['tokens']:,} in training rows"
        + (f", {train['supervised_tokens']:,} supervised ({share:.0%})" if share else ": prompts alone")
        + f"; the longest row has {train['longest']:,}",
        "preflight": f"{preflight['failing']:,} of {preflight['rows']:,} rows fail",
        "trainable": f"{format_count(found['trainable_parameters'])} parameters ({found['trainable_parameters']:,})",
        "steps": f"{found['steps_per_epoch']:,} an epoch, {found['tokens_per_micro_batch']:,} tokens at once, "
        f"learning rate {found['learning_rate']:g}",
        "memory": f"{format_bytes(found['plan']['needed_bytes'])} at the peak, as far as it can be known beforehand",
    }
    return ["", *name_value_table(lines), "", "Nothing was written. Without --dry-run this trains."]


def score_lines(result: dict[str, Any]) -> list[str]:
    """Scores with their intervals, and what a query costs; of a reward model what it is worth."""
    if "reward" in result:
        return ["", encodable_on_terminal(f"{result['target']}: {result['summary']}")]
    lines = {}
    for name, estimate in result["scores"].items():
        digits = decimals([estimate])
        lines[name] = f"{format_fixed(estimate['mean'], digits)} {format_bounds(estimate, digits)}"
    cost = f"{result['prompt_tokens']:,.0f} prompt tokens, {format_significant(result['seconds_per_query'])} s"
    size = f"{result['examples']:,} held-out questions in {result['clusters']:,} clusters, 95 % intervals"
    if found := result.get("retrieval"):
        lines["retrieved"] = f"the right passage for {retrieved_text(found)}"
    if "contamination" in result:
        lines |= contamination_text(result["contamination"])
    told = ["", encodable_on_terminal(f"{result['target']}: {size}"), *name_value_table({**lines, "a query": cost})]
    if cut := result.get("cut_off"):
        told += ["", f"{cut:,} answers were cut at evaluation.max_new_tokens: raise it, or they count as they stand."]
    return told


def _fitting_layout(rows: Sequence[LadderRow], metrics: Sequence[str], console: Console) -> Table:
    """The most telling layout that the terminal is wide enough for."""
    layouts = [
        _wide(rows, metrics, gap=1),
        _wide(rows, metrics, gap=0),
        _stacked(rows, metrics, with_second="interval"),
        _stacked(rows, metrics, with_second="mean"),
        _stacked(rows, metrics),
        _stacked(rows, metrics, with_cost=False),
    ]
    unbounded = console.options.update(max_width=10_000)
    return next((t for t in layouts if Measurement.get(console, unbounded, t).maximum <= console.width), layouts[-1])


def _wide(rows: Sequence[LadderRow], metrics: Sequence[str], *, gap: int) -> Table:
    """One line a rung; two metrics with their intervals, further ones stand in the report."""
    heads = ["rung", *(f"{metric}\n[95 %]" for metric in metrics[:2]), "gain on the\nrung below", "train-\nable"]
    ladder = empty_table([*heads, "training\ntime", "peak\nmemory", "prompt\ntokens", "per\nquery"], gap)
    for row in rows:
        scores = [Text(str(cell)) for cell in row.scores[:2]]
        cost = [row.trainable, row.train, row.memory, row.tokens, row.seconds]
        ladder.add_row(_label(row), *scores, _gain(row, " "), *map(Text, cost))
    return ladder


def _stacked(rows: Sequence[LadderRow], metrics: Sequence[str], with_second: str = "", with_cost: bool = True) -> Table:
    """Two lines a rung: the interval below the mean, the time below the size."""
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


def _gain(row: LadderRow, between: str) -> Text:
    return Text(between.join(filter(None, (row.gain.mean, row.gain.bounds))), style=_TONE.get(row.gain.tone, ""))


def _label(row: LadderRow, below: str = "") -> Text:
    """The name, marked where the verdict points at it; plain text, whatever stands in it."""
    mark = "> " if row.note in ("recommended", "safe") else "  "
    note = f"{below}  {row.note}" if below and row.note else ""
    return Text(f"{mark}{row.rung}{note}", style=_TONE.get(row.note, ""))


def _report_and_commands(report: str, commands: Sequence[str]) -> list[str]:
    """Where to read more and what to type next; commands are never wrapped, so that they can be copied."""
    lines = [f"report  {report}", *(f"{'' if i else 'next':<6}  {command}" for i, command in enumerate(commands))]
    return ["", *map(encodable_on_terminal, lines)]


NOTABLE_LENGTH_EFFECT = 0.1
"""Points between the raw and the length-controlled win rate that are worth a word."""


def comparison_lines(result: Json) -> list[str]:
    """One system against another: each metric, then what the judge prefers."""
    size = f"{result['examples']:,} held-out questions in {result['clusters']:,} clusters, 95 % intervals, paired"
    told = ["", encodable_on_terminal(f"{result['target']} against {result['baseline']}: {size}")]
    told += name_value_table({name: metric_text(name, found) for name, found in result["metrics"].items()})
    if judge := result.get("judge"):
        told += [
            "",
            encodable_on_terminal(f"preferred by the judge {judge['model']}"),
            *name_value_table(_judge(judge)),
        ]
    return told


def forgetting_lines(result: Json) -> list[str]:
    """A run against its base on data that it did not learn from."""
    size = f"{result['examples']:,} rows in {result['clusters']:,} clusters, 95 % intervals, run minus base"
    told = ["", encodable_on_terminal(f"{result['target']} on {result['forgetting']}: {size}")]
    told += name_value_table({name: metric_text(name, found) for name, found in result["metrics"].items()})
    if result["dropped"]:
        told.append(f"  {result['dropped']:,} texts were longer than the model's context and left out")
    return told


def metric_text(name: str, found: Json) -> str:
    """Both scores, their difference, and how large one would have shown where none does."""
    before, after, gain = found["before"], found["after"], found["difference"]
    digits = decimals([before, after])
    one, other = (f"{format_fixed(score['mean'], digits)} {format_bounds(score, digits)}" for score in (after, before))
    told = format_p_value(gain["p_value"])
    change = change_text(name, found) + (f", {told}" if told else "")
    if gain["p_value"] is not None and gain["p_value"] > 0.05:
        least = found["detectable"]
        change += "; no sure difference" + (f", one of {least:.2g} would show" if least is not None else "")
    return f"{one} against {other}\n{change}"


def change_text(name: str, found: Json) -> str:
    """After minus before, with its interval; of perplexity in nats."""
    gain = found["difference"]
    exact = decimals([gain])
    unit = " nats a token" if name == "perplexity" else ""
    return f"{format_fixed(gain['mean'], exact, signed=True)} {format_bounds(gain, exact)}{unit}"


def _judge(judge: Json) -> dict[str, str]:
    lines = {}
    if judge["win_rate"] is not None:
        told = f"{judge['wins']:,} won, {judge['ties']:,} tied, {judge['losses']:,} lost"
        lines["win rate"] = f"{_rate(judge['win_rate'])}; {told}"
        controlled, raw = judge["length_controlled"], judge["win_rate"]
        far = abs(controlled["mean"] - raw["mean"]) > NOTABLE_LENGTH_EFFECT
        lines["of one length"] = _rate(controlled) + ("; length makes much of the difference" if far else "")
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
    digits = max(2, decimals([share])) if math.isfinite(share["mean"]) else 2
    return f"{format_fixed(share['mean'], digits)} {format_bounds(share, digits)}"
