"""Early stopping: the best validation loss so far, when a run should end, and whose weights it ends with.

Without `patience` the best loss is only remembered: nothing is saved and the last weights stay. With it the weights of
every new best are written, which costs a checkpoint each time, because the best step is known only afterwards.
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
    """Decides on validation losses. What it remembers is in `Progress`, so that a checkpoint holds it."""

    patience: int | None
    """Measurements without a better loss after which a run ends; None never ends it."""
    best: Path
    """Folder of the best checkpoint."""
    write: Callable[[Path], None]
    """Writes a checkpoint; of several processes each writes its part."""
    stop_check: StopCheck
    """Is given every validation loss, and returns a reason to stop: a search ends its trials with it."""

    def update(self, progress: Progress, loss: float) -> str | None:
        """Take in a validation loss. Returns why the run should end here, or None."""
        if not math.isfinite(loss):  # no later loss would ever be lower than a NaN that was taken for the best
            print_status(f"the validation loss of step {progress.step} is {loss}: it counts as no better")
        elif progress.best is None or loss < progress.best:
            progress.best, progress.best_step, progress.misses = loss, progress.step, 0
            if self.patience is not None:
                self.write(self.best)
            return self.stop_check(loss)
        progress.misses += 1
        if self.patience is not None and progress.misses > self.patience:
            return f"no better validation loss in {progress.misses} measurements"
        return self.stop_check(loss)

    def reset(self, progress: Progress, *, remove: bool) -> None:
        """Forget the best loss: it belonged to a model that is no longer trained. One process removes its weights."""
        progress.best, progress.best_step, progress.misses = None, 0, 0
        if remove:
            shutil.rmtree(self.best, ignore_errors=True)

    def best_weights(self, progress: Progress) -> Path | None:
        """The checkpoint to end with; None where the last weights are to stay.

        Raises `GateError` for a damaged one: ending with other weights than promised must not go unnoticed.
        """
        if self.patience is None or progress.best_step == progress.step:
            return None
        if not self.best.exists():
            print_status(f"step {progress.best_step} had the lowest validation loss, but its weights went with a stop")
            return None
        if problem := find_damage(self.best):
            raise GateError(f"the best checkpoint cannot be used: {problem}", where=str(self.best))
        return self.best
