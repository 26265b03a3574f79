"""Formats: which columns mean what, and how raw rows become `Record`s.

The format of a source is detected from its column names. Where two readings are possible the source is refused with
both named, never guessed: a wrong guess would train on the wrong column without an error. Detection needs the columns
of all rows, so a source whose first row misleads is read twice. `splits` and `check` call `load_records` and
`read_records`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, get_args

from rung.config.data import AnswerFormat, DataConfig, Format
from rung.data.byte_store import MappedSequence
from rung.data.control_tokens import candidates_without_end_tokens, without_end_tokens
from rung.data.conversations import conversation
from rung.data.messages import (
    TurnFields,
    key_text,
    optional_text,
    parse_references,
    parse_weight,
    text_of,
    tools_text,
    wrapped_functions,
)
from rung.data.read import ParsedRow, RejectedRow, Row, stream_rows
from rung.data.records import Records, RecordWriter
from rung.errors import DataError, did_you_mean
from rung.types import Record, Source


class FormatColumns(NamedTuple):
    """Rung's names of a format's columns."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    answer: str | None = None
    alternative: tuple[str, ...] = ()
    """Other columns that do as well as the required ones."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names, that of the weight included."""
        # OpenAI's name of the schemas before tools
        functions = ("functions",) if "tools" in self.optional else ()
        return tuple(dict.fromkeys((*self.required, *self.alternative, *self.optional, *functions, "weight")))

    def missing(self, columns: Collection[str], map: Mapping[str, str]) -> list[str]:
        """Columns of the file that the format needs and that are not among these."""
        readings = [[map.get(name, name) for name in names] for names in (self.required, self.alternative) if names]
        missing = [[column for column in reading if column not in columns] for reading in readings]
        return min(missing, key=len)


_PROMPT_COLUMNS = ("input", "context", "system", "tools")
"""Optional columns of formats with a prompt and its answers."""


FORMATS: dict[Format, FormatColumns] = {
    "messages": FormatColumns(("messages",), ("tools", "references")),
    "sharegpt": FormatColumns(("conversations",), ("system", "tools", "references")),
    "alpaca": FormatColumns(("instruction", "output"), ("input", "system", "history", "references"), "output"),
    "prompt_completion": FormatColumns(("prompt", "completion"), ("tools", "references"), "completion"),
    "question_answer": FormatColumns(("question", "answer"), ("context", "system", "references"), "answer"),
    "text": FormatColumns(("text",)),
    "preference": FormatColumns(("prompt", "chosen", "rejected"), (*_PROMPT_COLUMNS, "margin")),
    "ranked": FormatColumns(("prompt", "ranked"), _PROMPT_COLUMNS),
    "rated": FormatColumns(("prompt", "answers", "scores"), _PROMPT_COLUMNS),
    "unpaired_preference": FormatColumns(
        ("prompt", "completion", "label"), _PROMPT_COLUMNS, alternative=("messages", "label")
    ),
    "prompt_only": FormatColumns(("prompt",), _PROMPT_COLUMNS),
}
# Unused columns with these names make a detected format ambiguous: they may be the answers.
_ANSWER_LIKE = frozenset({"answer", "answers", "output", "completion", "response", "target", "gold", "solution"})
_LABEL_LIKE = _ANSWER_LIKE | {"label", "category", "class"}
_LABELS = frozenset({"label", "kto_tag", "is_correct", "correct", "is_good", "good", "desirable", "is_desirable"})
_LABELS |= {"accepted", "is_preferred", "preferred", "thumbs_up"}
"""Columns that may say which answers are good, where all of their values are among these."""
_LABEL_VALUES = frozenset({"true", "false", "0", "1", "good", "bad"})
"""As text in lower case."""


