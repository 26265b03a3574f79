"""Rendered parts to `Example`s: batched, within the length allowed, and checked row by row (preflight, gate 1)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np

from rung.errors import ConfigError, DataError, GateError
from rung.spec.data import LossOn
from rung.types import Example, Record, Source

if TYPE_CHECKING:
    from rung.data.chat import Chat

T = TypeVar("T")
Overflow = Literal["error", "drop", "trim_prompt"]
CHUNK = 1024
"""Rows tokenised or decoded in one call."""
BOUNDARY_SAMPLE = 1000
"""Rows, evenly spaced, for which the whole text is tokenised at once to count differences."""


class Long(NamedTuple):
    """A document beyond the length allowed."""

    record: int
    """Index of its record among those given."""
    source: Source
    length: int


@dataclass(frozen=True, slots=True)
class Tokenised:
    """Examples, and what the policies did to the others."""

    examples: tuple[Example, ...]
    kept: tuple[int, ...]
    """Index of each example's record among those given."""
    expected: tuple[str, ...]
    """The text that decoding each example's supervised tokens must give: answers with their stops as rendered."""
    starts: tuple[int, ...]
    """Where the compared tokens of each example begin; 0 for a plain text, whose first token counts too."""
    dropped: tuple[Long, ...] = ()
    trimmed: tuple[Long, ...] = ()
    boundary_checked: int = 0
    boundary_differences: int = 0
    """Of `boundary_checked` rows, those that tokenise otherwise as one piece. Reported, never used."""
    from_cache: bool = False

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.array([len(e) for e in self.examples], dtype=np.int64)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that are learned, over all examples."""
        return sum(int(e.supervised.sum()) for e in self.examples)

    def summary(self) -> dict[str, Any]:
        """Counts, ready for JSON."""
        return {
            "examples": len(self.examples),
            "tokens": int(self.lengths.sum()),
            "supervised_tokens": self.supervised_tokens,
            "longest": int(self.lengths.max(initial=0)),
            "dropped": len(self.dropped),
            "trimmed": len(self.trimmed),
            "boundary_checked": self.boundary_checked,
            "boundary_differences": self.boundary_differences,
            "from_cache": self.from_cache,
        }


@dataclass(frozen=True, slots=True)
class Preflight:
    """What gate 1 measured."""

    rows: int
    failing: int
    tokens: int
    supervised_tokens: int
    normalised: int
    """Rows whose text comes back as the tokenizer's own normaliser writes it (composed accents, for example)."""
    boundary_checked: int
    boundary_differences: int

    def to_json(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


class _Document(NamedTuple):
    ids: list[int]
    supervised: np.ndarray
    start: int
    prompt: int  # tokens before the first supervised span: what may be trimmed
    expected: str


def tokenise(
    chat: Chat, records: Sequence[Record], *, loss_on: LossOn, max_length: int | None, overflow: Overflow
) -> Tokenised:
    """The work behind `Chat.examples`; see there."""
    documents = list(_documents(chat, records, loss_on))
    limit = max_length if max_length is not None else max((len(d.ids) for d in documents), default=0)
    long = [Long(i, records[i].source, len(d.ids)) for i, d in enumerate(documents) if len(d.ids) > limit]
    if long and overflow == "error":
        raise _too_long("longer than data.max_length", long, limit, len(documents))
    if long and overflow == "trim_prompt":
        # one prompt token stays: it predicts the answer's first
        stuck = [x for x in long if x.length - max(documents[x.record].prompt - 1, 0) > limit]
        if stuck:
            raise _too_long("longer than data.max_length even without their prompt", stuck, limit, len(documents))
        documents = [_trim(chat, d, limit) for d in documents]
    kept = [i for i, d in enumerate(documents) if len(d.ids) <= limit]
    if not kept:
        if not documents:
            raise DataError("there are no rows to tokenise")
        raise DataError("no document is left", given=f"{len(long)} of {len(documents)} dropped for their length")
    examples = tuple(_example(records[i], documents[i]) for i in kept)
    checked, differing = _boundaries(chat, [records[i] for i in kept], loss_on)
    return Tokenised(
        examples,
        tuple(kept),
        tuple(documents[i].expected for i in kept),
        tuple(documents[i].start for i in kept),
        dropped=tuple(long) if overflow == "drop" else (),
        trimmed=tuple(long) if overflow == "trim_prompt" else (),
        boundary_checked=checked,
        boundary_differences=differing,
    )


def preflight(chat: Chat, tokenised: Tokenised) -> Preflight:
    """Gate 1: every row ends in a supervised stop, and its supervised ids decode to the answers as rendered.

    Raises:
        GateError: with the first ten failing rows and what is wrong with each.
    """
    failures: list[tuple[Source, str]] = []
    normalised = 0
    rows = list(zip(tokenised.examples, tokenised.expected, tokenised.starts, strict=True))
    for chunk in _chunks(rows):
        for (example, expected, start), text in zip(chunk, _decoded(chat, chunk), strict=True):
            if reason := _fault(chat, example, start):
                failures.append((example.source, reason))
            elif text != expected:
                if text == _normalised(chat, expected):
                    normalised += 1
                else:
                    failures.append((example.source, _difference(text, expected)))
    if failures:
        lines = [f"{source}: {reason}" for source, reason in failures[:10]]
        raise GateError(
            f"preflight: {len(failures)} of {len(rows)} rows would not train what they say", hint="\n  ".join(lines)
        )
    return Preflight(
        rows=len(rows),
        failing=0,
        tokens=int(tokenised.lengths.sum()),
        supervised_tokens=tokenised.supervised_tokens,
        normalised=normalised,
        boundary_checked=tokenised.boundary_checked,
        boundary_differences=tokenised.boundary_differences,
    )


def _documents(chat: Chat, records: Sequence[Record], loss_on: LossOn) -> Iterator[_Document]:
    for chunk in _chunks(records):
        parts = [chat.parts(r, loss_on) if r.text is None else None for r in chunk]
        texts = [[p.text for p in ps] if ps else [r.text or ""] for r, ps in zip(chunk, parts, strict=True)]
        pieces = iter(_encoded(chat, texts))
        for record, own in zip(chunk, parts, strict=True):
            if own is None:
                document = _plain(chat, record, next(pieces))
            else:
                document = _conversation(
                    [(p.supervised, p.text, next(pieces)) for p in own], everything=loss_on == "all"
                )
            chat.check_bos(document.ids, str(record.source))
            yield document


def _plain(chat: Chat, record: Record, ids: list[int]) -> _Document:
    """Raw text with its stop; everything after the first token is learned."""
    if chat.eos_id is None:
        raise ConfigError("plain text needs an end-of-text token, and the tokenizer has none", where=str(record.source))
    head = [chat.bos_id] if chat.adds_bos and chat.bos_id is not None and ids[:1] != [chat.bos_id] else []
    whole = [*head, *ids, chat.eos_id]
    supervised = np.ones(len(whole), dtype=bool)
    supervised[0] = False
    expected = f"{chat.tokenizer.bos_token if head else ''}{record.text}{chat.tokenizer.eos_token}"
    return _Document(whole, supervised, 0, 0, expected)


def _conversation(pieces: list[tuple[bool, str, list[int]]], *, everything: bool) -> _Document:
    ids = list(chain.from_iterable(piece for _, _, piece in pieces))
    supervised = np.repeat([s or everything for s, _, _ in pieces], [len(piece) for _, _, piece in pieces])
    supervised[0] = False
    prompt = len(pieces[0][2])
    return _Document(ids, supervised, prompt, prompt, "".join(text for answer, text, _ in pieces if answer))


def _trim(chat: Chat, document: _Document, limit: int) -> _Document:
    """Cut the earliest tokens of the prompt, but keep a leading BOS."""
    excess = len(document.ids) - limit
    if excess <= 0:
        return document
    head = int(chat.bos_id is not None and document.ids[0] == chat.bos_id)
    supervised = np.delete(document.supervised, np.s_[head : head + excess])
    supervised[0] = False
    ids = document.ids[:head] + document.ids[head + excess :]
    return document._replace(
        ids=ids, supervised=supervised, start=document.start - excess, prompt=document.prompt - excess
    )


def _too_long(what: str, long: list[Long], limit: int, rows: int) -> DataError:
    lines = [f"{source}: {length} tokens" for _, source, length in long[:10]]
    more = [f"and {len(long) - 10} more"] if len(long) > 10 else []
    return DataError(
        f"{len(long)} of {rows} documents are {what}",
        given=f"data.max_length: {limit}",
        hint="\n  ".join([*lines, *more, "raise data.max_length, or set data.overflow: drop or trim_prompt"]),
    )


def _example(record: Record, document: _Document) -> Example:
    ids = np.array(document.ids, dtype=np.int32)
    return Example(ids, document.supervised, record.source, weight=record.weight, group=record.group)


def _boundaries(chat: Chat, records: Sequence[Record], loss_on: LossOn) -> tuple[int, int]:
    chats = [r for r in records if r.text is None]
    step = max(1, -(-len(chats) // BOUNDARY_SAMPLE))
    sample = [[p.text for p in chat.parts(r, loss_on)] for r in chats[::step]]
    pieces = iter(_encoded(chat, sample))
    wholes = chat.encode(["".join(texts) for texts in sample])
    differing = sum(
        whole != list(chain.from_iterable(next(pieces) for _ in texts))
        for whole, texts in zip(wholes, sample, strict=True)
    )
    return len(sample), differing


def _encoded(chat: Chat, documents: list[list[str]]) -> list[list[int]]:
    """Ids of all pieces of all documents, one after the other."""
    inner = [i > 0 for texts in documents for i in range(len(texts))]
    return chat.encode(list(chain.from_iterable(documents)), inner)


def _decoded(chat: Chat, rows: Sequence[tuple[Example, str, int]]) -> Iterator[str]:
    compared = [_compared(example, start).tolist() for example, _, start in rows]
    inner = iter(chat.decode((ids for ids, row in zip(compared, rows, strict=True) if row[2] > 0), inner=True))
    plain = iter(chat.decode(ids for ids, row in zip(compared, rows, strict=True) if row[2] == 0))
    return (next(inner) if start > 0 else next(plain) for _, _, start in rows)


def _compared(example: Example, start: int) -> np.ndarray:
    mask = example.supervised.copy()
    mask[:start] = False
    if start == 0:
        mask[0] = True  # the first token of a plain text is not predicted, but its bytes may belong to the second
    compared: np.ndarray = example.ids[mask]
    return compared


def _fault(chat: Chat, example: Example, start: int) -> str | None:
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


def _normalised(chat: Chat, text: str) -> str | None:
    normaliser = chat.tokenizer.backend_tokenizer.normalizer
    return None if normaliser is None else str(normaliser.normalize_str(text))


def _difference(text: str, expected: str) -> str:
    at = len(os.path.commonprefix([text, expected]))
    return f"decodes to {text[at : at + 30]!r} where the template wrote {expected[at : at + 30]!r} (character {at})"


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]
