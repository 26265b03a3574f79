"""Formats: which columns mean what, and how raw rows become `Record`s.

The format of a source is detected from its column names. Where two readings are possible the source is refused with
both named, never guessed: a wrong guess would train on the wrong column without an error. Detection needs the columns
of all rows, so a source whose first row misleads is read twice. `splits` and `check` call `load_records` and
`read_records`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rung.config.data import DataConfig, Format
from rung.data.byte_store import MappedSequence, TextStore
from rung.data.messages import (
    check_order,
    encodable,
    from_history,
    from_messages,
    from_sharegpt,
    optional_text,
    parse_answers,
    parse_weight,
    text_of,
    tools_text,
)
from rung.data.read import ParsedRow, RejectedRow, Row, SourceRows, stream_rows
from rung.data.records import Records, RecordWriter
from rung.errors import DataError, did_you_mean
from rung.types import Message, Record, Source


class FormatColumns(NamedTuple):
    """Rung's names of a format's columns."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    answer: str | None = None


FORMATS: dict[Format, FormatColumns] = {
    "messages": FormatColumns(("messages",), ("tools",)),
    "sharegpt": FormatColumns(("conversations",), ("system", "tools")),
    "alpaca": FormatColumns(("instruction", "output"), ("input", "system", "history"), "output"),
    "prompt_completion": FormatColumns(("prompt", "completion"), (), "completion"),
    "question_answer": FormatColumns(("question", "answer"), ("context", "system"), "answer"),
    "text": FormatColumns(("text",)),
    "preference": FormatColumns(("prompt", "chosen", "rejected"), ("input", "context", "system", "margin")),
    "ranked": FormatColumns(("prompt", "ranked"), ("input", "context", "system")),
    "rated": FormatColumns(("prompt", "answers", "scores"), ("input", "context", "system")),
    "unpaired_preference": FormatColumns(("prompt", "completion", "label"), ("input", "context", "system")),
    "prompt_only": FormatColumns(("prompt",), ("input", "context", "system")),
}
CONTEXT_FORMATS = frozenset({"question_answer", "preference", "ranked", "rated", "unpaired_preference", "prompt_only"})
"""Formats with a context column."""
_COMMON = ("weight",)
# Unused columns with these names make a detected format ambiguous: they may be the answers.
_ANSWER_LIKE = frozenset({"answer", "answers", "output", "completion", "response", "target", "gold", "solution"})
_LABEL_LIKE = _ANSWER_LIKE | {"label", "category", "class"}


@dataclass(frozen=True, slots=True)
class DetectedFormat:
    """A detected format and the columns it reads."""

    format: Format
    mapping: dict[str, str]
    """Rung's name to the column in the file, for the columns that exist."""
    counts: dict[str, int]
    """Rows with a value per column of the file."""
    rows: int

    @property
    def unused(self) -> tuple[str, ...]:
        """Columns that are not read."""
        return tuple(c for c in self.counts if c not in self.mapping.values())

    def __str__(self) -> str:
        mapping_text = ", ".join(
            f"{name} <- {column} ({self.counts[column]} of {self.rows} rows)" for name, column in self.mapping.items()
        )
        unused_text = f"; not read: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.format}: {mapping_text}{unused_text}"


@dataclass(frozen=True, slots=True)
class LoadedRows:
    """One source as records, with every rejected row."""

    records: Records
    rejected_rows: Sequence[RejectedRow]
    detection: DetectedFormat
    path: str

    @property
    def format(self) -> Format:
        """The detected format."""
        return self.detection.format

    @property
    def mapping(self) -> dict[str, str]:
        """Rung's name to the column read."""
        return self.detection.mapping


def detect(
    rows: SourceRows, map: Mapping[str, str], format: Format = "auto", group: str | None = None
) -> DetectedFormat:
    """Detect the format of a source in memory; see `_detect`."""
    census = ColumnCensus()
    for _, row in rows.rows:
        census.add(row)
    return _detect(rows.path, census, map, format, group)


