"""Train, validation and test by content: adding rows never moves a row, and copies never cross (FAILURES 11)."""

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
from rung.data.records import Records, encoded_lines, fingerprint, first_occurrence, normalized_prompt
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
    """The three parts of a data config, and what was counted on the way."""

    train: Records
    validation: Records
    test: Records
    notes: dict[str, Any] = field(default_factory=dict)
    """Counts of what was dropped or kept aside, as JSON."""

    def summary(self) -> dict[str, Any]:
        """Sizes, duplicates and the fingerprint, ready for JSON."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {**{name: _counts(part) for name, part in parts.items()}, **self.notes, "fingerprint": self.fingerprint}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content of all three parts, in order; where the rows stand does not count."""
        return sha256("".join(fingerprint(p) for p in (self.train, self.validation, self.test)).encode()).hexdigest()


def split_position(record: Record) -> float:
    """Where the record's group, or else its prompt, falls in [0, 1): the same in every process and on every machine."""
    return float(_split_positions(Records.from_records([record]))[0])


def _split_positions(records: Records) -> np.ndarray:
    """`position` of each record, from its hashes: float64 [n]."""
    groups = records.groups()
    key = np.where(groups.any(axis=1), groups[:, 0], records.prompts()[:, 0])
    # 53 bits: exactly representable, so the value is always below 1
    at: np.ndarray = (key >> np.uint64(11)) / 2.0**53
    return at


def assign_splits(records: Iterable[Record], *, validation: float, test: float) -> Splits:
    """Cut by threshold: [0, test) is the test, the next `validation` of the range is validation, the rest trains."""
    own = Records.from_records(records)
    at = _split_positions(own)
    held = (at >= test) & (at < test + validation)
    return Splits(
        train=own.select(np.flatnonzero(at >= test + validation)),
        validation=own.select(np.flatnonzero(held)),
        test=own.select(np.flatnonzero(at < test)),
    )


def overlapping_records(left: Iterable[Record], right: Iterable[Record]) -> list[Pair]:
    """Each record of `left` whose normalized prompt also stands in `right`, with the first such record there."""
    left, right = Records.from_records(left), Records.from_records(right)
    return [(left[i], right[k]) for i, k in zip(*overlapping_pairs(left, right), strict=True)]


def overlapping_pairs(left: Records, right: Records) -> tuple[np.ndarray, np.ndarray]:
    """Indices in `left` and `right` of the pairs of `overlaps`."""
    found = first_occurrence(np.concatenate([right.prompts(), left.prompts()]))[len(right) :]
    crossing = np.flatnonzero(found < len(right))
    return crossing, found[crossing]


def duplicate_records(records: Iterable[Record]) -> list[Pair]:
    """Each record whose normalized prompt stood in an earlier one, with that one."""
    own = Records.from_records(records)
    return [(own[i], own[k]) for i, k in zip(*duplicate_pairs(own), strict=True)]


