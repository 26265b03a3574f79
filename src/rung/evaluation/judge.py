"""LLM judge for pairs of answers: its prompts, in both orders, and how verdicts are read.

Every pair is judged twice with the answers swapped, which doubles the cost and removes position bias. A local model is
read by the log-probabilities of the marks A, B and C (no generation, never unreadable); a server by its text, because
not every server returns log-probabilities. `runs.judge` and `commands.compare` use it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rung.config.judge import JudgeConfig
from rung.console import ProgressBar
from rung.data.chat import ChatTemplate, with_context
from rung.data.read import RejectedRow, stream_rows
from rung.errors import DataError
from rung.inference.choose import choose, max_prompt_tokens
from rung.models.policy import Policy
from rung.scoring.pairwise import OUTCOMES, Outcome, PairVerdicts
from rung.types import Message

MARKS = ("A", "B", "C")
"""A: the answer shown first is better; B: the one shown second; C: a tie."""
# Prompt texts are part of the result: changing a word changes verdicts and the agreement with people.
CRITERIA = "Better is what is correct, helpful and to the point."
SYSTEM = (
    "You compare two answers to a question. {criteria} "
    "Neither the order in which the answers are shown nor their length is a reason."
)
MARK_INSTRUCTION = "Which answer is better? Reply with A or B, or with C for a tie."
REASONS_INSTRUCTION = (
    "Which answer is better? Give your reasons in a few sentences, "
    "then end with [[A]] or [[B]], or with [[C]] for a tie."
)
OUTCOME_OF_MARK: dict[bool, dict[str, Outcome]] = {
    False: {"A": "first", "B": "second", "C": "tie"},
    True: {"A": "second", "B": "first", "C": "tie"},
}
"""Outcome of a mark in the original order of the answers, by whether they were swapped."""
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
        """The group, or else the source of the pair."""
        return self.group if self.group is not None else self.source


@dataclass(frozen=True, slots=True)
class JudgeVerdict:
    """One verdict on a pair in one order, and its basis: log-probabilities or text."""

    mark: str | None
    """One of `MARKS`; None if unreadable."""
    basis: Any

    def outcome(self, swapped: bool) -> Outcome | None:
        """The verdict in the original order of the answers."""
        return None if self.mark is None else OUTCOME_OF_MARK[swapped][self.mark]


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """A pair with its verdicts in both orders."""

    pair: AnswerPair
    first_shown_first: JudgeVerdict
    second_shown_first: JudgeVerdict

    @property
    def verdicts(self) -> PairVerdicts:
        """The outcomes of both orders."""
        return PairVerdicts(self.first_shown_first.outcome(False), self.second_shown_first.outcome(True))


AskJudge = Callable[[Sequence[tuple[Message, ...]]], list[JudgeVerdict]]
"""Maps prompts to verdicts, in order."""


def judge_both_orders(pairs: Sequence[AnswerPair], config: JudgeConfig, ask: AskJudge) -> list[JudgedPair]:
    """Judge each pair twice, once in each order of the answers."""
    # only generated text can hold reasons; log-probabilities of a mark are read without generating
    with_reasons = config.server is not None
    prompts = [judge_prompt(pair, config, swapped, with_reasons) for pair in pairs for swapped in (False, True)]
    verdicts = ask(prompts)
    # two prompts a pair, the original order first
    return [JudgedPair(pair, verdicts[2 * i], verdicts[2 * i + 1]) for i, pair in enumerate(pairs)]


def judge_prompt(pair: AnswerPair, config: JudgeConfig, swapped: bool, with_reasons: bool) -> tuple[Message, ...]:
    """The prompt of the judge; `with_reasons` asks for reasons and a mark in brackets, otherwise for the mark only."""
    answer_a, answer_b = (pair.second, pair.first) if swapped else (pair.first, pair.second)
    question = with_context(pair.context, pair.question) if pair.context else pair.question
    parts = [f"[Question]\n{question}"]
    if config.reference and pair.expected:
        parts.append(f"[Expected answer]\n{pair.expected}")
    parts += [f"[Answer A]\n{answer_a}", f"[Answer B]\n{answer_b}"]
    parts.append(REASONS_INSTRUCTION if with_reasons else MARK_INSTRUCTION)
    system = SYSTEM.format(criteria=config.criteria or CRITERIA)
    return Message("system", system), Message("user", "\n\n".join(parts))


def judge_by_logprobs(policy: Policy, chat: ChatTemplate, title: str | None = "judge") -> AskJudge:
    """Judge with a loaded model: the mark with the highest log-probability (Zheng et al. 2023 parse text instead).

    Marks share their prompt and prompts share their beginning, so each is computed once. A prompt that leaves no room
    for a mark is unreadable. `title` None shows no progress bar.
    """
    options = [chat.encode([mark], mid_document=True)[0] for mark in MARKS]

    def ask(prompts: Sequence[tuple[Message, ...]]) -> list[JudgeVerdict]:
        # answers to judge are text, whatever the judge was trained on
        as_text = chat.with_control_tokens(None)
        ids = [as_text.prompt_ids(turns) for turns in prompts]
        with ProgressBar(title, len(prompts)) as bar:
            logprobs_PC = choose(policy, ids, options, bar.advance)
        limit = max_prompt_tokens(policy, options)
        return [_verdict(row, len(prompt), limit) for row, prompt in zip(logprobs_PC.tolist(), ids, strict=True)]

    return ask


def _verdict(logprobs: Sequence[float], prompt_tokens: int, limit: int) -> JudgeVerdict:
    if math.isnan(logprobs[0]):
        return JudgeVerdict(None, f"{prompt_tokens} tokens, and {limit} have room")
    mark_logprobs = dict(zip(MARKS, logprobs, strict=True))
    return JudgeVerdict(max(MARKS, key=mark_logprobs.__getitem__), mark_logprobs)


def parse_verdict(text: str) -> JudgeVerdict:
    """The last mark in brackets of a judge's text; unreadable without one."""
    marks = _MARK.findall(text)
    # the last one: reasons often quote the instruction, and a model may revise its view
    return JudgeVerdict(marks[-1] if marks else None, text)


def read_human_labels(path: str) -> tuple[list[AnswerPair], list[list[Outcome | None]]]:
    """Pairs labelled by people, with their labels.

    Columns: `question`, `first`, `second`, `human` (first, second or tie, or a list of these with null for a missing
    label), and optionally `context`, `expected` and `group`. Raises `DataError` for other rows.
    """
    pairs: list[AnswerPair] = []
    labels: list[list[Outcome | None]] = []
    for item in stream_rows(path):
        if isinstance(item, RejectedRow):
            # no reject policy here: a few hundred labels decide whether a judge is trusted
            raise DataError(item.reason, where=str(item.source))
        row, where = item.row, str(item.source)
        texts = {name: row.get(name) for name in ("question", "first", "second")}
        for name, text in texts.items():
            if not isinstance(text, str):
                hint = "a labelled pair has question, first, second and human"
                raise DataError(f"no text in column {name}", where=where, given=text, hint=hint)
        value = row.get("human")
        row_labels = value if isinstance(value, list) else [value]
        existing_labels = [label for label in row_labels if label is not None]
        if not existing_labels or any(label not in OUTCOMES for label in existing_labels):
            raise DataError("not what a person could have said", where=where, given=value, allowed=", ".join(OUTCOMES))
        extras = {n: str(row[n]) for n in ("context", "expected", "group") if row.get(n) is not None}
        pairs.append(AnswerPair(**texts, source=where, **extras))  # type: ignore[arg-type]
        labels.append(row_labels)
    return pairs, labels
