"""Files that are safe to be stopped at."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from rung.errors import CheckpointError
from rung.files import Journal, lock_file, recover_interrupted_writes, unlock_and_remove, write_text


def test_one_process_at_a_time(tmp_path: Path) -> None:
    again = f"from rung.files import lock_file; from pathlib import Path; lock_file(Path({str(tmp_path / 'x')!r}))"
    with lock_file(tmp_path / "x"):
        with pytest.raises(CheckpointError, match="another process"):
            lock_file(tmp_path / "x")
        other = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, check=False)
        assert other.returncode != 0 and "another process is at work here" in other.stderr
    assert subprocess.run([sys.executable, "-c", again], check=False).returncode == 0
    unlock_and_remove(tmp_path / "x", lock_file(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_what_was_made_is_there_after_a_stop_and_a_torn_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "made.journal"
    journal = Journal(path, {"n": 3})
    journal.add("0", [1, "ä"])
    journal.add("1", None)
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"key": "2", "val')
    again = Journal(path, {"n": 3})
    assert again.results == {"0": [1, "ä"], "1": None}
    again.add("2", 0.1)
    again.close()
    with closing(Journal(path, {"n": 3})) as last:
        assert last.results["2"] == 0.1
    assert len(path.read_text().splitlines()) == 4


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "made.journal"
    Journal(path, {"n": 3}).close()
    with pytest.raises(CheckpointError, match="asked for otherwise"):
        Journal(path, {"n": 4})
    for text in ("hello\n", '{"asked": 1}\n[1]\n', "3\n"):
        path.write_text(text)
        with pytest.raises(CheckpointError):
            Journal(path, {"n": 3})
    path.write_text('{"asked": "half')
    Journal(path, {"n": 3}).remove()
    assert not path.exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a.json", json.dumps([1]))
    (tmp_path / "deep" / "b").mkdir()
    with pytest.raises(CheckpointError, match="could not write"):
        write_text(tmp_path / "deep" / "b", "x")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["a.json", "b"]


def test_what_a_kill_left_is_put_right(tmp_path: Path) -> None:
    for name in (".best.old-17", ".gone.old-17", ".step-1.writing-17"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    (tmp_path / "best").mkdir()
    (tmp_path / ".run.json.writing-17").touch()
    recover_interrupted_writes(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "gone"] and (tmp_path / "gone" / "x").exists()
