"""`scripts/gpu --output FILE [--quick]`: every section in turn, each written to the file as soon as it has ended."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import correctness, speed
from benchmarks.gpu.workbench import Bench, free

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "triton", "bitsandbytes", "liger-kernel", "trl", "numpy")


class Section(NamedTuple):
    """A part of the run: seconds for the whole run and for `--quick`, and whether a processor can pass it."""

    name: str
    run: Callable[[Bench], dict[str, Any]]
    seconds: int
    quick_seconds: int
    needs_card: bool


SECTIONS = (
    Section("ceilings", speed.ceilings, 10, 5, True),
    Section("parity", correctness.parity, 60, 25, False),
    Section("trees", correctness.trees, 20, 10, False),
    Section("syncs", correctness.syncs, 15, 10, False),
    Section("exactness", correctness.exactness, 30, 20, False),
    Section("lora", speed.lora, 95, 25, True),
    Section("remedies", speed.remedies, 30, 10, True),
    Section("peers", speed.peers, 65, 15, True),
    Section("qlora", speed.qlora, 45, 15, True),
    Section("phi-2", speed.phi2, 30, 15, True),
    Section("alignment", speed.alignment, 40, 10, True),
    Section("decoding", speed.decoding, 30, 10, True),
    Section("profile", speed.profile, 10, 10, True),
)
"""Correctness first: if the time runs out, what is right is known."""


def machine(device: torch.device) -> dict[str, Any]:
    """Versions and the card."""
    found: dict[str, Any] = {"python": platform.python_version(), "device": device.type}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        found["capability"] = list(torch.cuda.get_device_capability(device))
    return found


def run_section(section: Section, device: torch.device, quick: bool, end: float = math.inf) -> dict[str, Any]:
    """Run one section, no longer than until `end`. Without a card one that needs it is rehearsed on a tiny model."""
    started = time.monotonic()
    bench = Bench(device, quick, min(end, started + (section.quick_seconds if quick else section.seconds)))
    found: dict[str, Any] = {"name": section.name}
    try:
        results = section.run(bench)
        passed = results.pop("passed", True)
        state = "passed" if passed else "failed"
        rows = results.get("rows")
        is_empty = rows is not None and not any("not_measured" not in row for row in rows)
        # On a processor the code ran; its numbers say nothing of a card.
        if passed and (is_empty or (section.needs_card and not bench.has_card)):
            state = "not measured"
        found |= {"state": state, "results": results}
    except Exception as error:  # one section that fails must not cost the others
        found |= {
            "state": "failed",
            "error": f"{type(error).__name__}: {error}",
            "trace": traceback.format_exc()[-1500:],
        }
    free()
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    """Run all sections or those named; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="scripts/gpu", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; written anew after every section")
    parser.add_argument("--quick", action="store_true", help="three minutes at most instead of eight")
    parser.add_argument("--only", help="names of sections, separated by commas")
    arguments = parser.parse_args()
    names = [section.name for section in SECTIONS]
    wanted = arguments.only.split(",") if arguments.only else names
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(names)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    end = time.monotonic() + sum(s.quick_seconds if arguments.quick else s.seconds for s in SECTIONS)
    report: dict[str, Any] = {"machine": machine(device), "quick": arguments.quick, "sections": []}
    for section in SECTIONS:
        if section.name not in wanted:
            continue
        print(f"{section.name} ... ", end="", flush=True)
        if time.monotonic() < end:
            found = run_section(section, device, arguments.quick, end)
        else:
            found = {"name": section.name, "state": "not measured", "error": "the time was over", "seconds": 0.0}
        report["sections"].append(found)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1, default=str) + "\n")
        print(f"{found['state']} ({found['seconds']} s) {found.get('error', '')}".rstrip(), flush=True)
    return int(any(section["state"] == "failed" for section in report["sections"]))


if __name__ == "__main__":
    sys.exit(main())
