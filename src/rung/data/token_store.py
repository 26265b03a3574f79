"""Tokenized documents as flat columns on disk, and the sequences that read them row by row.

44 bytes of memory per document (decision 0011); ids, supervision and texts are read when a batch needs them. Flat
columns with one table of offsets instead of arrow or `datasets`, whose random access is mapped or reads a whole batch
for one row. `tokenize` writes the columns, `cache` stores them, `models.packing` reads examples and lengths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from rung.data.byte_store import AppendFile, ByteRange, LazySequence, MappedSequence
from rung.types import Example, Record, Source

ROW_DTYPE = np.dtype(
    [(name, "<i8") for name in ("record", "token", "text")]
    + [(name, "<u4") for name in ("length", "text_size", "start", "supervised")]
    + [("candidate", "<i4")]
)
"""Memory of a document, 44 bytes: index of its record, offsets of its tokens and of its text, tokens, bytes of text,
start of the compared tokens, supervised tokens, and the index of the candidate whose answer it contains."""
OWN_ANSWER = -1
"""In place of the index of a candidate: the record's own answer."""


class TokenizedDocument(NamedTuple):
    """One tokenized document before it is written."""

    ids: list[int]
    supervised: np.ndarray
    prompt_length: int  # tokens before the first supervised span: what may be trimmed, and is not compared
    expected_text: str


MAX_REJECTED_SHOWN = 10
"""Rows that could not be rendered, with their reasons, in `run.json`; the count has all."""


@dataclass
class RowNotes:
    """What was done with rows that have control tokens in their text, and with rows that cannot be rendered.

    Counts and a few examples, whatever the number of rows. The answers of a row come one after the other, so that the
    last row is enough to count each once.
    """

    control_tokens: Counter[str] = field(default_factory=Counter)
    """Rows with each control token in their text."""
    control_rows: int = 0
    control_rows_dropped: int = 0
    """Rows left out under `data.control_tokens: drop`."""
    removed_end_tokens: Counter[str] = field(default_factory=Counter)
    """Answers without the end token of the template that stood at their end."""
    rejected_rows: int = 0
    rejected_first: list[str] = field(default_factory=list)
    """Sources and reasons of rows left out under `data.rejects: drop`."""
    _last_control_row: int = -1
    _last_rejected_row: int = -1

    def count_control_tokens(self, row: int, tokens: Iterable[str], *, dropped: bool) -> None:
        """Count a row once for each of its control tokens."""
        if row != self._last_control_row:
            self._last_control_row = row
            self.control_tokens.update(set(tokens))
            self.control_rows += 1
            self.control_rows_dropped += dropped

    def reject(self, row: int, source: Source, reason: str) -> None:
        """Note a row that cannot be rendered."""
        if row != self._last_rejected_row:
            self._last_rejected_row = row
            self.rejected_rows += 1
            if len(self.rejected_first) < MAX_REJECTED_SHOWN:
                self.rejected_first.append(f"{source}: {reason}")

    def to_json(self) -> dict[str, Any]:
        """The counts, empty where nothing was found."""
        notes: dict[str, Any] = {}
        if self.control_rows:
            notes["control_tokens"] = {
                "rows": self.control_rows,
                "rows_left_out": self.control_rows_dropped,
                "rows_with": dict(self.control_tokens.most_common()),
                "removed_from_answer_ends": dict(self.removed_end_tokens.most_common()),
            }
        if self.rejected_rows:
            notes["not_rendered"] = {"rows": self.rejected_rows, "first": self.rejected_first}
        return notes


_TREATMENTS = {"text": "encoded as text", "keep": "kept as control tokens", "drop": "the rows are left out"}


def describe_notes(notes: Mapping[str, Any], policy: str | None) -> dict[str, str]:
    """What `RowNotes` say, for people; `policy` is `data.control_tokens`. Empty where nothing was found."""
    lines: dict[str, str] = {}
    if found := notes.get("control_tokens"):
        tokens = ", ".join(f"{token} ({rows:,} rows)" for token, rows in found["rows_with"].items())
        lines["control tokens"] = f"in the text of {found['rows']:,} rows, {_TREATMENTS[policy or 'text']}: {tokens}"
        if removed := found["removed_from_answer_ends"]:
            tokens = ", ".join(f"{token} ({answers:,})" for token, answers in removed.items())
            lines["removed from the ends of answers"] = tokens
    if rejected := notes.get("not_rendered"):
        lines["not rendered"] = f"{rejected['rows']:,} rows left out (data.rejects: drop), first {rejected['first'][0]}"
    return lines


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
    """Rows, out of `boundary_checked`, with other ids when tokenized as one piece. Reported, never used."""
    notes: dict[str, Any] = field(default_factory=dict)
    """`RowNotes` as JSON."""

    def text(self, row: np.void) -> str:
        """The expected text of a row."""
        return self.texts.read(int(row["text"]), int(row["text_size"])).decode(errors="surrogatepass")

    def dataset(self, records: Sequence[Record], *, from_cache: bool = False) -> TokenizedDataset:
        """The documents with the sources, weights and groups of `records`."""
        return TokenizedDataset(self, StoredExamples(self, records), from_cache)


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
        length, supervised_count = len(document.ids), int(document.supervised.sum())
        sizes = (length, len(text), document.prompt_length, supervised_count)
        row = (record, self._tokens, self._texts.append(text), *sizes, candidate_index)
        self._rows += np.array(row, ROW_DTYPE).tobytes()
        self._tokens += length

    def columns(
        self, dropped: np.ndarray, trimmed: np.ndarray, checked: int, differences: int, notes: RowNotes
    ) -> TokenColumns:
        """All documents; nothing can be added afterwards."""
        ids, supervised, texts = (ByteRange(f, 0, f.size) for f in (self._ids, self._supervised, self._texts))
        rows = np.frombuffer(self._rows, ROW_DTYPE)
        return TokenColumns(ids, supervised, texts, rows, dropped, trimmed, checked, differences, notes.to_json())


