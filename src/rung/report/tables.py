"""Terminal output of ladders, runs, evaluations and comparisons.

The ladder adapts to the terminal: 120 columns hold one line per rung, 80 hold two by putting intervals below their
means; narrower ones lose columns, never digits. Without a terminal the width is fixed, so that logs can be compared.
Functions return lines and print nothing. `cli` and `commands.climb` call them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rung.console import add_text_row, plain
from rung.report import summaries
from rung.report.formatting import (
    MISSING,
    decimals,
    empty_table,
    format_bytes,
    format_count,
    format_duration,
    format_estimate,
    format_loss,
    format_p_value,
    format_significant,
    name_value_table,
    render_lines,
)
from rung.report.summaries import PrintedModel, PrintedRung
from rung.results.base import Estimate
from rung.results.data import TokenResult
from rung.results.evaluation import (
    ComparisonResult,
    EvaluationResult,
    ForgettingComparison,
    HarnessResult,
    JudgeResult,
    MetricComparison,
)
from rung.results.exports import ExportResult, PushResult
from rung.results.ladder import Ladder, LadderRow
from rung.results.training import PreviewResult, RunResult

MIN_PREDICTABLE_BYTES = 2**24
"""Peak memory beyond that of the libraries (16 MiB) from which its relative error says something of the plan."""
_TONE = {"good": "green", "bad": "red", "recommended": "bold green", "safe": "bold yellow", "best": "bold"}


def ladder_lines(ladder: Ladder) -> list[str]:
    """The ladder, the verdict, the path of the report and next commands."""
    metrics, verdict = list(ladder.rows[0].scores), ladder.verdict
    labeled_rows, metrics = summaries.with_people([(row.rung, row) for row in ladder.rows], metrics)
    rows = summaries.printed_rungs(labeled_rows, metrics, verdict)
    verdict_text = plain(verdict.text, style=_TONE["recommended" if verdict.recommended else "safe"])
    size = f"{ladder.examples} held-out questions in {ladder.clusters} clusters; intervals are 95 %, gains paired"
    skipped = [f"not measured: {rung.rung}, {rung.why}" for rung in ladder.skipped_rungs]
    cut_off = summaries.cut_off_text({row.rung: row.cut_off for row in ladder.rows})
    models = summaries.printed_models(ladder.models)
    of_models = [f"on {model.model}: {model.rungs}" for model in models]
    lines_of_facts = (size, *of_models, *_retrieval_lines(ladder.rows), *([cut_off] if cut_off else []), *skipped)
    facts = [plain(line, style="dim") for line in lines_of_facts]
    findings = [ladder.next_rung and ladder.next_rung.text, *(d.text for d in ladder.diagnoses)]
    findings += [result.text for result in ladder.forgetting]
    findings += summaries.people_lines(ladder.human)
    notes = [verdict_text, *(plain(finding) for finding in findings if finding)]

    def parts(console: Console) -> list[RenderableType]:
        tables: list[RenderableType] = [_first_that_fits(_layouts(rows, metrics), console)]
        if models:
            layouts = [_models(models, with_query=with_query) for with_query in (True, False)]
            tables += [plain(""), _first_that_fits(layouts, console), plain("")]
        return [*tables, *facts, plain(""), *notes]

    lines = render_lines(parts)
    return ["", *lines, *_report_and_commands(ladder.report, summaries.commands_after_climb(ladder))]


def _models(models: Sequence[PrintedModel], *, with_query: bool) -> Table:
    """One line a model: what it is, and what a query takes."""
    query_heads = ["peak\nmemory", "prompt\ntokens", "per\nquery"] if with_query else []
    table = empty_table(["model", "para-\nmeters", "license", *query_heads], gap=2, text_columns=(0, 2))
    for model in models:
        query_cells = (model.memory, model.tokens, model.seconds) if with_query else ()
        add_text_row(table, model.model, model.parameters, model.license, *query_cells)
    return table


def _retrieval_lines(rows: Sequence[LadderRow]) -> list[str]:
    """Hit rates of retrieval; rungs with the same result share a line."""
    rungs: dict[str, list[str]] = {}
    for row in rows:
        if row.retrieval:
            rungs.setdefault(summaries.retrieved_text(row.retrieval), []).append(row.rung)
    statement = "the right passage is among those retrieved for"
    return [f"{', '.join(names)}: {statement} {text}" for text, names in rungs.items()]


def export_lines(result: ExportResult) -> list[str]:
    """The files of an export with their proof and their scores, and how they are used."""
    lines = [f"exported to {result.path}", *result.notes]
    if result.files:
        lines += ["", *render_lines(lambda _: [_export_table(result)])]
        if any(file.largest_difference is not None for file in result.files):
            lines.append("largest and mean difference of log-probabilities in llama.cpp to the run, in nats")
        for file in result.files:
            if file.table_difference is not None:
                number = format_significant(file.table_difference)
                lines.append(f"{file.type}: {number} to the run with GELU from ggml's table in float16")
    if result.questions is not None:
        seconds = format_significant(result.run_seconds_per_query or 0.0)
        lines.append(
            f"{result.questions} test questions, one at a time; the run answers one in {seconds} s, in batches"
        )
    return [*lines, "", *result.commands]


def push_lines(result: PushResult) -> list[str]:
    """What was sent to the hub, or, without a commit, what would be."""
    files = name_value_table({file.name: format_bytes(file.bytes) for file in result.files})
    if result.commit is not None:
        return [*files, "", f"sent to {result.url}", *result.notes]
    return [*files, "", *result.card.splitlines(), "", *result.notes, f"nothing was sent to {result.repository}"]


def _export_table(result: ExportResult) -> Table:
    """One row a file: size, proof, and with --measure its score beside the run's."""
    metric = next((name for file in result.files for name in file.scores), None)
    heads = ["type", "size", "largest", "mean", *([metric, "to the run", "s/query"] if metric else [])]
    table = empty_table(heads, gap=2)
    if metric:
        before = result.files[0].scores[metric].before
        add_text_row(table, "the run", "", "", "", format_estimate(before), "", "")
    for file in result.files:
        numbers = (file.largest_difference, file.mean_difference)
        cells = [file.type, format_bytes(file.bytes)]
        cells += [MISSING if x is None else format_significant(x) for x in numbers]
        if metric:
            score = file.scores[metric]
            cells += [format_estimate(score.after), format_estimate(score.difference, signed=True)]
            cells.append(format_significant(file.seconds_per_query or 0.0))
        add_text_row(table, *cells)
    return table


