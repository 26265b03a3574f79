"""What the page and the terminal both say: the rows of the ladder, what was trained, the gates, what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rung.config.climb import UNTUNED
from rung.config.method import BASE_CHANGING_METHODS
from rung.report.formatting import (
    MISSING,
    Json,
    decimals,
    format_bounds,
    format_bytes,
    format_count,
    format_duration,
    format_fixed,
    format_p_value,
    format_significant,
)
from rung.report.run_reader import PERPLEXITY

ALL_ROLES = {"q", "k", "v", "o", "gate", "up", "down"}
MERGED = ("lora", "qlora", "lottery")
"""Methods that `rung merge` folds into a base; the others are whole already, or cannot be."""


@dataclass(frozen=True, slots=True)
class Cell:
    """An estimate with its uncertainty, as text."""

    mean: str = ""
    bounds: str = ""
    p: str = ""
    tone: str = ""
    """good or bad where the interval excludes no change at all."""

    def __str__(self) -> str:
        return " ".join(part for part in (self.mean, self.bounds) if part)


@dataclass(frozen=True, slots=True)
class LadderRow:
    """One rung, ready to print."""

    rung: str
    note: str
    """recommended, safe or best; empty for the others."""
    sees: str
    scores: tuple[Cell, ...]
    gain: Cell
    trainable: str
    train: str
    memory: str
    tokens: str
    seconds: str


def ladder_rows(rows: Sequence[tuple[str, Json]], metrics: Sequence[str], verdict: Json | None) -> list[LadderRow]:
    """Rows of (label, measured) as text; the decimals of a column are those its least certain number can bear."""
    digits = {m: decimals(row.get("scores", {}).get(m) for _, row in rows) for m in metrics}
    gain_digits = decimals(row.get("gain") for _, row in rows)
    lower = metrics[0] == PERPLEXITY
    corrected = {step["upper"]: step["p_holm"] for step in (verdict or {}).get("steps", ())}
    return [
        LadderRow(
            label,
            _rung_note(label, verdict),
            row.get("sees", ""),
            tuple(_score(row.get("scores", {}).get(m), digits[m]) for m in metrics),
            _gain(row.get("gain"), gain_digits, corrected.get(label), lower_is_better=lower),
            format_count(row.get("trainable_parameters") or None),
            format_duration(row.get("train_seconds") or None),
            format_bytes(row.get("peak_memory_bytes")),
            _rounded(row.get("prompt_tokens")),
            _seconds(row.get("seconds_per_query")),
        )
        for label, row in rows
    ]


def retrieved_text(found: Json) -> str:
    """How often the right passage was retrieved."""
    rate, digits = found["hit_rate"], decimals([found["hit_rate"]])
    interval = f"{format_fixed(rate['mean'], digits)} {format_bounds(rate, digits)}"
    text = f"{interval}, {found['hits']:,} of {rate['examples']:,} questions"
    if missed := found["without_passages"]:
        text += f"; {missed:,} share no word with any"
    return text


@dataclass(frozen=True, slots=True)
class TriedInstruction:
    """An instruction and what it scored on the validation split."""

    text: str
    scores: tuple[Cell, ...]
    chosen: bool


def tried_instructions(found: Sequence[Json], metrics: Sequence[str], chosen: str | None) -> list[TriedInstruction]:
    """Instructions as rows of a table."""
    digits = {m: decimals(one["scores"].get(m) for one in found) for m in metrics}
    return [
        TriedInstruction(
            one["instruction"],
            tuple(_score(one["scores"].get(m), digits[m]) for m in metrics),
            one["instruction"] == chosen,
        )
        for one in found
    ]


def gain_unit(metrics: Sequence[str]) -> str:
    """What a gain is counted in."""
    return "nats per token, below 0 is better" if metrics[0] == PERPLEXITY else "points of the score"


def method_text(method: Json) -> str:
    """A method in words."""
    kind = str(method.get("kind", ""))
    if kind == "full":
        return "full: every weight"
    if kind == "head":
        return "head: the output head alone"
    if kind in ("lora", "qlora", "lottery"):
        return _lora_text(method)
    layers = _layers_text(method.get("layers"))
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
    places = {place: count for place, count in (method.get("positions") or {}).items() if count}
    inside = ", ".join(f"{count} {'in front' if at == 'front' else f'before the {at}'}" for at, count in places.items())
    return f"{method.get('virtual_tokens')} virtual tokens{inside and f' ({inside})'}"


def _lora_text(method: Json) -> str:
    targets, rank = method.get("targets") or (), method.get("rank") or 0
    ranks, init, ratio = method.get("ranks") or {}, method.get("init", "default"), method.get("loraplus_lr_ratio", 1.0)
    sampled = method.get("lisa_n_layers")
    names = {
        "qlora": f"QLoRA on {method.get('bits')} bits,",
        "lottery": f"LoRA on the {method.get('lottery', {}).get('choose')} layers,",
    }
    parts = [
        f"{names.get(str(method.get('kind')), 'LoRA')} rank {rank}, alpha {method.get('alpha') or 2 * rank:g}",
        ", ".join(f"{place}: {own}" for place, own in ranks.items()),
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


def gates_text(gates: Sequence[Json]) -> str:
    """All gates in one line; those that did not pass by name."""
    states: dict[str, list[str]] = {"failed": [], "not_reached": [], "passed": []}
    for gate in gates:
        states.setdefault(gate["state"], []).append(gate["name"])
    parts = [f"{len(states['passed'])} passed"] if states["passed"] else []
    for state in ("failed", "not_reached"):
        if states[state]:
            parts.insert(
                0 if state == "failed" else len(parts), f"{', '.join(states[state])} {state.replace('_', ' ')}"
            )
    return ", ".join(parts) or "none reached"


def reward_text(found: Mapping[str, Any]) -> str:
    """What a reward model was found to be worth on validation pairs."""
    if not found:
        return ""
    a = found["accuracy"]
    right = f"{a['mean']:.2f} [{a['low']:.2f}, {a['high']:.2f}] of {found['pairs']:,} pairs right"
    known = f"{found['longer']:.2f} by length alone, calibration error {found['calibration_error']:.2f}"
    return f"{found['verdict']}: {found['reason']}; {right}, {known}"


LENGTH_RATIO, LENGTH_CORRELATION = 1.5, 0.5
"""From which on a report warns that preferences may be about length."""


def preferred_text(log: Sequence[Json]) -> str:
    """How a preference run did on its validation pairs, from the last time they were measured."""
    found = next((e for e in reversed(log) if "validation_margin" in e), None)
    if found is None:
        return ""
    parts = [f"margin {found['validation_margin']:+.3f}"]
    if "validation_accuracy" in found:
        lengths = f"margin goes with length by {found['validation_length_correlation']:+.2f}"
        parts = [f"{found['validation_accuracy']:.0%} the right way round", *parts, lengths]
        ratio = found.get("validation_length_ratio", 1.0)
        if ratio >= LENGTH_RATIO or found["validation_length_correlation"] >= LENGTH_CORRELATION:
            longer = f"better answers are {ratio:.1f} times as long, " if ratio > 1.0 else ""
            parts.append(f"beware: {longer}length alone may be learned")
    return ", ".join(parts)


def lottery_text(found: Mapping[str, Any]) -> str:
    """Which layers went on, what each third of the model scored, and whether its middle won beyond chance."""
    if not found:
        return ""
    scores, winners = {int(n): score for n, score in found["scores"].items()}, found["winners"]
    names = ("first", "middle", "last")
    third = {n: names[3 * n // found["of_layers"]] for n in scores}
    shares = ", ".join(f"{name} third {sum(s for n, s in scores.items() if third[n] == name):.0%}" for name in names)
    text = f"layers {', '.join(map(str, winners))} went on; scores: {shares}"
    if found["choose"] != "best":
        return f"{text}; chosen: {found['choose']}"
    middle, won = sum(name == "middle" for name in third.values()), sum(third[n] == "middle" for n in winners)
    expected, chance = middle * len(winners) / len(scores), _at_least(won, len(scores), middle, len(winners))
    return f"{text}; {won} of the {len(winners)} from the middle third, {expected:.1f} by chance (p = {chance:.2f})"


def _at_least(found: int, layers: int, middle: int, drawn: int) -> float:
    """Probability that a random draw without replacement holds as many of the middle ones, or more (hypergeometric)."""
    ways = sum(math.comb(middle, k) * math.comb(layers - middle, drawn - k) for k in range(found, drawn + 1))
    return ways / math.comb(layers, drawn)


def router_text(load: Mapping[str, Sequence[float]]) -> str:
    """How evenly a mixture's router spread the tokens, over all linears."""
    shares = [share for own in load.values() for share in own]
    if not shares:
        return ""
    even = 1.0 / len(next(iter(load.values())))
    return f"{min(shares):.0%} to {max(shares):.0%} of the tokens an expert; even would be {even:.0%}"


