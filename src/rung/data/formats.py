"""Formats: which columns mean what, and how raw rows become `Record`s.

The format of a source is detected from its column names. Where two readings are possible the source is refused with
both named, never guessed: a wrong guess would train on the wrong column without an error. Detection needs the columns
of all rows, so a source whose first row misleads is read twice. `splits` and `check` call `load_records` and
`read_records`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from rung.config.data import AnswerFormat, DataConfig, Format
from rung.console import print_status
from rung.data.byte_store import MappedSequence
from rung.data.code_tests import parse_code_tests
from rung.data.columns import FORMATS, SYNONYMS, column_of, foreign_shape, holds_turns, propose_map, yaml_map
from rung.data.control_tokens import candidates_without_end_tokens, without_end_tokens
from rung.data.conversations import conversation
from rung.data.messages import (
    Getter,
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
from rung.data.soft_labels import SoftLabels
from rung.errors import DataError, did_you_mean
from rung.types import Record, Source

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
    roles: Mapping[str, int] = field(default_factory=dict)
    """Turns with each role of `data.roles`, by its name in the file."""
    notes: tuple[str, ...] = ()
    """What was assumed, converted or not read, as sentences."""
    removed_end_tokens: Mapping[str, int] = field(default_factory=dict)
    """Answers that ended in each end token, which was removed (`data.control_tokens`)."""
    soft_labels: SoftLabels = field(default_factory=SoftLabels)
    """Rows with the probability of a pair."""

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
        notes_text = "".join(f"; {note}" for note in self.notes)
        removed = self.removed_end_tokens
        ends_text = f"; removed from the ends of answers: {_listed(removed, 'answers')}" if removed else ""
        return f"{self.format}: {mapping_text}{unused_text}{fields_text}{ends_text}{notes_text}"


@dataclass(frozen=True, slots=True)
class LoadedRows:
    """One source as records, with every rejected row."""

    records: Records
    rejected_rows: Sequence[RejectedRow]
    detection: DetectedFormat
    path: str

    @property
    def files(self) -> frozenset[str]:
        """Files of the records; for a set that is not in files of rows its name."""
        return frozenset(path for _, path in self.records.origins)


class ColumnCensus:
    """Rows with a value per column, in the order in which the columns appear."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        self.rows = 0
        self.turns: dict[str, None] = {}
        """Columns that hold lists of turns, in order; looked for in the first row."""
        self.other_labels: set[str] = set()
        """Columns of `_LABELS` with values that do not say whether an answer is good."""

    def add(self, row: Row) -> None:
        """Count one row."""
        self.rows += 1
        if self.rows == 1:
            self.turns = {str(name): None for name, value in row.items() if holds_turns(value)}
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
        summary = f"no column {missing_columns[0]!r}, which the format {format} needs"
        raise _unknown_format_error(path, counts, summary, _map_remedy(propose_map(counts, format)))
    # single turns and nodes of a tree have a text too
    if format == "auto" and not map and fitting_formats in ([], ["text"]) and (remedy := foreign_shape(counts)):
        raise _unknown_format_error(path, counts, "the columns are those of another kind of rows", remedy)
    if not fitting_formats:
        proposal = propose_map(counts, turns=census.turns)
        remedy = _map_remedy(proposal)
        prompts = propose_map(counts, "prompt_only")
        if "prompt" in counts:
            remedy = f"{remedy}; or, " if proposal else ""
            remedy += "for rows without answers, set data.format: prompt_only"
        elif prompts and not proposal:
            remedy = f"for rows without answers, set data.format: prompt_only and data.map: {yaml_map(prompts)}"
        raise _unknown_format_error(path, counts, "the columns fit no known format", remedy)
    if len(fitting_formats) > 1:
        readings = {f: counts[_first_column(f, map, counts)] for f in fitting_formats}
        remedy = " or ".join(f"data.format: {f}" for f in fitting_formats)
        raise _ambiguous_format_error(path, counts, f"the rows can be read as {_listed_counts(readings)}", remedy)
    detected_format = fitting_formats[0]
    names = FORMATS[detected_format].names_read(counts, map)
    mapping = {name: column for name in names if (column := column_of(name, map)) in counts and column is not None}
    if group:
        # not part of a format: any column can be the group
        mapping["group"] = group
    detection = DetectedFormat(detected_format, mapping, dict(counts), census.rows)
    if detected_format == "unpaired_preference":
        _refuse_unpaired_probability(path, counts, column_of("probability", map))
    if format == "auto":
        _refuse_ambiguous_columns(path, census, detection, map)
    return detection


