"""Checkpoints: trained weights, optimizer state, RNG state, progress and cached reference log-probabilities.

Files are safetensors and JSON, so loading a checkpoint cannot run code. A checkpoint is a hashed folder that is renamed
into place (`files.write_folder`): a kill during a save leaves the previous one intact. The cost is one hash of every
file at each save and each resume. `Trainer` restores them and tells `CheckpointWriter` when a step begins and ends.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rung.config.training import TrainingConfig
from rung.console import print_status
from rung.errors import CheckpointError, GateError, RungError
from rung.files import find_damage, reporting_write_errors, write_folder
from rung.training.optimizer import OptimizerState
from rung.training.random_state import generator_states, restore_generators
from rung.training.run_folder import read_json

REFERENCE_FILE = "reference.safetensors"


@dataclass(frozen=True)
class ResumePoint:
    """What a checkpoint holds besides weights and moments, from before the step that changes it."""

    progress: Mapping[str, Any]
    """The fields of `Progress`, with the states of objective and method."""
    generators: Mapping[str, Tensor]
    """States of the random generators."""


@dataclass
class CheckpointWriter:
    """Saves the checkpoints of a run: when they are due, at an interrupt, and where a step fails."""

    folder: Path
    config: TrainingConfig
    state: OptimizerState
    read_progress: Callable[[], Mapping[str, Any]]
    """The fields of `Progress` as they are now."""
    reference_cache: Callable[[], Mapping[int, float] | None]
    """Nats of the reference by document key."""
    resume_point: ResumePoint | None = None
    """Of the step that is being computed; None once it changes parameters."""
    _due: float = math.inf

    def restart_timer(self) -> None:
        """Count the time until the next checkpoint from now on."""
        seconds = self.config.checkpoint_seconds
        self._due = math.inf if seconds is None else time.monotonic() + seconds

    def is_time(self) -> bool:
        """Whether a checkpoint is due by time; never where checkpoints come by steps."""
        return time.monotonic() >= self._due

    def keep_resume_point(self) -> None:
        """Keep what a checkpoint needs if the next step fails. Called between windows of rows only."""
        self.resume_point = ResumePoint(dict(self.read_progress()), generator_states(self.state.device))

    def begin_update(self) -> None:
        """From here on the weights are no longer those of the last resume point."""
        self.resume_point = None

    def save(self) -> None:
        """Save a numbered checkpoint and remove the oldest ones beyond `save_total_limit`."""
        progress = self.read_progress()
        self.write(self._path(progress), progress)
        if self.state.world.is_rank0:
            remove_old_checkpoints(self.folder, self.config.save_total_limit)
        self.restart_timer()

    def save_by_time(self) -> None:
        """Save a checkpoint that is due by time alone: a full disk does not end the run for it."""
        try:
            self.save()
        except CheckpointError as error:
            # with several ranks the others wait in the middle of a save that this one has left
            if self.state.world.size > 1:
                raise
            print_status(f"no checkpoint, and the run goes on: {error}")
            self.restart_timer()

    @contextmanager
    def saving_on_error(self) -> Iterator[None]:
        """Where the step inside fails, save a checkpoint from before it, then raise its error.

        Not where a gate fails, which judges the weights themselves, and not with several ranks, which can only save
        together.
        """
        try:
            yield
        except GateError:
            raise
        except Exception:
            if self.state.world.size == 1:
                self._save_resume_point()
            raise

    def _save_resume_point(self) -> None:
        point = self.resume_point
        step = self.read_progress()["step"]
        if point is None or point.progress["step"] != step or not step:
            newest = newest_checkpoint(self.folder, print_status)
            remedy = f"the newest checkpoint is {newest.name}" if newest else NO_CHECKPOINT
            print_status(f"an error after step {step}: {remedy}")
            return
        restore_generators(point.generators, self.state.device)
        try:
            self.write(self._path(point.progress), point.progress)
        except RungError as error:
            print_status(f"no checkpoint of step {step}: {error}")
        else:
            print_status(f"saved after step {step} in {self.folder.parent}; --resume continues from there")

    def write(self, folder: Path, progress: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint into `folder`; with several ranks all take part."""
        reference_cache, world = self.reference_cache(), self.state.world
        if world.size > 1:
            # replicas that have drifted apart must not be saved as if they were one model
            world.assert_equal(self.state.replica_digests())
            if reference_cache is not None:
                caches_by_rank = world.gather(list(reference_cache.items()))
                reference_cache = {key: nats for rank_cache in caches_by_rank for key, nats in rank_cache}
        write_checkpoint(folder, self.state, progress or self.read_progress(), reference_cache)

    def _path(self, progress: Mapping[str, Any]) -> Path:
        return self.folder / f"step-{progress['step']:08d}"


NO_CHECKPOINT = "there is no checkpoint yet, so --resume starts anew"


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
