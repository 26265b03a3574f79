"""Sections of the report page, one function each; a section is empty if the folder has no data for it.

Functions return plain data (pairs, tables, SVG), never HTML: the template decides the layout, and tests read values.
Texts shared with the terminal come from `summaries`, so that page and terminal never disagree. `html.render_page` calls
every function once.
"""

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
    """The first section: verdict or status."""

    tone: str
    """good, warn or bad."""
    kicker: str
    text: str
    details: tuple[str, ...] = ()
    """Errors as they were raised."""
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LadderTable:
    """The ladder of the page."""

    metrics: tuple[str, ...]
    gain_unit: str | None
    """None if no gains were computed yet."""
    rows: tuple[LadderRow, ...]
    note: str


def status(source: ReportSource) -> StatusSection:
    """The verdict, or how the run ended and what to do next."""
    manifest = source.manifest
    if not source.is_climb:
        return _run_status(manifest)
    if source.ladder:
        verdict = source.ladder["verdict"]
        tone, kicker = ("good", "Verdict") if verdict.get("recommended") else ("warn", "Verdict: not settled")
        return StatusSection(tone, kicker, verdict["text"], commands=tuple(commands_after_climb(source.ladder)))
    measured_count = sum(bool(rung.row) for rung in source.rungs)
    rung_count = len(source.config.get("climb", {}).get("rungs", ())) or len(source.rungs)
    text = f"{measured_count} of {rung_count} rungs are measured; without all of them there is no verdict."
    # of any rung and seed: it explains why the climb did not finish
    errors = tuple(f"{run.label}: {run.manifest['error']}" for run in source.runs if run.manifest.get("error"))
    interrupted = manifest.get("status") == "interrupted"
    kicker = "This climb failed" if errors else "Interrupted" if interrupted else "This climb is not finished"
    command = "rung climb CONFIG  # the same config goes on where it stands, finished rungs are not repeated"
    return StatusSection("bad" if errors else "warn", kicker, text, errors, (command,))


def facts(source: ReportSource) -> Pairs:
    """Key numbers of the page's head."""
    manifest, config = source.manifest, source.config
    pairs = {"base": str(config.get("model", {}).get("name", ""))}
    if source.is_climb:
        climb, ladder = config.get("climb", {}), source.ladder
        pairs["deciding score"] = str(next(iter(config.get("evaluation", {}).get("metrics", ())), ""))
        if ladder:
            pairs["held-out questions"] = f"{ladder['examples']:,} in {ladder['clusters']:,} clusters"
        if "margin" in climb:
            pairs["margin"] = f"{climb['margin']:g}"
        if climb.get("target") is not None:
            pairs["target"] = f"{climb['target']:g}"
        pairs["training seeds"] = str(climb.get("seeds", ""))
        return pairs
    pairs["method"] = str(config.get("method", {}).get("kind", ""))
    measurements = {
        "validation loss": format_loss(manifest.get("validation_loss")),
        "training time": format_duration(manifest.get("train_seconds")),
        "peak memory": format_bytes(manifest.get("peak_memory_bytes")),
        "trainable parameters": format_count(manifest.get("trainable_parameters")),
    }
    # format functions return a dash for a missing value
    return pairs | {name: text for name, text in measurements.items() if text != "–"}


def ladder(source: ReportSource) -> LadderTable | None:
    """Scores and costs of the rungs of a climb, or of a single run once it is evaluated."""
    measured_rungs = [rung for rung in source.rungs if rung.row.get("scores")]
    if not measured_rungs:
        return None
    verdict = source.ladder["verdict"] if source.ladder else None
    rows = [(rung.label, rung.row if source.is_climb else {**source.manifest, **rung.row}) for rung in measured_rungs]
    cut_off = [f"{r.label} {r.cut_off} of {len(r.items)}" for r in measured_rungs if r.cut_off and r.items]
    note = f"Answers cut at evaluation.max_new_tokens: {', '.join(cut_off)}." if cut_off else ""
    metrics = source.metrics
    # gains are paired differences, which only a finished climb has computed
    unit = gain_unit(metrics) if source.ladder else None
    return LadderTable(metrics, unit, tuple(ladder_rows(rows, metrics, verdict)), note)


