"""How every web server of Rung listens: its socket, its limits and what it logs."""

from __future__ import annotations

import socket
from typing import Any

from rung.errors import ConfigError

HEADER_BYTES = 32 * 2**10
KEEP_ALIVE_SECONDS = 30
MAX_CONNECTIONS = 1000
QUIET: dict[str, Any] = {"log_level": "warning", "access_log": False, "log_config": None}
"""Warnings alone are logged. uvicorn's own logging config would close the handlers of all libraries, and absl's closes
the stream that it writes to, which may be a notebook's."""


def server_options(shutdown_seconds: int) -> dict[str, Any]:
    """Options of `uvicorn.Config`; a stop waits `shutdown_seconds` for the answers that were begun."""
    from rung.web.header_timeout import HeaderTimeoutProtocol

    options: dict[str, Any] = {"http": HeaderTimeoutProtocol, "ws": "none", "limit_concurrency": MAX_CONNECTIONS}
    options |= {**QUIET, "h11_max_incomplete_event_size": HEADER_BYTES}
    return options | {"timeout_graceful_shutdown": shutdown_seconds, "timeout_keep_alive": KEEP_ALIVE_SECONDS}


def listen(host: str, port: int) -> socket.socket:
    """The socket of a server; port 0 takes a free one. Raises `ConfigError` for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        summary = f"nothing can listen at this address: {error.strerror or error}"
        raise ConfigError(summary, where="--host, --port", given=f"{host}:{port}") from error