class ColumnCensus:
    """Rows with a value per column, in the order in which the columns appear."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.rows = 0

    def add(self, row: Row) -> None:
        """Count one row."""
        self.rows += 1
        for column, value in row.items():
            name = str(column)
            # a column that is always null still counts as present, with 0 rows
            self.counts[name] = self.counts.get(name, 0) + (value is not None)


def _detect(
    path: str, census: ColumnCensus, map: Mapping[str, str], format: Format, group: str | None
) -> DetectedFormat:
    """Detect the format from the columns of all rows.

    Raises:
        DataError: a column named in `map` or `group` is missing, no format fits, or more than one reading is possible.
    """
    counts = census.counts
    _check_names(path, map, group, counts)
    fitting_formats = _fitting_formats(map, counts) if format == "auto" else [format]
    # A named format must have its columns; a format to be detected may not have two readings.
    if format != "auto" and (missing_columns := [c for c in FORMATS[format].required if map.get(c, c) not in counts]):
        raise _unknown_format_error(path, counts, f"no column {missing_columns[0]!r}, which the format {format} needs")
    if not fitting_formats:
        raise _unknown_format_error(path, counts, "the columns fit no known format")
    if len(fitting_formats) > 1:
        readings = {f: counts[map.get(FORMATS[f].required[0], FORMATS[f].required[0])] for f in fitting_formats}
        raise _ambiguous_format_error(path, counts, "the rows can be read as " + _listed_counts(readings))
    detected_format = fitting_formats[0]
    columns = FORMATS[detected_format]
    column_names = (*columns.required, *columns.optional, *_COMMON)
    mapping = {name: map.get(name, name) for name in column_names if map.get(name, name) in counts}
    if group:
        # not part of a format: any column can be the group
        mapping["group"] = group
    detection = DetectedFormat(detected_format, mapping, dict(counts), census.rows)
    if format == "auto" and (competing := _competing_columns(detection, map)):
        raise _ambiguous_format_error(
            path, counts, f"{competing[0]!r} and {competing[1]!r} could both be what is to be learned"
        )
    return detection


def to_record(
    format: Format,
    row: Row,
    source: Source,
    map: Mapping[str, str],
    group: str | None = None,
    task: str | None = None,
) -> Record:
    """Convert one row into a record; `group` and `task` are column names.

    Raises:
        DataError: with the reason why this row cannot be an example; its `summary` is only the reason.
    """

    def get(name: str) -> Any:
        return row.get(map.get(name, name))

    try:
        weight = parse_weight(get("weight"))
        group_key = None if group is None else _key(row.get(group), "group", group)
        task_name = None if task is None else _key(row.get(task), "task", task)
        if format == "text":
            text = text_of(get("text"), "text")
            return Record((), source, group=group_key, weight=weight, text=text, task=task_name)
        candidates = parse_answers(format, get)
        if candidates or format == "prompt_only":
            # the best answer is the record's own; the others are its candidates
            messages: tuple[Message, ...] = (
                *_prompt(get),
                Message("assistant", candidates[0].content if candidates else ""),
            )
        else:
            messages = _messages(format, get)
        check_order(messages)
        return Record(
            messages,
            source,
            context=optional_text(get("context"), "context") if format in CONTEXT_FORMATS else None,
            tools=tools_text(get("tools")) if format in ("messages", "sharegpt") else None,
            group=group_key,
            weight=weight,
            task=task_name,
            score=candidates[0].score if candidates else None,
            candidates=tuple(candidates[1:]),
        )
    except DataError as error:
        # helpers know the reason but not the line
        raise DataError(error.summary, where=str(source)) from error


def load_records(config: DataConfig, path: str, *, held_out: bool = False) -> LoadedRows:
    """Read one source of a data config and apply `data.rejects`. In a held-out file the `group` column may be absent.

    Raises:
        DataError: the source cannot be read, rows are rejected and `data.rejects` is `error`, or no row remains.
    """
    loaded = read_records(config, path, held_out=held_out)
    if loaded.rejected_rows and (config.rejects == "error" or not loaded.records):
        raise _rejection_error(loaded)
    return loaded


def read_records(config: DataConfig, path: str, *, held_out: bool = False) -> LoadedRows:
    """Like `load_records`, but rejected rows are listed and never raised.

    Raises:
        DataError: the source cannot be read at all, or its columns fit no format.
    """
    reading = _SourceReader(config, path)
    group, counts = config.group, reading.census.counts
    if config.task is not None and config.task not in counts:
        raise _unknown_format_error(
            reading.name, counts, f"data.task names a column that is not there: {config.task!r}"
        )
    # A public test file rarely has the group column of one's own training file; its rows are then their own clusters.
    if held_out and group is not None and group not in counts:
        group = None
    detection = _detect(reading.name, reading.census, config.map, config.format, group)
    # the guess from the first row was wrong: convert again with what all rows showed
    if (reading.format, reading.group) != (detection.format, group):
        reading = _SourceReader(config, path, (detection.format, group))
    if config.task is not None:
        detection = replace(detection, mapping={**detection.mapping, "task": config.task})
    return LoadedRows(reading.records, reading.rejected_rows, detection, path)


class _SourceReader:
    """One pass over a source that counts columns and converts rows.

    The format is certain only after the pass. So it is either `known_format` or guessed from the first row; the rare
    wrong guess costs a second pass.
    """

    def __init__(self, config: DataConfig, path: str, known_format: tuple[Format, str | None] | None = None) -> None:
        self.name = path
        self.census = ColumnCensus()
        self.format: Format | None = None
        self.group: str | None = None
        self._known_format = known_format
        self._config = config
        writer, rejected_rows = RecordWriter(), TextStore()
        for item in stream_rows(path):
            reason = item.reason if isinstance(item, RejectedRow) else self._convert(item, writer)
            if reason is not None:
                rejected_rows.add(item.source.line, reason)
            self.name = item.source.path
        name = self.name
        self.records = writer.records()
        self.rejected_rows = MappedSequence(
            lambda i: _rejected_row(name, *rejected_rows.at(i)), range(len(rejected_rows))
        )

    def _convert(self, item: ParsedRow, writer: RecordWriter) -> str | None:
        """Write a row as a record, or return the reason why it cannot be one."""
        if not self.census.rows:
            self.format, self.group = self._known_format or self._guess(item.row)
        self.census.add(item.row)
        if self.format is None:
            return None  # the second pass converts it
        try:
            writer.add(to_record(self.format, item.row, item.source, self._config.map, self.group, self._config.task))
        except DataError as error:
            return error.summary
        return None

    def _guess(self, row: Row) -> tuple[Format | None, str | None]:
        format, group = self._config.format, self._config.group
        fitting = _fitting_formats(self._config.map, row) if format == "auto" else [format]
        return fitting[0] if len(fitting) == 1 else None, group if group in row else None


def _rejected_row(path: str, line: int, reason: str) -> RejectedRow:
    return RejectedRow(Source(path, line), reason)


def _rejection_error(loaded: LoadedRows) -> DataError:
    rejected_rows, kept_count = loaded.rejected_rows, len(loaded.records)
    lines = [f"line {r.source.line}: {r.reason}" for r in rejected_rows[:10]]
    remainder = [f"and {len(rejected_rows) - 10} more"] if len(rejected_rows) > 10 else []
    remedy = "mend them, or set data.rejects: drop" if kept_count else "no row is left; check data.format and data.map"
    return DataError(
        f"{len(rejected_rows)} of {len(rejected_rows) + kept_count} rows cannot be used",
        where=loaded.path,
        hint="\n  ".join([*lines, *remainder, remedy]),
    )


def _messages(format: Format, get: Any) -> tuple[Message, ...]:
    match format:
        case "messages":
            return from_messages(get("messages"))
        case "sharegpt":
            return (*_system(get), *from_sharegpt(get("conversations")))
        case "alpaca":
            question = text_of(get("instruction"), "instruction")
            if extra := optional_text(get("input"), "input"):
                question = f"{question}\n{extra}"
            answer = text_of(get("output"), "output")
            return (*_system(get), *from_history(get("history")), *_question_answer_turns(question, answer))
        case "prompt_completion":
            prompt, completion = get("prompt"), get("completion")
            if isinstance(prompt, list) and isinstance(completion, list):
                return (*from_messages(prompt, "prompt"), *from_messages(completion, "completion"))
            if isinstance(prompt, list) or isinstance(completion, list):
                raise DataError("prompt and completion must both be text or both be lists of messages")
            return _question_answer_turns(text_of(prompt, "prompt"), text_of(completion, "completion"))
        case _:
            pair = _question_answer_turns(text_of(get("question"), "question"), text_of(get("answer"), "answer"))
            return (*_system(get), *pair)


def _prompt(get: Any) -> tuple[Message, ...]:
    prompt = get("prompt")
    if isinstance(prompt, list):
        return (*_system(get), *from_messages(prompt, "prompt"))
    question = text_of(prompt, "prompt")
    if extra := optional_text(get("input"), "input"):
        question = f"{question}\n{extra}"
    return (*_system(get), Message("user", question))


def _question_answer_turns(question: str, answer: str) -> tuple[Message, Message]:
    return Message("user", question), Message("assistant", answer)


def _system(get: Any) -> tuple[Message, ...]:
    system = optional_text(get("system"), "system")
    return (Message("system", system),) if system else ()


def _key(value: object, column_kind: str, name: str) -> str:
    if value is None or value == "" or isinstance(value, list | dict):
        raise DataError(f"no value in the {column_kind} column {name!r}")
    return encodable(str(value), name)


def _fitting_formats(map: Mapping[str, str], counts: Mapping[str, Any]) -> list[Format]:
    """Formats whose columns exist, without those that must be named in the config.

    Columns called label or prompt are too common to identify `unpaired_preference` and `prompt_only`.
    """
    detectable = (name for name in FORMATS if name not in ("unpaired_preference", "prompt_only"))
    return [name for name in detectable if _fits(FORMATS[name], map, counts)]


def _fits(columns: FormatColumns, map: Mapping[str, str], counts: Mapping[str, Any]) -> bool:
    """All required columns are there, and every name in `map` is one of the format's."""
    known_columns = {*columns.required, *columns.optional, *_COMMON}
    return set(map) <= known_columns and all(map.get(c, c) in counts for c in columns.required)


