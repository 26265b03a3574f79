"""Help, configs and their errors answer at once: torch is never loaded for them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

MODULES = ("torch", "transformers", "peft", "datasets", "matplotlib", "bm25s", "scipy", "datasketch")


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    """Rows beside their compressed copy."""
    file = tmp_path / "d.jsonl"
    rows = [{"question": f"what is {i} and {i}?", "answer": str(2 * i)} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.with_name("d.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    return file


HEAVY = f"import sys; print([m for m in {MODULES} if m in sys.modules])"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["schema"], ["show", "{config}"], ["train", "{config}", "a.b=1"], ["models"]]
)
def test_no_heavy_import(arguments: list[str], config: Path) -> None:
    words = [a.format(config=config) for a in arguments]
    code = f"from rung.cli import _exit_code; _exit_code({words!r}); {HEAVY}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_check_without_a_model_imports_nothing_heavy(small_file: Path) -> None:
    """torch was imported for a tokenizer that nobody had named, and scipy for the comparison of a few rows."""
    commands = [["data", "check", *rest] for rest in (["--help"], [str(small_file)], [f"{small_file}.gz", "--json"])]
    code = f"from rung.cli import _exit_code; assert not any([_exit_code(c) for c in {commands!r}]); {HEAVY}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_within_half_a_second() -> None:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "rung", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5, times


def test_a_small_file_is_checked_within_a_second_and_a_half(small_file: Path) -> None:
    """It took 8 to 10 seconds. Time of the processor: other tests run beside this one."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "rung", "data", "check", str(small_file)], capture_output=True, check=True)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.5


def test_importing_rung_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", f"import rung; {HEAVY}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
