"""Texts shared by the report page and the terminal: ladder rows, methods, gates, next commands.

One place for both, so that they cannot disagree. Results are typed; a config is read as the JSON of `run.json` with
defaults, because the folder may come from a run that failed early. `sections` and `tables` call them.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rung.config.climb import UNTUNED
from rung.config.method import BASE_CHANGING_METHODS, LOW_RANK_METHODS, default_alpha
from rung.report.formatting import (
    MISSING,
    decimals,
    format_bounds,
    format_bytes,
    format_count,
    format_duration,
    format_estimate,
    format_fixed,
    format_p_value,
    format_significant,
)
from rung.report.run_reader import PERPLEXITY
from rung.results.base import Estimate, GateResult
from rung.results.data import ContaminationResult
from rung.results.evaluation import Classification, HarnessScore, RetrievalResult, RewardModelHealth
from rung.results.ladder import HumanPreference, Ladder, LadderModel, LadderRow, Verdict
from rung.results.training import LotteryResult, RunResult

Json = Mapping[str, Any]
ALL_ROLES = {"q", "k", "v", "o", "gate", "up", "down"}


@dataclass(frozen=True, slots=True)
class Cell:
    """An estimate with its uncertainty, as text."""

    mean: str = ""
    bounds: str = ""
    p: str = ""
    tone: str = ""
    """good or bad if the interval excludes zero."""

    def __str__(self) -> str:
        return " ".join(part for part in (self.mean, self.bounds) if part)


@dataclass(frozen=True, slots=True)
class PrintedRung:
    """One rung, ready to print."""

    rung: str
    note: str
    """recommended, safe or best; empty for other rungs."""
    model: str
    """The base, where the ladder has several."""
    sees: str
    scores: tuple[Cell, ...]
    gain: Cell
    trainable: str
    train: str
    memory: str
    tokens: str
    seconds: str


LabeledRows = Sequence[tuple[str, LadderRow]]
PEOPLE = "people"
"""The column of people's preference."""


def with_people(rows: LabeledRows, metrics: Sequence[str]) -> tuple[LabeledRows, list[str]]:
    """The rows and metrics with people's preference as the second column, where there is one."""
    if all(row.human is None for _, row in rows):
        return rows, list(metrics)
    shown = [
        (label, row.replace(scores={**row.scores, **({PEOPLE: row.human} if row.human is not None else {})}))
        for label, row in rows
    ]
    return shown, [*metrics[:1], PEOPLE, *metrics[1:]]


def printed_rungs(rows: LabeledRows, metrics: Sequence[str], verdict: Verdict | None) -> list[PrintedRung]:
    """Rows of (label, measurements) as text; the decimals of a column follow its least certain number."""
    digits = {m: decimals(row.scores.get(m) for _, row in rows) for m in metrics}
    gain_digits = decimals(row.gain for _, row in rows)
    lower_is_better = metrics[0] == PERPLEXITY
    # Holm's p-values: every step of the ladder is a test
    corrected = {step.upper: step.p_holm for step in verdict.steps} if verdict else {}
    return [
        PrintedRung(
            label,
            _rung_note(label, verdict),
            row.model,
            row.sees,
            tuple(_score(row.scores.get(m), digits[m]) for m in metrics),
            _gain(row.gain, gain_digits, corrected.get(label), lower_is_better=lower_is_better),
            format_count(row.trainable_parameters or None),
            format_duration(row.train_seconds or None),
            format_bytes(row.peak_memory_bytes),
            MISSING if row.prompt_tokens is None else f"{row.prompt_tokens:,.0f}",
            MISSING if row.seconds_per_query is None else f"{format_significant(row.seconds_per_query)} s",
        )
        for label, row in rows
    ]


@dataclass(frozen=True, slots=True)
class PrintedModel:
    """One base of a ladder with several, ready to print."""

    model: str
    rungs: str
    parameters: str
    license: str
    memory: str
    tokens: str
    seconds: str


def printed_models(models: Sequence[LadderModel]) -> list[PrintedModel]:
    """The bases as text: a query takes as much as the least and the most of their rungs."""
    return [
        PrintedModel(
            model.model,
            ", ".join(model.rungs),
            format_count(model.parameters),
            model.license or "unknown",
            format_bytes(model.peak_memory_bytes or None),
            _range_text([f"{tokens:,.0f}" for tokens in model.prompt_tokens]),
            f"{_range_text([format_significant(seconds) for seconds in model.seconds_per_query])} s",
        )
        for model in models
    ]


def _range_text(ends: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys(ends))


