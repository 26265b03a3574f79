"""Readers: files and `datasets` names as raw rows, each with its line. Nothing is dropped without a reason.

Own readers for .jsonl, .json and .csv instead of pandas or `datasets`, which guess types (`007` becomes 7), drop line
numbers and load the file into memory. They are strict and stream one row at a time, but slower than pyarrow. `formats`
reads training and test data through `stream_rows`, `evaluation.retrieval` its documents.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from rung.errors import DataError
from rung.types import Source

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
CHUNK_CHARACTERS = 1 << 20
"""Characters of a .json file read at once."""
PARQUET_BATCH_ROWS = 256
"""Rows of a parquet file decoded at once."""

_SPACE = re.compile(r"[ \t\n\r]*")


class RejectedRow(NamedTuple):
    """A row that cannot be used, and why."""

    source: Source
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class ParsedRow(NamedTuple):
    """A row that could be parsed."""

    source: Source
    row: Row


class _MalformedRow(NamedTuple):
    """Placeholder for a row that cannot be parsed."""

    reason: str


ReadItem = tuple[int, object]
"""A line and its value: a row, a `_MalformedRow`, or another value that is no row."""


def stream_rows(path: str) -> Iterator[ParsedRow | RejectedRow]:
    """Read a .jsonl, .json, .csv or .parquet file, or a `datasets` name (`name`, `name:split`, `name/config:split`).

    One row at a time, in the order of the source; only a .json file that is not a plain list is loaded into memory. A
    broken line of a .jsonl or .csv file is a rejected row; the caller's policy decides about it.

    Raises:
        DataError: the source is missing, a folder, empty, undecodable, or no row of it can be read.
    """
    name, items = _open_source(path)
    readable_count = rejected_count = 0
    first_rejected: RejectedRow | None = None
    for line, value in items:
        source = Source(name, line)
        if isinstance(value, dict):
            readable_count += 1
            yield ParsedRow(source, value)
            continue
        reason = f"not an object with columns but a {type(value).__name__}"
        rejected_row = RejectedRow(source, value.reason if isinstance(value, _MalformedRow) else reason)
        # remembered for the error below: by then the caller has consumed the stream
        first_rejected = first_rejected or rejected_row
        rejected_count += 1
        yield rejected_row
    if not readable_count:
        example = f"; the first: {first_rejected}" if first_rejected else ""
        raise DataError(f"holds no readable row{example}", where=path, given=f"{rejected_count} rejected rows")


def _open_source(path: str) -> tuple[str, Iterator[ReadItem]]:
    file = Path(path)
    reader = _READERS.get(file.suffix.lower())
    if file.is_dir():
        files = ", ".join(sorted(p.name for p in file.iterdir() if p.suffix in SUFFIXES)[:10])
        raise DataError("is a folder, not a file", where=path, hint=f"it holds: {files or 'no data file'}")
    if not file.exists():
        # a path, not a hub name: asking the hub would only wait for the network
        if reader or path.startswith(("/", "./", "../", "~")):
            _missing_file_error(file)
        return path, _read_hub(path)
    if reader is None:
        raise DataError("unknown kind of file", where=path, given=file.suffix, allowed=", ".join(SUFFIXES))
    if file.stat().st_size == 0:
        raise DataError("the file is empty", where=path)
    return str(file), reader(file)


def _missing_file_error(file: Path) -> NoReturn:
    folder = file.parent
    if not folder.is_dir():
        raise DataError("no such file, and no such folder", where=str(file), given=str(folder))
    names = [p.name for p in folder.iterdir() if p.is_file()]
    similar = get_close_matches(file.name, names, n=3, cutoff=0.5)
    data_files = sorted(n for n in names if n.endswith(SUFFIXES))[:10]
    hint = f"did you mean {', '.join(similar)}?" if similar else f"data files there: {', '.join(data_files) or 'none'}"
    raise DataError("no such file", where=str(file), hint=hint)


def _open_utf8(file: Path, newline: str) -> TextIO:
    """Open the file as text after checking all of it: no row is used of a file that is not UTF-8."""
    # checked by line, to name the line: the text layer decodes in blocks and knows no line number
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                summary = f"byte 0x{line[error.start]:02x} is not UTF-8 ({error.reason})"
                raise DataError(summary, where=f"{file} line {number}", hint="save the file as UTF-8") from error
    # utf-8-sig: Excel writes a byte order mark, which would become part of the first column's name
    return file.open(encoding="utf-8-sig", newline=newline)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    # json keeps the last of two equal keys, so the other value would vanish
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {duplicate!r} stands twice in one object")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def parse_json(text: str) -> Any:
    """Strict JSON: NaN, infinities and duplicate keys are refused with a ValueError."""
    return json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)


BLANK_CHARACTERS = " \t\n\r\v\f"
"""Characters of a blank line. Python's strip removes more, such as control characters: those are broken rows."""