def verdict_plots(source: ReportSource) -> Markup | None:
    """Plot of the differences that the verdict is based on."""
    if not source.ladder or len(source.ladder["verdict"]["rungs"]) < 2:
        return None
    verdict, lower_is_better = source.ladder["verdict"], source.ladder["metric"] == PERPLEXITY
    margin = source.config.get("climb", {}).get("margin", 0.0)
    unit = "nats per token" if lower_is_better else f"points of {source.ladder['metric']}"
    # the margin of perplexity is relative, the difference is in nats
    limit = math.log1p(margin) if lower_is_better else margin
    return plots.differences(verdict["rungs"], verdict["best"], limit, unit, lower_is_better=lower_is_better)


def score_plots(source: ReportSource) -> list[Markup]:
    """Scores from 0 to 1 in one plot, perplexity in another, because their scales differ."""
    rows = [(rung.label, rung.row["scores"]) for rung in source.rungs if rung.row.get("scores")]
    target, deciding = source.config.get("climb", {}).get("target"), source.metrics[:1]
    if len(rows) < 2:
        return []
    groups = [[m for m in source.metrics if (m == PERPLEXITY) == is_perplexity] for is_perplexity in (False, True)]
    return [plots.scores(rows, group, target if group[:1] == list(deciding) else None) for group in groups if group]


def cost_plots(source: ReportSource) -> list[Markup]:
    """The deciding score against the costs of a query."""
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
    """The deciding score of a tuned rung against its number of training rows."""
    points = source.ladder.get("curve", ()) if source.ladder else ()
    if not points:
        return None
    curve_points = [(f"{p['rung']}, {p['rows']:,} rows", p["score"], float(p["rows"])) for p in points]
    full_rung = next((rung for rung in source.rungs if rung.label == points[0]["rung"]), None)
    rows = (
        full_rung.runs[0].manifest.get("data", {}).get("splits", {}).get("train", {}).get("rows") if full_rung else None
    )
    # the last point is the rung itself, trained on all rows
    if full_rung is not None and rows and full_rung.row.get("scores"):
        curve_points.append(
            (f"{full_rung.label}, all {rows:,} rows", full_rung.row["scores"][source.metrics[0]], float(rows))
        )
    return plots.cost(curve_points, source.metrics[0], "training rows")


def further_findings(source: ReportSource) -> Pairs:
    """Findings of the ladder besides its verdict."""
    ladder: Mapping[str, Any] = source.ladder or {}
    further = ladder.get("further") or {}
    return {
        "the next rung": further.get("text") or "",
        "what is forgotten": "; ".join(entry["text"] for entry in ladder.get("forgotten", ())),
        "what is missing": "; ".join(note["text"] for note in ladder.get("notes", ())),
        "not measured": "; ".join(f"{skipped['rung']}: {skipped['why']}" for skipped in ladder.get("left", ())),
    }


def retrieval(source: ReportSource) -> list[tuple[str, Pairs]]:
    """Hit rate and settings of each rung with retrieval."""
    return [(rung.label, _retrieval(rung.row["retrieval"])) for rung in source.rungs if rung.row.get("retrieval")]


