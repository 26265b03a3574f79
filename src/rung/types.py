"""Data types that packages pass to each other: records, tokenized examples, packed batches, rollouts and losses.

They are frozen dataclasses and tuples without behavior, so that every package can import them without importing
another. torch and numpy are named in annotations only, which keeps the import light for commands without a model.
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
    """Origin of a data row. `line` counts from 1; for parquet, json and hub data it is the row number."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path} line {self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `tool_calls` is JSON text, not an object: a columnar store would add null fields to objects."""

    role: MessageRole
    content: str
    tool_calls: str | None = None
    name: str | None = None
    """Name of the tool on a `tool` turn, if the data has one."""
    reasoning: str | None = None
    """Thoughts before the answer of an assistant turn, which the template writes in its own form."""
    tool_call_id: str | None = None
    """On a `tool` turn: id of the call that it answers."""
    is_learned: bool = True
    """False for an assistant turn that the data marks as not to be learned; it stays part of the conversation."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Another answer to the prompt of a record."""

    content: str
    score: float
    """Higher is better; same scale as the score of the record."""
    tool_calls: str | None = None
    reasoning: str | None = None


class CodeTests(NamedTuple):
    """Tests of the program that an answer holds, in Python."""

    source: str
    """Runs after the program, and raises where the program is wrong."""
    setup: str = ""
    """Runs before the program: imports, or the head of the function that the program completes."""


@dataclass(frozen=True, slots=True)
class Record:
    """One data row in the internal form that all formats are converted to.

    `messages` do not contain the context: `data.chat` puts it in front of the first user turn, so that evaluation can
    withhold or replace it. `text` is set for plain-text rows, which have no turns.
    """

    messages: tuple[Message, ...]
    source: Source
    context: str | None = None
    tools: str | None = None
    """JSON text of the schemas of the tools offered to the model."""
    group: str | None = None
    """Rows of one group are in one split and form one cluster in confidence intervals."""
    weight: float = 1.0
    text: str | None = None
    task: str | None = None
    """Name of the task; methods with parameters per task select them by it."""
    score: float | None = None
    """Rating of the answer, for data with compared or rated answers."""
    candidates: tuple[Candidate, ...] = ()
    """Other answers to the same prompt. The answer in `messages` is the best."""
    references: tuple[str, ...] = ()
    """Further answers that are accepted: metrics and rewards take the best score over the answer and these."""
    probability: float | None = None
    """Of a pair with a soft label: probability that the answer in `messages` is the better one, from 0.5 to 1. None:
    certain."""
    tests: CodeTests | None = None
    """Tests of the program in an answer, for the metric and the reward `code`."""

    @property
    def question(self) -> str:
        """Text of the last user turn; for plain-text rows the text."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), self.text or "")

    @property
    def is_undesirable(self) -> bool:
        """Whether the only answer is labeled as bad, so that there is nothing to imitate or expect."""
        # with candidates the score orders answers; alone, 0 or less is the label "bad" of unpaired preferences
        return self.score is not None and self.score <= 0.0 and not self.candidates

    @property
    def is_excluded(self) -> bool:
        """Whether the data marks the final answer as not to be learned: there is nothing to imitate or expect."""
        return bool(self.messages) and not self.messages[-1].is_learned

    @property
    def is_prompt_only(self) -> bool:
        """Whether the record has no answer."""
        return bool(self.messages) and not self.answer and not self.messages[-1].tool_calls

    @property
    def answer(self) -> str:
        """Text of the final assistant turn, the expected answer; empty where there is none."""
        return self.messages[-1].content if self.messages and self.messages[-1].role == "assistant" else ""


# eq=False: comparing arrays gives arrays, so == of two examples would raise
@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenized document.

    `ids` is int32 [T]. `supervised` is bool [T]: True where the token is a target of the loss; the first never is.
    """

    ids: np.ndarray
    supervised: np.ndarray
    source: Source
    weight: float = 1.0
    group: str | None = None
    task: str | None = None
    row: int = -1
    """Number of the data row; documents of one row stay in one batch. -1: a document of its own."""
    score: float | None = None
    """Score of the answer, if the data has one."""
    probability: float | None = None
    """Of an answer of a pair with a soft label: probability that it is the better one. None: as the scores say."""
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further values per predicted token, each [predictions], for example old log-probabilities."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def predictions(self) -> int:
        """Number of predicted tokens."""
        # from the second token on: nothing predicts the first
        return int(self.supervised[1:].sum())


