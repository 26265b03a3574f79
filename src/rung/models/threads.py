"""Threads of torch on the processor: how many there are, and how they wait for one another.

torch divides each operation among its threads with GNU's OpenMP library, libgomp. A thread that has finished its share
spins for about 3 ms before it sleeps. On a machine of its own that is right: sleeping at once costs 20 to 30 % of the
training speed (docs/log.md). Beside another process it is wrong: the spinning thread holds the processor that its
delayed partner could use, and training falls to 28 % of its speed alone.

Neither behavior can be chosen once for a machine on which other programs come and go, and libgomp reads its settings
only when it is loaded. But it also decides at every wait: where a process has more OpenMP threads than processors, a
thread sleeps almost at once (libgomp manual, GOMP_SPINCOUNT). `ContentionWatch` uses this rule: it measures how long
the threads of this process wait for a processor, and while they wait long it keeps one more team of threads, which
sleeps. The threads that compute are the same in number, so no result changes by a bit.

`load_base` starts both parts. A setting of the user's (OMP_NUM_THREADS, MKL_NUM_THREADS; OMP_WAIT_POLICY,
GOMP_SPINCOUNT) switches off the part that it replaces.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
from collections import deque
from pathlib import Path
from statistics import mean

import torch
from joblib.externals.loky import cpu_count

WATCH_SECONDS = 1.0
"""Seconds between two measurements."""
SLEEP_ABOVE = 0.45
"""Seconds that threads wait for a processor, per second: above it they sleep at once. Measured in LoRA training with
spinning threads: 0.27 beside a process that computes half of the time, where sleeping is 19 % slower, and 0.44 at three
quarters of the time, where it is 4 % slower."""
SPIN_BELOW = 0.42
"""Below it, in the mean of the last `SPIN_AFTER` measurements, they spin again. Measured with sleeping threads: 0.34
beside a process that computes half of the time, 0.52 beside a busy one."""
SPIN_AFTER = 3
"""Measurements: a busy process lets single ones fall to 0.37."""
NOTICE_SECONDS = 5
"""Seconds of sleeping threads after which a run says so: a program that starts beside it is no news."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def set_thread_count() -> None:
    """Use no more threads than this process has processors, by its affinity mask and its container's CPU quota.

    torch knows the mask alone: with a quota of 2 processors on a machine of 64 it would start 64 threads. Under
    torchrun, which gives every process one thread, the processes divide the processors.
    """
    processors = cpu_count()
    if _torchrun_chose_threads():
        torch.set_num_threads(max(1, processors // int(os.environ["LOCAL_WORLD_SIZE"])))
    elif not any(os.environ.get(name) for name in THREAD_VARIABLES) and processors < torch.get_num_threads():
        torch.set_num_threads(processors)


def _torchrun_chose_threads() -> bool:
    """Whether OMP_NUM_THREADS is torchrun's: the launcher itself was started without it."""
    if not {"TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"} <= os.environ.keys() or os.environ.get("MKL_NUM_THREADS"):
        return False
    try:
        launcher = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in launcher)


class IdleTeam:
    """A team of OpenMP threads that sleeps: with it the process has more of them than processors.

    A thread of Python owns the team, which libgomp frees when that thread ends.
    """

    def __init__(self, libgomp: ctypes.CDLL) -> None:
        self._released = threading.Event()
        started = threading.Event()
        # at least one thread more than processors, beside the team that computes
        size = max(2, libgomp.omp_get_num_procs() - torch.get_num_threads() + 2)
        self._owner = threading.Thread(target=self._own, args=(libgomp, size, started), daemon=True)
        self._owner.start()
        started.wait()

    def _own(self, libgomp: ctypes.CDLL, size: int, started: threading.Event) -> None:
        torch.get_num_threads()  # torch's first call in a thread sets its own number
        libgomp.omp_set_num_threads(size)  # of this thread alone, unlike `torch.set_num_threads`
        torch.empty(1 << 17).zero_()  # torch divides what is larger than 32,768 elements
        started.set()
        self._released.wait()

    def release(self) -> None:
        """End the team."""
        self._released.set()
        self._owner.join()


class ContentionWatch:
    """Lets the threads of torch sleep while other processes need the processors, and spin otherwise."""

    def __init__(self, libgomp: ctypes.CDLL) -> None:
        self._libgomp = libgomp
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._measure, name="rung-contention-watch", daemon=True)
        self._idle_team: IdleTeam | None = None
        self._recent: deque[float] = deque(maxlen=SPIN_AFTER)
        self.shared_measurements = 0
        """Measurements in a row in which threads had to sleep."""

    def start(self) -> None:
        """Measure from now on until the process ends."""
        self._thread.start()
        # a thread that the interpreter ends inside torch aborts the process
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the watch and its team."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._idle_team is not None:
            self._idle_team.release()
            self._idle_team = None

    def is_alive(self) -> bool:
        """Whether it measures; after a fork it does not."""
        return self._thread.is_alive()

    def _measure(self) -> None:
        waited, at = seconds_waited(), time.monotonic()
        while not self._ended.wait(WATCH_SECONDS):
            waited_before, before = waited, at
            waited, at = seconds_waited(), time.monotonic()
            # a thread that has ended takes its waiting with it
            self.update(max(0.0, waited - waited_before) / (at - before))

    def update(self, waiting: float) -> None:
        """Take in a measurement: seconds that threads waited for a processor, per second."""
        self._recent.append(waiting)
        if self._idle_team is None and waiting > SLEEP_ABOVE:
            self._idle_team = IdleTeam(self._libgomp)
            self._recent.clear()  # what threads wait depends on how they wait
        elif self._idle_team is not None and len(self._recent) == SPIN_AFTER and mean(self._recent) < SPIN_BELOW:
            self._idle_team.release()
            self._idle_team = None
        self.shared_measurements = self.shared_measurements + 1 if self._idle_team is not None else 0


