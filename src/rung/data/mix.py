"""From a data spec to its splits: read each set, split, then weigh and cap the training rows only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from math import floor
from pathlib import Path

import numpy as np

from rung.data.formats import Loaded, load_records
from rung.data.records import Records, lines
from rung.data.split import Splits, split
from rung.errors import ConfigError
from rung.spec.data import DataSpec, WeightedPath
from rung.types import Record

_LIMIT_STREAM = 0x11317  # keeps the draw apart from other uses of the same seed


def load_data(spec: DataSpec, seed: int) -> Splits:
    """Read, split, weigh and cap what a data spec names.

    Raises:
        ConfigError: a set is named twice, or the shares leave nothing to train on.
        DataError: a source or row cannot be used, a split is empty, or splits overlap, as the spec's policies say.
    """
    paths = weighted_paths(spec)
    sets = [_load(spec, p) for p in paths]
    held = {name: _held_out(spec, value) for name, value in (("validation", spec.validation), ("test", spec.test))}
    splits = split(
        Records.joined([loaded.records for loaded in sets]),
        spec,
        validation=held["validation"].records if held["validation"] else None,
        test=held["test"].records if held["test"] else None,
    )
    train = cap(reweigh(splits.train, {str(Path(p.path)): p.weight for p in paths}), spec.limit, seed)
    notes = {
        **splits.notes,
        "rows_before_weights": len(splits.train),
        "sets": [_set_summary(p, loaded) for p, loaded in zip(paths, sets, strict=True)],
        "held_out_files": {name: _set_summary(None, loaded) for name, loaded in held.items() if loaded},
    }
    return replace(splits, train=train, notes=notes)


def weighted_paths(spec: DataSpec) -> tuple[WeightedPath, ...]:
    """The sets of a spec; a single path has weight 1.

    Raises:
        ConfigError: none, or one twice.
    """
    paths = (WeightedPath(path=spec.path),) if isinstance(spec.path, str) else spec.path
    names = [str(Path(p.path)) for p in paths]  # as read_rows writes it into every source
    if not names:
        raise ConfigError("data.path names no data set", allowed="a path, or a list of {path, weight}")
    if twice := [n for n in names if names.count(n) > 1]:
        raise ConfigError("data.path names a set twice", given=twice[0], hint="name it once and give it a weight")
    return paths


def reweigh(records: Iterable[Record], weights: Mapping[str, float]) -> Records:
    """Repeat the records of each set `weight` times; the fraction is taken evenly in the order of their hashes.

    Weight 2 gives every record twice, 0.5 every second one, 1.5 every one and every second one again. Within a set the
    order of the file is kept.
    """
    given = Records.of(records)
    mixed = [np.empty(0, dtype=np.int64)]
    for path, weight in weights.items():
        own = given.of_path(path)
        whole, share = floor(weight), weight - floor(weight)
        mixed += [own] * whole
        if share:
            digests = np.frombuffer(b"".join(map(_digest, lines(given.select(own)))), ">u8").reshape(-1, 2)
            order = np.lexsort((digests[:, 1], digests[:, 0]))
            drawn = [i for rank, i in enumerate(order) if floor((rank + 1) * share) > floor(rank * share)]
            mixed.append(own[np.sort(drawn)] if drawn else own[:0])
    return given.select(np.concatenate(mixed))


def cap(records: Iterable[Record], limit: int | None, seed: int) -> Records:
    """At most `limit` records, drawn by the seed; a smaller limit takes a subset of a larger one's rows."""
    given = Records.of(records)
    if limit is None or limit >= len(given):
        return given
    return given.select(np.sort(np.random.default_rng([seed, _LIMIT_STREAM]).permutation(len(given))[:limit]))


def _digest(line: bytes) -> bytes:
    """128 bits by which the rows of a set are put in an order of their own."""
    return sha256(sha256(line).hexdigest().encode()).digest()[:16]


def _load(spec: DataSpec, own: WeightedPath) -> Loaded:
    """A set with its own group column and task, where it names them."""
    task = None if own.task is not None else spec.task
    loaded = load_records(spec.model_copy(update={"group": own.group or spec.group, "task": task}), own.path)
    if own.task is None:
        return loaded
    return replace(loaded, records=Records.of(replace(record, task=own.task) for record in loaded.records))


def _held_out(spec: DataSpec, value: float | str) -> Loaded | None:
    return load_records(spec, value, held_out=True) if isinstance(value, str) else None


def _set_summary(path: WeightedPath | None, loaded: Loaded) -> dict[str, object]:
    return {
        "path": loaded.path,
        "weight": path.weight if path else None,
        "format": loaded.format,
        "mapping": loaded.mapping,
        "kept": len(loaded.records),
        "rejected": len(loaded.rejected),
        "rejected_first": _lines(loaded.rejected[:10]),
    }


def _lines(rejected: Iterable[object]) -> list[str]:
    return [str(r) for r in rejected]