def retrieved_text(result: RetrievalResult) -> str:
    """Hit rate of retrieval as text."""
    text = f"{format_estimate(result.hit_rate)}, {result.hits:,} of {result.hit_rate.examples:,} questions"
    return text + (f"; {result.without_passages:,} share no word with any" if result.without_passages else "")


@dataclass(frozen=True, slots=True)
class TriedInstruction:
    """An instruction with its scores on the validation split."""

    text: str | None
    scores: tuple[Cell, ...]
    chosen: bool


def tried_instructions(row: LadderRow, metrics: Sequence[str]) -> list[TriedInstruction]:
    """The instructions that a rung tried, as rows of a table."""
    digits = {m: decimals(candidate.scores.get(m) for candidate in row.instructions) for m in metrics}
    instructions = []
    for candidate in row.instructions:
        scores = tuple(_score(candidate.scores.get(m), digits[m]) for m in metrics)
        is_chosen = candidate.instruction == row.instruction
        instructions.append(TriedInstruction(candidate.instruction, scores, is_chosen))
    return instructions


def people_lines(human: HumanPreference | None) -> list[str]:
    """Whose preference the column of people is, and where it contradicts the deciding metric."""
    if human is None:
        return []
    if not human.systems:
        remedy = "rung label compare CLIMB shows people the answers that the rungs give now"
        return [f"{PEOPLE}: no vote in {human.source} compares answers that these rungs give; {remedy}"]
    votes = f"{human.votes:,} votes of {human.people} {'person' if human.people == 1 else 'people'}"
    others = (
        f"; {human.other_votes:,} votes are on answers that the rungs do not give any more" if human.other_votes else ""
    )
    first = f"{PEOPLE}: share of comparisons that each rung wins, by {votes} in {human.source}{others}"
    return [first, *human.conflicts]


def gain_unit(metrics: Sequence[str]) -> str:
    """Unit of gains."""
    return "nats per token, below 0 is better" if metrics[0] == PERPLEXITY else "points of the score"


def method_text(method: Json) -> str:
    """Description of a method."""
    kind = str(method.get("kind", ""))
    if kind == "full":
        return "full: every weight"
    if kind == "head":
        return "head: the output head alone"
    if kind in LOW_RANK_METHODS:
        return _lora_text(method)
    layers = _layers_text(method.get("layers"))
    # built for all kinds at once: .get returns None for settings of other methods
    sizes = {
        "mixture": f"{method.get('experts')} experts of rank {method.get('rank')}, "
        + (f"{method['top_k']} at a time" if method.get("top_k") else "all at once"),
        "peft": f"peft's {(method.get('config') or {}).get('peft_type')}",
        "bottleneck": f"{method.get('placement')} adapters of width {method.get('width')}{layers and ', ' + layers}",
        "prompt": f"prompt of {method.get('virtual_tokens')} virtual tokens",
        "p_tuning": f"P-tuning, {_placement_text(method)} made by {method.get('encoder')}",
        "prefix": f"prefix of {method.get('virtual_tokens')} virtual tokens in every layer",
    }
    return sizes.get(kind, kind)


def _placement_text(method: Json) -> str:
    counts = (method.get("positions") or {}).items()
    places = [f"{n} {'in front' if place == 'front' else f'before the {place}'}" for place, n in counts if n]
    placement = ", ".join(places)
    return f"{method.get('virtual_tokens')} virtual tokens{placement and f' ({placement})'}"


def _lora_text(method: Json) -> str:
    targets, rank = method.get("targets") or (), method.get("rank") or 0
    ranks, init = method.get("rank_pattern") or {}, method.get("init", "default")
    ratio, sampled = method.get("loraplus_lr_ratio", 1.0), method.get("lisa_n_layers")
    lottery = f"LoRA on the {method.get('lottery', {}).get('choose')} layers,"
    alpha = method.get("alpha") or default_alpha(rank, init, rslora=bool(method.get("rslora")))
    names = {"qlora": f"QLoRA on {method.get('bits')} bits,", "lottery": lottery}
    parts = [
        f"{names.get(str(method.get('kind')), 'LoRA')} rank {rank}, alpha {alpha:g}",
        ", ".join(f"{place}: {place_rank}" for place, place_rank in ranks.items()),
        "all linear layers" if set(targets) == ALL_ROLES else "on " + " ".join(map(str, targets)),
        _layers_text(method.get("layers")),
        f"{sampled} layers at a time" if sampled else "",
        f"started by {init}" if init != "default" else "",
        f"dropout {method['dropout']:g}" if method.get("dropout") else "",
        f"B {ratio:g} times as fast" if ratio != 1.0 else "",
        *(name for name in ("dora", "rslora") if method.get(name)),
    ]
    return ", ".join(part for part in parts if part)


