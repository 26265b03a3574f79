"""Attention within a packed row: each segment attends to the prefix of the row, to its ancestors, and to itself.

On a processor all segments of a row are one autograd function, whose backward pass stores queries, keys, values,
outputs and one number a query. It computes in float32 under bfloat16 autocast too: torch's kernel for bfloat16 takes up
to three times as long for documents of 200 tokens. On a card of the last generations all segments of a row are one
kernel call (`models.varlen_attention`; with capped scores `models.flex_tree_attention`): one launch per segment would
leave it idle. Called by `models/attention.py`.

Suffixes: H heads, K key/value heads, T tokens of the row, P prefix tokens, Q queries and S keys of one segment, D head
width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers.integrations.sdpa_attention import repeat_kv

from rung.models.flex_tree_attention import attend_flex, has_flex_kernel
from rung.models.matmul import wide_zeros
from rung.models.varlen_attention import attend_varlen, has_varlen_kernel
from rung.types import Segment

KeysValues = tuple[Tensor, Tensor]
"""Keys and values [1, K, P, D] that precede every root of a row."""
KVByLayer = Mapping[int, KeysValues]


class AttentionParams(NamedTuple):
    """Parameters of the attention scores, named as in transformers."""

    scaling: float | None
    softcap: float | None
    window: int | None
    dropout: float = 0.0


def concatenate_kv(first: KVByLayer | None, second: KVByLayer) -> KVByLayer:
    """Concatenate the keys and values of every layer along the positions; `first` may be missing."""
    if first is None:
        return second
    pairs = {layer: zip(first[layer], states, strict=True) for layer, states in second.items()}
    return {layer: tuple(torch.cat(pair, dim=2) for pair in both) for layer, both in pairs.items()}  # type: ignore[misc]


def attend_tree(
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    segments: Sequence[Segment],
    prefix: KeysValues | None,
    params: AttentionParams,
) -> Tensor:
    """Attention over the segments of one row; returns [1, T, H, D]."""
    device = query_1HTD.device.type
    # Rotary angles in float32 leave queries and keys wider than values, and the kernels want one dtype.
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query_1HTD, key_1KTD, value_1KTD = query_1HTD.to(dtype), key_1KTD.to(dtype), value_1KTD.to(dtype)
    prefix = prefix and (prefix[0].to(key_1KTD.dtype), prefix[1].to(value_1KTD.dtype))
    if params.softcap is None and not params.dropout and has_varlen_kernel(query_1HTD, value_1KTD):
        return attend_varlen(query_1HTD, key_1KTD, value_1KTD, segments, prefix, params.scaling, params.window)
    if params.softcap is not None and not params.dropout and has_flex_kernel(query_1HTD, value_1KTD):
        options: Any = {"scaling": params.scaling, "softcap": params.softcap, "window": params.window}
        return attend_flex(query_1HTD, key_1KTD, value_1KTD, segments, prefix, **options)
    same_width = query_1HTD.shape[-1] == value_1KTD.shape[-1]  # the CPU kernel requires it
    if _on_processor(query_1HTD.device) and params.softcap is None and not params.dropout and same_width:
        tensors = (query_1HTD, key_1KTD, value_1KTD, *(prefix or (None, None)))
        return _FlashTree.apply(tuple(segments), params, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    # The general path, one launch a segment: dropout, unequal widths, or a device without a kernel for rows.
    keys, values = SplitKV(key_1KTD, prefix and prefix[0]), SplitKV(value_1KTD, prefix and prefix[1])
    is_shared = prefix is not None or any(s.parent is not None for s in segments)
    if is_shared and torch.is_grad_enabled():
        keys, values = keys.widened(), values.widened()
    groups, dtype = query_1HTD.shape[1] // key_1KTD.shape[1], query_1HTD.dtype
    outputs = []
    for rows, path, mask in _iterate_segments(segments, keys.prefix_length, params.window, query_1HTD.device):
        key, value = (repeat_kv(kv.gather(path, rows).to(dtype), groups) for kv in (keys, values))
        outputs.append(attend(query_1HTD[:, :, rows], key, value, mask, params))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _on_processor(device: torch.device) -> bool:
    """Whether `_FlashTree` runs: its kernel is torch's for processors. A test takes the other path."""
    return device.type == "cpu"


