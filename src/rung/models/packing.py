"""Packing: documents become flat rows without padding, and equal prefixes of documents are computed once.

The gradient of a step is a sum over its documents, so their order within the step is free: they are sorted by tokens,
which puts equal prefixes next to each other. A row is a tree of segments (decision 0002); a prefix of several rows runs
ahead of them (decision 0008). Documents of one data row stay in one batch, because an objective may compare them
(decision 0017). The price is a sort and prefix comparisons per step on the CPU. `Trainer.pack` calls `pack`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch

from rung.types import Example, LossIndex, PackedBatch, Segment, SharedPrefix

MIN_SHARED = 16
"""Tokens; a shorter common prefix costs more bookkeeping (one more segment per branch) than it saves."""

SLICE_DOCUMENTS = 512
"""Documents packed at once where a whole data set is only summed over: bounds memory."""
MIN_PREFIX_AHEAD = 64
"""Tokens; a prefix that several batches of a step share runs once ahead of them when it is at least this long."""


def pack(
    examples: Sequence[Example],
    budget: int,
    *,
    share_prefixes: bool = True,
    device: torch.device | None = None,
    boundary: int | None = None,
) -> list[PackedBatch]:
    """Batches of at most `budget` computed tokens that together hold all examples; a longer document has its own.

    Batches with the same `prefix` are adjacent; its tokens are not part of their rows. No batch mixes tasks.
    `boundary` is the policy's `rope_boundary`: longer documents share no prefix with others.
    """
    if boundary is not None:
        parts = _split_by_length(examples, boundary)
        shared = (pack(part, budget, share_prefixes=share_prefixes and same, device=device) for part, same in parts)
        return list(chain.from_iterable(shared))
    tasks = {example.task for example in examples}
    if not tasks:
        return []
    if len(tasks) > 1:
        # virtual tokens differ by task, and those before the documents are read by the whole row (decision 0014)
        by_task = [[example for example in examples if example.task == task] for task in sorted(tasks, key=str)]
        batches_by_task = (pack(part, budget, share_prefixes=share_prefixes, device=device) for part in by_task)
        return list(chain.from_iterable(batches_by_task))
    ordered, common = _sorted_by_tokens(examples)
    build = partial(_build_batch, share_prefixes=share_prefixes, device=device)
    if not share_prefixes:
        return _pack_group(_PrefixGroup(ordered, [0] * len(ordered), 0), budget, build)
    batches: list[PackedBatch] = []
    for span, prefix_length in _merge_uncut(_best_cuts(ordered, common, range(len(ordered)), budget)):
        group = _PrefixGroup(ordered[span.start : span.stop], common[span.start : span.stop], prefix_length)
        # one object for all batches of the group: the policy runs a prefix once by its identity
        ids = ordered[span.start].ids[:prefix_length]
        prefix = SharedPrefix(_to_tensor([ids], device)) if prefix_length else None
        batches += _pack_group(group, budget, partial(build, prefix=prefix))
    return batches


def pack_together(
    examples: Sequence[Example],
    budget: int,
    *,
    share_prefixes: bool = True,
    device: torch.device | None = None,
    boundary: int | None = None,
) -> list[PackedBatch]:
    """Like `pack`, but without prefixes that run ahead and without a split by task."""
    if boundary is not None:
        parts = _split_by_length(examples, boundary)
        shared = (pack_together(p, budget, share_prefixes=share_prefixes and same, device=device) for p, same in parts)
        return list(chain.from_iterable(shared))
    ordered, common = _sorted_by_tokens(examples)
    group = _PrefixGroup(ordered, common if share_prefixes else [0] * len(ordered), 0)
    return _pack_group(group, budget, partial(_build_batch, share_prefixes=share_prefixes, device=device))


def pack_separately(examples: Sequence[Example], device: torch.device | None = None) -> list[PackedBatch]:
    """One document (or one data row of several) per batch: the plain way, for comparison."""
    documents = list(examples)
    cuts = [0, *_PrefixGroup(documents, (), 0).borders(), len(documents)]
    return [_build_batch(documents[start:stop], False, device) for start, stop in pairwise(cuts) if start < stop]


def pack_lazily(
    examples: Iterable[Example],
    budget: int,
    *,
    share_prefixes: bool = True,
    device: torch.device | None = None,
    boundary: int | None = None,
) -> Iterator[PackedBatch]:
    """Batches of a data set of any size; only one slice of `SLICE_DOCUMENTS` documents is in memory at once."""
    slice_: list[Example] = []
    for example in examples:
        # cut between data rows only
        if len(slice_) >= SLICE_DOCUMENTS and _from_different_rows(slice_[-1], example):
            yield from pack(slice_, budget, share_prefixes=share_prefixes, device=device, boundary=boundary)
            slice_ = []
        slice_.append(example)
    if slice_:
        yield from pack(slice_, budget, share_prefixes=share_prefixes, device=device, boundary=boundary)


def _split_by_length(examples: Sequence[Example], boundary: int) -> list[tuple[list[Example], bool]]:
    """Examples of rows within, beyond and on both sides of a length, and whether all of them are on one side.

    The keys and values of a prefix are others in a document beyond the boundary (`models/rotary.py`).
    """
    # a document without a row is a row by itself
    row_keys = [example.row if example.row >= 0 else -1 - i for i, example in enumerate(examples)]
    sides: dict[int, set[bool]] = {}
    for key, example in zip(row_keys, examples, strict=True):
        sides.setdefault(key, set()).add(len(example) > boundary)
    parts: dict[tuple[bool, ...], list[Example]] = {}
    for key, example in zip(row_keys, examples, strict=True):
        parts.setdefault(tuple(sorted(sides[key])), []).append(example)
    return [(part, len(sides_of_part) == 1) for sides_of_part, part in sorted(parts.items())]


def largest_first(batches: Sequence[PackedBatch]) -> list[PackedBatch]:
    """The same batches, largest first, which avoids heap fragmentation.

    The allocator cannot reuse the block of a smaller row for a larger one, so rising sizes leave holes (docs/log.md).
    Batches of one prefix stay adjacent.
    """
    together = [list(group) for _, group in groupby(batches, key=lambda batch: batch.prefix)]
    together.sort(key=lambda group: -max(len(batch.ids) for batch in group))
    return [batch for group in together for batch in sorted(group, key=lambda batch: -len(batch.ids))]


class _PrefixGroup(NamedTuple):
    """Adjacent examples in sorted order, common prefix lengths of neighbours, and the prefix that runs ahead."""

    examples: Sequence[Example]
    common_prefix_lengths: Sequence[int]
    prefix_length: int

    def borders(self) -> list[int]:
        """Indices where the group may be cut: before each document of another data row than its predecessor."""
        return [i for i, (a, b) in enumerate(pairwise(self.examples), start=1) if _from_different_rows(a, b)]

    def costs(self) -> list[int]:
        """Tokens to compute for each document if all were in one batch."""
        # an estimate: the tree may share less than neighbours do (`_pack_within_budget` corrects it)
        lengths = [len(example) - self.prefix_length for example in self.examples]
        shared_lengths = [0, *(common - self.prefix_length for common in self.common_prefix_lengths[1:])]
        pairs = zip(lengths, shared_lengths, strict=True)
        return [length - (shared if shared >= MIN_SHARED else 0) for length, shared in pairs]


def _sorted_by_tokens(examples: Sequence[Example]) -> tuple[list[Example], list[int]]:
    """The examples sorted by tokens, and the common prefix length of each with its predecessor."""
    first_ids: dict[int, list[int]] = {}
    for example in sorted(examples, key=lambda example: example.ids.tolist(), reverse=True):
        first_ids[example.row] = example.ids.tolist()  # descending: the last write is the smallest document of the row

    def position(example: Example) -> tuple[list[int], int, list[int]]:
        # a data row takes the place of its smallest document, so that its documents stay adjacent
        ids = example.ids.tolist()
        return ids if example.row < 0 else first_ids[example.row], example.row, ids

    ordered = sorted(examples, key=position)
    return ordered, [0, *(_common_prefix_length(a.ids, b.ids) for a, b in pairwise(ordered))]


def _best_cuts(
    ordered: Sequence[Example], common_prefix_lengths: Sequence[int], span: range, budget: int, depth: int = 0
) -> list[tuple[range, int, int]]:
    """Cut a span into (span, length of the prefix that runs ahead, tokens it saves) so that the savings are largest.

    A prefix runs ahead only if nothing in it is supervised: then every prediction is made within the rows.
    """
    group = _PrefixGroup(ordered[span.start : span.stop], common_prefix_lengths[span.start : span.stop], 0)
    row_count = -(-sum(group.costs()) // budget)
    # a single batch needs no prefix ahead. Depth 64 bounds the recursion for documents that are prefixes of each other
    if row_count < 2 or len(span) < 2 or depth > 64:
        return [(span, 0, 0)]
    shared_length = min(common_prefix_lengths[i] for i in span[1:])
    first_predictions = [int(e.supervised[1:].argmax()) for e in group.examples if e.supervised[1:].any()]
    # a row keeps the last token before its first prediction, and at least one token of every document
    prefix_length = min(shared_length, *first_predictions, *(len(example) - 1 for example in group.examples))
    if prefix_length < MIN_PREFIX_AHEAD:
        prefix_length = 0
    uncut = (span, prefix_length, (row_count - 1) * prefix_length)
    borders = [span.start + i for i in group.borders()]
    cuts = [span.start, *(i for i in borders if common_prefix_lengths[i] == shared_length), span.stop]
    if len(cuts) == 2:
        return [uncut]
    parts: list[tuple[range, int, int]] = []
    for start, stop in pairwise(cuts):
        parts += _best_cuts(ordered, common_prefix_lengths, range(start, stop), budget, depth + 1)
    # on a tie the single prefix wins: fewer batches with prefixes of their own
    return parts if sum(saved for _, _, saved in parts) > uncut[2] else [uncut]


def _merge_uncut(parts: Sequence[tuple[range, int, int]]) -> list[tuple[range, int]]:
    """Join adjacent spans without a prefix ahead, so that they fill batches together."""
    merged: list[tuple[range, int]] = []
    for span, prefix_length, _ in parts:
        if merged and not prefix_length and not merged[-1][1]:
            merged[-1] = (range(merged[-1][0].start, span.stop), 0)
        else:
            merged.append((span, prefix_length))
    return merged


BuildBatch = Callable[[Sequence[Example]], PackedBatch]


def _pack_group(group: _PrefixGroup, budget: int, build: BuildBatch) -> list[PackedBatch]:
    # the fewest rows within the budget, as equal as possible: the largest sets the peak memory, and rows of one size
    # leave no holes in the heap. Binary search for the lowest limit that needs no more rows
    costs = group.costs()
    fewest_rows = len(_split_to_budget(group, costs, budget))

    def is_enough(limit: int) -> bool:
        return len(_split_to_budget(group, costs, limit)) <= fewest_rows

    lowest = bisect_left(range(budget), True, lo=1, key=is_enough)
    rows = [group.examples[span.start : span.stop] for span in _split_to_budget(group, costs, lowest)]
    return [batch for row in rows for batch in _pack_within_budget(row, budget, build)]


def _split_to_budget(group: _PrefixGroup, costs: Sequence[int], limit: int) -> list[range]:
    """Cut a group into adjacent spans of at most `limit` computed tokens; a longer data row gets a span of its own."""
    rows: list[range] = []
    row_tokens = 0
    for start, stop in pairwise([0, *group.borders(), len(group.examples)]):
        cost = sum(costs[start:stop])
        if not rows or row_tokens + cost > limit:
            rows.append(range(start, start))
            # the first document of a batch has no predecessor to share tokens with
            row_tokens, cost = 0, cost - costs[start] + len(group.examples[start]) - group.prefix_length
        rows[-1] = range(rows[-1].start, stop)
        row_tokens += cost
    return rows


def _pack_within_budget(group: Sequence[Example], budget: int, build: BuildBatch) -> list[PackedBatch]:
    """One batch, or two halves where the tree needs more tokens than `costs` estimated."""
    batch = build(group)
    borders = _PrefixGroup(group, (), 0).borders()
    if len(batch.ids) <= budget or not borders:
        return [batch]
    half = min(borders, key=lambda border: abs(border - len(group) // 2))
    return [b for part in (group[:half], group[half:]) for b in _pack_within_budget(part, budget, build)]


class _RowBuilder:
    """A packed row under construction. `rows[i]` lists the positions of the tokens of example i."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.length = 0
        self.rows: list[list[np.ndarray]] = [[] for _ in examples]

    def add(self, members: range, start: int, end: int, parent: int | None) -> int | None:
        """Append tokens [start, end), shared by all members. Returns the new segment; `parent` for an empty range."""
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
        """Append members in order, all of which agree on their first `depth` tokens."""
        member_examples = [self.examples[member] for member in members]
        if len(member_examples) == 1:
            self.add(members, depth, len(member_examples[0]), parent)
            return
        # the minimum over neighbours, not first against last: adjacent data rows interrupt the order by tokens
        common = min(_common_prefix_length(a.ids, b.ids) for a, b in pairwise(member_examples))
        all_equal = all(len(e) == common for e in member_examples)
        if common - depth >= MIN_SHARED or all_equal:
            depth, parent = common, self.add(members, depth, common, parent)
        if not all_equal:
            self._add_spans(members, depth, parent)

    def _add_spans(self, members: range, depth: int, parent: int | None) -> None:
        """Split where neighbours share fewer than MIN_SHARED further tokens, and recurse into each span."""
        start = members.start
        for i in range(members.start + 1, members.stop + 1):
            if i < members.stop:
                a, b = self.examples[i - 1].ids, self.examples[i].ids
                # equal documents share everything, however short they are
                if _common_prefix_length(a, b) - depth >= MIN_SHARED or np.array_equal(a, b):
                    continue
            self.add_tree(range(start, i), depth, parent)
            start = i


