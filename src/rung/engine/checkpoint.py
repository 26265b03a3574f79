"""Checkpoints that are whole or not there: written aside, hashed, flushed, renamed. safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

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
        aside.mkdir(parents=True)
        fill(aside)
        files = {str(p.relative_to(aside)): _sha256(p) for p in sorted(aside.rglob("*")) if p.is_file()}
        _check_tensors(aside)
        (aside / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")
        for path in [*aside.rglob("*"), aside]:
            _flush(path)
        _replace(aside, folder)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        hint = "free some disk space and use --resume"
        raise CheckpointError(f"could not write: {reason}", where=str(folder), hint=hint) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _flush(folder.parent)


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


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; what is passed over is told to `warn`."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        if problem := verify(candidate):
            warn(f"checkpoint {candidate.name} passed over: {problem}")
            continue
        return candidate
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` numbered checkpoints."""
    for old in sorted(folder.glob("step-*"), reverse=True)[keep:]:
        shutil.rmtree(old)


REFERENCE = "reference.safetensors"


def write_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    known: Mapping[int, float] | None = None,
) -> None:
    """Everything a later process needs to go on as if nothing had happened; `known` is the reference's, by document."""

    def fill(aside: Path) -> None:
        save_file({name: value.contiguous().cpu() for name, value in weights.items()}, aside / "weights.safetensors")
        save_file({**_optimiser_tensors(optimiser), "rng": torch.get_rng_state()}, aside / "optimiser.safetensors")
        (aside / "progress.json").write_text(json.dumps(dict(progress), indent=2) + "\n")
        if known:
            keys, nats = torch.tensor(list(known)), torch.tensor(list(known.values()), dtype=torch.float64)
            save_file({"documents": keys, "nats": nats}, aside / REFERENCE)

    write_folder(folder, fill)


def read_known(folder: Path) -> dict[int, float]:
    """What the reference gave documents by then; nothing where it was not asked."""
    if not (folder / REFERENCE).exists():
        return {}
    found = load_file(folder / REFERENCE)
    return dict(zip(found["documents"].tolist(), found["nats"].tolist(), strict=True))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The moving numbers of a checkpoint."""
    return load_file(folder / "weights.safetensors")


def read_checkpoint(folder: Path, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Put the optimiser's and the generator's state back; return weights and progress."""
    state = load_file(folder / "optimiser.safetensors")
    torch.set_rng_state(state.pop("rng"))
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            optimiser.state[parameter] = {}
    parameters = _numbered(optimiser)
    for key, value in state.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        if name == "step":  # torch counts in a float tensor, bitsandbytes in a plain number
            optimiser.state[parameter][name] = int(value) if value.dtype is torch.int64 else value
        else:
            optimiser.state[parameter][name] = value.to(parameter.device)
    return read_weights(folder), json.loads((folder / "progress.json").read_text())


def _optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": torch.as_tensor(value).detach().contiguous().cpu()
        for number, parameter in enumerate(_numbered(optimiser))
        for name, value in optimiser.state.get(parameter, {}).items()
    }


def _numbered(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _check_tensors(folder: Path) -> None:
    for file in sorted(folder.rglob("*.safetensors")):
        for name, value in load_file(file).items():
            if value.numel() == 0:
                raise GateError(f"save: tensor {name} is empty", where=str(file.name))
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise GateError(f"save: tensor {name} holds a value that is not finite", where=str(file.name))


def _replace(new: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(new, folder)
        return
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
