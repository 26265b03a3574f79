"""The run folder: run.json (config, state, results), log.jsonl (one object per step) and scored items as parquet.

run.json is rewritten atomically at every change, so that a kill never leaves half a manifest; log.jsonl is appended to,
because rewriting it would cost more with every step. A lock file keeps a second process out. `runs`, `commands` and
`report` read and write runs through this module; `Progress` and the functions of steps and rows are here too, because a
resume depends on them.
"""

from __future__ import annotations

import io
import json
import math
import platform
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import nn

from rung.config.training import TrainingConfig
from rung.errors import CheckpointError, ConfigError, RungError
from rung.files import (
    OWNER_SUFFIX,
    TAKEOVER_SUFFIX,
    LockedFile,
    is_run_folder,
    lock_file,
    recover_interrupted_writes,
    write_bytes,
    write_text,
)
from rung.training.memory_use import peak_host_memory_bytes, peak_memory_bytes

State = Literal["passed", "failed", "not_reached"]
NOT_FINITE_FILE = "not_finite.jsonl"
"""Documents of the step that ended a run because its loss or gradient was not finite."""
OUTPUT_NAMES = (
    *("run.json", "log.jsonl", "checkpoints", "start", "adapter", "model", "rungs", "report.html", "sampler"),
    *("items.parquet", "result.json", "eval.parquet", NOT_FINITE_FILE, "search", "curve"),
)
"""Names that a run or climb writes into its folder. `--overwrite` removes these and nothing else."""
FORMAT_VERSION = 1
"""Version of `run.json`, raised with every change that an earlier version would misread."""
LOCK_FILE = ".lock"
"""File that a process locks while it works in the folder."""
LOCK_FILES = (LOCK_FILE, LOCK_FILE + OWNER_SUFFIX, LOCK_FILE + OWNER_SUFFIX + TAKEOVER_SUFFIX)


@dataclass(frozen=True, slots=True)
class Gate:
    """The result of a gate."""

    name: str
    state: State
    measured: Any
    limit: Any

    @staticmethod
    def at_most(name: str, measured: float, limit: float) -> Gate:
        """Passed where `measured` is at most `limit`; not for NaN."""
        return Gate(name, "passed" if measured <= limit else "failed", measured, limit)

    def __str__(self) -> str:
        return f"gate {self.name}: {self.state.replace('_', ' ')} ({self.measured}; limit {self.limit})"


