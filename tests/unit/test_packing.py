"""Packing into segment trees."""

from __future__ import annotations

from itertools import groupby, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import documents, example
from rung.models.packing import MIN_PREFIX_AHEAD, MIN_SHARED, largest_first, pack, pack_lazily, pack_separately
from rung.types import Example, PackedBatch

HEAD = list(range(100, 100 + MIN_SHARED))


def unrolled(batch: PackedBatch) -> list[tuple[list[int], list[int], list[float]]]:
    """Each document's predicted tokens in order, with the tokens its sources stand on, from the batch alone."""
    found = []
    for owner in range(batch.sequences):
        mine = batch.loss.owner == owner
        sources = batch.ids[batch.loss.source[mine]].tolist()
        found.append((sources, batch.loss.target[mine].tolist(), batch.loss.weight[mine].tolist()))
    return found


def expected(examples: list[Example]) -> list[tuple[list[int], list[int], list[float]]]:
    found = []
    for e in sorted(examples, key=lambda e: e.ids.tolist()):
        at = np.flatnonzero(e.supervised)
        found.append((e.ids[at - 1].tolist(), e.ids[at].tolist(), [e.weight] * len(at)))
    return found


def path_of(batch: PackedBatch, index: int) -> list[int]:
    segment = batch.segments[index]
    before = path_of(batch, segment.parent) if segment.parent is not None else []
    return [*before, *batch.ids[segment.start : segment.end].tolist()]


def test_a_shared_prompt_is_laid_down_once() -> None:
    batch = pack([example([*HEAD, 1, 2], 17), example([*HEAD, 3, 4], 17), example([*HEAD, 1, 2], 17)], 1000)[0]
    assert len(batch.ids) == MIN_SHARED + 4
    assert batch.document_tokens == 3 * (MIN_SHARED + 2)
    assert [s.parent for s in batch.segments] == [None, 0, 0]
    # the last token of the prompt predicts the first answer token of every child
    assert batch.loss.source.tolist().count(MIN_SHARED) == 2


def test_three_levels() -> None:
    deeper = [*HEAD, *range(200, 200 + MIN_SHARED)]
    batch = pack([example([*deeper, 1, 5], 3), example([*deeper, 1, 4], 3), example([*HEAD, 7], 3)], 1000)[0]
    assert len(batch.ids) == (2 * MIN_SHARED + 1) + 1 + 1 + 1
    assert max(len(path_of(batch, i)) for i in range(len(batch.segments))) == 2 * MIN_SHARED + 2


def test_a_document_that_is_a_prefix_of_another() -> None:
    examples = [example(HEAD, 3), example([*HEAD, 9, 9], 3)]
    batch = pack(examples, 1000)[0]
    assert len(batch.ids) == MIN_SHARED + 2
    assert unrolled(batch) == expected(examples)


def test_short_common_beginnings_are_not_shared() -> None:
    batch = pack([example([1, 2, 3, 4], 1), example([1, 2, 3, 5], 1)], 1000)[0]
    assert all(s.parent is None for s in batch.segments) and len(batch.ids) == 8


def test_sharing_can_be_switched_off() -> None:
    batch = pack([example([*HEAD, 1], 3), example([*HEAD, 2], 3)], 1000, share_prefixes=False)[0]
    assert all(s.parent is None for s in batch.segments) and len(batch.ids) == 2 * (MIN_SHARED + 1)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(0, 3), min_size=1, max_size=12)), min_size=1, max_size=12
    ),
    st.integers(16, 80),
    st.booleans(),
)
def test_every_prediction_survives(parts: list[tuple[int, list[int]]], budget: int, share: bool) -> None:
    """Whatever is shared or split, each document's (source, target, weight) entries are its own."""
    heads = [[], HEAD, [*HEAD, *range(50, 50 + MIN_SHARED)], list(range(50, 70))]
    examples = [example([*heads[h], 299, *own], 1, weight=1.0 + h) for h, own in parts]
    batches = pack(examples, budget, share_prefixes=share)
    assert sorted(e for b in batches for e in unrolled(b)) == sorted(expected(examples))
    assert sum(b.document_tokens for b in batches) == sum(map(len, examples))
    for batch in batches:
        assert len(batch.ids) <= budget or batch.sequences == 1
        covered = [i for s in batch.segments for i in range(s.start, s.end)]
        assert covered == list(range(len(batch.ids)))
        for i, segment in enumerate(batch.segments):
            assert segment.parent is None or segment.parent < i
            end = len(path_of(batch, i))
            assert batch.positions[segment.start : segment.end].tolist() == list(
                range(end - (segment.end - segment.start), end)
            )


def test_one_document_a_batch() -> None:
    examples = documents(count=3)
    batches = pack_separately(examples)
    assert [b.ids.tolist() for b in batches] == [e.ids.tolist() for e in examples]


