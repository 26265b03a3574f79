"""Readers: files, folders of shards and `datasets` names as raw rows, each with its line. No row vanishes unsaid.

Own readers for .jsonl, .json and .csv instead of pandas or `datasets`, which guess types (`007` becomes 7), drop line
numbers and load the file into memory. They are strict and stream one row at a time, but slower than pyarrow. `formats`
reads training and test data through `stream_rows`, `evaluation.retrieval` its documents.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rung.config.data_files import KINDS, DataFiles, SavedDataset, data_suffix, find_data
from rung.console import print_status
from rung.data.file_hints import COMMA_AT_THE_END, json_hint, refuse_other_content
from rung.data.text_files import open_utf8
from rung.errors import DataError
from rung.planning.hub import hub_is_reachable, without_retries
from rung.types import Source

Row = dict[str, Any]
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


Note = Callable[[str], None]
"""Takes a sentence about what is assumed or not read."""


def stream_rows(path: str, note: Note = print_status) -> Iterator[ParsedRow | RejectedRow]:
    """Read a file of rows, a pattern or a folder of such files, a folder of `save_to_disk`, or a `datasets` name.

    Names: `name`, `name:split`, `name/config:split`; a saved `DatasetDict` is `folder:split`. One row at a time, in the
    order of the source; only a .json file that is not a plain list is loaded into memory. A broken line of a text file
    is a rejected row; the caller's policy decides about it. `note` gets what is assumed and which files are not read.

    Raises:
        DataError: the source is missing, empty, undecodable, of several kinds, or no row of it can be read.
    """
    readable_count = rejected_count = 0
    first_rejected: RejectedRow | None = None
    for name, items in _open_source(path, note):
        for line, value in items:
            source = Source(name, line)
            if isinstance(value, dict):
                readable_count += 1
                yield ParsedRow(source, value)
                continue
            reason = f"not an object with columns but a {type(value).__name__}"
            if isinstance(value, list) and value and isinstance(value[0], dict):
                reason += '; a list of turns is written as {"messages": [...]}'
            rejected_row = RejectedRow(source, value.reason if isinstance(value, _MalformedRow) else reason)
            # remembered for the error below: by then the caller has consumed the stream
            first_rejected = first_rejected or rejected_row
            rejected_count += 1
            yield rejected_row
    if not readable_count:
        example = f"; the first: {first_rejected}" if first_rejected else ""
        raise DataError(f"holds no readable row{example}", where=path, given=f"{rejected_count} rejected rows")


def _open_source(path: str, note: Note) -> Iterator[tuple[str, Iterator[ReadItem]]]:
    """Each file of a source with its rows; of a set that is not in files of rows its name."""
    found = find_data(path)
    if found is None:
        yield path, _read_hub(path)
    elif isinstance(found, SavedDataset):
        yield path, _read_saved(found.folder)
    else:
        if found.note:
            note(found.note)
        yield from _open_files(found, note)


def _open_files(files: DataFiles, note: Note) -> Iterator[tuple[str, Iterator[ReadItem]]]:
    separators: set[str] = set()

    def note_once(text: str) -> None:
        # one line for all shards
        if not separators:
            note(text)
        separators.add(text)

    tables: dict[Path, set[str]] = {}
    for file in files.paths:
        kind = str(data_suffix(file)).split(".")[1]
        items = _READERS[kind](file, note_once)
        yield str(file), _with_equal_columns(file, items, tables) if kind in _TABLES else items


_TABLES = frozenset({"csv", "tsv", "parquet"})
"""Kinds of files whose rows all have the same columns."""


def _with_equal_columns(file: Path, items: Iterator[ReadItem], tables: dict[Path, set[str]]) -> Iterator[ReadItem]:
    """The rows of a table; raises `DataError` where the tables before it have other columns: it is no part of them."""
    for line, value in items:
        if isinstance(value, dict) and file not in tables:
            tables[file] = set(value)
            first = next(iter(tables))
            if tables[first] != tables[file]:
                given, allowed = (", ".join(sorted(tables[table])) for table in (file, first))
                hint = "name the files of one table by a pattern, or each as a set of a mixture"
                raise DataError(f"other columns than {first}", where=str(file), given=given, allowed=allowed, hint=hint)
        yield line, value


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


class WrittenFloat(float):
    """A number of a JSON text that keeps its digits as written: 1.10 is 1.1 as a number and 1.10 as an answer."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        """The number of a text, which is kept."""
        number = super().__new__(cls, text)
        number.text = text
        return number


def parse_json(text: str) -> Any:
    """Strict JSON: NaN, infinities and duplicate keys are refused with a ValueError. Floats are `WrittenFloat`s."""
    return json.loads(
        text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant, parse_float=WrittenFloat
    )


BLANK_CHARACTERS = " \t\n\r\v\f"
"""Characters of a blank line. Python's strip removes more, such as control characters: those are broken rows."""


