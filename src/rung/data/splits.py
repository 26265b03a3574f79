"""Splits: train, validation and test by content, weights of data sets, and the limit of rows.

The split of a row follows from a hash of its group or prompt, not from a shuffle: adding rows never moves another row,
and copies of a prompt never cross (FAILURES 11). The price is that shares are only approximate on small data. Weights
and the limit come after the split and touch training rows only. `runs.dataset` calls `load_data`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import file_digest, sha256
from itertools import combinations
from math import floor
from pathlib import Path
from typing import Any

import numpy as np

from rung.config.data import DataConfig, WeightedPath
from rung.data.formats import LoadedRows, load_records
from rung.data.records import Records, encoded_lines, fingerprint, index_of_first_occurrence
from rung.errors import ConfigError, DataError
from rung.files import SYNTH_FILE


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
        counts = {name: _split_counts(getattr(self, name)) for name in ("train", "validation", "test")}
        return {**counts, **self.notes, "fingerprint": self.fingerprint}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content of all three parts, in order; paths and lines of the rows do not count."""
        return sha256("".join(fingerprint(p) for p in (self.train, self.validation, self.test)).encode()).hexdigest()


def split_positions(records: Records) -> np.ndarray:
    """Positions of the groups, or else of the prompts, in [0, 1): equal in every process and on every machine."""
    groups = records.groups()
    # the group first: rows of one document must not stand on both sides
    key = np.where(groups.any(axis=1), groups[:, 0], records.prompts()[:, 0])
    # 53 bits are exactly representable, so the value is always below 1
    return np.asarray((key >> np.uint64(11)) / 2.0**53)


def assign_splits(records: Records, *, validation: float | Records, test: float | Records) -> Splits:
    """Cut by thresholds: [0, test) is test, the next `validation` of the range is validation, the rest is train.

    A part that is given as records takes none of the range.
    """
    positions = split_positions(records)
    # test has the low end: changing the validation share never moves a test row
    test_end = 0.0 if isinstance(test, Records) else test
    validation_end = test_end + (0.0 if isinstance(validation, Records) else validation)
    in_validation = (positions >= test_end) & (positions < validation_end)
    return Splits(
        train=records.select(positions >= validation_end),
        validation=validation if isinstance(validation, Records) else records.select(in_validation),
        test=test if isinstance(test, Records) else records.select(positions < test_end),
    )


def overlapping_pairs(left: Records, right: Records) -> tuple[np.ndarray, np.ndarray]:
    """Indices of records of `left` whose normalized prompt also occurs in `right`, and the first such of `right`."""
    # right comes first, so that the first occurrence of a shared prompt is the one in `right`
    first_indices = index_of_first_occurrence(np.concatenate([right.prompts(), left.prompts()]))[len(right) :]
    left_indices = np.flatnonzero(first_indices < len(right))
    return left_indices, first_indices[left_indices]


def source_pairs(left: Records, right: Records, pairs: tuple[np.ndarray, np.ndarray]) -> tuple[tuple[str, str], ...]:
    """The sources of the records of each pair."""
    return tuple((str(left.source(i)), str(right.source(k))) for i, k in zip(*pairs, strict=True))


