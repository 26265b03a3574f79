"""A file that keeps what a model answered, entry by entry, until the output of a command is written.

Each entry is flushed to disk before the next one is computed: it may have cost a paid request or minutes of decoding.
Keys are digests of what was asked (`request_key`), so a pipeline of several stages finds its entries again without
counting them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from rung.errors import CheckpointError
from rung.files import lock_file


def request_key(*parts: Any) -> str:
    """The key of a request: a digest of everything that its answer depends on, as JSON."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class Journal:
    """Results by key, each flushed to disk before the next is computed; the same command resumes from it.

    One JSON object per line. The first line holds a digest of the request, so that another request is refused. A last
    line cut off by a kill is dropped.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> None:
        """Open or create the journal at `path`. Raises `CheckpointError` where it belongs to another request.

        `earlier` are results of other journals: those that are asked for here are stored here, too.
        """
        self.path, self._earlier = path, earlier or {}
        request_digest = _digest(about)
        self._lock = lock_file(path)
        self._file = self._lock.file
        complete_lines = _complete_lines(path)
        try:
            existing_digest, self.results = _parse(complete_lines, request_digest)
        except (ValueError, KeyError, TypeError) as error:
            self._lock.close()
            raise CheckpointError(f"this is no journal: {error}", where=str(path), hint="remove it") from None
        if existing_digest != request_digest:
            self._lock.close()
            what = "this journal belongs to a different request"
            raise CheckpointError(what, where=str(path), hint="remove it, or write to another file")
        # removes the cut line, so that the next entry starts on a line of its own
        self._file.truncate(len(complete_lines))
        if not complete_lines:
            self._append({"asked": request_digest})

    @staticmethod
    def read(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
        """The results of a journal of this request, which another process may be writing; of any other file none."""
        try:
            digest, results = _parse(_complete_lines(path), "")
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return results if digest == _digest(about) else {}

    def get(self, key: str) -> Any:
        """The result of a request; None without one."""
        if key not in self.results and key in self._earlier:
            self.add(key, self._earlier[key])
        return self.results.get(key)

    def add(self, key: str, value: Any) -> None:
        """Store a result on disk."""
        self.results[key] = value
        self._append({"key": key, "value": value})

    def close(self) -> None:
        """Release the lock; the file stays."""
        self._lock.close()

    def remove(self) -> None:
        """Remove the journal: all results are stored elsewhere."""
        self._lock.remove()

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            # each entry may have cost a paid request or minutes of decoding
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CheckpointError(f"could not write: {error.strerror}", where=str(self.path)) from error


def _digest(about: Mapping[str, Any]) -> str:
    # a digest: the request may be long, and only equality matters
    return sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _complete_lines(path: Path) -> bytes:
    content = path.read_bytes()
    # up to the last newline: what follows was cut off by a kill
    return content[: content.rfind(b"\n") + 1]


def _parse(lines: bytes, new: str) -> tuple[str, dict[str, Any]]:
    """The digest of the request, `new` for an empty file, and the results by key."""
    header, *entries = [json.loads(line) for line in lines.splitlines()] or [{"asked": new}]
    return header["asked"], {line["key"]: line["value"] for line in entries}
