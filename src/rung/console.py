"""Status lines, progress bars and interrupts of a running command, on stderr.

stdout carries results only, so that `--json` can be piped. On a terminal rich draws a live bar; on a pipe a few plain
lines are printed instead, so that log files stay short. Every long command uses this module.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# no highlighting: numbers and paths in messages keep one color. `distributed` sets `quiet` on all ranks but 0
console = Console(stderr=True, highlight=False)


def print_status(text: str) -> None:
    """Print one line for the user."""
    # no markup: brackets in paths and messages are text. Soft wrap: a line stays one line in log files
    console.print(text, markup=False, soft_wrap=True)


class ProgressBar:
    """A progress bar on a terminal; elsewhere one line per tenth of the total."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self._live = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        disable = not self._live
        self._progress = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=console, disable=disable)
        self._task = self._progress.add_task(title, total=total, completed=done, numbers="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self, count: int = 1, **numbers: Any) -> None:
        """Advance by `count`; `numbers` are shown next to the bar."""
        previous = self.done
        self.done += count
        text = "  ".join(f"{name} {value}" for name, value in numbers.items())
        self._progress.update(self._task, completed=self.done, numbers=text)
        # 1: totals below ten print a line at every step
        tenth = max(1, self.total // 10)
        if not self._live and (self.done // tenth > previous // tenth or self.done == self.total):
            print_status(f"{self.title} {self.done}/{self.total}  {text}".rstrip())


@contextmanager
def status(title: str) -> Iterator[None]:
    """Show a title while the block runs: a spinner on a terminal, else one line."""
    if console.is_terminal:
        with console.status(title):
            yield
    else:
        print_status(title)
        yield


DUPLICATE_SIGNAL_SECONDS = 5.0
"""Seconds within which torchrun forwards a signal that its processes have already received from the terminal."""


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; a checkpoint was saved."""


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, SIGINT and SIGTERM set a flag, so that the step can finish; a second signal stops at once.

    Yields the function that reads the flag. Under a launcher one Ctrl-C arrives twice, from the terminal and from the
    launcher; the second one is ignored for `DUPLICATE_SIGNAL_SECONDS`.
    """
    stop_requested = threading.Event()
    duplicate_seconds = DUPLICATE_SIGNAL_SECONDS if os.environ.get("RANK") else 0.0
    first_time = 0.0
    # Python allows signal handlers in the main thread only; in another thread the flag is never set
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested.is_set
        return

    def request_stop(number: int, frame: Any) -> None:
        nonlocal first_time
        if stop_requested.is_set():
            if time.monotonic() - first_time > duplicate_seconds:
                raise KeyboardInterrupt
            return
        first_time = time.monotonic()
        stop_requested.set()
        print_status("stopping after the current step or rollout; press Ctrl-C again to stop at once")

    previous_handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_requested.is_set
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
