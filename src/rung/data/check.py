"""The report of `rung data check`: formats, rejects, splits, duplicates, lengths and diversity of a data set.

Every row is read and, with a template, tokenized and decoded: a full pass over the data instead of a sample, because
a single bad row can stop a run after hours. Bad rows are listed with their lines and never raised. Called by
`commands.data_check`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rung.config.data import DataConfig, LossOn
from rung.console import add_text_row, plain, visible
from rung.data.byte_store import chunks
from rung.data.contamination import contamination
from rung.data.deduplication import JACCARD_THRESHOLD, FuzzyMatch, HashSet, NgramMatch, ngram_hashes
from rung.data.formats import DetectedFormat, read_records
from rung.data.read import RejectedRow
from rung.data.records import Records, character_count
from rung.data.soft_labels import SoftLabels
from rung.data.splits import (
    assign_splits,
    duplicate_pairs,
    overlapping_pairs,
    refuse_shared_files,
    refuse_unused_roles,
    source_pairs,
    weighted_paths,
)
from rung.data.token_store import describe_notes
from rung.data.tokenize import TokenizeOptions, preflight, tokenize_prompts, tokenize_records
from rung.errors import DataError, GateError
from rung.scoring.words import search_words
from rung.types import Example, Record

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

    from rung.data.chat import ChatTemplate

LENGTH_BIAS_THRESHOLD = 0.2
"""Distance from 0.5 of the share of pairs won by the longer answer from which the report warns about length."""
MAX_SHOWN = 10
"""Rows of each kind listed in the printed report; the JSON has all."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Distribution of the documents' lengths."""

    unit: str  # "tokens" or "characters"
    minimum: int
    median: float
    p95: float
    maximum: int


@dataclass(frozen=True, slots=True)
class Diversity:
    """Diversity of the answers (Li et al. 2016: distinct n-grams per n-gram)."""

    distinct_1: float
    distinct_2: float
    most_common: str
    most_common_share: float


@dataclass(frozen=True, slots=True)
class AnswerLengths:
    """Length bias of compared answers: whether the better one is simply the longer."""

    pairs: int
    """The best answer of a row with each of its other answers."""
    longer: float
    """Share of pairs in which the better answer has more characters; equal lengths count half."""
    typical: float
    """Median of (characters of the better) / (characters of the other)."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """Everything `inspect_data` computed; prints itself on a rich console."""

    detections: dict[str, DetectedFormat]
    kept_count: int
    rejected_rows: tuple[RejectedRow, ...]
    splits: dict[str, int]
    lengths: Lengths | None
    duplicates: tuple[tuple[str, str], ...]
    """Rows with the prompt of an earlier row, with that row."""
    overlap: tuple[tuple[str, str], ...]
    """Training rows whose prompt also occurs in a held-out split, with that row."""
    ngram_matches: dict[int, tuple[NgramMatch, ...]]
    """Per n: held-out rows that share an n-gram of words with the training split."""
    fuzzy_matches: tuple[FuzzyMatch, ...]
    """Held-out rows whose character 5-grams mostly occur in one training row."""
    diversity: Diversity | None
    answer_lengths: AnswerLengths | None
    """None for data without compared answers."""
    supervised_share: float | None
    """Supervised tokens over all tokens; None without a tokenizer."""
    soft_labels: SoftLabels
    """Rows with the probability of a pair."""
    control_tokens: Mapping[str, Any] = field(default_factory=dict)
    """Rows with control tokens in their text, and what is done with them; empty without such rows or a tokenizer."""

    @property
    def ok(self) -> bool:
        """True when every row is usable and no training prompt is held out."""
        return not self.rejected_rows and not self.overlap

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "ok": self.ok,
            "formats": {
                path: {
                    **{"format": d.format, "mapping": d.mapping, "columns": d.counts, "unused": list(d.unused)},
                    "turn_fields": d.turn_fields,
                    "notes": list(d.notes),
                    "removed_end_tokens": dict(d.removed_end_tokens),
                }
                for path, d in self.detections.items()
            },
            "rows": {"kept": self.kept_count, "rejected": len(self.rejected_rows)},
            "rejected": [{**r.source._asdict(), "reason": r.reason} for r in self.rejected_rows],
            "splits": self.splits,
            "lengths": asdict(self.lengths) if self.lengths else None,
            "duplicate_prompts": [list(pair) for pair in self.duplicates],
            "overlap": [list(pair) for pair in self.overlap],
            "near_duplicates": {str(n): [asdict(m) for m in matches] for n, matches in self.ngram_matches.items()},
            "fuzzy_duplicates": [asdict(match) for match in self.fuzzy_matches],
            "diversity": asdict(self.diversity) if self.diversity else None,
            "compared": asdict(self.answer_lengths) if self.answer_lengths else None,
            "probability": self.soft_labels.to_json(),
            "supervised_share": self.supervised_share,
            "control_tokens": dict(self.control_tokens),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Print the numbers, then the rows behind them."""
        yield _table(self)
        for title, lines in _detail_lines(self).items():
            if lines:
                yield ""
                yield plain(title, "bold")
                yield from (plain(f"  {line}") for line in lines[:MAX_SHOWN])
                if len(lines) > MAX_SHOWN:
                    yield f"  and {len(lines) - MAX_SHOWN} more"