def _refuse_ambiguous_columns(
    path: str, census: ColumnCensus, detection: DetectedFormat, map: Mapping[str, str]
) -> None:
    """Raise `DataError` for columns that a detected format does not read and that may change what is learned."""
    format = detection.format
    if competing := _competing_columns(detection, map):
        raise _competing_error(path, census.counts, competing, FORMATS[format].answer, map)
    if "probability" in FORMATS[format].optional:
        _refuse_unread_probability(path, census, detection, map)
    if format == "preference":
        _refuse_unread_prompt(path, census, detection, map)
    if format in get_args(AnswerFormat) and format != "text":
        _refuse_ambiguous_answers(path, census, detection)


def _refuse_ambiguous_answers(path: str, census: ColumnCensus, detection: DetectedFormat) -> None:
    """Raise `DataError` for columns that may say that some answers are bad, or that other answers are the good ones."""
    unused = set(detection.unused)
    if {"chosen", "rejected"} <= unused:
        summary = "'chosen' and 'rejected' stand beside answers, and could be what is to be learned"
        remedy = f"data.format: preference or data.format: {detection.format}"
        raise _ambiguous_format_error(path, census.counts, summary, remedy)
    rejected = next((c for c in detection.counts if c.lower() in ("rejected", *SYNONYMS["rejected"])), None)
    if rejected in unused:
        pair = yaml_map(_columns_as(detection, "chosen", {"rejected": str(rejected)}))
        remedy = f"data: {{format: preference, map: {pair}}} or data.format: {detection.format}"
        summary = f"{rejected!r} may be an answer that is worse than the one that would be learned"
        raise _ambiguous_format_error(path, census.counts, summary, remedy)
    labels = sorted(c for c in _LABELS & unused - census.other_labels if census.counts[c])
    if labels:
        raise _labeled_answers_error(path, detection, labels[0])


def _columns_as(detection: DetectedFormat, answer_name: str, others: Mapping[str, str]) -> dict[str, str]:
    """The map that reads the columns of an answer as those of a comparison, and others beside them."""
    asked, answer = FORMATS[detection.format].required[0], FORMATS[detection.format].answer
    map = {"messages": detection.mapping[asked]}
    if answer:
        map = {"prompt": detection.mapping[asked], answer_name: detection.mapping[answer]}
    return {name: column for name, column in {**map, **others}.items() if name != column}


def _refuse_unread_prompt(path: str, census: ColumnCensus, detection: DetectedFormat, map: Mapping[str, str]) -> None:
    """Raise `DataError` for pairs without the column `prompt` beside one that may be it under another name."""
    if detection.mapping.keys() & {"prompt", "conversations", "instruction", "messages"}:
        return
    names = (*SYNONYMS["prompt"], *SYNONYMS["messages"])
    column = next((c for name in names for c in detection.counts if c.lower() == name), None)
    if column is not None:
        summary = f"{column!r} may be the prompt of 'chosen' and 'rejected'"
        choice = yaml_map({**map, "prompt": column})
        remedy = f"data: {{map: {choice}}}, or data.format: preference to take what both share"
        raise _ambiguous_format_error(path, census.counts, summary, remedy)


def _refuse_unread_probability(
    path: str, census: ColumnCensus, detection: DetectedFormat, map: Mapping[str, str]
) -> None:
    """Raise `DataError` for pairs beside a column that may be their probability under another name."""
    names = ("probability", *SYNONYMS["probability"])
    column = next((c for name in names for c in detection.unused if c.lower() == name and census.counts[c]), None)
    if column is not None and "probability" not in detection.mapping:
        summary = f"{column!r} may be the probability that the better answer of a pair is really better"
        remedy = f"data: {{map: {yaml_map({**map, 'probability': column})}}}"
        remedy += f", or data.format: {detection.format} to take every pair as certain"
        raise _ambiguous_format_error(path, census.counts, summary, remedy)


