"""Terminal output of `rung plan`: memory term by term, all methods side by side, and the cheapest change that fits.

Every byte is shown with its formula's origin, so that an estimate can be checked. Nothing here imports torch: a plan
must work on a laptop in a second. The command line calls `plan_lines`.
"""

from __future__ import annotations

import shlex
from typing import Any

from rich.text import Text

from rung.console import add_text_row, plain
from rung.planning.advise import Advice, RunPlan
from rung.report.formatting import (
    empty_table,
    format_bytes,
    format_count,
    format_duration,
    name_value_table,
    render_lines,
)

FOLLOW_UP_NOTES = {
    "evaluation": "rung eval: keys and values of evaluation.batch questions at once",
    "merging": "rung merge: the whole model in float32; with --by-shard no more than a matrix",
}
_TONE = {True: "green", False: "red"}


def plan_lines(advice: Advice, where: str) -> list[str]:
    """The configured run term by term, all methods in comparison, and what would make it fit."""
    shape, work, run_plan = advice.shape, advice.micro_batch, advice.plan
    facts = {
        "model": f"{format_count(shape.parameters)} parameters: {shape.layers} layers of width {shape.width:,}, "
        f"{shape.stored_dtype} on disk, computed in {work.compute_dtype}",
        "device": _device(advice),
        "at once": f"{work.tokens:,} tokens",
        "data": _data(advice),
        "rate": _rate(advice),
        "run": _run(run_plan),
    }
    lines = ["", where, *name_value_table(facts), "", *render_lines(lambda _: [_stages(run_plan)]), ""]
    lines += render_lines(lambda _: [_methods(advice)])
    return [*lines, "", *_verdict(advice)]


def _device(advice: Advice) -> str:
    processes = advice.micro_batch.processes
    count = f"{processes} x " if processes > 1 else ""
    if advice.device is None:
        return f"{count}the processor of this machine"
    return f"{count}{advice.device.name}, {advice.device.memory / 2**30:.1f} GiB{' each' if processes > 1 else ''}"


def _data(advice: Advice) -> str:
    if advice.data_volume is None:
        return "unknown: the data are not here; --tokens says how much there is"
    guess = "guessed from the size of the data's files: --tokens says better"
    origin = "as given" if advice.data_volume.is_counted else guess
    return f"{format_count(advice.data_volume.tokens)} tokens an epoch, {origin}"


def _rate(advice: Advice) -> str:
    # no default throughput: machines differ by factors of a thousand
    if advice.throughput is None:
        return "unknown: no run has finished here yet, and no --device was named"
    return f"{advice.throughput.flops / 1e9:,.0f} GFLOP/s, {advice.throughput.source}"


def _run(run_plan: RunPlan) -> str:
    if run_plan.flops is None:
        return "unknown"
    time = f", {format_duration(run_plan.seconds)}" if run_plan.seconds is not None else ""
    return f"{run_plan.flops / 1e12:,.0f} TFLOP{time}"


def _stages(run_plan: RunPlan) -> Any:
    """The largest stage term by term, other stages in one line each, then the memory of follow-up commands."""
    memory = run_plan.memory
    table = empty_table(["memory", "", "from"], gap=2, text_columns=(0, 2))

    def add(name: Text, size: float, note: Text, size_style: str = "") -> None:
        add_text_row(table, name, plain(format_bytes(size), size_style), note)

    for stage in memory.stages:
        largest = stage is memory.largest_stage
        add(plain(f"{'> ' if largest else '  '}{stage.name}", "bold" if largest else ""), stage.bytes, plain(""))
        # only the peak decides whether a run fits
        for term in stage.terms if largest else ():
            add(plain(f"    {term.name}"), term.bytes, plain(term.source, "dim"))
    add(plain("  libraries"), memory.footprint, plain(memory.footprint_source))
    add(plain("  peak", "bold"), memory.peak, plain(f"in {memory.largest_stage.name}"), "bold")
    for stage in run_plan.follow_up:
        # another process: it loads the libraries again
        add(plain(f"  {stage.name}"), stage.bytes + memory.footprint, plain(FOLLOW_UP_NOTES[stage.name], "dim"))
    return table


def _methods(advice: Advice) -> Any:
    """A table of all methods."""
    heads = ["method", "trainable", "weights", "optimizer", "activations", "needed", "time"]
    limit = advice.plan.limit
    table = empty_table([*heads, *(["fits"] if limit is not None else [])])
    for plan in advice.alternatives:
        terms = {term.name: term.bytes for stage in plan.memory.stages for term in stage.terms if stage.name == "steps"}
        # quantized methods keep most of the base as `quantized` and the rest as `weights`
        base = terms.get("weights", 0) + terms.get("quantized", 0)
        states = terms.get("moments", 0) + terms.get("gradients", 0)
        sizes = (base, states, terms.get("activations", 0), plan.memory.required_bytes)
        cells = [format_count(plan.trainable), *map(format_bytes, sizes), format_duration(plan.seconds)]
        is_configured = plan.method == advice.plan.method
        row = [plain(("> " if is_configured else "  ") + plan.method), *map(plain, cells)]
        if plan.fits is not None:
            row.append(plain("yes" if plan.fits else "no", style=_TONE[plan.fits]))
        add_text_row(table, *row)
    return table


def _too_large_evaluation(run_plan: RunPlan, limit: int) -> list[str]:
    evaluation = next(stage for stage in run_plan.follow_up if stage.name == "evaluation")
    needed = evaluation.bytes + run_plan.memory.footprint
    if needed <= limit:
        return []
    return [f"rung eval does not: it needs {format_bytes(needed)}, and less with a smaller evaluation.batch."]


def _verdict(advice: Advice) -> list[str]:
    run_plan = advice.plan
    if run_plan.limit is None:
        return ["--memory 24GiB or --device h100 says what fits."]
    if run_plan.fits:
        fits = f"It fits: {format_bytes(run_plan.memory.required_bytes)} of {format_bytes(run_plan.limit)}."
        return [fits, *_too_large_evaluation(run_plan, run_plan.limit)]
    needed = format_bytes(run_plan.memory.required_bytes)
    lines = [f"It does not fit: it needs {needed}, of {format_bytes(run_plan.limit)}."]
    if advice.change is None:
        return [*lines, "No single change makes it fit: take a smaller model, or share it out (docs/scale.md)."]
    fitting = format_bytes(advice.change.plan.memory.required_bytes)
    change = f"The cheapest change that does, {fitting}, at the cost of {advice.change.cost}:"
    return [*lines, change, f"  {shlex.join(advice.change.overrides)}"]
