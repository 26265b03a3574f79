"""Attention with capped scores of a packed row in one kernel call on a card, shared prefixes included (Gemma 2).

torch's flash kernels have no softcap; flex_attention compiles a kernel from a function of the score and a function that
says which keys a query sees (Dong et al. 2024). The segments of a row lie depth first, so the descendants of a segment
follow it, and the mask of a whole tree has a closed form: query q sees key k where k <= q < end of the subtree of k.
Blocks of 128 queries and keys of which no pair is visible are skipped, which keeps the sharing of prefixes. The cost is
a few compilations a run; all that differs between rows and layers is data, so their number is bounded, and a test
counts them. `models.tree_attention` calls it and holds the path that it is tested against.

T tokens of the row, P prefix tokens, S = P + T keys, H heads, K key/value heads, D width, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._triton import has_triton

from rung.models.pointwise import compiled
from rung.types import Segment

MIN_CAPABILITY = (8, 0)
"""First generation of cards on which flex_attention computes in bfloat16 (Ampere)."""
MAX_WIDTH, MAX_WIDTH_OF_SMALL_CARDS = 256, 128
"""Largest head widths; wider heads than 128 need more shared memory than cards for desktops have (99 KiB a block)."""
SHARED_MEMORY = 160 * 2**10
"""Bytes a block that the kernels for wide heads need, forward and backward."""
UNLIMITED = 2**30
"""A window that every key is within."""
BLOCK = 128
"""Queries and keys of a block: the default of flex_attention."""

ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class TreeMask(NamedTuple):
    """Which keys each query of a row sees, in closed form; int32."""

    query_T: NDArray[np.int32]
    """Position of each query among the keys: P + t."""
    subtree_end_S: NDArray[np.int32]
    """The first key position behind the segment of a key and all its descendants."""
    depth_S: NDArray[np.int32]
    """Number of keys on the path before each key, which is what a window counts."""


def tree_mask(segments: Sequence[Segment], prefix_length: int) -> TreeMask:
    """The mask of a row. Raises `ValueError` for segments that do not lie depth first."""
    total = prefix_length + segments[-1].end
    last = list(range(len(segments)))  # the last descendant of each segment
    starts: list[int] = []  # keys on the path before each segment
    for index, s in enumerate(segments):
        starts.append(prefix_length if s.parent is None else starts[s.parent] + _length(segments[s.parent]))
        ancestor = s.parent
        while ancestor is not None:
            if last[ancestor] != index - 1:
                raise ValueError(f"segment {index} does not follow the subtree of its ancestor {ancestor}")
            last[ancestor], ancestor = index, segments[ancestor].parent
    subtree_end, depth = np.full(total, total, np.int32), np.arange(total, dtype=np.int32)
    for s, start, descendant in zip(segments, starts, last, strict=True):
        rows = slice(prefix_length + s.start, prefix_length + s.end)
        subtree_end[rows] = prefix_length + segments[descendant].end
        depth[rows] = np.arange(start, start + _length(s))
    return TreeMask(np.arange(prefix_length, total, dtype=np.int32), subtree_end, depth)


@lru_cache(maxsize=8)
def block_mask(
    segments: tuple[Segment, ...], prefix_length: int, window: int | None, device: torch.device
) -> BlockMask:
    """The mask as flex_attention takes it. Cached: all layers of a row with one window ask for the same."""
    mask = tree_mask(segments, prefix_length)
    partial, full = _visible_blocks(mask, window)
    query_T, subtree_end_S, depth_S = (torch.from_numpy(array).to(device) for array in mask)
    # a tensor: layers with a window and without one share one kernel
    window_1 = torch.tensor([UNLIMITED if window is None else window], dtype=torch.int32, device=device)

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = query_T[query]
        return (key <= row) & (row < subtree_end_S[key]) & (depth_S[row] - depth_S[key] < window_1[0])

    partial_counts, partial_blocks, full_counts, full_blocks = (
        part.to(device) for blocks in (partial, full) for part in _listed(blocks)
    )
    return BlockMask.from_kv_blocks(
        *(partial_counts, partial_blocks, full_counts, full_blocks),
        BLOCK_SIZE=BLOCK,
        mask_mod=is_visible,
        seq_lengths=(len(query_T), len(subtree_end_S)),
    )


def _visible_blocks(mask: TreeMask, window: int | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Blocks [B, B] of which some pairs may be visible, and blocks of which all are; no block is in both."""
    first_q, last_q = _of_blocks(mask.query_T, np.minimum), _of_blocks(mask.query_T, np.maximum)
    keys = np.arange(len(mask.subtree_end_S), dtype=np.int32)
    first_k, last_k = _of_blocks(keys, np.minimum), _of_blocks(keys, np.maximum)
    nearest_end, farthest_end = (_of_blocks(mask.subtree_end_S, of) for of in (np.minimum, np.maximum))
    some = (first_k <= last_q[:, None]) & (farthest_end > first_q[:, None])
    # the kernel reads blocks beyond the keys only with the mask
    is_filled = np.arange(1, len(first_k) + 1) * BLOCK <= len(keys)
    all_ = (last_k <= first_q[:, None]) & (nearest_end > last_q[:, None]) & is_filled
    if window is not None:
        depth_T = mask.depth_S[mask.query_T]
        (low_q, high_q), (low_k, high_k) = (
            (_of_blocks(depth, np.minimum), _of_blocks(depth, np.maximum)) for depth in (depth_T, mask.depth_S)
        )
        some &= low_q[:, None] - high_k < window
        all_ &= high_q[:, None] - low_k < window
    return some & ~all_, all_