@dataclass(frozen=True, slots=True)
class DetectedFormat:
    """A detected format and the columns it reads."""

    format: Format
    mapping: dict[str, str]
    """Rung's name to the column in the file, for the columns that exist."""
    counts: dict[str, int]
    """Rows with a value per column of the file."""
    rows: int
    turn_fields: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Turns with each field, by what became of it: read, ignored or refused. Empty for rows without turns."""
    removed_end_tokens: Mapping[str, int] = field(default_factory=dict)
    """Answers that ended in each end token, which was removed (`data.control_tokens`)."""

    @property
    def unused(self) -> tuple[str, ...]:
        """Columns that are not read."""
        return tuple(c for c in self.counts if c not in self.mapping.values())

    def __str__(self) -> str:
        mapping_text = ", ".join(f"{n} <- {c} ({self.counts[c]} of {self.rows} rows)" for n, c in self.mapping.items())
        unused_text = f"; not read: {', '.join(self.unused)}" if self.unused else ""
        fields_text = "".join(
            f"; fields of turns {name}: {_listed(c, 'turns')}" for name, c in self.turn_fields.items()
        )
        removed = self.removed_end_tokens
        ends_text = f"; removed from the ends of answers: {_listed(removed, 'answers')}" if removed else ""
        return f"{self.format}: {mapping_text}{unused_text}{fields_text}{ends_text}"


@dataclass(frozen=True, slots=True)
class LoadedRows:
    """One source as records, with every rejected row."""

    records: Records
    rejected_rows: Sequence[RejectedRow]
    detection: DetectedFormat
    path: str


class ColumnCensus:
    """Rows with a value per column, in the order in which the columns appear."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        self.rows = 0
        self.other_labels: set[str] = set()
        """Columns of `_LABELS` with values that do not say whether an answer is good."""

    def add(self, row: Row) -> None:
        """Count one row."""
        self.rows += 1
        # a column that is always null still counts as present, with 0 rows; Counter.update takes four times as long
        for column, value in row.items():
            self.counts[str(column)] += value is not None
        for column in _LABELS.intersection(row).difference(self.other_labels):
            if row[column] is not None and str(row[column]).strip().lower() not in _LABEL_VALUES:
                self.other_labels.add(column)


def detect(
    path: str, census: ColumnCensus, map: Mapping[str, str], format: Format = "auto", group: str | None = None
) -> DetectedFormat:
    """Detect the format from the columns of all rows.

    Raises:
        DataError: a column named in `map` or `group` is missing, no format fits, or more than one reading is possible.
    """
    counts = census.counts
    _check_names(path, map, group, counts)
    fitting_formats = _fitting_formats(map, counts) if format == "auto" else [format]
    # A named format must have its columns; a format to be detected may not have two readings.
    if format != "auto" and (missing_columns := FORMATS[format].missing(counts, map)):
        raise _unknown_format_error(path, counts, f"no column {missing_columns[0]!r}, which the format {format} needs")
    if not fitting_formats:
        raise _unknown_format_error(path, counts, "the columns fit no known format")
    if len(fitting_formats) > 1:
        readings = {f: counts[map.get(FORMATS[f].required[0], FORMATS[f].required[0])] for f in fitting_formats}
        raise _ambiguous_format_error(path, counts, "the rows can be read as " + _listed_counts(readings))
    detected_format = fitting_formats[0]
    names = FORMATS[detected_format].names
    mapping = {name: map.get(name, name) for name in names if map.get(name, name) in counts}
    if group:
        # not part of a format: any column can be the group
        mapping["group"] = group
    detection = DetectedFormat(detected_format, mapping, dict(counts), census.rows)
    if format == "auto" and (competing := _competing_columns(detection, map)):
        summary = f"{competing[0]!r} and {competing[1]!r} could both be what is to be learned"
        raise _ambiguous_format_error(path, counts, summary)
    if format == "auto" and detected_format in get_args(AnswerFormat) and detected_format != "text":
        _refuse_ambiguous_answers(path, census, detection)
    return detection


def _refuse_ambiguous_answers(path: str, census: ColumnCensus, detection: DetectedFormat) -> None:
    """Raise `DataError` for columns that may say that some answers are bad, or that other answers are the good ones."""
    unused = set(detection.unused)
    if {"chosen", "rejected"} <= unused:
        summary = "'chosen' and 'rejected' stand beside answers, and could be what is to be learned"
        raise _ambiguous_format_error(path, census.counts, summary)
    labels = sorted(c for c in _LABELS & unused - census.other_labels if census.counts[c])
    if labels:
        raise _labeled_answers_error(path, census.counts, detection.format, labels[0])