def _read_jsonl(file: Path, note: Note) -> Iterator[ReadItem]:
    is_first = True
    # Lines end in \n alone: U+2028 and U+0085 are legal inside JSON strings.
    with open_utf8(file, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip(BLANK_CHARACTERS):
                continue
            if is_first:
                _refuse_json_file(file, number, line.strip(BLANK_CHARACTERS))
                is_first = False
            try:
                # \r alone is taken off too: files from Windows end lines in \r\n
                yield number, parse_json(line.rstrip("\n").rstrip("\r"))
            except json.JSONDecodeError as error:
                remedy = f": {COMMA_AT_THE_END}" if line.rstrip().endswith("},") else ""
                yield number, _MalformedRow(f"broken JSON: {error.msg} (column {error.colno}){remedy}")
            except (ValueError, RecursionError) as error:
                yield number, _MalformedRow(f"refused JSON: {error}")


def _refuse_json_file(file: Path, number: int, line: str) -> None:
    """Raise `DataError` where the first line is that of a .json file: its last rows alone would be read."""
    refuse_other_content(file, line)
    # a list of one line whose elements are no objects is a row that is rejected like any other
    if line.startswith("[") and (line == "[" or line[1:].lstrip().startswith("{")):
        name = file.name.replace(".ndjson", ".json").replace(".jsonl", ".json")
        hint = f"a JSON list is .json: rename the file to {name}"
        raise DataError("this is one JSON list, not one object per line", where=f"{file} line {number}", hint=hint)
    if line == "{":
        hint = "write each object on a line of its own, or all of them as a JSON list in a .json file"
        raise DataError("this object does not end on its line", where=f"{file} line {number}", hint=hint)


def _read_json(file: Path, note: Note) -> Iterator[ReadItem]:
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
    decoder = json.JSONDecoder(
        object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant, parse_float=WrittenFloat
    )
    with open_utf8(file, newline="") as text:
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
    with open_utf8(file, newline="") as stream:
        text = stream.read()
    refuse_other_content(file, text[:200])
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        summary = f"broken JSON: {error.msg} (column {error.colno})"
        raise DataError(summary, where=f"{file} line {error.lineno}", hint=json_hint(file, text, error)) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"refused JSON: {error}", where=str(file)) from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        lists = [name for name, item in value.items() if isinstance(item, list)] if isinstance(value, dict) else []
        hint = f"write the list under {lists[0]!r} into a file of its own" if lists else None
        if isinstance(value, dict) and not lists:
            hint = "one object is one row: put it into a list, [{...}]"
        allowed = '[{...}, ...] or {"data": [{...}, ...]}'
        raise DataError("not a list of objects", where=str(file), allowed=allowed, hint=hint)
    return rows


def _read_csv(file: Path, note: Note) -> Iterator[ReadItem]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, refuses long contexts
    next_start = 1
    try:
        with open_utf8(file, newline="") as lines:
            first, skipped_lines = lines.readline(), 0
            refuse_other_content(file, first)
            separator = _declared_separator(first)
            if separator is not None:
                first, skipped_lines = lines.readline(), 1
            separator = separator or _separator(file, first, note)
            reader = csv.reader(chain([first], lines), strict=True, delimiter=separator)
            header = next(reader, [])
            if duplicates := sorted({name for name in header if header.count(name) > 1}):
                where = f"{file} line {1 + skipped_lines}"
                raise DataError(f"column {duplicates[0]!r} stands twice in the header", where=where)
            next_start = reader.line_num + skipped_lines + 1
            for fields in reader:
                start, next_start = next_start, reader.line_num + skipped_lines + 1
                if len(fields) == len(header):
                    yield start, dict(zip(header, fields, strict=True))
                elif fields:
                    yield start, _MalformedRow(f"{len(fields)} fields, but the header names {len(header)}")
    except csv.Error as error:
        raise DataError(f"broken CSV: {error}", where=f"{file} line {next_start}", hint=_QUOTES_HINT) from error


