"""Lines for the terminal. The ladder fits 120 columns, and 80 by putting intervals below their means."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rung.report.facts import (
    LadderRow,
    after_climb,
    after_run,
    artefact,
    gates_text,
    ladder_rows,
    method_text,
    retrieved_text,
    unit_of,
)
from rung.report.human import bounds, count, decimals, duration, fixed, loss, memory, significant

Json = Mapping[str, Any]
PIPE_WIDTH = 120
"""Width where no terminal is attached: one line a rung, for logs and for grep."""
_TONE = {"good": "green", "bad": "red", "recommended": "bold green", "safe": "bold yellow", "best": "bold"}


def ladder_lines(ladder: dict[str, Any]) -> list[str]:
    """The ladder, the verdict in words, the report and what to try next."""
    metrics = list(ladder["ladder"][0]["scores"])
    rows = ladder_rows([(row["rung"], row) for row in ladder["ladder"]], metrics, ladder["verdict"])
    verdict = ladder["verdict"]
    told = Text(verdict["text"], style=_TONE["recommended" if verdict.get("recommended") else "safe"])
    size = f"{ladder['examples']} held-out questions in {ladder['clusters']} clusters; intervals are 95 %, gains paired"
    looked = [Text(line, style="dim") for line in _looked_up(ladder["ladder"])]
    drawn = _render(lambda room: [_fitting(rows, metrics, room), Text(size, style="dim"), *looked, Text(), told])
    return ["", *drawn, *_outlook(str(ladder["report"]), after_climb(ladder))]


def _looked_up(rows: Sequence[Json]) -> list[str]:
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
    data, spec = manifest.get("data", {}), manifest.get("spec", {})
    validation = f", validation {loss(manifest['validation_loss'])}" if manifest.get("validation_loss") else ""
    unit = unit_of(spec)
    lines = {"gates": gates_text(manifest.get("gates", ()))}
    if manifest.get("steps"):
        speed = f"{manifest['tokens_per_second']:,.0f} tokens/s, " if manifest.get("tokens_per_second") else ""
        lines |= {
            "trained": f"{count(manifest.get('trainable_parameters'))} parameters, "
            + method_text(spec.get("method", {}))
            + (f"; {manifest['moves']}" if manifest.get("moves") else ""),
            "loss": f"{loss(manifest.get('train_loss'))} in the last step{validation} {unit}",
            "speed": f"{speed}{manifest['steps']:,} steps, {manifest.get('tokens', 0):,} tokens in "
            f"{duration(manifest.get('train_seconds'))}",
            "memory": f"{memory(manifest.get('peak_memory_bytes'))} at the peak",
        }
    if rows := data.get("splits", {}).get("train", {}).get("rows"):
        learned = data.get("train", {}).get("supervised_tokens", 0)
        lines["data"] = f"{rows:,} rows, {learned:,} supervised tokens" if learned else f"{rows:,} prompts"
    if manifest.get("status") == "finished":
        lines[artefact(manifest, "").strip("/")] = artefact(manifest, output)
    if error := manifest.get("error"):
        lines["error"] = str(error)
    return [
        "",
        _sayable(f"{manifest.get('status')}: {output}"),
        *_pairs(lines),
        *_outlook(report, after_run(manifest, output)),
    ]


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
        "trainable": f"{count(found['trainable_parameters'])} parameters ({found['trainable_parameters']:,})",
        "steps": f"{found['steps_per_epoch']:,} an epoch, {found['tokens_per_micro_batch']:,} tokens at once, "
        f"learning rate {found['learning_rate']:g}",
    }
    return ["", *_pairs(lines), "", "Nothing was written. Without --dry-run this trains."]


def score_lines(result: dict[str, Any]) -> list[str]:
    """Scores with their intervals, and what a query costs; of a reward model what it is worth."""
    if "reward" in result:
        return ["", _sayable(f"{result['target']}: {result['said']}")]
    lines = {}
    for name, estimate in result["scores"].items():
        digits = decimals([estimate])
        lines[name] = f"{fixed(estimate['mean'], digits)} {bounds(estimate, digits)}"
    cost = f"{result['prompt_tokens']:,.0f} prompt tokens, {significant(result['seconds_per_query'])} s"
    size = f"{result['examples']:,} held-out questions in {result['clusters']:,} clusters, 95 % intervals"
    if found := result.get("retrieval"):
        lines["retrieved"] = f"the right passage for {retrieved_text(found)}"
    told = ["", _sayable(f"{result['target']}: {size}"), *_pairs({**lines, "a query": cost})]
    if cut := result.get("cut_off"):
        told += ["", f"{cut:,} answers were cut at evaluate.max_new_tokens: raise it, or they count as they stand."]
    return told


def _fitting(rows: Sequence[LadderRow], metrics: Sequence[str], console: Console) -> Table:
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
    table = _table([*heads, "training\ntime", "peak\nmemory", "prompt\ntokens", "per\nquery"], gap)
    for row in rows:
        scores = [Text(str(cell)) for cell in row.scores[:2]]
        cost = [row.trainable, row.train, row.memory, row.tokens, row.seconds]
        table.add_row(_label(row), *scores, _gain(row, " "), *map(Text, cost))
    return table


def _stacked(rows: Sequence[LadderRow], metrics: Sequence[str], with_second: str = "", with_cost: bool = True) -> Table:
    """Two lines a rung: the interval below the mean, the time below the size."""
    second = metrics[1:2] if with_second else ()
    heads = ["rung", f"{metrics[0]}\n[95 %]", *(m + "\n[95 %]" * (with_second == "interval") for m in second)]
    table = _table(
        [*heads, "gain on the\nrung below", *(["trainable,\ntime", "peak\nmemory", "per\nquery"] * with_cost)], 0
    )
    for row in rows:
        cells = [Text(f"{row.scores[0].mean}\n{row.scores[0].bounds}")]
        for cell in row.scores[1 : 1 + len(second)]:
            cells.append(Text(f"{cell.mean}\n{cell.bounds}" if with_second == "interval" else cell.mean))
        cells.append(_gain(row, "\n"))
        if with_cost:
            cells += map(Text, (f"{row.trainable}\n{row.train}", row.memory, f"{row.tokens} tok\n{row.seconds}"))
        table.add_row(_label(row, "\n"), *cells)
    return table


def _gain(row: LadderRow, between: str) -> Text:
    return Text(between.join(filter(None, (row.gain.mean, row.gain.bounds))), style=_TONE.get(row.gain.tone, ""))


def _label(row: LadderRow, below: str = "") -> Text:
    """The name, marked where the verdict points at it; plain text, whatever stands in it."""
    mark = "> " if row.note in ("recommended", "safe") else "  "
    note = f"{below}  {row.note}" if below and row.note else ""
    return Text(f"{mark}{row.rung}{note}", style=_TONE.get(row.note, ""))


def _table(heads: Sequence[str], gap: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    for number, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if number else "left", no_wrap=number > 0)
    return table


def _render(parts: Callable[[Console], Sequence[RenderableType]]) -> list[str]:
    """What a console as wide and as colourful as the terminal shows, as lines."""
    attached = any(os.isatty(stream) for stream in (0, 1, 2)) or "COLUMNS" in os.environ
    width = Console().width if attached else PIPE_WIDTH
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=sys.stdout.isatty(), highlight=False)
    console.print(*parts(console), sep="\n")
    return [_sayable(line.rstrip()) for line in out.getvalue().splitlines()]


def _pairs(lines: Mapping[str, str]) -> list[str]:
    """Names on the left, values lined up on the right."""
    width = max(map(len, lines))
    hanging = "\n" + " " * (width + 4)
    return [_sayable(f"  {name:<{width}}  {text}".replace("\n", hanging)) for name, text in lines.items()]


def _outlook(report: str, commands: Sequence[str]) -> list[str]:
    """Where to read more and what to type next; commands are never wrapped, so that they can be copied."""
    lines = [f"report  {report}", *(f"{'' if i else 'next':<6}  {command}" for i, command in enumerate(commands))]
    return ["", *map(_sayable, lines)]


def _sayable(line: str) -> str:
    """The line in letters this terminal has: a result must not be lost to its encoding."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "replace").decode(encoding)
