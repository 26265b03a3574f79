"""Train, validation and test by content: adding rows never moves a row, and copies never cross (FAILURES 11)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np

from rung.data.records import Records, fingerprint, firsts, normalised_prompt
from rung.errors import ConfigError, DataError
from rung.spec.data import DataSpec
from rung.types import Record

__all__ = ["Splits", "assign", "duplicates", "normalised_prompt", "overlaps", "position", "split"]

Pair = tuple[Record, Record]


@dataclass(frozen=True, slots=True)
class Splits:
    """The three parts of a data spec, and what was counted on the way."""

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


def position(record: Record) -> float:
    """Where the record's group, or else its prompt, falls in [0, 1): the same in every process and on every machine."""
    return float(_positions(Records.of([record]))[0])


def _positions(records: Records) -> np.ndarray:
    """`position` of each record, from its hashes: float64 [n]."""
    groups = records.groups()
    key = np.where(groups.any(axis=1), groups[:, 0], records.prompts()[:, 0])
    # 53 bits: exactly representable, so the value is always below 1
    at: np.ndarray = (key >> np.uint64(11)) / 2.0**53
    return at


def assign(records: Iterable[Record], *, validation: float, test: float) -> Splits:
    """Cut by threshold: [0, test) is the test, the next `validation` of the range is validation, the rest trains."""
    own = Records.of(records)
    at = _positions(own)
    held = (at >= test) & (at < test + validation)
    return Splits(
        train=own.select(np.flatnonzero(at >= test + validation)),
        validation=own.select(np.flatnonzero(held)),
        test=own.select(np.flatnonzero(at < test)),
    )


def overlaps(left: Iterable[Record], right: Iterable[Record]) -> list[Pair]:
    """Each record of `left` whose normalised prompt also stands in `right`, with the first such record there."""
    left, right = Records.of(left), Records.of(right)
    return [(left[i], right[k]) for i, k in zip(*crossing(left, right), strict=True)]


def crossing(left: Records, right: Records) -> tuple[np.ndarray, np.ndarray]:
    """Indices in `left` and `right` of the pairs of `overlaps`."""
    found = firsts(np.concatenate([right.prompts(), left.prompts()]))[len(right) :]
    crossing = np.flatnonzero(found < len(right))
    return crossing, found[crossing]


def duplicates(records: Iterable[Record]) -> list[Pair]:
    """Each record whose normalised prompt stood in an earlier one, with that one."""
    own = Records.of(records)
    return [(own[i], own[k]) for i, k in zip(*repeated(own), strict=True)]


def repeated(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pairs of `duplicates`."""
    found = firsts(records.prompts())
    again = np.flatnonzero(found != np.arange(len(records)))
    return again, found[again]


def split(
    records: Iterable[Record],
    spec: DataSpec,
    *,
    validation: Iterable[Record] | None = None,
    test: Iterable[Record] | None = None,
) -> Splits:
    """Split by the shares of `spec`; `validation` and `test` are given where the spec names files.

    Raises:
        ConfigError: the shares leave nothing to train on.
        DataError: a part that was asked for is empty, or a prompt stands in two parts and `data.overlap` is `error`.
    """
    shares = {"validation": _share(spec.validation), "test": _share(spec.test)}
    if sum(shares.values()) >= 1:
        raise ConfigError("data.validation and data.test leave no training rows", given=shares, allowed="a sum below 1")
    own = Records.of(records)
    parts = assign(own, validation=shares["validation"], test=shares["test"])
    parts = Splits(
        parts.train,
        parts.validation if validation is None else Records.of(validation),
        parts.test if test is None else Records.of(test),
    )
    _refuse_empty(parts, shares, len(own))
    return _without_overlap(parts, spec)


def _without_overlap(parts: Splits, spec: DataSpec) -> Splits:
    pairs = {
        "train and validation": (parts.train, parts.validation),
        "train and test": (parts.train, parts.test),
        "validation and test": (parts.validation, parts.test),
    }
    leaks = {names: crossing(left, right) for names, (left, right) in pairs.items()}
    if spec.overlap == "error":
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
    once: np.ndarray = found[firsts(found) == np.arange(len(found))]
    return once


def _counts(part: Records) -> dict[str, int]:
    groups, (again, _) = _distinct_groups(part), repeated(part)
    return {"rows": len(part), "groups": len(groups), "duplicate_prompts": len(again)}