class Segment(NamedTuple):
    """Positions [start, end) of a packed row. A segment attends to its ancestors and, causally, to itself."""

    start: int
    end: int
    parent: int | None
    """Index of the parent segment in the batch; parents precede their children."""


@dataclass(frozen=True, slots=True)
class LossIndex:
    """N predictions: the hidden state at `source` predicts `target`, with `weight`, for sequence `owner`.

    A list instead of one target per position: the last token of a shared prompt predicts the first token of each child.
    """

    source: torch.Tensor  # int64 [N], row positions
    target: torch.Tensor  # int64 [N], token ids
    weight: torch.Tensor  # float32 [N]
    owner: torch.Tensor  # int64 [N], index of the sequence within the batch
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further per-entry values an objective needs, each [N]."""


class CachedHidden(NamedTuple):
    """Cached hidden states that enter a layer; the layers below it are skipped."""

    layer: int
    states: torch.Tensor  # [T, H]


# eq=False: batches share a prefix by identity, and it is a key of dictionaries
@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """Prefix of several rows of one step: computed once, its keys and values precede each row (decision 0008)."""

    ids: torch.Tensor  # int64 [P], positions 0 to P - 1
    cached_hidden: CachedHidden | None = None
    """As in `PackedBatch`."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One flat row of tokens without padding."""

    ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T], restarting per document
    segments: tuple[Segment, ...]
    loss: LossIndex
    sequences: int
    """Number of documents."""
    document_tokens: int
    """Sum of the document lengths; a shared prefix counts for every document."""
    documents: Sequence[Example] = ()
    """The documents of the row, by sequence."""
    rows: Sequence[np.ndarray] = ()
    """Positions of the document's tokens in the row, without those of the prefix; int64, by sequence."""
    prefix: SharedPrefix | None = None
    """Precedes every root segment; no entry of the loss index refers to it."""
    cached_hidden: CachedHidden | None = None
    """States that enter the lowest trained layer, per token of the row; None: run from the embeddings."""

    def without_cached_hidden(self) -> PackedBatch:
        """The batch without cached states, for another model: they belong to the trained model."""
        prefix = None if self.prefix is None else replace(self.prefix, cached_hidden=None)
        return replace(self, prefix=prefix, cached_hidden=None)

    @property
    def holds_one_data_row(self) -> bool:
        """Whether the batch cannot be split: it holds one document, or the documents of one data row."""
        rows = {document.row for document in self.documents}
        return self.sequences == 1 or (len(rows) == 1 and -1 not in rows)

    @property
    def task(self) -> str | None:
        """Task of all documents; batches do not mix tasks."""
        return self.documents[0].task if self.documents else None


ON_POLICY = "own"
"""Name of the column that marks tokens generated by the policy with 1 and tokens of the data with 0."""


SAMPLER_LOGRATIO = "sampler_logratio"
"""Name of the column with log p_policy - log p_sampler in nats of the tokens that a server has drawn."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Answers generated by the policy; the answers to one prompt share their `row`."""

    documents: Sequence[Example]
    """Prompt and answer; the tokens of the answer are supervised."""
    rewards: Sequence[float]
    """Reward of each answer, penalties included."""
    stopped: Sequence[bool]
    """False for an answer truncated at the maximum length."""
    evaluate_documents: Callable[[Callable[[PackedBatch], torch.Tensor]], list[np.ndarray]]
    """Applies a function of packed batches (values [N], no gradient); returns [predictions] per document."""
    policy_logprobs: Sequence[np.ndarray] | None = None
    """Log-probabilities of the policy, [predictions] per document, where they are known already."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Divisors of losses by unit, summed over a window of batches and over all ranks."""

    tokens: float = 0.0
    sequences: float = 0.0
    pairs: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens + other.tokens, self.sequences + other.sequences, self.pairs + other.pairs)

    def __getitem__(self, unit: Unit) -> float:
        return {"tokens": self.tokens, "sequences": self.sequences, "pairs": self.pairs}[unit]


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A **sum** of losses in nats and its unit; only `training.step` divides (decision 0001)."""

    total: torch.Tensor
    unit: Unit
    name: str = "loss"
