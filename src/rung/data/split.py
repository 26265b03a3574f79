"""Train, validation and test by content: adding rows never moves a row, and copies never cross (FAILURES 11)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from rung.errors import ConfigError, DataError
from rung.spec.data import DataSpec
from rung.types import Record

Pair = tuple[Record, Record]


@dataclass(frozen=True, slots=True)
class Splits:
    """The three parts of a data spec, and what was counted on the way."""

    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]
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


def fingerprint(records: Iterable[Record]) -> str:
    """SHA-256 over the content of records, in order, without their sources."""
    digest = sha256()
    for r in records:
        turns = [(m.role, m.content, m.tool_calls, m.name) for m in r.messages]
        digest.update(json.dumps([turns, r.context, r.tools, r.group, r.weight, r.text]).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def normalised_prompt(record: Record) -> str:
    """What is asked, casefolded and with white space collapsed: context and all turns before the final answer."""
    if record.text is not None:
        return _normalise(record.text)
    turns = [f"{m.role}: {m.content} {m.tool_calls or ''}" for m in record.messages[:-1]]
    return _normalise("\n".join([record.context or "", *turns]))


def position(record: Record) -> float:
    """Where the record's group, or else its prompt, falls in [0, 1): the same in every process and on every machine."""
    key = f"prompt\0{normalised_prompt(record)}" if record.group is None else f"group\0{record.group}"
    # 53 bits: exactly representable, so the value is always below 1
    return (int.from_bytes(sha256(key.encode()).digest()[:8], "big") >> 11) / 2.0**53


def assign(records: Iterable[Record], *, validation: float, test: float) -> Splits:
    """Cut by threshold: [0, test) is the test, the next `validation` of the range is validation, the rest trains."""
    train: list[Record] = []
    held: list[Record] = []
    tested: list[Record] = []
    for record in records:
        at = position(record)
        (tested if at < test else held if at < test + validation else train).append(record)
    return Splits(tuple(train), tuple(held), tuple(tested))


def overlaps(left: Iterable[Record], right: Iterable[Record]) -> list[Pair]:
    """Each record of `left` whose normalised prompt also stands in `right`, with the first such record there."""
    seen: dict[str, Record] = {}
    for record in right:
        seen.setdefault(normalised_prompt(record), record)
    return [(r, seen[key]) for r in left if (key := normalised_prompt(r)) in seen]


def duplicates(records: Iterable[Record]) -> list[Pair]:
    """Each record whose normalised prompt stood in an earlier one, with that one."""
    seen: dict[str, Record] = {}
    pairs = []
    for record in records:
        first = seen.setdefault(normalised_prompt(record), record)
        if first is not record:
            pairs.append((record, first))
    return pairs


def split(
    records: Sequence[Record],
    spec: DataSpec,
    *,
    validation: Sequence[Record] | None = None,
    test: Sequence[Record] | None = None,
) -> Splits:
    """Split by the shares of `spec`; `validation` and `test` are given where the spec names files.

    Raises:
        ConfigError: the shares leave nothing to train on.
        DataError: a part that was asked for is empty, or a prompt stands in two parts and `data.overlap` is `error`.
    """
    shares = {"validation": _share(spec.validation), "test": _share(spec.test)}
    if sum(shares.values()) >= 1:
        raise ConfigError("data.validation and data.test leave no training rows", given=shares, allowed="a sum below 1")
    parts = assign(records, validation=shares["validation"], test=shares["test"])
    parts = Splits(
        parts.train,
        parts.validation if validation is None else tuple(validation),
        parts.test if test is None else tuple(test),
    )
    _refuse_empty(parts, shares, len(records))
    return _without_overlap(parts, spec)


def _without_overlap(parts: Splits, spec: DataSpec) -> Splits:
    leaks = {
        "train and validation": overlaps(parts.train, parts.validation),
        "train and test": overlaps(parts.train, parts.test),
        "validation and test": overlaps(parts.validation, parts.test),
    }
    if spec.overlap == "error":
        for names, pairs in leaks.items():
            if pairs:
                raise _overlap_error(names, pairs)
    leaked = {id(left) for names, pairs in leaks.items() if names.startswith("train") for left, _ in pairs}
    train = tuple(r for r in parts.train if id(r) not in leaked)
    if not train:
        raise DataError(
            "every training prompt also stands in the validation or test split",
            given=f"{len(leaked)} training rows",
            hint="hold out another file or a share",
        )
    groups = {r.group for r in (*parts.validation, *parts.test) if r.group is not None}
    notes = {
        "overlap_dropped": len(leaked),
        "overlap_validation_test": len(leaks["validation and test"]),
        "groups_shared_with_held_out": len(groups & {r.group for r in train}),
    }
    return Splits(train, parts.validation, parts.test, notes)


def _overlap_error(names: str, pairs: list[Pair]) -> DataError:
    shown = [f"{left.source} = {right.source}" for left, right in pairs[:5]]
    trains = names.startswith("train")
    remedy = "data.overlap: drop_train leaves the training rows out" if trains else "take these rows out of one file"
    if any(left.group is not None for left, _ in pairs):
        remedy += "; the same prompt in two groups also crosses"
    return DataError(f"{len(pairs)} prompts stand in both {names}", hint="\n  ".join([*shown, remedy]))


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


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())


def _counts(part: tuple[Record, ...]) -> dict[str, int]:
    groups = {r.group for r in part if r.group is not None}
    return {"rows": len(part), "groups": len(groups), "duplicate_prompts": len(duplicates(part))}
