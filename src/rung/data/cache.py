"""Tokenized examples on disk, found by content: data, tokenizer, template, labels and code version (FAILURES 7)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from rung.config.data import LossOn
from rung.data.byte_store import DISK_SPACE_HINT, AppendFile, ByteRange
from rung.data.chat import ChatTemplate
from rung.data.records import fingerprint
from rung.data.token_store import ROW_DTYPE, TokenColumns, TokenizedDataset
from rung.data.tokenize import Overflow, tokenize_columns
from rung.errors import CheckpointError
from rung.files import cache_folder
from rung.types import Record

CODE_VERSION = 4
"""Raise it with every change to what chat.py, tokenize.py or token_store.py produce."""
_TENSORS = {
    "ids": ("I32", 4),
    "supervised": ("BOOL", 1),
    "texts": ("U8", 1),
    "rows": ("U8", 1),
    "dropped": ("I64", 8),
    "trimmed": ("I64", 8),
}
"""Tensors of a file in their order, each flat: type and bytes of a value."""


def cached_examples(
    chat: ChatTemplate,
    records: Sequence[Record],
    *,
    loss_on: LossOn = "answer",
    max_length: int | None = None,
    overflow: Overflow = "error",
    candidates: bool = False,
    folder: Path | None = None,
) -> TokenizedDataset:
    """`tokenize_records`, kept in `folder` (default: `tokenized` in Rung's cache folder); a damaged file is built anew.

    Raises:
        DataError: as `tokenize_records`; nothing is stored then.
    """
    name = cache_key(chat, records, loss_on=loss_on, max_length=max_length, overflow=overflow, candidates=candidates)
    file = (folder or cache_folder() / "tokenized") / f"{name}.safetensors"
    if (found := _load(file)) is not None:
        return TokenizedDataset.from_columns(found, records, from_cache=True)
    made = tokenize_columns(
        chat, records, loss_on=loss_on, max_length=max_length, overflow=overflow, candidates=candidates
    )
    _store(file, made)
    return TokenizedDataset.from_columns(made, records)


def cache_key(
    chat: ChatTemplate,
    records: Sequence[Record],
    *,
    loss_on: LossOn,
    max_length: int | None,
    overflow: Overflow,
    candidates: bool = False,
) -> str:
    """SHA-256 over all that decides the ids, and nothing else: no path, no output folder, no tokenizer class."""
    parts = [CODE_VERSION, fingerprint(records), chat.identity(), loss_on, max_length, overflow, candidates]
    return sha256(json.dumps(parts).encode()).hexdigest()


def _store(file: Path, made: TokenColumns) -> None:
    """Write the file a piece at a time, which safetensors' own writer cannot do; any reader of safetensors takes it."""
    tables = AppendFile.new()
    regions = {name: getattr(made, name) for name in ("ids", "supervised", "texts")}
    for name in ("rows", "dropped", "trimmed"):
        data = getattr(made, name).tobytes()
        regions[name] = ByteRange(tables, tables.append(data), len(data))
    boundary = json.dumps([made.boundary_checked, made.boundary_differences])
    header: dict[str, Any] = {"__metadata__": {"boundary": boundary, "sha256": _checksum(regions, boundary)}}
    end = 0
    for name, (dtype, width) in _TENSORS.items():
        start, end = end, end + regions[name].size
        header[name] = {"dtype": dtype, "shape": [regions[name].size // width], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary: str | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        with open(handle, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in _TENSORS:
                out.writelines(regions[name].pieces())
        os.replace(temporary, file)
    except OSError as error:
        raise CheckpointError(
            f"could not write the cache: {error}", where=str(file.parent), hint=DISK_SPACE_HINT
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _load(file: Path) -> TokenColumns | None:
    """The stored documents; None when there is no whole file."""
    try:
        blob = AppendFile.open(file)
        size = int.from_bytes(blob.read(0, 8), "little")
        if size > blob.size:
            return None
        header: dict[str, Any] = json.loads(blob.read(8, size))
        spans = {name: header[name]["data_offsets"] for name in _TENSORS}
        regions = {name: ByteRange(blob, 8 + size + start, end - start) for name, (start, end) in spans.items()}
        boundary = header["__metadata__"]["boundary"]
        if header["__metadata__"]["sha256"] != _checksum(regions, boundary):
            return None
    except (OSError, ValueError, LookupError, TypeError, CheckpointError):
        return None
    checked, differing = json.loads(boundary)

    def table(name: str) -> bytes:
        return regions[name].read(0, regions[name].size)

    return TokenColumns(
        ids=regions["ids"],
        supervised=regions["supervised"],
        texts=regions["texts"],
        rows=np.frombuffer(table("rows"), ROW_DTYPE),
        dropped=np.frombuffer(table("dropped"), "<i8").reshape(-1, 2),
        trimmed=np.frombuffer(table("trimmed"), "<i8").reshape(-1, 2),
        boundary_checked=checked,
        boundary_differences=differing,
    )


def _checksum(regions: Mapping[str, ByteRange], boundary: str) -> str:
    digest = sha256(boundary.encode())
    for name in _TENSORS:
        digest.update(f"{name} {regions[name].size}\n".encode())
        for piece in regions[name].pieces():
            digest.update(piece)
    return digest.hexdigest()
