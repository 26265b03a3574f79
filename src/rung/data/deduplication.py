"""Near duplicates: held-out rows that share word n-grams, or most character 5-grams, with a training row.

A flag alone misleads: on GSM8K 80 test questions share an 8-gram with the training questions, and 3 a 13-gram. So each
match carries its text and how much of the row it covers. Word n-grams are compared by 64-bit hashes of the held-out
rows only, so memory follows the held-out split and not the training data. Used by `check` and `contamination`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby
from typing import Any

import numpy as np

from rung.data.byte_store import chunks
from rung.data.records import Records, character_count
from rung.scoring.words import readable, search_words
from rung.types import Record

NGRAM_WORDS = (8, 13)
"""Lengths of n-grams: 13 as in GPT-3's contamination study (Brown et al. 2020, appendix C), 8 as a weaker signal."""
# odd, so that multiplication modulo 2^64 is invertible and no word is lost
_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)
# hashes collected between two sorts: 8 MB
_MERGE_SIZE = 1 << 20
_CHUNK_ROWS = 1024


@dataclass(frozen=True, slots=True)
class NgramMatch:
    """A held-out row and the training row that shares the most n-grams with it."""

    held_out: str
    train: str
    containment: float
    """Share of the held-out row's n-grams that occur in the training row."""
    matched: str
    """The longest run of shared words."""

    def __str__(self) -> str:
        return f"{self.held_out} ~ {self.train} ({self.containment:.0%}): {self.matched}"


def ngram_hashes(texts: Sequence[list[str]], n: int) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit hash of each word n-gram (uint64) and the index of its text. Valid within one process only."""
    lengths = [len(text) for text in texts]
    # Python's hash is salted per process and fast; sha256 of every word would take most of the time
    word_hashes = np.fromiter(map(hash, chain.from_iterable(texts)), dtype=np.int64, count=sum(lengths)).view(np.uint64)
    hashes = _rolling_hashes(word_hashes, n)
    count = len(hashes)
    text_index = np.repeat(np.arange(len(texts)), lengths)
    # all texts are hashed as one stream: n-grams across a border between two texts are dropped here
    within_one_text = text_index[:count] == text_index[len(word_hashes) - count :]
    return hashes[within_one_text], text_index[:count][within_one_text]


def _rolling_hashes(values: np.ndarray, n: int) -> np.ndarray:
    """A hash of each run of n values, uint64."""
    count = max(0, len(values) - n + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        hashes = hashes * _HASH_FACTOR + values[i : i + count]
    return hashes


class HashSet:
    """A set of 64-bit hashes as a sorted array: 8 bytes each instead of about 60 in a Python set."""

    def __init__(self) -> None:
        self.total = 0
        self._sorted = np.empty(0, dtype=np.uint64)
        self._pending: list[np.ndarray] = []
        self._until_merge = _MERGE_SIZE

    def add(self, hashes: np.ndarray) -> None:
        """Add hashes; they are merged once enough are pending."""
        self.total += len(hashes)
        self._pending.append(hashes)
        self._until_merge -= len(hashes)
        if self._until_merge <= 0:
            self.values()

    def values(self) -> np.ndarray:
        """All distinct hashes, sorted: uint64."""
        merged = np.concatenate([self._sorted, *self._pending])
        self._pending.clear()
        merged.sort()  # np.unique takes several times the memory and time
        self._sorted = merged[np.concatenate([[True], merged[1:] != merged[:-1]])] if len(merged) else merged
        # proportional to the size, so that all merges together stay O(n log n)
        self._until_merge = max(_MERGE_SIZE, len(self._sorted) // 2)
        return self._sorted


def near_duplicates(train: Records, held_out: Records, n: int) -> tuple[NgramMatch, ...]:
    """Held-out rows that share at least one word n-gram with a training row, highest containment first.

    Of training rows that share equally many n-grams the first is named.
    """
    held_out_hashes = HashSet()
    for _, texts in _chunked_words(held_out):
        held_out_hashes.add(ngram_hashes(texts, n)[0])
    postings = _PostingLists(train, held_out_hashes.values(), n)
    matches = [match for start, texts in _chunked_words(held_out) for match in postings.nearest(held_out, start, texts)]
    return tuple(sorted(matches, key=lambda x: -x.containment))


class _PostingLists:
    """Inverted index: for each n-gram of the held-out rows, the training rows that contain it."""

    def __init__(self, train: Records, hashes: np.ndarray, n: int) -> None:
        self.train, self.n, self._hashes = train, n, hashes
        # starts with an empty array, so that concatenate works without any training row
        pairs = [np.empty((0, 2), dtype=np.int64)]  # index of the n-gram, training row
        for start, texts in _chunked_words(train):
            grams, text_index = self._locate(texts)
            # unique within a chunk: a row that repeats an n-gram counts once
            pairs.append(np.unique(np.stack([grams, text_index + start], axis=1), axis=0))
        grams, rows = np.concatenate(pairs).T
        self._rows = rows[np.argsort(grams, kind="stable")]
        self._ends = np.concatenate([[0], np.cumsum(np.bincount(grams, minlength=len(hashes)))])
        # cached: rows of one template share the same n-grams with thousands of others
        self._best_row = lru_cache(maxsize=1024)(self._most_shared_row)

    def nearest(self, held_out: Records, start: int, texts: Sequence[list[str]]) -> Iterator[NgramMatch]:
        """Matches of the held-out rows from `start` on, whose words are `texts`."""
        grams, text_index = self._locate(texts)
        in_train = self._ends[grams + 1] > self._ends[grams]
        grams, text_index = grams[in_train], text_index[in_train]
        for i in np.unique(text_index).tolist():
            row = self._best_row(tuple(np.unique(grams[text_index == i]).tolist()))
            overlap = _overlap(texts[i], prompt_words(self.train[row]), self.n)
            if overlap is not None:
                yield NgramMatch(str(held_out.source(start + i)), str(self.train.source(row)), *overlap)

    def _locate(self, texts: Sequence[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the held-out n-grams that occur in the texts, and the text of each."""
        hashes, text_index = ngram_hashes(texts, self.n)
        index = np.searchsorted(self._hashes, hashes)
        present = np.searchsorted(self._hashes, hashes, side="right") > index
        return index[present], text_index[present]

    def _most_shared_row(self, grams: tuple[int, ...]) -> int:
        votes = np.concatenate([self._rows[self._ends[g] : self._ends[g + 1]] for g in grams])
        # argmax takes the first of equal counts: the result does not depend on chunking
        return int(np.bincount(votes).argmax())


