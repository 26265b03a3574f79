"""A climb: its rungs, the verdict and what it found."""

from __future__ import annotations

from typing import Literal

from rung.results.base import Estimate, Result
from rung.results.evaluation import Classification, MetricComparison, RetrievalResult
from rung.results.labels import SystemStrength


class RungVerdict(Result):
    """One rung against the best one."""

    name: str
    score: Estimate
    difference: Estimate
    """This rung minus the best, in points of the metric; all zeros for the best itself."""
    reason: Literal["best", "reaches target", "within margin", "worse", "cannot tell"]
    enough: bool
    """Whether no higher rung is needed."""
    examples_needed: int | None
    """Approximate test items for a decision, if this test set cannot tell; None if it can or no number would."""


class LadderStep(Result):
    """One rung against the one below it."""

    lower: str
    upper: str
    difference: Estimate
    """Upper minus lower, in points of the metric, with its uncorrected p-value."""
    p_holm: float
    """The p-value corrected for all steps of the ladder (Holm 1979)."""
    differs: bool
    """Whether the difference is significant after correction for all steps."""
    detectable: float | None
    """The smallest true difference that these items detect with 80 % power; None if unknown."""


class Verdict(Result):
    """The conclusion from a ladder."""

    recommended: str | None
    """The lowest rung that is enough; None if a lower rung is undecided."""
    safe: str | None
    """The lowest rung that is surely enough, even if a lower one might be too."""
    best: str
    rungs: tuple[RungVerdict, ...] = ()
    examples_needed: int | None = None
    """Approximate test items for a decision, if this test set cannot tell."""
    text: str
    steps: tuple[LadderStep, ...] = ()
    """Each rung against the one below it, lowest first."""


class InstructionResult(Result):
    """An instruction with its scores on the validation split."""

    instruction: str | None
    scores: dict[str, Estimate]


class LadderRow(Result):
    """One rung. Times and tokens of several training seeds are means, memory and disk maxima."""

    rung: str = ""
    kind: str = ""
    model: str = ""
    """The base, where the ladder has several."""
    sees: str = ""
    """Content of the prompt besides the question."""
    cut_off: float = 0.0
    """Share of the answers that were cut at `evaluation.max_new_tokens`."""
    scores: dict[str, Estimate] = {}
    human: Estimate | None = None
    """With `evaluation.human`: share of its comparisons that people decide for this rung, a tie half."""
    gain: Estimate | None = None
    """Paired difference to the rung below, in points of the deciding metric; None for the lowest."""
    trainable_parameters: int | None = None
    train_seconds: float | None = None
    """Includes the trials of a search."""
    peak_memory_bytes: int | None = None
    prompt_tokens: float | None = None
    seconds_per_query: float | None = None
    """Retrieval and answer together."""
    folder: str = ""
    disk_bytes: int = 0
    """Size of the saved adapter or model."""
    classification: Classification | None = None
    """With `evaluation.choices`; of several training seeds that of the first."""
    retrieval: RetrievalResult | None = None
    """Hit rate and source of the passages, if any were retrieved."""
    instruction: str | None = None
    """System turn of an untuned rung."""
    instructions: tuple[InstructionResult, ...] = ()
    """The candidates with their scores on the validation split, on the rung that chose the instruction."""


class LadderModel(Result):
    """One base of a ladder that has several: what it is, and what its rungs take."""

    model: str
    """The last part of its name, and settings in which it differs."""
    parameters: int
    license: str | None = None
    """From the list of known bases or the card in its folder or on the hub; None where neither names one."""
    rungs: tuple[str, ...]
    peak_memory_bytes: int
    """The largest of its rungs, training included."""
    prompt_tokens: tuple[float, float]
    """Fewest and most tokens of a prompt among its rungs, in tokens of its own."""
    seconds_per_query: tuple[float, float]
    """Least and most among its rungs."""


class SkippedRung(Result):
    """A rung that was not measured, and the reason."""

    rung: str
    why: str


class NextRung(Result):
    """What the rung right above the recommended one gains, and what it costs at every query and on disk."""

    rung: str
    above: str
    gain: Estimate
    """Paired difference, in points of the deciding metric."""
    seconds_per_query: float
    prompt_tokens: float
    disk_bytes: int
    train_seconds: float
    text: str
    """All of it in one line."""


class Diagnosis(Result):
    """What the model lacks, read from a sure difference between two rungs."""

    lacks: Literal["knowledge", "behaviour"]
    lower: str
    upper: str
    difference: Estimate
    text: str
    """All of it in one line."""


class ForgettingResult(Result):
    """Scores of a tuned rung on other data minus those of the model it started from."""

    rung: str
    data: str
    metrics: dict[str, MetricComparison]
    """For perplexity in nats per token."""
    text: str
    """All of it in one line."""


class CurvePoint(Result):
    """A point of the learning curve: the score of a tuned rung with fewer training rows."""

    rung: str
    rows: int
    score: Estimate
    train_seconds: float | None = None


class HumanPreference(Result):
    """What people prefer among the rungs of a ladder."""

    source: str
    """The labeling folder, or a file of labels."""
    people: int
    votes: int
    """Votes that compare answers which the rungs give now."""
    other_votes: int
    """Votes on answers that the rungs do not give any more; they do not count."""
    systems: tuple[SystemStrength, ...]
    """Rungs with a vote, best first."""
    conflicts: tuple[str, ...] = ()
    """Pairs of rungs that people surely order otherwise than the deciding metric, each as a sentence."""


class Ladder(Result):
    """The result of `rung climb`: the rungs from the lowest to the highest, and the verdict."""

    metric: str
    """The deciding metric."""
    examples: int
    clusters: int
    rows: tuple[LadderRow, ...]
    models: tuple[LadderModel, ...] = ()
    """The bases, where the ladder has several."""
    verdict: Verdict
    skipped_rungs: tuple[SkippedRung, ...] = ()
    next_rung: NextRung | None = None
    """None if the recommended rung is the highest, or none is recommended."""
    diagnoses: tuple[Diagnosis, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    forgetting: tuple[ForgettingResult, ...] = ()
    human: HumanPreference | None = None
    """With `evaluation.human`: people's preference beside the scores."""
    folder: str
    report: str
