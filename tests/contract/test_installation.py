"""Rung installs beside the serving and training tools of today, and under every Python it claims.

pip resolves without installing anything, so the tests need the package registry and minutes: `make soak`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FLOORS = {"torch": (2, 11), "transformers": (5, 17)}
"""The oldest versions that Rung runs with; tools that pin newer ones pin them below Rung's upper limits."""


def resolve(report: Path, *arguments: str) -> dict[str, str]:
    """The version of every package that pip would install, by name; the test is skipped without a registry."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--report", str(report), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    if result.returncode and ("Failed to establish" in result.stderr or "from versions: none" in result.stderr):
        pytest.skip("the package registry cannot be reached")
    assert result.returncode == 0, result.stderr[-2000:]
    installed = json.loads(report.read_text())["install"]
    return {item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"] for item in installed}


def assert_within_floors(versions: dict[str, str]) -> None:
    for name, floor in FLOORS.items():
        assert tuple(int(part) for part in versions[name].split(".")[:2]) >= floor


@pytest.mark.soak
@pytest.mark.parametrize("tool", ["vllm", "sglang", "unsloth"])
def test_it_installs_beside(tool: str, tmp_path: Path) -> None:
    versions = resolve(tmp_path / "report.json", ".[export,math,quantized,remote]", tool)
    assert {"rung", tool, "bitsandbytes", "math-verify", "openai"} <= versions.keys()
    assert_within_floors(versions)


@pytest.mark.soak
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_its_dependencies_have_wheels_for_every_python(python: str, tmp_path: Path) -> None:
    # rouge-score is published as source only; it is pure Python, and pip cannot resolve a source for another Python
    requirements = [r for r in PROJECT["dependencies"] if not r.startswith("rouge-score")]
    options = ["--only-binary=:all:", "--python-version", python, "--target", str(tmp_path / "target")]
    versions = resolve(tmp_path / "report.json", *options, *requirements)
    assert len(versions) > len(requirements)
    assert_within_floors(versions)


def test_the_oldest_versions_are_the_floors_that_are_declared() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if "==" in line)
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *extras["remote"], *extras["math"]]:
        name, floor = requirement.split(",")[0].split(">=")
        name = name.split("[")[0]
        assert Version(pins[name]) == Version(floor)
    for name, floor in FLOORS.items():
        assert pins[name].startswith(".".join(map(str, floor)))
    assert PROJECT["requires-python"] == ">=3.11"