def _overlap(held_out_words: list[str], train_words: list[str], n: int) -> tuple[float, str] | None:
    """Share of a text's n-grams that another text contains, and the longest common run of words."""
    train_ngrams = set(_ngrams(train_words, n))
    shared = [gram in train_ngrams for gram in _ngrams(held_out_words, n)]
    if not any(shared):  # a hash collision
        return None
    runs = (list(run) for is_shared, run in groupby(range(len(shared)), shared.__getitem__) if is_shared)
    longest = max(runs, key=len)
    return sum(shared) / len(shared), readable(held_out_words[longest[0] : longest[-1] + n])


def _chunked_words(records: Records) -> Iterator[tuple[int, list[list[str]]]]:
    """Words of the prompts, some rows at a time, with the index of the first row."""
    start = 0
    for chunk in chunks(records, character_count, count=_CHUNK_ROWS, limit=_MERGE_SIZE):
        yield start, [prompt_words(record) for record in chunk]
        start += len(chunk)


def prompt_words(record: Record) -> list[str]:
    """Words of the context and of the turns before the answer. System turns are left out: rows share them by design."""
    if record.text is not None:
        return search_words(record.text)
    turns = [m.content for m in record.messages[:-1] if m.role != "system"]
    return search_words(" ".join([record.context or "", *turns]))


def _ngrams(prompt: list[str], n: int) -> list[str]:
    return [" ".join(prompt[i : i + n]) for i in range(len(prompt) - n + 1)]


SHINGLE_CHARACTERS = 5
"""Characters per shingle."""
JACCARD_THRESHOLD = 0.8
"""Jaccard similarity of the sets of shingles from which two texts count as the same."""
BANDS, BAND_ROWS = 25, 5
"""Bands and rows of the signature. A pair of similarity s is compared with probability 1 - (1 - s^5)^25: 0.99995
at 0.8."""

MAX_COMPARED_PAIRS = 10_000
"""Pairs of rows up to which each is compared: 0.2 s for texts of 300 characters, and datasketch imports in 0.7 s."""
MAX_COMPARED_CHARACTERS = 1 << 18
"""Characters of the held-out rows up to which their sets of shingles are kept: some 60 bytes each, 16 MB."""


@dataclass(frozen=True, slots=True)
class FuzzyMatch:
    """A held-out row and the most similar training row."""

    held_out: str
    train: str
    jaccard: float
    """Exact Jaccard similarity of the sets of character 5-grams."""
    text: str
    """The words of the training row's prompt."""

    def __str__(self) -> str:
        return f"{self.held_out} ~ {self.train} ({self.jaccard:.0%}): {self.text}"