def _refuse_unpaired_probability(path: str, counts: Mapping[str, int], column: str | None) -> None:
    """Raise `DataError` for labeled answers with the probability of a pair."""
    if column is not None and counts.get(column):
        summary = (
            f"{column!r} is the probability that one answer of a pair is better, and a labeled answer has no other"
        )
        hint = "write pairs (prompt, chosen, rejected) for another loss, or leave the column out of the file"
        raise DataError(summary, where=path, given=f"columns {_listed_counts(counts)}", hint=hint)


def _first_column(format: Format, map: Mapping[str, str], counts: Mapping[str, int]) -> str:
    return str(column_of(FORMATS[format].names_read(counts, map)[0], map))


_MEDIA_COLUMNS = ("images", "audios", "videos")
"""Columns with which LLaMA-Factory, ms-swift and TRL put pictures, sounds and films into the text."""
_CHOICE_COLUMNS = ("choices", "options", "endings")
"""Columns of multiple choice, whose answer may be the number of a choice (MMLU's is, from 0)."""


def _refuse_choice_number(answer: object, row: Row) -> None:
    """Raise `DataError` for a number as answer beside choices: the number would be learned instead of the choice."""
    if not isinstance(answer, int | float) or isinstance(answer, bool):
        return
    if column := next((c for c in _CHOICE_COLUMNS if isinstance(row.get(c), list | dict)), None):
        remedy = "write the text of the choice as answer, and the choices into the question"
        raise DataError(f"the answer {answer} may be the number of one of the {column}: {remedy}")


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
    fields = fields or TurnFields()

    def get(name: str) -> Any:
        column = column_of(name, map)
        return None if column is None else row.get(column)

    try:
        if media := next((c for c in _MEDIA_COLUMNS if row.get(c)), None):
            raise DataError(f"{media} belong to this row, and only text is read: leave it out (data.rejects: drop)")
        weight = parse_weight(get("weight"))
        group_key = None if group is None else key_text(row.get(group), "group", group)
        task_name = None if task is None else key_text(row.get(task), "task", task)
        if format == "text":
            text = text_of(get("text"), "text")
            return Record((), source, group=group_key, weight=weight, text=text, task=task_name)
        _refuse_choice_number(get(FORMATS[format].answer or ""), row)
        messages, candidates, probability = conversation(format, get, fields)
        if fields.removes_end_tokens:
            messages, removed = without_end_tokens(messages)
            candidates, removed_of_others = candidates_without_end_tokens(candidates)
            fields.removed_end_tokens.update(removed_of_others if candidates else removed)
        references = parse_references(get("references"), fields) if "references" in FORMATS[format].optional else ()
        if references and messages[-1].tool_calls:
            raise DataError("references are texts, and this row ends in a tool call, which is compared as a call")
        optional = FORMATS[format].optional
        tests = parse_code_tests(get) if "tests" in optional else None
        if tests and messages[-1].tool_calls:
            raise DataError("tests are for programs, and this row ends in a tool call, which is compared as a call")
        return Record(
            messages,
            source,
            context=optional_text(get("context"), "context") if "context" in optional else None,
            tools=_tools(get) if "tools" in optional else None,
            group=group_key,
            weight=weight,
            task=task_name,
            score=candidates[0].score if candidates else None,
            candidates=tuple(candidates[1:]),
            references=references,
            probability=probability,
            tests=tests,
        )
    except DataError as error:
        # helpers know the reason but not the line
        raise DataError(error.summary, where=str(source)) from error


def _tools(get: Getter) -> str | None:
    prompt = get("prompt")
    # OpenAI's pairs have them beside the messages of the prompt
    inner = prompt.get("tools") if isinstance(prompt, Mapping) else None
    return tools_text(get("tools") or wrapped_functions(get("functions")) or inner)


