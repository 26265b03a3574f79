"""The output folder of `rung synth`: rows, what was left out, and a manifest that says that all is there.

`journal-*.jsonl` has every reply from the moment it arrived, `rows.jsonl` the rows, `rejected.jsonl` what was left out
and why, `synth.json` the config, yield, cost and hashes. The same command continues after a stop, and a finished folder
is not made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rung.errors import CheckpointError
from rung.files import SYNTH_FILE
from rung.report.synth import REPORT_FILE
from rung.synth.writer import JOURNAL_PATTERN
from rung.training.run_folder import read_json

ROWS_FILE, REJECTED_FILE = "rows.jsonl", "rejected.jsonl"
_OTHER = {"config": "another config", "sources": "other seeds or documents"}


def digest(file: Path) -> str | None:
    """SHA-256 of a file; None without one."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def finished_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder. Raises `CheckpointError` for a folder of something else."""
    if (folder / SYNTH_FILE).exists():
        try:
            return read_json(folder / SYNTH_FILE)
        except ValueError as error:
            hint = "remove it: the replies stay in the journal"
            raise CheckpointError(f"this is no manifest: {error}", where=str(folder / SYNTH_FILE), hint=hint) from None
    if folder.is_file():
        raise CheckpointError("this is a file", where=str(folder), hint="name another output=...")
    # with a journal: a command that was stopped, whatever it had written
    if folder.is_dir() and any(folder.iterdir()) and not any(folder.glob(JOURNAL_PATTERN)):
        raise CheckpointError("this folder holds something else", where=str(folder), hint="name another output=...")
    return None


def forget_rows(folder: Path) -> None:
    """Remove rows of another config before new ones are made: what ends without rows leaves no others there."""
    for name in (SYNTH_FILE, ROWS_FILE, REJECTED_FILE, REPORT_FILE):
        (folder / name).unlink(missing_ok=True)


def kept_result(
    folder: Path, manifest: Mapping[str, Any] | None, about: Mapping[str, Any], *, overwrite: bool
) -> dict[str, Any] | None:
    """The result in the manifest of a folder that holds the rows of `about`; None where they are to be written.

    Raises `CheckpointError` for rows of something else unless `overwrite` is set.
    """
    if manifest is None:
        return None
    about = {**about, "sha256": digest(folder / ROWS_FILE)}
    changed = [name for name, value in about.items() if manifest.get(name) != value]
    if not changed:
        return dict(manifest["result"])
    # rows that were removed are written again
    if overwrite or (changed == ["sha256"] and about["sha256"] is None):
        return None
    what = _OTHER.get(changed[0], "another hand")
    hint = "name another output, or --overwrite: replies that are still asked for are kept in its journal"
    raise CheckpointError(f"this folder holds rows of {what}", where=str(folder), hint=hint)
