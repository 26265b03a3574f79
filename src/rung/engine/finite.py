"""Steps whose loss or gradient is not finite: they never touch the weights, and several in a row end the run."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from rung.engine.progress import say
from rung.engine.record import NOT_FINITE, RunFolder
from rung.engine.state import Progress
from rung.errors import GateError
from rung.held import write_text
from rung.types import Example

SKIPS_BEFORE_STOP = 3
"""Steps in a row that may be skipped because their loss or gradient was not finite."""


def skip(folder: RunFolder, progress: Progress, examples: Sequence[Example], loss: float, norm: float) -> None:
    """Count a step that was skipped. Raises `GateError` after the last that may be, with its documents on disk."""
    progress.skipped += 1
    say(f"step {progress.step} skipped: loss {loss}, gradient norm {norm}")
    if progress.skipped < SKIPS_BEFORE_STOP:
        return
    if folder.writes:
        write_text(folder.path / NOT_FINITE, "".join(json.dumps(_told(example)) + "\n" for example in examples))
    folder.update(not_finite={"step": progress.step, "rows": [str(example.source) for example in examples]})
    raise GateError(
        f"loss or gradient was not finite in {SKIPS_BEFORE_STOP} steps running",
        where=str(folder.path),
        given=f"loss {loss}, gradient norm {norm}; the last step's documents stand in {NOT_FINITE}",
        hint="lower engine.learning_rate, or look at those rows",
    )


def _told(example: Example) -> dict[str, object]:
    """A document as the step saw it."""
    return {
        "source": str(example.source),
        "ids": example.ids.tolist(),
        "supervised": np.flatnonzero(example.supervised).tolist(),
        "row": example.row,
        "task": example.task,
        "weight": example.weight,
        "score": example.score,
        "columns": {name: values.tolist() for name, values in example.columns.items()},
    }
