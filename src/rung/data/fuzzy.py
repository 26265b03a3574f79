"""Fuzzy duplicates: texts most of whose character 5-grams are the same, found by MinHash and confirmed one by one.

Words n-grams of long documents are nearly empty for questions of ten words, and a changed word in five leaves no 8-gram
whole. Character 5-grams serve questions and documents alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rung.data.near import asked_in_words
from rung.data.records import Records
from rung.types import Record

SIZE = 5
"""Characters of a shingle."""
ALIKE = 0.8
"""Jaccard similarity of the sets of shingles from which two texts count as the same."""
BANDS, ROWS = 25, 5
"""Of the signature. A pair of similarity s is looked at with probability 1 - (1 - s^5)^25: 0.99995 at 0.8."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Alike:
    """A held-out row and the training row most like it."""

    held_out: str
    train: str
    jaccard: float
    """Exact, of the sets of character 5-grams."""
    text: str
    """What the training row asks, in words."""

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.held_out} ~ {self.train} ({self.jaccard:.0%}): {self.text}"


def fuzzy_duplicates(train: Iterable[Record], held_out: Iterable[Record], least: float = ALIKE) -> tuple[Alike, ...]:
    """Held-out rows of which a training row shares at least `least` of the shingles of both, most alike first.

    Signatures of the held-out rows alone are kept; training rows are read one at a time (Broder 1997; banding as in
    Leskovec et al., Mining of Massive Datasets, section 3.4).
    """
    from datasketch import MinHashLSH

    known = list(_texts(Records.of(held_out)))
    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    for i, (_, text) in enumerate(known):
        if text:
            index.insert(i, _signature(text))
    best: dict[int, tuple[float, str, str]] = {}
    for source, text in _texts(Records.of(train)):
        for i in index.query(_signature(text)) if text else ():
            similar = jaccard(known[i][1], text)
            if similar >= least and similar > best.get(i, (0.0,))[0]:
                best[i] = similar, source, text
    found = [Alike(known[i][0], source, similar, text) for i, (similar, source, text) in sorted(best.items())]
    return tuple(sorted(found, key=lambda alike: -alike.jaccard))


def jaccard(first: str, second: str) -> float:
    """Shingles in both over shingles in either: 1 for equal texts."""
    a, b = shingles(first), shingles(second)
    return len(a & b) / len(a | b)


def shingles(text: str) -> set[str]:
    """Every run of five characters; a shorter text is its own."""
    return {text[i : i + SIZE] for i in range(max(1, len(text) - SIZE + 1))}


def _texts(records: Records) -> Iterator[tuple[str, str]]:
    for record in records:
        yield str(record.source), " ".join(asked_in_words(record))


def _signature(text: str) -> Any:
    from datasketch import MinHash

    found = MinHash(num_perm=BANDS * ROWS, hashfunc=int, scheme="affine32")
    points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32).astype(np.uint64)
    count = max(1, len(points) - SIZE + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(min(SIZE, len(points))):
        hashes = hashes * _FACTOR + points[i : i + count]
    found.update_batch(np.unique(hashes >> np.uint64(32)).tolist())
    return found