def inspect_data(target: str | DataConfig, chat: ChatTemplate | None = None) -> DataReport:
    """Inspect every row of a file or a data config. With `chat`, every row is tokenized and lengths are in tokens.

    Raises:
        DataError: a source cannot be read at all, or its columns fit no format. Bad rows are reported, never raised.
    """
    config = DataConfig(path=target) if isinstance(target, str) else target
    sets = [read_records(config, p.path) for p in weighted_paths(config)]
    refuse_shared_files(sets)
    files = {name: read_records(config, path, held_out=True) for name, path in config.held_out_files.items()}
    refuse_unused_roles(config, [*sets, *files.values()])
    records = Records.concatenate([loaded.records for loaded in sets])
    rejected_rows = [row for loaded in (*sets, *files.values()) for row in loaded.rejected_rows]
    # before the split: the splits below are those of the rows that remain once all faults are mended or dropped
    if chat is not None and config.control_tokens is not None:
        chat = chat.with_control_tokens(config.control_tokens)
    measured = _measure(records, chat, config.loss_on, rejected_rows)
    records = measured.records
    files_or_shares: dict[str, float | Records] = {**config.held_out_shares, **{n: f.records for n, f in files.items()}}
    parts = assign_splits(records, **files_or_shares)
    held_out = Records.concatenate([parts.validation, parts.test])
    matches = contamination(parts.train, held_out)
    return DataReport(
        detections={loaded.path: loaded.detection for loaded in (*sets, *files.values())},
        kept_count=len(records) + sum(len(loaded.records) for loaded in files.values()),
        rejected_rows=tuple(sorted(rejected_rows, key=lambda r: r.source)),
        splits={"train": len(parts.train), "validation": len(parts.validation), "test": len(parts.test)},
        lengths=measured.lengths,
        duplicates=source_pairs(records, records, duplicate_pairs(records)),
        overlap=source_pairs(parts.train, held_out, overlapping_pairs(parts.train, held_out)),
        ngram_matches=matches.ngrams,
        fuzzy_matches=matches.fuzzy,
        diversity=_diversity(records),
        answer_lengths=_answer_lengths(records),
        supervised_share=measured.supervised_share,
        soft_labels=SoftLabels.sum(loaded.detection.soft_labels for loaded in (*sets, *files.values())),
        control_tokens=measured.control_tokens,
    )


def colored_tokens(example: Example, chat: ChatTemplate) -> Text:
    """The document as text: supervised tokens green, all others dimmed, neighboring tokens in two shades."""
    shades = {True: ("bold green", "bold bright_green"), False: ("dim", "dim italic")}
    text = plain("")
    for i, (piece, is_supervised) in enumerate(_token_pieces(example, chat)):
        text.append(visible(piece), style=shades[is_supervised][i % 2])
    return text


