"""Critiques and revisions of answers by rules: supervised learning of a constitution (Bai et al. 2022, section 3.1).

Each round draws a rule for an answer, asks for a critique by it and then for a revision, which takes the place of the
answer in the next round. All revisions become rows, not the last one alone (section 3.2). A revision that equals the
answer before it adds no row; one that a filter leaves out ends the rounds of its answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rung.config.constitution import ConstitutionConfig, PrincipleConfig, RevisionFiltersConfig, RevisionsConfig
from rung.inference.ask import Answer
from rung.synth.constitution_sources import ConstitutionSources
from rung.synth.filters import LanguageFilter, Rejection, check_answer_length, check_incomplete
from rung.synth.principles import critique_dialogue, revision_dialogue
from rung.synth.sources import Seed
from rung.synth.writer import Writer
from rung.types import Message

SEEDS_PER_ROUND = 64
"""Seeds whose answers are revised at once: a batch for a model in this process, enough requests for a server."""
_ROLE_LINE = re.compile(
    r"^(?:[*#>\s_]{0,6}(?:human|user|assistant|ai|critique(?: request)?|revision(?: request)?)[*_ ]{0,3}:|<\|\w+\|>)",
    re.I | re.M,
)
_NEW = r"(?:revis\w*|rewrit\w*|rewrote|correct(?:ed|ion)|updated|improved|new|better)"
_TEXT = r"(?:answer|response|version|reply|text)"
_HERE = r"(?:here(?:['’]s| is)|this is|below is)"
_PREFACE = re.compile(
    r"\W*(?:(?:sure|certainly|of course|okay|ok|absolutely)\b[^\n:]{0,60}?)?"
    rf"(?:(?:{_HERE}\b[^\n:]{{0,40}}?)?\b{_NEW}\b[^\n:]{{0,20}}?\b{_TEXT}\b[^\n:]{{0,80}}:"
    rf"|{_HERE} (?:a|the|my) {_TEXT},? (?:rewritten|revised)\b[^\n:]{{0,60}}:"
    r"|\b(?:i can|i['’]ll|let me) (?:rewrite|revise|correct)\b[^\n:]{0,60}:)",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Revision:
    """An answer that was written by a rule."""

    round: int
    """From 1."""
    rule: str
    critique: str | None
    text: str


@dataclass(frozen=True, slots=True)
class RevisedAnswer:
    """The answer to a seed, its revisions, and what ended them."""

    number: int
    seed: Seed
    first: str = ""
    """The answer that was revised."""
    revisions: tuple[Revision, ...] = ()
    unchanged_rounds: tuple[int, ...] = ()
    """Rounds whose revision equals the answer before it."""
    rejection: Rejection | None = None
    rejected_text: str = ""

    @property
    def last(self) -> str:
        """The newest answer."""
        return self.revisions[-1].text if self.revisions else self.first


def check_roles(text: str) -> Rejection | None:
    """`roles`: a line begins with the name of a speaker or of a part of the dialogue, and a colon."""
    match = _ROLE_LINE.search(text)
    return Rejection("roles", f"it goes on as another speaker: {match.group(0).strip()!r}") if match else None


def check_preface(text: str) -> Rejection | None:
    """`prefaces`: the text begins by announcing a revised answer, in English."""
    match = _PREFACE.match(text)
    return Rejection("prefaces", f"it announces itself: {match.group(0)!r}") if match else None


def check_text(
    name: str, text: str, stopped: bool, filters: RevisionFiltersConfig, language: LanguageFilter | None
) -> Rejection | None:
    """The first filter that an answer or a revision, by its `name`, does not pass."""
    return (
        check_incomplete(name, text, stopped)
        or (check_roles(text) if filters.roles else None)
        or check_answer_length(text, filters.max_answer_words)
        or (language.check(text) if language is not None else None)
    )


def draw_rule(principles: Sequence[PrincipleConfig], *place: int) -> PrincipleConfig:
    """The rule of one answer or pair, by the seed and its place: it depends on no other."""
    return principles[int(np.random.default_rng(place).integers(len(principles)))]


class RevisionRounds:
    """The rounds of critiques and revisions of one `rung synth constitution`."""

    def __init__(
        self,
        config: ConstitutionConfig,
        makes: RevisionsConfig,
        sources: ConstitutionSources,
        writers: tuple[Writer, Writer],
        seed: int,
        on_round: Callable[[int, int], None],
    ) -> None:
        """`writers` are teacher and critic; `on_round` receives the numbers of seeds and of revisions so far."""
        self.config, self.makes, self.seeds = config, makes, sources.seeds
        self.seed, self.on_round = seed, on_round
        self.teacher, self.critic = writers
        self.examples = tuple(sources.transcripts.before_revision(critiques=makes.critiques))
        self._language = sources.language

    def run(self) -> list[RevisedAnswer]:
        """Revise the answer to every seed."""
        done: list[RevisedAnswer] = []
        for start in range(0, len(self.seeds), SEEDS_PER_ROUND):
            numbers = range(start, min(start + SEEDS_PER_ROUND, len(self.seeds)))
            answers = self._first_answers([RevisedAnswer(i, self.seeds[i]) for i in numbers])
            for number in range(1, self.makes.rounds + 1):
                answers = self._revised(answers, number)
            done += answers
            self.on_round(len(done), sum(len(answer.revisions) for answer in done))
        return done

    def _first_answers(self, answers: Sequence[RevisedAnswer]) -> list[RevisedAnswer]:
        if self.makes.answers == "seeds":
            return [replace(answer, first=answer.seed.answer) for answer in answers]
        replies = self.teacher.answers([a.seed.conversation for a in answers], [self.seed, 0, answers[0].number])
        return [self._first(answer, reply) for answer, reply in zip(answers, replies, strict=True)]

    def _first(self, answer: RevisedAnswer, reply: tuple[Answer, ...] | str) -> RevisedAnswer:
        if isinstance(reply, str):
            return replace(answer, rejection=Rejection("failed", reply))
        text = reply[0].text.strip()
        return replace(answer, first=text, rejection=check_incomplete("answer", text, reply[0].stopped))

    def _revised(self, answers: Sequence[RevisedAnswer], number: int) -> list[RevisedAnswer]:
        """One round of critiques and revisions of all answers that are still in."""
        open_answers = [a for a in answers if a.rejection is None]
        rules = {a.number: draw_rule(self.config.principles, self.seed, a.number, number) for a in open_answers}
        critiques = self._critiques(open_answers, rules, number)
        answers = [replace(a, rejection=_rejection(critiques.get(a.number)) or a.rejection) for a in answers]
        open_answers = [a for a in answers if a.rejection is None]
        conversations = [
            revision_dialogue(self.examples, self._dialogue(a), rules[a.number], _text(critiques.get(a.number)))
            for a in open_answers
        ]
        replies = self.critic.answers(conversations, [self.seed, 2 * number, answers[0].number])
        revised = {
            a.number: self._finished(
                a, Revision(number, rules[a.number].rule, _text(critiques.get(a.number)), ""), reply
            )
            for a, reply in zip(open_answers, replies, strict=True)
        }
        return [revised.get(a.number, a) for a in answers]

    def _critiques(
        self, answers: Sequence[RevisedAnswer], rules: dict[int, PrincipleConfig], number: int
    ) -> dict[int, str | Rejection]:
        """The critique of each answer, or why there is none; nothing where no critiques are asked for."""
        if not self.makes.critiques or not answers:
            return {}
        conversations = [critique_dialogue(self.examples, self._dialogue(a), rules[a.number]) for a in answers]
        replies = self.critic.answers(conversations, [self.seed, 2 * number - 1, answers[0].number])
        found: dict[int, str | Rejection] = {}
        for answer, reply in zip(answers, replies, strict=True):
            if isinstance(reply, str):
                found[answer.number] = Rejection("failed", reply)
            else:
                text = reply[0].text.strip()
                found[answer.number] = check_incomplete("critique", text, reply[0].stopped) or text
        return found

    def _finished(self, answer: RevisedAnswer, revision: Revision, reply: tuple[Answer, ...] | str) -> RevisedAnswer:
        """The answer with its revision, or with the filter that ends its rounds."""
        if isinstance(reply, str):
            return replace(answer, rejection=Rejection("failed", reply))
        text = reply[0].text.strip()
        if (rejection := self._check(text, reply[0].stopped)) is not None:
            return replace(answer, rejection=rejection, rejected_text=text)
        if text == answer.last:
            return replace(answer, unchanged_rounds=(*answer.unchanged_rounds, revision.round))
        return replace(answer, revisions=(*answer.revisions, replace(revision, text=text)))

    def _check(self, text: str, stopped: bool) -> Rejection | None:
        rejection = check_text("revision", text, stopped, self.config.filters, self._language)
        return rejection or (check_preface(text) if self.config.filters.prefaces else None)

    def _dialogue(self, answer: RevisedAnswer) -> list[Message]:
        return [*answer.seed.conversation.turns, Message("assistant", answer.last)]


def _rejection(critique: str | Rejection | None) -> Rejection | None:
    return critique if isinstance(critique, Rejection) else None


def _text(critique: str | Rejection | None) -> str | None:
    return critique if isinstance(critique, str) else None
