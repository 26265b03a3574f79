"""What a person sees while a run goes on. Everything goes to stderr; stdout belongs to `--json`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line for the user."""
    console.print(text, markup=False, soft_wrap=True)


class Bar:
    """A progress bar on a terminal; on a pipe, a line every tenth of the way."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self._live = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(
            *columns, TextColumn("{task.fields[numbers]}"), console=console, disable=not self._live
        )
        self._task = self._progress.add_task(title, total=total, completed=done, numbers="")

    def __enter__(self) -> Bar:
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
            say(f"{self.title} {self.done}/{self.total}  {text}".rstrip())


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Say what is going on while it goes on."""
    if console.is_terminal:
        with console.status(title):
            yield
    else:
        say(title)
        yield
