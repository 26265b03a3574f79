"""The data of a run: its sets, splits and tokens, and test items that occur in the training rows."""

from __future__ import annotations

from typing import Any

from rung.results.base import Estimate, Result


class SplitResult(Result):
    """One split of the data."""

    rows: int = 0
    groups: int = 0
    """Groups that are never cut in two, for example the rows of one document."""
    duplicate_prompts: int = 0


class DataSetResult(Result):
    """One data file."""

    path: str = ""
    weight: float = 1.0
    kept: int = 0
    rejected: int = 0
    removed_end_tokens: dict[str, int] = {}
    """Answers that ended in each end token, which was removed."""


class SplitsResult(Result):
    """The splits of a run's data, and the files they come from."""

    train: SplitResult | None = None
    validation: SplitResult | None = None
    test: SplitResult | None = None
    sets: tuple[DataSetResult, ...] = ()
    overlap_dropped: int = 0
    """Rows dropped because their prompt also occurs in another split."""
    fingerprint: str | None = None

    def by_name(self) -> dict[str, SplitResult]:
        """The splits that exist."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}


class TokenResult(Result):
    """Tokens of the training rows."""

    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    """Tokens of the longest row."""
    dropped: int = 0
    trimmed: int = 0
    control_tokens: dict[str, Any] | None = None
    """Rows with control tokens in their text, by token, and how many were left out; None without such rows."""
    not_rendered: dict[str, Any] | None = None
    """Rows that the template refused or that failed gate 1, under `data.rejects: drop`; None without such rows."""


class DataResult(Result):
    """The data of a run."""

    splits: SplitsResult = SplitsResult()
    train: TokenResult | None = None


class ContaminationTier(Result):
    """Test items that match training rows in one way: exactly, by n-grams, or nearly."""

    items: int
    examples: tuple[dict[str, Any], ...] = ()
    scores_without: dict[str, Estimate] | None = None
    """Scores of all other items; None where no item is left."""
    scores_of_them: dict[str, Estimate] | None = None


class ContaminationResult(Result):
    """Test items that also stand in the training rows."""

    unknown: str | None = None
    """Why it could not be measured."""
    items: int = 0
    train_rows: int = 0
    tiers: dict[str, ContaminationTier] = {}
