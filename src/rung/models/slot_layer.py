"""A cache layer in which every row of a batch has its own slot for its next token, so that rows need no common end.

`models/static_decoding.py` makes its buffers once, because a graph reads the same memory at every step;
`models/slot_batch.py` lets them grow.

Suffixes: B rows of the batch, S slots, K key/value heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from rung.models.tree_attention import KeysValues

SLOT_BLOCK = 64
"""Slots are a multiple of this."""


def whole_blocks(slots: int) -> int:
    """The smallest multiple of a block with room for so many slots."""
    return -(-slots // SLOT_BLOCK) * SLOT_BLOCK


class SlotLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in buffers [capacity, K, S, D], of which the rows and slots in use are shown to attention."""

    def __init__(self, states: KeysValues) -> None:
        super().__init__()
        self.buffers = [part.new_zeros(0, part.shape[1], 0, part.shape[3]) for part in states]
        self.keys, self.values = self.buffers
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        self.slot_B = self.row_B = torch.zeros(0, dtype=torch.long, device=self.device)

    def reserve(self, rows: int, slots: int) -> None:
        """Make room; grown buffers keep what they hold."""
        for i, buffer in enumerate(self.buffers):
            if buffer.shape[0] < rows or buffer.shape[2] < slots:
                shape = (max(rows, buffer.shape[0]), buffer.shape[1], max(slots, buffer.shape[2]), buffer.shape[3])
                # zeros: a masked slot has no weight, but no weight times what is not a number is not a number
                larger = buffer.new_zeros(shape)
                larger[: buffer.shape[0], :, : buffer.shape[2]] = buffer
                self.buffers[i] = larger

    def show(self, slot_B: Tensor, slots: int) -> None:
        """Let the next token of each row be written to its slot, and attention read so many slots.

        The slots are read at that token: the tensor may change until then.
        """
        self.slot_B, self.row_B = slot_B, torch.arange(len(slot_B), device=self.device)
        self.keys, self.values = (buffer[: len(slot_B), :, :slots] for buffer in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, K, 1, D] in place; return what is shown."""
        for shown, states in ((self.keys, key_states), (self.values, value_states)):
            shown[self.row_B, :, self.slot_B] = states[:, :, 0]
        return self.keys, self.values

    def write(self, rows: slice, states: KeysValues) -> None:
        """Put the keys and values [1, K, T, D] of a prompt into the first slots of each of these rows."""
        for buffer, part in zip(self.buffers, states, strict=True):
            buffer[rows, :, : part.shape[2]] = part

    def copy_row(self, source: int, target: int) -> None:
        """Replace what one row holds by what another holds."""
        for buffer in self.buffers:
            buffer[target] = buffer[source]
