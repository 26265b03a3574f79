"""The web application: routes of OpenAI's API, /health and /metrics.

A handler reads a request and hands it to the model that it names: `engine_model.py` for what this process computes,
`llama_cpp_model.py` for llama.cpp. `serving/run.py` serves the application.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rung.serving.engine import Counters, Engine
from rung.serving.engine_model import EngineModel, RewardModel
from rung.serving.llama_cpp_model import LlamaCppModel
from rung.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    RequestError,
    ScoreRequest,
    validation_request_error,
)
from rung.web.access import AccessControl, AccessError

Parsed = TypeVar("Parsed", bound=BaseModel)
BODY_SECONDS = 30
"""How long a client may take to send a request."""
RETRY_AFTER_SECONDS = 1
"""What a client is told that finds the queue full."""


class ApiModel(Protocol):
    """A model behind the routes; each method raises `RequestError` for what the model does not have."""

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        """POST /v1/completions."""

    async def score(self, asked: ScoreRequest, request: Request) -> Response:
        """POST /v1/score."""

    async def embed(self, asked: EmbeddingRequest, request: Request) -> Response:
        """POST /v1/embeddings."""


def make_app(engine: Engine, files: Mapping[str, LlamaCppModel] | None = None, key: str | None = None) -> Starlette:
    """The application of an engine that has been started, and of files in llama.cpp."""
    handlers = Handlers(engine, files or {})
    routes = [
        Route("/v1/models", handlers.list_models),
        Route("/v1/models/{name:path}", handlers.show_model),
        Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
        Route("/v1/completions", handlers.complete, methods=["POST"]),
        Route("/v1/score", handlers.score, methods=["POST"]),
        Route("/v1/embeddings", handlers.embed, methods=["POST"]),
        Route("/health", handlers.health),
        Route("/metrics", handlers.metrics),
    ]
    errors: Mapping[Any, Callable[..., Any]] = {
        RequestError: _request_error,
        AccessError: _access_error,
        ClientDisconnect: _client_has_left,
        HTTPException: _http_error,
        Exception: _other_error,
    }
    access = Middleware(AccessControl, refuse=_refused, key=key)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        for file in handlers.files.values():
            await file.disconnect()

    return Starlette(routes=routes, exception_handlers=errors, middleware=[access], lifespan=lifespan)


class Handlers:
    """One method a route."""

    def __init__(self, engine: Engine, files: Mapping[str, LlamaCppModel]) -> None:
        self.engine, self.files = engine, files
        self.models: dict[str, ApiModel] = {
            name: EngineModel(engine, served) if served.scorer is None else RewardModel(engine, served)
            for name, served in engine.models.items()
        }
        self.models |= files

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [_card(name) for name in self.models]})

    async def show_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        self._named(name)
        return JSONResponse(_card(name))

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while the engine computes and every llama.cpp answers."""
        is_alive = self.engine.is_alive and all([await file.is_well() for file in self.files.values()])
        return JSONResponse({"status": "ok" if is_alive else "stopped"}, 200 if is_alive else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics in the text form of Prometheus."""
        return PlainTextResponse(_prometheus(self.engine, self.files), media_type="text/plain; version=0.0.4")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = await _read(request, ChatRequest)
        return await self._named(asked.model).chat(asked, request)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = await _read(request, CompletionRequest)
        return await self._named(asked.model).complete(asked, request)

    async def score(self, request: Request) -> Response:
        """POST /v1/score."""
        asked = await _read(request, ScoreRequest)
        return await self._named(asked.model).score(asked, request)

    async def embed(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        asked = await _read(request, EmbeddingRequest)
        return await self._named(asked.model).embed(asked, request)

    def _named(self, name: str) -> ApiModel:
        if (model := self.models.get(name)) is None:
            known = ", ".join(self.models)
            raise RequestError(f"no such model; there are: {known}", status=404, param="model", code="model_not_found")
        return model


async def _read(request: Request, kind: type[Parsed]) -> Parsed:
    """The body as a request. Raises `RequestError` for anything else."""
    try:
        body = await asyncio.wait_for(request.body(), BODY_SECONDS)
    except TimeoutError:
        raise RequestError("the body did not come", status=408) from None
    try:
        data = json.loads(body)
        text = json.dumps(data, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("a text holds half a character") from None
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON") from None
    if not isinstance(data, dict):
        raise RequestError("the body is no JSON object")
    try:
        # clients send null for what they leave out
        parsed = kind.model_validate({name: value for name, value in data.items() if value is not None})
        if "NaN" in text or "Infinity" in text:  # which may also be a word
            json.dumps(data, allow_nan=False)
        return parsed
    except ValidationError as error:
        raise validation_request_error(error) from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except ValueError:
        raise RequestError("a number in the body is not finite") from None


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "rung"}


def _prometheus(engine: Engine, files: Mapping[str, LlamaCppModel]) -> str:
    counters = [engine.counters, *(file.counters for file in files.values())]
    totals = {field.name: sum(getattr(each, field.name) for each in counters) for field in fields(Counters)}
    rows: list[tuple[str, str, float]] = [
        ("rung_requests_total", "counter", totals["requests"]),
        ("rung_requests_refused_total", "counter", totals["refused"]),
        ("rung_requests_cancelled_total", "counter", totals["cancelled"]),
        ("rung_answers_total", "counter", totals["answers"]),
        ("rung_prompt_tokens_total", "counter", totals["prompt_tokens"]),
        ("rung_prompt_tokens_shared_total", "counter", sum(b.encoder.shared_tokens for b in engine.batches.values())),
        ("rung_generated_tokens_total", "counter", totals["generated_tokens"]),
        ("rung_queue_seconds_total", "counter", totals["wait_seconds"]),
        ("rung_requests_waiting", "gauge", len(engine.waiting) + sum(file.waiting for file in files.values())),
        ("rung_answers_running", "gauge", engine.active_rows + sum(f.running - f.waiting for f in files.values())),
    ]
    return "".join(f"# TYPE {name} {kind}\n{name} {value:g}\n" for name, kind, value in rows)


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)  # noqa: S101 -- registered for this class
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


def _refused(error: AccessError) -> Response:
    return JSONResponse(RequestError(error.message, status=error.status, code=error.code).body(), error.status)


async def _access_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AccessError)  # noqa: S101 -- registered for this class
    return _refused(error)


async def _client_has_left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # as nginx logs it; nobody reads it


async def _http_error(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    message = {404: "there is nothing here", 405: "this method is not for this path"}.get(status, "the request failed")
    return JSONResponse(RequestError(message, status=status).body(), status)


async def _other_error(request: Request, error: Exception) -> Response:
    return JSONResponse(RequestError("the server failed", status=500).body(), 500)