def _retrieval(result: Mapping[str, Any]) -> Pairs:
    hit_criteria = {
        "the row's own context": result["judged_by_context"],
        "the expected answer": result["judged_by_answer"],
    }
    left_out = {"empty documents": result["empty_documents"], "passages that stood twice": result["duplicate_passages"]}
    return {
        "hit rate": retrieved_text(result),
        "a hit is a passage with": ", ".join(f"{name} ({number:,})" for name, number in hit_criteria.items() if number),
        "passages a question": f"{result['top_k']:,} of {result['passages']:,}",
        "documents": f"{result['documents']:,} {'in ' + result['from'] if result['from'] else 'contexts of the data'}",
        "cut into": f"{result['chunk_words']:,} words, of which {result['overlap']:,} shared with the next",
        "left out": ", ".join(f"{number:,} {name}" for name, number in left_out.items() if number),
        "search": f"{1000 * result['seconds_per_query']:.1f} ms a question" if "seconds_per_query" in result else "",
    }


def instructions(source: ReportSource) -> list[TriedInstruction]:
    """All instructions tried on the validation split, with their scores."""
    # instructions are chosen once for a climb, so the first rung that lists them has all
    row: Mapping[str, Any] = next((rung.row for rung in source.rungs if rung.row.get("instructions")), {})
    return tried_instructions(row.get("instructions", ()), source.metrics, row.get("instruction"))


def curves(source: ReportSource) -> list[tuple[str, Markup]]:
    """Logged curves of each tuned rung: the loss, or more telling numbers for some objectives."""
    unit = loss_unit(source.config)
    plots_by_rung = []
    for rung in source.rungs:
        for key in logged_keys_shown(source.config):
            if logs := [run.log for run in rung.runs if plots.has_curve(run.log, key)]:
                plots_by_rung.append(
                    (rung.label, plots.logged_curve(rung.label, logs, key, unit if key == "loss" else ""))
                )
    return plots_by_rung


def layers(source: ReportSource) -> list[tuple[str, Markup]]:
    """Layer scores of each lottery."""
    lotteries = [(run.label, run.manifest.get("lottery")) for run in source.runs]
    return [
        (label, plots.layer_scores(label, lottery["scores"], lottery["winners"]))
        for label, lottery in lotteries
        if lottery
    ]


def training_summaries(source: ReportSource) -> list[tuple[str, Pairs]]:
    """Training summary of each run."""
    return [(run.label, _training_summary(run)) for run in source.runs]


def data(source: ReportSource) -> Pairs:
    """Contents of the data, and how much of it was used."""
    manifest_data = source.manifest.get("data", {})
    splits, train = manifest_data.get("splits", {}), manifest_data.get("train", {})
    lines: Pairs = {}
    for number, data_set in enumerate(splits.get("sets", ()), start=1):
        weight = f", weight {data_set['weight']:g}" if data_set.get("weight", 1.0) != 1.0 else ""
        counts = f"{data_set.get('kept', 0):,} rows kept, {data_set.get('rejected', 0):,} rejected{weight}"
        lines["file" if number == 1 else f"file {number}"] = f"{data_set.get('path')}: {counts}"
    for part in ("train", "validation", "test"):
        if counts := splits.get(part):
            lines[part] = f"{counts['rows']:,} rows in {counts.get('groups', 0):,} groups"
            if copies := counts.get("duplicate_prompts"):
                lines[part] += f", {copies:,} duplicate prompts"
    if splits:
        copies = sum(splits.get(part, {}).get("duplicate_prompts", 0) for part in ("train", "validation", "test"))
        lines["duplicate prompts"] = f"{copies:,}"
        # shown even if 0: that nothing crosses between splits is a result
        lines["dropped for overlap"] = f"{splits.get('overlap_dropped', 0):,}"
    if train:
        supervised = train["supervised_tokens"]
        share = f"of which {supervised:,} supervised" if supervised else "of prompts"
        lines["training tokens"] = f"{train['tokens']:,}, {share}"
        lines["longest row"] = f"{train['longest']:,} tokens"
        lines["dropped or trimmed"] = f"{train['dropped']:,} dropped, {train['trimmed']:,} trimmed for length"
    if contamination := source.manifest.get("contamination"):
        lines |= contamination_text(contamination)
    fingerprints = {name: str(value) for name, value in source.manifest.get("fingerprints", {}).items()}
    if fingerprint := splits.get("fingerprint", fingerprints.get("data")):
        fingerprints["data"] = str(fingerprint)
    return lines | {f"{name} fingerprint": value for name, value in fingerprints.items()}


