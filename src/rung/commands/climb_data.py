"""The rows of a climb: its own three splits, and the rows that single rungs learn from or show as examples.

All rungs answer the test split of the climb, so rows from elsewhere must not ask what it asks: they are refused, or
left out where the section says `overlap: drop_train`. Prompts are compared by their words, because such rows often have
another form than those of the climb; a made row that asks the same in other words is not found. `climb.py` holds one
`ClimbData`, `climb_prompts.py` takes worked examples from it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from rung.config.climb import OnTopConfig, RungConfig
from rung.config.climb_runs import on_top_run_config, rung_data
from rung.config.data import DataConfig
from rung.config.run import RunConfig
from rung.console import print_status
from rung.data.deduplication import prompt_words
from rung.data.records import Records
from rung.data.splits import Splits, weighted_paths
from rung.errors import ConfigError, DataError
from rung.runs.dataset import read_splits
from rung.types import Record


class ClimbData:
    """The splits of a climb and of its rungs. Rows of the climb itself were split by content and meet no test row."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._own_splits: dict[str, Splits] = {}  # by the label of a rung

    @cached_property
    def splits(self) -> Splits:
        """The splits of the section `data`."""
        return read_splits(self.config)

    def splits_of(self, rung: RungConfig) -> Splits:
        """The rows of a rung, with the test split of the climb.

        Raises `DataError` for rows that ask what the test asks, and as `read_splits`.
        """
        if not rung.data:
            return self.splits
        if rung.label not in self._own_splits:
            data, where = rung_data(self.config, rung), f"climb.rungs {rung.label}"
            self._own_splits[rung.label] = self.read_own_splits(data, where)
        return self._own_splits[rung.label]

    def read_own_splits(self, data: DataConfig, where: str) -> Splits:
        """The rows of a section `data` of a rung's own, with the test split of the climb."""
        splits = _read_rows(self.config.model_copy(update={"data": data}))
        return replace(self._without_test_rows(data, splits, where), test=self.splits.test)

    def read_on_top(self, config: RunConfig, on_top: OnTopConfig) -> Splits:
        """The rows of a run on top of a tuned one; `config` is its run."""
        if not on_top.data:
            return read_splits(config)
        return self._without_test_rows(config.data, _read_rows(config), f"climb.on_top {on_top.label}")

    def check_on_top_rows(self, on_top: OnTopConfig) -> None:
        """Raise `DataError` or `ConfigError` for a rung on top whose rows cannot be used or are rows of the test."""
        # Only the data of this config is read. Its base is not trained yet, so the climb's base stands in for it.
        base = self.config.model.student_of or self.config.model.name
        config = on_top_run_config(self.config, on_top, base, "unused", self.config.seed)
        splits, where = self.read_on_top(config, on_top), f"climb.on_top {on_top.label}"
        if config.objective.kind == "reward":
            raise ConfigError("a reward model writes nothing that a ladder could score", where=where)
        has_comparisons = any(record.candidates or record.score is not None for record in splits.train)
        if config.objective.kind == "preference" and not has_comparisons:
            raise DataError("these rows compare nothing", where=where, given=_paths(config.data))

    @cached_property
    def _test_prompts(self) -> dict[tuple[str, ...], Record]:
        # the whole split: a question that evaluation.limit leaves out may be asked by a later climb
        return {tuple(prompt_words(record)): record for record in self.splits.test}

    def _without_test_rows(self, data: DataConfig, splits: Splits, where: str) -> Splits:
        """The splits without the rows that ask what the test asks, whether or not context and question are one text.

        Raises `DataError` where there are such rows and `data.overlap` is `error`, or no others.
        """
        train, validation = (self._indices_of_test_prompts(part) for part in (splits.train, splits.validation))
        if not (count := len(train) + len(validation)):
            return splits
        if data.overlap == "error":
            row = splits.train[train[0]] if train else splits.validation[validation[0]]
            test_row = self._test_prompts[tuple(prompt_words(row))]
            summary = f"{count} rows of this rung ask what the test asks"
            hint = f"take them out of {_paths(data)}, or set `overlap: drop_train` in the rung's data"
            raise DataError(summary, where=str(row.source), given=f"the same prompt as {test_row.source}", hint=hint)
        print_status(f"{where}: {count:,} rows ask what the test asks and are left out")
        # validation rows too: training may stop by them
        kept = (_without(splits.train, train), _without(splits.validation, validation))
        if not kept[0]:
            raise DataError("every training row of this rung asks what the test asks", where=where, given=_paths(data))
        notes = {**splits.notes, "overlap_dropped": splits.notes.get("overlap_dropped", 0) + count}
        return replace(splits, train=kept[0], validation=kept[1], notes=notes)

    def _indices_of_test_prompts(self, records: Records) -> list[int]:
        return [i for i, record in enumerate(records) if tuple(prompt_words(record)) in self._test_prompts]


def _read_rows(config: RunConfig) -> Splits:
    """The splits of rows that are trained on and shown, but never scored: no metric asks anything of them."""
    evaluation = config.evaluation.model_copy(update={"metrics": ("exact",)})
    return read_splits(config.model_copy(update={"evaluation": evaluation}))


def _without(records: Records, indices: list[int]) -> Records:
    return records.select(np.delete(np.arange(len(records)), indices))


def _paths(data: DataConfig) -> str:
    return ", ".join(path.path for path in weighted_paths(data))
