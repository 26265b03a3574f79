"""Tokenized documents as flat bytes on disk, and the sequences that read them row by row."""

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
        ("rival", "<i4"),
    ]
)
"""What stays in memory of a document: its record's index, where its tokens and its text begin, tokens, bytes of text,
where the compared tokens begin, supervised tokens, and which rival of the record's own answer it holds. 44 bytes."""
_PACK = struct.Struct("<qqqIIIIi")
OWN_ANSWER = -1
"""In place of a rival: the record's own answer."""


class TooLong(NamedTuple):
    """A document beyond the length allowed."""

    record: int
    """Index of its record among those given."""
    source: Source
    length: int


class TokenizedDocument(NamedTuple):
    """One tokenized row on its way to the disk."""

    ids: list[int]
    supervised: np.ndarray
    start: int
    prompt: int  # tokens before the first supervised span: what may be trimmed
    expected: str


@dataclass(frozen=True, slots=True)
class TokenColumns:
    """Documents as flat bytes: int32 ids, a byte a token for supervised or not, and the expected texts in UTF-8."""

    ids: ByteRange
    supervised: ByteRange
    texts: ByteRange
    rows: np.ndarray  # ROW [documents]
    dropped: np.ndarray  # int64 [k, 2]: index of the record, tokens
    trimmed: np.ndarray  # the same
    boundary_checked: int
    boundary_differences: int


class TokenColumnWriter:
    """Takes documents one by one."""

    def __init__(self) -> None:
        self._ids, self._supervised, self._texts = AppendFile.new(), AppendFile.new(), AppendFile.new()
        self._rows = bytearray()
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._rows) // ROW_DTYPE.itemsize

    def add(self, record: int, document: TokenizedDocument, rival: int = OWN_ANSWER) -> None:
        """Write down the document of this record with its own answer or a rival's."""
        text = document.expected.encode(errors="surrogatepass")
        self._ids.append(np.array(document.ids, dtype="<i4").tobytes())
        self._supervised.append(document.supervised.astype(bool).tobytes())
        at = self._texts.append(text)
        learned = int(document.supervised.sum())
        length = len(document.ids)
        self._rows += _PACK.pack(record, self._tokens, at, length, len(text), document.start, learned, rival)
        self._tokens += length

    def regions(self) -> tuple[ByteRange, ByteRange, ByteRange]:
        """Ids, supervised, texts."""
        return ByteRange.of_file(self._ids), ByteRange.of_file(self._supervised), ByteRange.of_file(self._texts)

    def rows(self) -> np.ndarray:
        """The table of all documents; nothing can be added afterwards."""
        return np.frombuffer(self._rows, ROW_DTYPE)


class StoredExamples(LazySequence[Example]):
    """Examples read from disk; source, weight, group and task are those of the records."""

    def __init__(self, flat: TokenColumns, records: Sequence[Record], rows: np.ndarray) -> None:
        self._flat, self._records, self.rows = flat, records, rows

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, i: int) -> Example:
        """Read one; its arrays belong to the caller."""
        record, token, _, length, *_, rival = self.rows[i].tolist()
        own = self._records[record]
        ids = np.frombuffer(self._flat.ids.read(4 * token, 4 * length), dtype="<i4").copy()
        supervised = np.frombuffer(self._flat.supervised.read(token, length), dtype=bool).copy()
        score = own.score if rival == OWN_ANSWER else own.candidates[rival].score
        return Example(ids, supervised, own.source, own.weight, own.group, own.task, record, score)

    def select(self, rows: slice | np.ndarray) -> StoredExamples:
        """These alone; nothing is read."""
        return StoredExamples(self._flat, self._records, self.rows[rows])


