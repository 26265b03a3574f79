"""Retrieval: BM25 over passages, which rungs with retrieval put before their questions.

BM25 (bm25s) instead of embeddings: no model to download, deterministic, fast on a CPU, and strong where questions use
the words of the documents; it misses paraphrases. Passages and index are held in memory. `hit_rate` reports how often
the right passage is retrieved, so that a weak score can be attributed to the search or to the model (decision 0020).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from glob import glob
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rung.config.data_files import KINDS, data_suffix, is_pattern
from rung.config.evaluation import RetrievalConfig
from rung.data.chat import with_context
from rung.data.messages import expected_text
from rung.data.read import RejectedRow, stream_rows
from rung.data.records import Records
from rung.errors import ConfigError, DataError
from rung.scoring.stats import score_interval
from rung.scoring.words import piece_spans, plain_words, search_words
from rung.types import Record

# the usual values, also bm25s's defaults; not tuned, because tuning would need validation questions
K1, B = 1.5, 0.75


class Bm25Index:
    """BM25 over texts given as words, bm25s's lucene variant (Lu 2024, arXiv 2407.03618; Kamphuis et al. 2020).

    score(q, d) = sum over the words t of q of ln(1 + (N - n + 0.5) / (n + 0.5)) * f / (f + K1 (1 - B + B |d| / L)), of
    N texts with a mean of L words, t in n of them and f times in d; a word that occurs twice in q counts twice.
    """

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        import bm25s  # not at the top: only runs with retrieval pay for the import

        self._text_count = len(texts)
        # an index needs at least one word; float64, so that equal texts get equal scores on every machine
        self._bm25 = bm25s.BM25(k1=K1, b=B, method="lucene", dtype="float64") if any(texts) else None
        if self._bm25 is not None:
            self._bm25.index([list(text) for text in texts], create_empty_token=False, show_progress=False)

    def scores(self, query: Sequence[str]) -> NDArray[np.float64]:
        """Score of each text, float64 [N]; 0 for a text without a word of the query."""
        if self._bm25 is None or not query:
            return np.zeros(self._text_count)
        return np.asarray(self._bm25.get_scores(list(query)), dtype=np.float64)

    def best(self, query: Sequence[str], count: int) -> list[int]:
        """At most `count` texts that share a word with the query, best first; ties in the order of the texts."""
        scores = self.scores(query)
        order = np.argsort(-scores, kind="stable")[:count]
        return [int(i) for i in order if scores[i] > 0.0]


TEXT_SUFFIXES = (".txt", ".md")
"""Suffixes of files that contain one document each."""


def split_passages(text: str, size: int, overlap: int) -> list[str]:
    """Passages of `size` words, each unchanged, including line breaks.

    Words are what white space separates; in scripts without spaces each character is one (`words.piece_spans`).
    Neighboring passages share `overlap` words; the last two share more, so that no passage is a short remainder. A text
    of at most `size` words is one passage; a text without words has none.
    """
    spans = piece_spans(text)
    if len(spans) <= size:
        return [text.strip()] if spans else []
    starts = [*range(0, len(spans) - size, size - overlap), len(spans) - size]
    return [text[spans[start][0] : spans[start + size - 1][1]] for start in starts]


@dataclass(frozen=True)
class Library:
    """Passages for retrieval, in memory together with their index."""

    passages: tuple[str, ...]
    longer: tuple[bool, ...]
    """For each passage, whether it was cut from a longer document."""
    config: RetrievalConfig
    notes: dict[str, int]
    """Counts of documents, empty documents, passages and duplicates."""

    @staticmethod
    def from_documents(documents: Iterable[str], config: RetrievalConfig, where: str) -> Library:
        """Split documents into passages; equal passages are kept once.

        Raises `DataError` when no document has a word.
        """
        texts: dict[str, tuple[str, bool]] = {}
        total = empty = duplicates = 0
        for document in documents:
            total += 1
            pieces = list(filter(search_words, split_passages(document, config.chunk_words, config.overlap)))
            empty += not pieces
            for passage in pieces:
                # white space apart, or the same passage in two layouts would take two of the top k
                key = " ".join(passage.split())
                duplicates += key in texts
                texts.setdefault(key, (passage, len(pieces) > 1))
        if not texts:
            raise DataError("no document has a word to be found by", where=where, given=f"{total} documents")
        notes = {"documents": total, "empty_documents": empty, "passages": len(texts), "duplicate_passages": duplicates}
        passages, is_cut = zip(*texts.values(), strict=True)
        return Library(passages, is_cut, config, notes)

    @cached_property
    def _words(self) -> list[list[str]]:
        return [search_words(passage) for passage in self.passages]

    @cached_property
    def _plain_words(self) -> list[list[str]]:
        # the same lists where no pairs are made, which saves their memory
        pairs = zip(self.passages, self._words, strict=True)
        return [words if passage.isascii() else plain_words(passage) for passage, words in pairs]

    @cached_property
    def _index(self) -> Bm25Index:
        return Bm25Index(self._words)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the passages in order."""
        digests = (sha256(passage.encode(errors="surrogatepass")).digest() for passage in self.passages)
        return sha256(b"".join(digests)).hexdigest()

    def find(self, question: str) -> list[int]:
        """Indices of the passages for a question, best first; empty if it shares no word with any."""
        return self._index.best(search_words(question), self.config.top_k)

    def with_passages(self, record: Record) -> Record:
        """The record with the passages for its question, best first, as its context."""
        # plain text asks nothing
        return replace(record, context=self._passages(record.question)) if record.messages else record

    def prepend_passages(self, question: str) -> str:
        """A question with its passages before it, rendered like a record with that context."""
        passages = self._passages(question)
        return question if passages is None else with_context(passages, question)

    def _passages(self, question: str) -> str | None:
        return "\n\n".join(self.passages[i] for i in self.find(question)) or None

    def with_passages_all(self, records: Iterable[Record]) -> Records:
        """`with_passages` of each record."""
        return Records.from_records(map(self.with_passages, records))

    def hit_rate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Hit rate over records that still have their own contexts, as JSON.

        A question is a hit when one of its passages contains the row's own context or, where the context is longer than
        a passage, was cut from it; for a row without context, when one contains an accepted answer (Karpukhin et al.
        2020, arXiv 2004.04906, section 5). Texts are compared word by word.
        """
        hits, by_context, without_passages, seconds = [], 0, 0, 0.0
        self.find("")  # builds the cached index, which must not count as time of the first question
        for record in records:
            start_time = time.perf_counter()
            passage_ids = self.find(record.question)
            seconds += time.perf_counter() - start_time
            texts = (record.context or "", expected_text(record), *record.references)
            # characters, not pairs: an answer of one character has no pair
            context, *answers = (_normalize_spaces(plain_words(text)) for text in texts)
            by_context += bool(context)
            without_passages += not passage_ids
            hits.append(any(self._hit(i, context, answer) for i in passage_ids for answer in answers))
        clusters = [record.group if record.group is not None else str(record.source) for record in records]
        return {
            "hit_rate": score_interval([float(hit) for hit in hits], clusters, binary=True).to_json(),
            "hits": sum(hits),
            "judged_by_context": by_context,
            "judged_by_answer": len(hits) - by_context,
            "without_passages": without_passages,
            "seconds_per_query": seconds / max(1, len(hits)),
            **self.notes,
            "from": self.config.documents,
            **self.config.model_dump(include={"chunk_words", "overlap", "top_k"}),
        }

    def _hit(self, i: int, context: str, answer: str) -> bool:
        passage = _normalize_spaces(self._plain_words[i])
        if context:
            return context in passage or (self.longer[i] and passage in context)
        return bool(answer) and answer in passage


def read_documents(config: RetrievalConfig, place: str = "evaluation.retrieve") -> list[str]:
    """The texts of `documents`, in the order of their paths or rows; `place` is the group of settings that names them.

    Raises `DataError` for a folder without documents, a file that is not UTF-8, and a row without text.
    """
    path = Path(config.documents or "")
    if _holds_texts(path):
        if config.column is not None:
            summary = "column names one of a file of rows, and these are texts"
            raise ConfigError(summary, where=f"{place}.column", given=config.column, hint="leave it out")
        return _read_texts(path, place)
    column, texts = config.column or "text", []
    for item in stream_rows(config.documents or ""):
        if isinstance(item, RejectedRow):
            raise DataError("this row of the documents cannot be read", where=str(item.source), given=item.reason)
        text = item.row.get(column)
        if not isinstance(text, str):
            hint = f"name another with {place}.column"
            columns = ", ".join(item.row)
            raise DataError(f"no text in column {column!r}", where=str(item.source), given=columns, hint=hint)
        texts.append(text)
    return texts


def _holds_texts(path: Path) -> bool:
    """Whether a path names files of one document each, not files of rows. Raises `DataError` for a folder of both."""
    if not path.is_dir():
        return path.suffix.lower() in TEXT_SUFFIXES
    texts, rows = _text_files(path), sorted(p for p in path.iterdir() if p.is_file() and data_suffix(p))
    if texts and rows:
        hint = f"name one kind by a pattern: {path}/**/*{texts[0].suffix} or {path}/*{data_suffix(rows[0])}"
        given = f"{texts[0].name}, {rows[0].name}"
        raise DataError("this folder holds texts and files of rows", where=str(path), given=given, hint=hint)
    return not rows


def _text_files(path: Path) -> list[Path]:
    found = map(Path, glob(str(path), recursive=True)) if is_pattern(str(path)) else path.rglob("*")
    # sorted: the order of a folder differs between file systems, and ties go to the earlier passage
    return sorted(p for p in found if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())


def _read_texts(path: Path, place: str) -> list[str]:
    if not path.exists() and not is_pattern(str(path)):
        raise DataError("no such file", where=str(path), hint=f"{place} names it")
    files = [path] if path.is_file() else _text_files(path)
    if not files:
        allowed = f"{' and '.join(TEXT_SUFFIXES)} files, or files of rows ({KINDS})"
        summary = "this folder holds no document" if path.is_dir() else "no document matches"
        raise DataError(summary, where=str(path), allowed=allowed)
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8: {error.reason}", where=str(file), hint="save the file as UTF-8") from error
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(file)) from error
    return texts


def row_contexts(parts: Iterable[Iterable[Record]]) -> list[str]:
    """The distinct contexts of a run's own rows, in order. Raises `DataError` if no row has one."""
    contexts = dict.fromkeys(r.context for part in parts for r in part if r.context and not r.context.isspace())
    if not contexts:
        summary = "there is nothing to retrieve from: no row has a context"
        hint = "name a folder or a file of documents"
        raise DataError(summary, where="evaluation.retrieve.documents", hint=hint)
    return list(contexts)


def _normalize_spaces(words: Sequence[str]) -> str:
    """Words between single spaces, so that a text can be part of another only at word borders."""
    return f" {' '.join(words)} " if words else ""
