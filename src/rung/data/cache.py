"""Cache of tokenized examples on disk, keyed by content (FAILURES 7).

The key covers data, tokenizer, template, labels and code version, never a path, so that two configs on the same rows
share a file and no stale file can match. A file is plain safetensors, checksummed; a damaged one is rebuilt. Reading
the whole file once for its checksum is the price. `runs.dataset` calls `cached_examples`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Unpack

import numpy as np

from rung.data.byte_store import DISK_SPACE_HINT, AppendFile, ByteRange
from rung.data.chat import ChatTemplate
from rung.data.records import fingerprint
from rung.data.token_store import ROW_DTYPE, TokenColumns, TokenizedDataset
from rung.data.tokenize import TOKENIZE_DEFAULTS, TokenizeOptions, tokenize_columns
from rung.errors import CheckpointError
from rung.files import cache_folder, read_safetensors_header, safetensors_header
from rung.types import Record

CODE_VERSION = 6
"""Increase it with every change of what chat.py, tokenize.py or token_store.py produce."""
_TENSORS = {"ids": "I32", "supervised": "BOOL", "texts": "U8", "rows": "U8", "dropped": "I64", "trimmed": "I64"}
"""Tensors of a file in their order, all flat, with their types."""
_WIDTHS = {"I32": 4, "BOOL": 1, "U8": 1, "I64": 8}


def cached_examples(
    chat: ChatTemplate, records: Sequence[Record], *, folder: Path | None = None, **options: Unpack[TokenizeOptions]
) -> TokenizedDataset:
    """`tokenize_records`, cached in `folder` (default: `tokenized` in Rung's cache folder); a damaged file is rebuilt.

    Raises:
        DataError: as `tokenize_records`; nothing is stored then.
    """
    path = (folder or cache_folder() / "tokenized") / f"{cache_key(chat, records, **options)}.safetensors"
    if (columns := _load(path)) is not None:
        return columns.dataset(records, from_cache=True)
    columns = tokenize_columns(chat, records, **options)
    _store(path, columns)
    return columns.dataset(records)


def cache_key(chat: ChatTemplate, records: Sequence[Record], **options: Unpack[TokenizeOptions]) -> str:
    """SHA-256 of everything that decides the ids, and nothing else: no path, no output folder, no tokenizer class."""
    options = TOKENIZE_DEFAULTS | options
    fields = [CODE_VERSION, fingerprint(records), chat.identity(), *options.values()]
    return sha256(json.dumps(fields).encode()).hexdigest()


def _store(path: Path, columns: TokenColumns) -> None:
    """Write the file piece by piece, which safetensors' own writer cannot do; any safetensors reader accepts it."""
    # the small tables go through the same interface as the large columns
    tables = AppendFile.new()
    ranges = {name: getattr(columns, name) for name in ("ids", "supervised", "texts")}
    for name in ("rows", "dropped", "trimmed"):
        data = getattr(columns, name).tobytes()
        ranges[name] = ByteRange(tables, tables.append(data), len(data))
    boundary = json.dumps([columns.boundary_checked, columns.boundary_differences, columns.notes])
    header = safetensors_header(
        ((name, dtype, [ranges[name].size // _WIDTHS[dtype]], ranges[name].size) for name, dtype in _TENSORS.items()),
        {"boundary": boundary, "sha256": _checksum(ranges, boundary)},
    )
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # written under another name and renamed: two processes may build the same file at once
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with open(handle, "wb") as file:
            file.write(header)
            for name in _TENSORS:
                file.writelines(ranges[name].pieces())
        os.replace(temporary, path)
    except OSError as error:
        summary = f"could not write the cache: {error}"
        raise CheckpointError(summary, where=str(path.parent), hint=DISK_SPACE_HINT) from error
    finally:
        if temporary is not None:
            # gone after os.replace; still there after an error
            Path(temporary).unlink(missing_ok=True)


def _load(path: Path) -> TokenColumns | None:
    """The stored documents; None when there is no complete file."""
    try:
        file = AppendFile.open(path)
        header, start_of_data = read_safetensors_header(path)
        offsets = {name: header[name]["data_offsets"] for name in _TENSORS}
        ranges = {name: ByteRange(file, start_of_data + start, end - start) for name, (start, end) in offsets.items()}
        boundary = header["__metadata__"]["boundary"]
        if header["__metadata__"]["sha256"] != _checksum(ranges, boundary):
            return None
    # any damage means a rebuild, never an error: the cache holds nothing that cannot be recomputed
    except (OSError, ValueError, LookupError, TypeError, CheckpointError):
        return None
    ids, supervised, texts, row_bytes, *tables = ranges.values()
    rows = np.frombuffer(row_bytes.read(0, row_bytes.size), ROW_DTYPE)
    dropped, trimmed = (np.frombuffer(table.read(0, table.size), "<i8").reshape(-1, 2) for table in tables)
    return TokenColumns(ids, supervised, texts, rows, dropped, trimmed, *json.loads(boundary))


def _checksum(ranges: Mapping[str, ByteRange], boundary: str) -> str:
    digest = sha256(boundary.encode())
    for name in _TENSORS:
        # names and sizes are hashed too: moving bytes from one tensor to the next must change the checksum
        digest.update(f"{name} {ranges[name].size}\n".encode())
        for piece in ranges[name].pieces():
            digest.update(piece)
    return digest.hexdigest()
