"""Splits: train, validation and test by content, weights of data sets, and the limit of rows.

The split of a row follows from a hash of its group or prompt, not from a shuffle: adding rows never moves another row,
and copies of a prompt never cross (FAILURES 11). The price is that shares are only approximate on small data. Weights
and the limit come after the split and touch training rows only. `runs.dataset` calls `load_data`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from math import floor
from pathlib import Path
from typing import Any

import numpy as np

from rung.config.data import DataConfig, WeightedPath
from rung.data.formats import LoadedRows, load_records
from rung.data.records import Records, encoded_lines, fingerprint, index_of_first_occurrence, normalized_prompt
from rung.errors import ConfigError, DataError
from rung.types import Record

__all__ = [
    "Splits",
    "assign_splits",
    "duplicate_records",
    "normalized_prompt",
    "overlapping_records",
    "split_position",
    "split",
]

Pair = tuple[Record, Record]


@dataclass(frozen=True, slots=True)
class Splits:
    """The three parts of a data config, with counts."""

    train: Records
    validation: Records
    test: Records
    notes: dict[str, Any] = field(default_factory=dict)
    """Counts of dropped and shared rows, as JSON."""

    def summary(self) -> dict[str, Any]:
        """Sizes, duplicates and the fingerprint, as JSON."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            **{name: _split_counts(part) for name, part in parts.items()},
            **self.notes,
            "fingerprint": self.fingerprint,
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content of all three parts, in order; paths and lines of the rows do not count."""
        return sha256("".join(fingerprint(p) for p in (self.train, self.validation, self.test)).encode()).hexdigest()


def split_position(record: Record) -> float:
    """Position of the record's group, or else of its prompt, in [0, 1): equal in every process and on every machine."""
    return float(_split_positions(Records.from_records([record]))[0])


def _split_positions(records: Records) -> np.ndarray:
    """`split_position` of each record, from its stored hashes: float64 [n]."""
    groups = records.groups()
    # the group first: rows of one document must not stand on both sides
    key = np.where(groups.any(axis=1), groups[:, 0], records.prompts()[:, 0])
    # 53 bits are exactly representable, so the value is always below 1
    positions: np.ndarray = (key >> np.uint64(11)) / 2.0**53
    return positions


def assign_splits(records: Iterable[Record], *, validation: float, test: float) -> Splits:
    """Cut by thresholds: [0, test) is test, the next `validation` of the range is validation, the rest is train."""
    stored_records = Records.from_records(records)
    positions = _split_positions(stored_records)
    # test has the low end: changing the validation share never moves a test row
    in_validation = (positions >= test) & (positions < test + validation)
    return Splits(
        train=stored_records.select(np.flatnonzero(positions >= test + validation)),
        validation=stored_records.select(np.flatnonzero(in_validation)),
        test=stored_records.select(np.flatnonzero(positions < test)),
    )


def overlapping_records(left: Iterable[Record], right: Iterable[Record]) -> list[Pair]:
    """Each record of `left` whose normalized prompt also occurs in `right`, with the first such record of `right`."""
    left, right = Records.from_records(left), Records.from_records(right)
    return [(left[i], right[k]) for i, k in zip(*overlapping_pairs(left, right), strict=True)]


def overlapping_pairs(left: Records, right: Records) -> tuple[np.ndarray, np.ndarray]:
    """Indices in `left` and `right` of the pairs of `overlapping_records`."""
    # right comes first, so that the first occurrence of a shared prompt is the one in `right`
    first_indices = index_of_first_occurrence(np.concatenate([right.prompts(), left.prompts()]))[len(right) :]
    left_indices = np.flatnonzero(first_indices < len(right))
    return left_indices, first_indices[left_indices]


def duplicate_records(records: Iterable[Record]) -> list[Pair]:
    """Each record whose normalized prompt occurred in an earlier record, with that record."""
    stored_records = Records.from_records(records)
    return [(stored_records[i], stored_records[k]) for i, k in zip(*duplicate_pairs(stored_records), strict=True)]


