"""Where the examples come from and what of them is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rung.config.base import Config, Fraction

Format = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "text",
    "preference",
    "ranked",
    "rated",
    "unpaired_preference",
    "prompt_only",
]
LossOn = Literal["answer", "assistant_turns", "all"]


class WeightedPath(Config):
    """One data set of a mixture."""

    path: str
    """A .jsonl, .json, .csv or .parquet file, or the name of a `datasets` set."""
    weight: PositiveFloat = 1.0
    """Times each training row appears per epoch; 0.5 takes every second row. Applied after the split."""
    group: str | None = None
    """Column that keeps rows of this set together; none takes `data.group`."""
    task: str | None = None
    """Task that all rows of this set belong to; none reads the column `data.task`, where there is one."""


class DataConfig(Config):
    """Data set, split, and the one path from row to supervised tokens."""

    path: str | tuple[WeightedPath, ...] = Field(default=...)
    """A file or `datasets` name, or a list of {path, weight}."""
    format: Format = "auto"
    """`auto` looks at all rows and refuses ambiguity."""
    map: dict[str, str] = Field(default_factory=dict)
    """Other column names: {our name: column in the file}, for example {question: query, answer: gold}."""
    validation: Fraction | str = 0.1
    """Share held out for validation, or a file. 0 is none."""
    test: Fraction | str = 0.1
    """Share held out for the test, or a file. 0 is none."""
    group: str | None = None
    """Column whose value keeps rows together in one split and in one cluster."""
    task: str | None = None
    """Column that names the task of each row, for methods that learn something for each (prompt, prefix, p_tuning)."""
    limit: PositiveInt | None = None
    """Use at most this many training rows, taken in the order of the seed."""
    max_length: PositiveInt | None = None
    """Longest document in tokens; none is the model's own limit."""
    overflow: Literal["error", "drop", "trim_prompt"] = "error"
    """What happens to a document beyond `max_length`."""
    rejects: Literal["error", "drop"] = "error"
    """What happens to a row that cannot be read as an example."""
    overlap: Literal["error", "drop_train"] = "error"
    """What happens when a training prompt also stands in the validation or test split."""
    loss_on: LossOn = "answer"
    """Which tokens are learned: the final answer, every assistant turn, or everything."""
