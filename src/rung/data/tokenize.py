"""Tokenization: rendered parts to `Example`s, the length policies, and the preflight check (gate 1).

Prompt and answer are tokenized separately (decision 0003), in batches bounded by rows and characters. The preflight
decodes every supervised span and compares it with the rendered answer, which costs about as much as tokenizing again
and finds wrong labels before a run instead of after it. `cache` calls `tokenize_columns`, `runs.dataset` the rest.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, groupby
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from rung.config.data import LossOn
from rung.data.byte_store import chunks
from rung.data.chat import ChatTemplate, TextPart
from rung.data.control_tokens import plain_text_error, refused_error, treatment, without_end_tokens, without_marks
from rung.data.records import character_count
from rung.data.token_store import (
    OWN_ANSWER,
    RowNotes,
    TokenColumns,
    TokenColumnWriter,
    TokenizedDataset,
    TokenizedDocument,
)
from rung.errors import ConfigError, DataError, GateError
from rung.types import Example, Message, Record

Overflow = Literal["error", "drop", "trim_prompt"]
Rejects = Literal["error", "drop"]


class TokenizeOptions(TypedDict, total=False):
    """What decides the tokens besides template and records; defaults: `TOKENIZE_DEFAULTS`."""

    loss_on: LossOn
    max_length: int | None
    overflow: Overflow
    with_candidates: bool
    rejects: Rejects


TOKENIZE_DEFAULTS = TokenizeOptions(
    loss_on="answer", max_length=None, overflow="error", with_candidates=False, rejects="error"
)
CHUNK = 512
"""Maximum of rows tokenized or decoded in one call."""
CHUNK_CHARACTERS = 1 << 20
"""Maximum of characters (or tokens) in one call: a tokenizer's working memory is a hundred times its text."""
BOUNDARY_SAMPLE = 1000
"""Evenly spaced rows whose complete text is also tokenized at once, to count differences."""