def fuzzy_duplicates(train: Records, held_out: Records) -> tuple[FuzzyMatch, ...]:
    """Held-out rows with a Jaccard similarity of at least 0.8 to a training row, most similar first.

    Only signatures of the held-out rows are kept; training rows are read one at a time (Broder 1997; banding as in
    Leskovec et al., Mining of Massive Datasets, section 3.4).
    """
    held_out_texts = list(_shingled_texts(held_out))
    similar_rows = _compare_all if _is_small(len(train), held_out_texts) else _compare_candidates
    similarities_of = similar_rows([text for _, text in held_out_texts])
    best: dict[int, tuple[float, str, str]] = {}
    for source, text in _shingled_texts(train):
        for i, similarity in similarities_of(text) if text else ():
            if similarity >= JACCARD_THRESHOLD and similarity > best.get(i, (0.0,))[0]:
                best[i] = similarity, source, text
    matches = [FuzzyMatch(held_out_texts[i][0], source, s, text) for i, (s, source, text) in sorted(best.items())]
    return tuple(sorted(matches, key=lambda match: -match.jaccard))


def _is_small(train_rows: int, held_out_texts: Sequence[tuple[str, str]]) -> bool:
    """Whether all pairs are compared at once: their sets of shingles are then in memory."""
    characters = sum(len(text) for _, text in held_out_texts)
    return train_rows * len(held_out_texts) <= MAX_COMPARED_PAIRS and characters <= MAX_COMPARED_CHARACTERS


_Similarities = Callable[[str], Iterator[tuple[int, float]]]
"""Gives the texts to compare one with, by their index, and the similarity of each."""


def _compare_all(texts: Sequence[str]) -> _Similarities:
    sets = [(i, shingles(text)) for i, text in enumerate(texts) if text]

    def similarities(text: str) -> Iterator[tuple[int, float]]:
        own = shingles(text)
        return ((i, _set_similarity(other, own)) for i, other in sets)

    return similarities


def _compare_candidates(texts: Sequence[str]) -> _Similarities:
    from datasketch import MinHashLSH  # not at the top: it imports scipy, which takes longer than a small comparison

    index = MinHashLSH(num_perm=BANDS * BAND_ROWS, params=(BANDS, BAND_ROWS))
    for i, text in enumerate(texts):
        if text:
            index.insert(i, _signature(text))
    # MinHash only proposes candidates; the similarity reported is exact
    return lambda text: ((i, jaccard(texts[i], text)) for i in index.query(_signature(text)))


def jaccard(first: str, second: str) -> float:
    """Size of the intersection of the shingle sets over the size of their union: 1 for equal texts."""
    return _set_similarity(shingles(first), shingles(second))


def _set_similarity(a: set[str], b: set[str]) -> float:
    # the union without building it: most pairs share little, and this is called for each pair of a small set
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def shingles(text: str) -> set[str]:
    """All runs of five characters; a shorter text is its only shingle."""
    return {text[i : i + SHINGLE_CHARACTERS] for i in range(max(1, len(text) - SHINGLE_CHARACTERS + 1))}


class NearDuplicateIndex:
    """Texts added one by one, of which the near duplicates of a further text are found.

    MinHash proposes candidates (Broder 1997), and the similarity is exact.
    """

    def __init__(self) -> None:
        from datasketch import MinHashLSH

        self.texts: list[str] = []
        self._index = MinHashLSH(num_perm=BANDS * BAND_ROWS, params=(BANDS, BAND_ROWS))

    def add(self, text: str) -> None:
        """Add a text; an empty one is similar to nothing."""
        if text:
            self._index.insert(len(self.texts), _signature(text))
        self.texts.append(text)

    def most_similar(self, text: str) -> tuple[float, int] | None:
        """The highest Jaccard similarity of character 5-grams among the candidates, and the place of that text."""
        candidates = self._index.query(_signature(text)) if text else ()
        return max(((jaccard(self.texts[i], text), i) for i in candidates), default=None)


def _shingled_texts(records: Records) -> Iterator[tuple[str, str]]:
    for record in records:
        yield str(record.source), readable(prompt_words(record))


def _signature(text: str) -> Any:
    from datasketch import MinHash

    minhash = MinHash(num_perm=BANDS * BAND_ROWS, hashfunc=int, scheme="affine32")
    # hashed with numpy over code points: datasketch's own update hashes one Python string at a time
    codepoints = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32).astype(np.uint64)
    hashes = _rolling_hashes(codepoints, min(SHINGLE_CHARACTERS, len(codepoints)))
    # the upper 32 bits: the lower ones of a product depend on few input bits
    minhash.update_batch(np.unique(hashes >> np.uint64(32)).tolist())
    return minhash
