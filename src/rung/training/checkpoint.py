"""Checkpoints: trained weights, optimizer state, RNG state, progress and cached reference log-probabilities.

Files are safetensors and JSON, so loading a checkpoint cannot run code. A checkpoint is a hashed folder that is renamed
into place (`files.write_folder`): a kill during a save leaves the previous one intact. The cost is one hash of every
file at each save and each resume. `Trainer` writes and restores them.
"""

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
from rung.training.run_folder import read_json

REFERENCE_FILE = "reference.safetensors"


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose hashes verify, or None; `warn` gets a line for each damaged one."""
    # step numbers are zero-padded: the order of names is the order of steps
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        if (problem := find_damage(candidate)) is None:
            return candidate
        warn(f"checkpoint {candidate.name} passed over: {problem}")
    return None


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` numbered checkpoints."""
    for old in sorted(folder.glob("step-*"), reverse=True)[keep:]:
        shutil.rmtree(old)


def write_checkpoint(
    folder: Path, state: OptimizerState, progress: Mapping[str, Any], reference_cache: Mapping[int, float] | None
) -> None:
    """Write what a resume needs to continue exactly; `reference_cache` maps document keys to nats of the reference.

    Rank 0 writes. With a sharded model every rank writes its own rows into one common folder.
    """
    world = state.world
    if not world.is_rank0:
        if state.rows:
            # pairs with the gather in `fill`: the name of the staging folder contains the process id of rank 0
            staging = Path(world.gather(None)[0])
            with reporting_write_errors(folder):
                state.save(_rank_folder(staging, world.rank))
            world.barrier()
        return

    def fill(staging: Path) -> None:
        if state.rows:
            world.gather(str(staging))
        state.save(_rank_folder(staging, world.rank) if state.rows else staging)
        (staging / "progress.json").write_text(json.dumps(dict(progress), indent=2) + "\n")
        if reference_cache:
            # float64 holds Python's floats exactly: a resumed run computes the same losses bit for bit
            document_keys = torch.tensor(list(reference_cache))
            nats = torch.tensor(list(reference_cache.values()), dtype=torch.float64)
            save_file({"documents": document_keys, "nats": nats}, staging / REFERENCE_FILE)
        if state.rows:
            # `write_folder` hashes and renames after `fill`: every shard must be on disk by then
            world.barrier()

    write_folder(folder, fill)


def _rank_folder(folder: Path, rank: int) -> Path:
    return folder / f"part-{rank:05d}"


def read_reference_cache(folder: Path) -> dict[int, float]:
    """Log-probabilities of the reference in nats by document key; empty where none were cached."""
    if not (folder / REFERENCE_FILE).exists():
        return {}
    tensors = load_file(folder / REFERENCE_FILE)
    return dict(zip(tensors["documents"].tolist(), tensors["nats"].tolist(), strict=True))


def read_progress(folder: Path) -> dict[str, Any]:
    """The fields of `Progress` as they were at the checkpoint."""
    return read_json(folder / "progress.json")