def contamination_text(found: Json) -> dict[str, str]:
    """How many test items stand in the training rows; of each kind that has any the scores without, and an example."""
    if "unknown" in found:
        return {"seen in training": f"unknown: {found['unknown']}"}
    counts = ", ".join(f"{tier} {own['items']:,}" for tier, own in found["tiers"].items())
    lines = {"seen in training": f"{counts} of {found['items']:,} questions, in {found['train_rows']:,} rows"}
    for tier, own in found["tiers"].items():
        if own["items"]:
            left, first = own["scores_without"] or {}, own["examples"][0]
            scores = ", ".join(
                f"{name} {format_fixed(s['mean'], decimals([s]))} {format_bounds(s, decimals([s]))}"
                for name, s in left.items()
            )
            text = str(first.get("matched") or first.get("text") or "")
            named = f"{first['held_out']} is {first['train']}" + (f": {_short(text)}" if text else "")
            lines[f"without {tier}"] = f"{scores or 'nothing is left'}\n{named}"
    return lines


def _short(text: str, width: int = 80) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def measured_text(value: Any) -> str:
    """What a gate measured, or its limit."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {measured_text(part)}" for key, part in value.items())
    if isinstance(value, float):
        return f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def commands_after_climb(ladder: Json) -> list[str]:
    """Commands that fit the verdict, each followed by why."""
    verdict, commands = ladder["verdict"], []
    if needed := verdict.get("examples_needed"):
        name = shlex.quote(f"{ladder['folder']}-{needed}")
        commands.append(
            f"rung climb CONFIG evaluation.limit={needed} output={name}  # or a larger data.test: to settle it"
        )
    if tuned := _tuned_folder(ladder):
        quoted = shlex.quote(tuned)
        commands.append(f"rung chat {quoted} --compare  # base and tuned side by side")
        row = next(row for row in ladder["ladder"] if row["folder"] == tuned)
        if row["rung"] == verdict.get("recommended") and row["kind"] in MERGED:
            commands.append(
                f"rung merge {quoted} {shlex.quote(ladder['folder'] + '-merged')}  # a plain model to serve"
            )
    return commands


UNITS = {
    "preference": "of a pair or an answer",
    "reward": "nats of a pair",
    "grpo": "of an answer; validation is minus the mean reward",
    "ppo": "of a token; validation is minus the mean reward",
}
"""What a loss is counted in; nats per token unless said."""


SHOWN_KEYS = {
    "preference": ("loss", "accuracy", "margin"),
    "reward": ("loss", "accuracy"),
    "grpo": ("reward", "kl", "all_right", "all_wrong"),
    "ppo": ("reward", "kl_answer", "value_loss"),
}
"""What of the log shows how a run went; the loss unless said: that of a rollout says little."""


def logged_keys_shown(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of logged numbers to draw over the steps."""
    return SHOWN_KEYS.get(str(config.get("objective", {}).get("kind")), ("loss",))


