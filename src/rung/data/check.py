"""What `rung data check` says about a data set, before anything is trained on it."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rung.config.data import DataConfig, LossOn
from rung.data.byte_store import chunks
from rung.data.deduplication import (
    JACCARD_THRESHOLD,
    NGRAM_WORDS,
    FuzzyMatch,
    HashSet,
    NgramMatch,
    fuzzy_duplicates,
    near_duplicates,
    ngram_hashes,
    words,
)
from rung.data.formats import DetectedFormat, read_records
from rung.data.read import RejectedRow
from rung.data.records import Records, character_count
from rung.data.splits import Splits, assign_splits, duplicate_pairs, overlapping_pairs, weighted_paths
from rung.data.token_store import TokenizedDataset
from rung.data.tokenize import preflight, tokenize_prompts, tokenize_records
from rung.errors import DataError, GateError
from rung.types import Example, Record

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

    from rung.data.chat import ChatTemplate

SKEWED = 0.2
"""Share of pairs beyond a half in which the better answer is the longer, or the shorter, that is worth a word."""
MAX_SHOWN = 10
"""Rows of each kind that the printed report names; the JSON has all."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Spread of the documents' lengths."""

    unit: str  # "tokens" or "characters"
    minimum: int
    median: float
    p95: float
    maximum: int


@dataclass(frozen=True, slots=True)
class Diversity:
    """How varied the answers are (Li et al. 2016: distinct n-grams per n-gram)."""

    distinct_1: float
    distinct_2: float
    most_common: str
    most_common_share: float


@dataclass(frozen=True, slots=True)
class AnswerLengths:
    """Rows whose answers are compared: whether the better one is simply the longer."""

    pairs: int
    """Of the best answer with each other."""
    longer: float
    """Share of them in which the better answer has more characters; equal lengths count half."""
    typical: float
    """Median of (characters of the better) / (characters of the other)."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """Everything `check` computed. It prints itself on a rich console."""

    detections: dict[str, DetectedFormat]
    kept: int
    rejected: tuple[RejectedRow, ...]
    splits: dict[str, int]
    lengths: Lengths | None
    duplicates: tuple[tuple[str, str], ...]
    """Rows that ask what an earlier row asks, with that row."""
    overlap: tuple[tuple[str, str], ...]
    """Training rows whose prompt also stands in a held-out split, with that row."""
    near: dict[int, tuple[NgramMatch, ...]]
    """Per n: held-out rows that share an n-gram of words with the training split."""
    fuzzy: tuple[FuzzyMatch, ...]
    """Held-out rows most of whose characters also stand in a training row in the same order."""
    diversity: Diversity | None
    compared: AnswerLengths | None
    """None where nothing is compared."""
    supervised_share: float | None
    """Supervised tokens over all tokens; None without a tokenizer."""

    @property
    def ok(self) -> bool:
        """True when every row can be used and no training prompt is held out."""
        return not self.rejected and not self.overlap

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "ok": self.ok,
            "formats": {
                path: {"format": d.format, "mapping": d.mapping, "columns": d.counts, "unused": list(d.unused)}
                for path, d in self.detections.items()
            },
            "rows": {"kept": self.kept, "rejected": len(self.rejected)},
            "rejected": [{"path": r.source.path, "line": r.source.line, "reason": r.reason} for r in self.rejected],
            "splits": self.splits,
            "lengths": asdict(self.lengths) if self.lengths else None,
            "duplicate_prompts": [list(pair) for pair in self.duplicates],
            "overlap": [list(pair) for pair in self.overlap],
            "near_duplicates": {str(n): [near.to_json() for near in found] for n, found in self.near.items()},
            "fuzzy_duplicates": [alike.to_json() for alike in self.fuzzy],
            "diversity": asdict(self.diversity) if self.diversity else None,
            "compared": asdict(self.compared) if self.compared else None,
            "supervised_share": self.supervised_share,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Print the numbers, then the rows behind them."""
        from rich.markup import escape

        yield _table(self)
        for title, lines in _details(self).items():
            if lines:
                yield ""
                yield f"[bold]{title}[/bold]"
                yield from (f"  {escape(line)}" for line in lines[:MAX_SHOWN])
                if len(lines) > MAX_SHOWN:
                    yield f"  and {len(lines) - MAX_SHOWN} more"


