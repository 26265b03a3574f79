"""Sections of the report page, one function each; a section is empty if the folder has no data for it.

Functions return plain data (pairs, tables, SVG), never HTML: the template decides the layout, and tests read values.
Texts shared with the terminal come from `summaries`, so that page and terminal never disagree. `html.render_page` calls
every function once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import yaml
from markupsafe import Markup

from rung.data.token_store import describe_notes
from rung.report import plots, summaries
from rung.report.formatting import MISSING, format_bytes, format_count, format_duration, format_loss
from rung.report.run_reader import PERPLEXITY, LoggedRun, ReportSource
from rung.results.evaluation import RetrievalResult
from rung.results.ladder import LadderRow
from rung.results.training import RunResult

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
    rows: tuple[summaries.PrintedRung, ...]
    note: str


def status(source: ReportSource) -> StatusSection:
    """The verdict, or how the run ended and what to do next."""
    if not source.is_climb:
        return _run_status(source.result)
    if source.ladder:
        verdict = source.ladder.verdict
        tone, kicker = ("good", "Verdict") if verdict.recommended else ("warn", "Verdict: not settled")
        return StatusSection(tone, kicker, verdict.text, commands=tuple(summaries.commands_after_climb(source.ladder)))
    measured_count = sum(rung.row != LadderRow() for rung in source.rungs)
    rung_count = len(source.climb_config.get("rungs", ())) or len(source.rungs)
    text = f"{measured_count} of {rung_count} rungs are measured; without all of them there is no verdict."
    # of any rung and seed: it explains why the climb did not finish
    errors = tuple(f"{run.label}: {run.result.error}" for run in source.runs if run.result.error)
    interrupted = source.result.status == "interrupted"
    kicker = "This climb failed" if errors else "Interrupted" if interrupted else "This climb is not finished"
    command = "rung climb CONFIG  # the same config goes on where it stands, finished rungs are not repeated"
    return StatusSection("bad" if errors else "warn", kicker, text, errors, (command,))


def facts(source: ReportSource) -> Pairs:
    """Key numbers of the page's head."""
    result, config = source.result, source.config
    pairs = {"base": str(config.get("model", {}).get("name", ""))}
    if source.ladder and source.ladder.models:
        pairs = {"bases": ", ".join(model.model for model in source.ladder.models)}
    if source.is_climb:
        climb = source.climb_config
        pairs["deciding score"] = str(next(iter(config.get("evaluation", {}).get("metrics", ())), ""))
        if source.ladder:
            pairs["held-out questions"] = f"{source.ladder.examples:,} in {source.ladder.clusters:,} clusters"
        if "margin" in climb:
            pairs["margin"] = f"{climb['margin']:g}"
        if climb.get("target") is not None:
            pairs["target"] = f"{climb['target']:g}"
        pairs["training seeds"] = str(climb.get("seeds", ""))
        return pairs
    pairs["method"] = str(config.get("method", {}).get("kind", ""))
    measurements = {
        "validation loss": format_loss(result.validation_loss),
        "training time": format_duration(result.train_seconds),
        "peak memory": format_bytes(result.peak_memory_bytes),
        "trainable parameters": format_count(result.trainable_parameters),
    }
    return pairs | {name: text for name, text in measurements.items() if text != MISSING}


def ladder(source: ReportSource) -> LadderTable | None:
    """Scores and costs of the rungs of a climb, or of a single run once it is evaluated."""
    measured_rungs = [rung for rung in source.rungs if rung.row.scores]
    if not measured_rungs:
        return None
    verdict = source.ladder.verdict if source.ladder else None
    rows = [(rung.label, rung.row) for rung in measured_rungs]
    cut_off = [f"{r.label} {r.cut_off} of {len(r.items)}" for r in measured_rungs if r.cut_off and r.items]
    note = f"Answers cut at evaluation.max_new_tokens: {', '.join(cut_off)}." if cut_off else ""
    shown_rows, metrics = summaries.with_people(rows, source.metrics)
    # gains are paired differences, which only a finished climb has computed
    unit = summaries.gain_unit(metrics) if source.ladder else None
    return LadderTable(tuple(metrics), unit, tuple(summaries.printed_rungs(shown_rows, metrics, verdict)), note)


def models(source: ReportSource) -> list[summaries.PrintedModel]:
    """The bases of a ladder with several."""
    return summaries.printed_models(source.ladder.models) if source.ladder else []


