"""Stopping by the user, between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rung.engine.progress import say

LAUNCHER_REPEATS = 5.0
"""Seconds within which torchrun has passed on a signal that its processes had from the terminal already."""


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; its checkpoint is saved."""


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM let the step finish first; a second one stops at once.

    Under a launcher one Ctrl-C arrives twice, from the terminal and from the launcher: that is one request.
    """
    asked = threading.Event()
    again = LAUNCHER_REPEATS if os.environ.get("RANK") else 0.0
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
        say("stopping after this step, or the rollout at hand; once more stops at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
