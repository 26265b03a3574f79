"""Which of several sampled answers is the best: by a verifier, a reward model, or a judge in both orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from rung.commands.judge import judge_pairs
from rung.config.judge import JudgeConfig
from rung.config.objective import ModelRewardConfig
from rung.config.synth import TeachConfig
from rung.data.tokenize import tokenize_records
from rung.errors import ConfigError, PlanError
from rung.evaluation.judge import AnswerPair
from rung.evaluation.reward_model import RewardScorer
from rung.planning.memory import tokens_per_micro_batch
from rung.results import JudgeAgreement
from rung.runs.load import open_reward_model
from rung.scoring.verifiers import make_verifier, needs_expected_answer
from rung.types import Message, Record, Source


class AnsweredQuestion(NamedTuple):
    """A question with sampled answers, of which those that a filter left out are not among `answers`."""

    turns: tuple[Message, ...]
    context: str | None
    expected: str
    """The answer of a seed; empty for a made question."""
    answers: Sequence[str]
    source: str


ScoreAnswers = Callable[[Sequence[AnsweredQuestion]], list[list[float]]]
"""Scores of the answers of each question, higher is better."""


def answer_scorer(config: TeachConfig, trust: list[JudgeAgreement]) -> ScoreAnswers | None:
    """What scores answers; None without verifier and judge. The agreement of a judge goes into `trust`.

    Raises `ConfigError` for a verifier that compares with expected answers where questions are made.
    """
    if config.selection.verifier is None:
        return None if config.selection.judge is None else _judge_scorer(config.selection.judge, trust)
    if isinstance(config.selection.verifier, ModelRewardConfig):
        return _reward_scorer(Path(config.selection.verifier.run))
    if config.questions == "made" and needs_expected_answer(config.selection.verifier):
        summary = "this verifier compares with expected answers, and made questions have none"
        hint = "take questions: seeds, a function, a pattern or a reward run"
        raise ConfigError(summary, where="synth.selection.verifier", given=config.selection.verifier.kind, hint=hint)
    verifier = make_verifier(config.selection.verifier)

    def score(questions: Sequence[AnsweredQuestion]) -> list[list[float]]:
        return [[verifier(answer, _verifier_row(question)) for answer in question.answers] for question in questions]

    return score


def _verifier_row(question: AnsweredQuestion) -> dict[str, Any]:
    """The row as `scoring.verifiers` describes it."""
    texts = {"question": question.turns[-1].content, "expected": question.expected, "context": question.context}
    missing = {"references": (), "task": None, "group": None, "reasoning": "", "expects_calls": False, "calls": None}
    return {**texts, **missing, "source": question.source}


def _reward_scorer(run: Path) -> ScoreAnswers:
    """Scores of a reward run, in its own tokens."""
    policy, chat, objective, _ = open_reward_model(run)
    scorer, budget = RewardScorer(policy, objective), tokens_per_micro_batch(policy.base.shape, policy.device.type)

    def score(questions: Sequence[AnsweredQuestion]) -> list[list[float]]:
        records = [
            Record((*q.turns, Message("assistant", answer)), Source(q.source, 1), q.context)
            for q in questions
            for answer in q.answers
        ]
        examples = tokenize_records(chat, records, max_length=policy.base.context).examples if records else ()
        values = iter(scorer(list(examples), budget))
        return [[next(values) for _ in q.answers] for q in questions]

    return score


def _judge_scorer(config: JudgeConfig, trust: list[JudgeAgreement]) -> ScoreAnswers:
    """Share of the comparisons that an answer wins, a tie counts half: every pair is compared in both orders."""

    def score(questions: Sequence[AnsweredQuestion]) -> list[list[float]]:
        places = [(i, a, b) for i, q in enumerate(questions) for a, b in combinations(range(len(q.answers)), 2)]
        pairs = [
            AnswerPair(
                questions[i].turns[-1].content,
                questions[i].answers[a],
                questions[i].answers[b],
                questions[i].source,
                questions[i].context,
            )
            for i, a, b in places
        ]
        wins = [[0.0] * len(q.answers) for q in questions]
        if not pairs:
            return wins
        judgement = judge_pairs(config, pairs)
        trust[:] = [judgement.result.trust]
        for (i, a, b), judged in zip(places, judgement.judged_pairs, strict=True):
            outcome = judged.verdicts.outcome
            wins[i][a] += {"first": 1.0, "tie": 0.5}.get(str(outcome), 0.0)
            wins[i][b] += {"second": 1.0, "tie": 0.5}.get(str(outcome), 0.0)
        return [[w / max(1, len(scores) - 1) for w in scores] for scores in wins]

    return score


def require_usable_judge(config: TeachConfig) -> None:
    """Raise `PlanError` for a judge whose agreement with people cannot be measured: it would decide unseen."""
    if config.selection.judge is not None and config.selection.judge.human_labels is None:
        summary = "a judge chooses among answers only after its agreement with people was measured"
        hint = "name pairs that people labeled in synth.selection.judge.human_labels"
        raise PlanError(summary, where="synth.selection.judge", hint=hint)
