"""The web application: routes of OpenAI's API, /health and /metrics.

A handler turns a request into a job of the engine and its chunks into a response. Chunks come from the engine's thread
into an asyncio queue. Where the client has left, the job is cancelled. `serving/run.py` serves the application.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rung.data.chat import ChatTemplate
from rung.errors import RungError
from rung.models.slot_batch import DrawnToken, RowSampling
from rung.serving.answers import AnswerText
from rung.serving.catalog import ServedModel
from rung.serving.engine import Chunk, Engine, Job, QueueFullError, StoppedError
from rung.serving.protocol import (
    DEFAULT_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    RequestError,
    ScoreRequest,
    chat_choice,
    chat_logprobs,
    completion_logprobs,
    usage,
)
from rung.serving.protocol import Response as Reply
from rung.serving.scoring import prompt_logprobs, scored_documents
from rung.types import Example, Message
from rung.web.access import AccessControl, AccessError

Parsed = TypeVar("Parsed", bound=BaseModel)
BODY_SECONDS, SEND_SECONDS = 30, 60
"""How long a client may take to send a request, and to read a part of a stream."""
RETRY_AFTER_SECONDS = 1
"""What a client is told that finds the queue full."""


def make_app(engine: Engine, key: str | None = None) -> Starlette:
    """The application of an engine that has been started."""
    handlers = Handlers(engine)
    routes = [
        Route("/v1/models", handlers.models),
        Route("/v1/models/{name:path}", handlers.model),
        Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
        Route("/v1/completions", handlers.complete, methods=["POST"]),
        Route("/v1/score", handlers.score, methods=["POST"]),
        Route("/v1/embeddings", handlers.embeddings, methods=["POST"]),
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
    return Starlette(routes=routes, exception_handlers=errors, middleware=[access])


class Handlers:
    """One method a route."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokenizing = threading.Lock()
        """Of threads beside the event loop, in which long prompts would stop everybody."""

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [_card(name) for name in self.engine.models]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        return JSONResponse(_card(self._served(request.path_params["name"]).name))

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while the engine's thread is alive."""
        is_alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if is_alive else "stopped"}, 200 if is_alive else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics in the text form of Prometheus."""
        return PlainTextResponse(_prometheus(self.engine), media_type="text/plain; version=0.0.4")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = await _read(request, ChatRequest)
        served, chat = self._chat(asked)
        turns = [message.turn() for message in asked.messages]
        if turns[-1].role == "assistant":
            raise RequestError("the last message is an answer already", param="messages")
        library = served.model.library
        if library is not None and turns[-1].role == "user":
            # a model that was trained with passages and is asked without them would be another model
            turns[-1] = replace(turns[-1], content=await asyncio.to_thread(library.prepend_passages, turns[-1].content))
        tools = json.dumps(asked.tools) if asked.tools else None
        prompt = await asyncio.to_thread(self._prompt_ids, chat, turns, tools)
        count = 0 if not asked.logprobs else asked.top_logprobs or 0
        limit = self._limit(served, prompt, asked.max_new_tokens)
        samplings = asked.samplings(limit, count)
        self._require_room(served, prompt, samplings)
        answers = [AnswerText(chat, limit, (*served.stop_texts, *(asked.stop or ()))) for _ in samplings]
        run = _Running(self.engine, served.name, prompt, samplings, answers)
        reply = Reply("chat.completion", served.name)
        logprobs, has_tools = bool(asked.logprobs), bool(asked.tools)
        if asked.stream and not has_tools:
            return _events(_chat_events(run, reply, chat, logprobs, asked.include_usage))
        await run.finish(request)
        choices = [chat_choice(chat, i, a, logprobs=logprobs, tools=has_tools) for i, a in enumerate(answers)]
        whole = reply.whole(choices, run.usage())
        if asked.stream:  # calls are read from whole answers
            return _events(_tool_events(reply, whole, asked.include_usage))
        return JSONResponse(whole)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = await _read(request, CompletionRequest)
        served, chat = self._chat(asked)
        prompts = [await asyncio.to_thread(self._completion_ids, chat, p, served) for p in asked.prompts()]
        if asked.stream and (len(prompts) > 1 or asked.echo):
            raise RequestError("a stream has one prompt and no echo", param="stream")
        max_tokens = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
        if not max_tokens and not asked.echo:
            raise RequestError("max_tokens 0 needs echo: nothing would be answered", param="max_tokens")
        for prompt in prompts:  # before the first of them is submitted
            self._limit(served, prompt, max_tokens)
        runs: list[_Running] = []
        reply = Reply("text_completion", served.name)
        try:
            for number, prompt in enumerate(prompts):
                runs.append(self._completion(asked, served, chat, prompt, max_tokens, number))
            if asked.stream:
                return _events(_completion_events(runs[0], reply, chat, asked))
            for run in runs:
                await run.finish(request)
        except BaseException:
            for run in runs:
                run.cancel()
            raise
        choices = [choice for run in runs for choice in _completion_choices(run, chat, asked)]
        for index, choice in enumerate(choices):
            choice["index"] = index
        prompt_tokens, answer_tokens = (sum(counts) for counts in zip(*(run.counts() for run in runs), strict=True))
        return JSONResponse(reply.whole(choices, usage(prompt_tokens, answer_tokens)))

    async def score(self, request: Request) -> Response:
        """POST /v1/score: numbers of a reward model; only differences between answers to one question count."""
        asked = await _read(request, ScoreRequest)
        served = self._served(asked.model)
        if (scorer := served.scorer) is None:
            raise RequestError("this model writes answers: a reward model gives scores", param="model")
        documents = await asyncio.to_thread(self._documents, asked, served)
        found: list[float] = []
        run = _Running(self.engine, served.name, [], [], [], compute=lambda: found.extend(scorer(documents)))
        await run.finish(request)
        data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(found)]
        head = {"id": f"score-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": served.name}
        return JSONResponse({**head, "data": data, "usage": usage(sum(map(len, documents)), 0)})

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: language models have none."""
        raise RequestError("the models here write text and have no embeddings", status=404, param="model")

    def _completion(
        self,
        asked: CompletionRequest,
        served: ServedModel,
        chat: ChatTemplate,
        prompt: list[int],
        max_tokens: int,
        number: int,
    ) -> _Running:
        samplings = asked.samplings(max_tokens, asked.logprobs or 0, number) if max_tokens else []
        self._require_room(served, prompt, samplings)
        answers = [AnswerText(chat, max_tokens, asked.stop or (), is_turn=False) for _ in samplings]
        run: _Running

        def compute() -> None:
            run.prompt_tokens = prompt_logprobs(served.model.policy, prompt, asked.logprobs or 0)

        scores_prompt = asked.echo and asked.logprobs is not None
        run = _Running(self.engine, served.name, prompt, samplings, answers, compute=compute if scores_prompt else None)
        return run

    def _served(self, name: str) -> ServedModel:
        if (served := self.engine.models.get(name)) is None:
            known = ", ".join(self.engine.models)
            raise RequestError(f"no such model; there are: {known}", status=404, param="model", code="model_not_found")
        return served

    def _chat(self, asked: GenerationRequest) -> tuple[ServedModel, ChatTemplate]:
        asked.refuse_unknown()
        served = self._served(asked.model)
        if served.scorer is not None:
            raise RequestError("a reward model writes nothing: /v1/score asks it", param="model")
        return served, served.model.chat.with_control_tokens(None)

    def _limit(self, served: ServedModel, prompt: Sequence[int], wanted: int | None) -> int:
        """Tokens of an answer: as many as were asked for, or by default as there is room for."""
        room, least = self.engine.batches[served.name].max_tokens - len(prompt), 1 if wanted is None else wanted
        if room < least:
            message = f"{len(prompt)} tokens of prompt and {least} more do not fit into {room + len(prompt)}"
            raise RequestError(message, code="context_length_exceeded")
        return min(room, DEFAULT_MAX_TOKENS) if wanted is None else wanted

    def _require_room(self, served: ServedModel, prompt: Sequence[int], samplings: Sequence[RowSampling]) -> None:
        """Raise `RequestError` for what would not fit if it were alone here."""
        if len(samplings) > self.engine.max_rows:
            raise RequestError(f"this server generates {self.engine.max_rows} answers at once", param="n")
        batch = self.engine.batches[served.name]
        if samplings and batch.cache_bytes(len(prompt), samplings, alone=True) > self.engine.cache_bytes:
            raise RequestError("so many answers of this length do not fit into memory", param="n")

    def _prompt_ids(self, chat: ChatTemplate, turns: Sequence[Message], tools: str | None) -> list[int]:
        try:
            with self.tokenizing:
                return chat.prompt_ids(turns, tools=tools)
        except RungError as error:
            raise RequestError(f"the template refuses these messages: {error.summary}", param="messages") from None

    def _documents(self, asked: ScoreRequest, served: ServedModel) -> list[Example]:
        limit, chat = self.engine.batches[served.name].max_tokens, served.model.chat.with_control_tokens(None)
        try:
            with self.tokenizing:
                return scored_documents(chat, asked.text_1, asked.answers(), limit)
        except RungError as error:
            raise RequestError(f"this cannot be scored: {error.summary}", param="text_2") from None

    def _completion_ids(self, chat: ChatTemplate, prompt: str | list[int], served: ServedModel) -> list[int]:
        if isinstance(prompt, str):
            with self.tokenizing:
                prompt = chat.encode([prompt])[0]
        vocabulary = served.model.policy.base.vocab_size
        if not prompt or not all(0 <= token < vocabulary for token in prompt):
            raise RequestError(f"a prompt has at least one token, each below {vocabulary}", param="prompt")
        return prompt


