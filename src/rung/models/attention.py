"""The attention function that Rung registers with transformers under the name `rung`.

Every base is loaded with it, so packing and prefix sharing work on each supported architecture without a modified
forward. The segments arrive as a keyword argument of the model's forward, never through hidden state, so recomputation
in gradient checkpointing sees the same segments. Without segments the call is ordinary attention with a mask and a
cache, which decoding (`models/generate.py`) uses. The cost: an architecture that passes an unknown argument is refused.

Suffixes: H heads, K key/value heads, Q queries, S keys, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from rung.errors import PlanError
from rung.models.kv_cache import attend_one_token
from rung.models.tree_attention import (
    AttentionParams,
    KeysValues,
    KVByLayer,
    attend,
    attend_tree,
    path_mask,
)
from rung.types import Segment

NAME = "rung"

# Arguments that models pass to every attention function. They do not change the attention pattern once the segments
# are known, so they are ignored.
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
    itself. `shared` holds keys and values by layer that precede every root; the row's keys and values are written to
    `capture`. Without segments the mask and the cache decide, and `prefix` precedes every row; `row_slots` [B] are the
    slots of new tokens where rows end at different ones, which windows count from. Raises `PlanError` for an unknown
    argument, because ignoring one would change the model.
    """
    segments: Sequence[Segment] | None = kwargs.pop("segments", None)
    shared_kv: KVByLayer | None = kwargs.pop("shared", None)
    capture: dict[int, KeysValues] | None = kwargs.pop("capture", None)
    row_slots: Tensor | None = kwargs.pop("row_slots", None)
    prefix: KVByLayer | None = kwargs.pop("prefix", None)
    params = AttentionParams(scaling, kwargs.pop("softcap", None), kwargs.pop("sliding_window", None), dropout)
    # Segments and masks state causality; transformers sets this flag for kernels that get no mask.
    kwargs.pop("is_causal", None)
    if unknown := sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS):
        names, kind = ", ".join(unknown), type(module).__name__
        reason = f"{kind} passes attention arguments that Rung does not know: {names}"
        raise PlanError(reason, hint="this architecture is not supported yet")
    layer: Any = getattr(module, "layer_idx", None)
    if capture is not None:
        capture[layer] = key_BKSD, value_BKSD
    if segments is None:
        layer_prefix = prefix[layer] if prefix is not None else None
        if row_slots is not None and params.window is not None and attention_mask is not None:
            slots = torch.arange(key_BKSD.shape[2], device=row_slots.device)
            attention_mask = attention_mask & (slots > row_slots[:, None] - params.window)[:, None, None]
        return _decode(query_BHQD, key_BKSD, value_BKSD, attention_mask, layer_prefix, params), None
    layer_shared_kv = shared_kv[layer] if shared_kv is not None else None
    return attend_tree(query_BHQD, key_BKSD, value_BKSD, segments, layer_shared_kv, params), None


def _decode(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, prefix: KeysValues | None, params: AttentionParams
) -> Tensor:
    """Attention of prompts and new tokens; `mask` is bool [B, 1, Q, S] over each row's keys, None means causal."""
    length = query.shape[2]
    # One new token a row is the common case of decoding: it reads the shared prefix once for the whole batch.
    if length == 1:
        visible = None if mask is None else mask[:, 0, 0].expand(len(query), -1)
        return attend_one_token(query[:, :, 0], prefix, key, value, visible, params)[:, None]
    if prefix is not None:
        raise ValueError("a prefix that all rows share is read by one new token a row")
    # The kernel's causal flag cannot express a window, so this needs an explicit mask.
    if mask is None and params.window is not None:
        mask = path_mask(0, length, params.window, query.device)[None, None]
    if mask is not None:
        # A padding position has no visible key. Its softmax would be NaN, and NaN times a zero weight stays NaN.
        mask = mask | ~mask.any(dim=-1, keepdim=True)
    groups = query.shape[1] // key.shape[1]
    out = attend(query, repeat_kv(key, groups), repeat_kv(value, groups), mask, params)
    return out.transpose(1, 2).contiguous()


def register() -> None:
    """Register `attn_implementation="rung"` with transformers. Safe to call twice."""
    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
