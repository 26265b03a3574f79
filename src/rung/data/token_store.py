"""Tokenized documents as flat columns on disk, and the sequences that read them row by row.

44 bytes of memory per document (decision 0011); ids, supervision and texts are read when a batch needs them. Flat
columns with one table of offsets instead of arrow or `datasets`, whose random access is mapped or reads a whole batch
for one row. `tokenize` writes the columns, `cache` stores them, `training.packing` reads examples and lengths.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rung.data.byte_store import AppendFile, ByteRange, LazySequence, MappedSequence
from rung.types import Example, Record, Source

ROW_DTYPE = np.dtype(
    [
        ("record", "<i8"),
        ("token", "<i8"),
        ("text", "<i8"),
        ("length", "<u4"),
        ("text_size", "<u4"),
        ("start", "<u4"),
        ("supervised", "<u4"),
        ("candidate", "<i4"),
    ]
)
"""Memory of a document, 44 bytes: index of its record, offsets of its tokens and of its text, tokens, bytes of text,
start of the compared tokens, supervised tokens, and the index of the candidate whose answer it contains."""
_ROW_STRUCT = struct.Struct("<qqqIIIIi")
OWN_ANSWER = -1
"""In place of the index of a candidate: the record's own answer."""


class TooLong(NamedTuple):
    """A document longer than the limit."""

    record: int
    """Index of its record."""
    source: Source
    length: int


class TokenizedDocument(NamedTuple):
    """One tokenized document before it is written."""

    ids: list[int]
    supervised: np.ndarray
    compared_start: int
    prompt_length: int  # tokens before the first supervised span: what may be trimmed
    expected_text: str


@dataclass(frozen=True, slots=True)
class TokenColumns:
    """Documents as flat bytes: int32 ids, one byte of supervision per token, and the expected texts in UTF-8."""

    ids: ByteRange
    supervised: ByteRange
    texts: ByteRange
    rows: np.ndarray  # ROW [documents]
    dropped: np.ndarray  # int64 [k, 2]: index of the record, tokens
    trimmed: np.ndarray  # the same
    boundary_checked: int
    boundary_differences: int


class TokenColumnWriter:
    """Writes documents one by one."""

    def __init__(self) -> None:
        self._ids, self._supervised, self._texts = AppendFile.new(), AppendFile.new(), AppendFile.new()
        # packed bytes instead of a list of tuples, which would take several times the memory
        self._rows = bytearray()
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._rows) // ROW_DTYPE.itemsize

    def add(self, record: int, document: TokenizedDocument, candidate_index: int = OWN_ANSWER) -> None:
        """Write the document of a record with its own answer or that of a candidate."""
        text = document.expected_text.encode(errors="surrogatepass")
        # int32: no vocabulary comes near 2^31, and half the disk space of int64
        self._ids.append(np.array(document.ids, dtype="<i4").tobytes())
        self._supervised.append(document.supervised.astype(bool).tobytes())
        text_start = self._texts.append(text)
        supervised_count = int(document.supervised.sum())
        length = len(document.ids)
        self._rows += _ROW_STRUCT.pack(
            record,
            self._tokens,
            text_start,
            length,
            len(text),
            document.compared_start,
            supervised_count,
            candidate_index,
        )
        self._tokens += length

    def byte_ranges(self) -> tuple[ByteRange, ByteRange, ByteRange]:
        """Byte ranges of ids, supervision and texts."""
        return ByteRange.of_file(self._ids), ByteRange.of_file(self._supervised), ByteRange.of_file(self._texts)

    def rows(self) -> np.ndarray:
        """The table of all documents; nothing can be added afterwards."""
        return np.frombuffer(self._rows, ROW_DTYPE)


class StoredExamples(LazySequence[Example]):
    """Examples read from disk; source, weight, group and task come from the records."""

    def __init__(self, columns: TokenColumns, records: Sequence[Record], rows: np.ndarray) -> None:
        self._columns, self._records, self.rows = columns, records, rows

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, i: int) -> Example:
        """Read one example; its arrays are copies that belong to the caller."""
        record_index, token, _, length, *_, candidate_index = self.rows[i].tolist()
        record = self._records[record_index]
        ids = np.frombuffer(self._columns.ids.read(4 * token, 4 * length), dtype="<i4").copy()
        supervised = np.frombuffer(self._columns.supervised.read(token, length), dtype=bool).copy()
        score = record.score if candidate_index == OWN_ANSWER else record.candidates[candidate_index].score
        return Example(ids, supervised, record.source, record.weight, record.group, record.task, record_index, score)

    def select(self, rows: slice | np.ndarray) -> StoredExamples:
        """The selected examples; nothing is read."""
        return StoredExamples(self._columns, self._records, self.rows[rows])