def _layers_text(layers: object) -> str:
    if layers is None:
        return ""
    return "layers " + (layers if isinstance(layers, str) else ", ".join(map(str, layers)))  # type: ignore[call-overload]


def gates_text(gates: Sequence[GateResult]) -> str:
    """All gates in one line; failed and unreached gates by name."""
    names = {state: [g.name for g in gates if g.state == state] for state in ("failed", "passed", "not_reached")}
    texts = {
        "failed": f"{', '.join(names['failed'])} failed",
        "passed": f"{len(names['passed'])} passed",
        "not_reached": f"{', '.join(names['not_reached'])} not reached",
    }
    return ", ".join(text for state, text in texts.items() if names[state]) or "none reached"


def reward_text(health: RewardModelHealth | None) -> str:
    """Health of a reward model on validation pairs."""
    if health is None:
        return ""
    a = health.accuracy
    accuracy_text = f"{a.mean:.2f} [{a.low:.2f}, {a.high:.2f}] of {health.pairs:,} pairs right"
    length_text = f"{health.longer:.2f} by length alone, calibration error {health.calibration_error:.2f}"
    return f"{health.verdict}: {health.reason}; {accuracy_text}, {length_text}"


LENGTH_RATIO, LENGTH_CORRELATION = 1.5, 0.5
"""Values from which the report warns that preferences may be about length."""


def validation_pairs_text(log: Sequence[Json]) -> str:
    """Last measurement of a preference run on its validation pairs."""
    entry = next((e for e in reversed(log) if "validation_margin" in e), None)
    if entry is None:
        return ""
    parts = [f"margin {entry['validation_margin']:+.3f}"]
    if "validation_accuracy" in entry:
        lengths = f"margin goes with length by {entry['validation_length_correlation']:+.2f}"
        parts = [f"{entry['validation_accuracy']:.0%} the right way round", *parts, lengths]
        ratio = entry.get("validation_length_ratio", 1.0)
        if ratio >= LENGTH_RATIO or entry["validation_length_correlation"] >= LENGTH_CORRELATION:
            longer = f"better answers are {ratio:.1f} times as long, " if ratio > 1.0 else ""
            parts.append(f"beware: {longer}length alone may be learned")
    return ", ".join(parts)


