"""Crash-safe files: atomic writes, hashed folders, lock files and journals.

A file or folder is written under a temporary name and renamed, so that a kill or a full disk leaves the old content.
Folders carry a manifest of SHA-256 hashes that is verified before they are read; the cost is reading every file once
more. All packages that write use this module; torch is imported only where tensors are checked, so that it stays light.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from rung.errors import CheckpointError, ConfigError, GateError

MANIFEST = "manifest.json"
_ERRORS_OF_PLACES = {
    errno.ENOTDIR,
    errno.ENOENT,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
}
"""What more disk space does not mend."""
RUN_FILE = "run.json"
SYNTH_FILE = "synth.json"
"""Manifest of a folder of rows that a model wrote."""


def write_folder(folder: Path, fill: Callable[[Path], None], *, replaces: bool = True) -> None:
    """Let `fill` write files into a temporary folder, then hash, flush and rename it to `folder`.

    `replaces`: whether an old folder of this name is replaced. Raises `CheckpointError` where the disk is full, and for
    an old folder that must stay, `GateError` where a tensor is empty or not finite; an old folder is then unchanged.
    """
    # next to the target: a rename is atomic within one file system only
    staging = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with reporting_write_errors(folder):
            staging.mkdir(parents=True)
            fill(staging)
            files = {str(p.relative_to(staging)): _sha256(p) for p in sorted(staging.rglob("*")) if p.is_file()}
            _check_tensors(staging)
            (staging / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")
            # before the rename: after a power cut the new name must not point to empty files
            for path in [*staging.rglob("*"), staging]:
                _fsync(path)
            if replaces:
                _replace(staging, folder)
            elif not _rename_if_free(staging, folder):
                raise CheckpointError("this folder was made by somebody else meanwhile", where=str(folder))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _fsync(folder.parent)  # makes the rename itself durable


@contextmanager
def reporting_write_errors(folder: Path) -> Iterator[None]:
    """Inside, write errors become a `CheckpointError` that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        is_about_place = isinstance(error, OSError) and error.errno in _ERRORS_OF_PLACES
        hint = (
            None if is_about_place else "free some disk space, then run the command again (with --resume if it has it)"
        )
        raise CheckpointError(f"could not write: {reason}", where=str(folder), hint=hint) from error


