"""Attention within a packed row: each segment attends to what stands before the row, to its ancestors, and to itself.

Flat rows go to transformers' variable-length flash attention where CUDA and the kernel are there: a launch per segment
would starve a graphics card. (Dispatch is tested; the kernel itself was not measured.)

On a processor all segments of a row are one function whose backward pass keeps queries, keys, values, outputs and a
number per query; keys are repeated for grouped queries only while they are used.

Suffixes: H heads, K key/value heads, T tokens of the row, Q queries and S keys of one segment, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.utils import is_flash_attn_2_available

from rung.types import Segment

KeysValues = tuple[Tensor, Tensor]
"""Keys and values [1, K, P, D] that stand before every root of a row."""


class AttentionParams(NamedTuple):
    """How scores are made, as transformers names it."""

    scaling: float | None
    softcap: float | None
    window: int | None
    dropout: float = 0.0


def attend_tree(
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    segments: Sequence[Segment],
    before: KeysValues | None,
    rule: AttentionParams,
) -> Tensor:
    """Returns [1, T, H, D]."""
    device = query_1HTD.device.type
    if torch.is_autocast_enabled(device):  # rotary angles in float32 leave queries and keys wider than values
        low = torch.get_autocast_dtype(device)
        query_1HTD, key_1KTD, value_1KTD = query_1HTD.to(low), key_1KTD.to(low), value_1KTD.to(low)
        before = before and (before[0].to(low), before[1].to(low))
    flat = before is None and all(s.parent is None for s in segments)
    if flat and has_flat_kernel(query_1HTD.device) and query_1HTD.dtype in (torch.bfloat16, torch.float16):
        return _attend_flat(query_1HTD, key_1KTD, value_1KTD, tuple(segments), rule)
    one_width = query_1HTD.shape[-1] == value_1KTD.shape[-1]  # the processor's kernel knows no other
    if device == "cpu" and rule.softcap is None and not rule.dropout and one_width:
        given = before if before is not None else (None, None)
        return _FlashTree.apply(query_1HTD, key_1KTD, value_1KTD, *given, tuple(segments), rule)  # type: ignore[no-any-return, no-untyped-call]
    keys, values = SplitKV(key_1KTD, before and before[0]), SplitKV(value_1KTD, before and before[1])
    groups = query_1HTD.shape[1] // key_1KTD.shape[1]
    pieces = []
    for rows, path, mask in _visits(segments, keys.before, rule.window, query_1HTD.device):
        key, value = (repeat_kv(laid.along(path, rows), groups) for laid in (keys, values))
        pieces.append(attend(query_1HTD[:, :, rows], key, value, mask, rule, causal=mask is None))
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous()


def has_flat_kernel(device: torch.device) -> bool:
    """Whether rows without shared parts run in one launch here. The engine then unrolls its trees."""
    return device.type == "cuda" and bool(is_flash_attn_2_available())


def _attend_flat(
    query_1HTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, segments: tuple[Segment, ...], rule: AttentionParams
) -> Tensor:
    borders, longest = _borders(segments, query_1HTD.device)
    out: Tensor = flash_utils._flash_attention_forward(
        query_1HTD.transpose(1, 2),
        key_1KTD.transpose(1, 2),
        value_1KTD.transpose(1, 2),
        None,
        query_length=query_1HTD.shape[2],
        is_causal=True,
        dropout=rule.dropout,
        softmax_scale=rule.scaling,
        sliding_window=rule.window,
        softcap=rule.softcap,
        cu_seq_lens_q=borders,
        cu_seq_lens_k=borders,
        max_length_q=longest,
        max_length_k=longest,
        attn_implementation="flash_attention_2",
    )
    return out


@lru_cache(maxsize=8)
def _borders(segments: tuple[Segment, ...], device: torch.device) -> tuple[Tensor, int]:
    """Starts of the documents and the end, and the longest: the same for all layers of a row."""
    ends = torch.tensor([0, *(s.end for s in segments)], dtype=torch.int32, device=device)
    return ends, max(s.end - s.start for s in segments)


class _FlashTree(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        before_key: Tensor | None,
        before_value: Tensor | None,
        segments: tuple[Segment, ...],
        rule: AttentionParams,
    ) -> Tensor:
        _, heads, tokens, width = query.shape
        groups = heads // key.shape[1]
        keys, values = SplitKV(key, before_key), SplitKV(value, before_value)
        out_1THD = query.new_empty(1, tokens, heads, width)
        lses = []
        for rows, path, mask in _visits(segments, keys.before, rule.window, query.device):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, rows],
                repeat_kv(keys.along(path, rows), groups),
                repeat_kv(values.along(path, rows), groups),
                0.0,
                mask is None,
                attn_mask=_additive(mask, query.dtype),
                scale=rule.scaling,
            )
            out_1THD[:, rows] = out.transpose(1, 2)
            lses.append(lse)
        ctx.segments, ctx.rule = segments, rule
        ctx.save_for_backward(query, key, value, before_key, before_value, out_1THD, *lses)
        return out_1THD

    @staticmethod
    def backward(ctx: Any, grad_1THD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, before_key, before_value, out_1THD, *lses = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        keys, values = SplitKV(key, before_key), SplitKV(value, before_value)
        d_query, d_keys, d_values = torch.empty_like(query), keys.zeros(), values.zeros()
        visits = _visits(ctx.segments, keys.before, ctx.rule.window, query.device)
        for lse, (rows, path, mask) in zip(lses, visits, strict=True):
            d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_1THD[:, rows].transpose(1, 2),
                query[:, :, rows],
                repeat_kv(keys.along(path, rows), groups),
                repeat_kv(values.along(path, rows), groups),
                out_1THD[:, rows].transpose(1, 2),
                lse,
                0.0,
                mask is None,
                attn_mask=_additive(mask, query.dtype),
                scale=ctx.rule.scaling,
            )
            d_query[:, :, rows] = d_q
            d_keys.add(_sum_kv_groups(d_k, groups), path, rows)
            d_values.add(_sum_kv_groups(d_v, groups), path, rows)
        return d_query, d_keys.row, d_values.row, d_keys.ahead, d_values.ahead, None, None


class SplitKV:
    """Keys, values or their gradients: those of the row, and those that stand ahead of it."""

    def __init__(self, row_1KTD: Tensor, ahead_1KPD: Tensor | None) -> None:
        self.row, self.ahead = row_1KTD, ahead_1KPD
        self.before = 0 if ahead_1KPD is None else ahead_1KPD.shape[2]

    def zeros(self) -> SplitKV:
        """Zeros of the same shapes, to add gradients to."""
        return SplitKV(torch.zeros_like(self.row), None if self.ahead is None else torch.zeros_like(self.ahead))

    def along(self, path: Sequence[Segment], rows: slice) -> Tensor:
        """What a segment sees, [1, K, S, D]."""
        own = self.row[:, :, rows]
        if not path and self.ahead is None:
            return own
        ahead = [] if self.ahead is None else [self.ahead]
        return torch.cat([*ahead, *(self.row[:, :, s.start : s.end] for s in path), own], dim=2)

    def add(self, gradient_1KSD: Tensor, path: Sequence[Segment], rows: slice) -> None:
        """The transpose of `along`."""
        at = self.before
        if self.ahead is not None:
            self.ahead += gradient_1KSD[:, :, :at]
        for s in path:
            self.row[:, :, s.start : s.end] += gradient_1KSD[:, :, at : at + s.end - s.start]
            at += s.end - s.start
        self.row[:, :, rows] += gradient_1KSD[:, :, at:]


def _visits(
    segments: Sequence[Segment], before: int, window: int | None, device: torch.device
) -> Iterator[tuple[slice, list[Segment], Tensor | None]]:
    """Rows of each segment, its ancestors from the root down, and its mask; None is causal."""
    for segment in segments:
        path: list[Segment] = []
        parent = segment.parent
        while parent is not None:
            path.append(segments[parent])
            parent = segments[parent].parent
        length = segment.end - segment.start
        seen = before + sum(s.end - s.start for s in path)
        causal = seen == 0 and (window is None or length <= window)
        mask = None if causal else path_mask(seen, length, window, device)
        yield slice(segment.start, segment.end), path[::-1], mask


def path_mask(before: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [Q, S]: query i, standing after `before` keys of its ancestors, sees keys up to itself within the window."""
    query_Q1 = torch.arange(before, before + length, device=device)[:, None]
    key_1S = torch.arange(before + length, device=device)[None, :]
    seen = key_1S <= query_Q1
    return seen if window is None else seen & (query_Q1 - key_1S < window)


def repeat_kv(tensor_BKSD: Tensor, groups: int) -> Tensor:
    """Key/value heads as many as query heads: the flash kernel of the processor wants them so."""
    if groups == 1:
        return tensor_BKSD
    b, k, s, d = tensor_BKSD.shape
    return tensor_BKSD[:, :, None].expand(b, k, groups, s, d).reshape(b, k * groups, s, d)


def _sum_kv_groups(tensor_BHSD: Tensor, groups: int) -> Tensor:
    """The transpose of `repeat`."""
    if groups == 1:
        return tensor_BHSD
    b, h, s, d = tensor_BHSD.shape
    return tensor_BHSD.reshape(b, h // groups, groups, s, d).sum(2)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: AttentionParams, *, causal: bool = False
) -> Tensor:
    """Scaled dot products [B, H, Q, D], with the softcap that torch's own function does not know."""
    if rule.softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=rule.dropout, is_causal=causal, scale=rule.scaling
        )
    if causal:
        mask = path_mask(0, query.shape[2], None, query.device)
    scores = query @ key.transpose(-1, -2) * (rule.scaling if rule.scaling is not None else query.shape[-1] ** -0.5)
    scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, rule.dropout) @ value
