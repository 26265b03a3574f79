"""Judging pairs of answers by a model: a local one by log-probabilities, or one behind a server in words.

Every pair is judged in both orders, which doubles the requests but exposes position bias. A judge is trusted only if it
agrees with human labels (docs/decisions/0021). Verdicts of a server are kept in the user's cache, by the whole set of
requests, since they cost money; local verdicts are computed anew. `compare.py` calls `judge_pairs`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass

from rung.config.judge import JudgeConfig
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
from rung.results import JudgeAgreement, JudgeResult
from rung.runs.load import open_target
from rung.scoring.pairwise import check_judge, summarize_preferences
from rung.types import Message

MAX_VERDICT_TOKENS = 512
"""Tokens that a judge behind a server may write for a verdict with its reasons."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdicts of a judge on pairs, and whether it can be trusted."""

    judged_pairs: tuple[JudgedPair, ...]
    result: JudgeResult

    def lines(self) -> list[str]:
        """One JSON object for each pair with its verdicts."""
        return [json.dumps({**asdict(p), "outcome": p.verdicts.outcome}, ensure_ascii=False) for p in self.judged_pairs]


def judge_pairs(config: JudgeConfig, pairs: Sequence[AnswerPair], seed: int = 0) -> Judgement:
    """Ask the judge of `config` about pairs, and about the pairs with human labels, on which it is checked.

    Raises `ConfigError` or `CheckpointError` if it cannot be asked, `DataError` for a malformed file of labels.
    """
    labeled_pairs, human_labels = read_human_labels(config.human_labels) if config.human_labels else ([], [])
    # One call for both sets: the judge is loaded once, and sees no difference between them.
    judged_pairs = judge_both_orders([*pairs, *labeled_pairs], config, _ask_function(config))
    verdicts, labeled_verdicts = judged_pairs[: len(pairs)], judged_pairs[len(pairs) :]
    # Without human labels the verdict is reported all the same, but marked as not to be trusted.
    reason = "its agreement with people was not measured: evaluation.judge.human_labels names no file"
    unmeasured = {"pairs": 0, "unreadable": 0, "undecided": 0, "kappa": None, "agreement": None, "people": None}
    agreement = JudgeAgreement(trusted=False, reason=reason, **unmeasured)
    if labeled_pairs:
        clusters = [pair.cluster for pair in labeled_pairs]
        agreement = check_judge([j.verdicts for j in labeled_verdicts], human_labels, clusters, config.min_kappa)
    # Lengths go into the summary because judges tend to prefer longer answers.
    lengths = [(len(pair.first), len(pair.second)) for pair in pairs]
    preference = summarize_preferences([j.verdicts for j in verdicts], lengths, [pair.cluster for pair in pairs], seed)
    return Judgement(tuple(verdicts), JudgeResult(**dict(preference), model=config.model, trust=agreement))


def _ask_function(config: JudgeConfig) -> AskJudge:
    if config.server is not None:
        return _ask_by_server(Server(config.server, config.model, config.concurrency or DEFAULT_CONCURRENCY))
    judge = open_target(config.model)
    return judge_by_logprobs(judge.policy, judge.chat)


def _ask_by_server(server: Server) -> AskJudge:
    """Verdicts of a server, each stored in the cache as it arrives: the same questions are not paid for twice."""

    def ask(prompts: Sequence[tuple[Message, ...]]) -> list[JudgeVerdict]:
        # Temperature 0, so that a verdict is worth caching.
        sampling = Sampling(MAX_VERDICT_TOKENS)
        conversations = [Conversation(turns) for turns in prompts]
        asked = [asdict(conversation) for conversation in conversations]
        identity = {**server.identity, "conversations": asked, "sampling": asdict(sampling)}
        # The name is a hash of everything asked, so a changed prompt or model starts a new journal.
        name = request_key(identity)
        with closing(Journal(cache_folder() / "judged" / f"{name}.jsonl", identity)) as journal:
            replies, failures = server.ask(conversations, sampling, journal, title="judge")
        # A request without an answer becomes a verdict that counts in no rate, instead of failing all others.
        reasons = {failure.index: failure.reason for failure in failures}
        return [
            JudgeVerdict(None, reasons[i]) if reply is None else parse_verdict(reply.answers[0].text)
            for i, reply in enumerate(replies)
        ]

    return ask
