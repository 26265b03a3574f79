"""Capped scores of a row in one kernel call: torch's own flex_attention, uncompiled and in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as flex_operator
from torch.nn.attention.flex_attention import BlockMask

from builders import documents, policy_of, rows, tuned
from rung.config.objective import SftConfig
from rung.models import flex_tree_attention, tree_attention
from rung.models.flex_tree_attention import BLOCK, block_mask, has_flex_kernel, tree_mask
from rung.models.packing import MIN_PREFIX_AHEAD, pack
from rung.models.tree_attention import AttentionParams, attend_tree, path_mask
from rung.objectives.sft import SftObjective
from rung.training.step import accumulate
from rung.types import Segment
from tolerances import FLOAT64

FLAT = (Segment(0, 5, None), Segment(5, 6, None), Segment(6, 14, None))
TREE = (Segment(0, 4, None), Segment(4, 9, 0), Segment(9, 11, 0), Segment(11, 12, 2), Segment(12, 17, None))
DEEP = (Segment(0, 150, None), Segment(150, 420, 0), Segment(420, 700, 1), Segment(700, 705, 1), Segment(705, 1000, 0))
CPU = torch.device("cpu")


def uncompiled(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    """torch's flex_attention as an operator: on a processor the function itself refuses a backward pass."""
    mask: BlockMask = given["block_mask"]
    assert mask.seq_lengths == (query.shape[2], key.shape[2])
    assert given["enable_gqa"] is (query.shape[1] != key.shape[1])
    scale = given["scale"] if given["scale"] is not None else query.shape[-1] ** -0.5
    out: Tensor = flex_operator(query, key, value, given["score_mod"], mask.as_tuple(), scale, {})[0]
    return out


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_tree_attention, "_compiled", lambda: uncompiled)
    monkeypatch.setattr(tree_attention, "has_flex_kernel", lambda query, value: True)


def results(segments: tuple[Segment, ...], window: int | None, prefix: int, kv_heads: int) -> list[Tensor]:
    """Output and gradients of queries, keys, values and the prefix, in float64."""
    draw, tokens = torch.Generator().manual_seed(prefix), segments[-1].end
    sizes = ((4, tokens), (kv_heads, tokens), (kv_heads, tokens), (kv_heads, prefix), (kv_heads, prefix))
    tensors = [torch.randn(1, h, n, 8, generator=draw, dtype=torch.float64).requires_grad_(True) for h, n in sizes]
    query, key, value, *before = tensors
    params = AttentionParams(0.9, 1.5, window)
    out = attend_tree(query, key, value, segments, tuple(before) if prefix else None, params)
    out.backward(torch.randn(out.shape, generator=draw, dtype=torch.float64))
    return [out, *(t.grad for t in tensors if t.grad is not None)]