@dataclass
class RunFolder:
    """The folder of one run. `manifest` is the content of run.json; `write` saves it atomically."""

    path: Path
    manifest: dict[str, Any] = field(default_factory=dict)
    writes: bool = True
    """False on all ranks but rank 0: one process writes."""
    _log: IO[str] | None = None
    _lock: LockedFile | None = None

    @staticmethod
    def check(
        path: Path, config: Mapping[str, Any], *, resume: bool, overwrite: bool, free: Collection[str] = ()
    ) -> dict[str, Any] | None:
        """The manifest of the run to resume, or None for a new run. Changes nothing on disk.

        `free` names settings that may differ from the existing run, because no finished part depends on them. Raises
        `CheckpointError` for a folder with other content, for an existing run without `resume` or `overwrite`, and for
        a resume with another config; `ConfigError` where `resume` and `overwrite` are both set.
        """
        if resume and overwrite:
            raise ConfigError("a run goes on or starts anew: --resume and --overwrite exclude one another")
        existing = read_manifest(path) if is_run_folder(path) else None
        if existing is None:
            # `acquire` checks a second time while its own lock file is in the folder
            if path.exists() and (not path.is_dir() or any(p.name not in LOCK_FILES for p in path.iterdir())):
                summary = "this is a file" if path.is_file() else "this folder is not empty and holds no run"
                raise CheckpointError(summary, where=str(path), hint="name another output=...")
            return None
        if overwrite:
            return None
        if not {"config", "gates"} <= existing.keys():
            raise CheckpointError("run.json is not the manifest of a run", where=str(path), hint="use --overwrite")
        if not resume:
            summary = f"this folder holds a run already (status {existing.get('status')})"
            hint = "go on with --resume, start anew with --overwrite, or name another output=..."
            raise CheckpointError(summary, where=str(path), hint=hint)
        # the same folder may be named in another way, so `output` is not compared
        differing_settings = _changed_settings({**existing["config"], "output": None}, {**config, "output": None})
        if forbidden_changes := sorted(set(differing_settings) - set(free)):
            given = "differs in " + ", ".join(forbidden_changes)
            raise CheckpointError("the run in this folder has another config", where=str(path), given=given)
        return existing

    @staticmethod
    def acquire(
        path: Path, config: Mapping[str, Any], *, resume: bool, overwrite: bool, free: Collection[str] = ()
    ) -> RunFolder:
        """Lock a folder for a run after `check`; `close` releases it.

        `overwrite` removes the files that a run writes, and nothing else. Raises `CheckpointError` where another
        process works in the folder.
        """
        RunFolder.check(path, config, resume=resume, overwrite=overwrite, free=free)
        lock = lock_file(path / LOCK_FILE)
        try:
            # again under the lock: another process may have written here since the first check
            existing = RunFolder.check(path, config, resume=resume, overwrite=overwrite, free=free)
        except RungError:
            lock.remove()
            raise
        # only under the lock: leftovers of a live process must not be removed
        for place in (path, path / "checkpoints"):
            recover_interrupted_writes(place)
        if existing is not None:
            return RunFolder(path, existing, _lock=lock)
        if overwrite:
            for name in OUTPUT_NAMES:
                target = path / name
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        manifest = {"format_version": FORMAT_VERSION, "status": "started", "config": dict(config), "gates": []}
        folder = RunFolder(path, {**manifest, "versions": versions()}, _lock=lock)
        folder.write()
        return folder

    def update(self, **values: Any) -> None:
        """Set values of the manifest and save it."""
        self.manifest.update(values)
        self.write()

    def record_failure(self, error: Exception) -> None:
        """Record what ended the run; also a fault of Rung or of a library, or run.json would say that it still runs."""
        message = str(error) if isinstance(error, RungError) else f"{type(error).__name__}: {error}"
        self.update(status="failed", error=message)

    def gate(self, gate: Gate) -> None:
        """Record the result of a gate; it replaces an earlier result of the same name."""
        other_gates = [other for other in self.manifest["gates"] if other["name"] != gate.name]
        self.update(gates=[*other_gates, asdict(gate)])

    def write(self) -> None:
        """Save the manifest as run.json."""
        if self.writes:
            write_json(self.path / "run.json", self.manifest)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one object to log.jsonl. Values that are not finite become null."""
        if not self.writes:
            return
        if self._log is None:
            self._log = (self.path / "log.jsonl").open("a", encoding="utf-8")
        # JSON has no NaN; Python would write one that other readers refuse
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self._log.write(json.dumps(finite) + "\n")
        # a kill loses at most the line being written, which `read_log` skips
        self._log.flush()

    def trim_log(self, step: int) -> None:
        """Remove log entries after `step`: a resumed run takes those steps again."""
        path = self.path / "log.jsonl"
        if self._log is not None:  # the file is replaced below
            self._log.close()
            self._log = None
        if self.writes and path.exists():
            kept_entries = [entry for entry in read_log(self.path) if entry["step"] <= step]
            write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept_entries))

    def close(self) -> None:
        """Close the log and release the lock."""
        if self._log is not None:
            self._log.close()
        if self._lock is not None:
            self._lock.remove()
        self._log = self._lock = None


def finished_artifact(run: Path, manifest: Mapping[str, Any]) -> Path:
    """The folder that a finished run published: its model, or its adapter. Raises `CheckpointError` for other runs."""
    folder = next((run / name for name in ("model", "adapter") if (run / name).is_dir()), None)
    if manifest.get("status") != "finished" or folder is None:
        summary = f"this run is not finished (status {manifest.get('status')})"
        raise CheckpointError(summary, where=str(run), hint="go on with: rung train --resume")
    return folder


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run folder. Raises `CheckpointError` where it is missing or cannot be read."""
    try:
        manifest: dict[str, Any] = json.loads((path / "run.json").read_text())
    except FileNotFoundError:
        raise CheckpointError("this is not a run folder: it has no run.json", where=str(path)) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"run.json cannot be read: {error}", where=str(path)) from error
    if not isinstance(manifest, dict) or "status" not in manifest:
        raise CheckpointError("run.json is not the manifest of a run", where=str(path))
    if (written := manifest.get("format_version")) is not None and written > FORMAT_VERSION:
        what = "this run folder was written by a later version of Rung"
        raise CheckpointError(what, where=str(path), given=f"format_version {written}", allowed=f"{FORMAT_VERSION}")
    return manifest


