"""A judge of pairs of answers: what it is asked, in both orders, and what its log-probabilities or its words say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rung.config.judge import JudgeConfig
from rung.console import ProgressBar
from rung.data.chat import ChatTemplate, with_context
from rung.data.read import RejectedRow, stream_rows
from rung.errors import DataError
from rung.models.policy import Policy, sum_by_document
from rung.planning.memory import tokens_per_micro_batch
from rung.scoring.pairwise import OUTCOMES, Outcome, PairVerdicts
from rung.training.step import values_by_document
from rung.types import Example, Message, Source

MARKS = ("A", "B", "C")
"""The answer shown first is better; the one shown second; neither."""
CRITERIA = "Better is what is correct, helpful and to the point."
SYSTEM = (
    "You compare two answers to a question. {criteria} "
    "Neither the order in which the answers are shown nor their length is a reason."
)
BY_MARK = "Which answer is better? Reply with A or B, or with C for a tie."
BY_WORDS = (
    "Which answer is better? Give your reasons in a few sentences, "
    "then end with [[A]] or [[B]], or with [[C]] for a tie."
)
MEANING: dict[bool, dict[str, Outcome]] = {
    False: {"A": "first", "B": "second", "C": "tie"},
    True: {"A": "second", "B": "first", "C": "tie"},
}
"""What a mark says of the answers as given, by whether they were swapped."""
SLICE = 64
"""Prompts after which the bar moves on."""
_MARK = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """Two answers to a question."""

    question: str
    first: str
    second: str
    source: str
    context: str | None = None
    expected: str | None = None
    group: str | None = None

    @property
    def cluster(self) -> str:
        """Its group, or itself."""
        return self.group if self.group is not None else self.source


@dataclass(frozen=True, slots=True)
class JudgeVerdict:
    """One verdict on a pair in one order, and what it was read from: log-probabilities or words."""

    mark: str | None
    """One of `MARKS`; None: unreadable."""
    basis: Any

    def outcome(self, swapped: bool) -> Outcome | None:
        """The verdict with the answers named as given."""
        return None if self.mark is None else MEANING[swapped][self.mark]


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """A pair, and what was said of it in both orders."""

    pair: AnswerPair
    first_shown_first: JudgeVerdict
    second_shown_first: JudgeVerdict

    @property
    def verdicts(self) -> PairVerdicts:
        """Read."""
        return PairVerdicts(self.first_shown_first.outcome(False), self.second_shown_first.outcome(True))


AskJudge = Callable[[Sequence[tuple[Message, ...]]], list[JudgeVerdict]]
"""What answers prompts with verdicts, in their order."""


def judge_both_orders(pairs: Sequence[AnswerPair], config: JudgeConfig, ask: AskJudge) -> list[JudgedPair]:
    """Ask for each pair twice, the answers in either order."""
    by_words = config.server is not None
    prompts = [judge_prompt(pair, config, swapped, by_words) for pair in pairs for swapped in (False, True)]
    said = ask(prompts)
    return [JudgedPair(pair, said[2 * i], said[2 * i + 1]) for i, pair in enumerate(pairs)]


def judge_prompt(pair: AnswerPair, config: JudgeConfig, swapped: bool, by_words: bool) -> tuple[Message, ...]:
    """What the judge reads; `by_words` asks for reasons and a mark in brackets, otherwise for the mark alone."""
    one, other = (pair.second, pair.first) if swapped else (pair.first, pair.second)
    question = with_context(pair.context, pair.question) if pair.context else pair.question
    parts = [f"[Question]\n{question}"]
    if config.reference and pair.expected:
        parts.append(f"[Expected answer]\n{pair.expected}")
    parts += [f"[Answer A]\n{one}", f"[Answer B]\n{other}", BY_WORDS if by_words else BY_MARK]
    head = SYSTEM.format(criteria=config.criteria or CRITERIA)
    return Message("system", head), Message("user", "\n\n".join(parts))


def judge_by_logprobs(policy: Policy, chat: ChatTemplate) -> AskJudge:
    """Ask a model at hand: the mark whose tokens are likeliest to follow (Zheng et al. 2023 read words instead).

    The marks of a prompt share it, and the prompts what they begin with, so each is computed once. A prompt that
    leaves no room is unreadable.
    """
    endings = [chat.encode([mark], inner=True)[0] for mark in MARKS]
    room = policy.base.context - policy.method.virtual_tokens - max(map(len, endings))

    def ask(prompts: Sequence[tuple[Message, ...]]) -> list[JudgeVerdict]:
        ids = [chat.prompt_ids(turns) for turns in prompts]
        fitting = [i for i, own in enumerate(ids) if len(own) <= room]
        documents = [_document(ids[i], ending, i) for i in fitting for ending in endings]
        budget = tokens_per_micro_batch(policy.base.shape, policy.device.type)
        found: list[float] = []
        with ProgressBar("judge", len(prompts), len(prompts) - len(fitting)) as bar:
            for start in range(0, len(documents), 3 * SLICE):
                part = documents[start : start + 3 * SLICE]
                found += values_by_document(
                    [policy], part, budget, lambda batch: sum_by_document(batch, policy.logprobs(batch)).tolist()
                )
                bar.advance(len(part) // 3)
        said = [JudgeVerdict(None, f"{len(own)} tokens, and {room} have room") for own in ids]
        for place, i in enumerate(fitting):
            nats = dict(zip(MARKS, found[3 * place : 3 * place + 3], strict=True))
            said[i] = JudgeVerdict(max(MARKS, key=nats.__getitem__), nats)
        return said

    return ask


def _document(ids: Sequence[int], ending: Sequence[int], row: int) -> Example:
    whole = np.array([*ids, *ending], dtype=np.int32)
    return Example(whole, np.arange(len(whole)) >= len(ids), Source("judge", row), row=row)


def parse_verdict(text: str) -> JudgeVerdict:
    """The last mark in brackets of what a judge wrote; unreadable without one."""
    marks = _MARK.findall(text)
    return JudgeVerdict(marks[-1] if marks else None, text)


def read_human_labels(path: str) -> tuple[list[AnswerPair], list[list[Outcome | None]]]:
    """Pairs that people have labelled, with the labels.

    Columns: `question`, `first`, `second`, `human` (first, second or tie, or a list of these with null for nothing
    said), and optionally `context`, `expected` and `group`. Raises `DataError` for a row that is not so.
    """
    pairs: list[AnswerPair] = []
    labels: list[list[Outcome | None]] = []
    for item in stream_rows(path):
        if isinstance(item, RejectedRow):
            raise DataError(item.reason, where=str(item.source))
        row, where = item.row, str(item.source)
        texts = {name: row.get(name) for name in ("question", "first", "second")}
        if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
            hint = "a labelled pair has question, first, second and human"
            raise DataError(f"no text in column {wrong[0]}", where=where, given=texts[wrong[0]], hint=hint)
        given = row.get("human")
        own = given if isinstance(given, list) else [given]
        if not any(label is not None for label in own) or any(x is not None and x not in OUTCOMES for x in own):
            raise DataError("not what a person could have said", where=where, given=given, allowed=", ".join(OUTCOMES))
        further = {name: str(row[name]) for name in ("context", "expected", "group") if row.get(name) is not None}
        pairs.append(AnswerPair(**texts, source=where, **further))  # type: ignore[arg-type]
        labels.append(own)
    return pairs, labels