def _token_pieces(example: Example, chat: ChatTemplate) -> Iterator[tuple[str, bool]]:
    """Token texts with their supervision; tokens that share the bytes of one character are joined."""
    pending: list[int] = []
    last = len(example) - 1
    for i, (token, is_supervised) in enumerate(zip(example.ids.tolist(), example.supervised.tolist(), strict=True)):
        pending.append(token)
        piece = chat.decode([pending])[0]
        # Half a character decodes to U+FFFD: wait for its other bytes, but never across a change of color.
        label_changes = i == last or bool(example.supervised[i + 1]) != is_supervised
        if label_changes or not piece.endswith("\ufffd"):
            yield piece, is_supervised
            pending = []


class _Measured(NamedTuple):
    records: Records
    lengths: Lengths | None
    supervised_share: float | None = None
    control_tokens: Mapping[str, Any] = {}


def _measure(
    records: Records, chat: ChatTemplate | None, loss_on: LossOn, rejected_rows: list[RejectedRow]
) -> _Measured:
    """Lengths and supervised share; rows that the template or the preflight refuses move to `rejected_rows`."""
    if chat is None or not records:
        # without a tokenizer, characters are the only unit available
        sizes = np.fromiter(map(character_count, records), dtype=np.int64, count=len(records))
        return _Measured(records, _lengths(sizes, "characters"))
    if records[0].is_prompt_only:
        prompts = tokenize_prompts(chat, records)
        return _Measured(records, _lengths(prompts.lengths, "tokens"), None, _control_notes(prompts.notes, chat))
    options: TokenizeOptions = {"loss_on": loss_on, "with_candidates": records[0].score is not None}
    try:
        tokenized = tokenize_records(chat, records, **options)
        preflight(chat, tokenized)
    # The batch names at most ten rows. Only after a failure is every row tried alone, which is much slower.
    except (DataError, GateError):
        records = records.select(np.array([not _is_refused(r, chat, loss_on, rejected_rows) for r in records]))
        if not records:
            return _Measured(records, None)
        tokenized = tokenize_records(chat, records, **options)
    share = tokenized.supervised_tokens / int(tokenized.lengths.sum())
    notes = _control_notes(tokenized.columns.notes, chat)
    return _Measured(records, _lengths(tokenized.lengths, "tokens"), share, notes)


def _control_notes(notes: Mapping[str, Any], chat: ChatTemplate) -> Mapping[str, Any]:
    if "control_tokens" not in notes:
        return {}
    return {"treated": chat.control_tokens or "text", **notes["control_tokens"]}


def _is_refused(record: Record, chat: ChatTemplate, loss_on: LossOn, rejected_rows: list[RejectedRow]) -> bool:
    try:
        preflight(chat, tokenize_records(chat, [record], loss_on=loss_on, with_candidates=record.score is not None))
    except DataError as error:
        rejected_rows.append(RejectedRow(record.source, error.summary))
    except GateError as error:
        reason = (error.hint or error.summary).removeprefix(f"{record.source}: ")
        rejected_rows.append(RejectedRow(record.source, reason))
    else:
        return False
    return True


def _lengths(lengths: np.ndarray, unit: str) -> Lengths | None:
    if not len(lengths):
        return None
    median, p95 = np.quantile(lengths, [0.5, 0.95])
    return Lengths(unit, int(lengths.min()), float(median), float(p95), int(lengths.max()))


def _diversity(records: Records) -> Diversity | None:
    """Computed from hashes of words, pairs and answers: the texts of all answers are never in memory together."""
    ngram_sets = {n: HashSet() for n in (1, 2)}
    answer_hashes, row_indices = array("q"), array("q")
    indexed_answers = ((i, answer) for i, answer in enumerate(r.answer for r in records) if answer)
    for chunk in chunks(indexed_answers, lambda x: len(x[1]), count=1024, limit=1 << 20):
        answer_words = [search_words(answer) for _, answer in chunk]
        for n, ngrams in ngram_sets.items():
            ngrams.add(ngram_hashes(answer_words, n)[0])
        answer_hashes.extend(hash(answer) for _, answer in chunk)
        row_indices.extend(i for i, _ in chunk)
    if not answer_hashes:
        return None
    _, first_indices, counts = np.unique(np.array(answer_hashes), return_index=True, return_counts=True)
    most_common = int(first_indices[counts == counts.max()].min())  # the first of equally common answers
    unigrams, bigrams = (len(ngrams.values()) / ngrams.total if ngrams.total else 0.0 for ngrams in ngram_sets.values())
    answer, share = records[row_indices[most_common]].answer, int(counts.max()) / len(answer_hashes)
    return Diversity(unigrams, bigrams, answer, share)


