"""How answers are made and scored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from rung.config.base import Config
from rung.config.judge import JudgeConfig

Context = Literal["given", "withheld", "retrieved"]

MetricName = Literal["exact", "normalized", "numeric", "token_f1", "rouge_l", "perplexity"]


class RetrievalConfig(Config):
    """Passages found by BM25, which take the place of a row's own context."""

    documents: str | None = None
    """A folder of .txt and .md files, one such file, or a .jsonl, .json, .csv or .parquet file or a `datasets` name
    with a text in every row; none takes the contexts of the run's own rows, of all splits and whatever
    `data.limit` leaves to be learned from."""
    column: str | None = None
    """Column of the texts, where documents are rows; none is `text`."""
    chunk_words: PositiveInt = 200
    """Words of a passage; a longer document is cut."""
    overlap: NonNegativeInt = 40
    """Words that neighbouring passages of a document share."""
    top_k: PositiveInt = 3
    """Passages for each question."""

    @model_validator(mode="after")
    def _passages_move_on(self) -> RetrievalConfig:
        if self.overlap >= self.chunk_words:
            raise ValueError("overlap is below chunk_words, or passages would never move on")
        if self.column is not None and self.documents is None:
            raise ValueError("column names one of a file of documents, and no documents are named")
        return self


class EvaluationConfig(Config):
    """Greedy answers to held-out questions, scored item by item."""

    metrics: tuple[MetricName, ...] = Field(default=("exact", "numeric"), min_length=1)
    """Scores to report; the first one decides."""
    instruction: str | None = None
    """System turn given to the untuned rungs: the strongest honest prompt you have. Tuned rungs do without it."""
    shots: NonNegativeInt = 4
    """Worked examples in front of each question of the few-shot rung, taken from the training split."""
    context: Context = "given"
    """What stands before the question, of tuned rungs in training too: the row's own context, nothing, or passages that
    are retrieved for it. A rung may say otherwise."""
    retrieve: RetrievalConfig | None = None
    """Where passages come from; none is the default of each of its settings."""
    max_new_tokens: PositiveInt = 64
    """Longest answer in tokens."""
    limit: PositiveInt | None = None
    """Use at most this many test items, taken in the order of the seed; of the validation split too, where instructions
    are chosen on it."""
    dequantize: bool = False
    """Answer from a copy of a quantized base in full width: the same numbers, faster, in more memory (qlora only)."""
    batch: PositiveInt = 32
    """Questions answered at once."""
    judge: JudgeConfig | None = None
    """Who says which of two answers is better, for `rung eval RUN --baseline OTHER`."""
