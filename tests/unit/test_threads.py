"""Threads of torch: their number, and that they sleep only where other processes need the processors."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch

from rung.models import threads
from rung.models.threads import ContentionWatch, contention_notice, seconds_waited, set_thread_count

VARIABLES = (*threads.THREAD_VARIABLES, *threads.WAIT_VARIABLES)


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Four threads of torch on two processors, and no setting of the user's."""
    before = torch.get_num_threads()
    for name in (*VARIABLES, "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "cpu_count", lambda: 2)
    torch.set_num_threads(4)
    yield monkeypatch
    torch.set_num_threads(before)


def test_no_more_threads_than_processors(processors: pytest.MonkeyPatch) -> None:
    """A container with a quota of two processors on a larger machine."""
    set_thread_count()
    assert torch.get_num_threads() == 2


def test_fewer_threads_than_processors_stay(processors: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    set_thread_count()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("name", threads.THREAD_VARIABLES)
def test_the_users_number_of_threads_stays(processors: pytest.MonkeyPatch, name: str) -> None:
    processors.setenv(name, "4")
    set_thread_count()
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(("set_by_user", "expected"), [(False, 6), (True, 4)])
def test_processes_of_torchrun_divide_the_processors(
    processors: pytest.MonkeyPatch, set_by_user: bool, expected: int
) -> None:
    """torchrun gives each process one thread where OMP_NUM_THREADS is not set; its own environment tells."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"OMP_NUM_THREADS": "4"} if set_by_user else {}
    code, pipes = "print(flush=True); input()", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    launcher = subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)  # type: ignore[call-overload]
    launcher.stdout.readline()  # before it has started, its environment is this one's
    processors.setattr(os, "getppid", lambda: launcher.pid)
    processors.setattr(threads, "cpu_count", lambda: 12)
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("LOCAL_WORLD_SIZE", "2"), ("OMP_NUM_THREADS", "1")):
        processors.setenv(name, value)
    set_thread_count()
    launcher.communicate(b"\n")
    assert torch.get_num_threads() == expected


def test_a_later_call_leaves_the_number_of_threads_alone(processors: pytest.MonkeyPatch) -> None:
    processors.setattr(threads, "_libgomp", lambda: None)
    processors.setattr(threads, "_count_set", False)
    threads.adapt_threads()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(3)
    threads.adapt_threads()
    assert torch.get_num_threads() == 3


IDLE_TEAM = """
    import ctypes, os, time, torch
    from rung.models.threads import IdleTeam, _libgomp

    torch.set_num_threads(libgomp.omp_get_num_procs()) if (libgomp := _libgomp()) else None
    a, b = torch.randn(300, 400), torch.randn(400, 500)

    def spun():
        "Seconds of the processor that 50 short operations cost, each with a pause in which threads wait."
        before = time.process_time()
        for _ in range(50):
            torch.empty(1 << 17).zero_()
            time.sleep(0.005)
        return time.process_time() - before

    spun(), a @ b
    spinning, product = spun(), a @ b
    team = IdleTeam(libgomp)
    sleeping, same = spun(), torch.equal(a @ b, product)
    team.release()
    print(spinning, sleeping, spun(), same)

    class LargerMachine:
        omp_set_num_threads = libgomp.omp_set_num_threads

        def omp_get_num_procs(self):
            return 9 + torch.get_num_threads()

    before = len(os.listdir("/proc/self/task"))
    team = IdleTeam(LargerMachine())
    print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(os.cpu_count() == 1, reason="one processor: nothing waits for another thread")
@pytest.mark.skipif(sys.platform != "linux", reason="libgomp")
def test_threads_sleep_beside_an_idle_team_spin_without_it_and_compute_the_same_bits() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", textwrap.dedent(IDLE_TEAM)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    spinning, sleeping, again, same, threads_of_team = done.stdout.split()
    assert float(sleeping) < float(spinning) / 4 and float(sleeping) < float(again) / 4, done.stdout
    assert same == "True"
    # with fewer threads than processors: one more than fills them
    assert int(threads_of_team) == 9 + 2


class Team:
    """Stands for `IdleTeam`."""

    running = 0

    def __init__(self, libgomp: object) -> None:
        Team.running += 1

    def release(self) -> None:
        Team.running -= 1


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> ContentionWatch:
    monkeypatch.setattr(threads, "IdleTeam", Team)
    monkeypatch.setattr(Team, "running", 0)
    return ContentionWatch(None)  # type: ignore[arg-type]


def slept(watch: ContentionWatch, *measurements: float) -> list[int]:
    """Whether threads sleep after each measurement."""
    states = []
    for waiting in measurements:
        watch.update(waiting)
        states.append(Team.running)
    return states


def test_threads_sleep_beside_a_busy_process_and_spin_when_it_has_ended(watch: ContentionWatch) -> None:
    """Measured in training: 0.01 alone, 0.6 beside a busy process, then 0.5 because they sleep."""
    assert slept(watch, 0.01, 0.02, 0.60, 0.52, 0.47, 0.50) == [0, 0, 1, 1, 1, 1]
    assert slept(watch, 0.40, 0.20) == [1, 0]


def test_beside_a_process_that_computes_half_of_the_time_threads_spin(watch: ContentionWatch) -> None:
    assert slept(watch, 0.28, 0.30, 0.27) == [0, 0, 0]
    assert slept(watch, 0.60, 0.35, 0.34, 0.36, 0.28, 0.28) == [1, 1, 1, 0, 0, 0]


def test_one_low_measurement_does_not_end_the_sleep(watch: ContentionWatch) -> None:
    assert slept(watch, 0.66, 0.52, 0.37, 0.59, 0.36, 0.51) == [1] * 6


def test_waiting_is_measured() -> None:
    """Another process on the only processor that this one may use."""
    code = (
        "import os, time; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import subprocess, sys; from rung.models.threads import seconds_waited\n"
        "other = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
        "before, end = seconds_waited(), time.monotonic() + 1.0\n"
        "while time.monotonic() < end: pass\n"
        "other.kill(); print(seconds_waited() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.25
    assert seconds_waited() >= 0.0


@pytest.mark.parametrize("name", threads.WAIT_VARIABLES)
def test_the_users_way_of_waiting_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in threads.WAIT_VARIABLES:
        monkeypatch.delenv(other, raising=False)
    assert threads._libgomp() is not None
    monkeypatch.setenv(name, "300000" if name == "GOMP_SPINCOUNT" else "active")
    assert threads._libgomp() is None


def test_the_watch_ends_with_its_team(watch: ContentionWatch) -> None:
    watch.start()
    watch.update(0.7)
    assert watch.is_alive() and Team.running == 1
    watch.stop()
    assert not watch.is_alive() and Team.running == 0


def test_a_path_with_spaces_and_a_library_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    opened: list[str] = []

    def open_library(path: str) -> str:
        opened.append(path)
        if "deleted" in path:
            raise OSError(path)
        return path

    maps = "7f0-7f1 r-xp 0 08:01 5  {}\n"
    texts = {path: maps.format(path) for path in ("/a b/lib/libgomp.so.1", "/c/libgomp.so.1 (deleted)")}
    monkeypatch.setattr(threads.ctypes, "CDLL", open_library)
    monkeypatch.setattr(threads.Path, "read_text", lambda self: "".join(texts.values()))
    assert threads._libgomp() == "/a b/lib/libgomp.so.1"
    del texts["/a b/lib/libgomp.so.1"]
    assert threads._libgomp() is None and opened[-1] == "/c/libgomp.so.1 (deleted)"


def test_a_shared_machine_is_told_once_and_not_at_its_first_second(
    monkeypatch: pytest.MonkeyPatch, watch: ContentionWatch
) -> None:
    monkeypatch.setattr(threads, "_watch", watch)
    monkeypatch.setattr(threads, "_notice_given", False)
    for _ in range(threads.NOTICE_SECONDS):
        assert contention_notice() is None
        watch.update(0.7)
    notice = contention_notice()
    assert notice is not None and "other processes" in notice
    assert contention_notice() is None
