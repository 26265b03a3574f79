"""Which texts share the telling words of a query: BM25, by bm25s."""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rung.config.evaluation import RetrievalConfig
from rung.data.chat import with_context
from rung.data.messages import expected_text
from rung.data.read import SUFFIXES, RejectedRow, stream_rows
from rung.data.records import Records
from rung.errors import ConfigError, DataError
from rung.scoring.stats import score_interval
from rung.types import Record

K1, B = 1.5, 0.75
_WORD = re.compile(r"\w+")


def query_words(text: str) -> list[str]:
    """Runs of letters and digits, in compatibility form (NFKC) and casefolded.

    No stemming and no stop words: any language that separates its words is treated alike.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class Bm25Index:
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


TEXTS = (".txt", ".md")
"""Suffixes of files that are one document each."""
_PIECE = re.compile(r"\S+")


def split_passages(text: str, size: int, overlap: int) -> list[str]:
    """Passages of `size` words (what white space separates), each as it stands in the text, line breaks and all.

    Neighbours share `overlap` words; the last two share more, so that no passage is a short rest. A text of at most
    `size` words is one passage, one without words is none.
    """
    spans = [found.span() for found in _PIECE.finditer(text)]
    if len(spans) <= size:
        return [text.strip()] if spans else []
    starts = [*range(0, len(spans) - size, size - overlap), len(spans) - size]
    return [text[spans[start][0] : spans[start + size - 1][1]] for start in starts]


@dataclass(frozen=True)
class Library:
    """Passages to be looked up. Held in memory, as the index over them is."""

    passages: tuple[str, ...]
    longer: tuple[bool, ...]
    """Of each passage, whether it was cut from a longer document."""
    config: RetrievalConfig
    notes: dict[str, int]
    """What was counted: documents, empty ones, passages, duplicates."""

    @staticmethod
    def from_documents(documents: Iterable[str], config: RetrievalConfig, where: str) -> Library:
        """Cut documents into passages; of equal ones the first stands for all.

        Raises `DataError` when no document has a word.
        """
        found: dict[str, tuple[str, bool]] = {}
        count = empty = twice = 0
        for document in documents:
            count += 1
            own = [
                passage
                for passage in split_passages(document, config.chunk_words, config.overlap)
                if query_words(passage)
            ]
            empty += not own
            for passage in own:
                key = " ".join(passage.split())
                twice += key in found
                found.setdefault(key, (passage, len(own) > 1))
        if not found:
            raise DataError("no document has a word to be found by", where=where, given=f"{count} documents")
        notes = {
            "documents": count,
            "empty_documents": empty,
            "passages": len(found),
            "duplicate_passages": twice,
        }
        passages, longer = zip(*found.values(), strict=True)
        return Library(passages, longer, config, notes)

    @cached_property
    def _words(self) -> list[list[str]]:
        return [query_words(passage) for passage in self.passages]

    @cached_property
    def _index(self) -> Bm25Index:
        return Bm25Index(self._words)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the passages in their order."""
        digest = sha256()
        for passage in self.passages:
            digest.update(sha256(passage.encode(errors="surrogatepass")).digest())
        return digest.hexdigest()

    def find(self, question: str) -> list[int]:
        """Numbers of the passages for a question, best first; none where it shares no word with any."""
        return self._index.best(query_words(question), self.config.top_k)

    def with_passages(self, record: Record) -> Record:
        """The record with what is found for its question, best first, in place of its context."""
        if not record.messages:  # plain text asks nothing
            return record
        return replace(record, context=self._passages(record.question))

    def prepend_passages(self, question: str) -> str:
        """A question with what is found for it in front, as a record with that context is asked."""
        found = self._passages(question)
        return question if found is None else with_context(found, question)

    def _passages(self, question: str) -> str | None:
        return "\n\n".join(self.passages[i] for i in self.find(question)) or None

    def with_passages_all(self, records: Iterable[Record]) -> Records:
        """`shown` of each."""
        return Records.from_records(map(self.with_passages, records))

    def hit_rate(self, records: Sequence[Record]) -> dict[str, Any]:
        """How well it finds: the hit rate over records that still have their own contexts, ready for JSON.

        A question is hit when one of its passages contains the row's own context or, where that is longer than a
        passage, was cut from inside it; of a row without a context, when one contains the expected answer (Karpukhin et
        al. 2020, arXiv 2004.04906, section 5). Texts are compared word by word.
        """
        hits, by_context, without, seconds = [], 0, 0, 0.0
        self.find("")  # the index is made once
        for record in records:
            started = time.perf_counter()
            found = self.find(record.question)
            seconds += time.perf_counter() - started
            own = _normalize_spaces(query_words(record.context or ""))
            by_context += bool(own)
            without += not found
            hits.append(any(self._hit(i, own, _normalize_spaces(query_words(expected_text(record)))) for i in found))
        clusters = [record.group if record.group is not None else str(record.source) for record in records]
        return {
            "hit_rate": score_interval([float(hit) for hit in hits], clusters, binary=True).to_json(),
            "hits": sum(hits),
            "judged_by_context": by_context,
            "judged_by_answer": len(hits) - by_context,
            "without_passages": without,
            "seconds_per_query": seconds / max(1, len(hits)),
            **self.notes,
            "from": self.config.documents,
            **self.config.model_dump(include={"chunk_words", "overlap", "top_k"}),
        }

    def _hit(self, i: int, context: str, answer: str) -> bool:
        passage = _normalize_spaces(self._words[i])
        if context:
            return context in passage or (self.longer[i] and passage in context)
        return bool(answer) and answer in passage


