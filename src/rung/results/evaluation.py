"""Scores: of a task, of two systems, of a judge, of public tasks, and what a run forgets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rung.results.base import Estimate, Result
from rung.results.data import ContaminationResult


class RetrievalResult(Result):
    """How often retrieval found the right passage, and over what it searched."""

    hit_rate: Estimate
    hits: int
    without_passages: int
    """Questions that share no word with any passage."""
    judged_by_context: int = 0
    judged_by_answer: int = 0
    seconds_per_query: float | None = None
    top_k: int = 0
    passages: int = 0
    documents: int = 0
    documents_path: str | None = Field(None, alias="from")
    """Where the documents come from; None for the contexts of the data."""
    chunk_words: int = 0
    overlap: int = 0
    empty_documents: int = 0
    duplicate_passages: int = 0


class RewardModelHealth(Result):
    """Health of a reward model on held-out pairs."""

    pairs: int
    """Pairs of which the label prefers one answer: all but those with a probability of 0.5."""
    accuracy: Estimate
    """Share of pairs whose better answer scores higher; a tie counts half."""
    longer: float
    """Accuracy of always preferring the longer answer; equal lengths count half."""
    calibration_error: float
    """Mean distance of predicted and observed accuracy over bins (Naeini et al. 2015), sigmoid(|r_w - r_l|)."""
    length_correlation: float = 0.0
    """Spearman's rank correlation of score and answer length over all answers."""
    spread: float = 0.0
    """Standard deviation of the scores."""
    verdict: Literal["healthy", "length", "unproven", "broken"]
    reason: str

    def __str__(self) -> str:
        a = self.accuracy
        return (
            f"reward model: {self.verdict} ({self.reason}); {a.mean:.2f} [{a.low:.2f}, {a.high:.2f}] of {self.pairs}"
            f" held-out pairs right, {self.longer:.2f} by length alone, calibration error {self.calibration_error:.2f},"
            f" rank correlation with length {self.length_correlation:+.2f}"
        )


class HarnessScore(Result):
    """A score of lm-evaluation-harness with its standard error."""

    task: str
    metric: str
    filter: str = "none"
    """How the harness reads an answer, where a task has several ways."""
    value: float
    standard_error: float | None = None
    """None where the harness has none for the metric."""
    examples: int | None = None
    shots: int | None = None
    """Worked examples in a prompt."""
    uses_chat_template: bool = False
    """Whether prompts were turns of a conversation."""
    limit: int | None = None
    """Items of each task at most, where `--limit` was given."""
    task_version: str = ""
    harness_version: str = ""
    higher_is_better: bool | None = None


class HarnessResult(Result):
    """A run or base on tasks of lm-evaluation-harness."""

    target: str
    scores: tuple[HarnessScore, ...]
    seconds: float = 0.0


class ClassScore(Result):
    """One label of a classification."""

    label: str
    examples: int
    """Items whose expected answer it is."""
    precision: float
    recall: float
    f1: float


class Confusion(Result):
    """Items of one label that were answered with another."""

    expected: str
    answered: str
    examples: int


class Classification(Result):
    """Scores of answers that were chosen among labels (`evaluation.choices`)."""

    labels: int
    """Labels that are expected or answered."""
    accuracy: Estimate
    macro_f1: Estimate
    """Mean F1 of the labels, each counting once."""
    log_loss: Estimate
    """Nats of the expected label among the labels."""
    calibration_error: float
    """Expected calibration error: mean distance of confidence and accuracy."""
    accuracy_at_coverage: dict[float, float]
    """Accuracy on the share of the items with the highest confidence, by share."""
    classes: tuple[ClassScore, ...]
    """The most frequent expected label first."""
    confusions: tuple[Confusion, ...] = ()
    """The most frequent first."""


class EvaluationResult(Result):
    """Scores of a run or a base on held-out questions; of a reward run, how well it orders held-out pairs."""

    target: str
    task: str
    server: dict[str, str] = {}
    """URL and model of the server that generated the answers; empty where this process did."""
    examples: int
    clusters: int | None = None
    scores: dict[str, Estimate] = {}
    """By metric; the first one decides."""
    prompt_tokens: float | None = None
    """Mean tokens of a prompt."""
    seconds_per_query: float | None = None
    cut_off: int = 0
    """Answers that were cut at `evaluation.max_new_tokens`."""
    retrieval: RetrievalResult | None = None
    classification: Classification | None = None
    """With `evaluation.choices`."""
    contamination: ContaminationResult | None = None
    """How many test items also stand in the training rows, and the scores without them."""
    reward: RewardModelHealth | None = None
    """Of a reward run: accuracy on pairs, calibration, and the verdict."""
    summary: str | None = None
    """Of a reward run: the same in words."""


class MetricComparison(Result):
    """One metric of two systems on the same items."""

    before: Estimate
    after: Estimate
    difference: Estimate
    """After minus before, paired."""
    detectable: float | None = None
    """The smallest true difference that these items would show with 80 % power."""


class JudgeAgreement(Result):
    """Agreement of a judge with people, and whether it is trusted."""

    trusted: bool
    reason: str
    pairs: int = 0
    """Labelled pairs with a majority and a readable verdict."""
    unreadable: int = 0
    undecided: int = 0
    """Pairs without a majority of people; excluded."""
    kappa: Estimate | None = None
    """Cohen's kappa of the judge and the majority of people."""
    agreement: Estimate | None = None
    """Share of pairs on which they agree."""
    people: Estimate | None = None
    """Krippendorff's alpha among the people, a practical upper limit for a judge. None with one label per pair."""


class Preference(Result):
    """Which answers a judge prefers, over all pairs. Shares are None where no pair counts for them."""

    pairs: int
    unreadable: int
    """Pairs without a readable verdict in one of the orders; excluded from everything below."""
    wins: int
    ties: int
    losses: int
    win_rate: Estimate | None
    """Share of pairs in which the first answer is preferred; a tie counts half."""
    length_controlled: Estimate | None
    """The win rate for answers of equal length, see `scoring.pairwise.length_controlled`."""
    consistent: Estimate | None
    """Share of pairs with the same verdict in both orders."""
    shown_first: Estimate | None
    """Share of single verdicts, without ties, for the answer shown first: 0.5 without position bias."""
    longer: Estimate | None
    """Share of preferences for the longer answer, of pairs with different lengths: 0.5 without length bias."""
    characters: tuple[float, float]
    """Mean lengths of the first and of the second answers."""


class JudgeResult(Preference):
    """Which of two systems a judge prefers; the target's answer is the first of a pair."""

    model: str
    trust: JudgeAgreement


class ComparisonResult(Result):
    """Two systems on the same questions: target minus baseline."""

    target: str
    baseline: str
    task: str
    metrics: dict[str, MetricComparison]
    examples: int
    clusters: int
    judge: JudgeResult | None = None
    """Which answers a judge prefers, and whether the judge agrees with people."""


class ForgettingComparison(Result):
    """A run against its own base on data that it did not learn from: run minus base."""

    target: str
    forgetting: str
    """The data file or config."""
    metrics: dict[str, MetricComparison]
    examples: int
    clusters: int
    dropped: int = 0
    """Texts longer than the model's context, which were left out."""


class GenerationResult(Result):
    """Answers that were sampled and written to a file, one row for each prompt."""

    output: str
    prompts: int
    answers: int
    """Answers written."""
    sampled: int
    """Answers sampled, before equal ones and prompts without a comparison were left out."""
    cut: int
    """Answers that reached no stop."""
    nothing_to_compare: int
    """Prompts left out because all their answers have the same score."""
    means: dict[str, float]
