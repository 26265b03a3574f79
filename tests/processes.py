"""The command line as a real process, and in this one where only messages and exit codes matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rung.cli import _exit_code


def start(*arguments: object, preexec: Callable[[], None] | None = None, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "rung", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
        preexec_fn=preexec,
    )


def process(*arguments: object, preexec: Callable[[], None] | None = None, **env: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with start(*arguments, preexec=preexec, **env) as running:
        out, err = running.communicate(timeout=300)
    return running.returncode, out, err


def inside(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The same without a new process."""
    capsys.readouterr()
    code = _exit_code([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def goes_on_as_if_never_stopped(
    capsys: pytest.CaptureFixture[str], config: Path, settings: Sequence[str], folder: Path, at: int
) -> tuple[Path, Path]:
    """Two runs, one of them taken up again at its last checkpoint: the same adapter bit for bit. Their folders."""
    whole, parts = folder / "whole", folder / "parts"
    for run in (whole, parts):
        assert inside(capsys, "train", config, *settings, f"output={run}")[0] == 0
    manifest = json.loads((parts / "run.json").read_text())
    (parts / "run.json").write_text(json.dumps({**manifest, "status": "running"}))
    code, _, err = inside(capsys, "train", config, *settings, f"output={parts}", "--resume")
    assert code == 0 and f"resumed from step-{at:08d}" in err, err
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    return whole, parts
