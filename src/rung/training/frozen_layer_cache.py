"""The frozen trunk: what enters the lowest layer that moves is computed once for each document and read from then on.

Exact, because nothing below that layer moves during a run: the same weights and the same tokens give the same states.
The states stand in a file of the run's own, which goes when the process does; an entry is found by the tokens of its
document, and every read is checked against the sum taken when it was written.
"""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rung.console import print_status
from rung.data.byte_store import AppendFile
from rung.errors import CheckpointError
from rung.files import cache_folder
from rung.models.policy import Policy
from rung.training.packing import pack_together
from rung.types import CachedHidden, Example, PackedBatch, SharedPrefix

LENGTHS = 1000
"""Documents looked at to know how long all of them are."""


def has_disk_space(rows: Sequence[Sequence[Example]], width: int) -> bool:
    """Whether half of the free disk takes the states of all these documents; says so where it does not."""
    some = [sum(map(len, rows[i])) for i in range(0, len(rows), max(1, len(rows) // LENGTHS))]
    needed = int(np.mean(some) * len(rows) * 4 * width)
    enough = needed <= shutil.disk_usage(cache_folder()).free // 2
    if not enough:
        print_status(f"some layers do not move, but keeping their states would take {needed / 1e9:.0f} GB")
    return enough


class _Entry(NamedTuple):
    offset: int
    size: int
    checksum: int
    dtype: torch.dtype


class FrozenLayerCache:
    """Hidden states that enter `layer`, by document. `budget` tokens are computed at once."""

    def __init__(self, policy: Policy, layer: int, budget: int, *, share_prefixes: bool = True) -> None:
        self.policy, self.layer, self.budget, self.share_prefixes = policy, layer, budget, share_prefixes
        self.states = AppendFile.new()
        self.entries: dict[bytes, _Entry] = {}

    def feed(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The same rows with the states of every document, computed where they are not known yet."""
        self.fill(batches)
        prefixes: dict[SharedPrefix, SharedPrefix] = {}
        return [self._with_states(batch, prefixes) for batch in batches]

    def fill(self, batches: Sequence[PackedBatch]) -> None:
        """Compute the states of the documents that are not known yet, together: sums in their order are these bits."""
        documents = {_key(d): d for batch in batches for d in batch.documents}
        self._compute([d for key, d in documents.items() if key not in self.entries])

    def summary(self) -> dict[str, int]:
        """For `run.json`."""
        return {"layer": self.layer, "documents": len(self.entries), "bytes": self.states.size}

    def _compute(self, documents: Sequence[Example]) -> None:
        if not documents:
            return
        for batch in pack_together(
            documents, self.budget, share_prefixes=self.share_prefixes, device=self.policy.device
        ):
            states = self.policy.hidden_states_entering(batch, self.layer).cpu()
            for document, rows in zip(batch.documents, batch.rows, strict=True):
                self._write(document, states[torch.from_numpy(rows)])

    def _write(self, document: Example, states_TH: Tensor) -> None:
        raw = states_TH.contiguous().view(torch.uint8).numpy().tobytes()
        offset = self.states.append(raw)
        self.entries[_key(document)] = _Entry(offset, len(raw), zlib.crc32(raw), states_TH.dtype)

    def _read(self, document: Example) -> Tensor:
        entry = self.entries[_key(document)]
        raw = bytearray(self.states.read(entry.offset, entry.size))
        if zlib.crc32(raw) != entry.checksum:
            raise CheckpointError(
                "cached hidden states are not what was written",
                where=self.states.name,
                hint="the disk may be failing; training.cache_frozen_layers=false does without",
            )
        return torch.frombuffer(raw, dtype=entry.dtype).view(len(document), -1)

    def _with_states(self, batch: PackedBatch, prefixes: dict[SharedPrefix, SharedPrefix]) -> PackedBatch:
        ahead = 0 if batch.prefix is None else len(batch.prefix.ids)
        states_TH: Tensor | None = None
        for document, rows in zip(batch.documents, batch.rows, strict=True):
            own = self._read(document)
            if states_TH is None:
                states_TH = own.new_empty(len(batch.ids), own.shape[1])
            states_TH[torch.from_numpy(rows)] = own[ahead:]
            if batch.prefix is not None and batch.prefix not in prefixes:
                below = CachedHidden(self.layer, own[:ahead].to(self.policy.device))
                prefixes[batch.prefix] = replace(batch.prefix, cached_hidden=below)
        assert states_TH is not None  # noqa: S101 -- a row holds at least one document
        prefix = None if batch.prefix is None else prefixes[batch.prefix]
        return replace(batch, cached_hidden=CachedHidden(self.layer, states_TH.to(self.policy.device)), prefix=prefix)


def _key(document: Example) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(document.ids).tobytes(), digest_size=16).digest()
