"""Which columns mean what: raw rows of the known formats to `Record`s."""

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
    """Our names of a format's columns."""

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
WITH_CONTEXT = frozenset({"question_answer", "preference", "ranked", "rated", "unpaired_preference", "prompt_only"})
"""Formats with a column of context."""
_COMMON = ("weight",)
_ANSWER_LIKE = frozenset({"answer", "answers", "output", "completion", "response", "target", "gold", "solution"})
_LABEL_LIKE = _ANSWER_LIKE | {"label", "category", "class"}


@dataclass(frozen=True, slots=True)
class DetectedFormat:
    """The format found, and the columns it reads."""

    format: Format
    mapping: dict[str, str]
    """Our name to the column in the file, for the columns that are there."""
    counts: dict[str, int]
    """Rows with a value, per column of the file."""
    rows: int

    @property
    def unused(self) -> tuple[str, ...]:
        """Columns that nothing reads."""
        return tuple(c for c in self.counts if c not in self.mapping.values())

    def __str__(self) -> str:
        read = ", ".join(
            f"{ours} <- {theirs} ({self.counts[theirs]} of {self.rows} rows)" for ours, theirs in self.mapping.items()
        )
        rest = f"; not read: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.format}: {read}{rest}"


@dataclass(frozen=True, slots=True)
class LoadedRows:
    """One source as records, with every row that was left out."""

    records: Records
    rejected: Sequence[RejectedRow]
    detection: DetectedFormat
    path: str

    @property
    def format(self) -> Format:
        """The format read."""
        return self.detection.format

    @property
    def mapping(self) -> dict[str, str]:
        """Our name to the column read."""
        return self.detection.mapping


def detect(
    rows: SourceRows, map: Mapping[str, str], format: Format = "auto", group: str | None = None
) -> DetectedFormat:
    """Find the format from all rows of a source in memory; see `_detect`."""
    census = ColumnCensus()
    for _, row in rows.rows:
        census.add(row)
    return _detect(rows.path, census, map, format, group)


