"""The rounds of `rung synth teach`: a teacher writes questions and answers, filters decide which rows are kept.

Questions are tried in rounds: all requests of a round are asked at once, and its rows are among the examples of the
next (Wang et al. 2023, Self-Instruct, algorithm of section 2.2). What a round asks depends on the seed and on the rows
before it alone, and every reply is in the journal, so a command that is run again repeats the same rounds and asks only
what is missing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rung.config.synth import TeachConfig
from rung.console import print_status
from rung.errors import DataError
from rung.inference.ask import Answer, Conversation
from rung.runs.judge import AnsweredQuestion
from rung.synth import requests
from rung.synth.answer_scores import ScoreAnswers
from rung.synth.filters import (
    LanguageFilter,
    NearDuplicateFilter,
    NoveltyFilter,
    Rejection,
    check_answer_length,
    check_grounded,
    check_incomplete,
    check_length,
    check_refusal,
)
from rung.synth.requests import WorkedExample
from rung.synth.sources import TeachSources, made_record
from rung.synth.writer import Writer
from rung.types import Message, Record

QUESTIONS_PER_ROUND = 64
"""Questions tried at once: a batch of answers for a model in this process, enough requests for a server."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A question that is tried, and what became of it."""

    number: int
    turns: tuple[Message, ...] = ()
    """The question; of a dialogue all turns so far."""
    context: str | None = None
    label: str | None = None
    attributes: dict[str, str] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    """Sources of the worked examples."""
    seed: Record | None = None
    """The seed whose question it is, for a verifier."""
    answers: tuple[str, ...] = ()
    """Answers that passed the filters, best first once they are scored."""
    scores: tuple[float, ...] = ()
    rejection: Rejection | None = None

    @property
    def question(self) -> str:
        """The last question."""
        return next((turn.content for turn in reversed(self.turns) if turn.role == "user"), "")


