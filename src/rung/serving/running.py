"""A request that is being computed, as its handler sees it; what is cancelled when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from rung.models.slot_batch import DrawnToken
from rung.serving.answers import AnswerText
from rung.serving.engine import Chunk, Engine, Job, QueueFullError, StoppedError
from rung.serving.protocol import RequestError, usage

T = TypeVar("T")


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves: then `ClientDisconnect` is raised."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(work), asyncio.create_task(watch())
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def queue_full_error() -> RequestError:
    """For a request that finds as many waiting as may wait."""
    return RequestError("too many requests wait: try again later", status=429, code="queue_full")


class RunningJob:
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
            raise queue_full_error() from None
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
        """Wait for all answers. Raises `ClientDisconnect` when the client has left."""

        async def collect() -> None:
            async for _ in self:
                pass

        await unless_client_leaves(request, collect())

    def counts(self) -> tuple[int, int]:
        """Tokens of the prompt and of the answers."""
        return len(self.prompt), sum(len(answer.tokens) for answer in self.answers)

    def usage(self) -> dict[str, int]:
        """The same for a response."""
        return usage(*self.counts())
