"""Which texts share the telling words of a query: BM25, by bm25s."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

K1, B = 1.5, 0.75
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Runs of letters and digits, in compatibility form (NFKC) and casefolded.

    No stemming and no stop words: any language that separates its words is treated alike.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class Index:
    """BM25 over texts given as words, in bm25s's lucene variant (Lu 2024, arXiv 2407.03618; Kamphuis et al. 2020).

    score(q, d) = sum over the words t of q of ln(1 + (N - n + 0.5) / (n + 0.5)) * f / (f + K1 (1 - B + B |d| / L)), of
    N texts of L words in the mean, t in n of them and f times in d; a word that stands twice in q counts twice.
    """

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        import bm25s  # here and not above: only those who ask for it wait

        self._size = len(texts)
        self._found = bm25s.BM25(k1=K1, b=B, method="lucene", dtype="float64") if any(texts) else None
        if self._found is not None:
            self._found.index([list(text) for text in texts], create_empty_token=False, show_progress=False)

    def scores(self, query: Sequence[str]) -> NDArray[np.float64]:
        """Score of each text, float64 [N]; 0 where no word of the query stands in it."""
        if self._found is None or not query:
            return np.zeros(self._size)
        return np.asarray(self._found.get_scores(list(query)), dtype=np.float64)

    def best(self, query: Sequence[str], count: int) -> list[int]:
        """At most `count` texts that share a word with the query, best first; of equal ones the earlier first."""
        scores = self.scores(query)
        order = np.argsort(-scores, kind="stable")[:count]
        return [int(i) for i in order if scores[i] > 0.0]
