"""Which of several sampled answers is the best: by a verifier, a reward model, or a judge in both orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from rung.commands.judge import judge_pairs
from rung.config.judge import JudgeConfig
from rung.config.objective import CodeRewardConfig, ModelRewardConfig, RewardSourceConfig
from rung.config.synth import TeachConfig
from rung.data.parsed_answer import ParsedAnswer
from rung.data.tokenize import tokenize_records
from rung.errors import ConfigError, DataError, PlanError
from rung.evaluation.judge import AnswerPair
from rung.evaluation.reward_model import RewardScorer
from rung.planning.memory import tokens_per_micro_batch
from rung.results import JudgeAgreement
from rung.runs.auxiliary_models import reward_row
from rung.runs.load import open_reward_model
from rung.scoring.verifiers import make_verifier, needs_expected_answer, verify_all
from rung.types import Message, Record


class AnsweredQuestion(NamedTuple):
    """A row and sampled answers to its question."""

    record: Record
    """The row; a made question has an empty answer."""
    answers: Sequence[str]


ScoreAnswers = Callable[[Sequence[AnsweredQuestion]], list[list[float]]]
"""Scores of the answers of each question, higher is better."""


def answer_scorer(config: TeachConfig) -> tuple[ScoreAnswers | None, JudgeAgreement | None]:
    """What scores answers, None without verifier and judge; and the agreement with people of a judge.

    Raises `ConfigError` for a verifier that reads what made questions do not have.
    """
    verifier, judge = config.selection.verifier, config.selection.judge
    if verifier is None:
        return (None, None) if judge is None else _judge_scorer(judge)
    is_missing = isinstance(verifier, CodeRewardConfig) or (
        not isinstance(verifier, ModelRewardConfig) and needs_expected_answer(verifier)
    )
    if config.questions == "made" and is_missing:
        summary = "this verifier reads the answers or tests of rows, and made questions have none"
        hint = "take questions: seeds, a function, a pattern or a reward run"
        raise ConfigError(summary, where="synth.selection.verifier", given=verifier.kind, hint=hint)
    return verifier_scorer(verifier), None


def verifier_scorer(config: RewardSourceConfig) -> ScoreAnswers:
    """Scores of a verifier or of a reward run."""
    if isinstance(config, ModelRewardConfig):
        return _reward_scorer(Path(config.run))
    verifier = make_verifier(config)

    def score(questions: Sequence[AnsweredQuestion]) -> list[list[float]]:
        texts = [answer for question in questions for answer in question.answers]
        rows = [reward_row(q.record, ParsedAnswer(answer), None, None) for q in questions for answer in q.answers]
        values = iter(verify_all(verifier, texts, rows))
        return [[next(values) for _ in question.answers] for question in questions]

    return score


def require_scorable(records: Sequence[Record], config: RewardSourceConfig) -> None:
    """Raise `DataError` for a row without the answer or the tests that a verifier reads."""
    if isinstance(config, ModelRewardConfig):
        return
    for record in records:
        if isinstance(config, CodeRewardConfig) and record.tests is None:
            raise DataError("this row has no tests to run an answer against", where=str(record.source))
        if needs_expected_answer(config) and not record.answer:
            summary = "this verifier compares with the expected answer, and this row has none"
            raise DataError(summary, where=str(record.source), given=config.kind)


def _reward_scorer(run: Path) -> ScoreAnswers:
    """Scores of a reward run, in its own tokens."""
    policy, chat, objective, _ = open_reward_model(run)
    scorer, budget = RewardScorer(policy, objective), tokens_per_micro_batch(policy.base.shape, policy.device.type)

    def score(questions: Sequence[AnsweredQuestion]) -> list[list[float]]:
        records = [
            replace(q.record, messages=(*q.record.messages[:-1], Message("assistant", answer)), candidates=())
            for q in questions
            for answer in q.answers
        ]
        examples = tokenize_records(chat, records, max_length=policy.base.context).examples if records else ()
        values = iter(scorer(list(examples), budget))
        return [[next(values) for _ in q.answers] for q in questions]

    return score


def _judge_scorer(config: JudgeConfig) -> tuple[ScoreAnswers, JudgeAgreement]:
    """Share of the comparisons that an answer wins, a tie counts half: every pair is compared in both orders.

    The agreement of the judge with people is measured once, before it decides. Raises `PlanError` if it is too low.
    """
    agreement = judge_pairs(config, []).result.trust
    if not agreement.trusted:
        hint = "name another judge, or a verifier"
        raise PlanError("this judge is not trusted", where="synth.selection.judge", given=agreement.reason, hint=hint)
    config = config.model_copy(update={"human_labels": None})  # or every round would judge them again

    def score(questions: Sequence[AnsweredQuestion]) -> list[list[float]]:
        places = [(i, a, b) for i, q in enumerate(questions) for a, b in combinations(range(len(q.answers)), 2)]
        records = [question.record for question in questions]
        pairs = [
            AnswerPair(
                *(records[i].question, questions[i].answers[a], questions[i].answers[b]),
                *(str(records[i].source), records[i].context),
            )
            for i, a, b in places
        ]
        wins = [[0.0] * len(q.answers) for q in questions]
        if not pairs:
            return wins
        judgement = judge_pairs(config, pairs)
        for (i, a, b), judged in zip(places, judgement.judged_pairs, strict=True):
            outcome = judged.verdicts.outcome
            wins[i][a] += {"first": 1.0, "tie": 0.5}.get(str(outcome), 0.0)
            wins[i][b] += {"second": 1.0, "tie": 0.5}.get(str(outcome), 0.0)
        return [[w / max(1, len(scores) - 1) for w in scores] for scores in wins]

    return score, agreement


def require_usable_judge(config: TeachConfig) -> None:
    """Raise `PlanError` for a judge whose agreement with people cannot be measured: it would decide unseen."""
    if config.selection.judge is not None and config.selection.judge.human_labels is None:
        summary = "a judge chooses among answers only after its agreement with people was measured"
        hint = "name pairs that people labeled in synth.selection.judge.human_labels"
        raise PlanError(summary, where="synth.selection.judge", hint=hint)