def read_documents(config: RetrievalConfig) -> list[str]:
    """The texts that `documents` names, in the order of their paths or rows.

    Raises `DataError` for a place without documents, a file that is not UTF-8, and a row without a text.
    """
    place = Path(config.documents or "")
    if place.is_dir() or place.suffix.lower() in TEXTS:
        if config.column is not None:
            what = "column names one of a file of rows, and these are texts"
            raise ConfigError(what, where="evaluation.retrieve.column", given=config.column, hint="leave it out")
        return _read_texts(place)
    column, texts = config.column or "text", []
    for item in stream_rows(config.documents or ""):
        if isinstance(item, RejectedRow):
            raise DataError("this row of the documents cannot be read", where=str(item.source), given=item.reason)
        text = item.row.get(column)
        if not isinstance(text, str):
            hint = "name another with evaluation.retrieve.column"
            known = ", ".join(item.row)
            raise DataError(f"no text in column {column!r}", where=str(item.source), given=known, hint=hint)
        texts.append(text)
    return texts


def _read_texts(place: Path) -> list[str]:
    if not place.exists():
        raise DataError("no such file", where=str(place), hint="evaluation.retrieve.documents names it")
    inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in TEXTS and p.is_file())
    files = inside if place.is_dir() else [place]
    if not files:
        allowed = f"{' and '.join(TEXTS)} files, or a {', '.join(SUFFIXES)} file of rows"
        raise DataError("this folder holds no document", where=str(place), allowed=allowed)
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8: {error.reason}", where=str(file), hint="save the file as UTF-8") from error
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(file)) from error
    return texts


def own_contexts(parts: Iterable[Iterable[Record]]) -> list[str]:
    """The contexts of a run's own rows, each once, in their order. Raises `DataError` where no row has one."""
    found = dict.fromkeys(r.context for part in parts for r in part if r.context and not r.context.isspace())
    if not found:
        raise DataError(
            "there is nothing to retrieve from: no row has a context",
            where="evaluation.retrieve.documents",
            hint="name a folder or a file of documents",
        )
    return list(found)


def _normalize_spaces(found: Sequence[str]) -> str:
    """Words between single spaces, so that one text is within another only at the borders of words."""
    return f" {' '.join(found)} " if found else ""