def run_lines(run: RunResult, output: str, report: str) -> list[str]:
    """Status of a run, its measurements, the folder of its weights and next commands."""
    lines = {"gates": summaries.gates_text(run.gates)}
    if run.steps:
        moves, unit = f"; {run.moves}" if run.moves else "", summaries.loss_unit(run.config)
        method = summaries.method_text(run.config.get("method", {}))
        validation = f", validation {format_loss(run.validation_loss)}" if run.validation_loss else ""
        speed = f"{run.tokens_per_second:,.0f} tokens/s, " if run.tokens_per_second else ""
        lines |= {
            "trained": f"{format_count(run.trainable_parameters)} parameters, {method}{moves}",
            "loss": f"{format_loss(run.train_loss)} in the last step{validation} {unit}",
            "speed": f"{speed}{run.steps:,} steps, {run.tokens:,} tokens in {format_duration(run.train_seconds)}",
            "memory": _memory(run),
        }
    if (train := run.data.splits.train) and train.rows:
        supervised = run.data.train.supervised_tokens if run.data.train else 0
        lines["data"] = f"{train.rows:,} " + (f"rows, {supervised:,} supervised tokens" if supervised else "prompts")
        lines["data"] += _changed_for_length(run.data.train)
    if run.status == "finished":
        lines[summaries.artifact_folder(run, "").strip("/")] = summaries.artifact_folder(run, output)
    if run.error:
        lines["error"] = run.error
    head = f"{run.status}: {output}"
    commands = summaries.commands_after_run(run, output)
    return ["", head, *name_value_table(lines), *_report_and_commands(report, commands)]


def _changed_for_length(part: TokenResult | None) -> str:
    counts = {"too long and left out": part.dropped, "with a shortened prompt": part.trimmed} if part else {}
    return "".join(f"; {count:,} {name}" for name, count in counts.items() if count)


def _memory(run: RunResult) -> str:
    """Peak memory, compared with the plan if there is one."""
    if (plan := run.plan) is None:
        return f"{format_bytes(run.peak_memory_bytes)} at the peak"
    peak, planned = plan.measured_peak, format_bytes(plan.peak_bytes)
    # relative to what the plan can predict: the footprint of the libraries is measured, not planned
    predictable = peak - plan.footprint_bytes
    if predictable < MIN_PREDICTABLE_BYTES:
        return f"{format_bytes(peak)} at the peak, most of it the libraries'; planned {planned}"
    relative_error = (plan.peak_bytes - peak) / predictable
    return f"{format_bytes(peak)} at the peak; planned {planned} ({relative_error:+.0%} of what is not the libraries')"


