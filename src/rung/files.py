"""Files that are safe to be stopped at: written to a temporary name and renamed, locked by one process, or journals.

Folders are hashed too, and verified before they are read. torch is imported only where tensors are checked.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from rung.errors import CheckpointError, GateError

MANIFEST = "manifest.json"
RUN_FILE = "run.json"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write files into a new folder beside `folder`, then hash, flush and rename it into place.

    Raises `CheckpointError` when the disk is full, `GateError` when a tensor is empty or not finite; the old folder, if
    any, is then still there.
    """
    aside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with reporting_write_errors(folder):
            aside.mkdir(parents=True)
            fill(aside)
            files = {str(p.relative_to(aside)): _sha256(p) for p in sorted(aside.rglob("*")) if p.is_file()}
            _check_tensors(aside)
            (aside / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")
            for path in [*aside.rglob("*"), aside]:
                _fsync(path)
            _replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _fsync(folder.parent)


@contextmanager
def reporting_write_errors(folder: Path) -> Iterator[None]:
    """Inside, what cannot be written is a `CheckpointError` that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        hint = "free some disk space and use --resume"
        raise CheckpointError(f"could not write: {reason}", where=str(folder), hint=hint) from error


def recover_interrupted_writes(folder: Path) -> None:
    """Put right what a kill left in a folder: what was being replaced comes back, what was being written goes.

    For a folder that no other process is at work in.
    """
    for left in folder.glob(".*.old-*"):
        replaced = folder / left.name[1:].rpartition(".old-")[0]
        shutil.rmtree(left) if replaced.exists() else os.replace(left, replaced)
    for left in folder.glob(".*.writing-*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def find_damage(folder: Path) -> str | None:
    """What is wrong with a written folder, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, digest in files.items():
            if _sha256(folder / name) != digest:
                return f"{name} is not what its manifest says"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if files else "its manifest lists no files"


def require_undamaged(folder: Path) -> None:
    """Raise `CheckpointError` for a written folder that is not what it was when it was written."""
    if problem := find_damage(folder):
        raise CheckpointError(f"this folder is damaged: {problem}", where=str(folder), hint="train it again")


def _check_tensors(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    for file in sorted(folder.rglob("*.safetensors")):
        for name, value in load_file(file).items():
            if value.numel() == 0:
                raise GateError(f"save: tensor {name} is empty", where=str(file.name))
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise GateError(f"save: tensor {name} holds a value that is not finite", where=str(file.name))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(new: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(new, folder)
        return
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old)


def lock_file(path: Path) -> IO[bytes]:
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


def unlock_and_remove(path: Path, file: IO[bytes]) -> None:
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
        self._file = lock_file(path)
        written = path.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        try:
            first, *rest = [json.loads(line) for line in whole.splitlines()] or [{"asked": asked}]
            begun = first["asked"]
            self.results: dict[str, Any] = {line["key"]: line["value"] for line in rest}
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
        self.results[key] = value
        self._append({"key": key, "value": value})

    def close(self) -> None:
        """Let go of it; what it holds stays."""
        self._file.close()

    def remove(self) -> None:
        """All that was asked for stands elsewhere."""
        unlock_and_remove(self.path, self._file)

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CheckpointError(f"could not write: {error.strerror}", where=str(self.path)) from error


def cache_folder() -> Path:
    """`RUNG_CACHE`, or `rung` below `XDG_CACHE_HOME`, or `~/.cache/rung`."""
    if given := os.environ.get("RUNG_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rung"


def is_run_folder(path: str | Path) -> bool:
    """Whether a folder holds a run or a climb, finished or not."""
    return (Path(path) / RUN_FILE).exists()


MAX_HEADER_BYTES = 100 * 2**20
"""Largest header of a safetensors file that is read: a damaged length must not fill the memory."""


def read_safetensors_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Tensors of a safetensors file by name (dtype, shape, data_offsets), with `__metadata__`, and where data begins.

    Eight bytes of length, then JSON; no tensor is read. Raises `ValueError` for a file of another form.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(MAX_HEADER_BYTES, file.stat().st_size):
            raise ValueError(f"its header would be {length:,} bytes long")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, 8 + length


def safetensors_header(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The bytes in front of the data of a safetensors file. `tensors`: name, dtype, shape and bytes, in their order.

    For files that are written piece by piece, which the library's own writer cannot do.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape, size in tensors:
        start, end = end, end + size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns tensors to 8 bytes
    return len(text).to_bytes(8, "little") + text
