"""Soft preference labels by rules, and whether their critic can be trusted (Bai et al. 2022, section 4.1).

The critic chooses between two answers by the log-probabilities of A and B. Each pair is shown in both orders and the
two probabilities are averaged, so that a preference for the answer that is shown first cancels out; the paper shows one
order. A critic is trusted where it agrees with labels of people more often than chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rung.config.constitution import ConstitutionConfig, PreferencesConfig, PrincipleConfig
from rung.evaluation.judge import AnswerPair
from rung.inference.ask import Answer, Conversation
from rung.results.synth import CriticAgreement
from rung.scoring.pairwise import Outcome, majority
from rung.scoring.stats import score_interval
from rung.synth.constitution_sources import ConstitutionSources
from rung.synth.filters import LanguageFilter, Rejection
from rung.synth.principles import CHOICE, OPTIONS, REASONS, AnswerComparison, Transcripts
from rung.synth.revisions import SEEDS_PER_ROUND, check_text, draw_rule
from rung.synth.sources import Seed
from rung.synth.writer import Writer
from rung.types import Message

PROBABILITY_DIGITS = 6
"""Digits of a probability in a row."""


@dataclass(frozen=True, slots=True)
class LabeledPair:
    """Two answers to a seed, and the probability that the first one follows the rule better."""

    number: int
    seed: Seed
    rule: str = ""
    first: str = ""
    second: str = ""
    by_order: tuple[float, float] = (np.nan, np.nan)
    """P(first is better) where the first is shown first, and where it is shown second."""
    probability: float = np.nan
    """Their mean, clamped."""
    rejection: Rejection | None = None


class FeedbackModel:
    """A critic that compares answers by the rules of a constitution (Bai et al. 2022 call it the feedback model)."""

    def __init__(self, config: ConstitutionConfig, critic: Writer, transcripts: Transcripts, seed: int) -> None:
        """The critic writes reasons where the config asks for them."""
        self.config, self.critic, self.seed = config, critic, seed
        self.examples = tuple(transcripts.before_comparison())
        self._reasons = isinstance(config.makes, PreferencesConfig) and config.makes.reasoning

    def probabilities(
        self, pairs: Sequence[AnswerComparison], rules: Sequence[PrincipleConfig], stage: Sequence[int]
    ) -> NDArray[np.float64]:
        """P(first is better) of each pair in both orders, [P, 2]; NaN where the critic gives no verdict."""
        places = [(i, swapped) for i in range(len(pairs)) for swapped in (False, True)]
        if self._reasons:
            conversations, readable = self._with_reasons(pairs, rules, places, stage)
        else:
            conversations = [self._asked(pairs[i], rules[i], swapped=swapped) for i, swapped in places]
            readable = np.ones(len(places), dtype=bool)
        chosen = np.full(len(places), np.nan)
        if readable.any():
            asked = [c for c, is_readable in zip(conversations, readable, strict=True) if is_readable]
            chosen[readable] = self.critic.choices(asked, OPTIONS)[:, 0]
        shown_first = chosen.reshape(-1, 2)
        return np.stack([shown_first[:, 0], 1.0 - shown_first[:, 1]], axis=1)

    def _asked(
        self, pair: AnswerComparison, rule: PrincipleConfig, *, swapped: bool, instruction: str = CHOICE
    ) -> Conversation:
        return Conversation((*self.examples, pair.request(rule, swapped=swapped, instruction=instruction)))

    def _with_reasons(
        self,
        pairs: Sequence[AnswerComparison],
        rules: Sequence[PrincipleConfig],
        places: Sequence[tuple[int, bool]],
        stage: Sequence[int],
    ) -> tuple[list[Conversation], NDArray[np.bool_]]:
        """The conversations with the reasons that the critic wrote, behind which it is asked to choose."""
        asked = [self._asked(pairs[i], rules[i], swapped=swapped, instruction=REASONS) for i, swapped in places]
        replies = self.critic.answers(asked, [self.seed, *stage])
        texts = ["" if isinstance(reply, str) else reply[0].text.strip() for reply in replies]
        choices = [
            Conversation((*conversation.turns, Message("assistant", text), Message("user", CHOICE)))
            for conversation, text in zip(asked, texts, strict=True)
        ]
        return choices, np.array([bool(text) for text in texts])


def label_pairs(
    feedback: FeedbackModel,
    makes: PreferencesConfig,
    teacher: Writer,
    sources: ConstitutionSources,
    on_round: Callable[[int, int], None],
) -> list[LabeledPair]:
    """Sample pairs of answers to every seed, and compare each by a rule that is drawn for it.

    `on_round` receives the numbers of seeds and of labeled pairs so far.
    """
    config, labeled, seeds = feedback.config, list[LabeledPair](), sources.seeds
    per_seed = makes.pairs_per_question
    for start in range(0, len(seeds), SEEDS_PER_ROUND):
        part = seeds[start : start + SEEDS_PER_ROUND]
        replies = teacher.answers([seed.conversation for seed in part], [feedback.seed, 0, start], samples=2 * per_seed)
        pairs = [
            _sampled_pair(config, (start + i) * per_seed + k, part[i], reply, k, sources.language)
            for i, reply in enumerate(replies)
            for k in range(per_seed)
        ]
        labeled += _labeled(feedback, makes.probability_range, pairs, start)
        on_round(start + len(part), sum(pair.rejection is None for pair in labeled))
    return labeled


def _sampled_pair(
    config: ConstitutionConfig,
    number: int,
    seed: Seed,
    reply: tuple[Answer, ...] | str,
    place: int,
    language: LanguageFilter | None,
) -> LabeledPair:
    """Two of the sampled answers, or why they are no pair."""
    pair = LabeledPair(number, seed)
    if isinstance(reply, str):
        return replace(pair, rejection=Rejection("failed", reply))
    answers = [(answer.text.strip(), answer.stopped) for answer in reply[2 * place : 2 * place + 2]]
    checks = (check_text("answer", text, stopped, config.filters, language) for text, stopped in answers)
    rejection = next(filter(None, checks), None)
    (first, _), (second, _) = answers
    if rejection is None and first == second:
        rejection = Rejection("tie", "both answers are the same")
    return replace(pair, first=first, second=second, rejection=rejection)


def _labeled(
    feedback: FeedbackModel, limits: tuple[float, float], pairs: Sequence[LabeledPair], start: int
) -> list[LabeledPair]:
    """The pairs with the critic's probabilities."""
    config, open_pairs = feedback.config, [pair for pair in pairs if pair.rejection is None]
    rules = [draw_rule(config.principles, feedback.seed, pair.number) for pair in open_pairs]
    compared = [AnswerComparison(p.seed.turns, p.seed.context, p.first, p.second) for p in open_pairs]
    by_order = feedback.probabilities(compared, rules, (1, start)).tolist() if compared else []
    low, high = limits
    found: dict[int, LabeledPair] = {}
    for pair, rule, (as_first, as_second) in zip(open_pairs, rules, by_order, strict=True):
        mean = (as_first + as_second) / 2
        rejection = None
        if np.isnan(mean):
            rejection = Rejection("unreadable", "the critic names neither answer")
        elif round(mean, PROBABILITY_DIGITS) == 0.5:
            rejection = Rejection("tie", "the critic has no preference over both orders")
        probability = float(np.clip(mean, low, high))
        labeled = replace(pair, rule=rule.rule, by_order=(as_first, as_second), probability=probability)
        found[pair.number] = replace(labeled, rejection=rejection)
    return [found.get(pair.number, pair) for pair in pairs]