class StoredExamples(LazySequence[Example]):
    """Examples read from disk; source, weight, group, task, score and probability come from the records."""

    def __init__(self, columns: TokenColumns, records: Sequence[Record]) -> None:
        self._columns, self.records, self.rows = columns, records, columns.rows

    def at(self, i: int) -> Example:
        """Read one example; its arrays are copies that belong to the caller."""
        record_index, token, _, length, *_, candidate_index = self.rows[i].tolist()
        record = self.records[record_index]
        ids = np.frombuffer(self._columns.ids.read(4 * token, 4 * length), dtype="<i4").copy()
        supervised = np.frombuffer(self._columns.supervised.read(token, length), dtype=bool).copy()
        score, probability = record.score, record.probability
        if candidate_index != OWN_ANSWER:
            score = record.candidates[candidate_index].score
            # the other answer of a pair: only pairs have soft labels
            probability = None if probability is None else 1.0 - probability
        columns = (record.source, record.weight, record.group, record.task, record_index, score, probability)
        return Example(ids, supervised, *columns)


@dataclass(frozen=True, slots=True)
class TokenizedDataset:
    """Tokenized examples, read from disk on access."""

    columns: TokenColumns
    examples: StoredExamples
    """The documents of `columns` with the sources, weights and groups of their records."""
    from_cache: bool = False

    @property
    def expected_texts(self) -> Sequence[str]:
        """The text that each example's supervised tokens must decode to: answers with their stops as rendered."""
        return MappedSequence(self.columns.text, self.columns.rows)

    @property
    def compared_starts(self) -> Sequence[int]:
        """Start of the compared tokens of each example; 0 for plain text, whose first token counts too."""
        return MappedSequence(int, self.columns.rows["start"])

    @property
    def rows(self) -> MappedSequence[list[Example]]:
        """The documents of each row of the data: one, or one per answer."""
        record_indices = self.columns.rows["record"]
        # documents of one record are adjacent, so a change of the index starts a new row
        starts = np.append(np.flatnonzero(np.diff(record_indices, prepend=-1)), len(record_indices))
        spans = np.lib.stride_tricks.sliding_window_view(starts, 2)
        return MappedSequence(lambda span: list(self.examples[slice(*span.tolist())]), spans)

    def without_documents(self, failing: Mapping[int, str]) -> TokenizedDataset:
        """The data set without the rows of these documents; their reasons are noted."""
        rows = self.columns.rows
        kept = rows[~np.isin(rows["record"], rows["record"][list(failing)])]
        earlier = self.columns.notes.get("not_rendered", {"rows": 0, "first": []})
        count = earlier["rows"] + len(np.unique(rows["record"][list(failing)]))
        first = [*earlier["first"], *failing.values()][:MAX_REJECTED_SHOWN]
        notes = {**self.columns.notes, "not_rendered": {"rows": count, "first": first}}
        columns = replace(self.columns, rows=kept, notes=notes)
        return TokenizedDataset(columns, StoredExamples(columns, self.examples.records), self.from_cache)

    def longest_row(self) -> list[Example]:
        """The row with the longest document, for the memory test before the first step."""
        record_indices = self.columns.rows["record"]
        documents = np.flatnonzero(record_indices == record_indices[np.argmax(self.lengths)])
        return [self.examples[i] for i in documents.tolist()]

    def first_row_with_fewer(self, answers: int) -> Source | None:
        """Source of the first row with fewer documents than `answers`; None if there is no such row."""
        _, first, counts = np.unique(self.columns.rows["record"], return_index=True, return_counts=True)
        short_rows = first[counts < answers]
        return self.examples[int(short_rows.min())].source if len(short_rows) else None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        return self.columns.rows["length"].astype(np.int64)

    @property
    def supervised_tokens(self) -> int:
        """Supervised tokens of all examples."""
        return int(self.columns.rows["supervised"].sum())

    def summary(self) -> dict[str, Any]:
        """Counts, as JSON."""
        return {
            "examples": len(self.examples),
            "tokens": int(self.lengths.sum()),
            "supervised_tokens": self.supervised_tokens,
            "longest": int(self.lengths.max(initial=0)),
            "dropped": len(self.columns.dropped),
            "trimmed": len(self.columns.trimmed),
            "boundary_checked": self.columns.boundary_checked,
            "boundary_differences": self.columns.boundary_differences,
            "from_cache": self.from_cache,
            **self.columns.notes,
        }
