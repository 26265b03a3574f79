"""Rendered parts to `Example`s: batched, within the length allowed, and checked row by row (preflight, gate 1)."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rung.config.data import LossOn
from rung.data.byte_store import chunks
from rung.data.records import character_count
from rung.data.token_store import OWN_ANSWER, TokenColumns, TokenColumnWriter, TokenizedDataset, TokenizedDocument
from rung.errors import ConfigError, DataError, GateError
from rung.types import Example, Record

if TYPE_CHECKING:
    from rung.data.chat import ChatTemplate


Overflow = Literal["error", "drop", "trim_prompt"]
CHUNK = 512
"""Rows tokenized or decoded in one call, at most."""
CHUNK_CHARACTERS = 1 << 20
"""Characters (or tokens) of one call, at most: a tokenizer's working memory is a hundred times its text."""
BOUNDARY_SAMPLE = 1000
"""Rows, evenly spaced, for which the whole text is tokenized at once to count differences."""


@dataclass(frozen=True, slots=True)
class Preflight:
    """What gate 1 measured."""

    rows: int
    failing: int
    tokens: int
    supervised_tokens: int
    normalized: int
    """Rows whose text comes back as the tokenizer's own normalizer writes it (composed accents, for example)."""
    boundary_checked: int
    boundary_differences: int

    def to_json(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


class _AnswerVariant(NamedTuple):
    """A record with its own answer, or with a rival's in its place."""

    number: int
    rival: int
    record: Record


def tokenize_records(
    chat: ChatTemplate,
    records: Sequence[Record],
    *,
    loss_on: LossOn = "answer",
    max_length: int | None = None,
    overflow: Overflow = "error",
    candidates: bool = False,
) -> TokenizedDataset:
    """Tokenize records, with their supervised tokens marked; with `candidates`, the other answers of each as well.

    Raises:
        DataError: the template refuses a row or rewrites its history, a document is too long under `error`, no
            document is left, or there are no records.
    """
    flat = tokenize_columns(
        chat, records, loss_on=loss_on, max_length=max_length, overflow=overflow, candidates=candidates
    )
    return TokenizedDataset.from_columns(flat, records)


def tokenize_columns(
    chat: ChatTemplate,
    records: Sequence[Record],
    *,
    loss_on: LossOn,
    max_length: int | None,
    overflow: Overflow,
    candidates: bool = False,
) -> TokenColumns:
    """`tokenize_records`, as columns that a cache can keep."""
    writer = TokenColumnWriter()
    conversations = array("q")  # records that are kept and have turns
    long, stuck = array("q"), array("q")  # record and length, one after the other
    limit = sys.maxsize if max_length is None else max_length
    for i, row in groupby(_documents(chat, _variants(records, candidates), loss_on), key=lambda made: made[0].number):
        variants, documents = zip(*row, strict=True)
        document, length = documents[0], max(len(d.ids) for d in documents)
        if length > limit:
            long.extend((i, length))
            if overflow != "trim_prompt":
                continue
            if len(documents) > 1:
                raise ConfigError(
                    "trimming would cut the prompts of compared answers differently",
                    where="data.overflow",
                    given=overflow,
                    allowed="error or drop",
                )
            inserted = sum(token >= chat.positions.first for token in document.ids) if chat.positions else 0
            if length - max(document.prompt - 1 - inserted, 0) > limit:  # one stays: it predicts the answer's first
                stuck.extend((i, length))
                continue
            documents = (_trim(chat, document, limit),)
        for variant, document in zip(variants, documents, strict=True):
            writer.add(i, document, variant.rival)
        if variants[0].record.text is None:
            conversations.append(i)
    if long and overflow == "error":
        raise _too_long("longer than data.max_length", long, limit, records)
    if stuck:
        raise _too_long("longer than data.max_length even without their prompt", stuck, limit, records)
    if not len(writer):
        if not len(records):
            raise DataError("there are no rows to tokenize")
        raise DataError("no document is left", given=f"{len(long) // 2} of {len(records)} dropped for their length")
    step = max(1, -(-len(conversations) // BOUNDARY_SAMPLE))
    checked, differing = _boundaries(chat, (records[i] for i in conversations[::step]), loss_on)
    beyond, none = np.array(long, dtype=np.int64).reshape(-1, 2), np.empty((0, 2), dtype=np.int64)
    return TokenColumns(
        *writer.regions(),
        rows=writer.rows(),
        dropped=beyond if overflow == "drop" else none,
        trimmed=beyond if overflow == "trim_prompt" else none,
        boundary_checked=checked,
        boundary_differences=differing,
    )


def preflight(chat: ChatTemplate, tokenized: TokenizedDataset) -> Preflight:
    """Gate 1: every row ends in a supervised stop, and its supervised ids decode to the answers as rendered.

    Raises:
        GateError: with the first ten failing rows and what is wrong with each.
    """
    failing = normalized = 0
    shown: list[str] = []
    rows = zip(tokenized.examples, tokenized.expected, tokenized.starts, strict=True)
    for chunk in chunks(rows, lambda row: len(row[0]), count=CHUNK, limit=CHUNK_CHARACTERS):
        for (example, expected, start), text in zip(chunk, _decoded(chat, chunk), strict=True):
            reason = _preflight_fault(chat, example, start)
            if reason is None and text != expected:
                if text == _normalized(chat, expected):
                    normalized += 1
                else:
                    reason = _difference(text, expected)
            if reason is not None:
                failing += 1
                shown += [f"{example.source}: {reason}"] if failing <= 10 else []
    total = len(tokenized.examples)
    if failing:
        raise GateError(f"preflight: {failing} of {total} rows would not train what they say", hint="\n  ".join(shown))
    return Preflight(
        rows=total,
        failing=0,
        tokens=int(tokenized.lengths.sum()),
        supervised_tokens=tokenized.supervised_tokens,
        normalized=normalized,
        boundary_checked=tokenized.boundary_checked,
        boundary_differences=tokenized.boundary_differences,
    )


def _variants(records: Iterable[Record], candidates: bool) -> Iterator[_AnswerVariant]:
    """Each record, followed by its candidates where they are asked for."""
    for number, record in enumerate(records):
        if record.is_prompt_only:
            hint = "prompts alone are for policies that answer themselves: objective.kind: grpo, or rung generate"
            raise DataError("this row has no answer to learn", where=str(record.source), hint=hint)
        if not candidates and record.is_undesirable:
            hint = "leave such rows out, or take objective: {kind: preference, loss: kto}"
            raise DataError("this answer is labelled as bad, and would be learned", where=str(record.source), hint=hint)
        if candidates and record.score is None:
            hint = "objectives that compare take pairs, rankings or ratings, and kto labels (data.format)"
            raise DataError("this row compares nothing", where=str(record.source), hint=hint)
        yield _AnswerVariant(number, OWN_ANSWER, record)
        for i, rival in enumerate(record.candidates if candidates else ()):
            answer = replace(record.messages[-1], content=rival.content)
            yield _AnswerVariant(number, i, replace(record, messages=(*record.messages[:-1], answer), candidates=()))


def _documents(
    chat: ChatTemplate, variants: Iterable[_AnswerVariant], loss_on: LossOn
) -> Iterator[tuple[_AnswerVariant, TokenizedDocument]]:
    for chunk in chunks(variants, lambda v: character_count(v.record), count=CHUNK, limit=CHUNK_CHARACTERS):
        parts = [chat.split_conversation(v.record, loss_on) if v.record.text is None else None for v in chunk]
        texts = [[p.text for p in ps] if ps else [v.record.text or ""] for v, ps in zip(chunk, parts, strict=True)]
        pieces = iter(_encoded(chat, texts))
        for variant, own in zip(chunk, parts, strict=True):
            record = variant.record
            if own is None:
                document = _plain_text(chat, record, next(pieces))
            else:
                real = chat.positions.first if chat.positions else None
                document = _conversation(
                    [(p.supervised, p.text, next(pieces)) for p in own], everything=loss_on == "all", real=real
                )
            chat.check_bos(document.ids, str(record.source))
            yield variant, document


def _plain_text(chat: ChatTemplate, record: Record, ids: list[int]) -> TokenizedDocument:
    """Raw text with its stop; everything after the first token is learned."""
    if chat.positions is not None:
        hint = "put all virtual tokens in front (method.positions)"
        raise DataError("plain text has no turns that tokens could be inserted in", where=str(record.source), hint=hint)
    if chat.eos_id is None:
        raise ConfigError("plain text needs an end-of-text token, and the tokenizer has none", where=str(record.source))
    head = [chat.bos_id] if chat.adds_bos and chat.bos_id is not None and ids[:1] != [chat.bos_id] else []
    whole = [*head, *ids, chat.eos_id]
    supervised = np.ones(len(whole), dtype=bool)
    supervised[0] = False
    expected = f"{chat.tokenizer.bos_token if head else ''}{record.text}{chat.tokenizer.eos_token}"
    return TokenizedDocument(whole, supervised, 0, 0, expected)


def _conversation(
    pieces: list[tuple[bool, str, list[int]]], *, everything: bool, real: int | None
) -> TokenizedDocument:
    """Pieces one after the other. Ids from `real` on are virtual tokens, which nothing can predict."""
    ids = list(chain.from_iterable(piece for _, _, piece in pieces))
    supervised = np.repeat([s or everything for s, _, _ in pieces], [len(piece) for _, _, piece in pieces])
    supervised[0] = False
    if real is not None:
        supervised &= np.array(ids) < real
    prompt = len(pieces[0][2])
    return TokenizedDocument(ids, supervised, prompt, prompt, "".join(text for answer, text, _ in pieces if answer))


def _trim(chat: ChatTemplate, document: TokenizedDocument, limit: int) -> TokenizedDocument:
    """Cut the earliest tokens of the prompt, but keep a leading BOS, and virtual tokens wherever they stand."""
    excess = len(document.ids) - limit
    if excess <= 0:
        return document
    head = int(chat.bos_id is not None and document.ids[0] == chat.bos_id)
    ids = np.array(document.ids)
    real = chat.positions.first if chat.positions else np.iinfo(ids.dtype).max
    cut = head + np.flatnonzero(ids[head : document.prompt] < real)[:excess]
    supervised = np.delete(document.supervised, cut)
    supervised[0] = False
    return document._replace(
        ids=np.delete(ids, cut).tolist(),
        supervised=supervised,
        start=document.start - excess,
        prompt=document.prompt - excess,
    )


def _too_long(what: str, long: Sequence[int], limit: int, records: Sequence[Record]) -> DataError:
    """`long` holds index and length of each, one after the other."""
    count = len(long) // 2
    shown = zip(long[0:20:2], long[1:20:2], strict=True)
    lines = [f"{records[i].source}: {length} tokens" for i, length in shown]
    more = [f"and {count - 10} more"] if count > 10 else []
    return DataError(
        f"{count} of {len(records)} documents are {what}",
        given=f"room for {limit} tokens: data.max_length, or the base's context less virtual tokens",
        hint="\n  ".join([*lines, *more, "make room, or set data.overflow: drop or trim_prompt"]),
    )


def _boundaries(chat: ChatTemplate, sample: Iterable[Record], loss_on: LossOn) -> tuple[int, int]:
    """Conversations looked at, and those whose whole text has other ids than its pieces."""
    checked = differing = 0
    for chunk in chunks(sample, character_count, count=CHUNK, limit=CHUNK_CHARACTERS):
        documents = [[p.text for p in chat.split_conversation(r, loss_on)] for r in chunk]
        pieces = iter(_encoded(chat, documents))
        for whole, texts in zip(chat.encode(["".join(texts) for texts in documents]), documents, strict=True):
            checked += 1
            differing += whole != list(chain.from_iterable(next(pieces) for _ in texts))
    return checked, differing


def _encoded(chat: ChatTemplate, documents: list[list[str]]) -> list[list[int]]:
    """Ids of all pieces of all documents, one after the other."""
    inner = [i > 0 for texts in documents for i in range(len(texts))]
    return chat.encode(list(chain.from_iterable(documents)), inner)


def _decoded(chat: ChatTemplate, rows: Sequence[tuple[Example, str, int]]) -> Iterator[str]:
    compared = [_compared_texts(example, start).tolist() for example, _, start in rows]
    inner = iter(chat.decode((ids for ids, row in zip(compared, rows, strict=True) if row[2] > 0), inner=True))
    plain = iter(chat.decode(ids for ids, row in zip(compared, rows, strict=True) if row[2] == 0))
    return (next(inner) if start > 0 else next(plain) for _, _, start in rows)


def _compared_texts(example: Example, start: int) -> np.ndarray:
    mask = example.supervised.copy()
    mask[:start] = False
    if start == 0:
        mask[0] = True  # the first token of a plain text is not predicted, but its bytes may belong to the second
    compared: np.ndarray = example.ids[mask]
    return compared


def _preflight_fault(chat: ChatTemplate, example: Example, start: int) -> str | None:
    supervised = example.supervised
    if not supervised.any():
        return "no supervised token"
    stops = [i for i in ([chat.eos_id] if start == 0 else chat.stop_ids) if i is not None]
    at_stop = np.isin(example.ids, stops)
    if not (supervised[-1] and at_stop[-1]):
        return f"does not end in a supervised stop token (one of {stops})"
    # A stop followed by more of the same answer was written there by the data: it would teach to stop early.
    inside = at_stop[:-1] & supervised[:-1] & supervised[1:]
    if start > 0 and inside[start:].any():
        return "the answer holds a stop token of the template"
    return None


def _normalized(chat: ChatTemplate, text: str) -> str | None:
    normalizer = chat.tokenizer.backend_tokenizer.normalizer
    return None if normalizer is None else str(normalizer.normalize_str(text))


def _difference(text: str, expected: str) -> str:
    at = len(os.path.commonprefix([text, expected]))
    return f"decodes to {text[at : at + 30]!r} where the template wrote {expected[at : at + 30]!r} (character {at})"


TOKENS_PROBED = 8
"""Tokens at the end of a prompt that the gates look at."""


@dataclass(frozen=True)
class PromptDataset:
    """Prompts in the order of their records; the `row` of each is its place here."""

    examples: list[Example]
    records: list[Record]
    """Of each prompt."""
    dropped: int

    @property
    def rows(self) -> list[list[Example]]:
        """A prompt each."""
        return [[example] for example in self.examples]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each."""
        return np.array([len(e) for e in self.examples], dtype=np.int64)

    def summary(self) -> dict[str, Any]:
        """Counts for `run.json`."""
        lengths = self.lengths
        counts = {"examples": len(lengths), "tokens": int(lengths.sum()), "supervised_tokens": 0}
        return {**counts, "longest": int(lengths.max()), "dropped": self.dropped, "trimmed": 0}

    def preflight(self) -> Preflight:
        """What gate 1 has to say: there is nothing supervised that could be wrong."""
        n = len(self.examples)
        return Preflight(n, 0, int(self.lengths.sum()), 0, normalized=0, boundary_checked=0, boundary_differences=0)


def tokenize_prompts(
    chat: ChatTemplate, records: Sequence[Record], *, longest: int, overflow: Overflow
) -> PromptDataset:
    """Every question as the template puts it, up to where the answer begins, at most `longest` tokens.

    Raises `DataError` for rows without turns, and for prompts that are too long unless `overflow` is `drop`.
    """
    kept: list[Example] = []
    own: list[Record] = []
    long: list[tuple[Record, int]] = []
    for record in records:
        if not record.messages:
            hint = "give rows with a question"
            raise DataError("plain text has no question to answer", where=str(record.source), hint=hint)
        ids = chat.prompt_ids(record.messages[:-1], context=record.context, tools=record.tools)
        if len(ids) > longest:
            long.append((record, len(ids)))
            continue
        whole = np.array(ids, dtype=np.int32)
        # the end of it as if it were an answer, for the gates alone: what is learned from are answers of the policy
        supervised = np.arange(len(whole)) >= max(1, len(whole) - TOKENS_PROBED)
        kept.append(Example(whole, supervised, record.source, record.weight, record.group, record.task, row=len(kept)))
        own.append(record)
    if long and overflow != "drop":
        lines = [f"{record.source}: {length} tokens" for record, length in long[:10]]
        raise DataError(
            f"{len(long)} of {len(records)} prompts leave no room for an answer",
            given=f"at most {longest} tokens",
            hint="\n  ".join([*lines, "a smaller max_new_tokens leaves more; data.overflow: drop leaves them out"]),
        )
    if not kept:
        raise DataError("no prompt is left", given=f"{len(long)} dropped for their length")
    return PromptDataset(kept, own, len(long))