class _Running:
    """A job and its chunks, as a handler sees them."""

    def __init__(
        self,
        engine: Engine,
        model: str,
        prompt: list[int],
        samplings: Sequence[Any],
        answers: list[AnswerText],
        *,
        compute: Callable[[], None] | None = None,
    ) -> None:
        self.engine, self.answers, self.prompt = engine, answers, prompt
        self.prompt_tokens: list[DrawnToken | None] = []
        """Of an echoed prompt with log-probabilities."""
        self.chunks = asyncio.Queue[Chunk]()
        loop = asyncio.get_running_loop()

        def on_chunk(chunk: Chunk) -> None:
            with suppress(RuntimeError):  # the loop has been closed: nobody waits any more
                loop.call_soon_threadsafe(self.chunks.put_nowait, chunk)

        self.job = Job(model, prompt, samplings, answers, on_chunk, compute)
        try:
            engine.submit(self.job)
        except QueueFullError:
            raise RequestError("too many requests wait: try again later", status=429, code="queue_full") from None
        except StoppedError:
            raise RequestError("the server is shutting down", status=503) from None

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Chunks to the last one; leaving early cancels the job."""
        is_complete = False
        try:
            while not is_complete:
                chunk = await self.chunks.get()
                is_complete = chunk.is_last
                if chunk.error is not None:
                    raise RequestError(chunk.error, status=500)
                yield chunk
        finally:
            if not is_complete:
                self.cancel()

    def cancel(self) -> None:
        """Drop what is not answered yet."""
        self.engine.cancel(self.job)

    async def finish(self, request: Request) -> None:
        """Wait for all answers, or until the client has left."""

        async def collect() -> None:
            async for _ in self:
                pass

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(collect()), asyncio.create_task(watch())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise ClientDisconnect
            await tasks[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def counts(self) -> tuple[int, int]:
        """Tokens of the prompt and of the answers."""
        return len(self.prompt), sum(len(answer.tokens) for answer in self.answers)

    def usage(self) -> dict[str, int]:
        """The same for a response."""
        return usage(*self.counts())


async def _chat_events(
    run: _Running, reply: Reply, chat: ChatTemplate, logprobs: bool, include_usage: bool
) -> AsyncIterator[str]:
    role = [
        {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        for i in range(len(run.answers))
    ]
    yield json.dumps(reply.chunk(role))
    async for chunk in _streamed(run):
        if chunk.error is not None:
            yield json.dumps(RequestError(chunk.error, status=500).body())
            return
        reason = chunk.finish_reason
        choice: dict[str, Any] = {"index": chunk.index, "delta": {"content": chunk.text}, "finish_reason": reason}
        if logprobs and chunk.drawn is not None:
            choice["logprobs"] = chat_logprobs(chat, [chunk.drawn])
        if chunk.text or reason or logprobs:
            yield json.dumps(reply.chunk([choice]))
    if include_usage:
        yield json.dumps(reply.chunk([], run.usage()))
    yield "[DONE]"


async def _tool_events(reply: Reply, whole: Mapping[str, Any], include_usage: bool) -> AsyncIterator[str]:
    for choice in whole["choices"]:
        message = choice["message"]
        calls = [{"index": i, **call} for i, call in enumerate(message.get("tool_calls") or [])]
        delta = {"role": "assistant", "content": message["content"], **({"tool_calls": calls} if calls else {})}
        part = {"index": choice["index"], "delta": delta, "finish_reason": choice["finish_reason"]}
        yield json.dumps(reply.chunk([part]))
    if include_usage:
        yield json.dumps(reply.chunk([], whole["usage"]))
    yield "[DONE]"


async def _completion_events(
    run: _Running, reply: Reply, chat: ChatTemplate, asked: CompletionRequest
) -> AsyncIterator[str]:
    place = 0
    async for chunk in _streamed(run):
        if chunk.error is not None:
            yield json.dumps(RequestError(chunk.error, status=500).body())
            return
        reason = chunk.finish_reason
        choice: dict[str, Any] = {"index": chunk.index, "text": chunk.text, "finish_reason": reason, "logprobs": None}
        if asked.logprobs is not None and chunk.drawn is not None:
            choice["logprobs"] = completion_logprobs(chat, [chunk.drawn], None, start=place)
            place += len(chunk.text)
        if chunk.text or reason or asked.logprobs is not None:
            yield json.dumps(reply.chunk([choice]))
    if asked.include_usage:
        yield json.dumps(reply.chunk([], run.usage()))
    yield "[DONE]"


async def _streamed(run: _Running) -> AsyncIterator[Chunk]:
    """Chunks; an error is the last of them, since the status of a stream has been sent."""
    try:
        async for chunk in run:
            yield chunk
    except RequestError as error:
        yield Chunk(0, error=error.message)


def _completion_choices(run: _Running, chat: ChatTemplate, asked: CompletionRequest) -> list[dict[str, Any]]:
    echoed = chat.decode([run.prompt], mid_document=True)[0] if asked.echo else ""
    choices = []
    answers: Sequence[AnswerText | None] = run.answers or [None]
    for answer in answers:
        logprobs = None
        if asked.logprobs is not None:
            drawn = [*run.prompt_tokens, *(answer.tokens if answer is not None else ())]
            logprobs = completion_logprobs(chat, drawn, run.prompt[0])
        text = echoed + (answer.text if answer is not None else "")
        reason = answer.finish_reason if answer is not None else "length"
        choices.append({"index": 0, "text": text, "finish_reason": reason, "logprobs": logprobs})
    return choices


async def _read(request: Request, kind: type[Parsed]) -> Parsed:
    """The body as a request. Raises `RequestError` for anything else."""
    try:
        body = await asyncio.wait_for(request.body(), BODY_SECONDS)
    except TimeoutError:
        raise RequestError("the body did not come", status=408) from None
    try:
        data = json.loads(body)
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("a text holds half a character") from None
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON") from None
    if not isinstance(data, dict):
        raise RequestError("the body is no JSON object")
    try:
        # clients send null for what they leave out
        return kind.model_validate({name: value for name, value in data.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"{where}: {first['msg']}", param=where or None) from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None


def _events(parts: AsyncIterator[str]) -> EventSourceResponse:
    return EventSourceResponse(parts, send_timeout=SEND_SECONDS)


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "rung"}


def _prometheus(engine: Engine) -> str:
    counters = engine.counters
    rows: list[tuple[str, str, float]] = [
        ("rung_requests_total", "counter", counters.requests),
        ("rung_requests_refused_total", "counter", counters.refused),
        ("rung_requests_cancelled_total", "counter", counters.cancelled),
        ("rung_answers_total", "counter", counters.answers),
        ("rung_prompt_tokens_total", "counter", counters.prompt_tokens),
        ("rung_prompt_tokens_shared_total", "counter", sum(b.shared_tokens for b in engine.batches.values())),
        ("rung_generated_tokens_total", "counter", counters.generated_tokens),
        ("rung_queue_seconds_total", "counter", counters.wait_seconds),
        ("rung_requests_waiting", "gauge", len(engine.waiting)),
        ("rung_answers_running", "gauge", engine.active_rows),
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