def duplicate_pairs(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pairs of `duplicates`."""
    found = first_occurrence(records.prompts())
    again = np.flatnonzero(found != np.arange(len(records)))
    return again, found[again]


def split(
    records: Iterable[Record],
    config: DataConfig,
    *,
    validation: Iterable[Record] | None = None,
    test: Iterable[Record] | None = None,
) -> Splits:
    """Split by the shares of `config`; `validation` and `test` are given where the config names files.

    Raises:
        ConfigError: the shares leave nothing to train on.
        DataError: a part that was asked for is empty, or a prompt stands in two parts and `data.overlap` is `error`.
    """
    shares = {"validation": _share(config.validation), "test": _share(config.test)}
    if sum(shares.values()) >= 1:
        raise ConfigError("data.validation and data.test leave no training rows", given=shares, allowed="a sum below 1")
    own = Records.from_records(records)
    parts = assign_splits(own, validation=shares["validation"], test=shares["test"])
    parts = Splits(
        parts.train,
        parts.validation if validation is None else Records.from_records(validation),
        parts.test if test is None else Records.from_records(test),
    )
    _refuse_empty(parts, shares, len(own))
    return _without_overlap(parts, config)


def _without_overlap(parts: Splits, config: DataConfig) -> Splits:
    pairs = {
        "train and validation": (parts.train, parts.validation),
        "train and test": (parts.train, parts.test),
        "validation and test": (parts.validation, parts.test),
    }
    leaks = {names: overlapping_pairs(left, right) for names, (left, right) in pairs.items()}
    if config.overlap == "error":
        for names, (left, right) in pairs.items():
            if len(leaks[names][0]):
                raise _overlap_error(names, left.select(leaks[names][0]), right.select(leaks[names][1]))
    leaked = np.union1d(leaks["train and validation"][0], leaks["train and test"][0])
    train = parts.train.select(np.delete(np.arange(len(parts.train)), leaked)) if len(leaked) else parts.train
    if not train:
        raise DataError(
            "every training prompt also stands in the validation or test split",
            given=f"{len(leaked)} training rows",
            hint="hold out another file or a share",
        )
    held_out = _distinct_groups(parts.validation, parts.test)
    shared = len(held_out) + len(_distinct_groups(train)) - len(_distinct_groups(parts.validation, parts.test, train))
    notes = {
        "overlap_dropped": len(leaked),
        "overlap_validation_test": len(leaks["validation and test"][0]),
        "groups_shared_with_held_out": shared,
    }
    return Splits(train, parts.validation, parts.test, notes)


def _overlap_error(names: str, left: Records, right: Records) -> DataError:
    shown = [f"{left.source(i)} = {right.source(i)}" for i in range(min(5, len(left)))]
    trains = names.startswith("train")
    remedy = "data.overlap: drop_train leaves the training rows out" if trains else "take these rows out of one file"
    if left.groups().any():
        remedy += "; the same prompt in two groups also crosses"
    return DataError(f"{len(left)} prompts stand in both {names}", hint="\n  ".join([*shown, remedy]))


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
    """Hashes of the groups of all parts together, each once."""
    groups = np.concatenate([part.groups() for part in parts])
    found: np.ndarray = groups[groups.any(axis=1)]
    once: np.ndarray = found[first_occurrence(found) == np.arange(len(found))]
    return once


def _counts(part: Records) -> dict[str, int]:
    groups, (again, _) = _distinct_groups(part), duplicate_pairs(part)
    return {"rows": len(part), "groups": len(groups), "duplicate_prompts": len(again)}


_LIMIT_STREAM = 0x11317  # keeps the draw apart from other uses of the same seed


def load_data(config: DataConfig, seed: int) -> Splits:
    """Read, split, weigh and cap what a data config names.

    Raises:
        ConfigError: a set is named twice, or the shares leave nothing to train on.
        DataError: a source or row cannot be used, a split is empty, or splits overlap, as the config's policies say.
    """
    paths = weighted_paths(config)
    sets = [_load_set(config, p) for p in paths]
    held = {
        name: _load_held_out(config, value)
        for name, value in (("validation", config.validation), ("test", config.test))
    }
    splits = split(
        Records.concatenate([loaded.records for loaded in sets]),
        config,
        validation=held["validation"].records if held["validation"] else None,
        test=held["test"].records if held["test"] else None,
    )
    train = limit_records(
        repeat_by_weight(splits.train, {str(Path(p.path)): p.weight for p in paths}), config.limit, seed
    )
    notes = {
        **splits.notes,
        "rows_before_weights": len(splits.train),
        "sets": [_set_summary(p, loaded) for p, loaded in zip(paths, sets, strict=True)],
        "held_out_files": {name: _set_summary(None, loaded) for name, loaded in held.items() if loaded},
    }
    return replace(splits, train=train, notes=notes)


def weighted_paths(config: DataConfig) -> tuple[WeightedPath, ...]:
    """The sets of a config; a single path has weight 1.

    Raises:
        ConfigError: none, or one twice.
    """
    paths = (WeightedPath(path=config.path),) if isinstance(config.path, str) else config.path
    names = [str(Path(p.path)) for p in paths]  # as read_rows writes it into every source
    if not names:
        raise ConfigError("data.path names no data set", allowed="a path, or a list of {path, weight}")
    if twice := [n for n in names if names.count(n) > 1]:
        raise ConfigError("data.path names a set twice", given=twice[0], hint="name it once and give it a weight")
    return paths


def repeat_by_weight(records: Iterable[Record], weights: Mapping[str, float]) -> Records:
    """Repeat the records of each set `weight` times; the fraction is taken evenly in the order of their hashes.

    Weight 2 gives every record twice, 0.5 every second one, 1.5 every one and every second one again. Within a set the
    order of the file is kept.
    """
    given = Records.from_records(records)
    mixed = [np.empty(0, dtype=np.int64)]
    for path, weight in weights.items():
        own = given.indices_from_path(path)
        whole, share = floor(weight), weight - floor(weight)
        mixed += [own] * whole
        if share:
            digests = np.frombuffer(b"".join(map(_digest, encoded_lines(given.select(own)))), ">u8").reshape(-1, 2)
            order = np.lexsort((digests[:, 1], digests[:, 0]))
            drawn = [i for rank, i in enumerate(order) if floor((rank + 1) * share) > floor(rank * share)]
            mixed.append(own[np.sort(drawn)] if drawn else own[:0])
    return given.select(np.concatenate(mixed))


def limit_records(records: Iterable[Record], limit: int | None, seed: int) -> Records:
    """At most `limit` records, drawn by the seed; a smaller limit takes a subset of a larger one's rows."""
    given = Records.from_records(records)
    if limit is None or limit >= len(given):
        return given
    return given.select(np.sort(np.random.default_rng([seed, _LIMIT_STREAM]).permutation(len(given))[:limit]))


def _digest(line: bytes) -> bytes:
    """128 bits by which the rows of a set are put in an order of their own."""
    return sha256(sha256(line).hexdigest().encode()).digest()[:16]


def _load_set(config: DataConfig, own: WeightedPath) -> LoadedRows:
    """A set with its own group column and task, where it names them."""
    task = None if own.task is not None else config.task
    loaded = load_records(config.model_copy(update={"group": own.group or config.group, "task": task}), own.path)
    if own.task is None:
        return loaded
    return replace(loaded, records=Records.from_records(replace(record, task=own.task) for record in loaded.records))


def _load_held_out(config: DataConfig, value: float | str) -> LoadedRows | None:
    return load_records(config, value, held_out=True) if isinstance(value, str) else None


def _set_summary(path: WeightedPath | None, loaded: LoadedRows) -> dict[str, object]:
    return {
        "path": loaded.path,
        "weight": path.weight if path else None,
        "format": loaded.format,
        "mapping": loaded.mapping,
        "kept": len(loaded.records),
        "rejected": len(loaded.rejected),
        "rejected_first": _line_numbers(loaded.rejected[:10]),
    }


def _line_numbers(rejected: Iterable[object]) -> list[str]:
    return [str(r) for r in rejected]