def is_climb(path: Path) -> bool:
    """Whether a folder holds a climb, with the runs of its rungs in subfolders."""
    return is_run_folder(path) and "climb" in read_manifest(path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The log entries of a run, empty without a log. A line cut off by a kill is skipped."""
    log = path / "log.jsonl"
    entries: list[dict[str, Any]] = []
    for line in log.read_text().split("\n") if log.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that determine results, and the machine type."""
    names = ("rung", "torch", "transformers", "peft", "tokenizers", "safetensors")
    libraries = {name: version(name) for name in names}
    return {"python": platform.python_version(), "machine": platform.machine(), **libraries}


def _changed_settings(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted names of the settings that differ between two configs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        paths = {key: f"{path}.{key}".lstrip(".") for key in old.keys() | new.keys()}
        return [name for key, place in paths.items() for name in _changed_settings(old.get(key), new.get(key), place)]
    # compared as JSON, the form in which run.json holds them
    is_equal = json.dumps(old, sort_keys=True, default=str) == json.dumps(new, sort_keys=True, default=str)
    return [] if is_equal else [path]


@dataclass
class Progress:
    """State of a run besides weights and optimizer. All fields are JSON and are stored in every checkpoint."""

    step: int = 0
    """Optimizer steps taken, including skipped ones."""
    seconds: float = 0.0
    tokens: int = 0
    loss: float = math.nan
    skipped: int = 0
    steps_with_signal: int = 0
    """Steps whose documents had something to learn from: for rewards, groups of answers that differ in them."""
    best: float | None = None
    """Lowest validation loss so far, in nats per token."""
    best_step: int = 0
    misses: int = 0
    """Consecutive measurements without an improvement of the best."""
    validation: float | None = None
    validated_step: int = 0
    """Step of the last measurement of the validation loss."""
    objective: dict[str, float] = field(default_factory=dict)
    """State of the objective besides parameters, for example an adaptive beta."""
    method: dict[str, Any] = field(default_factory=dict)
    """State of the method besides parameters, for example the winners of a lottery."""


StopCheck = Callable[[float], str | None]
"""Called with a validation loss in nats; returns the reason to end the run, or None."""


def never_stop(loss: float) -> str | None:
    """The `StopCheck` that never ends a run."""
    return None


def total_steps(config: TrainingConfig, rows: int, repeats: int = 1) -> int:
    """Optimizer steps of a run over this many rows, with `repeats` steps per window of rows."""
    per_epoch = -(-rows // config.examples_per_step)
    # -1e-9: 1.1 epochs of 10 steps are 11.000000000000002 in floats, which must not add a step
    total = math.ceil(config.epochs * per_epoch - 1e-9) * repeats
    return min(total, config.max_steps or total)


def row_indices_of_step(step: int, rows: int, per_step: int, seed: int) -> list[int]:
    """Row numbers of a step (counted from 0): a pure function of seed and step, so that a resume needs no state."""
    epoch, place = divmod(step, -(-rows // per_step))
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return [int(row) for row in order[place * per_step : (place + 1) * per_step]]


def progress_summary(
    progress: Progress, trainable: Mapping[str, nn.Parameter], device: torch.device
) -> Mapping[str, Any]:
    """Summary for run.json. Times exclude loading, evaluation and saving."""
    host = {} if device.type == "cpu" else {"peak_host_memory_bytes": peak_host_memory_bytes()}
    return {
        "steps": progress.step,
        "train_seconds": round(progress.seconds, 3),
        "tokens_per_second": round(progress.tokens / progress.seconds, 1) if progress.seconds else None,
        "tokens": progress.tokens,
        "peak_memory_bytes": peak_memory_bytes(device),
        **host,
        "trainable_parameters": sum(p.numel() for p in trainable.values()),
        "train_loss": progress.loss,
        "validation_loss": progress.validation,
        "best_step": progress.best_step,
    }


SCORE_PREFIX = "score."
"""Prefix of the columns that hold scores, followed by the name of the metric."""
_METADATA_KEY = b"rung"  # of the parquet schema, where every library has a key of its own


def write_items(path: Path, items: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> None:
    """Write scored items as parquet, atomically; `scores` (by metric) become columns. Raises `CheckpointError`."""
    # imported here: commands that score nothing need not load pyarrow
    import pyarrow as pa
    from pyarrow import parquet

    rows = []
    for item in items:
        scores = {SCORE_PREFIX + metric: score for metric, score in item["scores"].items()}
        rows.append({**{name: value for name, value in item.items() if name != "scores"}, **scores})
    table = pa.Table.from_pylist(rows).replace_schema_metadata({_METADATA_KEY: json.dumps(metadata)})
    # into memory first: `write_bytes` replaces the file atomically
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    write_bytes(path, buffer.getvalue())


def read_items(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The items and their common metadata. Raises `CheckpointError` for a file that `write_items` did not write."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        metadata: dict[str, Any] = json.loads((table.schema.metadata or {})[_METADATA_KEY])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise CheckpointError(f"these are no scored items: {error}", where=str(path)) from error
    items = []
    for row in table.to_pylist():
        scores = {name.removeprefix(SCORE_PREFIX): row.pop(name) for name in list(row) if name.startswith(SCORE_PREFIX)}
        items.append({**row, "scores": scores})
    return items, metadata
