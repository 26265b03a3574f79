"""Records on disk, one line of JSON each; in memory only their positions and hashes of prompt and group.

56 bytes of memory per record instead of several kB (decision 0011); a record read twice is parsed twice. Splits,
duplicates and overlaps are computed from the hashes without reading records. The stored line is also what the
fingerprint of the data is computed from. Written by `formats`, read by everything behind it.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Any, Literal

import numpy as np

from rung.data.byte_store import AppendFile, LazySequence
from rung.types import Candidate, CodeTests, Message, Record, Source

# big-endian hashes, so that the two halves read as the digest's bytes do
_HASHES = [(name, ">u8", (2,)) for name in ("prompt", "group")]
ROW_DTYPE = np.dtype([("start", "<i8"), ("line", "<i8"), ("size", "<u4"), ("origin", "<u4"), *_HASHES])
"""Memory of a record: 56 bytes. The hashes are those of `_text_hash`."""
_PACK_ROW = struct.Struct("<qqII16s16s")
"""Writes a row of `ROW_DTYPE`: numpy needs sixteen times as long for one row."""


class Records(LazySequence[Record]):
    """Records on disk, read one at a time. `origins` has the file and the source path of each row."""

    def __init__(self, rows: np.ndarray, origins: tuple[tuple[AppendFile, str], ...]) -> None:
        self.rows, self.origins = rows, origins

    @staticmethod
    def from_records(records: Iterable[Record]) -> Records:
        """The records on disk: unchanged if they are `Records`, else written."""
        if isinstance(records, Records):
            return records
        writer = RecordWriter()
        for record in records:
            writer.add(record)
        return writer.records()

    @staticmethod
    def concatenate(parts: Sequence[Records]) -> Records:
        """All parts in order; nothing is copied on disk."""
        if len(parts) == 1:
            return parts[0]
        tables = [np.empty(0, ROW_DTYPE)]
        origins: list[tuple[AppendFile, str]] = []
        for part in parts:
            shifted = part.rows.copy()
            # origins are numbered within a part
            shifted["origin"] += len(origins)
            tables.append(shifted)
            origins += part.origins
        return Records(np.concatenate(tables), tuple(origins))

    def __iter__(self) -> Iterator[Record]:
        for line, source in self.encoded_with_sources():
            yield _decode_record(line, source)

    def at(self, i: int) -> Record:
        """Read one record."""
        return next(iter(self.select(slice(i, i + 1))))

    def source(self, i: int) -> Source:
        """The source of a record, without reading it."""
        return Source(self.origins[self.rows["origin"][i]][1], int(self.rows["line"][i]))

    def encoded_with_sources(self) -> Iterator[tuple[bytes, Source]]:
        """Each record's line, as written by `encode_record`, and its source."""
        for offset in range(0, len(self.rows), 1024):
            rows = self.rows[offset : offset + 1024]
            columns = (rows[name].tolist() for name in ("start", "size", "line", "origin"))  # numpy scalars are slow
            for start, size, line, origin in zip(*columns, strict=True):
                file, path = self.origins[origin]
                yield file.read(start, size), Source(path, line)

    def indices_from_files(self, files: Collection[str]) -> np.ndarray:
        """Indices of the records from these files."""
        origin_ids = [number for number, (_, path) in enumerate(self.origins) if path in files]
        # several origins may have one path: each concatenated part has its own
        return np.flatnonzero(np.isin(self.rows["origin"], origin_ids))

    def prompts(self) -> np.ndarray:
        """Hashes of the normalized prompts, uint64 [n, 2]."""
        return self.rows["prompt"].astype(np.uint64)

    def groups(self) -> np.ndarray:
        """Hashes of the groups, uint64 [n, 2]; zeros without a group."""
        return self.rows["group"].astype(np.uint64)


class RecordWriter:
    """Writes records one by one and returns them as `Records`."""

    def __init__(self) -> None:
        self._file = AppendFile.new()
        self._rows = bytearray()
        self._paths: dict[str, int] = {}

    def add(self, record: Record) -> None:
        """Write one record."""
        line = encode_record(record)
        origin = self._paths.setdefault(record.source.path, len(self._paths))
        # a real group hashes to zeros with probability 2^-128
        group = bytes(16) if record.group is None else _text_hash("group", record.group)
        prompt = _text_hash("prompt", normalized_prompt(record))
        self._rows += _PACK_ROW.pack(self._file.append(line), record.source.line, len(line), origin, prompt, group)

    def records(self) -> Records:
        """All written records; nothing can be added afterwards."""
        return Records(np.frombuffer(self._rows, ROW_DTYPE), tuple((self._file, path) for path in self._paths))