def to_record(
    format: Format,
    row: Row,
    source: Source,
    map: Mapping[str, str],
    group: str | None = None,
    task: str | None = None,
    fields: TurnFields | None = None,
) -> Record:
    """Convert one row into a record; `group` and `task` are column names, `fields` counts the fields of its turns.

    Raises:
        DataError: with the reason why this row cannot be an example; its `summary` is only the reason.
    """

    def get(name: str) -> Any:
        return row.get(map.get(name, name))

    try:
        weight = parse_weight(get("weight"))
        group_key = None if group is None else key_text(row.get(group), "group", group)
        task_name = None if task is None else key_text(row.get(task), "task", task)
        if format == "text":
            text = text_of(get("text"), "text")
            return Record((), source, group=group_key, weight=weight, text=text, task=task_name)
        fields = fields or TurnFields()
        messages, candidates = conversation(format, get, fields)
        if fields.removes_end_tokens:
            messages, removed = without_end_tokens(messages)
            candidates, removed_of_others = candidates_without_end_tokens(candidates)
            fields.removed_end_tokens.update(removed_of_others if candidates else removed)
        references = parse_references(get("references")) if "references" in FORMATS[format].optional else ()
        if references and messages[-1].tool_calls:
            raise DataError("references are texts, and this row ends in a tool call, which is compared as a call")
        optional = FORMATS[format].optional
        return Record(
            messages,
            source,
            context=optional_text(get("context"), "context") if "context" in optional else None,
            tools=tools_text(get("tools") or wrapped_functions(get("functions"))) if "tools" in optional else None,
            group=group_key,
            weight=weight,
            task=task_name,
            score=candidates[0].score if candidates else None,
            candidates=tuple(candidates[1:]),
            references=references,
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
        raise _missing_column_error(reading.name, counts, "data.task", config.task)
    # A public test file rarely has the group column of one's own training file; its rows are then their own clusters.
    if held_out and group is not None and group not in counts:
        group = None
    detection = detect(reading.name, reading.census, config.map, config.format, group)
    # the guess from the first row was wrong: convert again with what all rows showed
    if (reading.format, reading.group) != (detection.format, group):
        reading = _SourceReader(config, path, (detection.format, group))
    turn_fields = reading.turn_fields
    removed = dict(turn_fields.removed_end_tokens)
    detection = replace(detection, turn_fields=turn_fields.summary(), removed_end_tokens=removed)
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
        removes_end_tokens = config.control_tokens in (None, "text")
        self.turn_fields = TurnFields(config.unknown_fields, removes_end_tokens=removes_end_tokens)
        self.format: Format | None = None
        self.group: str | None = None
        self._known_format = known_format
        self._config = config
        writer, rejected_rows = RecordWriter(), RecordWriter()
        for item in stream_rows(path):
            reason = item.reason if isinstance(item, RejectedRow) else self._convert(item, writer)
            if reason is not None:
                # on disk too, as a record of that text: a file may have millions of bad rows
                rejected_rows.add(Record((), item.source, text=reason))
            self.name = item.source.path
        self.records = writer.records()
        self.rejected_rows = MappedSequence(lambda r: RejectedRow(r.source, r.text), rejected_rows.records())

    def _convert(self, item: ParsedRow, writer: RecordWriter) -> str | None:
        """Write a row as a record, or return the reason why it cannot be one."""
        if not self.census.rows:
            self.format, self.group = self._known_format or self._guess(item.row)
        self.census.add(item.row)
        if self.format is None:
            return None  # the second pass converts it
        try:
            config = self._config
            writer.add(
                to_record(self.format, item.row, item.source, config.map, self.group, config.task, self.turn_fields)
            )
        except DataError as error:
            return error.summary
        return None

    def _guess(self, row: Row) -> tuple[Format | None, str | None]:
        format, group = self._config.format, self._config.group
        fitting = _fitting_formats(self._config.map, row) if format == "auto" else [format]
        return fitting[0] if len(fitting) == 1 else None, group if group in row else None


def _rejection_error(loaded: LoadedRows) -> DataError:
    count, kept_count = len(loaded.rejected_rows), len(loaded.records)
    lines = [f"line {r.source.line}: {r.reason}" for r in loaded.rejected_rows[:10]]
    remainder = [f"and {count - 10} more"] if count > 10 else []
    remedy = "mend them, or set data.rejects: drop" if kept_count else "no row is left; check data.format and data.map"
    hint = "\n  ".join([*lines, *remainder, remedy])
    return DataError(f"{count} of {count + kept_count} rows cannot be used", where=loaded.path, hint=hint)


def _fitting_formats(map: Mapping[str, str], counts: Mapping[str, Any]) -> list[Format]:
    """Formats whose required columns exist and that know every name in `map`, without those that must be named.

    Columns called label or prompt are too common to identify `unpaired_preference` and `prompt_only`.
    """
    detectable = {name: c for name, c in FORMATS.items() if name not in ("unpaired_preference", "prompt_only")}
    with_columns = (name for name, c in detectable.items() if not c.missing(counts, map))
    return [name for name in with_columns if set(map) <= set(FORMATS[name].names)]


def _competing_columns(detection: DetectedFormat, map: Mapping[str, str]) -> tuple[str, str] | None:
    """Two columns that could both be the answer, unless `map` decides."""
    answer = FORMATS[detection.format].answer
    if answer in map or "text" in map:
        return None
    answer_names = _LABEL_LIKE if detection.format == "text" else _ANSWER_LIKE if answer else frozenset[str]()
    competitor = next((c for c in detection.unused if c.lower() in answer_names), None)
    return (answer or "text", competitor) if competitor else None


def _check_names(path: str, map: Mapping[str, str], group: str | None, counts: Mapping[str, int]) -> None:
    known_names = sorted({name for c in FORMATS.values() for name in c.names})
    for name, column in map.items():
        if name not in known_names:
            suggestion = did_you_mean(name, known_names)
            hint = f"did you mean {suggestion}?" if suggestion else "data.map is {our name: column in the file}"
            raise DataError(f"data.map: {name!r} is no column of ours", allowed=", ".join(known_names), hint=hint)
        if column not in counts:
            raise _missing_column_error(path, counts, "data.map", column)
    if group is not None and group not in counts:
        raise _missing_column_error(path, counts, "data.group", group)


def _listed_counts(counts: Mapping[Any, int]) -> str:
    return _listed(counts, "rows")


def _listed(counts: Mapping[Any, int], unit: str) -> str:
    return ", ".join(f"{name} ({n} {unit})" for name, n in counts.items())


def _unknown_format_error(
    path: str, counts: Mapping[str, int], summary: str, remedy: str = "name the columns with data.map"
) -> DataError:
    hint = f"{remedy}, for example data.map: {{question: query, answer: gold}}"
    allowed = "; ".join(f"{f} ({', '.join(c.required)})" for f, c in FORMATS.items())
    return DataError(summary, where=path, given=f"columns {_listed_counts(counts)}", allowed=allowed, hint=hint)


def _missing_column_error(path: str, counts: Mapping[str, int], setting: str, column: str) -> DataError:
    return _unknown_format_error(path, counts, f"{setting} names a column that is not there: {column!r}")


def _labeled_answers_error(path: str, counts: Mapping[str, int], format: Format, label: str) -> DataError:
    """The error for answers beside a column that says which of them are good: bad ones would be learned too."""
    summary = f"ambiguous: the column {label!r} may say which answers are good, and all of them would be learned"
    mapping = "" if label == "label" else f" and data.map: {{label: {label}}}"
    hint = (
        f"set data.format: unpaired_preference{mapping} (objective: {{kind: preference, loss: kto}}) to use it, or "
        f"data.format: {format} to learn every answer"
    )
    return DataError(summary, where=path, given=f"columns {_listed_counts(counts)}", hint=hint)


def _ambiguous_format_error(path: str, counts: Mapping[str, int], summary: str) -> DataError:
    remedy = "decide with data.format, or with data.map"
    return _unknown_format_error(path, counts, f"ambiguous: {summary}", remedy)