def duplicate_pairs(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pairs of `duplicate_records`."""
    first_indices = index_of_first_occurrence(records.prompts())
    copies = np.flatnonzero(first_indices != np.arange(len(records)))
    return copies, first_indices[copies]


def split(
    records: Iterable[Record],
    config: DataConfig,
    *,
    validation: Iterable[Record] | None = None,
    test: Iterable[Record] | None = None,
) -> Splits:
    """Split by the shares of `config`; pass `validation` and `test` where the config names files.

    Raises:
        ConfigError: the shares leave nothing to train on.
        DataError: a requested part is empty, or a prompt occurs in two parts and `data.overlap` is `error`.
    """
    shares = {"validation": _share(config.validation), "test": _share(config.test)}
    if sum(shares.values()) >= 1:
        raise ConfigError("data.validation and data.test leave no training rows", given=shares, allowed="a sum below 1")
    stored_records = Records.from_records(records)
    parts = assign_splits(stored_records, validation=shares["validation"], test=shares["test"])
    parts = Splits(
        parts.train,
        parts.validation if validation is None else Records.from_records(validation),
        parts.test if test is None else Records.from_records(test),
    )
    _refuse_empty(parts, shares, len(stored_records))
    return _resolve_overlap(parts, config)


def _resolve_overlap(parts: Splits, config: DataConfig) -> Splits:
    pairs = {
        "train and validation": (parts.train, parts.validation),
        "train and test": (parts.train, parts.test),
        "validation and test": (parts.validation, parts.test),
    }
    # Within one source no prompt crosses; files, and one prompt in two groups, can overlap.
    leaks = {names: overlapping_pairs(left, right) for names, (left, right) in pairs.items()}
    if config.overlap == "error":
        for names, (left, right) in pairs.items():
            if len(leaks[names][0]):
                raise _overlap_error(names, left.select(leaks[names][0]), right.select(leaks[names][1]))
    # validation and test rows stay: dropping them would change the measurement with the training data
    leaked_rows = np.union1d(leaks["train and validation"][0], leaks["train and test"][0])
    train = parts.train.select(np.delete(np.arange(len(parts.train)), leaked_rows)) if len(leaked_rows) else parts.train
    if not train:
        raise DataError(
            "every training prompt also occurs in the validation or test split",
            given=f"{len(leaked_rows)} training rows",
            hint="hold out another file or a share",
        )
    held_out = _distinct_groups(parts.validation, parts.test)
    # inclusion and exclusion; a group on both sides can make held-out scores look better than they are
    shared = len(held_out) + len(_distinct_groups(train)) - len(_distinct_groups(parts.validation, parts.test, train))
    notes = {
        "overlap_dropped": len(leaked_rows),
        "overlap_validation_test": len(leaks["validation and test"][0]),
        "groups_shared_with_held_out": shared,
    }
    return Splits(train, parts.validation, parts.test, notes)


def _overlap_error(names: str, left: Records, right: Records) -> DataError:
    examples = [f"{left.source(i)} = {right.source(i)}" for i in range(min(5, len(left)))]
    with_train = names.startswith("train")
    remedy = (
        "data.overlap: drop_train leaves the training rows out" if with_train else "take these rows out of one file"
    )
    if left.groups().any():
        remedy += "; the same prompt in two groups also crosses"
    return DataError(f"{len(left)} prompts stand in both {names}", hint="\n  ".join([*examples, remedy]))


def _refuse_empty(parts: Splits, shares: dict[str, float], rows: int) -> None:
    for name, part in (("validation", parts.validation), ("test", parts.test)):
        if shares[name] > 0 and not part:
            raise DataError(
                f"the {name} split is empty: no row (or group) of {rows} fell into its share",
                given=f"data.{name}: {shares[name]}",
                hint=f"use more rows, a larger data.{name}, a file, or data.{name}: 0",
            )
    if not parts.train:
        raise DataError(
            f"the training split is empty: all {rows} rows were held out",
            hint="use more rows, smaller data.validation and data.test, or a data.group with more values",
        )


def _share(value: float | str) -> float:
    return 0.0 if isinstance(value, str) else value


def _distinct_groups(*parts: Records) -> np.ndarray:
    """Distinct hashes of the groups of all parts."""
    groups = np.concatenate([part.groups() for part in parts])
    group_hashes: np.ndarray = groups[groups.any(axis=1)]
    distinct: np.ndarray = group_hashes[index_of_first_occurrence(group_hashes) == np.arange(len(group_hashes))]
    return distinct


def _split_counts(part: Records) -> dict[str, int]:
    groups, (copies, _) = _distinct_groups(part), duplicate_pairs(part)
    return {"rows": len(part), "groups": len(groups), "duplicate_prompts": len(copies)}


_LIMIT_STREAM = 0x11317  # a random stream of its own, so that the draw is independent of other uses of the seed


def load_data(config: DataConfig, seed: int) -> Splits:
    """Read, split, weight and limit the data of a config.

    Raises:
        ConfigError: a set is named twice, or the shares leave nothing to train on.
        DataError: a source or row cannot be used, a split is empty, or splits overlap, by the policies of the config.
    """
    paths = weighted_paths(config)
    sets = [_load_set(config, p) for p in paths]
    held_out_rows = {
        name: _load_held_out(config, value)
        for name, value in (("validation", config.validation), ("test", config.test))
    }
    splits = split(
        Records.concatenate([loaded.records for loaded in sets]),
        config,
        validation=held_out_rows["validation"].records if held_out_rows["validation"] else None,
        test=held_out_rows["test"].records if held_out_rows["test"] else None,
    )
    # after the split: repeated rows must not change which rows are held out, or count as duplicates
    train = limit_records(
        repeat_by_weight(splits.train, {str(Path(p.path)): p.weight for p in paths}), config.limit, seed
    )
    notes = {
        **splits.notes,
        "rows_before_weights": len(splits.train),
        "sets": [_set_summary(p, loaded) for p, loaded in zip(paths, sets, strict=True)],
        "held_out_files": {name: _set_summary(None, loaded) for name, loaded in held_out_rows.items() if loaded},
    }
    return replace(splits, train=train, notes=notes)


def weighted_paths(config: DataConfig) -> tuple[WeightedPath, ...]:
    """The data sets of a config; a single path has weight 1.

    Raises:
        ConfigError: no set, or one named twice.
    """
    paths = (WeightedPath(path=config.path),) if isinstance(config.path, str) else config.path
    names = [str(Path(p.path)) for p in paths]  # normalized as in the source of every record
    if not names:
        raise ConfigError("data.path names no data set", allowed="a path, or a list of {path, weight}")
    if duplicates := [n for n in names if names.count(n) > 1]:
        raise ConfigError("data.path names a set twice", given=duplicates[0], hint="name it once and give it a weight")
    return paths


def repeat_by_weight(records: Iterable[Record], weights: Mapping[str, float]) -> Records:
    """Repeat the records of each set `weight` times; a fraction is taken evenly in the order of their hashes.

    Weight 2 gives every record twice, 0.5 every second one, 1.5 every one once and every second one twice. Within a set
    the order of the file is kept.
    """
    stored_records = Records.from_records(records)
    selections = [np.empty(0, dtype=np.int64)]
    for path, weight in weights.items():
        set_rows = stored_records.indices_from_path(path)
        full_copies, fraction = floor(weight), weight - floor(weight)
        selections += [set_rows] * full_copies
        if fraction:
            # by content, not by position: another order of the file takes the same rows
            digests = np.frombuffer(
                b"".join(map(_order_digest, encoded_lines(stored_records.select(set_rows)))), ">u8"
            ).reshape(-1, 2)
            order = np.lexsort((digests[:, 1], digests[:, 0]))
            fraction_rows = [i for rank, i in enumerate(order) if floor((rank + 1) * fraction) > floor(rank * fraction)]
            selections.append(set_rows[np.sort(fraction_rows)] if fraction_rows else set_rows[:0])
    return stored_records.select(np.concatenate(selections))


def limit_records(records: Iterable[Record], limit: int | None, seed: int) -> Records:
    """At most `limit` records, drawn by the seed; a smaller limit draws a subset of a larger one's rows."""
    stored_records = Records.from_records(records)
    if limit is None or limit >= len(stored_records):
        return stored_records
    return stored_records.select(
        np.sort(np.random.default_rng([seed, _LIMIT_STREAM]).permutation(len(stored_records))[:limit])
    )


def _order_digest(line: bytes) -> bytes:
    """128 bits that order the rows of a set."""
    # hashed twice, so that the order is independent of the fingerprint's hashes
    return sha256(sha256(line).hexdigest().encode()).digest()[:16]


def _load_set(config: DataConfig, weighted_path: WeightedPath) -> LoadedRows:
    """Load a set with its own group column and task, where the config gives them."""
    # a task given for the set replaces the column of tasks
    task = None if weighted_path.task is not None else config.task
    loaded = load_records(
        config.model_copy(update={"group": weighted_path.group or config.group, "task": task}), weighted_path.path
    )
    if weighted_path.task is None:
        return loaded
    return replace(
        loaded, records=Records.from_records(replace(record, task=weighted_path.task) for record in loaded.records)
    )


def _load_held_out(config: DataConfig, value: float | str) -> LoadedRows | None:
    return load_records(config, value, held_out=True) if isinstance(value, str) else None


def _set_summary(path: WeightedPath | None, loaded: LoadedRows) -> dict[str, object]:
    return {
        "path": loaded.path,
        "weight": path.weight if path else None,
        "format": loaded.format,
        "mapping": loaded.mapping,
        "kept": len(loaded.records),
        "rejected": len(loaded.rejected_rows),
        "rejected_first": _line_numbers(loaded.rejected_rows[:10]),
    }


def _line_numbers(rejected_rows: Iterable[object]) -> list[str]:
    return [str(r) for r in rejected_rows]