def encode_record(record: Record) -> bytes:
    """The content of a record as one line of JSON, without its source."""
    turns = [_encode_turn(m) for m in record.messages]
    # Appended only where they are set: fingerprints of data without them stay those of earlier versions.
    optional_fields: list[Any] = [] if record.task is None else [record.task]
    last_fields: list[Any] = [record.references] if record.references else []
    if record.probability is not None or record.tests is not None:
        last_fields = [record.references, record.probability]
    if record.tests is not None:
        last_fields.append(record.tests)
    if record.score is not None or record.candidates or last_fields:
        candidates = [_encode_candidate(c) for c in record.candidates]
        optional_fields = [record.task, record.score, candidates, *last_fields]
    fields = [turns, record.context, record.tools, record.group, record.weight, record.text, *optional_fields]
    return json.dumps(fields).encode() + b"\n"


def _encode_turn(message: Message) -> tuple[Any, ...]:
    """A turn as a list; the later fields only where they are set, so that fingerprints of earlier versions stay."""
    extras = (message.reasoning, message.tool_call_id, message.is_learned)
    required = (message.role, message.content, message.tool_calls, message.name)
    return required if extras == (None, None, True) else (*required, *extras)


def _encode_candidate(candidate: Candidate) -> tuple[Any, ...]:
    extras = (candidate.tool_calls, candidate.reasoning)
    required = (candidate.content, candidate.score)
    return required if extras == (None, None) else (*required, *extras)


def _decode_record(line: bytes, source: Source) -> Record:
    turns, context, tools, group, weight, text, *extras = json.loads(line)
    if len(extras) > 1:
        extras[2] = tuple(Candidate(*candidate) for candidate in extras[2])
        extras[3:4] = map(tuple, extras[3:4])
        extras[5:] = [CodeTests(*tests) for tests in extras[5:]]
    return Record(tuple(Message(*turn) for turn in turns), source, context, tools, group, weight, text, *extras)


def character_count(record: Record) -> int:
    """Total length of all texts of a record."""
    turns: list[Message | Candidate] = [*record.messages, *record.candidates]
    characters = (len(t.content) + len(t.tool_calls or "") + len(t.reasoning or "") for t in turns)
    return len(record.text or "") + len(record.context or "") + sum(characters)


def encoded_lines(records: Iterable[Record]) -> Iterator[bytes]:
    """The content of each record, as `encode_record` writes it."""
    if isinstance(records, Records):
        return (line for line, _ in records.encoded_with_sources())
    return map(encode_record, records)


def fingerprint(records: Iterable[Record]) -> str:
    """SHA-256 of the content of records, in order, without their sources."""
    digest = sha256()
    for line in encoded_lines(records):
        digest.update(line)
    return digest.hexdigest()


def normalized_prompt(record: Record) -> str:
    """The prompt casefolded and with white space collapsed: context and all turns before the final answer."""
    if record.text is not None:
        return _normalize(record.text)
    turns = [f"{m.role}: {m.content} {m.tool_calls or ''}" for m in record.messages[:-1]]
    return _normalize("\n".join([record.context or "", *turns]))


def _text_hash(kind: Literal["prompt", "group"], text: str) -> bytes:
    """The first 128 bits of SHA-256."""
    # a prefix per kind: a prompt and a group of the same text get different positions in the split
    return sha256(f"{kind}\0{text}".encode(errors="surrogatepass")).digest()[:16]


def distinct_conversations(records: Iterable[Record]) -> np.ndarray:
    """Indices of conversations with distinct context or turns, in order; the last of several copies is taken."""
    rows, keys = array("q"), bytearray()
    for i, record in enumerate(records):
        if record.messages:
            conversation = Record(record.messages, record.source, record.context)
            rows.append(i)
            keys += sha256(encode_record(conversation)).digest()[:16]
    hashes = np.frombuffer(keys, ">u8").reshape(-1, 2).astype(np.uint64)
    last_occurrence = len(hashes) - 1 - index_of_first_occurrence(hashes[::-1])[::-1]
    is_first = index_of_first_occurrence(hashes) == np.arange(len(hashes))
    return np.asarray(np.array(rows, dtype=np.int64)[last_occurrence[is_first]])


def index_of_first_occurrence(keys: np.ndarray) -> np.ndarray:
    """For each row of uint64 [n, 2] the index of the first row with the same key: its own if it is the first."""
    # not np.unique(axis=0), which sorts rows as raw bytes and takes three times as long
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: rows of one key stay in their order
    ordered = keys[order]
    starts_key = np.ones(len(keys), dtype=bool)
    starts_key[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first_indices = np.empty(len(keys), dtype=np.int64)
    first_indices[order] = order[np.maximum.accumulate(np.where(starts_key, np.arange(len(keys)), 0))]
    return first_indices


def _normalize(text: str) -> str:
    return " ".join(text.casefold().split())
