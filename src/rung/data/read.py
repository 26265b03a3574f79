"""Files and `datasets` names to raw rows, each with the line it stands on. Nothing is dropped without a reason."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from rung.errors import DataError
from rung.types import Source

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
CHUNK_CHARACTERS = 1 << 20
"""Characters of a .json file that are read at once."""
BATCH = 256
"""Rows of a parquet file that are decoded at once."""

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
    """What stands in place of a row that cannot be parsed."""

    reason: str


ReadItem = tuple[int, object]
"""A line and the value on it: a row, a `_Broken`, or something else that is no row."""


@dataclass(slots=True)
class SourceRows:
    """A whole source in memory: rows that could be read, and rows that could not."""

    path: str
    rows: list[tuple[Source, Row]] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)


def read_rows(path: str) -> SourceRows:
    """All that `stream_rows` gives, for sources of few rows."""
    rows = SourceRows(path)
    for item in stream_rows(path):
        if isinstance(item, RejectedRow):
            rows.rejected.append(item)
        else:
            rows.rows.append(item)
    return rows


def stream_rows(path: str) -> Iterator[ParsedRow | RejectedRow]:
    """Read a .jsonl, .json, .csv or .parquet file, or a `datasets` name (`name`, `name:split`, `name/config:split`).

    One row at a time, in the order of the source; only a .json file that is not a plain list stands in memory as a
    whole. A broken line of a .jsonl or .csv file is a rejected row; the caller's policy decides about it.

    Raises:
        DataError: the source is missing, a folder, empty, undecodable, or no row of it can be read.
    """
    name, items = _open(path)
    read = refused = 0
    first: RejectedRow | None = None
    for line, value in items:
        source = Source(name, line)
        if isinstance(value, dict):
            read += 1
            yield ParsedRow(source, value)
            continue
        rejected = RejectedRow(source, _reason(value))
        first = first or rejected
        refused += 1
        yield rejected
    if not read:
        named = f"; the first: {first}" if first else ""
        raise DataError(f"holds no readable row{named}", where=path, given=f"{refused} rejected rows")


def _reason(value: object) -> str:
    return (
        value.reason if isinstance(value, _MalformedRow) else f"not an object with columns but a {type(value).__name__}"
    )


def _open(path: str) -> tuple[str, Iterator[ReadItem]]:
    file = Path(path)
    reader = _READERS.get(file.suffix.lower())
    if file.is_dir():
        files = ", ".join(sorted(p.name for p in file.iterdir() if p.suffix in SUFFIXES)[:10])
        raise DataError("is a folder, not a file", where=path, hint=f"it holds: {files or 'no data file'}")
    if not file.exists():
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
    near = get_close_matches(file.name, names, n=3, cutoff=0.5)
    there = sorted(n for n in names if n.endswith(SUFFIXES))[:10]
    hint = f"did you mean {', '.join(near)}?" if near else f"data files there: {', '.join(there) or 'none'}"
    raise DataError("no such file", where=str(file), hint=hint)


def _text(file: Path, newline: str) -> TextIO:
    """The file as text, after a look at all of it: nothing is used of a file that is not UTF-8."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"byte 0x{line[error.start]:02x} is not UTF-8 ({error.reason})",
                    where=f"{file} line {number}",
                    hint="save the file as UTF-8",
                ) from error
    return file.open(encoding="utf-8-sig", newline=newline)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands twice in one object")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def parse_json(text: str) -> Any:
    """Strict JSON: NaN, infinities and duplicate keys are refused with a ValueError."""
    return json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)


BLANK = " \t\n\r\v\f"
"""What a line may hold and still be no row. Python counts more as space: control characters, which are broken rows."""