@dataclass(frozen=True, slots=True)
class TokenizedDataset:
    """Tokenized examples, and the documents that were dropped or trimmed."""

    examples: Sequence[Example]
    record_indices: Sequence[int]
    """Index of each example's record."""
    expected_texts: Sequence[str]
    """The text that each example's supervised tokens must decode to: answers with their stops as rendered."""
    compared_starts: Sequence[int]
    """Start of the compared tokens of each example; 0 for plain text, whose first token counts too."""
    dropped_documents: Sequence[TooLong] = ()
    trimmed_documents: Sequence[TooLong] = ()
    boundary_checked: int = 0
    boundary_differences: int = 0
    """Rows, out of `boundary_checked`, with other ids when tokenized as one piece. Reported, never used."""
    from_cache: bool = False

    @staticmethod
    def from_columns(columns: TokenColumns, records: Sequence[Record], *, from_cache: bool = False) -> TokenizedDataset:
        """The documents of `columns` with the sources, weights and groups of `records`."""
        all_rows = range(len(columns.rows))

        def text(i: int) -> str:
            row = columns.rows[i]
            return columns.texts.read(int(row["text"]), int(row["text_size"])).decode(errors="surrogatepass")

        return TokenizedDataset(
            StoredExamples(columns, records, columns.rows),
            MappedSequence(int, columns.rows["record"]),
            MappedSequence(text, all_rows),
            MappedSequence(int, columns.rows["start"]),
            dropped_documents=_too_long_documents(columns.dropped, records),
            trimmed_documents=_too_long_documents(columns.trimmed, records),
            boundary_checked=columns.boundary_checked,
            boundary_differences=columns.boundary_differences,
            from_cache=from_cache,
        )

    @property
    def rows(self) -> MappedSequence[list[Example]]:
        """The documents of each row of the data: one, or one per answer."""
        record_indices = self._record_indices()
        # documents of one record are adjacent, so a change of the index starts a new row
        starts = np.append(np.flatnonzero(np.diff(record_indices, prepend=-1)), len(record_indices))
        return MappedSequence(
            lambda i: list(self.examples[int(starts[i]) : int(starts[i + 1])]), range(len(starts) - 1)
        )

    def longest_row(self) -> list[Example]:
        """The row with the longest document, for the memory test before the first step."""
        record_indices, longest = self._record_indices(), int(np.argmax(self.lengths))
        first, last = (
            np.searchsorted(record_indices, record_indices[longest], "left"),
            np.searchsorted(record_indices, record_indices[longest], "right"),
        )
        return list(self.examples[int(first) : int(last)])

    def first_row_with_fewer(self, answers: int) -> Source | None:
        """Source of the first row with fewer documents than `answers`; None if there is no such row."""
        if answers < 2:
            return None
        _, first, counts = np.unique(self._record_indices(), return_index=True, return_counts=True)
        short_rows = first[counts < answers]
        return self.examples[int(short_rows.min())].source if len(short_rows) else None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        # from the table where there is one: packing needs all lengths, and reading every example is slow
        if isinstance(self.examples, StoredExamples):
            return self.examples.rows["length"].astype(np.int64)
        return np.array([len(e) for e in self.examples], dtype=np.int64)

    @property
    def supervised_tokens(self) -> int:
        """Supervised tokens of all examples."""
        if isinstance(self.examples, StoredExamples):
            return int(self.examples.rows["supervised"].sum())
        return sum(int(e.supervised.sum()) for e in self.examples)

    def _record_indices(self) -> np.ndarray:
        """Index of each example's record, int64; from the table where there is one."""
        if isinstance(self.examples, StoredExamples):
            return self.examples.rows["record"]
        return np.fromiter(self.record_indices, dtype=np.int64, count=len(self.examples))

    def summary(self) -> dict[str, Any]:
        """Counts, as JSON."""
        return {
            "examples": len(self.examples),
            "tokens": int(self.lengths.sum()),
            "supervised_tokens": self.supervised_tokens,
            "longest": int(self.lengths.max(initial=0)),
            "dropped": len(self.dropped_documents),
            "trimmed": len(self.trimmed_documents),
            "boundary_checked": self.boundary_checked,
            "boundary_differences": self.boundary_differences,
            "from_cache": self.from_cache,
        }


def _too_long_documents(table: np.ndarray, records: Sequence[Record]) -> MappedSequence[TooLong]:
    def document(i: int) -> TooLong:
        record, length = table[i].tolist()
        return TooLong(record, records[record].source, length)

    return MappedSequence(document, range(len(table)))
