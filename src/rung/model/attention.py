"""Attention over segment trees, registered with transformers under the name `rung`.

The segments arrive as a keyword argument of the model's forward, never through hidden state, so recomputation in
gradient checkpointing sees the same ones. Without segments the call is ordinary attention with a mask and a cache,
which is what decoding uses.

Suffixes: H heads, K key/value heads, Q queries, S keys, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from rung.errors import PlanError
from rung.model.kv import Prefix, attend_one_token
from rung.types import Segment

NAME = "rung"

# Arguments that models pass along and that do not change what is attended to once the segments are known.
_HARMLESS = frozenset({"position_ids", "use_cache", "output_attentions", "output_hidden_states", "layer_idx"})


def tree_attention(
    module: nn.Module,
    query_BHQD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; returns [B, Q, H, D] and no weights.

    With `segments` (a sequence of `Segment`, batch size 1) each segment attends to its ancestors and, causally, to
    itself. Without them the mask and the cache decide, and `prefix` stands in front of every row. Raises `PlanError`
    for an argument it does not know, because ignoring one would change the model.
    """
    segments: Sequence[Segment] | None = kwargs.pop("segments", None)
    softcap: float | None = kwargs.pop("softcap", None)
    window: int | None = kwargs.pop("sliding_window", None)
    before: Prefix | None = kwargs.pop("prefix", None)
    kwargs.pop("is_causal", None)
    if unknown := sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS):
        raise PlanError(
            f"{type(module).__name__} passes attention arguments that Rung does not know: {', '.join(unknown)}",
            hint="this architecture is not supported yet",
        )
    if segments is None:
        prefix = before[int(module.layer_idx)] if before is not None else None  # type: ignore[arg-type]
        return _decode(query_BHQD, key_BKSD, value_BKSD, attention_mask, prefix, (scaling, softcap, window)), None
    groups = query_BHQD.shape[1] // key_BKSD.shape[1]
    pieces = []
    for segment in segments:
        path = _path(segments, segment)
        rows = slice(segment.start, segment.end)
        ancestors = sum(s.end - s.start for s in path)
        key = _along(key_BKSD, path, rows)
        value = _along(value_BKSD, path, rows)
        length = segment.end - segment.start
        plain = ancestors == 0 and softcap is None and (window is None or length <= window)
        mask = None if plain else _path_mask(ancestors, length, window, key.device)
        pieces.append(
            _attend(
                query_BHQD[:, :, rows],
                _repeat(key, groups),
                _repeat(value, groups),
                mask,
                scaling,
                softcap,
                dropout,
                causal=plain,
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
    shape: tuple[float | None, float | None, int | None],
) -> Tensor:
    """Prompts and their continuation, row by row: bool mask [B, 1, Q, S] of the rows' own keys, or None for causal."""
    scaling, softcap, window = shape
    length, width = query.shape[2:]
    if length == 1:
        seen = None if mask is None else mask[:, 0, 0].expand(len(query), -1)
        scale = width**-0.5 if scaling is None else scaling
        return attend_one_token(query[:, :, 0], prefix, key, value, seen, scale, softcap)[:, None]
    if mask is None and (softcap is not None or window is not None or prefix is not None):
        mask = _path_mask(0, length, window, query.device)[None, None]
    if mask is not None:
        # A padding position sees nothing; softmax over nothing is NaN, and NaN times a zero weight stays NaN.
        mask = mask | ~mask.any(dim=-1, keepdim=True)
    if prefix is not None and mask is not None:
        rows, shared = len(query), prefix[0].shape[2]
        key, value = (
            torch.cat([shared_part.expand(rows, -1, -1, -1), own], dim=2)
            for shared_part, own in zip(prefix, (key, value), strict=True)
        )
        mask = torch.cat([mask.new_ones(*mask.shape[:3], shared), mask], dim=3)
    groups = query.shape[1] // key.shape[1]
    out = _attend(query, _repeat(key, groups), _repeat(value, groups), mask, scaling, softcap, causal=mask is None)
    return out.transpose(1, 2).contiguous()


def register() -> None:
    """Make `attn_implementation="rung"` known to transformers. Safe to call twice."""
    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _path(segments: Sequence[Segment], segment: Segment) -> list[Segment]:
    """Ancestors of a segment, root first."""
    path: list[Segment] = []
    parent = segment.parent
    while parent is not None:
        path.append(segments[parent])
        parent = segments[parent].parent
    return path[::-1]


def _along(tensor_BKSD: Tensor, path: Sequence[Segment], rows: slice) -> Tensor:
    if not path:
        return tensor_BKSD[:, :, rows]
    return torch.cat([*(tensor_BKSD[:, :, s.start : s.end] for s in path), tensor_BKSD[:, :, rows]], dim=2)


def _path_mask(before: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [Q, S]: query i, standing after `before` keys of its ancestors, sees keys up to itself within the window."""
    query_Q1 = torch.arange(before, before + length, device=device)[:, None]
    key_1S = torch.arange(before + length, device=device)[None, :]
    seen = key_1S <= query_Q1
    return seen if window is None else seen & (query_Q1 - key_1S < window)


def _repeat(tensor_BKSD: Tensor, groups: int) -> Tensor:
    """Key/value heads as many as query heads: the flash kernel of the processor wants them so."""
    if groups == 1:
        return tensor_BKSD
    b, k, s, d = tensor_BKSD.shape
    return tensor_BKSD[:, :, None].expand(b, k, groups, s, d).reshape(b, k * groups, s, d)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float = 0.0,
    *,
    causal: bool = False,
) -> Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling
        )
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, dropout) @ value