def dry_run_lines(result: PreviewResult) -> list[str]:
    """Data and settings of a dry run."""
    train, trainable = result.train, result.trainable_parameters
    rows = ", ".join(f"{split.rows:,} {name}" for name, split in result.splits.by_name().items())
    if read_count := sum(s.kept for s in result.splits.sets):
        rows = f"{read_count:,} read, {sum(s.rejected for s in result.splits.sets):,} rejected; {rows}"
    share = train.supervised_tokens / train.tokens if train.tokens else 0.0
    supervised = f", {train.supervised_tokens:,} supervised ({share:.0%})" if share else ": prompts alone"
    steps = f"{result.steps_per_epoch:,} an epoch, {result.tokens_per_micro_batch:,} tokens at once"
    lines = {
        "rows": rows,
        "tokens": f"{train.tokens:,} in training rows{supervised}; the longest row has {train.longest:,}",
        "preflight": f"{result.preflight['failing']:,} of {result.preflight['rows']:,} rows fail",
        "trainable": f"{format_count(trainable)} parameters ({trainable:,})",
        "steps": f"{steps}, learning rate {result.learning_rate:g}",
        "memory": f"{format_bytes(result.plan['needed_bytes'])} at the peak, as far as it can be known beforehand",
    }
    return ["", *name_value_table(lines), "", "Nothing was written. Without --dry-run this trains."]


def score_lines(result: EvaluationResult) -> list[str]:
    """Scores with intervals and the cost of a query; for a reward model its health."""
    if result.reward is not None:
        return ["", f"{result.target}: {result.summary}"]
    lines = {name: format_estimate(estimate) for name, estimate in result.scores.items()}
    if result.classification:
        lines |= summaries.class_lines(result.classification)
    if result.retrieval:
        lines["retrieved"] = f"the right passage for {summaries.retrieved_text(result.retrieval)}"
    if result.contamination:
        lines |= summaries.contamination_text(result.contamination)
    seconds = format_significant(result.seconds_per_query or 0.0)
    lines["a query"] = f"{result.prompt_tokens:,.0f} prompt tokens, {seconds} s"
    size = f"{result.examples:,} held-out questions in {result.clusters:,} clusters, 95 % intervals"
    output = ["", f"{result.target}: {size}", *name_value_table(lines)]
    if cut := result.cut_off:
        advice = "answers were cut at evaluation.max_new_tokens and are scored by the text they have: raise it."
        output += ["", f"{cut:,} {advice}"]
    return output


def harness_lines(result: HarnessResult) -> list[str]:
    """Scores of lm-evaluation-harness with their standard errors."""
    table = empty_table(("task", "metric", "score", "items", "shots", "prompts"), gap=2)
    for row in summaries.harness_rows(result.scores):
        add_text_row(table, *row)
    version = result.scores[0].harness_version
    head = f"{result.target}: lm-evaluation-harness {version}; standard errors are the harness's"
    return ["", head, *render_lines(lambda _: [table])]


def _layouts(rows: Sequence[PrintedRung], metrics: Sequence[str]) -> list[Table]:
    """The ladder in all its layouts, the most detailed first."""
    layouts = [_wide(rows, metrics, gap=gap) for gap in (1, 0)]
    layouts += [_stacked(rows, metrics, detail=detail) for detail in ("interval", "mean", "")]
    return [*layouts, _stacked(rows, metrics, with_cost=False)]


def _first_that_fits(layouts: Sequence[Table], console: Console) -> Table:
    """The first table that fits the width of the terminal, or else the last."""
    # measured without a limit: rich would shrink a table to the console before it is compared
    unbounded = console.options.update(max_width=10_000)
    return next((t for t in layouts if Measurement.get(console, unbounded, t).maximum <= console.width), layouts[-1])


def _wide(rows: Sequence[PrintedRung], metrics: Sequence[str], *, gap: int) -> Table:
    """One line per rung; two metrics with their intervals, further metrics are in the report."""
    heads = ["rung", *(f"{metric}\n[95 %]" for metric in metrics[:2]), "gain on the\nrung below", "train-\nable"]
    ladder = empty_table([*heads, "training\ntime", "peak\nmemory", "prompt\ntokens", "per\nquery"], gap)
    for row in rows:
        scores = [plain(str(cell)) for cell in row.scores[:2]]
        cost = [row.trainable, row.train, row.memory, row.tokens, row.seconds]
        add_text_row(ladder, _label(row), *scores, _gain(row, " "), *map(plain, cost))
    return ladder


def _stacked(rows: Sequence[PrintedRung], metrics: Sequence[str], detail: str = "", with_cost: bool = True) -> Table:
    """Two lines per rung: the interval below the mean, the time below the size."""
    second = metrics[1:2] if detail else ()
    heads = ["rung", f"{metrics[0]}\n[95 %]", *(m + "\n[95 %]" * (detail == "interval") for m in second)]
    cost_heads = ["trainable,\ntime", "peak\nmemory", "per\nquery"] if with_cost else []
    ladder = empty_table([*heads, "gain on the\nrung below", *cost_heads], 0)
    for row in rows:
        cells = [plain(f"{row.scores[0].mean}\n{row.scores[0].bounds}")]
        for cell in row.scores[1 : 1 + len(second)]:
            cells.append(plain(f"{cell.mean}\n{cell.bounds}" if detail == "interval" else cell.mean))
        cells.append(_gain(row, "\n"))
        if with_cost:
            cells += map(plain, (f"{row.trainable}\n{row.train}", row.memory, f"{row.tokens} tok\n{row.seconds}"))
        add_text_row(ladder, _label(row, "\n"), *cells)
    return ladder