class Teaching:
    """The rounds of one `rung synth teach`: kept rows, and the drafts that were left out."""

    def __init__(
        self,
        config: TeachConfig,
        sources: TeachSources,
        teacher: Writer,
        score: ScoreAnswers | None,
        seed: int,
        on_round: Callable[[int, int], None],
    ) -> None:
        """`on_round` receives the numbers of kept rows and of tried questions after each round."""
        self.config, self.sources, self.teacher = config, sources, teacher
        self.seed, self.on_round = seed, on_round
        self.kept: list[Draft] = []
        self.rejected: list[Draft] = []
        self.tried = self._round_start = 0
        self._seed_order, self._passage_order = sources.seed_order(seed), sources.passage_order(seed)
        self._score = score
        filters = config.filters
        seeds = [seed.question for seed in sources.seeds]
        is_new = filters.novelty is not None and config.questions == "made"
        self._novelty = NoveltyFilter(filters.novelty, seeds) if is_new and filters.novelty is not None else None
        has_duplicates = filters.near_duplicates is not None
        self._duplicates = NearDuplicateFilter(filters.near_duplicates) if has_duplicates else None  # type: ignore[arg-type]
        texts = [text for seed in sources.seeds for text in (seed.question, seed.answer)] or sources.passages
        if filters.refusals and sources.seeds_refuse:
            print_status("the filter of refusals is off: an answer of the seeds declines itself")
        self._language = LanguageFilter(texts) if filters.language and texts else None

    @property
    def limit(self) -> int:
        """Questions that are tried at most."""
        if self.config.questions == "seeds":
            return len(self.sources.seeds)
        return self.config.attempts * (self.config.rows or 1)

    def run(self) -> None:
        """Try questions until all rows are kept, or until the limit of attempts."""
        rows = self.config.rows or len(self.sources.seeds)
        while len(self.kept) < rows and self.tried < self.limit:
            # no more than what the yield so far asks for
            yielded = max(len(self.kept), 1) / self.tried if self.tried else 1.0
            count = min(QUESTIONS_PER_ROUND, math.ceil((rows - len(self.kept)) / yielded), self.limit - self.tried)
            numbers = range(self.tried, self.tried + count)
            self._round_start, self.tried = numbers.start, numbers.stop
            self._round(numbers)
            self.on_round(len(self.kept), self.tried)
        surplus = Rejection("surplus", "the rows that were asked for were complete")
        self.rejected += [replace(draft, rejection=surplus) for draft in self.kept[rows:]]
        del self.kept[rows:]

    def _round(self, numbers: range) -> None:
        drafts = self._questions(numbers)
        drafts = [self._filtered_question(draft) for draft in drafts]
        for turn in range(self.config.makes.turns if self.config.makes.kind == "dialogues" else 1):
            if turn:
                drafts = self._next_questions(drafts)
            drafts = self._answered(drafts)
        for draft in self._scored(drafts):
            last = self._finished(draft)
            (self.kept if last.rejection is None else self.rejected).append(last)

    def _ask(
        self, drafts: Sequence[Draft], request: Callable[[Draft], Conversation], stage: int, samples: int = 1
    ) -> Iterator[tuple[Draft, tuple[Answer, ...]]]:
        """Each draft that is still in with the answers to its request; the others, and those that fail, without."""
        open_drafts = [draft for draft in drafts if draft.rejection is None]
        conversations = [request(draft) for draft in open_drafts]
        replies = self.teacher.answers(conversations, [self.seed, stage, self._round_start], samples)
        by_number = {draft.number: reply for draft, reply in zip(open_drafts, replies, strict=True)}
        for draft in drafts:
            reply = by_number.get(draft.number, ())
            if isinstance(reply, str):
                # one more draft that is left out
                yield replace(draft, rejection=Rejection("failed", reply)), ()
            else:
                yield draft, reply

    def _questions(self, numbers: range) -> list[Draft]:
        """The questions of a round: those of seeds, or new ones."""
        if self.config.questions == "seeds":
            return [self._seed_draft(number) for number in numbers]
        plans = {number: self._plan(number) for number in numbers}
        drafts = []
        for draft, answers in self._ask([d for d, _ in plans.values()], lambda d: plans[d.number][1], 0):
            if answers:
                text = answers[0].text.strip()
                rejection = check_incomplete("question", text, answers[0].stopped)
                draft = replace(draft, turns=(Message("user", text),), rejection=rejection)
            drafts.append(draft)
        return drafts

    def _seed_draft(self, number: int) -> Draft:
        seed = self.sources.seeds[self._seed_order[number]]
        return Draft(number, seed.turns, seed.context, parents=(seed.source,), seed=seed.record)

    def _plan(self, number: int) -> tuple[Draft, Conversation]:
        """What is drawn for a new question: examples, a passage, a label and attributes; and its request."""
        chance = np.random.default_rng([self.seed, number])
        config = self.config
        attributes = {name: str(chance.choice(values)) for name, values in config.attributes.items()}
        label = None
        if config.makes.kind == "labels":
            labels = self.sources.labels
            label = labels[number % len(labels)]  # in turn, so that all labels get as many
        examples = self._examples(chance, label)
        parents = tuple(example.source for example in examples)
        if label is not None:
            draft = Draft(number, label=label, attributes=attributes, parents=parents)
            return draft, requests.text_request(config.task, examples, label, attributes)
        passages = self.sources.passages
        passage = passages[int(self._passage_order[number % len(passages)])] if passages else None
        draft = Draft(number, context=passage, attributes=attributes, parents=parents)
        return draft, requests.question_request(config.task, examples, passage, attributes)

    def _examples(self, chance: np.random.Generator, label: str | None) -> list[WorkedExample]:
        """Seeds and rows that were made before, at random, the order mixed."""
        seeds = [s.worked_example for s in self.sources.seeds if label is None or s.answer == label]
        made = [self._worked_example(draft) for draft in self.kept if label is None or draft.label == label]
        drawn = [*_sample(chance, seeds, self.config.examples.seeds), *_sample(chance, made, self.config.examples.made)]
        if self.sources.passages:
            drawn = [example for example in drawn if example.context]  # without a text the form would be another
        return [drawn[i] for i in chance.permutation(len(drawn))]

    def _worked_example(self, draft: Draft) -> WorkedExample:
        answer = draft.label or draft.answers[0]
        return WorkedExample(draft.turns[0].content, answer, draft.context, answer, f"row {draft.number}")

    def _filtered_question(self, draft: Draft) -> Draft:
        """The draft with the first filter that its question does not pass; a question that passes is remembered."""
        if draft.rejection is not None:
            return draft
        rejection = self.sources.check_leak(draft.turns, draft.context)
        if self.config.questions == "seeds" or rejection is not None:
            return replace(draft, rejection=rejection)
        rejection = check_length(draft.question, self.config.filters)
        if rejection is None and self._language is not None:
            rejection = self._language.check(draft.question)
        if rejection is None and self._novelty is not None:
            rejection = self._novelty.check(draft.question)
            if rejection is None:
                self._novelty.add(draft.question)
        return replace(draft, rejection=rejection)

    def _next_questions(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Dialogues with the answer that was just given and the next question."""
        spoken = [
            replace(d, turns=(*d.turns, Message("assistant", d.answers[0])), answers=()) if d.answers else d
            for d in drafts
        ]
        task = self.config.task
        stage = 10 * len(max((d.turns for d in spoken), key=len, default=()))
        asked = self._ask(spoken, lambda d: requests.next_question_request(task, d.turns, d.context), stage)
        result = []
        for draft, answers in asked:
            if not answers:
                result.append(draft)
                continue
            text = answers[0].text.strip()
            rejection = check_incomplete("question", text, answers[0].stopped)
            turns = (*draft.turns, Message("user", text))
            rejection = rejection or self.sources.check_leak(turns[-1:], draft.context)
            rejection = rejection or check_length(text, self.config.filters)
            result.append(replace(draft, turns=turns, rejection=rejection))
        return result

    def _answered(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Drafts with the answers that pass the filters of answers."""
        if self.config.makes.kind == "labels":
            return [replace(d, answers=(d.label,)) if d.label and d.rejection is None else d for d in drafts]
        explain = self.config.makes.kind == "explanations"
        shots = self.sources.answer_examples(self.config) if self.config.questions == "made" else {}

        def request(draft: Draft) -> Conversation:
            examples = [shots[source] for source in draft.parents if source in shots]
            turns, task = draft.turns, self.config.task
            return requests.answer_request(task, examples, turns, draft.context, explain=explain)

        stage = 1 + 10 * len(max((d.turns for d in drafts), key=len, default=()))
        asked = self._ask(drafts, request, stage, self.config.samples_per_question)
        return [self._filtered_answers(draft, answers) for draft, answers in asked]

    def _filtered_answers(self, draft: Draft, answers: Sequence[Answer]) -> Draft:
        if not answers:
            return draft
        rejections = [self._answer_rejection(draft, answer) for answer in answers]
        passing = tuple(a.text.strip() for a, reason in zip(answers, rejections, strict=True) if reason is None)
        # distinct: an answer is not better than itself
        passing = tuple(dict.fromkeys(passing))
        if len(passing) < (2 if self.config.makes.kind == "preferences" else 1):
            first = next((reason for reason in rejections if reason is not None), None)
            return replace(draft, rejection=first or Rejection("tie", "all answers are the same"))
        return replace(draft, answers=passing)

    def _answer_rejection(self, draft: Draft, answer: Answer) -> Rejection | None:
        text, filters = answer.text.strip(), self.config.filters
        if (incomplete := check_incomplete("answer", text, answer.stopped)) is not None:
            return incomplete
        if self.config.makes.kind == "explanations" and requests.final_answer(text) is None:
            return Rejection("form", f"no line begins with {requests.ANSWER_LINE}")
        rejection = check_answer_length(text, filters.max_answer_words)
        if rejection is None and filters.refusals and not self.sources.seeds_refuse:
            rejection = check_refusal(text)
        if rejection is None and self._language is not None:
            rejection = self._language.check(text)
        if rejection is None and filters.grounded and draft.context and self.sources.passages:
            rejection = check_grounded(text, draft.context)
        return rejection

    def _scored(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Drafts with their answers sorted by score, best first."""
        open_drafts = [d for d in drafts if d.rejection is None]
        if self._score is None or not open_drafts:
            return list(drafts)
        explains = self.config.makes.kind == "explanations"
        questions = [
            AnsweredQuestion(
                d.seed or made_record(d.turns, d.context, d.number),
                [(requests.final_answer(a) or a) if explains else a for a in d.answers],
            )
            for d in open_drafts
        ]
        scores = dict(zip((d.number for d in open_drafts), self._score(questions), strict=True))
        return [self._best_first(d, scores[d.number]) if d.rejection is None else d for d in drafts]

    def _best_first(self, draft: Draft, scores: Sequence[float]) -> Draft:
        order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: of equal scores the first sample
        best, worst = scores[order[0]], scores[order[-1]]
        rejection, verifier = None, self.config.selection.verifier
        # a reward model's scores have no level: only their order counts
        if verifier is not None and verifier.kind != "model" and best <= 0.0:
            rejection = Rejection("verifier", f"no answer is accepted, the best scores {best:g}")
        if self.config.makes.kind == "preferences" and best == worst:
            rejection = Rejection("tie", f"all answers score {best:g}")
        ordered, values = tuple(draft.answers[i] for i in order), tuple(scores[i] for i in order)
        return replace(draft, answers=ordered, scores=values, rejection=rejection)

    def _finished(self, draft: Draft) -> Draft:
        """The draft after the filter of near duplicates, which reads context, question and answer."""
        if draft.rejection is not None or self._duplicates is None:
            return draft
        text = "\n".join([draft.context or "", *(turn.content for turn in draft.turns), draft.answers[0]])
        rejection = self._duplicates.check(text)
        if rejection is None:
            self._duplicates.add(text)
        return replace(draft, rejection=rejection)

    def rejections(self) -> Counter[str]:
        """Number of drafts that each filter left out."""
        return Counter(draft.rejection.filter for draft in self.rejected if draft.rejection is not None)


def _sample(chance: np.random.Generator, items: Sequence[Any], count: int) -> list[Any]:
    return [items[i] for i in chance.permutation(len(items))[:count]]


def require_rows(teaching: Teaching) -> None:
    """Raise `DataError` where no row was kept."""
    if not teaching.kept:
        counts = ", ".join(f"{name}: {count:,}" for name, count in teaching.rejections().most_common())
        hint = "look at rejected.jsonl, or at rung synth teach --preview 5"
        raise DataError(f"none of {teaching.tried:,} questions became a row", given=counts, hint=hint)
