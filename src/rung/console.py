"""What a command prints: results on stdout, status lines and progress bars on stderr; and interrupts.

stdout carries results only, so that `--json` can be piped. On a terminal rich draws a live bar; on a pipe a few plain
lines are printed instead, so that log files stay short. Text of data and models passes `visible`, here and nowhere
else, so that no answer can be rich's markup or move the cursor (tests/contract/test_terminal.py).
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# no highlighting: numbers and paths in messages keep one color. `distributed` sets `quiet` on all ranks but 0
console = Console(stderr=True, highlight=False)


# Control characters but newline and tab (escape sequences of terminals begin with one), controls of the direction of
# writing, which make text read as another, and halves of characters, which no encoding knows.
_NOT_SHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Text of data, models and paths as it may be printed: what a terminal or a browser would obey is an escape.

    Newlines and tabs stay; `visible("\x1b[2J")` is the six characters `\x1b[2J`.
    """
    return _NOT_SHOWN.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def plain(text: object, style: str = "") -> Text:
    """`visible` text for rich, without markup: brackets are brackets."""
    return Text(visible(str(text)), style)


def add_text_row(table: Table, *cells: str | Text) -> None:
    """Add a row to a table of rich; strings are shown as they are, without markup."""
    table.add_row(*(plain(cell) if isinstance(cell, str) else cell for cell in cells))


def text_panel(text: str, title: str, width: int) -> Panel:
    """A box around a text."""
    return Panel(plain(text), title=plain(title), width=width)


class StyledLine(str):
    """A line rendered from `plain` text, with the colors of the terminal: the only escape sequences printed."""


def encodable_on_terminal(line: str) -> str:
    """The line in the encoding of the terminal: a result must not be lost to a UnicodeEncodeError."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "replace").decode(encoding)


def print_lines(lines: Iterable[str], file: IO[str] | None = None) -> None:
    """Print lines for people, on stdout if no file is given."""
    for line in lines:
        text = line if isinstance(line, StyledLine) else visible(line)
        print(encodable_on_terminal(text) if file is None else text, file=file)


def write_text(text: str) -> None:
    """Write a piece of a model's answer to stdout at once."""
    sys.stdout.write(encodable_on_terminal(visible(text)))
    sys.stdout.flush()


def print_status(text: str) -> None:
    """Print one line for the user."""
    # soft wrap: a line stays one line in log files
    console.print(plain(text), soft_wrap=True)


class ProgressBar:
    """A progress bar on a terminal; elsewhere one line per tenth of the total. Both show the time to go."""

    def __init__(self, title: str | None, total: int, done: int = 0) -> None:
        """`title` None shows nothing: another bar shows the progress of the whole."""
        self.title, self.total, self.done = title, total, done
        self._done_before, self._started = done, time.monotonic()
        self._live, self._is_silent = console.is_terminal, title is None
        title_column, numbers = (TextColumn(f"{{task.{x}}}", markup=False) for x in ("description", "fields[numbers]"))
        columns = (title_column, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), numbers)
        self._progress = Progress(*columns, console=console, disable=self._is_silent or not self._live)
        self._task = self._progress.add_task(visible(title or ""), total=total, completed=done, numbers="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self, count: int = 1, **numbers: Any) -> None:
        """Advance by `count`; `numbers` are shown next to the bar."""
        previous = self.done
        self.done += count
        text = visible("  ".join(f"{name} {value}" for name, value in numbers.items()))
        self._progress.update(self._task, completed=self.done, numbers=text)
        # 1: totals below ten print a line at every step
        tenth = max(1, self.total // 10)
        is_printed = not (self._live or self._is_silent)
        if is_printed and (self.done // tenth > previous // tenth or self.done == self.total):
            print_status("  ".join(filter(None, (f"{self.title} {self.done}/{self.total}", text, self._time_to_go()))))

    def _time_to_go(self) -> str:
        """At the mean speed since the bar began; empty where that says nothing."""
        advanced, remaining = self.done - self._done_before, self.total - self.done
        if advanced <= 0 or remaining <= 0:
            return ""
        seconds = (time.monotonic() - self._started) * remaining / advanced
        if seconds < 1.0:
            return ""
        return f"{seconds:.0f} s to go" if seconds < 100 else f"{seconds / 60:.0f} min to go"


@contextmanager
def status(title: str) -> Iterator[None]:
    """Show a title while the block runs: a spinner on a terminal, else one line."""
    if console.is_terminal:
        with console.status(plain(title)):
            yield
    else:
        print_status(title)
        yield


DUPLICATE_SIGNAL_SECONDS = 5.0
"""Seconds within which torchrun forwards a signal that its processes have already received from the terminal."""


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; a checkpoint was saved."""


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM is Ctrl-C, so that everything is cleaned up: by default it ends the process on the spot."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def interruptible(
    when: str = "after the current step or rollout", on_request: Callable[[], None] | None = None
) -> Iterator[Callable[[], bool]]:
    """Inside, SIGINT and SIGTERM set a flag, so that what was begun can finish; a second signal stops at once.

    Yields the function that reads the flag. `when` tells the user when the program will stop; `on_request` is called
    at the first signal, for code that cannot read the flag. Under a launcher one Ctrl-C arrives twice, from the
    terminal and from the launcher; the second one is ignored for `DUPLICATE_SIGNAL_SECONDS`.
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
        print_status(f"stopping {when}; press Ctrl-C again to stop at once")
        if on_request is not None:
            on_request()

    previous_handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_requested.is_set
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
