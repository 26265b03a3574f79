"""From a data spec to its splits: read each set, split, then weigh and cap the training rows only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from math import floor
from pathlib import Path

import numpy as np

from rung.data.formats import Loaded, load_records
from rung.data.split import Splits, fingerprint, split
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
    sets = [load_records(spec, p.path) for p in paths]
    held = {name: _held_out(spec, value) for name, value in (("validation", spec.validation), ("test", spec.test))}
    splits = split(
        [r for loaded in sets for r in loaded.records],
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


def reweigh(records: Sequence[Record], weights: Mapping[str, float]) -> tuple[Record, ...]:
    """Repeat the records of each set `weight` times; the fraction is taken evenly in the order of their hashes.

    Weight 2 gives every record twice, 0.5 every second one, 1.5 every one and every second one again. Within a set the
    order of the file is kept.
    """
    mixed: list[Record] = []
    for path, weight in weights.items():
        own = [r for r in records if r.source.path == path]
        whole, share = floor(weight), weight - floor(weight)
        order = sorted(range(len(own)), key=lambda i: (_digest(own[i]), i))
        extra = sorted(i for rank, i in enumerate(order) if floor((rank + 1) * share) > floor(rank * share))
        mixed += own * whole + [own[i] for i in extra]
    return tuple(mixed)


def cap(records: Sequence[Record], limit: int | None, seed: int) -> tuple[Record, ...]:
    """At most `limit` records, drawn by the seed; a smaller limit takes a subset of a larger one's rows."""
    if limit is None or limit >= len(records):
        return tuple(records)
    drawn = np.random.default_rng([seed, _LIMIT_STREAM]).permutation(len(records))[:limit]
    return tuple(records[i] for i in sorted(drawn.tolist()))


def _digest(record: Record) -> bytes:
    return sha256(fingerprint([record]).encode()).digest()


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