@dataclass(frozen=True, slots=True)
class Preflight:
    """Measurements of gate 1."""

    rows: int
    failing: int
    tokens: int
    supervised_tokens: int
    normalized: int
    """Rows whose text decodes to its form under the tokenizer's normalizer (composed accents, for example)."""
    boundary_checked: int
    boundary_differences: int

    def to_json(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


class _AnswerVariant(NamedTuple):
    """A record with its own answer, or with the answer of a candidate in its place."""

    record_index: int
    candidate_index: int
    record: Record


def tokenize_records(
    chat: ChatTemplate, records: Sequence[Record], **options: Unpack[TokenizeOptions]
) -> TokenizedDataset:
    """Tokenize records and mark their supervised tokens; `with_candidates` adds the other answers of each record.

    Under `rejects: drop` rows that cannot be rendered are left out and counted.

    Raises:
        DataError: the template refuses a row or rewrites its history, a row has control tokens that the setting of the
            template (`ChatTemplate.control_tokens`) refuses, a document is too long under `error`, no document is left,
            or there are no records.
    """
    return tokenize_columns(chat, records, **options).dataset(records)


def tokenize_columns(chat: ChatTemplate, records: Sequence[Record], **options: Unpack[TokenizeOptions]) -> TokenColumns:
    """`tokenize_records`, as columns that the cache can store."""
    options = TOKENIZE_DEFAULTS | options
    loss_on, max_length, overflow = options["loss_on"], options["max_length"], options["overflow"]
    writer = TokenColumnWriter()
    conversations = array("q")  # records that are kept and have turns
    too_long, untrimmable = array("q"), array("q")  # record and length, one after the other
    limit = sys.maxsize if max_length is None else max_length
    # All answers of a record are kept or dropped together: half a pair compares nothing.
    rows_of_answers = _DocumentReader(chat, loss_on, drops_rejects=options["rejects"] == "drop")
    all_documents = rows_of_answers.documents(_variants(records, options["with_candidates"]))
    for i, row in groupby(all_documents, key=lambda pair: pair[0].record_index):
        variants, row_documents = zip(*row, strict=True)
        documents = tuple(d for d in row_documents if d is not None)
        if len(documents) < len(variants):
            continue
        length = max(len(d.ids) for d in documents)
        if length > limit:
            too_long.extend((i, length))
            # collected, not raised at once: the error names the first ten and counts all
            if overflow != "trim_prompt":
                continue
            trimmed = _trim_prompt(chat, documents, limit)
            if trimmed is None:
                untrimmable.extend((i, length))
                continue
            documents = (trimmed,)
        for variant, document in zip(variants, documents, strict=True):
            writer.add(i, document, variant.candidate_index)
        if variants[0].record.text is None:
            # plain texts have no border between pieces
            conversations.append(i)
    if too_long and overflow == "error":
        raise _too_long_error("longer than data.max_length", too_long, limit, records)
    if untrimmable:
        raise _too_long_error("longer than data.max_length even without their prompt", untrimmable, limit, records)
    if not len(writer):
        if not len(records):
            raise DataError("there are no rows to tokenize")
        raise _nothing_left_error("document", rows_of_answers.notes, len(too_long) // 2, len(records))
    # evenly spaced over the file, because sources are often sorted
    step = max(1, -(-len(conversations) // BOUNDARY_SAMPLE))
    sample = (records[i] for i in conversations[::step])
    too_long_table, empty_table = np.array(too_long, dtype=np.int64).reshape(-1, 2), np.empty((0, 2), dtype=np.int64)
    dropped_table = too_long_table if overflow == "drop" else empty_table
    trimmed_table = too_long_table if overflow == "trim_prompt" else empty_table
    boundary = _count_boundary_differences(chat, sample, loss_on)
    return writer.columns(dropped_table, trimmed_table, *boundary, rows_of_answers.notes)


def _trim_prompt(chat: ChatTemplate, documents: Sequence[TokenizedDocument], limit: int) -> TokenizedDocument | None:
    """The document of a row with its prompt cut to fit, or None where the answer alone is too long.

    Raises `ConfigError` for a row of several answers: each would be cut to another prompt.
    """
    if len(documents) > 1:
        summary = "trimming would cut the prompts of compared answers differently"
        raise ConfigError(summary, where="data.overflow", given="trim_prompt", allowed="error or drop")
    (document,) = documents
    ids, excess = np.array(document.ids), len(document.ids) - limit
    # virtual tokens and a leading BOS are never trimmed
    first_virtual_id = chat.positions.first_id if chat.positions else np.iinfo(ids.dtype).max
    bos_count = int(chat.bos_id is not None and document.ids[0] == chat.bos_id)
    # one token of the prompt stays: it predicts the first of the answer
    if excess > document.prompt_length - 1 - int((ids >= first_virtual_id).sum()):
        return None
    # from the beginning: the question is usually at the end of the prompt, right before the answer
    cut_positions = bos_count + np.flatnonzero(ids[bos_count : document.prompt_length] < first_virtual_id)[:excess]
    ids, supervised = np.delete(ids, cut_positions), np.delete(document.supervised, cut_positions)
    supervised[0] = False
    return TokenizedDocument(ids.tolist(), supervised, document.prompt_length - excess, document.expected_text)


def preflight(chat: ChatTemplate, tokenized: TokenizedDataset) -> Preflight:
    """Gate 1: every row ends in a supervised stop, and its supervised ids decode to the rendered answers.

    Raises:
        GateError: with the first ten failing rows and what is wrong with each.
    """
    failing, normalized_count = _preflight_failures(chat, tokenized)
    total = len(tokenized.examples)
    if failing:
        summary = f"preflight: {len(failing)} of {total} rows would not train what they say"
        messages = [f"{tokenized.examples[i].source}: {reason}" for i, reason in list(failing.items())[:10]]
        raise GateError(summary, hint="\n  ".join(messages))
    return Preflight(
        rows=total,
        failing=0,
        tokens=int(tokenized.lengths.sum()),
        supervised_tokens=tokenized.supervised_tokens,
        normalized=normalized_count,
        boundary_checked=tokenized.columns.boundary_checked,
        boundary_differences=tokenized.columns.boundary_differences,
    )


def without_failing_rows(chat: ChatTemplate, tokenized: TokenizedDataset) -> TokenizedDataset:
    """The data set without the rows that fail gate 1, which are counted (`data.rejects: drop`)."""
    failing, _ = _preflight_failures(chat, tokenized)
    # a data set of which nothing would be left fails gate 1 as a whole
    if not failing or len(failing) == len(tokenized.examples):
        return tokenized
    return tokenized.without_documents({i: f"{tokenized.examples[i].source}: {r}" for i, r in failing.items()})


def _preflight_failures(chat: ChatTemplate, tokenized: TokenizedDataset) -> tuple[dict[int, str], int]:
    """Documents that fail gate 1 with their reasons, and the number of those that only a normalizer changed."""
    failing: dict[int, str] = {}
    normalized_count = number = 0
    normalizer = chat.tokenizer.backend_tokenizer.normalizer
    rows = zip(tokenized.examples, tokenized.expected_texts, tokenized.compared_starts, strict=True)
    for chunk in chunks(rows, lambda row: len(row[0]), count=CHUNK, limit=CHUNK_CHARACTERS):
        for (example, expected, start), text in zip(chunk, _decode_supervised(chat, chunk), strict=True):
            reason = _preflight_fault(chat, example, start)
            if reason is None and text != expected:
                # a normalizer cannot be undone, and inference applies it as well: counted, not refused
                if normalizer is not None and text == normalizer.normalize_str(expected):
                    normalized_count += 1
                else:
                    reason = _describe_difference(text, expected)
            if reason is not None:
                failing[number] = reason
            number += 1
    return failing, normalized_count


def _variants(records: Iterable[Record], with_candidates: bool) -> Iterator[_AnswerVariant]:
    """Each record, followed by its candidates if `with_candidates`."""
    for record_index, record in enumerate(records):
        if record.is_prompt_only:
            hint = "prompts alone are for policies that answer themselves: objective.kind: grpo, or rung generate"
            raise DataError("this row has no answer to learn", where=str(record.source), hint=hint)
        # an error, not a filter: dropping rows silently would hide a wrong objective
        if not with_candidates and record.is_undesirable:
            hint = "leave such rows out, or take objective: {kind: preference, loss: kto}"
            raise DataError("this answer is labelled as bad, and would be learned", where=str(record.source), hint=hint)
        if with_candidates and record.score is None:
            hint = "objectives that compare take pairs, rankings or ratings, and kto labels (data.format)"
            raise DataError("this row compares nothing", where=str(record.source), hint=hint)
        yield _AnswerVariant(record_index, OWN_ANSWER, record)
        for i, candidate in enumerate(record.candidates if with_candidates else ()):
            answer = Message("assistant", candidate.content, candidate.tool_calls, reasoning=candidate.reasoning)
            variant = replace(record, messages=(*record.messages[:-1], answer), candidates=())
            yield _AnswerVariant(record_index, i, variant)


class _DocumentReader:
    """Documents of records, and notes on their control tokens and on rows that are left out."""

    def __init__(self, chat: ChatTemplate, loss_on: LossOn, *, drops_rejects: bool) -> None:
        self.chat, self.loss_on, self._drops_rejects = chat, loss_on, drops_rejects
        self.notes = RowNotes()

    def documents(
        self, variants: Iterable[_AnswerVariant]
    ) -> Iterator[tuple[_AnswerVariant, TokenizedDocument | None]]:
        """Each variant with its document; None for a row that is left out."""
        for chunk in chunks(variants, lambda v: character_count(v.record), count=CHUNK, limit=CHUNK_CHARACTERS):
            rows_of_parts = [self._parts(variant) for variant in chunk]
            # one call for all pieces of the chunk; they come back in order
            pieces = iter(_encode_pieces(self.chat, [parts for parts in rows_of_parts if parts is not None]))
            for variant, parts in zip(chunk, rows_of_parts, strict=True):
                if parts is None:
                    yield variant, None
                    continue
                yield variant, self._document(variant, parts, [next(pieces) for _ in parts])

    def _document(
        self, variant: _AnswerVariant, parts: list[TextPart], ids: list[list[int]]
    ) -> TokenizedDocument | None:
        record = variant.record
        try:
            if record.text is None:
                document = _conversation(self.chat, parts, ids, learn_all=self.loss_on == "all")
            else:
                document = _plain_text(self.chat, record, ids[0])
            self.chat.check_bos(document.ids, str(record.source))
        except DataError as error:
            self._reject(variant.record_index, record, error)
            return None
        return document

    def _parts(self, variant: _AnswerVariant) -> list[TextPart] | None:
        """The parts of a row; None for one that is left out. Raises `DataError` where such rows are errors."""
        try:
            record = self._with_control_tokens(variant.record_index, variant.record)
            return None if record is None else _parts(self.chat, record, self.loss_on)
        except DataError as error:
            self._reject(variant.record_index, variant.record, error)
            return None

    def prompt_ids(self, row: int, record: Record) -> list[int] | None:
        """Ids of the prompt of a row; None for one that is left out. Raises `DataError` where such rows are errors."""
        turns = record.messages[:-1]
        try:
            if self._with_control_tokens(row, replace(record, messages=turns)) is None:
                return None
            return self.chat.prompt_ids(turns, context=record.context, tools=record.tools)
        except DataError as error:
            self._reject(row, record, error)
            return None

    def _with_control_tokens(self, row: int, record: Record) -> Record | None:
        """The record as it is learned under `data.control_tokens`; None if it is left out."""
        found = self.chat.control_text.found_in(record)
        if not found:
            return record
        policy = treatment(self.chat.control_tokens, is_plain_text=record.text is not None)
        if policy is None:
            raise plain_text_error(found)
        if policy == "error":
            raise refused_error(found)
        self.notes.count_control_tokens(row, found, dropped=policy == "drop")
        if policy == "drop":
            return None
        if policy == "keep":
            return record
        messages, removed = without_end_tokens(record.messages, self.chat.stop_texts)
        self.notes.removed_end_tokens.update(removed)
        return replace(record, messages=messages)

    def _reject(self, row: int, record: Record, error: DataError) -> None:
        if not self._drops_rejects:
            details: dict[str, Any] = {"given": error.given, "allowed": error.allowed, "hint": error.hint}
            raise DataError(error.summary, where=error.where or str(record.source), **details) from error
        self.notes.reject(row, record.source, error.summary)


def _nothing_left_error(kind: str, notes: RowNotes, too_long: int, total: int) -> DataError:
    given = f"{too_long} of {total} dropped for their length"
    if rows := notes.control_rows_dropped:
        given += f", {rows} for their control tokens (data.control_tokens: drop)"
    if notes.rejected_rows:
        given += f", {notes.rejected_rows} rejected (data.rejects: drop)"
    hints = ["raise data.max_length, or set data.overflow: trim_prompt"] if too_long else []
    return DataError(f"no {kind} is left", given=given, hint="\n  ".join([*notes.rejected_first, *hints]) or None)


def _parts(chat: ChatTemplate, record: Record, loss_on: LossOn) -> list[TextPart]:
    return [chat.plain_text_part(record.text)] if record.text is not None else chat.split_conversation(record, loss_on)


def _plain_text(chat: ChatTemplate, record: Record, ids: list[int]) -> TokenizedDocument:
    """Raw text with its stop; all tokens after the first are supervised."""
    if chat.positions is not None:
        hint = "put all virtual tokens in front (method.positions)"
        raise DataError("plain text has no turns that tokens could be inserted in", where=str(record.source), hint=hint)
    if chat.eos_id is None:
        raise ConfigError("plain text needs an end-of-text token, and the tokenizer has none", where=str(record.source))
    # as the tokenizer itself would do; not if the text already begins with one
    bos_ids = [chat.bos_id] if chat.adds_bos and chat.bos_id is not None and ids[:1] != [chat.bos_id] else []
    # control tokens that are kept may end the text already
    eos_ids = [] if ids[-1:] == [chat.eos_id] else [chat.eos_id]
    document_ids = [*bos_ids, *ids, *eos_ids]
    supervised = np.ones(len(document_ids), dtype=bool)
    supervised[0] = False
    expected = (
        f"{chat.tokenizer.bos_token if bos_ids else ''}{record.text}{chat.tokenizer.eos_token if eos_ids else ''}"
    )
    return TokenizedDocument(document_ids, supervised, 0, expected)


def _conversation(
    chat: ChatTemplate, parts: Sequence[TextPart], pieces: Sequence[list[int]], *, learn_all: bool
) -> TokenizedDocument:
    """Concatenate the ids of all parts."""
    ids = list(chain.from_iterable(pieces))
    # the first token has no predecessor that could predict it
    learned = [p.supervised or (learn_all and not p.excluded) for p in parts]
    supervised = np.repeat(learned, [len(piece) for piece in pieces])
    supervised[0] = False
    if chat.positions is not None:  # no model can predict virtual tokens
        supervised &= np.array(ids) < chat.positions.first_id
    # all that precedes the first learned answer; where all tokens are learned, what precedes the last one
    prompt_length = sum(map(len, pieces[:-1])) if learn_all else len(pieces[0])
    return TokenizedDocument(
        ids, supervised, prompt_length, without_marks("".join(p.text for p in parts if p.supervised))
    )


def _too_long_error(description: str, too_long: Sequence[int], limit: int, records: Sequence[Record]) -> DataError:
    """`too_long` has index and length alternating."""
    count = len(too_long) // 2
    examples = zip(too_long[0:20:2], too_long[1:20:2], strict=True)
    lines = [f"{records[i].source}: {length} tokens" for i, length in examples]
    remainder = [f"and {count - 10} more"] if count > 10 else []
    room = f"room for {limit} tokens: data.max_length, or the base's context less virtual tokens"
    hint = "\n  ".join([*lines, *remainder, "make room, or set data.overflow: drop or trim_prompt"])
    return DataError(f"{count} of {len(records)} documents are {description}", given=room, hint=hint)


def _count_boundary_differences(chat: ChatTemplate, sample: Iterable[Record], loss_on: LossOn) -> tuple[int, int]:
    """Conversations compared, and those whose complete text has other ids than its pieces."""
    sample_count = difference_count = 0
    for chunk in chunks(sample, character_count, count=CHUNK, limit=CHUNK_CHARACTERS):
        documents = [chat.split_conversation(r, loss_on) for r in chunk]
        pieces = iter(_encode_pieces(chat, documents))
        texts = ["".join(p.text for p in parts) for parts in documents]
        for joined_ids, parts in zip(chat.encode(texts), documents, strict=True):
            sample_count += 1
            difference_count += joined_ids != list(chain.from_iterable(next(pieces) for _ in parts))
    return sample_count, difference_count


def _encode_pieces(chat: ChatTemplate, documents: list[list[TextPart]]) -> list[list[int]]:
    """Ids of all parts of all documents, in order."""
    mid_document = [i > 0 for parts in documents for i in range(len(parts))]
    return chat.encode([part.text for parts in documents for part in parts], mid_document)


def _decode_supervised(chat: ChatTemplate, rows: Sequence[tuple[Example, str, int]]) -> Iterator[str]:
    # Two calls, because the anchor of `decode` applies to texts that continue a document only.
    answers = (e.ids[start:][e.supervised[start:]].tolist() for e, _, start in rows if start > 0)
    # the first token of plain text is not predicted, but may share the bytes of a character
    documents = ([int(e.ids[0]), *e.ids[1:][e.supervised[1:]].tolist()] for e, _, start in rows if start == 0)
    texts = {True: iter(chat.decode(answers, mid_document=True)), False: iter(chat.decode(documents))}
    return (next(texts[start > 0]) for _, _, start in rows)


def _preflight_fault(chat: ChatTemplate, example: Example, start: int) -> str | None:
    supervised = example.supervised
    if not supervised.any():
        return "no supervised token"
    # plain text ends in eos whatever the template's stops are
    stops = [i for i in ([chat.eos_id] if start == 0 else chat.stop_ids) if i is not None]
    at_stop = np.isin(example.ids, stops)
    if not (supervised[-1] and at_stop[-1]):
        return f"does not end in a supervised stop token (one of {stops})"
    # A stop followed by more of the same answer was written there by the data: it would teach to stop early.
    early_stops = np.isin(example.ids, chat.generation_stop_ids)[:-1] & supervised[:-1] & supervised[1:]
    if start > 0 and early_stops[start:].any():
        token = int(example.ids[start:-1][early_stops[start:]][0])
        owner = "template" if token in chat.stop_ids else "model"
        return f"the answer holds a stop token of the {owner}; data.control_tokens: text makes text of it"
    return None


def _describe_difference(text: str, expected: str) -> str:
    position = len(os.path.commonprefix([text, expected]))
    decoded, rendered = (side[position : position + 30] for side in (text, expected))
    return f"decodes to {decoded!r} where the template wrote {rendered!r} (character {position})"


TOKENS_PROBED = 8
"""Tokens at the end of a prompt that the gates compare."""


@dataclass(frozen=True)
class PromptDataset:
    """Tokenized prompts in the order of their records; the `row` of an example is its index here."""

    examples: list[Example]
    records: list[Record]
    """The record of each prompt."""
    dropped_count: int
    notes: dict[str, Any] = field(default_factory=dict)
    """`RowNotes` as JSON."""

    @property
    def rows(self) -> list[list[Example]]:
        """One prompt per row."""
        return [[example] for example in self.examples]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each prompt, int64."""
        return np.array([len(e) for e in self.examples], dtype=np.int64)

    def summary(self) -> dict[str, Any]:
        """Counts for `run.json`."""
        lengths = self.lengths
        counts = {"examples": len(lengths), "tokens": int(lengths.sum()), "supervised_tokens": 0}
        return {**counts, "longest": int(lengths.max()), "dropped": self.dropped_count, "trimmed": 0, **self.notes}

    def preflight(self) -> Preflight:
        """Gate 1 always passes: prompts have no supervised tokens that could be wrong."""
        n = len(self.examples)
        return Preflight(n, 0, int(self.lengths.sum()), 0, normalized=0, boundary_checked=0, boundary_differences=0)


def tokenize_prompts(
    chat: ChatTemplate,
    records: Sequence[Record],
    max_length: int = sys.maxsize,
    overflow: Overflow = "error",
    rejects: Rejects = "error",
) -> PromptDataset:
    """Every question as rendered up to the beginning of the answer, at most `max_length` tokens.

    Raises `DataError` for rows without turns, for prompts that are too long unless `overflow` is `drop`, and for rows
    that cannot be rendered unless `rejects` is.
    """
    examples: list[Example] = []
    kept_records: list[Record] = []
    too_long: list[tuple[Record, int]] = []
    reader = _DocumentReader(chat, "answer", drops_rejects=rejects == "drop")
    for i, record in enumerate(records):
        if not record.messages:
            hint = "give rows with a question"
            raise DataError("plain text has no question to answer", where=str(record.source), hint=hint)
        if (prompt_ids := reader.prompt_ids(i, record)) is None:
            continue
        if len(prompt_ids) > max_length:
            too_long.append((record, len(prompt_ids)))
            continue
        ids = np.array(prompt_ids, dtype=np.int32)
        # marks the end of the prompt as if it were an answer, for the gates only: training uses answers of the policy
        supervised = np.arange(len(ids)) >= max(1, len(ids) - TOKENS_PROBED)
        row = len(examples)
        examples.append(Example(ids, supervised, record.source, record.weight, record.group, record.task, row))
        kept_records.append(record)
    if too_long and overflow != "drop":
        lines = [f"{record.source}: {length} tokens" for record, length in too_long[:10]]
        lines.append("a smaller max_new_tokens leaves more; data.overflow: drop leaves them out")
        summary = f"{len(too_long)} of {len(records)} prompts leave no room for an answer"
        raise DataError(summary, given=f"at most {max_length} tokens", hint="\n  ".join(lines))
    if not examples:
        raise _nothing_left_error("prompt", reader.notes, len(too_long), len(records))
    return PromptDataset(examples, kept_records, len(too_long), reader.notes.to_json())