class ColumnCensus:
    """Rows with a value, per column, in the order in which the columns appear."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.rows = 0

    def add(self, row: Row) -> None:
        """Count one row."""
        self.rows += 1
        for column, value in row.items():
            name = str(column)
            self.counts[name] = self.counts.get(name, 0) + (value is not None)


def _detect(
    path: str, census: ColumnCensus, map: Mapping[str, str], format: Format, group: str | None
) -> DetectedFormat:
    """Find the format from what all rows hold.

    Raises:
        DataError: a column named in `map` or `group` is missing, no format fits, or more than one reading is possible.
    """
    counts = census.counts
    _check_names(path, map, group, counts)
    fitting = _fitting_formats(map, counts) if format == "auto" else [format]
    if format != "auto" and (missing := [c for c in FORMATS[format].required if map.get(c, c) not in counts]):
        raise _unknown_format_error(path, counts, f"no column {missing[0]!r}, which the format {format} needs")
    if not fitting:
        raise _unknown_format_error(path, counts, "the columns fit no known format")
    if len(fitting) > 1:
        readings = {f: counts[map.get(FORMATS[f].required[0], FORMATS[f].required[0])] for f in fitting}
        raise _ambiguous_format_error(path, counts, "the rows can be read as " + _listed(readings))
    found = fitting[0]
    columns = FORMATS[found]
    ours = (*columns.required, *columns.optional, *_COMMON)
    mapping = {name: map.get(name, name) for name in ours if map.get(name, name) in counts}
    if group:
        mapping["group"] = group
    detection = DetectedFormat(found, mapping, dict(counts), census.rows)
    if format == "auto" and (candidates := _competing_columns(detection, map)):
        raise _ambiguous_format_error(
            path, counts, f"{candidates[0]!r} and {candidates[1]!r} could both be what is to be learned"
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
    """Turn one row into a record; `group` and `task` are columns.

    Raises:
        DataError: with the reason why this row cannot be an example; its `summary` is the reason alone.
    """

    def get(name: str) -> Any:
        return row.get(map.get(name, name))

    try:
        weight = parse_weight(get("weight"))
        key = None if group is None else _key(row.get(group), "group", group)
        own_task = None if task is None else _key(row.get(task), "task", task)
        if format == "text":
            text = text_of(get("text"), "text")
            return Record((), source, group=key, weight=weight, text=text, task=own_task)
        rated = parse_answers(format, get)
        if rated or format == "prompt_only":
            messages: tuple[Message, ...] = (*_prompt(get), Message("assistant", rated[0].content if rated else ""))
        else:
            messages = _messages(format, get)
        check_order(messages)
        return Record(
            messages,
            source,
            context=optional_text(get("context"), "context") if format in WITH_CONTEXT else None,
            tools=tools_text(get("tools")) if format in ("messages", "sharegpt") else None,
            group=key,
            weight=weight,
            task=own_task,
            score=rated[0].score if rated else None,
            candidates=tuple(rated[1:]),
        )
    except DataError as error:
        raise DataError(error.summary, where=str(source)) from error


def load_records(config: DataConfig, path: str, *, held_out: bool = False) -> LoadedRows:
    """Read one source of a data config and apply `data.rejects`. In a held-out file the `group` column may be absent.

    Raises:
        DataError: the source cannot be read, or rows are rejected and `data.rejects` is `error`, or none is left.
    """
    loaded = read_records(config, path, held_out=held_out)
    if loaded.rejected and (config.rejects == "error" or not loaded.records):
        raise _rejection(loaded)
    return loaded


def read_records(config: DataConfig, path: str, *, held_out: bool = False) -> LoadedRows:
    """Like `load_records`, but rejected rows are only listed.

    Raises:
        DataError: the source cannot be read at all, or its columns fit no format.
    """
    reading = _SourceReader(config, path)
    group, counts = config.group, reading.census.counts
    if config.task is not None and config.task not in counts:
        raise _unknown_format_error(
            reading.name, counts, f"data.task names a column that is not there: {config.task!r}"
        )
    if held_out and group is not None and group not in counts:
        group = None
    detection = _detect(reading.name, reading.census, config.map, config.format, group)
    if (reading.format, reading.group) != (detection.format, group):
        reading = _SourceReader(config, path, (detection.format, group))
    if config.task is not None:
        detection = replace(detection, mapping={**detection.mapping, "task": config.task})
    return LoadedRows(reading.records, reading.rejected, detection, path)


class _SourceReader:
    """One pass over a source: columns counted, rows converted on the way.

    The format is known for certain only when the pass is over. So it is `given`, or guessed from the first row; the
    rare wrong guess costs a second pass.
    """

    def __init__(self, config: DataConfig, path: str, given: tuple[Format, str | None] | None = None) -> None:
        self.name = path
        self.census = ColumnCensus()
        self.format: Format | None = None
        self.group: str | None = None
        self._given = given
        self._spec = config
        writer, rejected = RecordWriter(), TextStore()
        for item in stream_rows(path):
            reason = item.reason if isinstance(item, RejectedRow) else self._convert(item, writer)
            if reason is not None:
                rejected.add(item.source.line, reason)
            self.name = item.source.path
        name = self.name
        self.records = writer.records()
        self.rejected = MappedSequence(lambda i: _rejected(name, *rejected.at(i)), range(len(rejected)))

    def _convert(self, item: ParsedRow, writer: RecordWriter) -> str | None:
        """Write a row down as a record, or say why it cannot be one."""
        if not self.census.rows:
            self.format, self.group = self._given or self._guess(item.row)
        self.census.add(item.row)
        if self.format is None:
            return None  # a second pass will
        try:
            writer.add(to_record(self.format, item.row, item.source, self._spec.map, self.group, self._spec.task))
        except DataError as error:
            return error.summary
        return None

    def _guess(self, row: Row) -> tuple[Format | None, str | None]:
        format, group = self._spec.format, self._spec.group
        fitting = _fitting_formats(self._spec.map, row) if format == "auto" else [format]
        return fitting[0] if len(fitting) == 1 else None, group if group in row else None


def _rejected(path: str, line: int, reason: str) -> RejectedRow:
    return RejectedRow(Source(path, line), reason)


def _rejection(loaded: LoadedRows) -> DataError:
    rejected, kept = loaded.rejected, len(loaded.records)
    lines = [f"line {r.source.line}: {r.reason}" for r in rejected[:10]]
    more = [f"and {len(rejected) - 10} more"] if len(rejected) > 10 else []
    remedy = "mend them, or set data.rejects: drop" if kept else "no row is left; check data.format and data.map"
    return DataError(
        f"{len(rejected)} of {len(rejected) + kept} rows cannot be used",
        where=loaded.path,
        hint="\n  ".join([*lines, *more, remedy]),
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


def _key(value: object, what: str, name: str) -> str:
    if value is None or value == "" or isinstance(value, list | dict):
        raise DataError(f"no value in the {what} column {name!r}")
    return encodable(str(value), name)


def _fitting_formats(map: Mapping[str, str], counts: Mapping[str, Any]) -> list[Format]:
    """A column called label may hold anything, and many files have a prompt: those formats must be asked for."""
    given = (name for name in FORMATS if name not in ("unpaired_preference", "prompt_only"))
    return [name for name in given if _fits(FORMATS[name], map, counts)]


def _fits(columns: FormatColumns, map: Mapping[str, str], counts: Mapping[str, Any]) -> bool:
    """All required columns are there, and every name in `map` is one of the format's."""
    known = {*columns.required, *columns.optional, *_COMMON}
    return set(map) <= known and all(map.get(c, c) in counts for c in columns.required)