def _answer_lengths(records: Records) -> AnswerLengths | None:
    ratios = array("d")
    for record in records:
        # a pair with a probability of 0.5 has no better answer
        if record.probability == 0.5:
            continue
        # an empty answer counts as one character: the ratio stays finite
        ratios.extend((len(record.answer) or 1) / (len(candidate.content) or 1) for candidate in record.candidates)
    if not ratios:
        return None
    values = np.array(ratios)
    return AnswerLengths(len(values), float(((values > 1) + 0.5 * (values == 1)).mean()), float(np.median(values)))


def _table(report: DataReport) -> Table:
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for path, detection in report.detections.items():
        add_text_row(table, path, str(detection))
    add_text_row(table, "rows", f"{report.kept_count} kept, {len(report.rejected_rows)} rejected")
    add_text_row(table, "splits", ", ".join(f"{name} {n}" for name, n in report.splits.items()))
    if size := report.lengths:
        spread = f"min {size.minimum}, median {size.median:g}, p95 {size.p95:g}, max {size.maximum}"
        add_text_row(table, "length", f"{spread} {size.unit}")
    if report.supervised_share is not None:
        add_text_row(table, "supervised", f"{report.supervised_share:.1%} of the tokens")
    if d := report.diversity:
        add_text_row(table, "distinct-1, distinct-2", f"{d.distinct_1:.3f}, {d.distinct_2:.3f} of the answers' words")
        add_text_row(table, "most common answer", f"{d.most_common_share:.1%}: {d.most_common[:60]!r}")
    if c := report.answer_lengths:
        is_biased = abs(c.longer - 0.5) > LENGTH_BIAS_THRESHOLD
        verdict = "length alone may be what is learned" if is_biased else "of either length"
        lengths = f"longer in {c.longer:.0%} of {c.pairs} pairs, {c.typical:.2f} times as long in the median one"
        add_text_row(table, "better answers", f"{lengths}: {verdict}")
    if labels := report.soft_labels.rows:
        text = f"{labels} of {report.kept_count} rows, mean {report.soft_labels.mean:.3f}"
        add_text_row(table, "probability of chosen", f"{text}, below 0.5 in {report.soft_labels.exchanged}")
    found = report.control_tokens
    for name, text in describe_notes({"control_tokens": found} if found else {}, found.get("treated")).items():
        add_text_row(table, name, text)
    add_text_row(table, "duplicate prompts", str(len(report.duplicates)))
    add_text_row(table, "train prompts held out", str(len(report.overlap)))
    for n, matches in report.ngram_matches.items():
        add_text_row(table, f"held-out rows sharing {n} words", str(len(matches)))
    add_text_row(table, f"held-out rows {JACCARD_THRESHOLD:.0%} the same", str(len(report.fuzzy_matches)))
    return table


def _truncated(text: str, width: int = 110) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _detail_lines(report: DataReport) -> dict[str, list[str]]:
    lines = {
        "rejected": [str(r) for r in report.rejected_rows],
        "duplicate prompts": [f"{a} = {b}" for a, b in report.duplicates],
        "train prompts held out": [f"{a} = {b}" for a, b in report.overlap],
    }
    for n, matches in report.ngram_matches.items():
        lines[f"sharing {n} words with the training split (most alike first)"] = [_truncated(str(x)) for x in matches]
    title = f"{JACCARD_THRESHOLD:.0%} of the character 5-grams in a training row"
    return {**lines, title: [_truncated(str(x)) for x in report.fuzzy_matches]}