def gates(source: ReportSource) -> list[tuple[str, list[Pairs]]]:
    """Gates of each run with their measurements."""
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
    """Versions, device and precision of the computation."""
    library_versions = dict(source.manifest.get("versions", {}))
    run: Mapping[str, Any] = source.runs[0].manifest if source.runs else {}
    extra = {"device": run.get("device"), "computed in": run.get("compute_dtype")}
    return {name: str(value) for name, value in {**library_versions, **extra}.items() if value}


def config(source: ReportSource) -> str:
    """The resolved config as YAML."""
    # unsorted: the order of the config classes groups what belongs together
    return yaml.safe_dump(dict(source.config), sort_keys=False, allow_unicode=True, width=100) if source.config else ""


def _run_status(manifest: Mapping[str, Any]) -> StatusSection:
    state, config = str(manifest.get("status")), manifest.get("config", {})
    commands = tuple(commands_after_run(manifest, str(config.get("output", "RUN"))))
    steps = f"{manifest['steps']:,} steps" if manifest.get("steps") else "no step"
    if state == "finished":
        text = f"{method_text(config.get('method', {}))}. {steps}"
        if manifest.get("validation_loss") is not None:
            text += f", validation loss {format_loss(manifest['validation_loss'])} {loss_unit(config)}"
        return StatusSection("good", "Finished", f"{text}.", commands=commands)
    if state == "interrupted":
        text = f"Stopped by the user after {steps}; its checkpoint is saved."
        return StatusSection("warn", "Interrupted", text, commands=commands)
    # a killed process cannot write its end: `running` on disk may mean either
    if state != "failed":
        text = "It was running when this page was made. If nothing runs any more, it was killed."
        return StatusSection("warn", "Not finished", text, commands=commands)
    failed_gates = [gate["name"] for gate in manifest.get("gates", ()) if gate.get("state") == "failed"]
    text = (
        f"Gate {', '.join(failed_gates)} did not pass: its numbers stand below." if failed_gates else "The error was:"
    )
    details = [str(manifest.get("error") or "no message was recorded")]
    if rows := manifest.get("not_finite", {}).get("rows"):
        details.append("rows of the last step:\n" + "\n".join(f"  {row}" for row in rows))
    commands = (
        # both commands: only the reader knows whether the config caused the failure
        "rung train CONFIG --resume  # goes on with the same config, once the cause is gone",
        "rung train CONFIG --overwrite  # starts anew, where the config has to change",
    )
    return StatusSection("bad", "This run failed", text, tuple(details), commands)


def _training_summary(run: LoggedRun) -> Pairs:
    manifest, config = run.manifest, run.manifest.get("config", {})
    training, model = config.get("training", {}), config.get("model", {})
    rate, speed = manifest.get("learning_rate"), manifest.get("tokens_per_second")
    schedule = f"{rate:g}, {training.get('schedule')}, warm-up {training.get('warmup_ratio', 0):.0%}" if rate else ""
    steps = f"{manifest['steps']:,}" if manifest.get("steps") else ""
    best = manifest.get("best_step")
    lines = {
        "method": method_text(config.get("method", {})),
        "base": str(model.get("name", "")),
        # 64 bits of it are enough to compare by eye
        "base fingerprint": str(manifest.get("fingerprints", {}).get("base", ""))[:16],
        "trainable": f"{manifest['trainable_parameters']:,}" if manifest.get("trainable_parameters") else "",
        "moves": str(manifest.get("moves", "")),
        "learning rate": schedule,
        "steps": f"{steps}, each of {training.get('examples_per_step')} documents" if steps else "",
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
