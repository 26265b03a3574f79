"""A limit for failed attempts of an address, so that nobody can guess a secret word by trying."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

MAX_ADDRESSES = 10_000
"""Addresses that are remembered; of more the one with the oldest failure is forgotten."""


class AttemptLimit:
    """Blocks an address after `attempts` failures within `seconds`."""

    def __init__(self, attempts: int = 10, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.attempts, self.seconds, self._clock = attempts, seconds, clock
        self._failures: OrderedDict[str, list[float]] = OrderedDict()

    def is_blocked(self, address: str) -> bool:
        """Whether the address has failed too often; it is not blocked any more once the failures are old."""
        return len(self._recent(address)) >= self.attempts

    def record_failure(self, address: str) -> None:
        """Count a failed attempt."""
        self._failures[address] = [*self._recent(address), self._clock()][-self.attempts :]
        self._failures.move_to_end(address)
        while len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)

    def _recent(self, address: str) -> list[float]:
        since = self._clock() - self.seconds
        return [moment for moment in self._failures.get(address, ()) if moment > since]