def _read_jsonl(file: Path) -> Iterator[ReadItem]:
    # Lines end in \n alone: U+2028 and U+0085 are legal inside JSON strings.
    with _open_utf8(file, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip(BLANK_CHARACTERS):
                continue
            try:
                # \r alone is taken off too: files from Windows end lines in \r\n
                yield number, parse_json(line.rstrip("\n").rstrip("\r"))
            except json.JSONDecodeError as error:
                yield number, _MalformedRow(f"broken JSON: {error.msg} (column {error.colno})")
            except (ValueError, RecursionError) as error:
                yield number, _MalformedRow(f"refused JSON: {error}")


def _read_json(file: Path) -> Iterator[ReadItem]:
    number = 0
    try:
        for number, item in enumerate(_elements(file), start=1):
            yield number, item
    except (ValueError, RecursionError):  # not a plain list, or broken: parsing the complete file tells which
        yield from enumerate(_load_json(file)[number:], start=number + 1)


def _elements(file: Path) -> Iterator[Any]:
    """The values of a JSON list one by one, with only a piece of the file in memory.

    Raises:
        ValueError: the file is not a list, or broken.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    with _open_utf8(file, newline="") as text:
        buffer = text.read(CHUNK_CHARACTERS)
        position = _skip_space(buffer, 0)
        if not buffer.startswith("[", position):
            raise ValueError("no list")
        position += 1
        while True:
            element = _element(decoder, buffer, position)
            if element is None:
                # at least doubles the buffer: a value longer than it is then parsed O(log n) times, not O(n)
                chunk = text.read(max(CHUNK_CHARACTERS, len(buffer) - position))
                if not chunk:
                    raise ValueError("broken off")
                buffer, position = buffer[position:] + chunk, 0
                continue
            value, end = element
            yield value
            position = end + 1
            if buffer[end] == "]":
                break
        trailing = buffer[position:] + text.read()
        if _skip_space(trailing, 0) < len(trailing):
            raise ValueError("more behind the list")


def _element(decoder: json.JSONDecoder, buffer: str, position: int) -> tuple[Any, int] | None:
    """The value at this position and the position of the delimiter after it; None when one is not in the buffer yet."""
    try:
        value, end = decoder.raw_decode(buffer, _skip_space(buffer, position))
    except json.JSONDecodeError:
        return None
    end = _skip_space(buffer, end)
    # a number at the end of the buffer may go on: only a delimiter shows that it is complete
    return (value, end) if buffer.startswith((",", "]"), end) else None


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _load_json(file: Path) -> list[Any]:
    with _open_utf8(file, newline="") as stream:
        text = stream.read()
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        # the typical mistake: JSON Lines in a file called .json
        hint = "one object per line is .jsonl: rename the file" if error.msg == "Extra data" else None
        summary = f"broken JSON: {error.msg} (column {error.colno})"
        raise DataError(summary, where=f"{file} line {error.lineno}", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"refused JSON: {error}", where=str(file)) from error
    if isinstance(value, dict):
        value = value.get("data")
    if not isinstance(value, list):
        raise DataError("not a list of objects", where=str(file), allowed='[{...}, ...] or {"data": [{...}, ...]}')
    return value


def _read_csv(file: Path) -> Iterator[ReadItem]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, refuses long contexts
    next_start = 1
    try:
        with _open_utf8(file, newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = next(reader, [])
            if duplicates := sorted({name for name in header if header.count(name) > 1}):
                raise DataError(f"column {duplicates[0]!r} stands twice in the header", where=f"{file} line 1")
            next_start = reader.line_num + 1
            for fields in reader:
                start, next_start = next_start, reader.line_num + 1
                if len(fields) == len(header):
                    yield start, dict(zip(header, fields, strict=True))
                elif fields:
                    yield start, _MalformedRow(f"{len(fields)} fields, but the header names {len(header)}")
    except csv.Error as error:
        raise DataError(f"broken CSV: {error}", where=f"{file} line {next_start}", hint="check the quotes") from error


def _prune_nulls(value: Any) -> Any:
    """Remove null fields from nested values: a columnar store gives every object the fields of all (FAILURES 8)."""
    if isinstance(value, dict):
        return {key: _prune_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_prune_nulls(item) for item in value]
    return value


def _prune_fields(row: Row) -> Row:
    return {name: _prune_nulls(value) for name, value in row.items()}


def _read_parquet(file: Path) -> Iterator[ReadItem]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # without these arguments complete row groups stay in memory
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16) as table:
            batches = table.iter_batches(batch_size=PARQUET_BATCH_ROWS)
            yield from enumerate(map(_prune_fields, chain.from_iterable(b.to_pylist() for b in batches)), start=1)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"broken parquet: {error}", where=str(file)) from error
    finally:
        # arrow's pool keeps freed pages, which would count as memory of the training run
        pa.default_memory_pool().release_unused()


def _hub_candidates(name: str) -> list[tuple[str, str | None]]:
    """`a/b` is an owner's data set or, failing that, a configuration of a set without owner; `a/b/c` is unambiguous."""
    match name.split("/"):
        case [first, second]:
            return [(name, None), (first, second)]
        case [owner, set_name, config]:
            return [(f"{owner}/{set_name}", config)]
        case _:
            return [(name, None)]


def _read_hub(path: str) -> Iterator[ReadItem]:
    import datasets  # not at the top: it takes a second to import

    name, _, split = path.partition(":")
    reasons: list[str] = []
    dataset = None
    for candidate, config in _hub_candidates(name):
        try:
            dataset = datasets.load_dataset(candidate, config, split=split or "train")
            break
        except Exception as error:  # hub, cache, network and builder each raise their own kinds
            reasons.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            if isinstance(error, ConnectionError):
                break  # the other reading of the name would only wait through the same retries
    if dataset is None:
        summary = "neither a file here nor a `datasets` set that can be reached"
        allowed = f"a {', '.join(SUFFIXES)} file, or name, name:split, name/config:split"
        hint = "without a network, save the set as a file and give its path"
        # the first reading of the name is the likelier one
        raise DataError(summary, where=path, given=reasons[0], allowed=allowed, hint=hint)
    yield from enumerate(map(_prune_fields, dataset), start=1)


_Reader = Callable[[Path], Iterator[ReadItem]]
_READERS: dict[str, _Reader] = dict(zip(SUFFIXES, (_read_jsonl, _read_json, _read_csv, _read_parquet), strict=True))
