"""Keys and values of decoding: a prefix held once for all rows, and each row's own in buffers that grow seldom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

Prefix = Sequence[tuple[Tensor, Tensor]]
"""Keys and values [1, K, P, D] of every layer, by layer number: what all rows of a batch begin with."""

INITIAL_CAPACITY = 64
"""Slots added whenever a buffer is full: appending one token then copies one token, not everything before it."""


class GrowingCacheLayer(DynamicLayer):  # type: ignore[misc]
    """transformers' dynamic cache layer, appending in place instead of concatenating at every token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, K, new, D]; returns all keys and values so far, views of the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [states.new_empty(0) for states in (key_states, value_states)]
        before = int(self.get_seq_length())
        after = before + key_states.shape[2]
        for i, states in enumerate((key_states, value_states)):
            if self.buffers[i].numel() == 0 or self.buffers[i].shape[2] < after:
                rows, heads, _, width = states.shape
                grown = states.new_empty(rows, heads, after + INITIAL_CAPACITY, width)
                if before:
                    grown[:, :, :before] = self.buffers[i][:, :, :before]
                self.buffers[i] = grown
            self.buffers[i][:, :, before:after] = states
        self.keys, self.values = (buffer[:, :, :after] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        length = int(self.get_seq_length())
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


def new_cache() -> Cache:
    """An empty cache of growing layers."""
    return Cache(layer_class_to_replicate=GrowingCacheLayer)


def single_row_kv(cache: Cache) -> Prefix:
    """The keys and values of a cache that holds one row."""
    return [(layer.keys.contiguous(), layer.values.contiguous()) for layer in cache.layers]


def attend_one_token(
    query_BHD: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    seen_BS: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one new token a row to the shared prefix and to the row's own keys; returns [B, H, D].

    The prefix is read once for the whole batch: its products have B * H / K rows instead of B copies of the prefix.
    """
    (rows, heads, width), kv_heads = query_BHD.shape, key_BKSD.shape[1]
    groups = heads // kv_heads
    query = query_BHD.view(rows, kv_heads, groups, width)
    scores = query @ key_BKSD.transpose(-1, -2)
    own = scores.shape[-1]
    if prefix is not None:
        folded = query.transpose(0, 1).reshape(kv_heads, rows * groups, width)
        before = (folded @ prefix[0][0].transpose(-1, -2)).view(kv_heads, rows, groups, -1).transpose(0, 1)
        scores = torch.cat([before, scores], dim=-1)
    scores = scores.float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if seen_BS is not None:
        scores[..., -own:].masked_fill_(~seen_BS[:, None, None, :], float("-inf"))
    weights = scores.softmax(dim=-1).to(value_BKSD.dtype)
    out = weights[..., -own:] @ value_BKSD
    if prefix is not None:
        folded = weights[..., :-own].transpose(0, 1).reshape(kv_heads, rows * groups, -1)
        out = out + (folded @ prefix[1][0]).view(kv_heads, rows, groups, width).transpose(0, 1)
    return out.reshape(rows, heads, width)
