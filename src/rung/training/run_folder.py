"""The run folder: `run.json` says what the run is and how it stands, `log.jsonl` holds one object a step."""

from __future__ import annotations

import io
import json
import math
import platform
import resource
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from torch import nn

from rung.config.training import TrainingConfig
from rung.errors import CheckpointError, ConfigError, RungError
from rung.files import is_run_folder, lock_file, recover_interrupted_writes, unlock_and_remove, write_bytes, write_text

State = Literal["passed", "failed", "not_reached"]
NOT_FINITE_FILE = "not_finite.jsonl"
"""The documents of the step that ended a run because its loss was no number."""
GENERATED = (
    *("run.json", "log.jsonl", "checkpoints", "start", "adapter", "model", "rungs", "report.html"),
    *("items.parquet", "result.json", "eval.parquet", NOT_FINITE_FILE, "search", "curve"),
)
"""What a run writes into its folder, and what `--overwrite` therefore may remove."""
FORMAT_VERSION = 1
"""Of `run.json`; raised with every change that an earlier version would misread."""
LOCK = ".lock"
"""The file in it that a process holds while it works there."""


@dataclass(frozen=True, slots=True)
class Gate:
    """What a gate measured."""

    name: str
    state: State
    measured: Any
    limit: Any

    def __str__(self) -> str:
        return f"gate {self.name}: {self.state.replace('_', ' ')} ({self.measured}; limit {self.limit})"


