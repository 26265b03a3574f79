"""From examples to segment trees: flat rows of real tokens within a budget, beginnings that are alike computed once.

The gradient of a step is a sum over its documents, so their order within the step is free: they are sorted by their
tokens, which brings equal beginnings together. Documents of one row of the data stay together, and in one batch: an
objective may compare them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch

from rung.types import Example, LossIndex, PackedBatch, Segment, SharedPrefix

MIN_SHARED = 16
"""Shorter common beginnings cost more in bookkeeping than they save."""

SLICE = 512
"""Documents packed together where the whole set is only summed over."""
MIN_PREFIX_AHEAD = 64
"""A beginning that several batches of a step share runs once, ahead of them, when it has at least this many tokens."""


def pack(
    examples: Sequence[Example], budget: int, *, share_prefixes: bool = True, device: torch.device | None = None
) -> list[PackedBatch]:
    """Batches of at most `budget` computed tokens each (a longer document stands alone), together all examples.

    Batches with the same `prefix` stand next to each other; its tokens are not part of their rows. No row mixes tasks.
    """
    tasks = {e.task for e in examples}
    if not tasks:
        return []
    if len(tasks) > 1:
        own = [[e for e in examples if e.task == task] for task in sorted(tasks, key=str)]
        return [b for part in own for b in pack(part, budget, share_prefixes=share_prefixes, device=device)]
    ordered, common = _sorted_by_tokens(examples)
    if not share_prefixes:
        return _pack_group(_PrefixGroup(ordered, [0] * len(ordered), 0), budget, False, device)
    found: list[PackedBatch] = []
    for run, ahead in _merged(_best_cuts(ordered, common, range(len(ordered)), budget)):
        group = _PrefixGroup(ordered[run.start : run.stop], common[run.start : run.stop], ahead)
        found += _pack_group(group, budget, share_prefixes, device)
    return found


def pack_together(
    examples: Sequence[Example], budget: int, *, share_prefixes: bool = True, device: torch.device | None = None
) -> list[PackedBatch]:
    """Like `pack`, with every document whole in its row: nothing runs ahead, and tasks do not matter."""
    ordered, common = _sorted_by_tokens(examples)
    return _pack_group(
        _PrefixGroup(ordered, common if share_prefixes else [0] * len(ordered), 0), budget, share_prefixes, device
    )


def pack_separately(examples: Sequence[Example], device: torch.device | None = None) -> list[PackedBatch]:
    """One document a batch, or one row of the data: the plain way, for comparison."""
    rows: list[list[Example]] = []
    for example in examples:
        if not rows or _from_different_rows(rows[-1][-1], example):
            rows.append([])
        rows[-1].append(example)
    return [_batch(row, False, device) for row in rows]


def pack_in_slices(
    examples: Iterable[Example], budget: int, *, share_prefixes: bool = True, device: torch.device | None = None
) -> Iterator[PackedBatch]:
    """Batches of a set of any size, of which only a slice is in memory at once."""
    slice_: list[Example] = []
    for example in examples:
        if len(slice_) >= SLICE and _from_different_rows(slice_[-1], example):
            yield from pack(slice_, budget, share_prefixes=share_prefixes, device=device)
            slice_ = []
        slice_.append(example)
    if slice_:
        yield from pack(slice_, budget, share_prefixes=share_prefixes, device=device)


def largest_first(batches: Sequence[PackedBatch]) -> list[PackedBatch]:
    """The same batches; what a small one needs then fits where a larger one has been.

    The allocator cannot put a larger row where a smaller one was, so rising sizes leave holes. Batches of one prefix
    stay together.
    """
    together = [list(group) for _, group in groupby(batches, key=lambda batch: batch.prefix)]
    together.sort(key=lambda group: -max(len(batch.ids) for batch in group))
    return [batch for group in together for batch in sorted(group, key=lambda batch: -len(batch.ids))]


class _PrefixGroup(NamedTuple):
    """Neighbours in the sorted order, what each has in common with the one before, and what runs ahead of them all."""

    examples: Sequence[Example]
    common: Sequence[int]
    ahead: int

    def borders(self) -> list[int]:
        """Where it may be cut: before each document that does not belong to the row of the one before."""
        return [i for i, (a, b) in enumerate(pairwise(self.examples), start=1) if _from_different_rows(a, b)]

    def costs(self) -> list[int]:
        """Tokens to compute for each, if all stood in one row."""
        shared = [0, *(c - self.ahead if c - self.ahead >= MIN_SHARED else 0 for c in self.common[1:])]
        return [len(e) - self.ahead - s for e, s in zip(self.examples, shared, strict=True)]


def _sorted_by_tokens(examples: Sequence[Example]) -> tuple[list[Example], list[int]]:
    """Sorted by tokens, with what each has in common with the one before."""
    first: dict[int, list[int]] = {}
    for e in sorted(examples, key=lambda e: e.ids.tolist(), reverse=True):
        first[e.row] = e.ids.tolist()  # the lowest of a row stands for it
    ordered = sorted(examples, key=lambda e: (e.ids.tolist() if e.row < 0 else first[e.row], e.row, e.ids.tolist()))
    return ordered, [0, *(_common_prefix_length(a.ids, b.ids) for a, b in pairwise(ordered))]


def _best_cuts(
    ordered: Sequence[Example], common: Sequence[int], run: range, budget: int, depth: int = 0
) -> list[tuple[range, int, int]]:
    """Cut a run into (part, tokens to run ahead, tokens saved by it) so that most is saved.

    A beginning runs ahead only when nothing in it is supervised: then every prediction is made within the rows.
    """
    group = _PrefixGroup(ordered[run.start : run.stop], common[run.start : run.stop], 0)
    rows = -(-sum(group.costs()) // budget)
    if rows < 2 or len(run) < 2 or depth > 64:
        return [(run, 0, 0)]
    shared = min(common[i] for i in run[1:])
    predicted = [int(e.supervised[1:].argmax()) if e.supervised[1:].any() else len(e) - 1 for e in group.examples]
    ahead = min(shared, *predicted, *(len(e) - 1 for e in group.examples))
    whole = (run, ahead, (rows - 1) * ahead) if ahead >= MIN_PREFIX_AHEAD else (run, 0, 0)
    cuts = [run.start, *(run.start + i for i in group.borders() if common[run.start + i] == shared), run.stop]
    if len(cuts) == 2:
        return [whole]
    parts = [piece for a, b in pairwise(cuts) for piece in _best_cuts(ordered, common, range(a, b), budget, depth + 1)]
    return parts if sum(saved for _, _, saved in parts) > whole[2] else [whole]


def _merged(parts: Sequence[tuple[range, int, int]]) -> list[tuple[range, int]]:
    """Neighbours with nothing ahead of them fill batches together."""
    merged: list[tuple[range, int]] = []
    for run, ahead, _ in parts:
        if merged and not ahead and not merged[-1][1]:
            merged[-1] = (range(merged[-1][0].start, run.stop), 0)
        else:
            merged.append((run, ahead))
    return merged


def _pack_group(
    group: _PrefixGroup, budget: int, share_prefixes: bool, device: torch.device | None
) -> list[PackedBatch]:
    # As many rows as the budget needs, as equal as they can be: the largest sets the memory, and rows of one size leave
    # no holes in the heap.
    costs = group.costs()
    fewest = len(_split_to_budget(group, costs, budget))
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_split_to_budget(group, costs, middle)) <= fewest else (middle + 1, high)
    rows = [group.examples[row.start : row.stop] for row in _split_to_budget(group, costs, low)]
    prefix = SharedPrefix(_tensor([group.examples[0].ids[: group.ahead]], device)) if group.ahead else None
    return [batch for row in rows for batch in _pack_within_budget(row, budget, share_prefixes, device, prefix)]


def _split_to_budget(group: _PrefixGroup, costs: Sequence[int], most: int) -> list[range]:
    """Neighbours in rows of at most `most` computed tokens; a longer document stands alone."""
    rows: list[range] = []
    filled = 0
    for start, stop in pairwise([0, *group.borders(), len(group.examples)]):
        cost = sum(costs[start:stop])
        if not rows or filled + cost > most:
            rows.append(range(start, start))
            # the first of a row shares with nobody
            filled, cost = 0, cost - costs[start] + len(group.examples[start]) - group.ahead
        rows[-1] = range(rows[-1].start, stop)
        filled += cost
    return rows


def _pack_within_budget(
    group: Sequence[Example],
    budget: int,
    share_prefixes: bool,
    device: torch.device | None,
    prefix: SharedPrefix | None,
) -> list[PackedBatch]:
    """The costs above take a prefix as shared by neighbours; where the tree shares a little less, halves fit."""
    batch = _batch(group, share_prefixes, device, prefix)
    borders = _PrefixGroup(group, (), 0).borders()
    if len(batch.ids) <= budget or not borders:
        return [batch]
    half = min(borders, key=lambda border: abs(border - len(group) // 2))
    halves = (group[:half], group[half:])
    return [b for part in halves for b in _pack_within_budget(part, budget, share_prefixes, device, prefix)]


class _RowBuilder:
    """A packed row under construction. `rows[i]` lists where the tokens of example i stand."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.length = 0
        self.rows: list[list[np.ndarray]] = [[] for _ in examples]

    def add(self, members: range, start: int, end: int, parent: int | None) -> int | None:
        """Lay down tokens [start, end) that all members share; the segment, or the parent when there are none."""
        if start == end:
            return parent
        length = end - start
        self.ids.append(self.examples[members[0]].ids[start:end])
        self.positions.append(np.arange(start, end))
        self.segments.append(Segment(self.length, self.length + length, parent))
        for member in members:
            self.rows[member].append(np.arange(self.length, self.length + length))
        self.length += length
        return len(self.segments) - 1

    def add_tree(self, members: range, depth: int, parent: int | None) -> None:
        """Lay down examples in order that agree on their first `depth` tokens."""
        own = [self.examples[member] for member in members]
        if len(own) == 1:
            self.add(members, depth, len(own[0]), parent)
            return
        # what all neighbours share, all share; the ends alone say less, because rows of the data stand together
        common = min(_common_prefix_length(a.ids, b.ids) for a, b in pairwise(own))
        alike = all(len(e) == common for e in own)
        if common - depth >= MIN_SHARED or alike:
            node = self.add(members, depth, common, parent)
            if alike:
                return
            self._add_runs(members, common, node)
        else:
            self._add_runs(members, depth, parent)

    def _add_runs(self, members: range, depth: int, parent: int | None) -> None:
        """Split where neighbours no longer share enough, and go down into each run."""
        start = members.start
        for i in range(members.start + 1, members.stop + 1):
            if i < members.stop:
                a, b = self.examples[i - 1].ids, self.examples[i].ids
                if _common_prefix_length(a, b) - depth >= MIN_SHARED or np.array_equal(a, b):
                    continue
            self.add_tree(range(start, i), depth, parent)
            start = i


