"""How much of a test set stands in the training data: the same, in long runs of words, or nearly the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rung.data.deduplication import NGRAM_WORDS, FuzzyMatch, NgramMatch, fuzzy_duplicates, near_duplicates
from rung.data.records import Records
from rung.data.splits import overlapping_pairs
from rung.types import Record

EXAMPLES = 3
"""Of each tier that are named; the flags cover all."""


@dataclass(frozen=True, slots=True)
class Contamination:
    """Test items that stand in the training rows, by tier; an item may be in several."""

    items: int
    train: int
    exact: tuple[tuple[str, str], ...]
    """Items whose normalized prompt is that of a training row, with that row."""
    ngrams: dict[int, tuple[NgramMatch, ...]]
    """By n: items that share a run of n words with a training row, with the text that matches."""
    fuzzy: tuple[FuzzyMatch, ...]

    @property
    def tiers(self) -> dict[str, tuple[Any, ...]]:
        """What was found, strictest first."""
        found: dict[str, tuple[Any, ...]] = {"exact": self.exact}
        found |= {f"{n}-gram": self.ngrams[n] for n in sorted(self.ngrams, reverse=True)}
        return {**found, "fuzzy": self.fuzzy}

    def flagged(self, tier: str) -> set[str]:
        """Sources of a tier's items."""
        return {x[0] if isinstance(x, tuple) else x.held_out for x in self.tiers[tier]}

    def examples(self, tier: str) -> list[dict[str, Any]]:
        """The most alike of a tier."""
        shown = self.tiers[tier][:EXAMPLES]
        return [{"held_out": x[0], "train": x[1]} if isinstance(x, tuple) else x.to_json() for x in shown]


def contamination(train: Iterable[Record], test: Iterable[Record]) -> Contamination:
    """Compare the prompts of test items with those of training rows, context included, answers and system turns not."""
    train, test = Records.from_records(train), Records.from_records(test)
    exact = zip(*overlapping_pairs(test, train), strict=True)
    return Contamination(
        items=len(test),
        train=len(train),
        exact=tuple((str(test.source(i)), str(train.source(k))) for i, k in exact),
        ngrams={n: near_duplicates(train, test, n) for n in NGRAM_WORDS},
        fuzzy=fuzzy_duplicates(train, test),
    )