def inspect_data(
    target: str | DataConfig, chat: ChatTemplate | None = None, *, loss_on: LossOn | None = None
) -> DataReport:
    """Look at every row of a file or a data config. With `chat`, lengths are in tokens and every row is tokenized.

    Raises:
        DataError: a source cannot be read at all, or its columns fit no format. Bad rows are reported, never raised.
    """
    config = DataConfig(path=target) if isinstance(target, str) else target
    detections: dict[str, DetectedFormat] = {}
    rejected: list[RejectedRow] = []
    own = Records.concatenate([_load(config, p.path, detections, rejected) for p in weighted_paths(config)])
    held = {
        name: _load(config, value, detections, rejected, held_out=True)
        for name, value in (("validation", config.validation), ("test", config.test))
        if isinstance(value, str)
    }
    own, lengths, share = _measure(own, chat, loss_on or config.loss_on, rejected)
    parts = assign_splits(own, validation=_share(config.validation), test=_share(config.test))
    parts = Splits(parts.train, held.get("validation", parts.validation), held.get("test", parts.test))
    held_out = Records.concatenate([parts.validation, parts.test])
    return DataReport(
        detections=detections,
        kept=len(own) + sum(len(records) for records in held.values()),
        rejected=tuple(sorted(rejected, key=lambda r: r.source)),
        splits={"train": len(parts.train), "validation": len(parts.validation), "test": len(parts.test)},
        lengths=lengths,
        duplicates=_named_pairs(own, own, duplicate_pairs(own)),
        overlap=_named_pairs(parts.train, held_out, overlapping_pairs(parts.train, held_out)),
        near={n: near_duplicates(parts.train, held_out, n) for n in NGRAM_WORDS},
        fuzzy=fuzzy_duplicates(parts.train, held_out),
        diversity=_diversity(own),
        compared=_answer_lengths(own),
        supervised_share=share,
    )


def _named_pairs(left: Records, right: Records, pairs: tuple[np.ndarray, np.ndarray]) -> tuple[tuple[str, str], ...]:
    return tuple((str(left.source(i)), str(right.source(k))) for i, k in zip(*pairs, strict=True))


def colored_tokens(example: Example, chat: ChatTemplate) -> Text:
    """The document as text: what is learned in green, what is only read dimmed, every token in a shade of its own."""
    from rich.text import Text

    shades = {True: ("bold green", "bold bright_green"), False: ("dim", "dim italic")}
    text = Text()
    for i, (piece, learned) in enumerate(_pieces(example, chat)):
        text.append(piece, style=shades[learned][i % 2])
    return text


def _pieces(example: Example, chat: ChatTemplate) -> Iterator[tuple[str, bool]]:
    """Token texts; tokens that share the bytes of one character come as one piece."""
    waiting: list[int] = []
    last = len(example) - 1
    for i, (token, learned) in enumerate(zip(example.ids.tolist(), example.supervised.tolist(), strict=True)):
        waiting.append(token)
        piece = chat.decode([waiting])[0]
        changes = i == last or bool(example.supervised[i + 1]) != learned
        if changes or not piece.endswith("\ufffd"):
            yield piece, learned
            waiting = []


def _load(
    config: DataConfig,
    path: str,
    detections: dict[str, DetectedFormat],
    rejected: list[RejectedRow],
    *,
    held_out: bool = False,
) -> Records:
    loaded = read_records(config, path, held_out=held_out)
    detections[path] = loaded.detection
    rejected += loaded.rejected
    return loaded.records


def _measure(
    records: Records, chat: ChatTemplate | None, loss_on: LossOn, rejected: list[RejectedRow]
) -> tuple[Records, Lengths | None, float | None]:
    """Lengths and supervised share; rows that the template or the preflight refuses move to `rejected`."""
    if chat is None or not records:
        sizes = np.fromiter(map(character_count, records), dtype=np.int64, count=len(records))
        return records, _lengths(sizes, "characters"), None
    if records[0].is_prompt_only:
        return (
            records,
            _lengths(tokenize_prompts(chat, records, longest=sys.maxsize, overflow="error").lengths, "tokens"),
            None,
        )
    tokenized: TokenizedDataset | None = None
    candidates = records[0].score is not None
    try:
        tokenized = tokenize_records(chat, records, loss_on=loss_on, candidates=candidates)
        preflight(chat, tokenized)
    except (DataError, GateError):
        usable = [i for i, r in enumerate(records) if not _is_refused(r, chat, loss_on, rejected)]
        records = records.select(np.array(usable, dtype=np.int64))
        tokenized = tokenize_records(chat, records, loss_on=loss_on, candidates=candidates) if records else None
    if tokenized is None:
        return records, None, None
    share = tokenized.supervised_tokens / int(tokenized.lengths.sum())
    return records, _lengths(tokenized.lengths, "tokens"), share


