"""`rung serve`: opens the models, starts the engine and serves until it is told to stop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rung.console import print_status
from rung.errors import ConfigError, PlanError

KEY_VARIABLE = "RUNG_SERVE_KEY"
SHUTDOWN_SECONDS = 60
"""How long a stop waits for the answers that were begun."""
HEADER_BYTES = 32 * 2**10
KEEP_ALIVE_SECONDS = 30


@dataclass(frozen=True)
class ServeRequest:
    """How models are served."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    """Key that clients must send; without one only this machine may ask."""
    max_rows: int = 16
    """Answers that are generated at once."""
    max_waiting: int = 128
    """Requests that may wait."""
    beginnings_bytes: int = 256 * 2**20
    """Memory for the keys and values of beginnings of earlier prompts."""


def serve(targets: Sequence[str], request: ServeRequest) -> None:
    """Serve runs and bases until SIGINT or SIGTERM; answers that were begun are finished.

    Raises `ConfigError` for an address beyond this machine without a key, and as `open_models`.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise PlanError("serving needs a web server", given="serve", hint="pip install 'rung[serve]'") from error
    from rung.serving.app import make_app
    from rung.serving.catalog import open_models
    from rung.serving.engine import Engine
    from rung.web.access import is_loopback

    key = request.key or os.environ.get(KEY_VARIABLE)
    if key is None and not is_loopback(request.host):
        hint = f"set --key or {KEY_VARIABLE}"
        raise ConfigError("other machines may ask only with a key", where="--host", given=request.host, hint=hint)
    models = open_models(targets)
    limits = {"max_rows": request.max_rows, "max_waiting": request.max_waiting}
    engine = Engine(models, **limits, beginnings_bytes=request.beginnings_bytes)
    engine.start()
    options: dict[str, Any] = {"host": request.host, "port": request.port, "http": "h11", "ws": "none"}
    options |= {"log_level": "warning", "access_log": False, "h11_max_incomplete_event_size": HEADER_BYTES}
    options |= {"timeout_graceful_shutdown": SHUTDOWN_SECONDS, "timeout_keep_alive": KEEP_ALIVE_SECONDS}
    config = uvicorn.Config(make_app(engine, key), **options)
    server = uvicorn.Server(config)
    print_status(f"serving {', '.join(models)} at http://{request.host}:{request.port}/v1")
    try:
        server.run()
    finally:
        engine.stop()
    if not server.started:
        raise ConfigError("the address is in use", where="--port", given=request.port)