_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}


_QUOTES_HINT = "check the quotes: a field that begins with one ends with one, and those inside are doubled"


def _declared_separator(first_line: str) -> str | None:
    """The separator that Excel's first line `sep=;` declares."""
    match = re.fullmatch(r"sep=([,;\t|])\s*", first_line)
    return match[1] if match else None


def _separator(file: Path, header: str, note: Note) -> str:
    """The separator of a header; only one that stands in it alone is assumed. Raises `DataError` where two do."""
    unquoted = re.sub(r'"[^"]*("|$)', "", header)
    present = [separator for separator in _SEPARATORS if separator in unquoted]
    if str(data_suffix(file)).startswith(".tsv"):
        if present and "\t" not in present:
            hint = f"this looks {_SEPARATORS[present[0]]}-separated: rename it to {file.name.replace('.tsv', '.csv')}"
            raise DataError("the header of this .tsv file has no tab", where=f"{file} line 1", hint=hint)
        return "\t"
    if len(present) > 1:
        likely = max(present, key=unquoted.count)
        hint = "put column names that contain the other mark in quotes"
        if likely != ",":
            hint = f"this looks {_SEPARATORS[likely]}-separated: {hint}"
        names = " and ".join(f"a {_SEPARATORS[separator]}" for separator in present)
        raise DataError(f"{names} could both separate the columns", where=f"{file} line 1", given=header, hint=hint)
    separator = present[0] if present else ","
    if separator != ",":
        note(f"{file} is read as {_SEPARATORS[separator]}-separated: its header has no comma")
    return separator


def _prune_nulls(value: Any) -> Any:
    """Remove null fields from nested values: a columnar store gives every object the fields of all (FAILURES 8)."""
    if isinstance(value, dict):
        return {key: _prune_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_prune_nulls(item) for item in value]
    return value


def _prune_fields(row: Row) -> Row:
    return {name: _prune_nulls(value) for name, value in row.items()}


def _read_parquet(file: Path, note: Note) -> Iterator[ReadItem]:
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


def _read_saved(folder: Path) -> Iterator[ReadItem]:
    import datasets  # not at the top: it takes a second to import

    try:
        dataset = datasets.load_from_disk(str(folder))
        yield from enumerate(map(_prune_fields, dataset), start=1)
    except Exception as error:  # cache, arrow and decoders of images each raise their own kinds
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        hint = "save it anew, or as a .parquet file"
        raise DataError(
            "this folder of `save_to_disk` cannot be read", where=str(folder), given=reason, hint=hint
        ) from error


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
            with without_retries():
                dataset = datasets.load_dataset(candidate, config, split=split or "train")
            break
        except Exception as error:  # hub, cache, network and builder each raise their own kinds
            reasons.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            if isinstance(error, ConnectionError):
                break  # the other reading of the name would only wait through the same retries
    if dataset is None:
        summary = "neither a file here nor a `datasets` set that can be reached"
        if not hub_is_reachable():
            summary, reasons = "no such file, and the hub cannot be reached for a `datasets` set of this name", [path]
        allowed = f"{KINDS}, a pattern or folder of them, or name, name:split, name/config:split"
        hint = "without a network, save the set as a file and give its path"
        # the first reading of the name is the likelier one
        raise DataError(summary, where=path, given=reasons[0], allowed=allowed, hint=hint)
    yield from enumerate(map(_prune_fields, dataset), start=1)


_READERS: dict[str, Callable[[Path, Note], Iterator[ReadItem]]] = {
    **dict.fromkeys(("jsonl", "ndjson"), _read_jsonl),
    **dict.fromkeys(("csv", "tsv"), _read_csv),
    "json": _read_json,
    "parquet": _read_parquet,
}
"""Reader by the kind that the first part of a suffix names."""