@pytest.mark.parametrize("segments", [FLAT, TREE], ids=["flat", "tree"])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("prefix", [0, 6])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_one_call_is_the_attention_of_all_segments(
    segments: tuple[Segment, ...], window: int | None, prefix: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one launch a segment, itself tested against transformers' Gemma 2."""
    expected = results(segments, window, prefix, kv_heads)
    stand_in(monkeypatch)
    ours = results(segments, window, prefix, kv_heads)
    assert len(ours) == len(expected) == (6 if prefix else 4)
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() < FLOAT64


def naive_mask(segments: tuple[Segment, ...], prefix: int, window: int | None) -> Tensor:
    """Which keys [T, P + T] each query sees, segment by segment along its path."""
    visible = torch.zeros(segments[-1].end, prefix + segments[-1].end, dtype=torch.bool)
    for s in segments:
        path, parent = [], s.parent
        while parent is not None:
            path.insert(0, segments[parent])
            parent = segments[parent].parent
        ranges = [range(prefix), *(range(prefix + a.start, prefix + a.end) for a in (*path, s))]
        keys = torch.tensor([key for keys in ranges for key in keys])
        length = s.end - s.start
        visible[s.start : s.end, keys] = path_mask(len(keys) - length, length, window, CPU)
    return visible


def random_tree(seed: int) -> tuple[Segment, ...]:
    """Segments that lie depth first: each follows the last one, below one of the ancestors of the last one."""
    rng, segments = np.random.default_rng(seed), list[Segment]()
    open_: list[int] = []
    for index in range(int(rng.integers(1, 40))):
        open_ = open_[: int(rng.integers(0, len(open_) + 1))]
        start = segments[-1].end if segments else 0
        segments.append(Segment(start, start + int(rng.integers(1, 90)), open_[-1] if open_ else None))
        open_.append(index)
    return tuple(segments)


TREES = [FLAT, TREE, DEEP, *(random_tree(seed) for seed in range(12))]


@pytest.mark.parametrize("segments", TREES)
@pytest.mark.parametrize(("prefix", "window"), [(0, None), (70, None), (0, 40), (300, 150)])
def test_the_closed_form_and_its_blocks(segments: tuple[Segment, ...], prefix: int, window: int | None) -> None:
    """Every pair of the mask; blocks of which no pair is listed are empty, and those listed as full are full."""
    expected = naive_mask(segments, prefix, window)
    mask = block_mask(segments, prefix, window, CPU)
    queries, keys = torch.arange(expected.shape[0])[:, None], torch.arange(expected.shape[1])[None]
    assert torch.equal(mask.mask_mod(queries, queries, queries, keys), expected)
    padded = torch.zeros([-(-n // BLOCK) * BLOCK for n in expected.shape], dtype=torch.bool)
    padded[: expected.shape[0], : expected.shape[1]] = expected
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK).transpose(1, 2)
    some = mask.to_dense()[0, 0].bool()
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    full = torch.zeros_like(some)
    for row, (count, listed) in enumerate(zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)):
        full[row, listed[:count].long()] = True
    assert not (blocks.flatten(2).any(-1) & ~some).any()
    real = torch.arange(expected.shape[0], padded.shape[0])  # rows of the last block that are no queries
    blocks = blocks.clone()
    blocks[-1, :, len(blocks[-1, 0]) - len(real) :] = True
    assert not (full & ~blocks.flatten(2).all(-1)).any()


def test_blocks_between_branches_are_skipped() -> None:
    """Eight answers of 256 tokens to a prompt of 1,024: each answer reads the prompt and itself, not the others."""
    segments = (Segment(0, 1024, None), *(Segment(1024 + 256 * i, 1280 + 256 * i, 0) for i in range(8)))
    mask = block_mask(segments, 0, None, CPU)
    assert mask.to_dense().sum() == sum(range(1, 9)) + 8 * (2 * 8 + 3)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_num_blocks.sum() == sum(range(8)) + 8 * (2 * 8 + 1)


def test_segments_that_do_not_lie_depth_first_are_refused() -> None:
    breadth_first = (Segment(0, 4, None), Segment(4, 9, 0), Segment(9, 11, 0), Segment(11, 12, 1))
    with pytest.raises(ValueError, match="segment 3 does not follow the subtree of its ancestor 1"):
        tree_mask(breadth_first, 0)


@pytest.mark.parametrize("examples", [documents(9, shared=40), rows(3, count=4, answers=3, shared=70)])
def test_packed_rows_lie_depth_first(examples: Any) -> None:
    for batch in pack(examples, 200):
        tree_mask(batch.segments, 0)


def test_a_window_that_counts_rows_and_not_the_path_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: distances in a tree are those along the path of a document."""
    expected = results(TREE, 3, 0, 2)
    stand_in(monkeypatch)
    original = flex_tree_attention.tree_mask

    def by_rows(segments: Any, prefix: int) -> Any:
        mask = original(segments, prefix)
        return mask._replace(depth_S=np.arange(len(mask.depth_S), dtype=np.int32))

    monkeypatch.setattr(flex_tree_attention, "tree_mask", by_rows)
    block_mask.cache_clear()
    assert (results(TREE, 3, 0, 2)[0] - expected[0]).abs().max() > 1e-2
    block_mask.cache_clear()


def test_training_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 with its windows: trees, prefixes ahead and flat rows."""
    batches = [documents(3, shared=18), documents(count=9, shared=MIN_PREFIX_AHEAD + 9), documents(4)]
    gradients = []
    for in_one_call in (False, True):
        if in_one_call:
            stand_in(monkeypatch)
        policy, method = tuned("lora", "gemma2", dtype=torch.float64)
        for examples in batches:
            accumulate(policy_of(policy.model, method), SftObjective(SftConfig()), pack(examples, 1000))
        gradients.append(torch.cat([p.grad.flatten() for p in method.trainable().values() if p.grad is not None]))
    assert 0 < gradients[0].abs().max() and (gradients[0] - gradients[1]).abs().max() < FLOAT64


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_rows_and_layers_share_one_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths, trees, prefixes and windows are data: beyond torch's limit of variants all scores would be stored."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    kernel = torch.compile(torch.nn.attention.flex_attention.flex_attention, dynamic=True, backend=count)
    monkeypatch.setattr(flex_tree_attention, "_compiled", lambda: kernel)
    monkeypatch.setattr(tree_attention, "has_flex_kernel", lambda query, value: True)
    with torch.no_grad():
        for seed in range(12):
            segments = random_tree(seed)
            for window, prefix in ((None, 0), (40, 0), (None, 70), (40, 70)):
                tokens = segments[-1].end
                query, key, value = (torch.randn(1, h, tokens, 8) for h in (4, 2, 2))
                before = (torch.randn(1, 2, prefix, 8), torch.randn(1, 2, prefix, 8)) if prefix else None
                attend_tree(query, key, value, segments, before, AttentionParams(None, 30.0, window))
    torch._dynamo.reset()
    # one or several blocks of queries, and of keys
    assert len(graphs) <= 4


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "width", "shared_memory", "triton", "runs"),
    [
        ("cuda", (9, 0), torch.bfloat16, 256, 232_448, True, True),
        ("cuda", (8, 0), torch.float16, 256, 166_912, True, True),
        ("cuda", (8, 9), torch.bfloat16, 128, 101_376, True, True),
        ("cuda", (8, 9), torch.bfloat16, 256, 101_376, True, False),
        ("cuda", (9, 0), torch.bfloat16, 512, 232_448, True, False),
        ("cuda", (7, 5), torch.float16, 64, 65_536, True, False),
        ("cuda", (9, 0), torch.float32, 64, 232_448, True, False),
        ("cuda", (9, 0), torch.bfloat16, 64, 232_448, False, False),
        ("cpu", (9, 0), torch.bfloat16, 64, 232_448, True, False),
    ],
)
def test_which_tensors_the_kernel_takes(
    device: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    shared_memory: int,
    triton: bool,
    runs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 2, 3, width))
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_memory)
    monkeypatch.setattr(flex_tree_attention.torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flex_tree_attention.torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(flex_tree_attention, "has_triton", lambda: triton)
    assert has_flex_kernel(tensor, tensor) is runs  # type: ignore[arg-type]