@dataclass
class RunFolder:
    """One run's folder. `manifest` is what `run.json` holds; `write` makes it so, atomically."""

    path: Path
    manifest: dict[str, Any] = field(default_factory=dict)
    writes: bool = True
    """Of the processes of a run one writes."""
    _log: IO[str] | None = None
    _held: IO[bytes] | None = None

    @staticmethod
    def check(
        path: Path, config: Mapping[str, Any], *, resume: bool, overwrite: bool, free: Collection[str] = ()
    ) -> dict[str, Any] | None:
        """The manifest of the run to go on with, or None for a new one; touches nothing.

        `free` names settings that may have changed: nothing that is finished depends on them. Raises `CheckpointError`
        for a folder that holds another run or anything else, and for a resume with another config; `ConfigError` where
        both are asked for.
        """
        if resume and overwrite:
            raise ConfigError("a run goes on or starts anew: --resume and --overwrite exclude one another")
        existing = read_manifest(path) if is_run_folder(path) else None
        if existing is None:
            if path.exists() and (not path.is_dir() or any(p.name != LOCK for p in path.iterdir())):
                raise CheckpointError(
                    "this is a file" if path.is_file() else "this folder is not empty and holds no run",
                    where=str(path),
                    hint="name another output=...",
                )
            return None
        if overwrite:
            return None
        if not {"config", "gates"} <= existing.keys():
            raise CheckpointError("run.json is not the manifest of a run", where=str(path), hint="use --overwrite")
        if not resume:
            raise CheckpointError(
                f"this folder holds a run already (status {existing.get('status')})",
                where=str(path),
                hint="go on with --resume, start anew with --overwrite, or name another output=...",
            )
        differing = _changed_settings({**existing["config"], "output": None}, {**config, "output": None})
        if changed := sorted(set(differing) - set(free)):
            raise CheckpointError(
                "the run in this folder has another config", where=str(path), given="differs in " + ", ".join(changed)
            )
        return existing

    @staticmethod
    def acquire(
        path: Path,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        free: Collection[str] = (),
    ) -> RunFolder:
        """Take a folder for a run, after `check`, until `close`.

        `overwrite` removes what a run wrote there, and nothing else. Raises `CheckpointError` where another process is
        at work in it.
        """
        RunFolder.check(path, config, resume=resume, overwrite=overwrite, free=free)
        held = lock_file(path / LOCK)
        try:
            # once more: until now another process may have been at work here
            existing = RunFolder.check(path, config, resume=resume, overwrite=overwrite, free=free)
        except RungError:
            unlock_and_remove(path / LOCK, held)
            raise
        for place in (path, path / "checkpoints"):
            recover_interrupted_writes(place)
        if existing is not None:
            return RunFolder(path, existing, _held=held)
        if overwrite:
            for name in GENERATED:
                target = path / name
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        started = {
            **{"format_version": FORMAT_VERSION, "status": "started", "config": dict(config)},
            **{"gates": [], "versions": versions()},
        }
        folder = RunFolder(path, started, _held=held)
        folder.write()
        return folder

    def update(self, **values: Any) -> None:
        """Set values of the manifest and write it."""
        self.manifest.update(values)
        self.write()

    def gate(self, gate: Gate) -> None:
        """Keep a gate's result; a later result of the same name replaces it."""
        kept = [g for g in self.manifest["gates"] if g["name"] != gate.name]
        entry = {"name": gate.name, "state": gate.state, "measured": gate.measured, "limit": gate.limit}
        self.update(gates=[*kept, entry])

    def write(self) -> None:
        """Make `run.json` what the manifest says."""
        if self.writes:
            write_json(self.path / "run.json", self.manifest)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one object to `log.jsonl`."""
        if not self.writes:
            return
        if self._log is None:
            self._log = (self.path / "log.jsonl").open("a", encoding="utf-8")
        # JSON has no NaN
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self._log.write(json.dumps(finite) + "\n")
        self._log.flush()

    def trim_log(self, step: int) -> None:
        """Forget logged steps after `step`: a resumed run takes them again."""
        path = self.path / "log.jsonl"
        if self.writes and path.exists():
            kept = [entry for entry in read_log(self.path) if entry["step"] <= step]
            write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def close(self) -> None:
        """Close the log, and let go of the folder."""
        if self._log is not None:
            self._log.close()
        if self._held is not None:
            unlock_and_remove(self.path / LOCK, self._held)
        self._log = self._held = None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run folder. Raises `CheckpointError` when there is none or it cannot be read."""
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
    """Whether a folder holds a climb, whose runs stand below it."""
    return is_run_folder(path) and "climb" in read_manifest(path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The logged steps of a run; empty when nothing was logged. A last line that a kill tore is passed over."""
    log = path / "log.jsonl"
    entries: list[dict[str, Any]] = []
    for line in log.read_text().split("\n") if log.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one go."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def versions() -> dict[str, str]:
    """What computed the run."""
    names = ("rung", "torch", "transformers", "peft", "tokenizers", "safetensors")
    return {"python": platform.python_version(), "machine": platform.machine(), **{n: version(n) for n in names}}


def reset_peak_memory() -> None:
    """Start measuring the peak anew where the kernel allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Largest resident memory of this process since the last reset, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _changed_settings(old: Any, new: Any, at: str = "") -> list[str]:
    """Dotted names of the settings in which two configs differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = set(old) | set(new)
        return [
            name
            for key in keys
            for name in _changed_settings(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
        ]
    same = json.dumps(old, sort_keys=True, default=str) == json.dumps(new, sort_keys=True, default=str)
    return [] if same else [at]


@dataclass
class Progress:
    """What changes as a run goes on, besides weights and optimizer: all of it is JSON."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    seconds: float = 0.0
    tokens: int = 0
    loss: float = math.nan
    skipped: int = 0
    best: float | None = None
    """Lowest validation loss so far, in nats per token."""
    best_step: int = 0
    misses: int = 0
    """Measurements in a row that did not improve the best."""
    validation: float | None = None
    objective: dict[str, float] = field(default_factory=dict)
    """What the objective learned besides parameters."""
    method: dict[str, Any] = field(default_factory=dict)
    """What the method keeps besides parameters."""


StopCheck = Callable[[float], str | None]
"""Hears of a validation loss; says why the run should end there, if it should."""


def never_stop(loss: float) -> str | None:
    """Watches nothing."""
    return None


def total_steps(config: TrainingConfig, rows: int, repeats: int = 1) -> int:
    """Optimizer steps of a whole run over this many rows, each window of them learned from so many times."""
    per_epoch = -(-rows // config.examples_per_step)
    total = math.ceil(config.epochs * per_epoch - 1e-9) * repeats
    return min(total, config.max_steps or total)


def rows_of_step(step: int, rows: int, per_step: int, seed: int) -> list[int]:
    """Numbers of the rows of a step counted from 0: a pure function of seed and step."""
    epoch, place = divmod(step, -(-rows // per_step))
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return [int(row) for row in order[place * per_step : (place + 1) * per_step]]


def progress_summary(progress: Progress, moving: Mapping[str, nn.Parameter]) -> Mapping[str, Any]:
    """The run's own numbers for `run.json`; times are without loading, evaluation and saving."""
    return {
        "steps": progress.step,
        "train_seconds": round(progress.seconds, 3),
        "tokens_per_second": round(progress.tokens / progress.seconds, 1) if progress.seconds else None,
        "tokens": progress.tokens,
        "peak_memory_bytes": peak_memory_bytes(),
        "trainable_parameters": sum(p.numel() for p in moving.values()),
        "train_loss": progress.loss,
        "validation_loss": progress.validation,
        "best_step": progress.best_step,
    }


SCORE = "score."
"""Before the name of a metric."""
_KEY = b"rung"


def write_items(path: Path, items: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Replace the file in one go; `scores` of an item, by metric, become columns. Raises `CheckpointError`."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {
            **{name: value for name, value in item.items() if name != "scores"},
            **{SCORE + metric: score for metric, score in item["scores"].items()},
        }
        for item in items
    ]
    table = pa.Table.from_pylist(rows).replace_schema_metadata({_KEY: json.dumps(about)})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    write_bytes(path, buffer.getvalue())


def read_items(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The items and what belongs to all of them. Raises `CheckpointError` where `write_items` wrote no such file."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        about: dict[str, Any] = json.loads((table.schema.metadata or {})[_KEY])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise CheckpointError(f"these are no scored items: {error}", where=str(path)) from error
    items = []
    for row in table.to_pylist():
        scores = {name.removeprefix(SCORE): row.pop(name) for name in list(row) if name.startswith(SCORE)}
        items.append({**row, "scores": scores})
    return items, about
