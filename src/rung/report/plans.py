"""Lines of a plan for the terminal; nothing here imports torch."""

from __future__ import annotations

import shlex
from typing import Any

from rich.text import Text

from rung.planning.advise import Advice, RunPlan
from rung.planning.memory import Term
from rung.report.formatting import (
    empty_table,
    format_bytes,
    format_count,
    format_duration,
    name_value_table,
    render_lines,
)

AFTER = {
    "evaluation": "rung eval: so many questions at once as evaluation.batch says, keys and values of all",
    "merging": "rung merge: the whole model in float32; with --by-shard no more than a matrix",
}
_TONE = {True: "green", False: "red"}


def plan_lines(advice: Advice, where: str) -> list[str]:
    """The config's own run term by term, every method beside it, and what would make it fit."""
    shape, work, own = advice.shape, advice.micro_batch, advice.plan
    facts = {
        "model": f"{format_count(shape.parameters)} parameters: {shape.layers} layers of width {shape.width:,}, "
        f"{shape.stored_dtype} on disk, computed in {work.compute_dtype}",
        "at once": f"{work.tokens:,} tokens",
        "data": _data(advice),
        "rate": _rate(advice),
        "run": _run(own),
    }
    lines = ["", where, *name_value_table(facts), "", *render_lines(lambda _: [_stages(own)]), ""]
    lines += render_lines(lambda _: [_methods(advice)])
    return [*lines, "", *_verdict(advice)]


def _data(advice: Advice) -> str:
    if advice.data_volume is None:
        return "unknown: the data are not here; --tokens says how much there is"
    guessed = (
        "as given"
        if advice.data_volume.is_counted
        else "guessed from the size of the data's files: --tokens says better"
    )
    return f"{format_count(advice.data_volume.tokens)} tokens an epoch, {guessed}"


def _rate(advice: Advice) -> str:
    if advice.throughput is None:
        return "unknown: no run has finished here yet, and no --device was named"
    return f"{advice.throughput.flops / 1e9:,.0f} GFLOP/s, {advice.throughput.source}"


def _run(own: RunPlan) -> str:
    if own.flops is None:
        return "unknown"
    time = f", {format_duration(own.seconds)}" if own.seconds is not None else ""
    return f"{own.flops / 1e12:,.0f} TFLOP{time}"


def _stages(own: RunPlan) -> Any:
    """One line a term, the largest stage whole, the others in one line each; then what other commands hold."""
    found = own.memory
    shown = empty_table(["memory", "", "from"], gap=2, left=(0, 2))
    for stage in found.stages:
        largest = stage is found.largest_stage
        mark = "> " if largest else "  "
        shown.add_row(
            Text(f"{mark}{stage.name}", style="bold" if largest else ""), Text(format_bytes(stage.bytes)), Text()
        )
        for term in stage.terms if largest else ():
            shown.add_row(Text(f"    {term.name}"), Text(format_bytes(term.bytes)), _why(term))
    shown.add_row(
        Text("  libraries"), Text(format_bytes(found.footprint)), Text("Python, torch, transformers, a tokenizer")
    )
    shown.add_row(
        Text("  peak", style="bold"),
        Text(format_bytes(found.peak), style="bold"),
        Text(f"in {found.largest_stage.name}"),
    )
    for stage in own.follow_up:
        shown.add_row(
            Text(f"  {stage.name}"),
            Text(format_bytes(stage.bytes + found.footprint)),
            Text(AFTER[stage.name], style="dim"),
        )
    return shown


def _why(term: Term) -> Text:
    return Text(term.source, style="dim")


def _methods(advice: Advice) -> Any:
    """All methods side by side."""
    heads = ["method", "trainable", "weights", "optimizer", "activations", "needed", "time"]
    limit = advice.plan.limit
    shown = empty_table([*heads, *(["fits"] if limit is not None else [])])
    for plan in advice.alternatives:
        terms = {term.name: term.bytes for stage in plan.memory.stages for term in stage.terms if stage.name == "steps"}
        base = terms.get("weights", 0) + terms.get("quantized", 0)
        states = terms.get("moments", 0) + terms.get("gradients", 0)
        cells = [
            format_count(plan.trainable),
            format_bytes(base),
            format_bytes(states),
            format_bytes(terms.get("activations", 0)),
        ]
        cells += [format_bytes(plan.memory.required_bytes), format_duration(plan.seconds)]
        chosen = plan.method == advice.plan.method
        row = [Text(("> " if chosen else "  ") + plan.method), *map(Text, cells)]
        if plan.fits is not None:
            row.append(Text("yes" if plan.fits else "no", style=_TONE[plan.fits]))
        shown.add_row(*row)
    return shown


def _verdict(advice: Advice) -> list[str]:
    own = advice.plan
    if own.limit is None:
        return ["--memory 24GiB or --device h100 says what fits."]
    if own.fits:
        return [f"It fits: {format_bytes(own.memory.required_bytes)} of {format_bytes(own.limit)}."]
    told = [f"It does not fit: it needs {format_bytes(own.memory.required_bytes)}, of {format_bytes(own.limit)}."]
    if advice.change is None:
        return [*told, "No single change makes it fit: take a smaller model, or share it out (docs/scale.md)."]
    fitting = format_bytes(advice.change.plan.memory.required_bytes)
    return [
        *told,
        f"The cheapest change that does, {fitting}, at the cost of {advice.change.cost}:",
        f"  {shlex.join(advice.change.overrides)}",
    ]