def difference_plot(source: ReportSource) -> Markup | None:
    """Plot of the differences that the verdict is based on."""
    if not source.ladder or len(source.ladder.verdict.rungs) < 2:
        return None
    verdict, lower_is_better = source.ladder.verdict, source.ladder.metric == PERPLEXITY
    margin = source.climb_config.get("margin", 0.0)
    unit = "nats per token" if lower_is_better else f"points of {source.ladder.metric}"
    # the margin of perplexity is relative, the difference is in nats
    limit = math.log1p(margin) if lower_is_better else margin
    return plots.differences(verdict.rungs, verdict.best, limit, unit, lower_is_better)


def score_plots(source: ReportSource) -> list[Markup]:
    """Scores from 0 to 1 in one plot, perplexity in another, because their scales differ."""
    rows = [(rung.label, rung.row.scores) for rung in source.rungs if rung.row.scores]
    target, deciding = source.climb_config.get("target"), source.metrics[:1]
    if len(rows) < 2:
        return []
    groups = [[m for m in source.metrics if (m == PERPLEXITY) == is_perplexity] for is_perplexity in (False, True)]
    return [plots.scores(rows, group, target if group[:1] == list(deciding) else None) for group in groups if group]


def cost_plots(source: ReportSource) -> list[Markup]:
    """The deciding score against the costs of a query."""
    rungs = [rung for rung in source.rungs if rung.row.scores]
    if len(rungs) < 2:
        return []
    metric, cost_plots = source.metrics[0], []
    for key, label in (("prompt_tokens", "prompt tokens per query"), ("seconds_per_query", "seconds per query")):
        points = [(rung.label, rung.row.scores[metric], getattr(rung.row, key)) for rung in rungs]
        if all(cost is not None for *_, cost in points):
            cost_plots.append(plots.cost(points, metric, label))
    return cost_plots


def learning_curve_plots(source: ReportSource) -> Markup | None:
    """The deciding score of a tuned rung against its number of training rows."""
    points, metric = source.ladder.curve if source.ladder else (), source.metrics[:1]
    if not points:
        return None
    curve_points = [(f"{p.rung}, {p.rows:,} rows", p.score, float(p.rows)) for p in points]
    # the last point is the rung itself, trained on all rows
    for rung in source.rungs:
        train = rung.runs[0].result.data.splits.train if rung.label == points[0].rung else None
        if train is not None and train.rows and rung.row.scores:
            label = f"{rung.label}, all {train.rows:,} rows"
            curve_points.append((label, rung.row.scores[metric[0]], float(train.rows)))
    return plots.cost(curve_points, metric[0], "training rows")


def further_findings(source: ReportSource) -> Pairs:
    """Findings of the ladder besides its verdict."""
    if (ladder := source.ladder) is None:
        return {}
    return {
        "the next rung": ladder.next_rung.text if ladder.next_rung else "",
        "what is forgotten": "; ".join(result.text for result in ladder.forgetting),
        "what people prefer": "; ".join(summaries.people_lines(ladder.human)),
        "what is missing": "; ".join(diagnosis.text for diagnosis in ladder.diagnoses),
        "not measured": "; ".join(f"{rung.rung}: {rung.why}" for rung in ladder.skipped_rungs),
    }


def retrieval(source: ReportSource) -> list[tuple[str, Pairs]]:
    """Hit rate and settings of each rung with retrieval."""
    return [(rung.label, _retrieval(rung.row.retrieval)) for rung in source.rungs if rung.row.retrieval]


def _retrieval(result: RetrievalResult) -> Pairs:
    criteria = {"the row's own context": result.judged_by_context, "the expected answer": result.judged_by_answer}
    left_out = {"empty documents": result.empty_documents, "passages that stood twice": result.duplicate_passages}
    place, seconds = result.documents_path, result.seconds_per_query
    return {
        "hit rate": summaries.retrieved_text(result),
        "a hit is a passage with": ", ".join(f"{name} ({number:,})" for name, number in criteria.items() if number),
        "passages a question": f"{result.top_k:,} of {result.passages:,}",
        "documents": f"{result.documents:,} " + (f"in {place}" if place else "contexts of the data"),
        "cut into": f"{result.chunk_words:,} words, of which {result.overlap:,} shared with the next",
        "left out": ", ".join(f"{number:,} {name}" for name, number in left_out.items() if number),
        "search": "" if seconds is None else f"{1000 * seconds:.1f} ms a question",
    }


