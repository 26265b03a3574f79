"""The result of labels as lines for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from rung.console import add_text_row
from rung.report.formatting import decimals, empty_table, format_duration, format_estimate, render_lines
from rung.results.base import Estimate
from rung.results.labels import LabelResult, PersonResult, SystemStrength

SHOWN_DISAGREEMENTS = 5
SHOWN_PEOPLE = 20


def label_lines(result: LabelResult) -> list[str]:
    """Counts, people, agreement, systems and disagreements."""
    people = len(result.people)
    who = f"{people} {'person' if people == 1 else 'people'}"
    lines = [f"{result.kind}: {result.votes:,} votes of {who} on {result.tasks:,} tasks"]
    if result.gold + result.undecided:
        lines[0] += (
            f"; of {result.gold + result.undecided:,} that two people or more judged, {result.gold:,} have a majority"
        )
    if result.alpha is not None:
        name = "interval alpha" if result.kind == "rate" else "alpha"
        lines.append(f"agreement: Krippendorff's {name} {_agreement(result.alpha)}")
    kappa = "weighted kappa" if result.kind == "rate" else "kappa"
    lines += [f"  {pair.first} and {pair.second}: {kappa} {_agreement(pair.kappa)}" for pair in result.pairs]
    if result.both_bad:
        lines.append(f"no answer is good: {result.both_bad:,} votes")
    if result.names_models:
        lines.append(f"not blind: {result.names_models:,} items have an answer that names a model")
    lines += ["", *render_lines(lambda _: [_people(result.people[:SHOWN_PEOPLE])])]
    if len(result.people) > SHOWN_PEOPLE:
        lines.append(f"and {len(result.people) - SHOWN_PEOPLE:,} people more: --json has all")
    if result.systems:
        lines += ["", *render_lines(lambda _: [_systems(result.systems)])]
    if result.unconnected:
        groups = "; ".join(", ".join(group) for group in result.unconnected)
        lines.append(f"no strengths: no comparison connects these groups of systems: {groups}")
    if result.disagreements:
        lines += ["", f"people disagree on {len(result.disagreements):,}, for example:"]
        lines += [
            f"  {_clip(each.question)}: {_votes(each.votes)}" for each in result.disagreements[:SHOWN_DISAGREEMENTS]
        ]
    if result.output is not None:
        lines += ["", f"{result.exported:,} rows in {result.output}"]
    return lines


def _people(people: Sequence[PersonResult]) -> Table:
    heads = ["person", "votes", "skip-\nped", "open", "time\na vote", "consistent\n[95 %]", "prefers the\nfirst shown"]
    table = empty_table(heads, 1)
    for person in people:
        counts = [f"{person.votes:,}", f"{person.skipped:,}", f"{person.open:,}"]
        shares = [_share(person.consistency), _share(person.shown_first)]
        add_text_row(table, person.name, *counts, format_duration(person.seconds) if person.seconds else "", *shares)
    return table


def _systems(systems: Sequence[SystemStrength]) -> Table:
    has_scores = any(system.mean_score for system in systems)
    heads = [
        "system",
        "compared\npairs",
        "wins\n[95 %]",
        "strength\n(log-odds)",
        *(["mean\nscore"] if has_scores else []),
    ]
    table = empty_table(heads, 1)
    digits = decimals([system.strength for system in systems])
    for system in systems:
        strength = format_estimate(system.strength, digits, signed=True) if system.strength else ""
        cells = [f"{system.comparisons:,}", _share(system.win_rate), strength]
        score = [format_estimate(system.mean_score) if system.mean_score else ""] if has_scores else []
        add_text_row(table, system.system, *cells, *score)
    return table


def _agreement(estimate: Estimate) -> str:
    return estimate.method if math.isnan(estimate.mean) else format_estimate(estimate, 2)


def _share(estimate: Estimate | None) -> str:
    return format_estimate(estimate, 2) if estimate else ""


def _votes(votes: dict[str, str]) -> str:
    return ", ".join(f"{person} {vote}" for person, vote in votes.items())


def _clip(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"