def _batch(
    examples: Sequence[Example], share_prefixes: bool, device: torch.device | None, prefix: SharedPrefix | None = None
) -> PackedBatch:
    row, ahead = _RowBuilder(examples), 0 if prefix is None else len(prefix.ids)
    if share_prefixes:
        row.add_tree(range(len(examples)), ahead, None)
    else:
        for i, example in enumerate(examples):
            row.add(range(i, i + 1), ahead, len(example), None)
    source, target, weight, owner = [], [], [], []
    columns: dict[str, list[np.ndarray]] = {name: [] for name in examples[0].columns}
    places = [np.concatenate(rows) for rows in row.rows]
    for i, (example, rows) in enumerate(zip(examples, places, strict=True)):
        predicted = np.flatnonzero(example.supervised)
        predicted = predicted[predicted > 0]
        source.append(rows[predicted - 1 - ahead])
        target.append(example.ids[predicted])
        weight.append(np.full(len(predicted), example.weight, dtype=np.float32))
        owner.append(np.full(len(predicted), i))
        for name, values in columns.items():
            values.append(example.columns[name])
    further = {name: torch.from_numpy(np.concatenate(values)).to(device) for name, values in columns.items()}
    index = [_tensor(part, device) for part in (source, target, weight, owner)]
    loss = LossIndex(index[0], index[1], index[2], index[3], further)
    return PackedBatch(
        ids=_tensor(row.ids, device),
        positions=_tensor(row.positions, device),
        segments=tuple(row.segments),
        loss=loss,
        sequences=len(examples),
        document_tokens=sum(len(e) for e in examples),
        documents=tuple(examples),
        rows=tuple(places),
        prefix=prefix,
    )


def _tensor(parts: Sequence[np.ndarray], device: torch.device | None) -> torch.Tensor:
    joined = np.concatenate(parts)
    whole = joined if joined.dtype == np.float32 else joined.astype(np.int64)
    return torch.from_numpy(whole).to(device)


def _from_different_rows(a: Example, b: Example) -> bool:
    """Whether neighbours belong to different rows of the data."""
    return a.row < 0 or a.row != b.row


def _common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