def load_records(config: DataConfig, path: str, *, held_out: bool = False) -> LoadedRows:
    """Read one source of a data config and apply `data.rejects`. In a held-out file the `group` column may be absent.

    Raises:
        DataError: the source cannot be read, rows are rejected and `data.rejects` is `error`, or no row remains.
    """
    loaded = read_records(config, path, held_out=held_out)
    for note in loaded.detection.notes:
        print_status(note if path in note else f"{path}: {note}")
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
    notes = (*reading.notes, *reading.turn_fields.conversions(), *_missing_margins(detection))
    if (column := detection.mapping.get("probability")) is not None:
        notes += reading.soft_labels.notes(column, len(reading.records))
    fields = reading.turn_fields
    detection = replace(
        detection,
        turn_fields=fields.summary(),
        roles=dict(fields.used_roles),
        removed_end_tokens=dict(fields.removed_end_tokens),
        notes=notes,
        soft_labels=reading.soft_labels,
    )
    if config.task is not None:
        detection = replace(detection, mapping={**detection.mapping, "task": config.task})
    return LoadedRows(reading.records, reading.rejected_rows, detection, path)


def _missing_margins(detection: DetectedFormat) -> tuple[str, ...]:
    column = detection.mapping.get("margin")
    missing = 0 if column is None else detection.rows - detection.counts[column]
    return (f"rows without a value in {column!r}, whose margin is 1: {missing} of {detection.rows}",) if missing else ()


_SETTING_OF_DATA = re.compile(rf"\bdata(: \{{|\.({'|'.join(DataConfig.model_fields)})\b)")


def proposes_data_settings(error: DataError) -> bool:
    """Whether the hint of an error names settings of `data`, which a command that was given a file has not."""
    return _SETTING_OF_DATA.search(str(error.hint)) is not None


@contextmanager
def naming_config(place: str, file: str, option: str | None = None) -> Iterator[None]:
    """Inside, errors that propose settings of `data` say where a command that was given a file takes them.

    `place` is where the command takes a config, `option` what it offers by itself.
    """
    try:
        yield
    except DataError as error:
        if not proposes_data_settings(error):
            raise
        lines = [str(error.hint), f"settings of data stand in a config: {place}, with data.path: {file} and an output"]
        hint = "\n  ".join([*lines, *([option] if option else [])])
        parts = {"where": error.where, "given": error.given, "allowed": error.allowed, "hint": hint}
        raise DataError(error.summary, **parts) from error  # type: ignore[arg-type]


class _SourceReader:
    """One pass over a source that counts columns and converts rows.

    The format is certain only after the pass. So it is either `known_format` or guessed from the first row; the rare
    wrong guess costs a second pass.
    """

    def __init__(self, config: DataConfig, path: str, known_format: tuple[Format, str | None] | None = None) -> None:
        self.name = path
        self.notes: list[str] = []
        self.census, self.soft_labels = ColumnCensus(), SoftLabels()
        removes_end_tokens = config.control_tokens in (None, "text")
        self.turn_fields = TurnFields(config.unknown_fields, config.roles, removes_end_tokens=removes_end_tokens)
        self.format: Format | None = None
        self.group: str | None = None
        self._known_format = known_format
        self._config = config
        writer, rejected_rows = RecordWriter(), RecordWriter()
        for item in stream_rows(path, self.notes.append):
            reason = item.reason if isinstance(item, RejectedRow) else self._convert(item, writer)
            if reason is not None:
                # on disk too, as a record of that text: a file may have millions of bad rows
                rejected_rows.add(Record((), item.source, text=reason))
        self.records = writer.records()
        self.rejected_rows = MappedSequence(lambda r: RejectedRow(r.source, r.text), rejected_rows.records())

    def _convert(self, item: ParsedRow, writer: RecordWriter) -> str | None:
        """Write a row as a record, or return the reason why it cannot be one."""
        if not self.census.rows:
            self.format, self.group = self._known_format or self._guess(item.row)
        self.census.add(item.row)
        if self.format is None:
            return None  # the second pass converts it
        config, fields = self._config, self.turn_fields
        converted = fields.converted.copy()
        try:
            record = to_record(self.format, item.row, item.source, config.map, self.group, config.task, fields)
        except DataError as error:
            fields.converted = converted  # only of the rows that are kept
            return error.summary
        writer.add(record)
        if record.probability is not None:
            self.soft_labels.add(item.row[str(column_of("probability", config.map))])
        return None

    def _guess(self, row: Row) -> tuple[Format | None, str | None]:
        format, group = self._config.format, self._config.group
        fitting = _fitting_formats(self._config.map, row) if format == "auto" else [format]
        return fitting[0] if len(fitting) == 1 else None, group if group in row else None