def agreement_with_people(
    feedback: FeedbackModel, labeled: Sequence[AnswerPair], people: Sequence[Sequence[Outcome | None]], seed: int
) -> CriticAgreement:
    """How often the critic prefers what most people prefer; its preference is the mean over all rules and both orders.

    It is trusted where the lower end of the 95 % interval of this share is above 0.5. Pairs without a majority for one
    answer do not count.
    """
    majorities = [majority(labels) for labels in people]
    usable = [i for i, label in enumerate(majorities) if label in ("first", "second")]
    principles = feedback.config.principles
    compared = [
        AnswerComparison(
            (Message("user", labeled[i].question),), labeled[i].context, labeled[i].first, labeled[i].second
        )
        for i in usable
    ]
    rules = [rule for rule in principles for _ in compared]
    by_order = feedback.probabilities(compared * len(principles), rules, (2, 0)) if compared else np.empty((0, 2))
    by_rule = by_order.mean(axis=1).reshape(len(principles), -1)  # [rules, pairs]
    unreadable = int(np.isnan(by_rule).any(axis=0).sum())
    if not usable or np.isnan(by_rule).all():
        reason = "none of the labeled pairs has a majority for one answer and a verdict"
        return CriticAgreement(trusted=False, reason=reason, pairs=0, unreadable=unreadable)
    # no verdict is no preference: left out, the pairs that are easy to judge would decide alone
    known = np.where(np.isnan(by_rule), 0.5, by_rule)
    labels = [str(majorities[i]) for i in usable]
    agrees = [_agreement(float(mean), label) for mean, label in zip(known.mean(axis=0), labels, strict=True)]
    share = score_interval(agrees, [labeled[i].cluster for i in usable], seed=seed)
    shares = {
        rule.rule: float(np.mean([_agreement(float(p), label) for p, label in zip(row, labels, strict=True)]))
        for rule, row in zip(principles, known, strict=True)
    }
    trusted = share.low > 0.5
    reason = f"it agrees with people on {share.mean:.2f} [{share.low:.2f}, {share.high:.2f}] of {len(agrees)} pairs"
    reason += "" if trusted else ", where chance is 0.50"
    reason += f"; {unreadable:,} of them without a verdict by every rule" if unreadable else ""
    worst = min(shares, key=shares.__getitem__)
    if len(shares) > 1 and shares[worst] <= 0.5:
        reason += f"; by the rule {worst!r} alone on {shares[worst]:.2f}"
    shown_first = (by_order[:, 0] + 1.0 - by_order[:, 1]) / 2
    return CriticAgreement(
        trusted=trusted,
        reason=reason,
        pairs=len(agrees),
        unreadable=unreadable,
        agreement=share,
        by_rule=shares,
        shown_first=float(np.nanmean(shown_first)),
    )


def _agreement(mean: float, majority_label: str) -> float:
    """1 where the critic prefers what people prefer, 0 where it prefers the other, 0.5 without a preference."""
    return 0.5 if mean == 0.5 else float((mean > 0.5) == (majority_label == "first"))
