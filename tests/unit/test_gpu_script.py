"""`scripts/gpu`: its processor half runs, its failures are told, and its page prints no number of a processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import __main__ as script
from benchmarks.gpu import correctness, speed
from benchmarks.gpu.report import page
from benchmarks.gpu.workbench import SHAPES, Bench, measure, shape_of

from rung.models import tree_attention
from rung.types import Segment

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NAMES = [section.name for section in script.SECTIONS]


def section(name: str) -> script.Section:
    return next(section for section in script.SECTIONS if section.name == name)


@pytest.mark.parametrize("name", ["parity", "trees", "syncs", "exactness"])
def test_what_a_processor_can_show(name: str) -> None:
    found = script.run_section(section(name), CPU, quick=True)
    assert found["state"] == "passed", found


@pytest.mark.parametrize("name", ["lora", "alignment", "decoding"])
def test_what_needs_a_card_is_rehearsed_and_says_so(name: str) -> None:
    found = script.run_section(section(name), CPU, quick=True)
    assert found["state"] == "not measured", found
    assert all(row["tokens_per_second"] > 0 for row in found["results"]["rows"])


def test_a_section_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: Bench) -> dict[str, Any]:
        raise RuntimeError("out of everything")

    monkeypatch.setattr(script, "SECTIONS", (section("ceilings")._replace(run=broken), section("trees")))
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(tmp_path / "new" / "gpu.json"), "--quick"])
    assert script.main() == 1
    report = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert [s["state"] for s in report["sections"]] == ["failed", "passed"]
    assert report["sections"][0]["error"] == "RuntimeError: out of everything" and report["machine"]["torch"]
    assert "ceilings ... failed" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", "x", "--only", "nothing"])
    with pytest.raises(SystemExit):
        script.main()


def test_attention_that_forgets_an_ancestor_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = tree_attention._iterate_segments

    def forgetful(segments: tuple[Segment, ...], *rest: Any) -> Any:
        for rows, path, mask in genuine(segments, *rest):
            kept = path[1:]
            lost = sum(s.end - s.start for s in path) - sum(s.end - s.start for s in kept)
            yield rows, kept, mask if mask is None else mask[:, lost:]

    assert correctness.trees(Bench(CPU))["passed"]
    monkeypatch.setattr(tree_attention, "_iterate_segments", forgetful)
    assert not correctness.trees(Bench(CPU))["passed"]


def test_limits_are_those_of_the_products() -> None:
    """The page of the goals says 145.9k, 24.8k and 21.5k tokens a second at 790 TFLOP/s."""
    for shape, length, expected in (("1B", 2048, 145.9e3), ("8B", 2048, 24.8e3), ("8B", 8192, 21.5e3)):
        limit = 790e12 / speed.flops_per_token(shape_of(shape), length)
        assert limit == pytest.approx(expected, rel=0.02), shape
    assert shape_of("8B").parameters == 8_030_261_248 and shape_of("phi-2").parameters == 2_779_683_840
    assert set(SHAPES) == {"1B", "8B", "phi-2", "tiny"}


def test_a_section_stops_when_its_time_is_over() -> None:
    bench = Bench(CPU)
    bench.deadline = 0.0
    calls: list[int] = []
    found = measure(bench, lambda: calls.append(1), 100)
    assert found["steps"] == 1 and len(calls) == 2  # one that warms it up


def test_the_times_add_up() -> None:
    assert sum(s.quick_seconds for s in script.SECTIONS) <= 180 and sum(s.seconds for s in script.SECTIONS) <= 480


def test_the_page_prints_no_number_of_a_processor(tmp_path: Path) -> None:
    sections = [script.run_section(section(name), CPU, quick=True) for name in ("ceilings", "trees", "decoding")]
    report = {"machine": script.machine(CPU), "quick": True, "sections": sections}
    text = page(report)
    assert "No card was there" in text and text.count("**not measured**") > 8 and "tokens/s |" not in text
    assert "| trees | " in text and "passed |" in text
    card = {**report["machine"], "device": "cuda", "card": "H200", "memory": 2**37, "cuda": "13.0"}
    measured = page({**report, "machine": card})
    assert "H200, 128 GiB" in measured and "| tiny | 1 | " in measured and "TFLOP/s" in measured
    failed = {"name": "lora", "state": "failed", "error": "OutOfMemoryError: no"}
    assert "Failed: OutOfMemoryError: no" in page({**report, "machine": card, "sections": [failed]})


@pytest.mark.soak
def test_the_script_as_it_is_started(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "scripts" / "gpu"), "--output", str(file), "--quick"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    states = {s["name"]: s["state"] for s in json.loads(file.read_text())["sections"]}
    assert list(states) == NAMES and set(states.values()) == {"passed", "not measured"}
