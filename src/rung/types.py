"""The shapes that cross module borders. Importing this file stays light: torch is only named in annotations.

Suffixes: T tokens of a packed row, N entries of a loss index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch

MessageRole = Literal["system", "user", "assistant", "tool"]
Unit = Literal["tokens", "sequences", "pairs"]


class Source(NamedTuple):
    """Where a row came from; `line` counts from 1 (for parquet, json and hub data it is the row number)."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path} line {self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `tool_calls` is JSON text, never a nested object: a columnar store would invent null fields."""

    role: MessageRole
    content: str
    tool_calls: str | None = None
    name: str | None = None
    """The tool's name on a `tool` turn, where the data gives one."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Another answer to the prompt of a record."""

    content: str
    score: float
    """On the scale of the record's own score: higher is better."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row of data in the single internal form.

    `messages` never hold the context: `data.chat` puts it in front of the first user turn, so that evaluation can
    withhold it. `text` is set for plain-text rows, which have no turns at all.
    """

    messages: tuple[Message, ...]
    source: Source
    context: str | None = None
    tools: str | None = None
    """JSON text of the tool schemas offered to the model."""
    group: str | None = None
    """Rows of one group go to one split and are one cluster in every interval."""
    weight: float = 1.0
    text: str | None = None
    task: str | None = None
    """Which of several tasks it belongs to: methods with something learned for each task choose by it."""
    score: float | None = None
    """How good the answer is, where answers are compared or rated."""
    candidates: tuple[Candidate, ...] = ()
    """Other answers to the same prompt; the record's own is the best of all."""

    @property
    def question(self) -> str:
        """Text of the last user turn: what a person asked."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), self.text or "")

    @property
    def is_undesirable(self) -> bool:
        """Whether its own answer is labelled as a bad one: nothing to be learned or expected."""
        return self.score is not None and self.score <= 0.0 and not self.candidates

    @property
    def is_prompt_only(self) -> bool:
        """Whether it is a prompt alone: nothing to be learned or expected."""
        return bool(self.messages) and not self.answer and not self.messages[-1].tool_calls

    @property
    def answer(self) -> str:
        """Text of the final assistant turn: what is expected."""
        return self.messages[-1].content if self.messages and self.messages[-1].role == "assistant" else ""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenized document.

    `ids` is int32 [T]. `supervised` is bool [T]: True where the token must be predicted; never the first.
    """

    ids: np.ndarray
    supervised: np.ndarray
    source: Source
    weight: float = 1.0
    group: str | None = None
    task: str | None = None
    row: int = -1
    """Documents of one row of the data share it and are never parted; -1 stands alone."""
    score: float | None = None
    """Of its answer, where the data has one."""
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further values of each supervised token but the first, which nothing predicts; each [predictions]."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def predictions(self) -> int:
        """How many of its tokens are predicted and learned from."""
        return int(self.supervised[1:].sum())


class Segment(NamedTuple):
    """Rows [start, end) of a packed batch. It attends to its ancestors and, causally, to itself."""

    start: int
    end: int
    parent: int | None
    """Index of the parent in the batch's list of segments; a parent always stands before its children."""


@dataclass(frozen=True, slots=True)
class LossIndex:
    """N predictions: the hidden state at `source` must predict `target`, with `weight`, for sequence `owner`.

    A list, not one target per position: the last token of a shared prompt predicts the first token of every child.
    """

    source: torch.Tensor  # int64 [N], row positions
    target: torch.Tensor  # int64 [N], token ids
    weight: torch.Tensor  # float32 [N]
    owner: torch.Tensor  # int64 [N], index of the sequence within the batch
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further per-entry values an objective needs, each [N]."""


class CachedHidden(NamedTuple):
    """Hidden states that enter a layer, computed before: the layers below it do not run."""

    layer: int
    states: torch.Tensor  # [T, H]


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """Tokens that several rows of one step begin with: computed once, their keys and values stand before each row."""

    ids: torch.Tensor  # int64 [P], positions 0 to P - 1
    cached_hidden: CachedHidden | None = None
    """As in `PackedBatch`."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One flat row of real tokens; there is no padding anywhere."""

    ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T], restarting per document
    segments: tuple[Segment, ...]
    loss: LossIndex
    sequences: int
    """How many documents the batch holds."""
    document_tokens: int
    """Tokens as the user counts them: each document's own, whether or not a prefix is shared."""
    documents: Sequence[Example] = ()
    """By sequence: what the row was made of."""
    rows: Sequence[np.ndarray] = ()
    """By sequence: where its tokens stand in the row, from the first that is not in the prefix; int64."""
    prefix: SharedPrefix | None = None
    """What every root of the row comes after; no entry of the loss index looks into it."""
    cached_hidden: CachedHidden | None = None
    """What enters the lowest layer that moves, for every token of the row; None where the embeddings do."""

    def without_cached_hidden(self) -> PackedBatch:
        """The same documents without states that were computed before: those are of this run's model."""
        prefix = None if self.prefix is None else replace(self.prefix, cached_hidden=None)
        return replace(self, prefix=prefix, cached_hidden=None)

    @property
    def is_single_row(self) -> bool:
        """Whether it holds one document, or those of one row of the data: smaller batches cannot be made of it."""
        rows = {document.row for document in self.documents}
        return self.sequences == 1 or (len(rows) == 1 and -1 not in rows)

    @property
    def task(self) -> str | None:
        """Of all its documents: rows never mix tasks."""
        return self.documents[0].task if self.documents else None


ON_POLICY = "own"
"""Column of documents some of which the policy wrote itself: 1 for their tokens, 0 for those of the data."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Answers that the policy made itself; those to one prompt share their `row`."""

    documents: Sequence[Example]
    """Prompt and answer, the answer supervised."""
    rewards: Sequence[float]
    """What each is worth."""
    stopped: Sequence[bool]
    """False for an answer that was cut."""
    evaluate_documents: Callable[[Callable[[PackedBatch], torch.Tensor]], list[np.ndarray]]
    """Values [N] of packed batches, without gradient, brought back to the documents: each [predictions]."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What a loss is divided by, summed over a window of batches and over all ranks."""

    tokens: float = 0.0
    sequences: float = 0.0
    pairs: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens + other.tokens, self.sequences + other.sequences, self.pairs + other.pairs)

    def __getitem__(self, unit: Unit) -> float:
        return {"tokens": self.tokens, "sequences": self.sequences, "pairs": self.pairs}[unit]


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A **sum** of losses in nats with the unit it is counted in; the engine alone divides."""

    total: torch.Tensor
    unit: Unit
    name: str = "loss"
