"""Attention over segment trees, registered with transformers under the name `rung`.

The segments arrive as a keyword argument of the model's forward, never through hidden state, so recomputation in
gradient checkpointing sees the same ones. Without segments the call is ordinary attention with a mask and a cache,
which is what decoding uses.

Suffixes: H heads, K key/value heads, Q queries, S keys, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from rung.errors import PlanError
from rung.models.kv_cache import Prefix, attend_one_token
from rung.models.tree_attention import AttentionParams, KeysValues, attend, attend_tree, path_mask, repeat_kv
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
    itself; `shared` (keys and values by layer) stands before every root, and `capture` receives the row's own. Without
    segments the mask and the cache decide, and `prefix` stands in front of every row. Raises `PlanError` for an
    argument it does not know, because ignoring one would change the model.
    """
    segments: Sequence[Segment] | None = kwargs.pop("segments", None)
    shared: Mapping[int, KeysValues] | None = kwargs.pop("shared", None)
    captured: dict[int, KeysValues] | None = kwargs.pop("capture", None)
    before: Prefix | None = kwargs.pop("prefix", None)
    rule = AttentionParams(scaling, kwargs.pop("softcap", None), kwargs.pop("sliding_window", None), dropout)
    kwargs.pop("is_causal", None)
    if unknown := sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS):
        raise PlanError(
            f"{type(module).__name__} passes attention arguments that Rung does not know: {', '.join(unknown)}",
            hint="this architecture is not supported yet",
        )
    needed = shared is not None or before is not None or captured is not None
    layer = int(module.layer_idx) if needed else 0  # type: ignore[arg-type]
    if captured is not None:
        captured[layer] = key_BKSD, value_BKSD
    if segments is None:
        prefix = before[layer] if before is not None else None
        return _decode(query_BHQD, key_BKSD, value_BKSD, attention_mask, prefix, rule), None
    ahead = shared[layer] if shared is not None else None
    return attend_tree(query_BHQD, key_BKSD, value_BKSD, segments, ahead, rule), None


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prefix: KeysValues | None,
    rule: AttentionParams,
) -> Tensor:
    """Prompts and their continuation, row by row: bool mask [B, 1, Q, S] of the rows' own keys, or None for causal."""
    length, width = query.shape[2:]
    if length == 1:
        seen = None if mask is None else mask[:, 0, 0].expand(len(query), -1)
        scale = width**-0.5 if rule.scaling is None else rule.scaling
        return attend_one_token(query[:, :, 0], prefix, key, value, seen, scale, rule.softcap)[:, None]
    if mask is None and (rule.window is not None or prefix is not None):
        mask = path_mask(0, length, rule.window, query.device)[None, None]
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
    out = attend(query, repeat_kv(key, groups), repeat_kv(value, groups), mask, rule, causal=mask is None)
    return out.transpose(1, 2).contiguous()


def register() -> None:
    """Make `attn_implementation="rung"` known to transformers. Safe to call twice."""
    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
