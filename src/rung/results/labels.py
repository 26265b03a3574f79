"""What people said of answers: agreement, consistency and bias of people, and preferences between systems."""

from __future__ import annotations

from rung.results.base import Estimate, Result


class SystemStrength(Result):
    """How often people prefer the answers of a system."""

    system: str
    comparisons: int
    """Votes on a pair of answers of which one is this system's; equal answers of two systems count as a tie."""
    win_rate: Estimate
    """Share of its comparisons that the system wins; a tie counts half."""
    strength: Estimate | None = None
    """Of the Bradley-Terry model: log-odds against the mean of all systems. None where the comparisons do not connect
    all systems."""
    mean_score: Estimate | None = None
    """Of ratings: mean score of its answers."""


class PersonResult(Result):
    """One person."""

    name: str
    votes: int
    """Tasks with a vote, without those that were skipped; repeats count."""
    skipped: int
    open: int
    """Tasks without a vote."""
    seconds: float | None = None
    """Median time of a vote."""
    consistency: Estimate | None = None
    """Share of repeated tasks with the same vote both times; for rankings of pairs of answers. None without repeats."""
    shown_first: Estimate | None = None
    """Share of decided comparisons in which the answer shown first was preferred: 0.5 without position bias."""


class PairAgreement(Result):
    """Two people on the tasks that both voted on."""

    first: str
    second: str
    kappa: Estimate
    """Cohen's kappa; of ratings with quadratic weights."""
    agreement: Estimate
    """Share of equal votes."""


class Disagreement(Result):
    """An item on which people disagree."""

    item: str
    question: str
    answers: tuple[str, ...]
    """The two answers that were compared, or the one that was rated."""
    votes: dict[str, str]
    """What each person said, in words."""
    notes: dict[str, str] = {}


class LabelResult(Result):
    """All votes of a labeling folder, or of a file that another tool exported."""

    source: str
    kind: str
    """rank, compare, rate or correct."""
    items: int
    tasks: int
    """Tasks that at least one person voted on."""
    votes: int
    people: tuple[PersonResult, ...]
    gold: int
    """Comparisons (of `rate` answers) on which more than half of two people or more agree."""
    undecided: int
    """Comparisons that two people or more voted on without a majority."""
    alpha: Estimate | None = None
    """Krippendorff's alpha of all people; of ratings with the interval metric. None if no task has two votes."""
    pairs: tuple[PairAgreement, ...] = ()
    both_bad: int = 0
    """Votes that no answer is good enough."""
    systems: tuple[SystemStrength, ...] = ()
    """Best first; empty where the answers have no systems."""
    unconnected: tuple[tuple[str, ...], ...] = ()
    """Groups of systems that no comparison connects, where there are several."""
    disagreements: tuple[Disagreement, ...] = ()
    names_models: int = 0
    """Items with an answer that names a model, which is not blind."""
    exported: int | None = None
    """Rows that were written."""
    output: str | None = None