def duplicate_pairs(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Indices of records whose normalized prompt occurred in an earlier record, and of the first such record."""
    first_indices = index_of_first_occurrence(records.prompts())
    copies = np.flatnonzero(first_indices != np.arange(len(records)))
    return copies, first_indices[copies]


def split(records: Records, config: DataConfig, files: Mapping[str, Records] | None = None) -> Splits:
    """Split by the shares of `config`; `files`: the records of `validation` and `test` where the config names files.

    Raises:
        ConfigError: the shares leave nothing to train on.
        DataError: a requested part is empty, or a prompt occurs in two parts and `data.overlap` is `error`.
    """
    shares = config.held_out_shares
    if sum(shares.values()) >= 1:
        raise ConfigError("data.validation and data.test leave no training rows", given=shares, allowed="a sum below 1")
    held_out: dict[str, float | Records] = {**shares, **(files or {})}
    parts = assign_splits(records, **held_out)
    _refuse_empty(parts, shares, len(records))
    return _resolve_overlap(parts, config)


def _resolve_overlap(parts: Splits, config: DataConfig) -> Splits:
    names_of_pairs = combinations(("train", "validation", "test"), 2)
    pairs = {f"{a} and {b}": (getattr(parts, a), getattr(parts, b)) for a, b in names_of_pairs}
    # Within one source no prompt crosses; files, and one prompt in two groups, can overlap.
    leaks = {names: overlapping_pairs(left, right) for names, (left, right) in pairs.items()}
    if config.overlap == "error":
        for names, (left, right) in pairs.items():
            if len(leaks[names][0]):
                raise _overlap_error(names, left.select(leaks[names][0]), right.select(leaks[names][1]))
    # validation and test rows stay: dropping them would change the measurement with the training data
    leaked_rows = np.union1d(leaks["train and validation"][0], leaks["train and test"][0])
    train = parts.train.select(np.delete(np.arange(len(parts.train)), leaked_rows))
    if not train:
        summary = "every training prompt also occurs in the validation or test split"
        dropped = f"{len(leaked_rows)} training rows"
        raise DataError(summary, given=dropped, hint="hold out another file or a share")
    held_out = (parts.validation, parts.test)
    # inclusion and exclusion; a group on both sides can make held-out scores look better than they are
    shared = _group_count(*held_out) + _group_count(train) - _group_count(*held_out, train)
    notes = {
        "overlap_dropped": len(leaked_rows),
        "overlap_validation_test": len(leaks["validation and test"][0]),
        "groups_shared_with_held_out": shared,
    }
    return Splits(train, parts.validation, parts.test, notes)


def _overlap_error(names: str, left: Records, right: Records) -> DataError:
    examples = [f"{left.source(i)} = {right.source(i)}" for i in range(min(5, len(left)))]
    remedy = "take these rows out of one file"
    if names.startswith("train"):
        remedy = "data.overlap: drop_train leaves the training rows out"
    if left.groups().any():
        remedy += "; the same prompt in two groups also crosses"
    return DataError(f"{len(left)} prompts stand in both {names}", hint="\n  ".join([*examples, remedy]))


def _refuse_empty(parts: Splits, shares: dict[str, float], rows: int) -> None:
    for name, part in (("validation", parts.validation), ("test", parts.test)):
        if shares[name] > 0 and not part:
            summary = f"the {name} split is empty: no row (or group) of {rows} fell into its share"
            hint = f"use more rows, a larger data.{name}, a file, or data.{name}: 0"
            raise DataError(summary, given=f"data.{name}: {shares[name]}", hint=hint)
    if not parts.train:
        hint = "use more rows, smaller data.validation and data.test, or a data.group with more values"
        raise DataError(f"the training split is empty: all {rows} rows were held out", hint=hint)


def _group_count(*parts: Records) -> int:
    """Number of distinct groups of all parts."""
    groups = np.concatenate([part.groups() for part in parts])
    groups = groups[groups.any(axis=1)]
    return int((index_of_first_occurrence(groups) == np.arange(len(groups))).sum())


def _split_counts(part: Records) -> dict[str, int]:
    copies, _ = duplicate_pairs(part)
    return {"rows": len(part), "groups": _group_count(part), "duplicate_prompts": len(copies)}


_LIMIT_STREAM = 0x11317  # a random stream of its own, so that the draw is independent of other uses of the seed


def load_data(config: DataConfig, seed: int) -> Splits:
    """Read, split, weight and limit the data of a config.

    Raises:
        ConfigError: a set is named twice, or the shares leave nothing to train on.
        DataError: a source or row cannot be used, a split is empty, or splits overlap, by the policies of the config.
    """
    paths, sets = weighted_paths(config), load_sets(config)
    files = {name: load_records(config, path, held_out=True) for name, path in config.held_out_files.items()}
    refuse_unused_roles(config, [*sets, *files.values()])
    records = Records.concatenate([loaded.records for loaded in sets])
    splits = split(records, config, {name: loaded.records for name, loaded in files.items()})
    # after the split: repeated rows must not change which rows are held out, or count as duplicates
    weights = [(loaded.files, p.weight) for loaded, p in zip(sets, paths, strict=True)]
    train = limit_records(repeat_by_weight(splits.train, weights), config.limit, seed)
    notes = {
        **splits.notes,
        "rows_before_weights": len(splits.train),
        "sets": [_set_summary(loaded, p.weight) for p, loaded in zip(paths, sets, strict=True)],
        "held_out_files": {name: _set_summary(loaded, None) for name, loaded in files.items()},
    }
    return replace(splits, train=train, notes=notes)


def load_sets(config: DataConfig) -> list[LoadedRows]:
    """All rows of each data set of a config, neither split nor weighted.

    Raises:
        ConfigError: a set or a file is named twice.
        DataError: a set cannot be read, or a row by `data.rejects`.
    """
    sets = [_load_set(config, path) for path in weighted_paths(config)]
    refuse_shared_files(sets)
    return sets


def weighted_paths(config: DataConfig) -> tuple[WeightedPath, ...]:
    """The data sets of a config; a single path has weight 1.

    Raises:
        ConfigError: no set, or one named twice.
    """
    paths = (WeightedPath(path=config.path),) if isinstance(config.path, str) else config.path
    names = [str(Path(p.path)) for p in paths]
    if not names:
        raise ConfigError("data.path names no data set", allowed="a path, or a list of {path, weight}")
    if duplicates := [n for n in names if names.count(n) > 1]:
        raise ConfigError("data.path names a set twice", given=duplicates[0], hint="name it once and give it a weight")
    return paths


def refuse_shared_files(sets: Sequence[LoadedRows]) -> None:
    """Raise `ConfigError` for a file that two sets name, for example by a pattern: its rows would count twice."""
    for first, second in combinations(sets, 2):
        if shared := sorted(first.files & second.files):
            hint = "name each file in one set, with its weight"
            summary = f"data.path names a file in two sets: {first.path} and {second.path}"
            raise ConfigError(summary, given=shared[0], hint=hint)


def refuse_unused_roles(config: DataConfig, sources: Iterable[LoadedRows]) -> None:
    """Raise `ConfigError` for a name in `data.roles` that no turn has: a misspelled one would do nothing."""
    used = {name for loaded in sources for name in loaded.detection.roles}
    if unused := sorted(set(config.roles) - used):
        hint = "leave it out, or correct it"
        raise ConfigError("data.roles names a role that no turn has", given=unused[0], hint=hint)


def repeat_by_weight(records: Records, weights: Iterable[tuple[Collection[str], float]]) -> Records:
    """Repeat the records of each set `weight` times; a fraction is taken evenly in the order of their hashes.

    `weights` has the files of each set.

    Weight 2 gives every record twice, 0.5 every second one, 1.5 every one once and every second one twice. Within a set
    the order of the file is kept.
    """
    selections = [np.empty(0, dtype=np.int64)]
    for files, weight in weights:
        set_rows = records.indices_from_files(files)
        full_copies, fraction = floor(weight), weight - floor(weight)
        selections += [set_rows] * full_copies
        if fraction:
            # by content, not by position: another order of the file takes the same rows
            lines = encoded_lines(records.select(set_rows))
            digests = np.frombuffer(b"".join(map(_order_digest, lines)), ">u8").reshape(-1, 2)
            order = np.lexsort((digests[:, 1], digests[:, 0]))
            is_taken = np.diff(np.floor(np.arange(len(order) + 1) * fraction)) > 0
            selections.append(set_rows[np.sort(order[is_taken])])
    return records.select(np.concatenate(selections))


def limit_records(records: Records, limit: int | None, seed: int) -> Records:
    """At most `limit` records, drawn by the seed; a smaller limit draws a subset of a larger one's rows."""
    if limit is None or limit >= len(records):
        return records
    order = np.random.default_rng([seed, _LIMIT_STREAM]).permutation(len(records))
    return records.select(np.sort(order[:limit]))


def _order_digest(line: bytes) -> bytes:
    """128 bits that order the rows of a set."""
    # hashed twice, so that the order is independent of the fingerprint's hashes
    return sha256(sha256(line).hexdigest().encode()).digest()[:16]


def _load_set(config: DataConfig, weighted_path: WeightedPath) -> LoadedRows:
    """Load a set with its own group column, task and format, where the config gives them."""
    # a task given for the set replaces the column of tasks
    task = None if weighted_path.task is not None else config.task
    settings = {"group": weighted_path.group or config.group, "format": weighted_path.format or config.format}
    set_config = config.model_copy(update={**settings, "task": task})
    loaded = load_records(set_config, weighted_path.path)
    if weighted_path.task is None:
        return loaded
    with_task = (replace(record, task=weighted_path.task) for record in loaded.records)
    return replace(loaded, records=Records.from_records(with_task))


def made_by(file: Path) -> dict[str, object] | None:
    """What is known of rows that `rung synth` wrote, from the manifest beside them; None for other rows.

    `unchanged` is False where the rows are no longer those that were written.
    """
    manifest = file.parent / SYNTH_FILE
    if not (file.is_file() and manifest.is_file()):
        return None
    try:
        facts = json.loads(manifest.read_text())
        if Path(facts["result"]["output"]).name != file.name:
            return None
        with file.open("rb") as rows:
            digest = file_digest(rows, "sha256").hexdigest()
        made = {"kind": facts["config"]["synth"]["kind"], "teacher": facts["teacher"]}
        # of a constitution: who criticized, and whether people agree with it
        made |= {name: facts[name] for name in ("critic", "trusted") if name in facts}
        return {**made, "unchanged": digest == facts["sha256"]}
    except (OSError, ValueError, KeyError, TypeError):  # another program's file of this name
        return None


def _set_summary(loaded: LoadedRows, weight: float | None) -> dict[str, object]:
    return {
        "path": loaded.path,
        "weight": weight,
        "format": loaded.detection.format,
        "mapping": loaded.detection.mapping,
        "kept": len(loaded.records),
        "rejected": len(loaded.rejected_rows),
        **({"ignored_fields": dict(ignored)} if (ignored := loaded.detection.turn_fields.get("ignored")) else {}),
        **({"notes": list(loaded.detection.notes)} if loaded.detection.notes else {}),
        **({"removed_end_tokens": dict(ends)} if (ends := loaded.detection.removed_end_tokens) else {}),
        "rejected_first": [str(r) for r in loaded.rejected_rows[:10]],
        **({"made_by": made} if (made := made_by(Path(loaded.path))) else {}),
    }