def _competing_columns(detection: DetectedFormat, map: Mapping[str, str]) -> tuple[str, str] | None:
    """Two columns that could both be the answer, unless `map` decides."""
    answer = FORMATS[detection.format].answer
    if answer in map or "text" in map:
        return None
    answer_names = _LABEL_LIKE if detection.format == "text" else _ANSWER_LIKE if answer else frozenset[str]()
    competitor = next((c for c in detection.unused if c.lower() in answer_names), None)
    return (answer or "text", competitor) if competitor else None


def _check_names(path: str, map: Mapping[str, str], group: str | None, counts: Mapping[str, int]) -> None:
    known_names = sorted({name for c in FORMATS.values() for name in (*c.required, *c.optional)} | {*_COMMON})
    for name, column in map.items():
        if name not in known_names:
            suggestion = did_you_mean(name, known_names)
            hint = f"did you mean {suggestion}?" if suggestion else "data.map is {our name: column in the file}"
            raise DataError(f"data.map: {name!r} is no column of ours", allowed=", ".join(known_names), hint=hint)
        if column not in counts:
            raise _unknown_format_error(path, counts, f"data.map names a column that is not there: {column!r}")
    if group is not None and group not in counts:
        raise _unknown_format_error(path, counts, f"data.group names a column that is not there: {group!r}")


def _listed_counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name} ({n} rows)" for name, n in counts.items())


def _known_formats() -> str:
    return "; ".join(f"{f} ({', '.join(c.required)})" for f, c in FORMATS.items())


def _unknown_format_error(path: str, counts: Mapping[str, int], summary: str) -> DataError:
    return DataError(
        summary,
        where=path,
        given=f"columns {_listed_counts(counts)}",
        allowed=_known_formats(),
        hint="name the columns with data.map, for example data.map: {question: query, answer: gold}",
    )


def _ambiguous_format_error(path: str, counts: Mapping[str, int], summary: str) -> DataError:
    return DataError(
        f"ambiguous: {summary}",
        where=path,
        given=f"columns {_listed_counts(counts)}",
        allowed=_known_formats(),
        hint="decide with data.format, or with data.map, for example data.map: {question: query, answer: gold}",
    )
