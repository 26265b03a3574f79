"""The rows of a constitution, what was left out of them, and what the rounds did: from answers and pairs to JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rung.data.rows import answer_row, columns_of, preference_row
from rung.results.synth import RevisionRound
from rung.scoring.words import letter_tokens
from rung.synth.feedback import PROBABILITY_DIGITS, LabeledPair
from rung.synth.filters import Rejection, check_refusal
from rung.synth.revisions import RevisedAnswer
from rung.synth.sources import Seed


def shown_revisions(answer: RevisedAnswer) -> dict[str, Any]:
    """An answer with its rounds, for a preview."""
    rounds = [{"rule": r.rule, "critique": r.critique, "revision": r.text} for r in answer.revisions]
    shown = {
        "question": answer.seed.question,
        "answer": answer.first,
        "rounds": rounds,
        "unchanged": len(answer.unchanged_rounds),
    }
    return shown | _reason(answer.rejection)


def shown_pair(pair: LabeledPair) -> dict[str, Any]:
    """A pair with its probability, for a preview."""
    shown: dict[str, Any] = {"question": pair.seed.question, "first": pair.first, "second": pair.second}
    if pair.rule:
        shown |= {"rule": pair.rule, "probability_of_first": round(pair.probability, 3)}
    return shown | _reason(pair.rejection)


def _reason(rejection: Rejection | None) -> dict[str, str]:
    return {} if rejection is None else {"left_out_by": rejection.filter, "reason": rejection.reason}


def helpful_row(seed: Seed, answer: str) -> dict[str, Any]:
    """A row that is learned as it is."""
    return _answered(seed, answer, {"kind": "helpful", "parents": [seed.source]})


def _answered(seed: Seed, answer: str, made: dict[str, Any]) -> dict[str, Any]:
    return {**answer_row(seed.turns, answer, **columns_of(seed.record)), "made": made}


def revision_rows(answers: Iterable[RevisedAnswer]) -> Iterable[dict[str, Any]]:
    """A row for every revision."""
    for answer in answers:
        before = answer.first
        for revision in answer.revisions:
            made: dict[str, Any] = {"kind": "revision", "number": answer.number, "round": revision.round}
            made |= {"rule": revision.rule, "before": before, "parents": [answer.seed.source]}
            before = revision.text
            yield _answered(answer.seed, revision.text, made)


def preference_rows(pairs: Iterable[LabeledPair]) -> Iterable[dict[str, Any]]:
    """A preference with a soft label for every pair that is in."""
    for pair in pairs:
        if pair.rejection is not None:
            continue
        seed, is_first = pair.seed, pair.probability > 0.5
        chosen, rejected = (pair.first, pair.second) if is_first else (pair.second, pair.first)
        probability = round(max(pair.probability, 1.0 - pair.probability), PROBABILITY_DIGITS)
        columns = columns_of(seed.record)
        # a server that names one answer in both orders is certain: such a row is a hard label
        columns |= {"probability": probability if probability < 1.0 else None}
        made = {"number": pair.number, "rule": pair.rule, "parents": [seed.source]}
        yield {**preference_row(seed.turns, chosen, rejected, **columns), "made": made}


def rejected_rows(outcome: Sequence[RevisedAnswer] | Sequence[LabeledPair]) -> Iterable[dict[str, Any]]:
    """What was left out, with the filter and its reason."""
    for item in outcome:
        if item.rejection is None:
            continue
        texts = [item.rejected_text] if isinstance(item, RevisedAnswer) else [item.first, item.second]
        row = {"number": item.number, "filter": item.rejection.filter, "reason": item.rejection.reason}
        row |= {"question": item.seed.question, "answers": [text for text in texts if text]}
        yield {name: value for name, value in row.items() if value not in ("", [])}


def round_summaries(answers: Sequence[RevisedAnswer], rounds: int) -> tuple[RevisionRound, ...]:
    """Round 0 and all rounds: how many answers changed, and how answers look after each."""
    first = [answer.first for answer in answers if answer.first]
    summaries = [_round_summary(0, 0, 0, first)]
    for number in range(1, rounds + 1):
        after = [_answer_after(answer, number) for answer in answers if answer.first]
        revised = sum(any(r.round == number for r in answer.revisions) for answer in answers)
        unchanged = sum(number in answer.unchanged_rounds for answer in answers)
        summaries.append(_round_summary(number, revised, unchanged, after))
    return tuple(summaries)


def _answer_after(answer: RevisedAnswer, number: int) -> str:
    texts = [r.text for r in answer.revisions if r.round <= number]
    return texts[-1] if texts else answer.first


def _round_summary(number: int, revised: int, unchanged: int, texts: Sequence[str]) -> RevisionRound:
    total = max(1, len(texts))
    refusing = sum(check_refusal(text) is not None for text in texts) / total
    words = round(sum(len(letter_tokens(text)) for text in texts) / total, 1)
    return RevisionRound(number=number, revised=revised, unchanged=unchanged, refusing=refusing, words=words)


def preference_facts(pairs: Sequence[LabeledPair]) -> dict[str, float]:
    """Means over the pairs that have a verdict in both orders."""
    by_order = np.array([pair.by_order for pair in pairs]).reshape(-1, 2)
    by_order = by_order[~np.isnan(by_order).any(axis=1)]
    kept = [max(pair.probability, 1.0 - pair.probability) for pair in pairs if pair.rejection is None]
    if not kept:
        return {}
    shown_first = (by_order[:, 0] + 1.0 - by_order[:, 1]) / 2
    consistent = (by_order[:, 0] > 0.5) == (by_order[:, 1] > 0.5)
    means = {"probability": np.mean(kept), "shown_first": np.mean(shown_first), "consistent": np.mean(consistent)}
    return {name: round(float(value), 4) for name, value in means.items()}
