"""What a person sees while a run goes on. Everything goes to stderr; stdout belongs to `--json`."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


def print_status(text: str) -> None:
    """One line for the user."""
    console.print(text, markup=False, soft_wrap=True)


class ProgressBar:
    """A progress bar on a terminal; on a pipe, a line every tenth of the way."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self._live = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(
            *columns, TextColumn("{task.fields[numbers]}"), console=console, disable=not self._live
        )
        self._task = self._progress.add_task(title, total=total, completed=done, numbers="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, count: int = 1, **numbers: Any) -> None:
        """Count some more as done; the numbers stand beside the bar."""
        before = self.done
        self.done += count
        text = "  ".join(f"{name} {value}" for name, value in numbers.items())
        self._progress.update(self._task, completed=self.done, numbers=text)
        tenth = max(1, self.total // 10)
        if not self._live and (self.done // tenth > before // tenth or self.done == self.total):
            print_status(f"{self.title} {self.done}/{self.total}  {text}".rstrip())


@contextmanager
def status(title: str) -> Iterator[None]:
    """Say what is going on while it goes on."""
    if console.is_terminal:
        with console.status(title):
            yield
    else:
        print_status(title)
        yield


DUPLICATE_SIGNAL_SECONDS = 5.0
"""Seconds within which torchrun has passed on a signal that its processes had from the terminal already."""


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; its checkpoint is saved."""


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM let the step finish first; a second one stops at once.

    Under a launcher one Ctrl-C arrives twice, from the terminal and from the launcher: that is one request.
    """
    asked = threading.Event()
    again = DUPLICATE_SIGNAL_SECONDS if os.environ.get("RANK") else 0.0
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        nonlocal first
        if asked.is_set():
            if time.monotonic() - first > again:
                raise KeyboardInterrupt
            return
        first = time.monotonic()
        asked.set()
        print_status("stopping after this step, or the rollout at hand; once more stops at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
