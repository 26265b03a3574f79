"""Help, configs and their errors answer at once: torch is never loaded for them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

MODULES = ("torch", "transformers", "peft", "datasets", "matplotlib", "bm25s")
HEAVY = f"import sys; print([m for m in {MODULES} if m in sys.modules])"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["schema"], ["show", "{config}"], ["train", "{config}", "a.b=1"], ["models"]]
)
def test_no_heavy_import(arguments: list[str], config: Path) -> None:
    words = [a.format(config=config) for a in arguments]
    code = f"from rung.cli import _exit_code; _exit_code({words!r}); {HEAVY}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_within_half_a_second() -> None:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "rung", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5, times


def test_importing_rung_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", f"import rung; {HEAVY}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
