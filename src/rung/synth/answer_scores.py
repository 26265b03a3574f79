"""Which of several sampled answers is the best: by a verifier, a reward model, or a judge in both orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rung.config.objective import CodeRewardConfig, JudgeRewardConfig, ModelRewardConfig, RewardSourceConfig
from rung.config.synth import TeachConfig
from rung.data.parsed_answer import ParsedAnswer
from rung.data.tokenize import tokenize_records
from rung.errors import ConfigError, DataError
from rung.evaluation.reward_model import RewardScorer
from rung.planning.memory import tokens_per_micro_batch
from rung.results.evaluation import JudgeAgreement
from rung.runs.auxiliary_models import require_healthy_reward_run, reward_row
from rung.runs.judge import AnsweredQuestion, JudgeScorer, open_judge_scorer, require_human_labels
from rung.runs.load import open_reward_model
from rung.scoring.verifiers import make_verifier, needs_expected_answer, verify_all
from rung.types import Message, Record

ScoreAnswers = Callable[[Sequence[AnsweredQuestion]], list[list[float]]]
"""Scores of the answers of each question, higher is better."""


def answer_scorer(config: TeachConfig) -> tuple[ScoreAnswers | None, JudgeAgreement | None]:
    """What scores answers, None without verifier and judge; and the agreement with people of a judge.

    Raises `ConfigError` for a verifier that reads what made questions do not have.
    """
    verifier, judge = config.selection.verifier, config.selection.judge
    if judge is not None:
        judged = open_judge_scorer(judge, "synth.selection.judge", "group")
        return judged, judged.agreement
    if verifier is None:
        return None, None
    is_missing = isinstance(verifier, CodeRewardConfig) or (
        not isinstance(verifier, ModelRewardConfig) and needs_expected_answer(verifier)
    )
    if config.questions == "made" and is_missing:
        summary = "this verifier reads the answers or tests of rows, and made questions have none"
        hint = "take questions: seeds, a function, a pattern or a reward run"
        raise ConfigError(summary, where="synth.selection.verifier", given=verifier.kind, hint=hint)
    scorer = verifier_scorer(verifier, "synth.selection.verifier")
    return scorer, scorer.agreement if isinstance(scorer, JudgeScorer) else None


def verifier_scorer(config: RewardSourceConfig, where: str, folder: Path | None = None) -> ScoreAnswers:
    """Scores of a verifier, a reward run or a judge, which the setting `where` names.

    `folder` keeps the verdicts of a judge behind a server; by default they are in the user's cache.
    """
    if isinstance(config, ModelRewardConfig):
        require_healthy_reward_run(config, where)
        return _reward_scorer(Path(config.run))
    if isinstance(config, JudgeRewardConfig):
        return open_judge_scorer(config, where, config.against, folder)
    verifier = make_verifier(config, where)

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


def require_usable_judge(config: TeachConfig) -> None:
    """Raise `PlanError` for a judge whose agreement with people cannot be measured: it would decide unseen."""
    if config.selection.judge is not None:
        require_human_labels(config.selection.judge, "synth.selection.judge")
