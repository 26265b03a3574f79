"""The manifest of a run folder: what is in it from the first moment, and what is refused."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from rung.errors import CheckpointError
from rung.training.run_folder import FORMAT_VERSION, RunFolder, read_manifest


def test_a_manifest_names_its_format_and_holds_the_config(tmp_path: Path) -> None:
    with closing(RunFolder.acquire(tmp_path / "run", {"seed": 3}, resume=False, overwrite=False)):
        manifest = read_manifest(tmp_path / "run")
    assert manifest["format_version"] == FORMAT_VERSION and manifest["config"] == {"seed": 3}
    assert manifest["status"] == "started" and manifest["gates"] == []


def test_a_manifest_of_a_later_format_is_refused(tmp_path: Path) -> None:
    later = {"status": "finished", "format_version": FORMAT_VERSION + 1}
    (tmp_path / "run.json").write_text(json.dumps(later))
    with pytest.raises(CheckpointError, match="later version"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", "{}", ""])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        read_manifest(tmp_path)
