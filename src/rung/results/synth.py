"""Data that a model wrote: what became of it, and what it cost."""

from __future__ import annotations

from typing import Any

from rung.results.base import Estimate, Result
from rung.results.evaluation import JudgeAgreement


class SynthCost(Result):
    """What the model that wrote was asked."""

    requests: int
    failed: int
    prompt_tokens: int
    answer_tokens: int
    uncounted: int
    """Replies of a server that does not count tokens."""
    seconds: float
    """Times of all requests together."""
    money: float | None = None
    """In the currency of `synth.teacher.price`; None without a price, and where a server counts no tokens."""


class SynthResult(Result):
    """Rows that a model wrote, what the filters left out, and the cost."""

    output: str
    rows: int
    wanted: int | None = None
    """Rows that were asked for; None where every seed was answered."""
    tried: int
    """Questions that were tried."""
    rejected: dict[str, int]
    """Questions that each filter left out."""
    cost: SynthCost
    diversity: float
    """Distinct word bigrams over all bigrams of the first `compared_questions` (Li et al. 2016, distinct-2)."""
    compared_questions: int
    diversity_of_seeds: float | None = None
    """Of equally many seeds."""
    judge: JudgeAgreement | None = None


class CriticAgreement(Result):
    """Agreement of the critic of a constitution with people, and whether it is trusted."""

    trusted: bool
    reason: str
    pairs: int = 0
    """Labeled pairs with a majority for one answer."""
    unreadable: int = 0
    """Of these, pairs without a verdict by some rule in some order, which counts as no preference."""
    by_rule: dict[str, float] = {}
    """Share of the pairs in which the critic agrees by one rule alone; labels may be about another rule."""
    agreement: Estimate | None = None
    """Share of these pairs in which the critic prefers what people prefer; 0.5 is chance."""
    shown_first: float | None = None
    """Mean probability of the answer that is shown first: 0.5 without position bias."""


class RevisionRound(Result):
    """What became of the answers in one round of revisions."""

    number: int
    revised: int
    """Answers that changed."""
    unchanged: int
    """Revisions that equal the answer before them; they add no row."""
    refusing: float
    """Share of the answers after the round that decline; of round 0, of the first answers."""
    words: float
    """Mean words of the answers after the round."""


class ConstitutionResult(Result):
    """Rows by a constitution, what was left out, and what its critic is worth."""

    output: str
    makes: str
    rows: int
    helpful: int = 0
    """Rows that were added unrevised, among `rows`."""
    seeds: int
    """Questions that were asked."""
    rejected: dict[str, int]
    """Answers or pairs that each filter left out."""
    rounds: tuple[RevisionRound, ...] = ()
    """Of revisions, from round 0: the first answers."""
    probability: float | None = None
    """Of preferences: mean probability that the chosen answer is the better one."""
    shown_first: float | None = None
    """Of preferences: mean probability of the answer that is shown first: 0.5 without position bias."""
    consistent: float | None = None
    """Of preferences: share of pairs with the same preference in both orders."""
    critic: CriticAgreement | None = None
    """None where no labels of people were given."""
    costs: dict[str, SynthCost]
    """Of the teacher and of the critic."""


class ImproveRound(Result):
    """What a round's model does on the validation split."""

    number: int
    """0: the model that everything began with."""
    pass_at: dict[int, Estimate]
    """pass@k by k: the probability that at least one of k sampled answers is accepted (Chen et al. 2021, eq. 1)."""
    gain: Estimate | None = None
    """pass@1 minus that of the round before, paired by question; None for round 0."""
    all_right: float
    """Share of the questions of which every sampled answer is accepted: they teach nothing more."""
    all_wrong: float
    """Share of the questions without an accepted answer."""
    distinct: float
    """Distinct answers over all answers."""
    rows: int = 0
    """Accepted answers that the round trained on."""
    questions_with_rows: int = 0
    train_seconds: float = 0.0


class ImproveResult(Result):
    """Rounds of a model that learned from its own accepted answers."""

    output: str
    """Run of the best round, or the model that everything began with."""
    rounds: tuple[ImproveRound, ...]
    best: int
    """Number of the round with the highest pass@1 on the validation split."""
    reason: str
    """Why there was no further round."""
    test: dict[str, Any] | None = None
    """pass@k of the first and of the best model on the test split, and their paired difference; None without one."""
    judge: JudgeAgreement | None = None
    """Agreement with people of the judge that accepted the answers; None without a judge."""
