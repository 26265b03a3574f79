"""Contamination of a test set: items that occur in the training data exactly, by shared n-grams, or nearly.

Three tiers instead of one score, because each errs differently: exact misses paraphrases, n-grams flag common phrases.
Only prompts are compared; two rows may well have the same short answer. `commands.evaluate` reports the scores with
and without the flagged items.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rung.data.deduplication import NGRAM_WORDS, FuzzyMatch, NgramMatch, fuzzy_duplicates, near_duplicates
from rung.data.records import Records
from rung.data.splits import overlapping_pairs, source_pairs
from rung.types import Record

MAX_EXAMPLES = 3
"""Matches shown per tier; the flags cover all."""


@dataclass(frozen=True, slots=True)
class Contamination:
    """Test items that occur in the training rows, by tier; an item may be in several."""

    items: int
    train: int
    exact: tuple[tuple[str, str], ...]
    """Items whose normalized prompt equals that of a training row, with that row."""
    ngrams: dict[int, tuple[NgramMatch, ...]]
    """By n: items that share a run of n words with a training row, with the text that matches."""
    fuzzy: tuple[FuzzyMatch, ...]

    @property
    def tiers(self) -> dict[str, tuple[Any, ...]]:
        """Matches by tier, strictest tier first."""
        tiers: dict[str, tuple[Any, ...]] = {"exact": self.exact}
        tiers |= {f"{n}-gram": self.ngrams[n] for n in sorted(self.ngrams, reverse=True)}
        return {**tiers, "fuzzy": self.fuzzy}

    def flagged(self, tier: str) -> set[str]:
        """Sources of the items of a tier."""
        return {x[0] if isinstance(x, tuple) else x.held_out for x in self.tiers[tier]}

    def examples(self, tier: str) -> list[dict[str, Any]]:
        """The most similar matches of a tier, as JSON."""
        matches = self.tiers[tier][:MAX_EXAMPLES]
        return [{"held_out": x[0], "train": x[1]} if isinstance(x, tuple) else asdict(x) for x in matches]


def contamination(train: Iterable[Record], test: Iterable[Record]) -> Contamination:
    """Compare the prompts of test items with those of training rows: with context, without answers or system turns."""
    # all tiers iterate several times, so iterables are written to disk once
    train, test = Records.from_records(train), Records.from_records(test)
    items = len(test)
    exact = source_pairs(test, train, overlapping_pairs(test, train))
    ngrams = {n: near_duplicates(train, test, n) for n in NGRAM_WORDS}
    return Contamination(items=items, train=len(train), exact=exact, ngrams=ngrams, fuzzy=fuzzy_duplicates(train, test))
