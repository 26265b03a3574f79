"""Tokenised examples on disk, found by content: data, tokenizer, template, labels and code version (FAILURES 7)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rung.data.chat import Chat
from rung.data.split import fingerprint
from rung.data.tokenise import Long, Overflow, Tokenised
from rung.errors import CheckpointError
from rung.paths import cache_folder
from rung.spec.data import LossOn
from rung.types import Example, Record

CODE_VERSION = 1
"""Raise it with every change to what chat.py or tokenise.py produce."""


def cached_examples(
    chat: Chat,
    records: Sequence[Record],
    *,
    loss_on: LossOn = "answer",
    max_length: int | None = None,
    overflow: Overflow = "error",
    folder: Path | None = None,
) -> Tokenised:
    """`Chat.examples`, kept in `folder` (default: `tokenised` in Rung's cache folder); a damaged file is built anew.

    Raises:
        DataError: as `Chat.examples`; nothing is stored then.
    """
    name = cache_key(chat, records, loss_on=loss_on, max_length=max_length, overflow=overflow)
    file = (folder or cache_folder() / "tokenised") / f"{name}.safetensors"
    if (found := _load(file, records)) is not None:
        return found
    made = chat.examples(records, loss_on=loss_on, max_length=max_length, overflow=overflow)
    _store(file, made)
    return made


def cache_key(
    chat: Chat, records: Sequence[Record], *, loss_on: LossOn, max_length: int | None, overflow: Overflow
) -> str:
    """SHA-256 over all that decides the ids, and nothing else: no path, no output folder, no tokenizer class."""
    parts = [CODE_VERSION, fingerprint(records), chat.identity(), loss_on, max_length, overflow]
    return sha256(json.dumps(parts).encode()).hexdigest()


def _store(file: Path, made: Tokenised) -> None:
    details = {
        "expected": made.expected,
        "dropped": [(x.record, x.length) for x in made.dropped],
        "trimmed": [(x.record, x.length) for x in made.trimmed],
        "boundary": [made.boundary_checked, made.boundary_differences],
    }
    tensors = {
        "ids": np.concatenate([e.ids for e in made.examples]),
        "supervised": np.concatenate([e.supervised for e in made.examples]),
        "lengths": made.lengths,
        "kept": np.array(made.kept, dtype=np.int64),
        "starts": np.array(made.starts, dtype=np.int64),
        "details": np.frombuffer(json.dumps(details).encode(), dtype=np.uint8),
    }
    digest = _digest(tensors)
    temporary: str | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        os.close(handle)
        save_file(tensors, temporary, metadata={"sha256": digest})
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        hint = "free some disk space, or set RUNG_CACHE to a folder with room"
        raise CheckpointError(f"could not write the cache: {error}", where=str(file.parent), hint=hint) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _load(file: Path, records: Sequence[Record]) -> Tokenised | None:
    """The stored examples with the sources, weights and groups of `records`; None when there is no whole file."""
    try:
        with safe_open(str(file), framework="numpy") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
            if (stored.metadata() or {}).get("sha256") != _digest(tensors):
                return None
    except (OSError, SafetensorError):
        return None
    details: dict[str, Any] = json.loads(tensors["details"].tobytes())
    kept = tuple(int(i) for i in tensors["kept"])
    cuts = np.cumsum(tensors["lengths"])[:-1]
    rows = zip(kept, np.split(tensors["ids"], cuts), np.split(tensors["supervised"], cuts), strict=True)
    made = Tokenised(
        tuple(_example(records[i], ids, supervised) for i, ids, supervised in rows),
        kept,
        tuple(details["expected"]),
        tuple(int(i) for i in tensors["starts"]),
        dropped=_longs(details["dropped"], records),
        trimmed=_longs(details["trimmed"], records),
        boundary_checked=details["boundary"][0],
        boundary_differences=details["boundary"][1],
    )
    return replace(made, from_cache=True)


def _example(record: Record, ids: np.ndarray, supervised: np.ndarray) -> Example:
    return Example(ids, supervised, record.source, weight=record.weight, group=record.group)


def _longs(stored: list[list[int]], records: Sequence[Record]) -> tuple[Long, ...]:
    return tuple(Long(i, records[i].source, length) for i, length in stored)


def _digest(tensors: dict[str, np.ndarray]) -> str:
    digest = sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
