"""The parts of the page, each from a folder and each empty where the folder holds nothing for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from markupsafe import Markup

from rung.report import plots
from rung.report.formatting import format_bytes, format_count, format_duration, format_loss
from rung.report.run_reader import PERPLEXITY, LoggedRun, ReportSource
from rung.report.summaries import (
    LadderRow,
    TriedInstruction,
    commands_after_climb,
    commands_after_run,
    contamination_text,
    gain_unit,
    ladder_rows,
    logged_keys_shown,
    loss_unit,
    lottery_text,
    measured_text,
    method_text,
    preferred_text,
    retrieved_text,
    reward_text,
    router_text,
    tried_instructions,
)

Pairs = dict[str, str]


@dataclass(frozen=True, slots=True)
class StatusSection:
    """What stands on top."""

    tone: str
    """good, warn or bad."""
    kicker: str
    text: str
    details: tuple[str, ...] = ()
    """Errors as they were raised."""
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LadderTable:
    """A ladder ready for the page."""

    metrics: tuple[str, ...]
    gain_unit: str | None
    """None where no gains were computed yet."""
    rows: tuple[LadderRow, ...]
    note: str


def status(source: ReportSource) -> StatusSection:
    """The verdict; or how the run ended and what to do about it."""
    manifest = source.manifest
    if not source.is_climb:
        return _run_status(manifest)
    if source.ladder:
        verdict = source.ladder["verdict"]
        tone, kicker = ("good", "Verdict") if verdict.get("recommended") else ("warn", "Verdict: not settled")
        return StatusSection(tone, kicker, verdict["text"], commands=tuple(commands_after_climb(source.ladder)))
    done = sum(bool(rung.row) for rung in source.rungs)
    asked = len(source.config.get("climb", {}).get("rungs", ())) or len(source.rungs)
    text = f"{done} of {asked} rungs are measured; without all of them there is no verdict."
    errors = tuple(f"{run.label}: {run.manifest['error']}" for run in source.runs if run.manifest.get("error"))
    interrupted = manifest.get("status") == "interrupted"
    kicker = "This climb failed" if errors else "Interrupted" if interrupted else "This climb is not finished"
    command = "rung climb CONFIG  # the same config goes on where it stands, finished rungs are not repeated"
    return StatusSection("bad" if errors else "warn", kicker, text, errors, (command,))


def facts(source: ReportSource) -> Pairs:
    """A few key numbers."""
    manifest, config = source.manifest, source.config
    found = {"base": str(config.get("model", {}).get("name", ""))}
    if source.is_climb:
        climb, ladder = config.get("climb", {}), source.ladder
        found["deciding score"] = str(next(iter(config.get("evaluation", {}).get("metrics", ())), ""))
        if ladder:
            found["held-out questions"] = f"{ladder['examples']:,} in {ladder['clusters']:,} clusters"
        if "margin" in climb:
            found["margin"] = f"{climb['margin']:g}"
        if climb.get("target") is not None:
            found["target"] = f"{climb['target']:g}"
        found["training seeds"] = str(climb.get("seeds", ""))
        return found
    found["method"] = str(config.get("method", {}).get("kind", ""))
    measured = {
        "validation loss": format_loss(manifest.get("validation_loss")),
        "training time": format_duration(manifest.get("train_seconds")),
        "peak memory": format_bytes(manifest.get("peak_memory_bytes")),
        "trainable parameters": format_count(manifest.get("trainable_parameters")),
    }
    return found | {name: text for name, text in measured.items() if text != "–"}


def ladder(source: ReportSource) -> LadderTable | None:
    """Scores and costs: the rungs of a climb, or the single run once it has been scored."""
    measured = [rung for rung in source.rungs if rung.row.get("scores")]
    if not measured:
        return None
    verdict = source.ladder["verdict"] if source.ladder else None
    rows = [(rung.label, rung.row if source.is_climb else {**source.manifest, **rung.row}) for rung in measured]
    cut = [f"{r.label} {r.cut_off} of {len(r.items)}" for r in measured if r.cut_off and r.items]
    note = f"Answers cut at evaluation.max_new_tokens: {', '.join(cut)}." if cut else ""
    metrics = source.metrics
    unit = gain_unit(metrics) if source.ladder else None
    return LadderTable(metrics, unit, tuple(ladder_rows(rows, metrics, verdict)), note)


def verdict_plots(source: ReportSource) -> Markup | None:
    """The differences that the verdict rests on."""
    if not source.ladder or len(source.ladder["verdict"]["rungs"]) < 2:
        return None
    verdict, lower = source.ladder["verdict"], source.ladder["metric"] == PERPLEXITY
    margin = source.config.get("climb", {}).get("margin", 0.0)
    unit = "nats per token" if lower else f"points of {source.ladder['metric']}"
    limit = math.log1p(margin) if lower else margin
    return plots.differences(verdict["rungs"], verdict["best"], limit, unit, lower_is_better=lower)


def score_plots(source: ReportSource) -> list[Markup]:
    """Scores from 0 to 1 in one plot, perplexity in its own."""
    rows = [(rung.label, rung.row["scores"]) for rung in source.rungs if rung.row.get("scores")]
    target, deciding = source.config.get("climb", {}).get("target"), source.metrics[:1]
    if len(rows) < 2:
        return []
    groups = [[m for m in source.metrics if (m == PERPLEXITY) == apart] for apart in (False, True)]
    return [plots.scores(rows, group, target if group[:1] == list(deciding) else None) for group in groups if group]


def cost_plots(source: ReportSource) -> list[Markup]:
    """The deciding score against what every query costs."""
    rows = [rung for rung in source.rungs if rung.row.get("scores")]
    if len(rows) < 2:
        return []
    metric = source.metrics[0]
    return [
        plots.cost([(r.label, r.row["scores"][metric], r.row[key]) for r in rows], metric, label)
        for key, label in (("prompt_tokens", "prompt tokens per query"), ("seconds_per_query", "seconds per query"))
        if all(key in r.row for r in rows)
    ]


def learning_curve_plots(source: ReportSource) -> Markup | None:
    """The deciding score of a tuned rung against the rows that it learned from."""
    points = source.ladder.get("curve", ()) if source.ladder else ()
    if not points:
        return None
    found = [(f"{p['rung']}, {p['rows']:,} rows", p["score"], float(p["rows"])) for p in points]
    whole = next((rung for rung in source.rungs if rung.label == points[0]["rung"]), None)
    rows = whole.runs[0].manifest.get("data", {}).get("splits", {}).get("train", {}).get("rows") if whole else None
    if whole is not None and rows and whole.row.get("scores"):
        found.append((f"{whole.label}, all {rows:,} rows", whole.row["scores"][source.metrics[0]], float(rows)))
    return plots.cost(found, source.metrics[0], "training rows")


def further_findings(source: ReportSource) -> Pairs:
    """What the ladder says beside its verdict."""
    ladder: Mapping[str, Any] = source.ladder or {}
    further = ladder.get("further") or {}
    return {
        "the next rung": further.get("text") or "",
        "what is forgotten": "; ".join(one["text"] for one in ladder.get("forgotten", ())),
        "what is missing": "; ".join(note["text"] for note in ladder.get("notes", ())),
        "not measured": "; ".join(f"{left['rung']}: {left['why']}" for left in ladder.get("left", ())),
    }


def retrieval(source: ReportSource) -> list[tuple[str, Pairs]]:
    """How well each rung that retrieves found what its questions ask for, and in what."""
    return [(rung.label, _retrieval(rung.row["retrieval"])) for rung in source.rungs if rung.row.get("retrieval")]


def _retrieval(found: Mapping[str, Any]) -> Pairs:
    judged = {"the row's own context": found["judged_by_context"], "the expected answer": found["judged_by_answer"]}
    left_out = {"empty documents": found["empty_documents"], "passages that stood twice": found["duplicate_passages"]}
    return {
        "hit rate": retrieved_text(found),
        "a hit is a passage with": ", ".join(f"{name} ({number:,})" for name, number in judged.items() if number),
        "passages a question": f"{found['top_k']:,} of {found['passages']:,}",
        "documents": f"{found['documents']:,} {'in ' + found['from'] if found['from'] else 'contexts of the data'}",
        "cut into": f"{found['chunk_words']:,} words, of which {found['overlap']:,} shared with the next",
        "left out": ", ".join(f"{number:,} {name}" for name, number in left_out.items() if number),
        "search": f"{1000 * found['seconds_per_query']:.1f} ms a question" if "seconds_per_query" in found else "",
    }


def instructions(source: ReportSource) -> list[TriedInstruction]:
    """Every instruction that was tried on the validation split, with its scores."""
    found: Mapping[str, Any] = next((rung.row for rung in source.rungs if rung.row.get("instructions")), {})
    return tried_instructions(found.get("instructions", ()), source.metrics, found.get("instruction"))


def curves(source: ReportSource) -> list[tuple[str, Markup]]:
    """What was logged over the steps of each tuned rung: its loss, or what tells more."""
    unit = loss_unit(source.config)
    drawn = []
    for rung in source.rungs:
        for key in logged_keys_shown(source.config):
            if logs := [run.log for run in rung.runs if plots.has_curve(run.log, key)]:
                drawn.append((rung.label, plots.logged_curve(rung.label, logs, key, unit if key == "loss" else "")))
    return drawn


def layers(source: ReportSource) -> list[tuple[str, Markup]]:
    """What the layers of each lottery scored."""
    found = [(run.label, run.manifest.get("lottery")) for run in source.runs]
    return [(label, plots.layer_scores(label, own["scores"], own["winners"])) for label, own in found if own]


def training_summaries(source: ReportSource) -> list[tuple[str, Pairs]]:
    """What was trained, one entry a training run."""
    return [(run.label, _trained(run)) for run in source.runs]


def data(source: ReportSource) -> Pairs:
    """What the data held, and what of it was used."""
    found = source.manifest.get("data", {})
    splits, train = found.get("splits", {}), found.get("train", {})
    lines: Pairs = {}
    for number, one in enumerate(splits.get("sets", ()), start=1):
        weight = f", weight {one['weight']:g}" if one.get("weight", 1.0) != 1.0 else ""
        counts = f"{one.get('kept', 0):,} rows kept, {one.get('rejected', 0):,} rejected{weight}"
        lines["file" if number == 1 else f"file {number}"] = f"{one.get('path')}: {counts}"
    for part in ("train", "validation", "test"):
        if counts := splits.get(part):
            lines[part] = f"{counts['rows']:,} rows in {counts.get('groups', 0):,} groups"
            if copies := counts.get("duplicate_prompts"):
                lines[part] += f", {copies:,} duplicate prompts"
    if splits:
        copies = sum(splits.get(part, {}).get("duplicate_prompts", 0) for part in ("train", "validation", "test"))
        lines["duplicate prompts"] = f"{copies:,}"
        lines["dropped for overlap"] = f"{splits.get('overlap_dropped', 0):,}"
    if train:
        learned = train["supervised_tokens"]
        of = f"of which {learned:,} supervised" if learned else "of prompts"
        lines["training tokens"] = f"{train['tokens']:,}, {of}"
        lines["longest row"] = f"{train['longest']:,} tokens"
        lines["dropped or trimmed"] = f"{train['dropped']:,} dropped, {train['trimmed']:,} trimmed for length"
    if seen := source.manifest.get("contamination"):
        lines |= contamination_text(seen)
    prints = {name: str(value) for name, value in source.manifest.get("fingerprints", {}).items()}
    if fingerprint := splits.get("fingerprint", prints.get("data")):
        prints["data"] = str(fingerprint)
    return lines | {f"{name} fingerprint": value for name, value in prints.items()}


def gates(source: ReportSource) -> list[tuple[str, list[Pairs]]]:
    """Each run's gates with what they measured."""
    return [
        (
            run.label,
            [
                {
                    "name": str(gate["name"]),
                    "state": str(gate["state"]),
                    "measured": measured_text(gate.get("measured")),
                    "limit": measured_text(gate.get("limit")),
                }
                for gate in run.manifest.get("gates", ())
            ],
        )
        for run in source.runs
        if run.manifest.get("gates")
    ]


