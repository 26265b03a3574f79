"""A time limit for the head of a request, which uvicorn does not have.

A client that opens a connection and sends a part of a head would hold it for ever, and a thousand of them would keep
everybody else out (the attack is known as Slowloris).
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 20
"""From the first byte of a head, or the opening of the connection, to its end; Apache allows 20 s to begin with."""


class HeaderTimeoutProtocol(H11Protocol):
    """Closes a connection whose head does not come."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Let it run as long as the head is not whole."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop_watching()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        if not self._is_incomplete():
            self._stop_watching()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEADER_SECONDS, self._close)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        self._head_timer = None
        if self._is_incomplete() and not self.transport.is_closing():
            self.transport.close()

    def _is_incomplete(self) -> bool:
        """Whether a head is not whole, or the body of a request that has been answered does not end."""
        theirs = self.conn.their_state
        return theirs is h11.IDLE or (theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE)
