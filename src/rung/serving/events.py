"""Streams of server-sent events in OpenAI's form, from the chunks of a running request."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from sse_starlette import EventSourceResponse

from rung.data.chat import ChatTemplate
from rung.serving.engine import Chunk
from rung.serving.protocol import CompletionRequest, Reply, RequestError, chat_logprobs, completion_logprobs
from rung.serving.running import RunningJob

SEND_SECONDS = 60
"""How long a client may take to read a part of a stream."""
DONE = "[DONE]"


def event_stream(parts: AsyncIterator[str]) -> EventSourceResponse:
    """A response of these events."""
    return EventSourceResponse(parts, send_timeout=SEND_SECONDS)


async def chat_events(
    run: RunningJob, reply: Reply, chat: ChatTemplate, logprobs: bool, include_usage: bool
) -> AsyncIterator[str]:
    """Parts of a chat completion."""
    role = [
        {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        for i in range(len(run.answers))
    ]
    yield json.dumps(reply.chunk(role))
    async for chunk in _until_error(run):
        if chunk.error is not None:
            yield error_event(chunk.error)
            return
        reason = chunk.finish_reason
        choice: dict[str, Any] = {"index": chunk.index, "delta": {"content": chunk.text}, "finish_reason": reason}
        if logprobs and chunk.drawn is not None:
            choice["logprobs"] = chat_logprobs(chat, [chunk.drawn])
        if chunk.text or reason or logprobs:
            yield json.dumps(reply.chunk([choice]))
    if include_usage:
        yield json.dumps(reply.chunk([], run.usage()))
    yield DONE


async def tool_events(reply: Reply, whole: Mapping[str, Any], include_usage: bool) -> AsyncIterator[str]:
    """A chat completion with calls of tools, a part for each answer."""
    for choice in whole["choices"]:
        message = choice["message"]
        calls = [{"index": i, **call} for i, call in enumerate(message.get("tool_calls") or [])]
        delta = {"role": "assistant", "content": message["content"], **({"tool_calls": calls} if calls else {})}
        part = {"index": choice["index"], "delta": delta, "finish_reason": choice["finish_reason"]}
        yield json.dumps(reply.chunk([part]))
    if include_usage:
        yield json.dumps(reply.chunk([], whole["usage"]))
    yield DONE


async def completion_events(
    run: RunningJob, reply: Reply, chat: ChatTemplate, asked: CompletionRequest
) -> AsyncIterator[str]:
    """Parts of a plain completion."""
    places = [0] * len(run.answers)
    async for chunk in _until_error(run):
        if chunk.error is not None:
            yield error_event(chunk.error)
            return
        reason = chunk.finish_reason
        choice: dict[str, Any] = {"index": chunk.index, "text": chunk.text, "finish_reason": reason, "logprobs": None}
        if asked.logprobs is not None and chunk.drawn is not None:
            choice["logprobs"] = completion_logprobs(chat, [chunk.drawn], None, start=places[chunk.index])
            places[chunk.index] += len(chunk.text)
        if chunk.text or reason or asked.logprobs is not None:
            yield json.dumps(reply.chunk([choice]))
    if asked.include_usage:
        yield json.dumps(reply.chunk([], run.usage()))
    yield DONE


def error_event(message: str) -> str:
    """The last event of a stream that failed."""
    return json.dumps(RequestError(message, status=500).body())


async def _until_error(run: RunningJob) -> AsyncIterator[Chunk]:
    """Chunks; an error is the last of them, since the status of a stream has been sent."""
    try:
        async for chunk in run:
            yield chunk
    except RequestError as error:
        yield Chunk(0, error=error.message)