def versions(source: ReportSource) -> Pairs:
    """What computed it."""
    found = dict(source.manifest.get("versions", {}))
    run: Mapping[str, Any] = source.runs[0].manifest if source.runs else {}
    extra = {"device": run.get("device"), "computed in": run.get("compute_dtype")}
    return {name: str(value) for name, value in {**found, **extra}.items() if value}


def config(source: ReportSource) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(dict(source.config), sort_keys=False, allow_unicode=True, width=100) if source.config else ""


def _run_status(manifest: Mapping[str, Any]) -> StatusSection:
    state, config = str(manifest.get("status")), manifest.get("config", {})
    commands = tuple(commands_after_run(manifest, str(config.get("output", "RUN"))))
    steps = f"{manifest['steps']:,} steps" if manifest.get("steps") else "no step"
    if state == "finished":
        said = f"{method_text(config.get('method', {}))}. {steps}"
        if manifest.get("validation_loss") is not None:
            said += f", validation loss {format_loss(manifest['validation_loss'])} {loss_unit(config)}"
        return StatusSection("good", "Finished", f"{said}.", commands=commands)
    if state == "interrupted":
        text = f"Stopped by the user after {steps}; its checkpoint is saved."
        return StatusSection("warn", "Interrupted", text, commands=commands)
    if state != "failed":
        text = "It was running when this page was made. If nothing runs any more, it was killed."
        return StatusSection("warn", "Not finished", text, commands=commands)
    failed = [gate["name"] for gate in manifest.get("gates", ()) if gate.get("state") == "failed"]
    text = f"Gate {', '.join(failed)} did not pass: its numbers stand below." if failed else "The error was:"
    details = [str(manifest.get("error") or "no message was recorded")]
    if rows := manifest.get("not_finite", {}).get("rows"):
        details.append("rows of the last step:\n" + "\n".join(f"  {row}" for row in rows))
    commands = (
        "rung train CONFIG --resume  # goes on with the same config, once the cause is gone",
        "rung train CONFIG --overwrite  # starts anew, where the config has to change",
    )
    return StatusSection("bad", "This run failed", text, tuple(details), commands)


