"""From examples to segment trees: flat rows of real tokens within a budget, beginnings that are alike computed once.

The gradient of a step is a sum over its documents, so their order within the step is free: they are sorted by their
tokens, which brings equal beginnings together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rung.types import Example, LossIndex, PackedBatch, Segment

MIN_SHARED = 16
"""Shorter common beginnings cost more in bookkeeping than they save."""


def pack(
    examples: Sequence[Example], budget: int, *, share_prefixes: bool = True, device: torch.device | None = None
) -> list[PackedBatch]:
    """Batches of at most `budget` computed tokens each (a longer document stands alone), together all examples."""
    ordered = sorted(examples, key=lambda e: e.ids.tolist())
    costs = [len(e) for e in ordered]
    if share_prefixes:
        for i in range(1, len(ordered)):
            common = _common(ordered[i - 1].ids, ordered[i].ids)
            costs[i] -= common if common >= MIN_SHARED else 0
    # Equal batches need less memory than full ones and a small rest, in the same time.
    target = min(budget, -(-sum(costs) // max(1, -(-sum(costs) // budget))))
    groups: list[list[Example]] = []
    filled = budget + 1
    for example, cost in zip(ordered, costs, strict=True):
        if filled + cost > budget or filled >= target:
            groups.append([])
            filled, cost = 0, len(example)
        groups[-1].append(example)
        filled += cost
    return [batch for group in groups for batch in _within(group, budget, share_prefixes, device)]


def _within(
    group: Sequence[Example], budget: int, share_prefixes: bool, device: torch.device | None
) -> list[PackedBatch]:
    """The costs above take a prefix as shared by neighbours; where the tree shares a little less, halves fit."""
    batch = _batch(group, share_prefixes, device)
    if len(batch.ids) <= budget or len(group) == 1:
        return [batch]
    half = len(group) // 2
    return [b for part in (group[:half], group[half:]) for b in _within(part, budget, share_prefixes, device)]


def pack_separately(examples: Sequence[Example], device: torch.device | None = None) -> list[PackedBatch]:
    """One document a batch: the plain way, for comparison."""
    return [_batch([example], False, device) for example in examples]


class _Row:
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
        """Lay down sorted examples that agree on their first `depth` tokens."""
        first, last = self.examples[members[0]], self.examples[members[-1]]
        if len(members) == 1:
            self.add(members, depth, len(first), parent)
            return
        common = _common(first.ids, last.ids)  # sorted: what the ends share, all share
        if common - depth >= MIN_SHARED or common == len(first) == len(last):
            node = self.add(members, depth, common, parent)
            if common == len(first) == len(last):
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
                if _common(a, b) - depth >= MIN_SHARED or np.array_equal(a, b):
                    continue
            self.add_tree(range(start, i), depth, parent)
            start = i


def _batch(examples: Sequence[Example], share_prefixes: bool, device: torch.device | None) -> PackedBatch:
    row = _Row(examples)
    if share_prefixes:
        row.add_tree(range(len(examples)), 0, None)
    else:
        for i, example in enumerate(examples):
            row.add(range(i, i + 1), 0, len(example), None)
    source, target, weight, owner = [], [], [], []
    for i, example in enumerate(examples):
        rows = np.concatenate(row.rows[i])
        predicted = np.flatnonzero(example.supervised)
        predicted = predicted[predicted > 0]
        source.append(rows[predicted - 1])
        target.append(example.ids[predicted])
        weight.append(np.full(len(predicted), example.weight, dtype=np.float32))
        owner.append(np.full(len(predicted), i))
    loss = LossIndex(_tensor(source, device), _tensor(target, device), _tensor(weight, device), _tensor(owner, device))
    return PackedBatch(
        ids=_tensor(row.ids, device),
        positions=_tensor(row.positions, device),
        segments=tuple(row.segments),
        loss=loss,
        sequences=len(examples),
        document_tokens=sum(len(e) for e in examples),
        sources=[e.source for e in examples],
    )


def _tensor(parts: Sequence[np.ndarray], device: torch.device | None) -> torch.Tensor:
    joined = np.concatenate(parts)
    whole = joined if joined.dtype == np.float32 else joined.astype(np.int64)
    return torch.from_numpy(whole).to(device)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