def harness(source: ReportSource) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Scores of each run on public tasks."""
    return [(run.label, summaries.harness_rows(run.result.harness)) for run in source.runs if run.result.harness]


def classes(source: ReportSource) -> list[summaries.ClassTable]:
    """Scores of chosen labels for each rung that chose among them."""
    rungs = [(rung.label, rung.row.classification) for rung in source.rungs]
    return [summaries.class_table(label, found) for label, found in rungs if found is not None]


def instructions(source: ReportSource) -> list[summaries.TriedInstruction]:
    """All instructions tried on the validation split, with their scores."""
    # instructions are chosen once for a climb, so the first rung that lists them has all
    row = next((rung.row for rung in source.rungs if rung.row.instructions), LadderRow())
    return summaries.tried_instructions(row, source.metrics)


def curves(source: ReportSource) -> list[tuple[str, Markup]]:
    """Logged curves of each tuned rung: the loss, or more telling numbers for some objectives."""
    unit = summaries.loss_unit(source.config)
    plots_by_rung = []
    for rung in source.rungs:
        for key in summaries.logged_keys_shown(source.config):
            if logs := [run.log for run in rung.runs if plots.has_curve(run.log, key)]:
                curve = plots.logged_curve(rung.label, logs, key, unit if key == "loss" else "")
                plots_by_rung.append((rung.label, curve))
    return plots_by_rung


def layers(source: ReportSource) -> list[tuple[str, Markup]]:
    """Layer scores of each lottery."""
    lotteries = [(run.label, run.result.lottery) for run in source.runs]
    return [
        (label, plots.layer_scores(label, lottery.scores, lottery.winners)) for label, lottery in lotteries if lottery
    ]


def training_summaries(source: ReportSource) -> list[tuple[str, Pairs]]:
    """Training summary of each run."""
    return [(run.label, _training_summary(run)) for run in source.runs]


def data(source: ReportSource) -> Pairs:
    """Contents of the data, and how much of it was used."""
    splits, train = source.result.data.splits, source.result.data.train
    lines: Pairs = {}
    for number, data_set in enumerate(splits.sets, start=1):
        weight = f", weight {data_set.weight:g}" if data_set.weight != 1.0 else ""
        counts = f"{data_set.kept:,} rows kept, {data_set.rejected:,} rejected{weight}"
        removed = ", ".join(f"{token} ({answers:,})" for token, answers in data_set.removed_end_tokens.items())
        ends = f"; removed from the ends of answers: {removed}" if removed else ""
        lines["file" if number == 1 else f"file {number}"] = f"{data_set.path}: {counts}{ends}"
    for name, split in splits.by_name().items():
        copies = f", {split.duplicate_prompts:,} duplicate prompts" if split.duplicate_prompts else ""
        lines[name] = f"{split.rows:,} rows in {split.groups:,} groups{copies}"
    if splits.by_name():
        lines["duplicate prompts"] = f"{sum(split.duplicate_prompts for split in splits.by_name().values()):,}"
        # shown even if 0: that nothing crosses between splits is a result
        lines["dropped for overlap"] = f"{splits.overlap_dropped:,}"
    if train:
        share = f"of which {train.supervised_tokens:,} supervised" if train.supervised_tokens else "of prompts"
        lines["training tokens"] = f"{train.tokens:,}, {share}"
        lines["longest row"] = f"{train.longest:,} tokens"
        lines["dropped or trimmed"] = f"{train.dropped:,} dropped, {train.trimmed:,} trimmed for length"
        notes = {"control_tokens": train.control_tokens, "not_rendered": train.not_rendered}
        lines |= describe_notes(notes, source.result.config.get("data", {}).get("control_tokens"))
    if source.result.contamination:
        lines |= summaries.contamination_text(source.result.contamination)
    fingerprints = {name: value for name, value in source.result.fingerprints.items() if value}
    if splits.fingerprint:
        fingerprints["data"] = splits.fingerprint
    return lines | {f"{name} fingerprint": value for name, value in fingerprints.items()}


def gates(source: ReportSource) -> list[tuple[str, list[Pairs]]]:
    """Gates of each run with their measurements."""
    return [(run.label, _gates(run.result)) for run in source.runs if run.result.gates]


def _gates(result: RunResult) -> list[Pairs]:
    texts = [(g, summaries.measured_text(g.measured), summaries.measured_text(g.limit)) for g in result.gates]
    return [{"name": g.name, "state": g.state, "measured": measured, "limit": limit} for g, measured, limit in texts]


def versions(source: ReportSource) -> Pairs:
    """Versions, device and precision of the computation."""
    run = source.runs[0].result if source.runs else source.result
    pairs = {**source.result.versions, "device": run.device, "computed in": run.compute_dtype}
    if server := run.rollout_server:
        pairs["answers drawn by"] = f"{server['model']} at {server['url']}"
    return {name: value for name, value in pairs.items() if value}


def config(source: ReportSource) -> str:
    """The resolved config as YAML."""
    # unsorted: the order of the config classes groups what belongs together
    return yaml.safe_dump(dict(source.config), sort_keys=False, allow_unicode=True, width=100) if source.config else ""


def _run_status(run: RunResult) -> StatusSection:
    state, config = run.status, run.config
    commands = tuple(summaries.commands_after_run(run, str(config.get("output", "RUN"))))
    steps = f"{run.steps:,} steps" if run.steps else "no step"
    if state == "finished":
        text = f"{summaries.method_text(config.get('method', {}))}. {steps}"
        if run.validation_loss is not None:
            text += f", validation loss {format_loss(run.validation_loss)} {summaries.loss_unit(config)}"
        return StatusSection("good", "Finished", f"{text}.", commands=commands)
    if state == "interrupted":
        text = f"Stopped by the user after {steps}; its checkpoint is saved."
        return StatusSection("warn", "Interrupted", text, commands=commands)
    if state == "no_signal":
        return StatusSection("bad", "Nothing was learned", f"{steps}.", (run.error or "",), commands)
    # a killed process cannot write its end: `running` on disk may mean either
    if state != "failed":
        text = "It was running when this page was made. If nothing runs any more, it was killed."
        return StatusSection("warn", "Not finished", text, commands=commands)
    failed_gates = ", ".join(gate.name for gate in run.gates if gate.state == "failed")
    text = f"Gate {failed_gates} did not pass: its numbers stand below." if failed_gates else "The error was:"
    details = [run.error or "no message was recorded"]
    if rows := run.not_finite.get("rows"):
        details.append("rows of the last step:\n" + "\n".join(f"  {row}" for row in rows))
    commands = (
        # both commands: only the reader knows whether the config caused the failure
        "rung train CONFIG --resume  # goes on with the same config, once the cause is gone",
        "rung train CONFIG --overwrite  # starts anew, where the config has to change",
    )
    return StatusSection("bad", "This run failed", text, tuple(details), commands)


def _rows_text(result: RunResult) -> str:
    """Training rows and their files, which in a climb may be those of one rung."""
    splits = result.data.splits
    paths = ", ".join(data_set.path for data_set in splits.sets)
    return f"{splits.train.rows:,} of {paths}" if splits.train and paths else ""


def _training_summary(run: LoggedRun) -> Pairs:
    result, config = run.result, run.result.config
    training, rate, speed = config.get("training", {}), result.learning_rate, result.tokens_per_second
    schedule = f"{rate:g}, {training.get('schedule')}, warm-up {training.get('warmup_ratio', 0):.0%}" if rate else ""
    best = result.best_step if result.best_step != result.steps else None
    lines = {
        "method": summaries.method_text(config.get("method", {})),
        "base": str(config.get("model", {}).get("name", "")),
        "rows": _rows_text(result),
        # 64 bits of it are enough to compare by eye
        "base fingerprint": (result.fingerprints.get("base") or "")[:16],
        "trainable": f"{result.trainable_parameters:,}" if result.trainable_parameters else "",
        "moves": result.moves or "",
        "learning rate": schedule,
        "steps": f"{result.steps:,}, each of {training.get('examples_per_step')} documents" if result.steps else "",
        "tokens": f"{result.tokens:,}" if result.tokens else "",
        "time": format_duration(result.train_seconds or None),
        "speed": f"{speed:,.0f} tokens/s" if speed else "",
        "peak memory": format_bytes(result.peak_memory_bytes or None),
        "training loss": f"{format_loss(result.train_loss)} in the last step" if result.steps else "",
        "validation loss": format_loss(result.validation_loss),
        "held-out pairs": summaries.validation_pairs_text(run.log),
        "reward model": summaries.reward_text(result.reward),
        "lowest at step": f"{best:,}" if best else "",
        "lottery": summaries.lottery_text(result.lottery),
        "router load": summaries.router_text(result.router_load),
        "status": result.status if result.status != "finished" else "",
    }
    return {name: text for name, text in lines.items() if text not in ("", MISSING)}