def _build_batch(
    examples: Sequence[Example], share_prefixes: bool, device: torch.device | None, prefix: SharedPrefix | None = None
) -> PackedBatch:
    builder, prefix_length = _RowBuilder(examples), 0 if prefix is None else len(prefix.ids)
    if share_prefixes:
        builder.add_tree(range(len(examples)), prefix_length, None)
    else:
        for i, example in enumerate(examples):
            builder.add(range(i, i + 1), prefix_length, len(example), None)
    source, target, weight, owner = [], [], [], []
    token_positions = [np.concatenate(positions) for positions in builder.rows]
    for i, (example, positions) in enumerate(zip(examples, token_positions, strict=True)):
        predicted_positions = np.flatnonzero(example.supervised)
        # the first token has no predecessor to predict it
        predicted_positions = predicted_positions[predicted_positions > 0]
        source.append(positions[predicted_positions - 1 - prefix_length])
        target.append(example.ids[predicted_positions])
        weight.append(np.full(len(predicted_positions), example.weight, dtype=np.float32))
        owner.append(np.full(len(predicted_positions), i))
    columns = {name: np.concatenate([e.columns[name] for e in examples]) for name in examples[0].columns}
    column_tensors = {name: _on_device(torch.from_numpy(values), device) for name, values in columns.items()}
    index = [_to_tensor(part, device) for part in (source, target, weight, owner)]
    loss = LossIndex(index[0], index[1], index[2], index[3], column_tensors)
    return PackedBatch(
        ids=_to_tensor(builder.ids, device),
        positions=_to_tensor(builder.positions, device),
        segments=tuple(builder.segments),
        loss=loss,
        sequences=len(examples),
        document_tokens=sum(len(e) for e in examples),
        documents=tuple(examples),
        rows=tuple(token_positions),
        prefix=prefix,
    )


def _to_tensor(parts: Sequence[np.ndarray], device: torch.device | None) -> torch.Tensor:
    array = np.concatenate(parts)
    # float32 are the weights; everything else is ids and positions, which torch indexes with int64
    typed = array if array.dtype == np.float32 else array.astype(np.int64)
    return _on_device(torch.from_numpy(typed), device)


def _on_device(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """The tensor on the device; a card copies from pinned memory while the host goes on."""
    if device is not None and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _from_different_rows(a: Example, b: Example) -> bool:
    """Whether neighbours belong to different data rows; -1 marks a document without a row."""
    return a.row < 0 or a.row != b.row


def _common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differences = np.flatnonzero(a[:length] != b[:length])
    return int(differences[0]) if len(differences) else length