# One function for the whole row: autograd would store repeated keys and values for every segment.
class _FlashTree(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, segments: tuple[Segment, ...], params: AttentionParams, *tensors: Any) -> Tensor:
        query, key, value, prefix_key, prefix_value = tensors
        _, heads, tokens, width = query.shape
        keys, values = SplitKV(key, prefix_key), SplitKV(value, prefix_value)
        out_1THD: Tensor = query.new_empty(1, tokens, heads, width)
        lses = []
        for rows, path, mask in _iterate_segments(segments, keys.prefix_length, params.window, query.device):
            q_KGQD, *key_value = _grouped(query[:, :, rows], keys.gather(path, rows), values.gather(path, rows))
            options = {"attn_mask": _additive_mask(mask, q_KGQD.dtype), "scale": params.scaling}
            out_KGQD, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_KGQD, *key_value, 0.0, mask is None, **options
            )
            out_1THD[0, rows] = out_KGQD.flatten(0, 1).transpose(0, 1)
            # The log-sum-exp of each query lets the backward pass recompute the weights.
            lses.append(lse)
        ctx.segments, ctx.params = segments, params
        ctx.save_for_backward(*tensors, out_1THD, *lses)
        return out_1THD

    @staticmethod
    def backward(ctx: Any, grad_1THD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prefix_key, prefix_value, out_1THD, *lses = ctx.saved_tensors
        keys, values = SplitKV(key, prefix_key), SplitKV(value, prefix_value)
        # each part of a flat row gets one gradient: a sum, in float32, is only that of a part that segments share
        is_shared = prefix_key is not None or any(s.parent is not None for s in ctx.segments)
        d_query, d_keys, d_values = torch.empty_like(query), keys.zeros(wide=is_shared), values.zeros(wide=is_shared)
        visits = _iterate_segments(ctx.segments, keys.prefix_length, ctx.params.window, query.device)
        for lse, (rows, path, mask) in zip(lses, visits, strict=True):
            q_KGQD, *key_value = _grouped(query[:, :, rows], keys.gather(path, rows), values.gather(path, rows))
            grad_out, out = (
                tensor[0, rows].to(q_KGQD.dtype).transpose(0, 1).view(q_KGQD.shape) for tensor in (grad_1THD, out_1THD)
            )
            options = {"attn_mask": _additive_mask(mask, q_KGQD.dtype), "scale": ctx.params.scaling}
            d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out, q_KGQD, *key_value, out, lse, 0.0, mask is None, **options
            )
            d_query[0, :, rows] = d_q.flatten(0, 1)
            d_keys.scatter_add(d_k.sum(1)[None], path, rows)
            d_values.scatter_add(d_v.sum(1)[None], path, rows)
        d_row, d_prefix = (d_keys.row, d_values.row), (d_keys.prefix, d_values.prefix)
        return None, None, d_query, *(d if d is None else d.to(query.dtype) for d in (*d_row, *d_prefix))