def _trained(run: LoggedRun) -> Pairs:
    manifest, config = run.manifest, run.manifest.get("config", {})
    engine, model = config.get("training", {}), config.get("model", {})
    rate, speed = manifest.get("learning_rate"), manifest.get("tokens_per_second")
    schedule = f"{rate:g}, {engine.get('schedule')}, warm-up {engine.get('warmup', 0):.0%}" if rate else ""
    steps = f"{manifest['steps']:,}" if manifest.get("steps") else ""
    best = manifest.get("best_step")
    lines = {
        "method": method_text(config.get("method", {})),
        "base": str(model.get("name", "")),
        "base fingerprint": str(manifest.get("fingerprints", {}).get("base", ""))[:16],
        "trainable": f"{manifest['trainable_parameters']:,}" if manifest.get("trainable_parameters") else "",
        "moves": str(manifest.get("moves", "")),
        "learning rate": schedule,
        "steps": f"{steps}, each of {engine.get('examples_per_step')} documents" if steps else "",
        "tokens": f"{manifest['tokens']:,}" if manifest.get("tokens") else "",
        "time": format_duration(manifest["train_seconds"]) if manifest.get("train_seconds") else "",
        "speed": f"{speed:,.0f} tokens/s" if speed else "",
        "peak memory": format_bytes(manifest["peak_memory_bytes"]) if manifest.get("peak_memory_bytes") else "",
        "training loss": f"{format_loss(manifest['train_loss'])} in the last step" if steps else "",
        "validation loss": format_loss(manifest["validation_loss"])
        if manifest.get("validation_loss") is not None
        else "",
        "held-out pairs": preferred_text(run.log),
        "reward model": reward_text(manifest.get("reward") or {}),
        "lowest at step": f"{best:,}" if best and best != manifest.get("steps") else "",
        "lottery": lottery_text(manifest.get("lottery") or {}),
        "router load": router_text(manifest.get("router_load") or {}),
        "status": str(manifest.get("status")) if manifest.get("status") != "finished" else "",
    }
    return {name: text for name, text in lines.items() if text}