def loss_unit(config: Mapping[str, Any]) -> str:
    """Of the losses of a run."""
    return UNITS.get(str(config.get("objective", {}).get("kind")), "nats per token")


def commands_after_run(manifest: Json, output: str) -> list[str]:
    """Commands that fit how a run ended, each followed by why."""
    quoted, status = shlex.quote(output), manifest.get("status")
    if status != "finished":
        return ["rung train CONFIG --resume  # goes on from its last checkpoint, with the same config"]
    if manifest.get("config", {}).get("objective", {}).get("kind") == "reward":
        return [f"rung eval {quoted}  # what it is worth on held-out pairs"]
    scored = "scores" in manifest.get("metrics", {})
    score = [] if scored else [f"rung eval {quoted}  # its score on held-out questions"]
    return [*score, f"rung chat {quoted} --compare  # base and tuned side by side"]


def artifact_folder(manifest: Json, output: str) -> str:
    """Where the tuned weights are."""
    kind = manifest.get("config", {}).get("method", {}).get("kind")
    return str(Path(output) / ("model" if kind in BASE_CHANGING_METHODS else "adapter"))


def _tuned_folder(ladder: Json) -> str | None:
    """The run to talk to: the recommended rung, the best one, or the highest of the tuned."""
    tuned = [row for row in ladder["ladder"] if row["kind"] not in UNTUNED]
    if not tuned:
        return None
    for name in (ladder["verdict"].get("recommended"), ladder["verdict"].get("best")):
        if found := next((row for row in tuned if row["rung"] == name), None):
            return str(found["folder"])
    sign = -1 if ladder["metric"] == PERPLEXITY else 1
    return str(max(tuned, key=lambda row: sign * row["scores"][ladder["metric"]]["mean"])["folder"])


def _rung_note(label: str, verdict: Json | None) -> str:
    if verdict is None:
        return ""
    if label == (verdict.get("recommended") or verdict.get("safe")):
        return "recommended" if verdict.get("recommended") else "safe"
    return "best" if label == verdict.get("best") else ""


def _score(estimate: Json | None, digits: int) -> Cell:
    return Cell(format_fixed(estimate["mean"], digits), format_bounds(estimate, digits)) if estimate else Cell(MISSING)


def _gain(estimate: Json | None, digits: int, corrected: float | None, *, lower_is_better: bool) -> Cell:
    if estimate is None:
        return Cell(MISSING)
    low, high = estimate.get("low"), estimate.get("high")
    up, down = low is not None and low > 0, high is not None and high < 0
    tone = ("bad" if up == lower_is_better else "good") if up or down else ""
    mean = format_fixed(estimate["mean"], digits, signed=True)
    return Cell(mean, format_bounds(estimate, digits), format_p_value(corrected), tone)


def _rounded(number: float | None) -> str:
    return MISSING if number is None else f"{number:,.0f}"


def _seconds(number: float | None) -> str:
    return MISSING if number is None else f"{format_significant(number)} s"