class SplitKV:
    """Keys, values or their gradients: those of the row, and those of its prefix."""

    def __init__(self, row_1KTD: Tensor, prefix_1KPD: Tensor | None) -> None:
        self.row, self.prefix = row_1KTD, prefix_1KPD
        self.prefix_length = 0 if prefix_1KPD is None else prefix_1KPD.shape[2]

    def zeros(self, *, wide: bool) -> SplitKV:
        """Zeros of the same shapes to add gradients to; `wide`: float32, for the sum over all documents of a part."""
        zeros = wide_zeros if wide else torch.zeros_like
        return SplitKV(zeros(self.row), None if self.prefix is None else zeros(self.prefix))

    def widened(self) -> SplitKV:
        """The same in float32 or wider: autograd adds up the gradients of shared parts in their own dtype."""
        widest = torch.promote_types(self.row.dtype, torch.float32)
        return SplitKV(self.row.to(widest), None if self.prefix is None else self.prefix.to(widest))

    def gather(self, path: Sequence[Segment], rows: slice) -> Tensor:
        """Concatenate what a segment attends to: prefix, ancestors and itself, [1, K, S, D]."""
        segment_rows = self.row[:, :, rows]
        # Documents without shared parts: a view, no copy.
        if not path and self.prefix is None:
            return segment_rows
        prefix = [] if self.prefix is None else [self.prefix]
        return torch.cat([*prefix, *(self.row[:, :, s.start : s.end] for s in path), segment_rows], dim=2)

    def scatter_add(self, gradient_1KSD: Tensor, path: Sequence[Segment], rows: slice) -> None:
        """The transpose of `gather`: add a gradient to prefix, ancestors and segment."""
        start = self.prefix_length
        if self.prefix is not None:
            self.prefix += gradient_1KSD[:, :, :start]
        for s in path:
            self.row[:, :, s.start : s.end] += gradient_1KSD[:, :, start : start + s.end - s.start]
            start += s.end - s.start
        self.row[:, :, rows] += gradient_1KSD[:, :, start:]


def _iterate_segments(
    segments: Sequence[Segment], prefix_length: int, window: int | None, device: torch.device
) -> Iterator[tuple[slice, list[Segment], Tensor | None]]:
    """Yield the rows of each segment, its ancestors from the root down, and its mask; None means causal."""
    for segment in segments:
        path, parent = list[Segment](), segment.parent
        while parent is not None:
            path.append(segments[parent])
            parent = segments[parent].parent
        length = segment.end - segment.start
        context_length = prefix_length + sum(s.end - s.start for s in path)
        # The kernel's own causal flag needs no mask tensor, but it aligns queries with the first key.
        causal = context_length == 0 and (window is None or length <= window)
        mask = None if causal else path_mask(context_length, length, window, device)
        yield slice(segment.start, segment.end), path[::-1], mask


def path_mask(context_length: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Bool mask [Q, S]: query i, after `context_length` keys, sees keys up to itself within the window."""
    query_Q1 = torch.arange(context_length, context_length + length, device=device)[:, None]
    key_1S = torch.arange(context_length + length, device=device)[None, :]
    visible = key_1S <= query_Q1
    return visible if window is None else visible & (query_Q1 - key_1S < window)


def _grouped(query_1HQD: Tensor, key_1KSD: Tensor, value_1KSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [K, G, Q, D] and keys and values [K, G, S, D] in float32 or wider, G the heads that share a key.

    Keys and values are expanded, not copied: the kernel takes a stride of 0.
    """
    dtype = torch.promote_types(query_1HQD.dtype, torch.float32)
    (_, heads, length, width), kv_heads = query_1HQD.shape, key_1KSD.shape[1]
    query = query_1HQD[0].to(dtype).view(kv_heads, heads // kv_heads, length, width)
    key, value = (kv[0].to(dtype)[:, None].expand(-1, query.shape[1], -1, -1) for kv in (key_1KSD, value_1KSD))
    return query, key, value


def _additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, params: AttentionParams) -> Tensor:
    """Scaled dot-product attention [B, H, Q, D], causal without a mask; torch's function lacks the softcap."""
    if params.softcap is None:
        options: Any = {"dropout_p": params.dropout, "is_causal": mask is None, "scale": params.scaling}
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    visible = path_mask(0, query.shape[2], None, query.device) if mask is None else mask
    scores = query @ key.transpose(-1, -2) * (params.scaling if params.scaling is not None else query.shape[-1] ** -0.5)
    scores = params.softcap * torch.tanh(scores / params.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    # Softmax in float32 at least, as transformers' eager attention does.
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, params.dropout) @ value