@dataclass(frozen=True, slots=True)
class TokenizedDataset:
    """Examples, and what the policies did to the others."""

    examples: Sequence[Example]
    kept: Sequence[int]
    """Index of each example's record among those given."""
    expected: Sequence[str]
    """The text that decoding each example's supervised tokens must give: answers with their stops as rendered."""
    starts: Sequence[int]
    """Where the compared tokens of each example begin; 0 for a plain text, whose first token counts too."""
    dropped: Sequence[TooLong] = ()
    trimmed: Sequence[TooLong] = ()
    boundary_checked: int = 0
    boundary_differences: int = 0
    """Of `boundary_checked` rows, those that tokenize otherwise as one piece. Reported, never used."""
    from_cache: bool = False

    @staticmethod
    def from_columns(flat: TokenColumns, records: Sequence[Record], *, from_cache: bool = False) -> TokenizedDataset:
        """The documents of `flat` with the sources, weights and groups of `records`."""
        every = range(len(flat.rows))

        def text(i: int) -> str:
            row = flat.rows[i]
            return flat.texts.read(int(row["text"]), int(row["text_size"])).decode(errors="surrogatepass")

        return TokenizedDataset(
            StoredExamples(flat, records, flat.rows),
            MappedSequence(int, flat.rows["record"]),
            MappedSequence(text, every),
            MappedSequence(int, flat.rows["start"]),
            dropped=_too_long_documents(flat.dropped, records),
            trimmed=_too_long_documents(flat.trimmed, records),
            boundary_checked=flat.boundary_checked,
            boundary_differences=flat.boundary_differences,
            from_cache=from_cache,
        )

    @property
    def rows(self) -> MappedSequence[list[Example]]:
        """The documents of each row of the data: one, or one for each of its answers."""
        found = self._records()
        starts = np.append(np.flatnonzero(np.diff(found, prepend=-1)), len(found))
        return MappedSequence(
            lambda i: list(self.examples[int(starts[i]) : int(starts[i + 1])]), range(len(starts) - 1)
        )

    def longest_row(self) -> list[Example]:
        """The row that the longest document stands in."""
        rows, longest = self._records(), int(np.argmax(self.lengths))
        first, last = np.searchsorted(rows, rows[longest], "left"), np.searchsorted(rows, rows[longest], "right")
        return list(self.examples[int(first) : int(last)])

    def first_row_with_fewer(self, answers: int) -> Source | None:
        """Where the first row of the data with fewer documents came from."""
        if answers < 2:
            return None
        _, first, counts = np.unique(self._records(), return_index=True, return_counts=True)
        lonely = first[counts < answers]
        return self.examples[int(lonely.min())].source if len(lonely) else None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        if isinstance(self.examples, StoredExamples):
            return self.examples.rows["length"].astype(np.int64)
        return np.array([len(e) for e in self.examples], dtype=np.int64)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that are learned, over all examples."""
        if isinstance(self.examples, StoredExamples):
            return int(self.examples.rows["supervised"].sum())
        return sum(int(e.supervised.sum()) for e in self.examples)

    def _records(self) -> np.ndarray:
        """Index of each example's record, int64; read off the table where there is one."""
        if isinstance(self.examples, StoredExamples):
            return self.examples.rows["record"]
        return np.fromiter(self.kept, dtype=np.int64, count=len(self.examples))

    def summary(self) -> dict[str, Any]:
        """Counts, ready for JSON."""
        return {
            "examples": len(self.examples),
            "tokens": int(self.lengths.sum()),
            "supervised_tokens": self.supervised_tokens,
            "longest": int(self.lengths.max(initial=0)),
            "dropped": len(self.dropped),
            "trimmed": len(self.trimmed),
            "boundary_checked": self.boundary_checked,
            "boundary_differences": self.boundary_differences,
            "from_cache": self.from_cache,
        }


def _too_long_documents(table: np.ndarray, records: Sequence[Record]) -> MappedSequence[TooLong]:
    def one(i: int) -> TooLong:
        record, length = table[i].tolist()
        return TooLong(record, records[record].source, length)

    return MappedSequence(one, range(len(table)))
