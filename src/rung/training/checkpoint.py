"""Checkpoints: weights, moments, generators, what a reference gave. safetensors and JSON only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rung.files import find_damage, reporting_write_errors, write_folder
from rung.training.optimizer import OptimizerState

REFERENCE_FILE = "reference.safetensors"


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; what is passed over is told to `warn`."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        if problem := find_damage(candidate):
            warn(f"checkpoint {candidate.name} passed over: {problem}")
            continue
        return candidate
    return None


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` numbered checkpoints."""
    for old in sorted(folder.glob("step-*"), reverse=True)[keep:]:
        shutil.rmtree(old)


def write_checkpoint(
    folder: Path, held: OptimizerState, progress: Mapping[str, Any], known: Mapping[int, float] | None = None
) -> None:
    """Everything a later process needs to go on as if nothing had happened; `known` is the reference's, by document.

    The first process writes; where the model is in parts each writes its own rows, into one folder.
    """
    world = held.world
    if not world.is_rank0:
        if held.rows:
            aside = Path(world.gather(None)[0])
            with reporting_write_errors(folder):
                held.save(_part(aside, world.rank))
            world.barrier()
        return

    def fill(aside: Path) -> None:
        if held.rows:
            world.gather(str(aside))
        held.save(_part(aside, world.rank) if held.rows else aside)
        (aside / "progress.json").write_text(json.dumps(dict(progress), indent=2) + "\n")
        if known:
            keys, nats = torch.tensor(list(known)), torch.tensor(list(known.values()), dtype=torch.float64)
            save_file({"documents": keys, "nats": nats}, aside / REFERENCE_FILE)
        if held.rows:
            world.barrier()

    write_folder(folder, fill)


def _part(folder: Path, rank: int) -> Path:
    return folder / f"part-{rank:05d}"


def read_reference_cache(folder: Path) -> dict[int, float]:
    """What the reference gave documents by then; nothing where it was not asked."""
    if not (folder / REFERENCE_FILE).exists():
        return {}
    found = load_file(folder / REFERENCE_FILE)
    return dict(zip(found["documents"].tolist(), found["nats"].tolist(), strict=True))


def read_progress(folder: Path) -> dict[str, Any]:
    """How far the run was."""
    progress: dict[str, Any] = json.loads((folder / "progress.json").read_text())
    return progress