def _competing_columns(detection: DetectedFormat, map: Mapping[str, str]) -> tuple[str, str] | None:
    """Two columns that could both be what is learned, unless `map` says which."""
    answer = FORMATS[detection.format].answer
    if answer in map or "text" in map:
        return None
    like = _LABEL_LIKE if detection.format == "text" else _ANSWER_LIKE if answer else frozenset[str]()
    rival = next((c for c in detection.unused if c.lower() in like), None)
    return (answer or "text", rival) if rival else None


def _check_names(path: str, map: Mapping[str, str], group: str | None, counts: Mapping[str, int]) -> None:
    known = sorted({name for c in FORMATS.values() for name in (*c.required, *c.optional)} | {*_COMMON})
    for ours, theirs in map.items():
        if ours not in known:
            near = did_you_mean(ours, known)
            hint = f"did you mean {near}?" if near else "data.map is {our name: column in the file}"
            raise DataError(f"data.map: {ours!r} is no column of ours", allowed=", ".join(known), hint=hint)
        if theirs not in counts:
            raise _unknown_format_error(path, counts, f"data.map names a column that is not there: {theirs!r}")
    if group is not None and group not in counts:
        raise _unknown_format_error(path, counts, f"data.group names a column that is not there: {group!r}")


def _listed(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name} ({n} rows)" for name, n in counts.items())


def _known_formats() -> str:
    return "; ".join(f"{f} ({', '.join(c.required)})" for f, c in FORMATS.items())


def _unknown_format_error(path: str, counts: Mapping[str, int], summary: str) -> DataError:
    return DataError(
        summary,
        where=path,
        given=f"columns {_listed(counts)}",
        allowed=_known_formats(),
        hint="name the columns with data.map, for example data.map: {question: query, answer: gold}",
    )


def _ambiguous_format_error(path: str, counts: Mapping[str, int], summary: str) -> DataError:
    return DataError(
        f"ambiguous: {summary}",
        where=path,
        given=f"columns {_listed(counts)}",
        allowed=_known_formats(),
        hint="decide with data.format, or with data.map, for example data.map: {question: query, answer: gold}",
    )
