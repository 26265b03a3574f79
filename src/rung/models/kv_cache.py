"""Keys and values for decoding: a prefix stored once for all rows, and a growing buffer per row.

transformers' cache stores a prefix once per row and copies everything at every token. Here the prefix is shared and new
tokens are written in place. The cost: a subclass of transformers' cache layer and one more path through attention
(decision 0005). `models/generate.py` and `models/attention.py` use it.

Suffixes: B rows, H heads, K key/value heads, S slots, P prefix tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from rung.models.tree_attention import AttentionParams, KeysValues, KVByLayer
from rung.types import Segment

GROWTH_SLOTS = 64
"""Free slots of a new buffer: until they are used, appending a token copies one token instead of all of them."""


class GrowingCacheLayer(DynamicLayer):  # type: ignore[misc]
    """transformers' dynamic cache layer, but new tokens are written in place instead of concatenated."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, K, new, D]; return views of the buffers that hold all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [states.new_empty(0) for states in (key_states, value_states)]
        old_length = int(self.get_seq_length())
        new_length = old_length + key_states.shape[2]
        for i, states in enumerate((key_states, value_states)):
            if self.buffers[i].numel() == 0 or self.buffers[i].shape[2] < new_length:
                rows, heads, _, width = states.shape
                larger_buffer = states.new_empty(rows, heads, new_length + GROWTH_SLOTS, width)
                if old_length:
                    larger_buffer[:, :, :old_length] = self.buffers[i][:, :, :old_length]
                self.buffers[i] = larger_buffer
            self.buffers[i][:, :, old_length:new_length] = states
        self._show(new_length)
        return self.keys, self.values

    def write(self, states: KeysValues, targets: Sequence[tuple[int, Segment]], *, places: int, slots: int) -> None:
        """Write segments of a packed row [1, K, T, D] to places of the batch: each ends at the last slot.

        Afterwards the layer has this many places and slots; a layer with rows in it has as many slots before.
        """
        if not self.is_initialized:
            self.lazy_initialization(*states)
            self.buffers = [part.new_empty(0, part.shape[1], 0, part.shape[3]) for part in states]
        for i, part in enumerate(states):
            old = self.buffers[i]
            if old.shape[0] < places:
                # zeros: a masked slot has no weight, but no weight times what is not a number is not a number
                self.buffers[i] = part.new_zeros(places, part.shape[1], slots + GROWTH_SLOTS, part.shape[3])
                if len(old):
                    self.buffers[i][: len(old), :, :slots] = old[:, :, :slots]
            for place, segment in targets:
                first = slots - (segment.end - segment.start)
                self.buffers[i][place, :, :first] = 0.0
                self.buffers[i][place, :, first:slots] = part[0, :, segment.start : segment.end]
        self._show(slots)

    def trim(self, count: int) -> None:
        """Forget the first slots."""
        length = int(self.get_seq_length()) - count
        self.buffers = [buffer[:, :, count:] for buffer in self.buffers]
        self._show(length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch, in this order."""
        length = int(self.get_seq_length())
        # The buffers, not the views: the free slots stay available.
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self._show(length)

    def _show(self, length: int) -> None:
        # Views, because transformers reads the length of the cache from the shape of `keys`.
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


def new_cache() -> Cache:
    """An empty cache of growing layers, for rows that join and leave and all end at the same slot."""
    return Cache(layer_class_to_replicate=GrowingCacheLayer)


def write_rows(
    cache: Cache, kv_by_layer: KVByLayer, targets: Sequence[tuple[int, Segment]], *, places: int, slots: int
) -> None:
    """`GrowingCacheLayer.write` in every layer; without keys it only makes room."""
    if not kv_by_layer:
        kv_by_layer = {i: (layer.keys[:1, :, :0], layer.values[:1, :, :0]) for i, layer in enumerate(cache.layers)}
    for layer, states in sorted(kv_by_layer.items()):
        while len(cache.layers) <= layer:
            cache.layers.append(GrowingCacheLayer())
        cache.layers[layer].write(states, targets, places=places, slots=slots)


def trim_cache(cache: Cache, count: int) -> None:
    """Forget the first slots of every layer."""
    for layer in cache.layers:
        layer.trim(count)


def attend_one_token(
    query_BHD: Tensor,
    prefix: KeysValues | None,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    visible_BS: Tensor | None,
    params: AttentionParams,
) -> Tensor:
    """Attention of one new token a row to the shared prefix and to the row's keys; returns [B, H, D].

    The prefix is read once for the whole batch: its product has B * H / K rows instead of B copies of the prefix.
    """
    (rows, heads, width), kv_heads = query_BHD.shape, key_BKSD.shape[1]
    groups = heads // kv_heads
    query = query_BHD.view(rows, kv_heads, groups, width)
    scores = query @ key_BKSD.transpose(-1, -2)
    row_length = scores.shape[-1]
    if prefix is not None:
        folded = query.transpose(0, 1).reshape(kv_heads, rows * groups, width)
        prefix_scores = (folded @ prefix[0][0].transpose(-1, -2)).view(kv_heads, rows, groups, -1).transpose(0, 1)
        scores = torch.cat([prefix_scores, scores], dim=-1)
    # Softmax in float32: in bfloat16 small weights over a long prefix would be rounded away.
    scores = scores.float() * (width**-0.5 if params.scaling is None else params.scaling)
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    # The mask covers only the row's slots: no prefix token is padding.
    if visible_BS is not None:
        scores[..., -row_length:].masked_fill_(~visible_BS[:, None, None, :], float("-inf"))
    weights = scores.softmax(dim=-1).to(value_BKSD.dtype)
    out = weights[..., -row_length:] @ value_BKSD
    if prefix is not None:
        folded = weights[..., :-row_length].transpose(0, 1).reshape(kv_heads, rows * groups, -1)
        out = out + (folded @ prefix[1][0]).view(kv_heads, rows, groups, width).transpose(0, 1)
    return out.reshape(rows, heads, width)
