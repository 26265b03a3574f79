"""Records on disk, one line of JSON each; in memory only where a record stands and hashes of its prompt and group."""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from rung.data.byte_store import AppendFile, LazySequence
from rung.types import Candidate, Message, Record, Source

ROW_DTYPE = np.dtype(
    [
        ("start", "<i8"),
        ("line", "<i8"),
        ("size", "<u4"),
        ("origin", "<u4"),
        ("prompt", ">u8", (2,)),
        ("group", ">u8", (2,)),
    ]
)
"""What stays in memory of a record: 56 bytes. The hashes are the first 128 bits of `prompt_key` and `group_key`."""
_PACK = struct.Struct("<qqII16s16s")
_NO_GROUP = bytes(16)


class Records(LazySequence[Record]):
    """Records on disk, read one at a time. `origins` names the blob and the path of each row's source."""

    def __init__(self, rows: np.ndarray, origins: tuple[tuple[AppendFile, str], ...]) -> None:
        self.rows, self.origins = rows, origins

    @staticmethod
    def from_records(records: Iterable[Record]) -> Records:
        """The records themselves, written down unless they are already."""
        if isinstance(records, Records):
            return records
        writer = RecordWriter()
        for record in records:
            writer.add(record)
        return writer.records()

    @staticmethod
    def concatenate(parts: Sequence[Records]) -> Records:
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        tables = [np.empty(0, ROW_DTYPE)]
        origins: list[tuple[AppendFile, str]] = []
        for part in parts:
            moved = part.rows.copy()
            moved["origin"] += len(origins)
            tables.append(moved)
            origins += part.origins
        return Records(np.concatenate(tables), tuple(origins))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Record]:
        for line, source in self.stored():
            yield _decode_record(line, source)

    def at(self, i: int) -> Record:
        """Read one."""
        return next(iter(self.select(slice(i, i + 1))))

    def select(self, rows: slice | np.ndarray) -> Records:
        """These alone; nothing is read."""
        return Records(self.rows[rows], self.origins)

    def source(self, i: int) -> Source:
        """Where a record came from, without reading it."""
        return Source(self.origins[self.rows["origin"][i]][1], int(self.rows["line"][i]))

    def stored(self) -> Iterator[tuple[bytes, Source]]:
        """Each record's line, as `encode` wrote it, and where it came from."""
        for begin in range(0, len(self.rows), 1024):
            rows = self.rows[begin : begin + 1024]
            columns = (rows[name].tolist() for name in ("start", "size", "line", "origin"))  # numpy scalars are slow
            for start, size, line, origin in zip(*columns, strict=True):
                blob, path = self.origins[origin]
                yield blob.read(start, size), Source(path, line)

    def indices_from_path(self, path: str) -> np.ndarray:
        """Indices of the records that came from there."""
        wanted = [number for number, (_, own) in enumerate(self.origins) if own == path]
        return np.flatnonzero(np.isin(self.rows["origin"], wanted))

    def prompts(self) -> np.ndarray:
        """Hashes of the normalized prompts, uint64 [n, 2]."""
        return self.rows["prompt"].astype(np.uint64)

    def groups(self) -> np.ndarray:
        """Hashes of the groups, uint64 [n, 2]; zeros where there is none."""
        return self.rows["group"].astype(np.uint64)


class RecordWriter:
    """Takes records one by one and gives them back as `Records`."""

    def __init__(self) -> None:
        self._blob = AppendFile.new()
        self._rows = bytearray()
        self._paths: dict[str, int] = {}

    def add(self, record: Record) -> None:
        """Write a record down."""
        line = encode_record(record)
        self._rows += _PACK.pack(
            self._blob.append(line),
            record.source.line,
            len(line),
            self._paths.setdefault(record.source.path, len(self._paths)),
            prompt_key(record)[:16],
            _NO_GROUP if record.group is None else group_key(record.group)[:16],
        )

    def records(self) -> Records:
        """All that was written; nothing can be added afterwards."""
        return Records(np.frombuffer(self._rows, ROW_DTYPE), tuple((self._blob, path) for path in self._paths))


def encode_record(record: Record) -> bytes:
    """The content of a record, without its source, as one line of JSON."""
    turns = [(m.role, m.content, m.tool_calls, m.name) for m in record.messages]
    task: list[Any] = [] if record.task is None else [record.task]
    if record.score is not None or record.candidates:
        task = [record.task, record.score, [(r.content, r.score) for r in record.candidates]]
    fields = [turns, record.context, record.tools, record.group, record.weight, record.text, *task]
    return json.dumps(fields).encode() + b"\n"


def _decode_record(line: bytes, source: Source) -> Record:
    turns, context, tools, group, weight, text, *more = json.loads(line)
    if len(more) > 1:
        more[2] = tuple(Candidate(*rival) for rival in more[2])
    return Record(tuple(Message(*turn) for turn in turns), source, context, tools, group, weight, text, *more)


def character_count(record: Record) -> int:
    """Length of all its texts."""
    turns = sum(len(m.content) for m in record.messages) + sum(len(r.content) for r in record.candidates)
    return len(record.text or "") + len(record.context or "") + turns


def encoded_lines(records: Iterable[Record]) -> Iterator[bytes]:
    """The content of each record, as `encode` writes it."""
    if isinstance(records, Records):
        return (line for line, _ in records.stored())
    return map(encode_record, records)


def fingerprint(records: Iterable[Record]) -> str:
    """SHA-256 over the content of records, in order, without their sources."""
    digest = sha256()
    for line in encoded_lines(records):
        digest.update(line)
    return digest.hexdigest()


def normalized_prompt(record: Record) -> str:
    """What is asked, casefolded and with white space collapsed: context and all turns before the final answer."""
    if record.text is not None:
        return _normalize(record.text)
    turns = [f"{m.role}: {m.content} {m.tool_calls or ''}" for m in record.messages[:-1]]
    return _normalize("\n".join([record.context or "", *turns]))


def prompt_key(record: Record) -> bytes:
    """SHA-256 of the normalized prompt."""
    return sha256(f"prompt\0{normalized_prompt(record)}".encode(errors="surrogatepass")).digest()


def group_key(group: str) -> bytes:
    """SHA-256 of a group."""
    return sha256(f"group\0{group}".encode()).digest()


def distinct_conversations(records: Iterable[Record]) -> np.ndarray:
    """Indices of the conversations that differ in context or turns, in order; of copies the last stands for all."""
    rows, keys = array("q"), bytearray()
    for i, record in enumerate(records):
        if record.messages:
            own = Record(record.messages, record.source, record.context)
            rows.append(i)
            keys += sha256(encode_record(own)).digest()[:16]
    hashes = np.frombuffer(keys, ">u8").reshape(-1, 2).astype(np.uint64)
    last = len(hashes) - 1 - first_occurrence(hashes[::-1])[::-1]
    found: np.ndarray = np.array(rows, dtype=np.int64)[last[first_occurrence(hashes) == np.arange(len(hashes))]]
    return found


def first_occurrence(keys: np.ndarray) -> np.ndarray:
    """Index of the first row with the same key, for each row of uint64 [n, 2]: its own where none came before."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: rows of one key stay in their order
    ordered = keys[order]
    begins = np.ones(len(keys), dtype=bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    found = np.empty(len(keys), dtype=np.int64)
    found[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))]
    return found


def _normalize(text: str) -> str:
    return " ".join(text.casefold().split())