@pytest.mark.parametrize("budget", [16, 64, 4096])
def test_batches_are_filled_evenly(budget: int) -> None:
    sizes = [len(b.ids) for b in pack(documents(3, count=40), budget)]
    total = sum(sizes)
    assert len(sizes) <= 2 * -(-total // budget) + 1
    assert torch.tensor(sizes).max() <= max(budget, 30)


@pytest.mark.soak
@settings(max_examples=20_000, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), min_size=1, max_size=20),
    st.integers(16, 200),
    st.booleans(),
)
def test_every_prediction_survives_long(rows: list[list[int]], budget: int, share: bool) -> None:
    examples = [example([*row, 299], 1) for row in rows]
    batches = pack(examples, budget, share_prefixes=share)
    assert sorted(e for b in batches for e in unrolled(b)) == sorted(expected(examples))
    assert all(len(b.ids) <= budget or b.sequences == 1 for b in batches)


LONG = list(range(3, 3 + MIN_PREFIX_AHEAD + 20))


def test_what_several_batches_begin_with_runs_ahead_of_them() -> None:
    examples = [example([*LONG, 100 + i, 7, 8, i], len(LONG) + 1) for i in range(40)]
    batches = pack(examples, 60)
    assert len(batches) > 1 and len({id(b.prefix) for b in batches}) == 1
    assert batches[0].prefix.ids.tolist() == LONG
    assert sum(len(b.ids) for b in batches) == 40 * 4
    assert all(int(b.positions.min()) == len(LONG) for b in batches)
    assert sum(b.document_tokens for b in batches) == 40 * (len(LONG) + 4)
    assert [d for b in batches for d in unrolled(b)] == expected(examples)


def test_nothing_supervised_runs_ahead() -> None:
    """The prediction of the first supervised token is made within the rows."""
    examples = [example([*LONG, 100 + i, 7], MIN_PREFIX_AHEAD + 5) for i in range(40)]
    batches = pack(examples, 60)
    assert {len(b.prefix.ids) for b in batches} == {MIN_PREFIX_AHEAD + 4}
    assert [d for b in batches for d in unrolled(b)] == expected(examples)
    early = [example([*LONG, 100 + i, 7], MIN_PREFIX_AHEAD - 5) for i in range(40)]
    assert {b.prefix for b in pack(early, 60)} == {None}


def test_two_groups_run_ahead_of_their_own_rows_and_the_rest_fills_together() -> None:
    other = [t + 150 for t in LONG]
    groups = [*([*LONG, 300 + i, 1] for i in range(30)), *([*other, 300 + i, 1] for i in range(30))]
    examples = [example(ids, len(LONG) + 1) for ids in groups] + [example([250 + i, 2], 1) for i in range(10)]
    batches = pack(examples, 40)
    assert {tuple(b.prefix.ids.tolist()) for b in batches if b.prefix} == {tuple(LONG), tuple(other)}
    assert sum(b.sequences for b in batches if b.prefix is None) == 10
    assert [d for b in batches for d in unrolled(b)] == expected(examples)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 30)), min_size=1, max_size=30))
def test_whatever_runs_ahead_every_prediction_is_made_once(shape: list[tuple[int, int, int]]) -> None:
    examples = []
    for i, (first, second, own) in enumerate(shape):
        ids = [*([first] * MIN_PREFIX_AHEAD), *([second] * MIN_PREFIX_AHEAD), *range(10 + i, 10 + i + own)]
        examples.append(example(ids, 2 * MIN_PREFIX_AHEAD))
    batches = pack(examples, 200)
    assert [d for b in batches for d in unrolled(b)] == expected(examples)
    assert all(len(b.ids) <= 200 or b.sequences == 1 for b in batches)


def test_the_largest_runs_first_and_rows_of_a_prefix_stay_together() -> None:
    groups = [
        *([*LONG, 300 + i, *range(i % 5)] for i in range(30)),
        *([t + 150 for t in LONG] + [i, 1] for i in range(30)),
    ]
    examples = [example(ids, len(LONG) + 1) for ids in groups] + [example(range(10, 14 + i), 1) for i in range(25)]
    batches = pack(examples, 40)
    ordered = largest_first(batches)
    assert sorted(map(id, ordered)) == sorted(map(id, batches)) and list(map(id, ordered)) != list(map(id, batches))
    runs = [list(rows) for _, rows in groupby(ordered, key=lambda b: b.prefix)]
    assert len(runs) == len({b.prefix for b in batches})
    assert all(len(a.ids) >= len(b.ids) for rows in runs for a, b in pairwise(rows))


def test_slices_hold_every_document_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rung.models.packing.SLICE_DOCUMENTS", 4)
    examples = documents(2, count=11)
    batches = list(pack_lazily(examples, 60))
    assert sorted(d.source.line for b in batches for d in b.documents) == [e.source.line for e in examples]
    assert max(b.sequences for b in batches) <= 4


def test_rows_are_as_few_as_the_budget_allows_and_as_equal_as_they_can_be() -> None:
    examples = [example([i * 20 + j for j in range(n)], 1) for i, n in enumerate([9, 9, 9, 9, 9, 9, 3, 3])]
    assert [len(b.ids) for b in pack(examples, 36)] == [27, 33]  # filled to the brim it would be 36 and 24
    assert [len(b.ids) for b in pack(examples, 20)] == [18, 18, 18, 6]
