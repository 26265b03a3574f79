"""Near duplicates: word n-grams of held-out rows that also stand in the training rows, with the text that matches.

A flag alone misleads: on GSM8K 80 test questions share an 8-gram with the training questions, and 3 a 13-gram. So each
match carries its text and how much of the row it covers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

from rung.data.byte_store import chunks
from rung.data.records import Records, character_count
from rung.types import Record

NGRAM_WORDS = (8, 13)
"""Lengths looked at: 13 as in GPT-3's contamination study (Brown et al. 2020, appendix C), 8 to see what comes near."""
_WORD = re.compile(r"\w+")
_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word of an n-gram is lost
_MERGE = 1 << 20
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class NgramMatch:
    """A held-out row and the training row that shares most n-grams with it."""

    held_out: str
    train: str
    containment: float
    """Share of the held-out row's n-grams that stand in the training row."""
    matched: str
    """The longest run of shared words."""

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.held_out} ~ {self.train} ({self.containment:.0%}): {self.matched}"


def words(text: str) -> list[str]:
    """Words, casefolded, without punctuation."""
    return _WORD.findall(text.casefold())


def ngram_hashes(texts: Sequence[list[str]], n: int) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit hash of each n-gram of words (uint64), and which text it stands in. Good within one process only."""
    lengths = [len(text) for text in texts]
    own = np.fromiter(map(hash, chain.from_iterable(texts)), dtype=np.int64, count=sum(lengths)).view(np.uint64)
    count = max(0, len(own) - n + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        hashes = hashes * _HASH_FACTOR + own[i : i + count]
    owner = np.repeat(np.arange(len(texts)), lengths)
    inside = owner[:count] == owner[len(own) - count :]
    return hashes[inside], owner[:count][inside]


class HashSet:
    """Hashes, each kept once."""

    def __init__(self) -> None:
        self.total = 0
        self._known = np.empty(0, dtype=np.uint64)
        self._waiting: list[np.ndarray] = []
        self._room = _MERGE

    def add(self, hashes: np.ndarray) -> None:
        """Take in some more."""
        self.total += len(hashes)
        self._waiting.append(hashes)
        self._room -= len(hashes)
        if self._room <= 0:
            self.values()

    def values(self) -> np.ndarray:
        """All of them, sorted: uint64."""
        every = np.concatenate([self._known, *self._waiting])
        self._waiting.clear()
        every.sort()  # np.unique takes several times the room and the time
        self._known = every[np.concatenate([[True], every[1:] != every[:-1]])] if len(every) else every
        self._room = max(_MERGE, len(self._known) // 2)
        return self._known


def near_duplicates(train: Iterable[Record], held_out: Iterable[Record], n: int) -> tuple[NgramMatch, ...]:
    """Held-out rows that share at least one n-gram of words with a training row, most covered first.

    Of the training rows that share equally many the first is named.
    """
    train, held_out = Records.from_records(train), Records.from_records(held_out)
    wanted = HashSet()
    for _, texts in _chunked_words(held_out):
        wanted.add(ngram_hashes(texts, n)[0])
    holders = _PostingLists(train, wanted.values(), n)
    found = [near for start, texts in _chunked_words(held_out) for near in holders.nearest(held_out, start, texts)]
    return tuple(sorted(found, key=lambda x: -x.containment))


class _PostingLists:
    """Which training rows hold which of the wanted n-grams."""

    def __init__(self, train: Records, wanted: np.ndarray, n: int) -> None:
        self.train, self.n, self._wanted = train, n, wanted
        pairs = [np.empty((0, 2), dtype=np.int64)]  # index of the n-gram, training row
        for start, texts in _chunked_words(train):
            grams, owner = self._places(texts)
            pairs.append(np.unique(np.stack([grams, owner + start], axis=1), axis=0))
        grams, rows = np.concatenate(pairs).T
        self._rows = rows[np.argsort(grams, kind="stable")]
        self._ends = np.concatenate([[0], np.cumsum(np.bincount(grams, minlength=len(wanted)))])
        # Rows of one template share the same n-grams with thousands of others.
        self._best = lru_cache(maxsize=1024)(self._most_votes)

    def nearest(self, held_out: Records, start: int, texts: Sequence[list[str]]) -> Iterator[NgramMatch]:
        """What was found for the rows from `start` on, whose words are `texts`."""
        grams, owner = self._places(texts)
        held = self._ends[grams + 1] > self._ends[grams]
        grams, owner = grams[held], owner[held]
        for i in np.unique(owner).tolist():
            best = self._best(tuple(np.unique(grams[owner == i]).tolist()))
            near = _overlap(texts[i], prompt_words(self.train[best]), self.n)
            if near is not None:
                yield NgramMatch(str(held_out.source(start + i)), str(self.train.source(best)), *near)

    def _places(self, texts: Sequence[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        """The n-grams of texts that are wanted, by their index, and the text of each."""
        hashes, owner = ngram_hashes(texts, self.n)
        if not len(self._wanted):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        at = np.minimum(np.searchsorted(self._wanted, hashes), len(self._wanted) - 1)
        known = self._wanted[at] == hashes
        return at[known], owner[known]

    def _most_votes(self, grams: tuple[int, ...]) -> int:
        votes = np.concatenate([self._rows[self._ends[g] : self._ends[g + 1]] for g in grams])
        return int(np.bincount(votes).argmax())


def _overlap(asked: list[str], theirs: list[str], n: int) -> tuple[float, str] | None:
    """Share of the n-grams of a text that another holds, and the longest run of words in both."""
    known = set(_prompt_ngrams(theirs, n))
    shared = [gram in known for gram in _prompt_ngrams(asked, n)]
    if not any(shared):  # two n-grams of one hash
        return None
    start, length = _longest_run(shared)
    return sum(shared) / len(shared), " ".join(asked[start : start + length + n - 1])


def _chunked_words(records: Records) -> Iterator[tuple[int, list[list[str]]]]:
    """What is asked, in words, some rows at a time with the index of the first."""
    start = 0
    for chunk in chunks(records, character_count, count=_ROWS, limit=_MERGE):
        yield start, [prompt_words(record) for record in chunk]
        start += len(chunk)


def _longest_run(flags: list[bool]) -> tuple[int, int]:
    best = (0, 0)
    start = 0
    for i, flag in enumerate([*flags, False]):
        if not flag:
            best = max(best, (start, i - start), key=lambda run: run[1])
            start = i + 1
    return best


def prompt_words(record: Record) -> list[str]:
    """The context and the turns before the answer, without system turns: those are shared by design."""
    if record.text is not None:
        return words(record.text)
    turns = [m.content for m in record.messages[:-1] if m.role != "system"]
    return words(" ".join([record.context or "", *turns]))


def _prompt_ngrams(asked: list[str], n: int) -> list[str]:
    return [" ".join(asked[i : i + n]) for i in range(len(asked) - n + 1)]


SHINGLE_CHARACTERS = 5
"""Characters of a shingle."""
JACCARD_THRESHOLD = 0.8
"""Jaccard similarity of the sets of shingles from which two texts count as the same."""
BANDS, ROWS = 25, 5
"""Of the signature. A pair of similarity s is looked at with probability 1 - (1 - s^5)^25: 0.99995 at 0.8."""
_SHINGLE_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class FuzzyMatch:
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


def fuzzy_duplicates(
    train: Iterable[Record], held_out: Iterable[Record], least: float = JACCARD_THRESHOLD
) -> tuple[FuzzyMatch, ...]:
    """Held-out rows of which a training row shares at least `least` of the shingles of both, most alike first.

    Signatures of the held-out rows alone are kept; training rows are read one at a time (Broder 1997; banding as in
    Leskovec et al., Mining of Massive Datasets, section 3.4).
    """
    from datasketch import MinHashLSH

    known = list(_shingled_texts(Records.from_records(held_out)))
    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    for i, (_, text) in enumerate(known):
        if text:
            index.insert(i, _signature(text))
    best: dict[int, tuple[float, str, str]] = {}
    for source, text in _shingled_texts(Records.from_records(train)):
        for i in index.query(_signature(text)) if text else ():
            similar = jaccard(known[i][1], text)
            if similar >= least and similar > best.get(i, (0.0,))[0]:
                best[i] = similar, source, text
    found = [FuzzyMatch(known[i][0], source, similar, text) for i, (similar, source, text) in sorted(best.items())]
    return tuple(sorted(found, key=lambda alike: -alike.jaccard))


def jaccard(first: str, second: str) -> float:
    """Shingles in both over shingles in either: 1 for equal texts."""
    a, b = shingles(first), shingles(second)
    return len(a & b) / len(a | b)


def shingles(text: str) -> set[str]:
    """Every run of five characters; a shorter text is its own."""
    return {text[i : i + SHINGLE_CHARACTERS] for i in range(max(1, len(text) - SHINGLE_CHARACTERS + 1))}


def _shingled_texts(records: Records) -> Iterator[tuple[str, str]]:
    for record in records:
        yield str(record.source), " ".join(prompt_words(record))


def _signature(text: str) -> Any:
    from datasketch import MinHash

    found = MinHash(num_perm=BANDS * ROWS, hashfunc=int, scheme="affine32")
    points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32).astype(np.uint64)
    count = max(1, len(points) - SHINGLE_CHARACTERS + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(min(SHINGLE_CHARACTERS, len(points))):
        hashes = hashes * _SHINGLE_HASH_FACTOR + points[i : i + count]
    found.update_batch(np.unique(hashes >> np.uint64(32)).tolist())
    return found
