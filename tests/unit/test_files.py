"""Files that are safe to be stopped at."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from rung import files
from rung.errors import CheckpointError
from rung.files import OWNER_SUFFIX, lock_file, recover_interrupted_writes, write_text
from rung.inference.journal import Journal
from rung.training.run_folder import RunFolder


def test_one_process_at_a_time(tmp_path: Path) -> None:
    again = f"from rung.files import lock_file; from pathlib import Path; lock_file(Path({str(tmp_path / 'x')!r}))"
    with closing(lock_file(tmp_path / "x")):
        with pytest.raises(CheckpointError, match="another process"):
            lock_file(tmp_path / "x")
        other = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, check=False)
        assert other.returncode != 0 and "another process is at work here" in other.stderr
    assert subprocess.run([sys.executable, "-c", again], check=False).returncode == 0
    lock_file(tmp_path / "x").remove()
    assert not (tmp_path / "x").exists()


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses locks, as Lustre does without its `flock` option."""

    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.mark.usefixtures("without_locks")
def test_a_file_system_without_locks(tmp_path: Path) -> None:
    """It was reported as another process at work, and refused every run."""
    path, owner = tmp_path / "x", tmp_path / f"x{OWNER_SUFFIX}"
    with closing(lock_file(path)) as locked:
        locked.file.write(b"first")
        assert owner.read_text() == f"{os.getpid()} {socket.gethostname()}"
        with pytest.raises(CheckpointError, match="another process is at work") as error:
            lock_file(path)
        assert f"remove {owner}" in str(error.value)
    assert not owner.exists() and path.read_bytes() == b"first"
    with closing(Journal(tmp_path / "j", {"n": 1})) as journal:
        journal.add("0", 1)
    lock_file(path).remove()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["j"]


@pytest.mark.usefixtures("without_locks")
def test_the_owner_file_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path, owner = tmp_path / "x", tmp_path / f"x{OWNER_SUFFIX}"
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    owner.write_text(f"{dead.pid} {socket.gethostname()}")
    lock_file(path).close()
    # nobody here can say whether a process of another host is alive, nor one whose name is still being written
    for content in (f"{dead.pid} elsewhere", ""):
        owner.write_text(content)
        with pytest.raises(CheckpointError, match="another process is at work"):
            lock_file(path)
        assert owner.read_text() == content


@pytest.mark.usefixtures("without_locks")
def test_a_lock_that_was_taken_over_meanwhile_is_never_set_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner file was moved away for a moment and then back; a third process could take the lock meanwhile."""
    path, owner = tmp_path / "x", tmp_path / f"x{OWNER_SUFFIX}"
    dead_holder, new_holder = f"4194305 {socket.gethostname()}", f"{os.getpid()} {socket.gethostname()}"
    owner.write_text(dead_holder)
    is_alive, read_owner = files._is_alive, files._read_owner

    def taken_over_now(holder: str) -> bool:
        owner.write_text(new_holder)  # by another process, after this one has read the name of the dead one
        return holder != dead_holder and is_alive(holder)

    def reading(file: Path) -> str:
        assert owner.exists()
        return read_owner(file)

    monkeypatch.setattr(files, "_is_alive", taken_over_now)
    monkeypatch.setattr(files, "_read_owner", reading)
    with pytest.raises(CheckpointError, match="another process is at work"):
        lock_file(path)
    assert owner.read_text() == new_holder and sorted(p.name for p in tmp_path.iterdir()) == ["x", owner.name]


@pytest.mark.usefixtures("without_locks")
def test_a_run_folder_without_locks(tmp_path: Path) -> None:
    with closing(RunFolder.acquire(tmp_path / "run", {"seed": 1}, resume=False, overwrite=False)):
        with pytest.raises(CheckpointError, match="another process is at work"):
            RunFolder.acquire(tmp_path / "run", {"seed": 1}, resume=True, overwrite=False)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["run.json"]


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