def _is_refused(record: Record, chat: ChatTemplate, loss_on: LossOn, rejected: list[RejectedRow]) -> bool:
    try:
        preflight(chat, tokenize_records(chat, [record], loss_on=loss_on, candidates=record.score is not None))
    except DataError as error:
        rejected.append(RejectedRow(record.source, error.summary))
    except GateError as error:
        rejected.append(RejectedRow(record.source, (error.hint or error.summary).removeprefix(f"{record.source}: ")))
    else:
        return False
    return True


def _lengths(lengths: np.ndarray, unit: str) -> Lengths | None:
    if not len(lengths):
        return None
    median, p95 = np.quantile(lengths, [0.5, 0.95])
    return Lengths(unit, int(lengths.min()), float(median), float(p95), int(lengths.max()))


def _diversity(records: Records) -> Diversity | None:
    """From hashes of words, pairs and answers: the texts of all answers are never in memory together."""
    ones, twos = HashSet(), HashSet()
    answers, rows = array("q"), array("q")
    given = ((i, answer) for i, answer in enumerate(r.answer for r in records) if answer)
    for chunk in chunks(given, lambda x: len(x[1]), count=1024, limit=1 << 20):
        own = [words(answer) for _, answer in chunk]
        ones.add(ngram_hashes(own, 1)[0])
        twos.add(ngram_hashes(own, 2)[0])
        answers.extend(hash(answer) for _, answer in chunk)
        rows.extend(i for i, _ in chunk)
    if not answers:
        return None
    _, first, counts = np.unique(np.array(answers), return_index=True, return_counts=True)
    most = int(first[counts == counts.max()].min())  # of answers equally common the first
    return Diversity(
        len(ones.values()) / ones.total if ones.total else 0.0,
        len(twos.values()) / twos.total if twos.total else 0.0,
        records[rows[most]].answer,
        int(counts.max()) / len(answers),
    )


def _answer_lengths(records: Records) -> AnswerLengths | None:
    ratios = array("d")
    for record in records:
        ratios.extend((len(record.answer) or 1) / (len(rival.content) or 1) for rival in record.candidates)
    if not ratios:
        return None
    found = np.array(ratios)
    return AnswerLengths(len(found), float(((found > 1) + 0.5 * (found == 1)).mean()), float(np.median(found)))


def _share(value: float | str) -> float:
    return 0.0 if isinstance(value, str) else value


def _table(report: DataReport) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for path, detection in report.detections.items():
        table.add_row(escape(path), escape(str(detection)))
    table.add_row("rows", f"{report.kept} kept, {len(report.rejected)} rejected")
    table.add_row("splits", ", ".join(f"{name} {n}" for name, n in report.splits.items()))
    if size := report.lengths:
        spread = f"min {size.minimum}, median {size.median:g}, p95 {size.p95:g}, max {size.maximum}"
        table.add_row("length", f"{spread} {size.unit}")
    if report.supervised_share is not None:
        table.add_row("supervised", f"{report.supervised_share:.1%} of the tokens")
    if d := report.diversity:
        table.add_row("distinct-1, distinct-2", f"{d.distinct_1:.3f}, {d.distinct_2:.3f} of the answers' words")
        table.add_row("most common answer", escape(f"{d.most_common_share:.1%}: {d.most_common[:60]!r}"))
    if c := report.compared:
        says = "length alone may be what is learned" if abs(c.longer - 0.5) > SKEWED else "of either length"
        told = f"longer in {c.longer:.0%} of {c.pairs} pairs, {c.typical:.2f} times as long in the median one: {says}"
        table.add_row("better answers", told)
    table.add_row("duplicate prompts", str(len(report.duplicates)))
    table.add_row("train prompts held out", str(len(report.overlap)))
    for n, found in report.near.items():
        table.add_row(f"held-out rows sharing {n} words", str(len(found)))
    table.add_row(f"held-out rows {JACCARD_THRESHOLD:.0%} the same", str(len(report.fuzzy)))
    return table


def _on_one_line(text: str, width: int = 110) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _details(report: DataReport) -> dict[str, list[str]]:
    return {
        "rejected": [str(r) for r in report.rejected],
        "duplicate prompts": [f"{a} = {b}" for a, b in report.duplicates],
        "train prompts held out": [f"{a} = {b}" for a, b in report.overlap],
        **{
            f"sharing {n} words with the training split (most alike first)": [_on_one_line(str(x)) for x in found]
            for n, found in report.near.items()
        },
        f"{JACCARD_THRESHOLD:.0%} of the character 5-grams in a training row": [
            _on_one_line(str(x)) for x in report.fuzzy
        ],
    }
