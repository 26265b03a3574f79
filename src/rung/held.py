"""Files that are safe to be stopped at: held by one process, replaced in one go, or journals that outlive it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from rung.errors import CheckpointError


def hold(path: Path) -> IO[bytes]:
    """Open a file that one process at a time may hold; closing it, or the end of the process, lets go.

    Raises `CheckpointError` where another process holds it, or it cannot be written.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
        except OSError as error:
            raise CheckpointError(f"could not write here: {error.strerror}", where=str(path.parent)) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            what = "another process is at work here"
            raise CheckpointError(what, where=str(path.parent), hint="wait for it, or name another output") from None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()  # whoever held it removed it in between


def let_go(path: Path, file: IO[bytes]) -> None:
    """Remove a file that this process holds, and hold it no longer."""
    path.unlink(missing_ok=True)
    file.close()


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one go. Raises `CheckpointError` when it cannot be written; the old one is then still there."""
    aside = path.with_name(f".{path.name}.writing-{os.getpid()}")  # as folders do: what a kill leaves is cleared away
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(f"could not write: {error.strerror or error}", where=str(path)) from error


class Journal:
    """Results by key, each on disk before the next is made: whoever is stopped goes on with the same command.

    One JSON object a line, the first of which says what was asked for. A last line that a kill tore is forgotten.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """Take up the journal at `path`, or begin one. Raises `CheckpointError` where it is of something else."""
        self.path = path
        asked = sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
        self._file = hold(path)
        written = path.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        try:
            first, *rest = [json.loads(line) for line in whole.splitlines()] or [{"asked": asked}]
            begun = first["asked"]
            self.known: dict[str, Any] = {line["key"]: line["value"] for line in rest}
        except (ValueError, KeyError, TypeError) as error:
            self._file.close()
            raise CheckpointError(f"this is no journal: {error}", where=str(path), hint="remove it") from None
        if begun != asked:
            self._file.close()
            what = "what was begun here was asked for otherwise"
            raise CheckpointError(what, where=str(path), hint="remove it, or write to another file")
        self._file.truncate(len(whole))
        if not whole:
            self._append({"asked": asked})

    def add(self, key: str, value: Any) -> None:
        """Keep a result."""
        self.known[key] = value
        self._append({"key": key, "value": value})

    def close(self) -> None:
        """Let go of it; what it holds stays."""
        self._file.close()

    def remove(self) -> None:
        """All that was asked for stands elsewhere."""
        let_go(self.path, self._file)

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CheckpointError(f"could not write: {error.strerror}", where=str(self.path)) from error
