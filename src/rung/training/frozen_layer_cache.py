"""Cache of the hidden states that enter the lowest trained layer: frozen layers run once per document.

The result is exact, because the same frozen weights and the same tokens give the same states. The cost is 4 bytes per
token and unit of width on disk. States are read from an unnamed file with pread, not mapped: mapped pages would count
as memory of the process (decision 0009). Entries are keyed by a hash of the document's tokens; every read verifies a
checksum. `Trainer` creates the cache for runs of more than one epoch.
"""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rung.console import print_status
from rung.data.byte_store import AppendFile
from rung.errors import CheckpointError
from rung.files import cache_folder
from rung.models.packing import pack_together
from rung.models.policy import Policy
from rung.types import CachedHidden, Example, PackedBatch, SharedPrefix

SAMPLED_ROWS = 1000
"""Rows whose lengths are read to estimate the size of all states: reading every row would decode the whole data set."""


def has_disk_space(
    rows: Sequence[Sequence[Example]], width: int, name: str, size: Callable[[Example], int] = len
) -> bool:
    """Whether `size` states per document fit into half of the free disk space; prints a line where they do not."""
    sampled_rows = (rows[i] for i in range(0, len(rows), max(1, len(rows) // SAMPLED_ROWS)))
    sampled_lengths = [sum(map(size, row)) for row in sampled_rows]
    needed_bytes = int(np.mean(sampled_lengths) * len(rows) * 4 * width)
    # 4 bytes: float32, the widest compute type of a run. The other half is left to checkpoints and other processes
    fits = needed_bytes <= shutil.disk_usage(cache_folder()).free // 2
    if not fits:
        print_status(f"{name} are computed in every epoch: keeping them would take {needed_bytes / 1e9:.0f} GB of disk")
    return fits


class _Entry(NamedTuple):
    offset: int
    size: int
    checksum: int
    dtype: torch.dtype


class FrozenLayerCache:
    """Hidden states that enter `layer`, by document. At most `budget` tokens are computed at once."""

    def __init__(self, policy: Policy, layer: int, budget: int, *, share_prefixes: bool = True) -> None:
        self.policy, self.layer, self.budget, self.share_prefixes = policy, layer, budget, share_prefixes
        # an unnamed file: it disappears with the process, also when the process is killed
        self.states = AppendFile.new()
        self.entries: dict[bytes, _Entry] = {}

    def feed(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The same batches with the cached states of every document; missing states are computed first."""
        self.fill(batches)
        # batches of one prefix must keep sharing one object: the policy runs a prefix once by its identity
        prefixes: dict[SharedPrefix, SharedPrefix] = {}
        return [self._with_states(batch, prefixes) for batch in batches]

    def fill(self, batches: Sequence[PackedBatch]) -> None:
        """Compute and store missing states.

        All documents of the batches are packed together: the packing sets the order of sums, hence the exact bits, and
        a resumed run that replays the same calls gets the same states.
        """
        documents = {_key(d): d for batch in batches for d in batch.documents}
        missing = [d for key, d in documents.items() if key not in self.entries]
        if not missing:
            return
        options: Any = {"share_prefixes": self.share_prefixes, "device": self.policy.device}
        for batch in pack_together(missing, self.budget, boundary=self.policy.rope_boundary, **options):
            states = self.policy.hidden_states_entering(batch, self.layer).cpu()
            for document, rows in zip(batch.documents, batch.rows, strict=True):
                # bytes of any dtype: numpy has no bfloat16
                raw = states[torch.from_numpy(rows)].contiguous().view(torch.uint8).numpy().tobytes()
                offset = self.states.append(raw)
                self.entries[_key(document)] = _Entry(offset, len(raw), zlib.crc32(raw), states.dtype)

    def summary(self) -> dict[str, int]:
        """Layer, number of documents and bytes, as written to `run.json`."""
        return {"layer": self.layer, "documents": len(self.entries), "bytes": self.states.size}

    def _read(self, document: Example) -> Tensor:
        entry = self.entries[_key(document)]
        raw = bytearray(self.states.read(entry.offset, entry.size))
        if zlib.crc32(raw) != entry.checksum:
            hint = "the disk may be failing; training.cache_frozen_layers=false does without"
            raise CheckpointError("cached hidden states are not what was written", where=self.states.name, hint=hint)
        return torch.frombuffer(raw, dtype=entry.dtype).view(len(document), -1)

    def _with_states(self, batch: PackedBatch, prefixes: dict[SharedPrefix, SharedPrefix]) -> PackedBatch:
        prefix_length = 0 if batch.prefix is None else len(batch.prefix.ids)
        states_TH: Tensor | None = None
        for document, rows in zip(batch.documents, batch.rows, strict=True):
            document_states = self._read(document)
            # allocated at the first read: dtype and width are those of the stored states
            if states_TH is None:
                states_TH = document_states.new_empty(len(batch.ids), document_states.shape[1])
            states_TH[torch.from_numpy(rows)] = document_states[prefix_length:]
            # any document that begins with the prefix has the same states there: attention is causal
            if batch.prefix is not None and batch.prefix not in prefixes:
                prefix_hidden = CachedHidden(self.layer, document_states[:prefix_length].to(self.policy.device))
                prefixes[batch.prefix] = replace(batch.prefix, cached_hidden=prefix_hidden)
        assert states_TH is not None  # noqa: S101 -- a row holds at least one document
        prefix = None if batch.prefix is None else prefixes[batch.prefix]
        return replace(batch, cached_hidden=CachedHidden(self.layer, states_TH.to(self.policy.device)), prefix=prefix)


def _key(document: Example) -> bytes:
    # 128 bits: no collision among any realistic number of documents
    return hashlib.blake2b(np.ascontiguousarray(document.ids).tobytes(), digest_size=16).digest()