def _rejection_error(loaded: LoadedRows) -> DataError:
    count, kept_count = len(loaded.rejected_rows), len(loaded.records)
    # of a folder or a pattern the file too
    is_one_file = all(r.source.path == str(Path(loaded.path)) for r in loaded.rejected_rows[:10])
    lines = [f"line {r.source.line}: {r.reason}" if is_one_file else str(r) for r in loaded.rejected_rows[:10]]
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
    fitting = [name for name in with_columns if set(map) <= set(FORMATS[name].names)]
    if "preference" in fitting and FORMATS["preference"].missing(counts, map, (FORMATS["preference"].required,)):
        # LLaMA-Factory's pairs: a conversation that ends with the question
        if fitting == ["sharegpt", "preference"]:
            return ["preference"]
        # answers beside a pair are an error of their own
        if {"chosen", "rejected"} <= set(counts) and set(fitting) & (set(get_args(AnswerFormat)) - {"text"}):
            fitting.remove("preference")
    return fitting


def _competing_columns(detection: DetectedFormat, map: Mapping[str, str]) -> tuple[str, str] | None:
    """Two columns that could both be the answer, unless `map` decides."""
    answer = FORMATS[detection.format].answer
    if answer in map or "text" in map:
        return None
    answer_names = _LABEL_LIKE if detection.format == "text" else _ANSWER_LIKE if answer else frozenset[str]()
    competitor = next((c for c in detection.unused if c.lower() in answer_names), None)
    return (answer or "text", competitor) if competitor else None


def _competing_error(
    path: str, counts: Mapping[str, int], columns: tuple[str, str], answer: str | None, map: Mapping[str, str]
) -> DataError:
    maps = [{**map, answer: column} for column in columns] if answer else [{"question": "text", "answer": columns[1]}]
    choices = [f"data: {{map: {yaml_map(choice)}}}" for choice in maps]
    summary = f"{columns[0]!r} and {columns[1]!r} could both be what is to be learned"
    return _ambiguous_format_error(path, counts, summary, " or ".join(["data.format: text"] * (not answer) + choices))


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


def _map_remedy(map: Mapping[str, str] | None) -> str:
    """How columns are named: with a proposed map, or with an example."""
    example = map or {"question": "query", "answer": "gold"}
    return f"name the columns with data.map, for example data: {{map: {yaml_map(example)}}}"


def _unknown_format_error(path: str, counts: Mapping[str, int], summary: str, remedy: str | None = None) -> DataError:
    hint = remedy or _map_remedy(None)
    allowed = "; ".join(f"{f} ({', '.join(c.required)})" for f, c in FORMATS.items())
    return DataError(summary, where=path, given=f"columns {_listed_counts(counts)}", allowed=allowed, hint=hint)


def _missing_column_error(path: str, counts: Mapping[str, int], setting: str, column: str) -> DataError:
    return _unknown_format_error(path, counts, f"{setting} names a column that is not there: {column!r}")


def _labeled_answers_error(path: str, detection: DetectedFormat, label: str) -> DataError:
    """The error for answers beside a column that says which of them are good: bad ones would be learned too."""
    summary = f"ambiguous: the column {label!r} may say which answers are good, and all of them would be learned"
    map = _columns_as(detection, "completion", {"label": label})
    settings = "data.format: unpaired_preference"
    if map:
        settings = f"data: {{format: unpaired_preference, map: {yaml_map(map)}}}"
    hint = (
        f"set {settings} (objective: {{kind: preference, loss: kto}}) to use it, or "
        f"data.format: {detection.format} to learn every answer"
    )
    return DataError(summary, where=path, given=f"columns {_listed_counts(detection.counts)}", hint=hint)


def _ambiguous_format_error(path: str, counts: Mapping[str, int], summary: str, remedy: str) -> DataError:
    return _unknown_format_error(path, counts, f"ambiguous: {summary}", f"decide with {remedy}")