def seconds_waited() -> float:
    """Seconds that the threads of this process, added up, were ready to run and had no processor (Linux, schedstat)."""
    nanoseconds = 0
    for thread in Path("/proc/self/task").iterdir():
        try:
            nanoseconds += int((thread / "schedstat").read_text().split()[1])
        except OSError:  # the thread has ended
            continue
    return nanoseconds / 1e9


_watch: ContentionWatch | None = None
_count_set = _notice_given = False


def adapt_threads() -> None:
    """Set the number of threads, and watch for contention from now on.

    A later call leaves the number alone, which the user may have set since, and starts a watch only after a fork.
    """
    global _watch, _count_set
    if not _count_set:
        set_thread_count()
        _count_set = True
    if _watch is not None and _watch.is_alive():
        return
    if (libgomp := _libgomp()) is not None and torch.get_num_threads() > 1:
        _watch = ContentionWatch(libgomp)
        _watch.start()


def contention_notice() -> str | None:
    """What to tell the user where other processes keep this one from computing; only once, else None."""
    global _notice_given
    if _notice_given or _watch is None or _watch.shared_measurements * WATCH_SECONDS < NOTICE_SECONDS:
        return None
    _notice_given = True
    return "other processes compute on this machine's processors: steps take longer until they end"


def _libgomp() -> ctypes.CDLL | None:
    """The OpenMP library that torch uses, if it is libgomp and neither the user nor the kernel prevents the watch."""
    if any(os.environ.get(name) for name in WAIT_VARIABLES) or not Path("/proc/self/schedstat").exists():
        return None
    lines = Path("/proc/self/maps").read_text().splitlines()
    # the path is the sixth field, and may hold spaces
    mapped = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
    torch_folder = str(Path(torch.__file__).parent)
    for path in sorted(mapped, key=lambda path: not path.startswith(torch_folder)):
        try:
            return ctypes.CDLL(path)  # the library in memory, not another copy
        except OSError:  # replaced on disk since it was loaded
            continue
    return None
