"""Files and `datasets` names to raw rows, each with the line it stands on. Nothing is dropped without a reason."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rung.errors import DataError
from rung.types import Source

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class Rejected(NamedTuple):
    """A row that cannot be used, and why."""

    source: Source
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass(slots=True)
class Rows:
    """What a file holds: rows that could be read, and rows that could not."""

    path: str
    rows: list[tuple[Source, Row]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    def add(self, line: int, value: object) -> None:
        """Keep an object; anything else is a rejected row."""
        if isinstance(value, dict):
            self.rows.append((Source(self.path, line), value))
        else:
            self.reject(line, f"not an object with columns but a {type(value).__name__}")

    def reject(self, line: int, reason: str) -> None:
        """Remember why the row on this line cannot be used."""
        self.rejected.append(Rejected(Source(self.path, line), reason))


def read_rows(path: str) -> Rows:
    """Read a .jsonl, .json, .csv or .parquet file, or a `datasets` name (`name`, `name:split`, `name/config:split`).

    A broken line of a .jsonl or .csv file is a rejected row; the caller's policy decides about it.

    Raises:
        DataError: the source is missing, a folder, empty, undecodable, or no row of it can be read.
    """
    file = Path(path)
    reader = _READERS.get(file.suffix.lower())
    if file.is_dir():
        files = ", ".join(sorted(p.name for p in file.iterdir() if p.suffix in SUFFIXES)[:10])
        raise DataError("is a folder, not a file", where=path, hint=f"it holds: {files or 'no data file'}")
    if not file.exists():
        if reader or path.startswith(("/", "./", "../", "~")):
            _missing(file)
        rows = _read_hub(path)
    elif reader is None:
        raise DataError("unknown kind of file", where=path, given=file.suffix, allowed=", ".join(SUFFIXES))
    elif file.stat().st_size == 0:
        raise DataError("the file is empty", where=path)
    else:
        rows = reader(file)
    if not rows.rows:
        first = f"; the first: {rows.rejected[0]}" if rows.rejected else ""
        raise DataError(f"holds no readable row{first}", where=path, given=f"{len(rows.rejected)} rejected rows")
    return rows


def _missing(file: Path) -> NoReturn:
    folder = file.parent
    if not folder.is_dir():
        raise DataError("no such file, and no such folder", where=str(file), given=str(folder))
    names = [p.name for p in folder.iterdir() if p.is_file()]
    near = get_close_matches(file.name, names, n=3, cutoff=0.5)
    there = sorted(n for n in names if n.endswith(SUFFIXES))[:10]
    hint = f"did you mean {', '.join(near)}?" if near else f"data files there: {', '.join(there) or 'none'}"
    raise DataError("no such file", where=str(file), hint=hint)


def _decode(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"byte 0x{data[error.start]:02x} is not UTF-8 ({error.reason})",
            where=f"{file} line {line}",
            hint="save the file as UTF-8",
        ) from error


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


def _read_jsonl(file: Path) -> Rows:
    rows = Rows(str(file))
    # Not splitlines(): U+2028 and U+0085 are legal inside JSON strings.
    for number, line in enumerate(_decode(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.add(number, parse_json(line.rstrip("\r")))
        except json.JSONDecodeError as error:
            rows.reject(number, f"broken JSON: {error.msg} (column {error.colno})")
        except (ValueError, RecursionError) as error:
            rows.reject(number, f"refused JSON: {error}")
    return rows


def _read_json(file: Path) -> Rows:
    text = _decode(file)
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
    rows = Rows(str(file))
    for number, item in enumerate(value, start=1):
        rows.add(number, item)
    return rows


def _csv_lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, refuses long contexts
    reader = csv.reader(io.StringIO(_decode(file), newline=""), strict=True)
    start = 1
    try:
        for fields in reader:
            yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"broken CSV: {error}", where=f"{file} line {start}", hint="check the quotes") from error


def _read_csv(file: Path) -> Rows:
    lines = _csv_lines(file)
    header = next(lines, (1, []))[1]
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"column {twice[0]!r} stands twice in the header", where=f"{file} line 1")
    rows = Rows(str(file))
    for number, fields in lines:
        if len(fields) == len(header):
            rows.add(number, dict(zip(header, fields, strict=True)))
        elif fields:
            rows.reject(number, f"{len(fields)} fields, but the header names {len(header)}")
    return rows


def _prune(value: Any) -> Any:
    """Remove null fields inside nested values: a columnar store gives every object the fields of all (FAILURES 8)."""
    if isinstance(value, dict):
        return {key: _prune(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_prune(item) for item in value]
    return value


def _read_parquet(file: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"broken parquet: {error}", where=str(file)) from error
    rows = Rows(str(file))
    for number, row in enumerate(table.to_pylist(), start=1):
        rows.add(number, {name: _prune(value) for name, value in row.items()})
    return rows


def _hub_candidates(name: str) -> list[tuple[str, str | None]]:
    """`a/b` is a set of an owner or, failing that, a configuration of a set without one; `a/b/c` is never in doubt."""
    match name.split("/"):
        case [first, second]:
            return [(name, None), (first, second)]
        case [owner, short, config]:
            return [(f"{owner}/{short}", config)]
        case _:
            return [(name, None)]


def _read_hub(path: str) -> Rows:
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
    rows = Rows(path)
    for number, row in enumerate(loaded, start=1):
        rows.add(number, {column: _prune(value) for column, value in row.items()})
    return rows


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
