"""Early stopping: tracks the best validation loss, decides when a run ends and which weights it ends with.

Without `patience` only the best loss is recorded, nothing is saved and the last weights stay. With `patience` every
new best is written as a checkpoint, because only later losses show whether it stays the best. `Trainer` calls `update`
after each validation.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rung.console import print_status
from rung.errors import GateError
from rung.files import find_damage
from rung.training.run_folder import Progress, StopCheck


@dataclass(frozen=True)
class EarlyStopping:
    """Decides on validation losses. All state is in `Progress`, which checkpoints store."""

    patience: int | None
    """A run ends at the first measurement beyond this many in a row without a better loss; None never ends it."""
    best_folder: Path
    """Folder of the best checkpoint."""
    write_checkpoint: Callable[[Path], None]
    """Writes a checkpoint folder; with a sharded model every rank takes part."""
    stop_check: StopCheck
    """Called with every validation loss; returns a reason to stop or None. A search ends its trials with it."""

    def update(self, progress: Progress, loss: float) -> str | None:
        """Record a validation loss in nats. Returns the reason to end the run here, or None."""
        if not math.isfinite(loss):  # no later loss would ever be lower than a NaN that was taken for the best
            print_status(f"the validation loss of step {progress.step} is {loss}: it counts as no better")
        elif progress.best is None or loss < progress.best:
            progress.best, progress.best_step, progress.misses = loss, progress.step, 0
            if self.patience is not None:
                self.write_checkpoint(self.best_folder)
            return self.stop_check(loss)
        # a loss that is not finite counts as a miss too
        progress.misses += 1
        if self.patience is not None and progress.misses > self.patience:
            return f"no better validation loss in {progress.misses} measurements"
        return self.stop_check(loss)

    def reset(self, progress: Progress, *, remove: bool) -> None:
        """Forget the best loss, which belonged to another model. `remove` deletes its weights; one rank sets it."""
        progress.best, progress.best_step, progress.misses = None, 0, 0
        if remove:
            shutil.rmtree(self.best_folder, ignore_errors=True)

    def best_weights(self, progress: Progress) -> Path | None:
        """The checkpoint folder to end with; None where the last weights stay.

        Raises `GateError` where it is damaged: a run must not end with other weights than it reports.
        """
        # the best step is the last one: its weights are in memory already
        if self.patience is None or progress.best_step == progress.step:
            return None
        # `Trainer.restore` removes a best checkpoint of steps that the resumed run takes again
        if not self.best_folder.exists():
            print_status(f"step {progress.best_step} had the lowest validation loss, but its weights went with a stop")
            return None
        if problem := find_damage(self.best_folder):
            raise GateError(f"the best checkpoint cannot be used: {problem}", where=str(self.best_folder))
        return self.best_folder