def _read_jsonl(file: Path) -> Iterator[ReadItem]:
    # Lines end in \n alone: U+2028 and U+0085 are legal inside JSON strings.
    with _text(file, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip(BLANK):
                continue
            try:
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
    except (ValueError, RecursionError):  # not a plain list, or broken: a look at the whole says what
        yield from enumerate(_whole_json(file)[number:], start=number + 1)


def _elements(file: Path) -> Iterator[Any]:
    """The values of a list, one after the other, with only a piece of the file in memory.

    Raises:
        ValueError: the file is no list, or broken somewhere.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    with _text(file, newline="") as text:
        buffer = text.read(CHUNK_CHARACTERS)
        at = _skip_space(buffer, 0)
        if not buffer.startswith("[", at):
            raise ValueError("no list")
        at += 1
        while True:
            found = _element(decoder, buffer, at)
            if found is None:
                more = text.read(max(CHUNK_CHARACTERS, len(buffer) - at))
                if not more:
                    raise ValueError("broken off")
                buffer, at = buffer[at:] + more, 0
                continue
            value, end = found
            yield value
            at = end + 1
            if buffer[end] == "]":
                break
        rest = buffer[at:] + text.read()
        if _skip_space(rest, 0) < len(rest):
            raise ValueError("more behind the list")


def _element(decoder: json.JSONDecoder, buffer: str, at: int) -> tuple[Any, int] | None:
    """The value at this place and where the sign behind it stands; None when one of them is not there (yet)."""
    try:
        value, end = decoder.raw_decode(buffer, _skip_space(buffer, at))
    except json.JSONDecodeError:
        return None
    end = _skip_space(buffer, end)
    return (value, end) if buffer.startswith((",", "]"), end) else None


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _whole_json(file: Path) -> list[Any]:
    with _text(file, newline="") as whole:
        text = whole.read()
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data"
        raise DataError(
            f"broken JSON: {error.msg} (column {error.colno})",
            where=f"{file} line {error.lineno}",
            hint="one object per line is .jsonl: rename the file" if lines else None,
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"refused JSON: {error}", where=str(file)) from error
    if isinstance(value, dict):
        value = value.get("data")
    if not isinstance(value, list):
        raise DataError("not a list of objects", where=str(file), allowed='[{...}, ...] or {"data": [{...}, ...]}')
    return value


def _csv_lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, refuses long contexts
    start = 1
    try:
        with _text(file, newline="") as lines:
            reader = csv.reader(lines, strict=True)
            for fields in reader:
                yield start, fields
                start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"broken CSV: {error}", where=f"{file} line {start}", hint="check the quotes") from error


def _read_csv(file: Path) -> Iterator[ReadItem]:
    lines = _csv_lines(file)
    header = next(lines, (1, []))[1]
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"column {twice[0]!r} stands twice in the header", where=f"{file} line 1")
    for number, fields in lines:
        if len(fields) == len(header):
            yield number, dict(zip(header, fields, strict=True))
        elif fields:
            yield number, _MalformedRow(f"{len(fields)} fields, but the header names {len(header)}")


def _prune_nulls(value: Any) -> Any:
    """Remove null fields inside nested values: a columnar store gives every object the fields of all (FAILURES 8)."""
    if isinstance(value, dict):
        return {key: _prune_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_prune_nulls(item) for item in value]
    return value


def _read_parquet(file: Path) -> Iterator[ReadItem]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16) as table:  # else whole row groups are held
            for batch in table.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: _prune_nulls(value) for name, value in row.items()}
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"broken parquet: {error}", where=str(file)) from error
    finally:
        pa.default_memory_pool().release_unused()


def _hub_candidates(name: str) -> list[tuple[str, str | None]]:
    """`a/b` is a set of an owner or, failing that, a configuration of a set without one; `a/b/c` is never in doubt."""
    match name.split("/"):
        case [first, second]:
            return [(name, None), (first, second)]
        case [owner, short, config]:
            return [(f"{owner}/{short}", config)]
        case _:
            return [(name, None)]


def _read_hub(path: str) -> Iterator[ReadItem]:
    import datasets  # not at the top: it takes a second to import

    name, _, split = path.partition(":")
    reasons = []
    loaded = None
    for candidate, config in _hub_candidates(name):
        try:
            loaded = datasets.load_dataset(candidate, config, split=split or "train")
            break
        except Exception as error:  # hub, cache, network and builder each raise their own kinds
            reasons.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            if isinstance(error, ConnectionError):
                break  # the other reading of the name would only wait through the same retries
    if loaded is None:
        raise DataError(
            "neither a file here nor a `datasets` set that can be reached",
            where=path,
            given=reasons[0],
            allowed=f"a {', '.join(SUFFIXES)} file, or name, name:split, name/config:split",
            hint="without a network, save the set as a file and give its path",
        )
    for number, row in enumerate(loaded, start=1):
        yield number, {column: _prune_nulls(value) for column, value in row.items()}


_READERS: dict[str, Callable[[Path], Iterator[ReadItem]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
