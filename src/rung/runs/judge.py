"""Judging pairs of answers by a model: a local one by log-probabilities, or one behind a server in words.

Every pair is judged in both orders, which doubles the requests but exposes position bias. A judge is trusted only if it
agrees with human labels (docs/decisions/0021). Verdicts of a server are kept on disk, by the whole set of requests,
since they cost money; local verdicts are computed anew. `rung eval` compares two systems with `judge_pairs`; rewards
and selections score several answers to a question with `JudgeScorer`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rung.config.judge import JudgeConfig
from rung.config.objective import JudgeRewardConfig
from rung.console import print_status
from rung.errors import CheckpointError, PlanError
from rung.evaluation.judge import (
    AnswerPair,
    AskJudge,
    JudgedPair,
    JudgeVerdict,
    judge_both_orders,
    judge_by_logprobs,
    parse_verdict,
    read_human_labels,
)
from rung.files import cache_folder
from rung.inference.ask import Conversation
from rung.inference.journal import Journal, request_key
from rung.inference.openai_client import DEFAULT_CONCURRENCY, Server
from rung.models.generate import Sampling
from rung.results.evaluation import JudgeAgreement, JudgeResult
from rung.runs.load import LoadedRun, open_target, weight_fingerprints
from rung.scoring.pairwise import Outcome, check_judge, summarize_preferences, win_share
from rung.types import Message, Record

MAX_VERDICT_TOKENS = 512
"""Tokens that a judge behind a server may write for a verdict with its reasons."""
VERDICTS_FOLDER = "judged"
"""Folder of the verdicts of a server, in the user's cache or in that of a run."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdicts of a judge on pairs, and whether it can be trusted."""

    judged_pairs: tuple[JudgedPair, ...]
    result: JudgeResult

    def lines(self) -> list[str]:
        """One JSON object for each pair with its verdicts."""
        return [json.dumps({**asdict(p), "outcome": p.verdicts.outcome}, ensure_ascii=False) for p in self.judged_pairs]


class Judge:
    """A judge that is loaded once and asked several times."""

    def __init__(self, config: JudgeConfig) -> None:
        """Raises `ConfigError` or `CheckpointError` for a model that cannot be opened."""
        self.config = config
        self._model: LoadedRun | None = None if config.server is not None else open_target(config.model)

    @property
    def fingerprints(self) -> list[str]:
        """What identifies the weights of a local judge; empty for a server."""
        return [] if self._model is None else weight_fingerprints(self.config.model, self._model.policy)

    def verdicts(
        self, pairs: Sequence[AnswerPair], folder: Path | None = None, title: str | None = "judge"
    ) -> list[JudgedPair]:
        """Judge pairs in both orders; `folder` has the journals of a server, by default one in the user's cache."""
        return judge_both_orders(pairs, self.config, self._ask_function(folder or cache_folder(), title))

    def agreement(self, labeled: Sequence[JudgedPair], labels: Sequence[Sequence[Outcome | None]]) -> JudgeAgreement:
        """Agreement with people on labeled pairs; without any the judge is not to be trusted."""
        if not labeled:
            reason = "its agreement with people was not measured: evaluation.judge.human_labels names no file"
            return JudgeAgreement(trusted=False, reason=reason)
        clusters = [judged.pair.cluster for judged in labeled]
        return check_judge([judged.verdicts for judged in labeled], labels, clusters, self.config.min_kappa)

    def _ask_function(self, folder: Path, title: str | None) -> AskJudge:
        if self._model is not None:
            return judge_by_logprobs(self._model.policy, self._model.chat, title)
        config = self.config
        server = Server(str(config.server), config.model, config.concurrency or DEFAULT_CONCURRENCY)
        return _ask_by_server(server, folder / VERDICTS_FOLDER, title)


def judge_pairs(config: JudgeConfig, pairs: Sequence[AnswerPair], seed: int = 0) -> Judgement:
    """Ask the judge of `config` about pairs, and about the pairs with human labels, on which it is checked.

    Raises `ConfigError` or `CheckpointError` if it cannot be asked, `DataError` for a malformed file of labels.
    """
    labeled_pairs, human_labels = read_human_labels(config.human_labels) if config.human_labels else ([], [])
    judge = Judge(config)
    # One call for both sets: the judge sees no difference between them.
    judged_pairs = judge.verdicts([*pairs, *labeled_pairs])
    verdicts, labeled_verdicts = judged_pairs[: len(pairs)], judged_pairs[len(pairs) :]
    # Without human labels the verdict is reported all the same, but marked as not to be trusted.
    agreement = judge.agreement(labeled_verdicts, human_labels)
    # Lengths go into the summary because judges tend to prefer longer answers.
    lengths = [(len(pair.first), len(pair.second)) for pair in pairs]
    preference = summarize_preferences([j.verdicts for j in verdicts], lengths, [pair.cluster for pair in pairs], seed)
    return Judgement(tuple(verdicts), JudgeResult(**dict(preference), model=config.model, trust=agreement))


class AnsweredQuestion(NamedTuple):
    """A row and sampled answers to its question."""

    record: Record
    """The row; a made question has an empty answer."""
    answers: Sequence[str]


