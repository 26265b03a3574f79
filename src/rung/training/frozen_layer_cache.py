"""Cache of the hidden states that enter the lowest trained layer: frozen layers run once per document.

The result is exact, because the same frozen weights and the same tokens give the same states. The cost is 4 bytes per
token and unit of width (2 in bfloat16), on disk or, where the plan of the run leaves room for all of them, on the card.
States are read from an unnamed file with pread, not mapped: mapped pages would count as memory of the process (decision
0009), and every read verifies a checksum. Entries are keyed by a hash of the document's tokens. `Trainer` creates the
cache for runs of more than one epoch.
"""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

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
    needed_bytes = _bytes_of_states(rows, width, size)
    # the other half is left to checkpoints and other processes
    fits = needed_bytes <= shutil.disk_usage(cache_folder()).free // 2
    if not fits:
        print_status(f"{name} are computed in every epoch: keeping them would take {needed_bytes / 1e9:.0f} GB of disk")
    return fits


def has_device_space(rows: Sequence[Sequence[Example]], width: int, spare_bytes: int) -> bool:
    """Whether the states of all documents fit into half of what the plan of a run leaves free on its card."""
    return bool(spare_bytes) and _bytes_of_states(rows, width, len) <= spare_bytes // 2


def _bytes_of_states(rows: Sequence[Sequence[Example]], width: int, size: Callable[[Example], int]) -> int:
    sampled_rows = (rows[i] for i in range(0, len(rows), max(1, len(rows) // SAMPLED_ROWS)))
    sampled_lengths = [sum(map(size, row)) for row in sampled_rows]
    # 4 bytes: float32, the widest compute type of a run
    return int(np.mean(sampled_lengths) * len(rows) * 4 * width)


class StateStore(Protocol):
    """Keeps the states [T, H] of documents."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all states."""

    def __contains__(self, key: bytes) -> bool:
        """Whether the states of a document are there."""

    def __len__(self) -> int:
        """Number of documents."""

    def put(self, key: bytes, states_TH: Tensor, rows: np.ndarray) -> None:
        """Keep the given rows of the states of a batch."""

    def get(self, key: bytes) -> Tensor:
        """The states of a document, where `put` left them."""


class DeviceStore:
    """States on the device: reading them costs no copy from the host."""

    def __init__(self) -> None:
        self.states: dict[bytes, Tensor] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes on the device."""
        return sum(states.nbytes for states in self.states.values())

    def __contains__(self, key: bytes) -> bool:
        """Whether the states of a document are there."""
        return key in self.states

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.states)

    def put(self, key: bytes, states_TH: Tensor, rows: np.ndarray) -> None:
        """Keep the given rows; a copy, which does not hold the states of the whole batch."""
        self.states[key] = states_TH[torch.from_numpy(rows).to(states_TH.device)]

    def get(self, key: bytes) -> Tensor:
        """The states of a document."""
        return self.states[key]


class _Entry(NamedTuple):
    offset: int
    size: int
    checksum: int
    dtype: torch.dtype
    width: int


class FileStore:
    """States in an unnamed file, which disappears with the process, also when the process is killed."""

    def __init__(self) -> None:
        self.file = AppendFile.new()
        self.entries: dict[bytes, _Entry] = {}

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self.file.size

    def __contains__(self, key: bytes) -> bool:
        """Whether the states of a document are there."""
        return key in self.entries

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.entries)

    def put(self, key: bytes, states_TH: Tensor, rows: np.ndarray) -> None:
        """Append the given rows. Raises `CheckpointError` where the disk is full."""
        # bytes of any dtype: numpy has no bfloat16
        states = states_TH[torch.from_numpy(rows).to(states_TH.device)].cpu()
        raw = states.contiguous().view(torch.uint8).numpy().tobytes()
        offset = self.file.append(raw)
        self.entries[key] = _Entry(offset, len(raw), zlib.crc32(raw), states_TH.dtype, states_TH.shape[1])

    def get(self, key: bytes) -> Tensor:
        """The states of a document, on the processor. Raises `CheckpointError` for other bytes than were written."""
        entry = self.entries[key]
        raw = bytearray(self.file.read(entry.offset, entry.size))
        if zlib.crc32(raw) != entry.checksum:
            hint = "the disk may be failing; training.cache_frozen_layers=false does without"
            raise CheckpointError("cached hidden states are not what was written", where=self.file.name, hint=hint)
        return torch.frombuffer(raw, dtype=entry.dtype).view(-1, entry.width)


class FrozenLayerCache:
    """Hidden states that enter `layer`, by document. At most `budget` tokens are computed at once."""

    def __init__(
        self, policy: Policy, layer: int, budget: int, *, share_prefixes: bool = True, store: StateStore | None = None
    ) -> None:
        self.policy, self.layer, self.budget, self.share_prefixes = policy, layer, budget, share_prefixes
        self.store: StateStore = FileStore() if store is None else store

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
        missing = [d for key, d in documents.items() if key not in self.store]
        if not missing:
            return
        options: Any = {"share_prefixes": self.share_prefixes, "device": self.policy.device}
        for batch in pack_together(missing, self.budget, boundary=self.policy.rope_boundary, **options):
            states = self.policy.hidden_states_entering(batch, self.layer)
            for document, rows in zip(batch.documents, batch.rows, strict=True):
                self.store.put(_key(document), states, rows)

    def summary(self) -> dict[str, int]:
        """Layer, number of documents and bytes, as written to `run.json`."""
        return {"layer": self.layer, "documents": len(self.store), "bytes": self.store.size_bytes}

    def _with_states(self, batch: PackedBatch, prefixes: dict[SharedPrefix, SharedPrefix]) -> PackedBatch:
        prefix_length = 0 if batch.prefix is None else len(batch.prefix.ids)
        states_TH: Tensor | None = None
        for document, rows in zip(batch.documents, batch.rows, strict=True):
            document_states = self.store.get(_key(document))
            # allocated at the first read: dtype and width are those of the stored states
            if states_TH is None:
                states_TH = document_states.new_empty(len(batch.ids), document_states.shape[1])
            states_TH[torch.from_numpy(rows).to(states_TH.device)] = document_states[prefix_length:]
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