def lottery_text(lottery: LotteryResult | None) -> str:
    """Layers that continued, the score of each third of the model, and whether the middle third won beyond chance."""
    if lottery is None:
        return ""
    scores, winners = {int(n): score for n, score in lottery.scores.items()}, lottery.winners
    # thirds by the layers of the model, not by those scored: a lottery may score a part only
    names = ("first", "middle", "last")
    third = {n: names[3 * n // lottery.of_layers] for n in scores}
    shares = ", ".join(f"{name} third {sum(s for n, s in scores.items() if third[n] == name):.0%}" for name in names)
    text = f"layers {', '.join(map(str, winners))} went on; scores: {shares}"
    if lottery.choose != "best":
        return f"{text}; chosen: {lottery.choose}"
    middle = sum(name == "middle" for name in third.values())
    middle_winners = sum(third[n] == "middle" for n in winners)
    expected = middle * len(winners) / len(scores)
    chance = _hypergeometric_tail(middle_winners, len(scores), middle, len(winners))
    by_chance = f"{expected:.1f} by chance (p = {chance:.2f})"
    return f"{text}; {middle_winners} of the {len(winners)} from the middle third, {by_chance}"


def _hypergeometric_tail(successes: int, layers: int, middle: int, winners: int) -> float:
    """Hypergeometric P(X >= successes) of middle layers among the winners of a random draw without replacement."""
    ways = sum(math.comb(middle, k) * math.comb(layers - middle, winners - k) for k in range(successes, winners + 1))
    return ways / math.comb(layers, winners)


def router_text(load: Mapping[str, Sequence[float]]) -> str:
    """Range of the token shares of a mixture's experts, over all linears."""
    shares = [share for expert_shares in load.values() for share in expert_shares]
    if not shares:
        return ""
    even = 1.0 / len(next(iter(load.values())))
    return f"{min(shares):.0%} to {max(shares):.0%} of the tokens an expert; even would be {even:.0%}"


def contamination_text(result: ContaminationResult) -> dict[str, str]:
    """Test items that occur in the training rows; per tier the scores without them, and an example."""
    if result.unknown is not None:
        return {"seen in training": f"unknown: {result.unknown}"}
    counts = ", ".join(f"{name} {tier.items:,}" for name, tier in result.tiers.items())
    lines = {"seen in training": f"{counts} of {result.items:,} questions, in {result.train_rows:,} rows"}
    for name, tier in result.tiers.items():
        if tier.items:
            scores = ", ".join(f"{m} {format_estimate(score)}" for m, score in (tier.scores_without or {}).items())
            first = tier.examples[0]
            text = str(first.get("matched") or first.get("text") or "")
            example = f"{first['held_out']} is {first['train']}" + (f": {_truncated(text)}" if text else "")
            lines[f"without {name}"] = f"{scores or 'nothing is left'}\n{example}"
    return lines


def _truncated(text: str, width: int = 80) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def measured_text(value: Any) -> str:
    """A gate's measurement or limit as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {measured_text(part)}" for key, part in value.items())
    if isinstance(value, float):
        return f"{value:.2g}"
    # bool is an int in Python
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def commands_after_climb(ladder: Ladder) -> list[str]:
    """Next commands for the verdict, each with its reason."""
    verdict, commands = ladder.verdict, []
    if needed := verdict.examples_needed:
        # another output folder: the larger test set would not match the finished rungs
        settings = f"evaluation.limit={needed} output={shlex.quote(f'{ladder.folder}-{needed}')}"
        commands.append(f"rung climb CONFIG {settings}  # or a larger data.test: to settle it")
    if row := _tuned_row(ladder):
        quoted = shlex.quote(row.folder)
        commands.append(f"rung chat {quoted} --compare  # base and tuned side by side")
        # merging is only suggested for what the verdict recommends to serve
        if row.rung == verdict.recommended and row.kind in LOW_RANK_METHODS:
            commands.append(f"rung merge {quoted} {shlex.quote(ladder.folder + '-merged')}  # a plain model to serve")
    return commands


LOSS_UNITS = {
    "preference": "of a pair or an answer",
    "reward": "nats of a pair",
    "grpo": "of an answer; validation is minus the mean reward",
    "ppo": "of a token; validation is minus the mean reward",
}
"""Unit of a loss by objective; nats per token for all others."""


PLOTTED_KEYS = {
    "preference": ("loss", "accuracy", "margin"),
    "reward": ("loss", "accuracy"),
    "grpo": ("reward", "kl", "all_right", "all_wrong"),
    "ppo": ("reward", "kl_answer", "value_loss"),
}
"""Logged numbers that show the progress of an objective; the loss for all others. The loss of a rollout says little."""


def logged_keys_shown(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the logged numbers to plot over the steps."""
    return PLOTTED_KEYS.get(str(config.get("objective", {}).get("kind")), ("loss",))


def loss_unit(config: Mapping[str, Any]) -> str:
    """Unit of the losses of a run."""
    return LOSS_UNITS.get(str(config.get("objective", {}).get("kind")), "nats per token")


def cut_off_text(shares: Mapping[str, float]) -> str:
    """Rungs with answers that were cut, as one line; empty where none were."""
    cut_rungs = [f"{rung} {share:.0%}" for rung, share in shares.items() if share]
    return f"answers cut at evaluation.max_new_tokens: {', '.join(cut_rungs)}" if cut_rungs else ""


def commands_after_run(run: RunResult, output: str) -> list[str]:
    """Next commands for the state of a run, each with its reason."""
    quoted = shlex.quote(output)
    if run.status == "no_signal":
        return ["rung train CONFIG --overwrite  # starts anew, with other prompts or another reward"]
    if run.status != "finished":
        return ["rung train CONFIG --resume  # continues from the last checkpoint, with the same config"]
    if run.config.get("objective", {}).get("kind") == "reward":
        return [f"rung eval {quoted}  # what it is worth on held-out pairs"]
    score = [] if "scores" in run.metrics else [f"rung eval {quoted}  # its score on held-out questions"]
    return [*score, f"rung chat {quoted} --compare  # base and tuned side by side"]


def artifact_folder(run: RunResult, output: str) -> str:
    """Folder of the tuned weights."""
    kind = run.config.get("method", {}).get("kind")
    return str(Path(output) / ("model" if kind in BASE_CHANGING_METHODS else "adapter"))


def _tuned_row(ladder: Ladder) -> LadderRow | None:
    """The run for `rung chat`: the recommended rung, the best one, or the tuned rung with the highest score."""
    # the verdict may favor an untuned rung, but only a tuned one can be compared with its base
    tuned = [row for row in ladder.rows if row.kind not in UNTUNED]
    for name in (ladder.verdict.recommended, ladder.verdict.best):
        if row := next((row for row in tuned if row.rung == name), None):
            return row
    sign = -1 if ladder.metric == PERPLEXITY else 1
    return max(tuned, key=lambda row: sign * row.scores[ladder.metric].mean, default=None)


def _rung_note(label: str, verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    if label == (verdict.recommended or verdict.safe):
        return "recommended" if verdict.recommended else "safe"
    return "best" if label == verdict.best else ""


def _score(estimate: Estimate | None, digits: int) -> Cell:
    return Cell(format_fixed(estimate.mean, digits), format_bounds(estimate, digits)) if estimate else Cell(MISSING)


def _gain(estimate: Estimate | None, digits: int, corrected: float | None, *, lower_is_better: bool) -> Cell:
    if estimate is None:
        return Cell(MISSING)
    # a color is a claim, and the steps of a ladder make several: the corrected p-value decides where there is one
    is_sure = estimate.excludes_zero and (corrected is None or corrected <= 0.05)
    tone = ("bad" if (estimate.low > 0) == lower_is_better else "good") if is_sure else ""
    mean = format_fixed(estimate.mean, digits, signed=True)
    return Cell(mean, format_bounds(estimate, digits), format_p_value(corrected), tone)


@dataclass(frozen=True, slots=True)
class ClassTable:
    """Scores of chosen labels of one rung, as text."""

    rung: str
    overview: tuple[str, ...]
    """Accuracy, macro-F1, log-loss, calibration error, and accuracy of the surest 50, 80 and 90 %."""
    classes: tuple[tuple[str, ...], ...]
    """Label, examples, precision, recall and F1 of each label."""
    matrix: tuple[tuple[str, tuple[int, ...]], ...]
    """Expected label, and items by answered label in the same order; empty where there are many labels."""
    confusions: tuple[tuple[str, str, int], ...]
    """The most frequent confusions, where there are many labels."""


MATRIX_LABELS = 12
"""Labels of which a matrix fits a page."""
SHOWN_CONFUSIONS = 20


def class_lines(found: Classification) -> dict[str, str]:
    """Scores of chosen labels by name."""
    coverage = ", ".join(f"{value:.2f} of the surest {float(share):.0%}" for share, value in _partial_coverage(found))
    return {
        "macro-F1": format_estimate(found.macro_f1),
        "log-loss": f"{format_estimate(found.log_loss)} nats",
        "calibration error": f"{found.calibration_error:.3f}",
        "accuracy": coverage,
    }


def class_table(rung: str, found: Classification) -> ClassTable:
    """The tables of a rung that chose among labels."""
    scores = [format_estimate(e) for e in (found.accuracy, found.macro_f1, found.log_loss)]
    coverage = [f"{value:.2f}" for _, value in _partial_coverage(found)]
    classes = [
        (c.label, f"{c.examples:,}", f"{c.precision:.2f}", f"{c.recall:.2f}", f"{c.f1:.2f}") for c in found.classes
    ]
    labels = [c.label for c in found.classes]
    counts = {(c.expected, c.answered): c.examples for c in found.confusions}
    counts |= {(c.label, c.label): round(c.recall * c.examples) for c in found.classes}
    matrix: list[tuple[str, tuple[int, ...]]] = []
    if len(labels) <= MATRIX_LABELS:
        matrix = [(label, tuple(counts.get((label, answered), 0) for answered in labels)) for label in labels]
    confusions = [] if matrix else [(c.expected, c.answered, c.examples) for c in found.confusions[:SHOWN_CONFUSIONS]]
    overview = (*scores, f"{found.calibration_error:.3f}", *coverage)
    return ClassTable(rung, overview, tuple(classes), tuple(matrix), tuple(confusions))


def _partial_coverage(found: Classification) -> list[tuple[float, float]]:
    return [(float(share), value) for share, value in found.accuracy_at_coverage.items() if float(share) < 1]


def harness_rows(scores: Sequence[HarnessScore]) -> list[tuple[str, ...]]:
    """Task, metric, score with its standard error, items, worked examples and form of the prompts, a row each."""
    rows: list[tuple[str, ...]] = []
    for score in scores:
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        if score.higher_is_better is False:
            metric += ", lower is better"
        error = "" if score.standard_error is None else f" ± {format_significant(score.standard_error)}"
        items = "" if score.examples is None else f"{score.examples:,}"
        items += "" if score.limit is None else f" (--limit {score.limit:,})"
        shots = "" if score.shots is None else f"{score.shots:,}"
        form = "chat turns" if score.uses_chat_template else "plain text"
        rows.append((score.task, metric, f"{score.value:.4f}{error}", items.strip(), shots, form))
    return rows