def _gain(row: PrintedRung, separator: str) -> Text:
    return plain(separator.join(filter(None, (row.gain.mean, row.gain.bounds))), style=_TONE.get(row.gain.tone, ""))


def _label(row: PrintedRung, line_break: str = "") -> Text:
    """The name, marked if the verdict points at it; plain text even if it contains rich markup."""
    mark = "> " if row.note in ("recommended", "safe") else "  "
    note = f"{line_break}  {row.note}" if line_break and row.note else ""
    return plain(f"{mark}{row.rung}{note}", style=_TONE.get(row.note, ""))


def _report_and_commands(report: str, commands: Sequence[str]) -> list[str]:
    """Path of the report and next commands; commands are never wrapped, so that they can be copied."""
    lines = [f"report  {report}", *(f"{'' if i else 'next':<6}  {command}" for i, command in enumerate(commands))]
    return ["", *lines]


NOTABLE_LENGTH_EFFECT = 0.1
"""Difference between the raw and the length-controlled win rate from which the output mentions length."""


def comparison_lines(result: ComparisonResult) -> list[str]:
    """Comparison of two systems: each metric, then the judge's preferences."""
    size = f"{result.examples:,} held-out questions in {result.clusters:,} clusters, 95 % intervals, paired"
    lines = ["", f"{result.target} against {result.baseline}: {size}"]
    lines += name_value_table({name: metric_text(name, metric) for name, metric in result.metrics.items()})
    if judge := result.judge:
        head = f"preferred by the judge {judge.model}"
        lines += ["", head, *name_value_table(_judge(judge))]
    return lines


def forgetting_lines(result: ForgettingComparison) -> list[str]:
    """Comparison of a run with its base on unrelated data."""
    size = f"{result.examples:,} rows in {result.clusters:,} clusters, 95 % intervals, run minus base"
    lines = ["", f"{result.target} on {result.forgetting}: {size}"]
    lines += name_value_table({name: metric_text(name, metric) for name, metric in result.metrics.items()})
    if result.dropped:
        lines.append(f"  {result.dropped:,} texts were longer than the model's context and left out")
    return lines


def metric_text(name: str, comparison: MetricComparison) -> str:
    """Both scores and their difference; if it is not significant, the smallest difference that would be."""
    digits, p_value = decimals([comparison.before, comparison.after]), comparison.difference.p_value
    scores = f"{format_estimate(comparison.after, digits)} against {format_estimate(comparison.before, digits)}"
    change = ", ".join(filter(None, (change_text(name, comparison), format_p_value(p_value))))
    # a large p-value does not show equality: name what these items could have detected
    if p_value is not None and p_value > 0.05:
        smallest = comparison.detectable
        change += "; no sure difference" + (f", one of {smallest:.2g} would show" if smallest is not None else "")
    return f"{scores}\n{change}"


def change_text(name: str, comparison: MetricComparison) -> str:
    """After minus before with its interval; for perplexity in nats."""
    return format_estimate(comparison.difference, signed=True) + (" nats a token" if name == "perplexity" else "")


def _judge(judge: JudgeResult) -> dict[str, str]:
    lines = {}
    if (raw := judge.win_rate) and (controlled := judge.length_controlled) and judge.consistent:
        lines["win rate"] = f"{_rate(raw)}; {judge.wins:,} won, {judge.ties:,} tied, {judge.losses:,} lost"
        length_matters = abs(controlled.mean - raw.mean) > NOTABLE_LENGTH_EFFECT
        lines["of one length"] = _rate(controlled) + ("; length makes much of the difference" if length_matters else "")
        lines["both orders"] = f"agree in {_rate(judge.consistent)} of the pairs"
        if judge.shown_first is not None:
            lines["shown first"] = f"preferred in {_rate(judge.shown_first)} of the verdicts"
        if judge.longer is not None:
            lines["longer"] = f"preferred in {_rate(judge.longer)} of the decided pairs"
    lines["characters"] = "{:,.0f} against {:,.0f} in an answer".format(*judge.characters)
    lines["unreadable"] = f"{judge.unreadable:,} of {judge.pairs:,} pairs"
    return {**lines, "trusted" if judge.trust.trusted else "NOT TRUSTED": judge.trust.reason}


def _rate(share: Estimate) -> str:
    # at least two decimals, or 0.5 looks like a round guess
    return format_estimate(share, max(2, decimals([share])) if math.isfinite(share.mean) else 2)
