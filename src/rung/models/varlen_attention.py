"""Attention of a packed row in one kernel call on a card, shared prefixes included.

torch's variable-length flash attention takes queries and keys of each segment as one run of rows. Queries lie there as
they are; keys and values are gathered along the path of each segment: the prefix of the row, its ancestors, itself.
The kernel aligns causal masks with the last key (as FlashAttention does since 2.1), so a segment sees its ancestors
whole and itself causally, and no mask is built. A shared part is copied once for every segment that reads it, which is
a fraction of what its activations would cost if it were computed again. `models.tree_attention` calls it, and holds the
reference that it is tested against; where another implementation of the kernel was activated
(`torch.nn.attention.activate_flash_attention_impl`), that one runs.

N segments, T tokens of the row, P prefix tokens, S gathered keys of all segments, H heads, K key/value heads, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rung.types import Segment

MIN_CAPABILITY = (8, 0)
"""First generation of cards with the kernel (Ampere)."""
MAX_WIDTH = 256
"""Largest head width of the kernel; widths are multiples of 8."""
KERNEL_DTYPES = (torch.bfloat16, torch.float16)


class VarlenLayout(NamedTuple):
    """Which keys each segment of a row reads, for all layers."""

    index_S: Tensor | None
    """Rows of prefix and row, one after the other; None where every segment reads itself alone."""
    ends_of_queries: Tensor
    """Cumulative lengths of the segments, int32 [N + 1]."""
    ends_of_keys: Tensor
    """Cumulative lengths of their paths, int32 [N + 1]."""
    max_queries: int
    max_keys: int


@lru_cache(maxsize=8)
def varlen_layout(segments: tuple[Segment, ...], prefix_length: int, device: torch.device) -> VarlenLayout:
    """The layout of a row. Cached: all layers of a row ask for the same."""
    rows = np.arange(prefix_length + segments[-1].end)
    paths: list[NDArray[np.int64]] = []  # of each segment; parents come before their children
    for s in segments:
        before = rows[:prefix_length] if s.parent is None else paths[s.parent]
        paths.append(np.concatenate([before, rows[prefix_length + s.start : prefix_length + s.end]]))
    lengths = np.array([len(path) for path in paths])
    is_flat = prefix_length == 0 and all(s.parent is None for s in segments)
    return VarlenLayout(
        None if is_flat else torch.from_numpy(np.concatenate(paths)).to(device),
        torch.tensor([0, *(s.end for s in segments)], dtype=torch.int32).to(device),
        torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)).to(device),
        max(s.end - s.start for s in segments),
        int(lengths.max()),
    )


def has_varlen_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these tensors on their device."""
    device = query.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    width = query.shape[-1]
    return query.dtype in KERNEL_DTYPES and width == value.shape[-1] <= MAX_WIDTH and width % 8 == 0


class VarlenTree(torch.autograd.Function):
    """Attention over the segments of a row; stores keys and values as they are, not as they are gathered."""

    @staticmethod
    def forward(
        ctx: Any, segments: tuple[Segment, ...], scaling: float | None, window: int | None, *tensors: Any
    ) -> Tensor:
        """`tensors` are queries [1, H, T, D], keys and values [1, K, T, D], and those of the prefix or None.

        Returns [1, T, H, D].
        """
        query, key, value, prefix_key, prefix_value = tensors
        layout = varlen_layout(segments, 0 if prefix_key is None else prefix_key.shape[2], query.device)
        gathered = (_gathered(key, prefix_key, layout), _gathered(value, prefix_value, layout))
        options = {"scale": scaling, **_window(window)}
        out_THD, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            _by_token(query), *gathered, *layout[1:], 0.0, True, False, **options
        )
        ctx.layout, ctx.options = layout, options
        ctx.save_for_backward(*tensors, out_THD, lse, state, unused)
        return out_THD[None]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_1THD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors; a part that several segments read gets their sum, in float32."""
        query, key, value, prefix_key, prefix_value, out_THD, lse, state, unused = ctx.saved_tensors
        layout = ctx.layout
        gathered = (_gathered(key, prefix_key, layout), _gathered(value, prefix_value, layout))
        d_query, d_key, d_value = torch.ops.aten._flash_attention_backward(
            *(grad_1THD[0].contiguous(), _by_token(query), *gathered, out_THD, lse, *layout[1:]),
            *(0.0, True, state, unused),
            **ctx.options,
        )
        d_keys, d_prefix_key = _scattered(d_key, key, prefix_key, layout)
        d_values, d_prefix_value = _scattered(d_value, value, prefix_value, layout)
        return None, None, None, _by_head(d_query), d_keys, d_values, d_prefix_key, d_prefix_value


def attend_varlen(
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    segments: Sequence[Segment],
    prefix: tuple[Tensor, Tensor] | None,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention over the segments of one row in one call; returns [1, T, H, D]."""
    tensors = (query_1HTD, key_1KTD, value_1KTD, *(prefix or (None, None)))
    return VarlenTree.apply(tuple(segments), scaling, window, *tensors)  # type: ignore[no-any-return, no-untyped-call]


def _window(window: int | None) -> dict[str, int]:
    """The kernel counts the keys before a query, without itself."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _by_token(tensor_1HTD: Tensor) -> Tensor:
    return tensor_1HTD[0].transpose(0, 1).contiguous()


def _by_head(tensor_THD: Tensor) -> Tensor:
    return tensor_THD.transpose(0, 1)[None]


def _gathered(row_1KTD: Tensor, prefix_1KPD: Tensor | None, layout: VarlenLayout) -> Tensor:
    """Keys or values of all paths, [S, K, D]."""
    if layout.index_S is None:
        return _by_token(row_1KTD)
    whole = row_1KTD if prefix_1KPD is None else torch.cat([prefix_1KPD, row_1KTD], dim=2)
    return whole[0].transpose(0, 1).index_select(0, layout.index_S)


def _scattered(
    gradient_SKD: Tensor, row_1KTD: Tensor, prefix_1KPD: Tensor | None, layout: VarlenLayout
) -> tuple[Tensor, Tensor | None]:
    """The transpose of `_gathered`: gradients of row and prefix."""
    if layout.index_S is None:
        return _by_head(gradient_SKD), None
    prefix_length = 0 if prefix_1KPD is None else prefix_1KPD.shape[2]
    kv_heads, tokens, width = row_1KTD.shape[1:]
    # a part that segments share gets one gradient of each: their sum would round in bfloat16
    wide = torch.promote_types(gradient_SKD.dtype, torch.float32)
    total = gradient_SKD.new_zeros(prefix_length + tokens, kv_heads, width, dtype=wide)
    total.index_add_(0, layout.index_S, gradient_SKD.to(total.dtype))
    whole = _by_head(total.to(row_1KTD.dtype))
    return whole[:, :, prefix_length:], None if prefix_1KPD is None else whole[:, :, :prefix_length]
