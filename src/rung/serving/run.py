"""`rung serve`: opens the models, starts the engine and serves until it is told to stop."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rung.config.model import ComputeType
from rung.console import interruptible, print_status, terminable
from rung.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from rung.serving.engine import Engine
    from rung.serving.llama_cpp_model import LlamaCppModel

KEY_VARIABLE = "RUNG_SERVE_KEY"
SHUTDOWN_SECONDS = 60
"""How long a stop waits for the answers that were begun."""


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
    cache_bytes: int = 4 * 2**30
    """Memory for the keys and values of answers that are being generated."""
    beginnings_bytes: int = 256 * 2**20
    """Memory for the keys and values of beginnings of earlier prompts."""
    dtype: ComputeType = "auto"
    """Type that bases compute in; a run has its own."""


def serve(targets: Sequence[str], request: ServeRequest) -> None:
    """Serve runs and bases until SIGINT or SIGTERM; answers that were begun are finished.

    Raises `ConfigError` for an address beyond this machine without a key, and as `open_models`.
    """
    require_installed()
    from rung.web.access import is_loopback
    from rung.web.server import listen

    key = os.environ.get(KEY_VARIABLE) if request.key is None else request.key
    if key is not None and not key.strip():
        hint = "unset it to serve this machine alone"
        raise ConfigError("the key is empty", where=f"--key or {KEY_VARIABLE}", hint=hint)
    if key is None and not is_loopback(request.host):
        hint = f"set --key or {KEY_VARIABLE}"
        raise ConfigError("other machines may ask only with a key", where="--host", given=request.host, hint=hint)
    with listen(request.host, request.port) as listening:  # before minutes of loading
        _serve_at(listening, targets, request, key)


def require_installed() -> None:
    """Raise `PlanError` where the web server is not installed."""
    if find_spec("uvicorn") is None or find_spec("sse_starlette") is None or find_spec("httpx2") is None:
        raise PlanError("serving needs a web server", hint="pip install 'rung[serve]'")


def _serve_at(listening: socket.socket, targets: Sequence[str], request: ServeRequest, key: str | None) -> None:
    import uvicorn
    from sse_starlette.sse import AppStatus

    from rung.serving.app import make_app
    from rung.serving.catalog import model_names
    from rung.web.server import server_options

    # streams that were begun are finished: by default sse-starlette would end them at SIGTERM
    AppStatus.enable_automatic_graceful_drain = False
    with terminable(), opened(model_names(targets), request) as (engine, files):
        server = uvicorn.Server(uvicorn.Config(make_app(engine, files, key), **server_options(SHUTDOWN_SECONDS)))
        names = ", ".join([*engine.models, *files])
        print_status(f"serving {names} at http://{request.host}:{request.port}/v1")

        def finish() -> None:
            server.should_exit = True

        with interruptible("once the requests that were begun are answered", finish):
            engine.compute_during(lambda: server.run(sockets=[listening]))


@contextmanager
def opened(targets: Mapping[str, str], request: ServeRequest) -> Iterator[tuple[Engine, dict[str, LlamaCppModel]]]:
    """An engine of the models by name, which computes nothing yet, and the files in llama.cpp."""
    import torch

    from rung.models.threads import adapt_threads
    from rung.runs.load import target_kind
    from rung.serving.catalog import is_gguf_file, open_models
    from rung.serving.engine import Engine
    from rung.serving.llama_cpp_model import LlamaCppModel

    paths = {name: Path(target) for name, target in targets.items() if is_gguf_file(target)}
    others = {name: target for name, target in targets.items() if name not in paths}
    if request.dtype != "auto" and not any(target_kind(target) == "base" for target in others.values()):
        raise ConfigError("no base is served, and runs and files have types of their own", where="--dtype")
    # the memory is that of all: each file has a part of its own, as the models here together have
    parts = len(paths) + bool(others)
    limits = {"max_rows": request.max_rows, "max_waiting": request.max_waiting}
    limits |= {"cache_bytes": request.cache_bytes // parts, "beginnings_bytes": request.beginnings_bytes // parts}
    adapt_threads()  # which loading a base does too: the threads of this process's share of the machine
    with ExitStack() as stack:
        files = {}
        for name, path in paths.items():
            files[name] = LlamaCppModel(name, path, **limits, threads=torch.get_num_threads())
            stack.callback(files[name].close)
            print_status(f"{name}: llama.cpp, {files[name].context:,} tokens a request")
        yield Engine(open_models(others, request.dtype), **limits), files