@dataclass(frozen=True)
class JudgeScorer:
    """Scores of the answers to a question: the share of its comparisons that each wins, a tie counts half."""

    judge: Judge
    against: Literal["group", "expected"]
    """What an answer is compared with: the other answers, or the expected answer of the row."""
    agreement: JudgeAgreement
    """Agreement of the judge with people."""
    folder: Path | None = None
    """Folder of the verdicts of a server; None: one in the user's cache."""
    title: str | None = "judge"
    """Title of the progress bar; None shows none."""

    def __call__(self, questions: Sequence[AnsweredQuestion]) -> list[list[float]]:
        """Scores from 0 to 1. An unreadable verdict is won by neither answer."""
        pairs = [(i, pair) for i, question in enumerate(questions) for pair in self._pairs(question)]
        judged = self.judge.verdicts([pair for _, pair in pairs], self.folder, self.title) if pairs else []
        outcomes: list[dict[tuple[str, str], Outcome | None]] = [{} for _ in questions]
        for (i, pair), verdicts in zip(pairs, judged, strict=True):
            outcomes[i][pair.first, pair.second] = verdicts.verdicts.outcome
        if unreadable := sum(j.verdicts.outcome is None for j in judged):
            print_status(f"judge: {unreadable:,} of {len(judged):,} comparisons have no readable verdict: nobody wins")
        return [self._shares(question, outcomes[i]) for i, question in enumerate(questions)]

    def _pairs(self, question: AnsweredQuestion) -> list[AnswerPair]:
        """The comparisons that need a verdict: equal texts tie, for the judge would read one prompt in both orders."""
        record, distinct = question.record, list(dict.fromkeys(question.answers))
        texts = [(answer, record.answer) for answer in distinct if answer != record.answer]
        if self.against == "group":
            texts = list(combinations(distinct, 2))
        about = (str(record.source), record.context, record.answer or None, record.group)
        return [AnswerPair(record.question, first, second, *about) for first, second in texts]

    def _shares(self, question: AnsweredQuestion, outcomes: dict[tuple[str, str], Outcome | None]) -> list[float]:
        answers = list(question.answers)
        if self.against == "expected":
            return [win_share(answer, [question.record.answer], outcomes) for answer in answers]
        return [win_share(answer, answers[:i] + answers[i + 1 :], outcomes) for i, answer in enumerate(answers)]


def open_judge_scorer(
    config: JudgeConfig, where: str, against: Literal["group", "expected"], folder: Path | None = None
) -> JudgeScorer:
    """A judge whose agreement with people has been measured; its verdicts on labeled pairs are in the user's cache.

    `where` is the setting that names it. Raises `PlanError` if it agrees too little, `DataError` for a malformed file
    of labels, `ConfigError` or `CheckpointError` if it cannot be asked.
    """
    require_human_labels(config, where)
    pairs, labels = read_human_labels(str(config.human_labels))
    judge = Judge(config)
    agreement = judge.agreement(judge.verdicts(pairs), labels)
    if not agreement.trusted:
        hint = "name another judge or other criteria, or score by a rule"
        raise PlanError("this judge is not trusted", where=where, given=agreement.reason, hint=hint)
    return JudgeScorer(judge, against, agreement, folder)


def open_judge_reward(config: JudgeRewardConfig, folder: Path) -> JudgeScorer:
    """The judge that rewards the answers of a policy. Its verdicts are kept below the run's folder, without a bar."""
    scorer = open_judge_scorer(config, "objective.reward", config.against, folder)
    print_status(f"judge: {scorer.agreement.reason}")
    return replace(scorer, title=None)


def require_human_labels(config: JudgeConfig, where: str) -> None:
    """Raise `PlanError` for a judge whose agreement with people cannot be measured: it would decide unseen."""
    if config.human_labels is None:
        summary = "a judge chooses among answers only after its agreement with people was measured"
        hint = f"name pairs that people labeled in {where}.human_labels"
        raise PlanError(summary, where=where, hint=hint)


def _open_journal(path: Path, identity: dict[str, Any]) -> Journal:
    """The journal of these questions. Raises `CheckpointError` while another command asks the judge the same."""
    try:
        return Journal(path, identity)
    except CheckpointError as error:
        hint = "where another command asks the same judge the same now, wait for its verdicts: they are kept for both"
        raise CheckpointError(error.summary, where=error.where, hint=hint) from None


def _ask_by_server(server: Server, folder: Path, title: str | None) -> AskJudge:
    """Verdicts of a server, each stored in `folder` as it arrives: the same questions are not paid for twice."""

    def ask(prompts: Sequence[tuple[Message, ...]]) -> list[JudgeVerdict]:
        # Temperature 0, so that a verdict is worth keeping.
        sampling = Sampling(MAX_VERDICT_TOKENS)
        conversations = [Conversation(turns) for turns in prompts]
        asked = [asdict(conversation) for conversation in conversations]
        identity = {**server.identity, "conversations": asked, "sampling": asdict(sampling)}
        # The name is a hash of everything asked, so a changed prompt or model starts a new journal.
        name = request_key(identity)
        with closing(_open_journal(folder / f"{name}.jsonl", identity)) as journal:
            replies, failures = server.ask(conversations, sampling, journal, title=title)
        # A request without an answer becomes a verdict that counts in no rate, instead of failing all others.
        reasons = {failure.index: failure.reason for failure in failures}
        return [
            JudgeVerdict(None, reasons[i]) if reply is None else parse_verdict(reply.answers[0].text)
            for i, reply in enumerate(replies)
        ]

    return ask
