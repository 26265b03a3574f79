"""Folders that are whole or not there: written aside, hashed, flushed, renamed; verified before they are read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rung.errors import CheckpointError, GateError

MANIFEST = "manifest.json"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write files into a new folder beside `folder`, then hash, flush and rename it into place.

    Raises `CheckpointError` when the disk is full, `GateError` when a tensor is empty or not finite; the old folder, if
    any, is then still there.
    """
    aside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(folder):
            aside.mkdir(parents=True)
            fill(aside)
            files = {str(p.relative_to(aside)): _sha256(p) for p in sorted(aside.rglob("*")) if p.is_file()}
            _check_tensors(aside)
            (aside / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")
            for path in [*aside.rglob("*"), aside]:
                _flush(path)
            _replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _flush(folder.parent)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside, what cannot be written is a `CheckpointError` that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        hint = "free some disk space and use --resume"
        raise CheckpointError(f"could not write: {reason}", where=str(folder), hint=hint) from error


def tidy(folder: Path) -> None:
    """Put right what a kill left in a folder: what was being replaced comes back, what was being written goes.

    For a folder that no other process is at work in.
    """
    for left in folder.glob(".*.old-*"):
        replaced = folder / left.name[1:].rpartition(".old-")[0]
        shutil.rmtree(left) if replaced.exists() else os.replace(left, replaced)
    for left in folder.glob(".*.writing-*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def verify(folder: Path) -> str | None:
    """What is wrong with a written folder, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, digest in files.items():
            if _sha256(folder / name) != digest:
                return f"{name} is not what its manifest says"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if files else "its manifest lists no files"


def check_whole(folder: Path) -> None:
    """Raise `CheckpointError` for a written folder that is not what it was when it was written."""
    if problem := verify(folder):
        raise CheckpointError(f"this folder is damaged: {problem}", where=str(folder), hint="train it again")


def _check_tensors(folder: Path) -> None:
    for file in sorted(folder.rglob("*.safetensors")):
        for name, value in load_file(file).items():
            if value.numel() == 0:
                raise GateError(f"save: tensor {name} is empty", where=str(file.name))
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise GateError(f"save: tensor {name} holds a value that is not finite", where=str(file.name))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
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