def _of_blocks(values: NDArray[np.int32], reduce: np.ufunc) -> NDArray[np.int32]:
    return reduce.reduceat(values, np.arange(0, len(values), BLOCK))


def _listed(blocks: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """The number of key blocks of each query block [1, 1, B], and all key blocks, those first [1, 1, B, B]; int32."""
    counts, order = blocks.sum(1, dtype=np.int32), np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(counts)[None, None], torch.from_numpy(order)[None, None]


def has_flex_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether flex_attention compiles for these tensors on their device."""
    device, width = query.device, max(query.shape[-1], value.shape[-1])
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    if query.dtype not in (torch.bfloat16, torch.float16) or width > MAX_WIDTH or not has_triton():
        return False
    shared_memory = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return bool(width <= MAX_WIDTH_OF_SMALL_CARDS or shared_memory >= SHARED_MEMORY)


@cache
def softcap_score(softcap: float) -> ScoreFunction:
    """Softcap * tanh(score / softcap) (Gemma 2, section 2); cached, since each new function would be compiled anew."""

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@cache
def _compiled() -> Callable[..., Any]:
    # rows have any length: one kernel for all of them
    return compiled(flex_attention, dynamic=True)


def attend_flex(
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    segments: Sequence[Segment],
    prefix: tuple[Tensor, Tensor] | None,
    *,
    scaling: float | None,
    softcap: float,
    window: int | None,
) -> Tensor:
    """Attention with capped scores over the segments of one row in one call; returns [1, T, H, D].

    The gradient of a part that several segments read is summed in float32 within the kernel.
    """
    prefix_length = 0 if prefix is None else prefix[0].shape[2]
    if prefix is not None:
        key_1KTD, value_1KTD = torch.cat([prefix[0], key_1KTD], dim=2), torch.cat([prefix[1], value_1KTD], dim=2)
    options: dict[str, Any] = {
        "score_mod": softcap_score(softcap),
        "block_mask": block_mask(tuple(segments), prefix_length, window, query_1HTD.device),
        "scale": scaling,
        "enable_gqa": query_1HTD.shape[1] != key_1KTD.shape[1],
    }
    out_1HTD: Tensor = _compiled()(query_1HTD, key_1KTD, value_1KTD, **options)
    return out_1HTD.transpose(1, 2).contiguous()


def _length(segment: Segment) -> int:
    return segment.end - segment.start
