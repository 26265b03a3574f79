"""The `data` section: sources, formats, splits, and which tokens of a row are trained on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from rung.config.base import Config, Fraction

AnswerFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text"]
ComparisonFormat = Literal["preference", "ranked", "rated", "unpaired_preference"]
# `rung.data.formats` reads each of them; `auto` chooses by the columns of all rows
Format = Literal["auto", AnswerFormat, ComparisonFormat, "prompt_only"]
LossOn = Literal["answer", "assistant_turns", "all"]
UnknownFields = Literal["error", "ignore"]
ControlTokens = Literal["text", "error", "drop", "keep"]


class WeightedPath(Config):
    """One data set of a mixture."""

    path: str
    """As `data.path`: a file, a pattern, a folder of files, or the name of a Hugging Face `datasets` data set."""
    weight: PositiveFloat = 1.0
    """How often each training row appears per epoch; 0.5 takes half of the rows. Applied after the split."""
    group: str | None = None
    """Group column of this data set; default: `data.group`."""
    task: str | None = None
    """Task of all rows of this data set; default: the column `data.task`, if set."""
    format: Format | None = None
    """Format of the rows of this data set; default: `data.format`."""


class DataConfig(Config):
    """Data sets, splits, and how rows become supervised tokens."""

    path: str | tuple[WeightedPath, ...] = Field(default=...)
    """A file of rows (.jsonl, .ndjson, .json, .csv, .tsv, .parquet; text also as .gz, .bz2 or .zst), a pattern such as
    data/*.jsonl, a folder of such files or of `save_to_disk`, a `datasets` name, or a list of these or of
    {path, weight, format}."""
    format: Format = "auto"
    """Row format. `auto` detects it from all rows and refuses ambiguous data."""
    map: dict[str, str] = Field(default_factory=dict)
    """Column names that differ: {Rung's name: column in the file}, for example {question: query, answer: gold}."""
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(default_factory=dict)
    """Names of roles in the file that Rung does not know: {name in the file: role}, for example {bot: assistant}."""
    validation: Fraction | str = 0.1
    """Share of the rows held out for validation, or a file; 0: no validation split."""
    test: Fraction | str = 0.1
    """Share of the rows held out for the test, or a file; 0: no test split."""
    group: str | None = None
    """Column of group names. Rows of one group are in the same split and form one cluster in intervals."""
    task: str | None = None
    """Column with the task of each row, for methods with parameters per task (prompt, prefix, p_tuning)."""
    limit: PositiveInt | None = None
    """Maximum number of training rows, a random sample by the seed."""
    max_length: PositiveInt | None = None
    """Maximum document length in tokens; default: the limit of the model."""
    overflow: Literal["error", "drop", "trim_prompt"] = "error"
    """For documents longer than `max_length`: stop, leave the row out, or shorten the prompt."""
    rejects: Literal["error", "drop"] = "error"
    """For rows that cannot be read or rendered as an example: stop, or leave them out."""
    unknown_fields: UnknownFields = "error"
    """For fields of a turn that nothing reads, for example a date beside role and content: refuse the row, or leave
    the fields out and count them."""
    control_tokens: ControlTokens | None = None
    """For control tokens of the tokenizer in the text of a row, such as <|im_end|> in a question: encode them as text,
    stop, leave the row out, or keep them as control tokens. Default: text in conversations, whose end tokens at the end
    of answers are removed; a plain text with control tokens is a row that cannot be read."""
    overlap: Literal["error", "drop_train"] = "error"
    """For training prompts that also occur in the validation or test split: stop, or leave out the training rows."""
    loss_on: LossOn = "answer"
    """Tokens that are trained on: the final answer, every assistant turn, or all tokens."""

    @field_validator("path", mode="before")
    @classmethod
    def _expand_paths(cls, path: Any) -> Any:
        return [{"path": p} if isinstance(p, str) else p for p in path] if isinstance(path, list | tuple) else path

    @property
    def held_out_files(self) -> dict[str, str]:
        """Files of the validation and the test split, as far as they are files."""
        values = {"validation": self.validation, "test": self.test}
        return {name: value for name, value in values.items() if isinstance(value, str)}

    @property
    def held_out_shares(self) -> dict[str, float]:
        """Shares of the validation and the test split; 0 for a file."""
        values = {"validation": self.validation, "test": self.test}
        return {name: 0.0 if isinstance(value, str) else value for name, value in values.items()}