def recover_interrupted_writes(folder: Path) -> None:
    """Repair a folder after a kill: restore entries that were being replaced, remove unfinished ones.

    Only for a folder in which no other process works.
    """
    for leftover in folder.glob(".*.old-*"):
        # killed between the two renames of `_replace`: the target is missing and the old folder is still complete
        target = folder / leftover.name[1:].rpartition(".old-")[0]
        shutil.rmtree(leftover) if target.exists() else os.replace(leftover, target)
    for leftover in folder.glob(".*.writing-*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def find_damage(folder: Path, but: Collection[str] = ()) -> str | None:
    """What is wrong with a folder of `write_folder`, or None; files of `but` are not looked at."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, expected_digest in files.items():
            if name not in but and _sha256(folder / name) != expected_digest:
                return f"{name} is not what its manifest says"
    # a damaged manifest may be any JSON value, or none
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if files else "its manifest lists no files"


def require_undamaged(folder: Path, *, but: Collection[str] = (), hint: str = "train it again") -> None:
    """Raise `CheckpointError` where a folder of `write_folder` is damaged; `but`: files that may have been edited."""
    if problem := find_damage(folder, but):
        raise CheckpointError(f"this folder is damaged: {problem}", where=str(folder), hint=hint)


def _check_tensors(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    for file in sorted(folder.rglob("*.safetensors")):
        # read back from the disk: what is checked is what will be loaded
        for name, value in load_file(file).items():
            if value.numel() == 0:
                raise GateError(f"save: tensor {name} is empty", where=str(file.name))
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise GateError(f"save: tensor {name} holds a value that is not finite", where=str(file.name))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    # Windows, and some network and FUSE file systems, cannot flush a folder; a file that cannot be flushed is an error
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename_if_free(new: Path, folder: Path) -> bool:
    """Rename, unless a folder or file of this name is there by now."""
    if folder.exists():
        return False
    try:
        os.rename(new, folder)
    # made between the look and the rename: the kernel refuses to rename onto a folder with something in it
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def _replace(new: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(new, folder)
        return
    # a folder that is not empty cannot be replaced by one rename; `recover_interrupted_writes` covers the gap
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old)


@dataclass(frozen=True)
class LockedFile:
    """An open file that is locked by this process; `close` and the end of the process release the lock."""

    path: Path
    file: IO[bytes]
    """Open for appending."""
    owner: Path | None = None
    """The file that stands for the lock where the file system has no locks."""

    def close(self) -> None:
        """Release the lock; the file stays."""
        self.file.close()
        self._remove_owner()

    def remove(self) -> None:
        """Remove the file and release the lock."""
        if os.name == "nt":  # where an open file cannot be removed; another process may have locked it meanwhile
            self.file.close()
            with suppress(PermissionError):
                self.path.unlink(missing_ok=True)
        else:
            self.path.unlink(missing_ok=True)  # before the release: afterwards it may be the lock of another process
            self.file.close()
        self._remove_owner()

    def _remove_owner(self) -> None:
        if self.owner is not None:
            self.owner.unlink(missing_ok=True)


def lock_file(path: Path) -> LockedFile:
    """Open and lock a file, creating it where it is missing.

    Raises `CheckpointError` where another process holds the lock or the file cannot be written.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # append mode: opening must not truncate a journal that another process holds
            file = path.open("ab")
        except OSError as error:
            raise CheckpointError(f"could not write here: {error.strerror}", where=str(path.parent)) from error
        try:
            owner = None if _lock(file) else _create_owner_file(path)
        except OSError as error:
            file.close()
            hint = str(error) or "wait for it, or name another output"
            raise CheckpointError("another process is at work here", where=str(path.parent), hint=hint) from None
        locked = LockedFile(path, file, owner)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return locked
        locked.close()  # the previous holder removed this file between open and flock: lock the new one


_LOCKED_BYTE = 2**40
"""The byte that is locked on Windows, where nobody can read a locked one: beyond the end of every file."""


_HELD_ERRORS = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
"""Errors of a lock that another process holds; all others mean that the file system has no locks."""


def _lock(file: IO[bytes]) -> bool:
    """Lock an open file, not a file that merely exists: the kernel releases it when the process is killed.

    Returns False where the file system has no locks (Lustre without `flock`, some network and FUSE file systems).
    Raises `BlockingIOError` where another process holds the lock.
    """
    try:
        _lock_by_kernel(file)
    except OSError as error:
        if error.errno in _HELD_ERRORS:
            raise BlockingIOError from None
        return False
    return True


def _lock_by_kernel(file: IO[bytes]) -> None:
    try:
        import fcntl
    except ImportError:  # on Windows
        import msvcrt

        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


OWNER_SUFFIX = ".owner"
"""Ends the name of the file beside a locked file that names the process which holds it."""
TAKEOVER_SUFFIX = ".takeover"
"""Ends the name of the file beside an owner file that exists while the file of a dead process is removed."""


def _create_owner_file(path: Path) -> Path:
    """Take a lock that is a file: the one that creates it holds it.

    No kernel removes it after a kill, so it names host and process: that of a dead process on this host is taken over.
    Raises `BlockingIOError` with the remedy where another process holds it.
    """
    owner, content = path.with_name(path.name + OWNER_SUFFIX), f"{os.getpid()} {socket.gethostname()}"
    for _ in range(2):
        try:
            with owner.open("x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            holder = _read_owner(owner)
            if _is_alive(holder):
                remedy = f"this file system has no locks; if process {holder or '(unknown)'} is gone, remove {owner}"
                raise BlockingIOError(remedy) from None
            _remove_dead_owner(owner, holder)
        else:
            return owner
    raise BlockingIOError


def _remove_dead_owner(owner: Path, holder: str) -> None:
    """Remove the owner file of a dead process. Raises `BlockingIOError` with the remedy where another process does.

    One process at a time: a second one that found the same dead owner would remove the file of the first, which is the
    owner by then.
    """
    takeover = owner.with_name(owner.name + TAKEOVER_SUFFIX)
    try:
        takeover.touch(exist_ok=False)
    except FileExistsError:
        raise BlockingIOError(f"another process takes this lock over; if none does, remove {takeover}") from None
    try:
        if _read_owner(owner) == holder:
            owner.unlink()
    finally:
        takeover.unlink()


def _read_owner(owner: Path) -> str:
    try:
        return owner.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _is_alive(holder: str) -> bool:
    """Whether the process of an owner file may still run; always assumed of one on another host."""
    number, _, host = holder.partition(" ")
    if not number.isdecimal() or host != socket.gethostname() or os.name == "nt":
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically with text in UTF-8; as `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file atomically with one row of JSON per line; as `write_bytes`."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically. Raises `CheckpointError` where it cannot be written; the old file then stays."""
    staging = path.with_name(f".{path.name}.writing-{os.getpid()}")  # a name that `recover_interrupted_writes` removes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.write_bytes(content)
        os.replace(staging, path)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise CheckpointError(f"could not write: {error.strerror or error}", where=str(path)) from error


def cache_folder() -> Path:
    """The cache folder: `RUNG_CACHE`, else `XDG_CACHE_HOME`/rung, else ~/.cache/rung."""
    if override := os.environ.get("RUNG_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rung"


CONVERSION_VERSION = 2
"""Increase it with every change to what a converted GGUF file holds: folders of another version are not used."""


def converted_gguf_folder(file: Path) -> Path:
    """Folder in the cache for the model that a GGUF file is converted into; it need not exist.

    Path, size and time of change identify the file: a hash of its content would take seconds at every command.
    """
    status = file.stat()
    key = sha256(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:12]
    return cache_folder() / "models" / f"{file.stem}-{key}-{CONVERSION_VERSION}"


def is_run_folder(path: str | Path) -> bool:
    """Whether a folder holds a run or a climb, finished or not."""
    # the first file of a run: it exists before the first step and after a kill
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


_GIT_LFS_START = b"version https://git-lfs"


def check_safetensors(file: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file by name, without `__metadata__`; its bytes are counted, and no tensor is read.

    Raises `ConfigError` with the remedy for a file that is damaged, cut off or something else.
    """
    hint = "fetch the file again, and compare its size with that of the source"
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_GIT_LFS_START))
        if start == _GIT_LFS_START:
            summary, hint = "this is the pointer of a file in Git LFS, not the file", "run: git lfs pull"
            raise ConfigError(summary, where=str(file), hint=hint)
        header, data_start = read_safetensors_header(file)
        size = file.stat().st_size
    except OSError as error:
        raise ConfigError(f"this file cannot be read: {error.strerror}", where=str(file)) from error
    except ValueError as error:
        reason = f"this is no safetensors file: {error}"
        if start.lstrip()[:1] == b"<":
            reason = "this is a web page, not a safetensors file"
        raise ConfigError(reason, where=str(file), hint=hint) from error
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    try:
        end = data_start + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        complete = all(
            isinstance(entry["dtype"], str) and isinstance(entry["shape"], list) for entry in tensors.values()
        )
    except (KeyError, TypeError, ValueError, IndexError):
        complete = False
    if not complete:
        raise ConfigError("this is no safetensors file: its header describes no tensors", where=str(file), hint=hint)
    if size != end:
        given, allowed = f"{size:,} bytes", f"{end:,} bytes, by its header"
        summary = "this file is cut off" if size < end else "this file goes on behind its tensors"
        raise ConfigError(summary, where=str(file), given=given, allowed=allowed, hint=hint)
    return tensors


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
