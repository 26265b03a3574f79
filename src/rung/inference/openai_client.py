"""Answers of a model behind an OpenAI-compatible server (vLLM, llama.cpp, Ollama): kept as they come, none lost.

The openai client repeats what fails for a moment (connections, 408, 409, 429, 5xx), waiting twice as long each time, or
as long as the server asks for. What fails for good is said, never a row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rung.errors import CheckpointError, ConfigError, PlanError
from rung.files import Journal

KEYS = ("RUNG_API_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the key; it is written nowhere."""
DEFAULT_CONCURRENCY = 8
"""Requests on their way unless it is said otherwise."""
MAX_QUEUED = 4
"""Requests that wait for their turn, for each that is on its way."""


@dataclass(frozen=True)
class Server:
    """Where the model is, and how it is asked."""

    url: str
    """Up to and including `/v1`."""
    model: str
    """Its name there."""
    concurrency: int = DEFAULT_CONCURRENCY
    """Requests on their way at once."""
    retries: int = 6
    """Further tries of a request that fails for a moment."""
    timeout: float = 300.0
    """Seconds for one try."""


@dataclass(frozen=True, slots=True)
class ServerAnswer:
    """One answer."""

    text: str
    stopped: bool
    """Whether the model ended it, or it was cut."""


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A prompt that got no answers."""

    prompt: int
    reason: str


@dataclass(frozen=True)
class ChatRequest:
    """One prompt as the server takes it."""

    messages: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    """Further arguments: n, temperature, max_tokens, seed, tools."""


def ask_server(
    server: Server, requests: Sequence[ChatRequest], journal: Journal, on_answer: Callable[[], None]
) -> tuple[dict[int, list[ServerAnswer]], list[FailedRequest]]:
    """Answers by the number of their request, each on disk as it comes, and what failed for good.

    What the journal holds is not asked again. Raises `ConfigError` where the server refuses the key or does not know
    the model, `CheckpointError` where it cannot be reached; what was answered until then is kept.
    """
    found = {int(number): [ServerAnswer(*fields) for fields in kept] for number, kept in journal.results.items()}
    failures: list[FailedRequest] = []
    missing = (number for number in range(len(requests)) if number not in found)
    one = _make_client(server)
    waiting: dict[Future[list[ServerAnswer]], int] = {}

    def take(future: Future[list[ServerAnswer]]) -> None:
        number = waiting.pop(future)
        try:
            found[number] = future.result()
        except _RefusedError as error:
            failures.append(FailedRequest(number, str(error)))
            return
        journal.add(str(number), [[a.text, a.stopped] for a in found[number]])
        on_answer()

    with ThreadPoolExecutor(server.concurrency) as pool:
        try:
            while _submit_waiting(
                waiting, missing, lambda n: pool.submit(one, requests[n]), MAX_QUEUED * server.concurrency
            ):
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    take(future)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)  # what is on its way has been paid for
            for future in [f for f in waiting if f.done() and not f.cancelled() and f.exception() is None]:
                take(future)
            raise
    return found, sorted(failures, key=lambda failure: failure.prompt)


class _RefusedError(Exception):
    """One request will never be answered; others may be."""


def _submit_waiting(
    waiting: dict[Future[list[ServerAnswer]], int],
    missing: Iterator[int],
    submit: Callable[[int], Future[list[ServerAnswer]]],
    most: int,
) -> bool:
    """Hand over requests while there is room; whether any is on its way."""
    while len(waiting) < most and (number := next(missing, None)) is not None:
        waiting[submit(number)] = number
    return bool(waiting)


def _make_client(server: Server) -> Callable[[ChatRequest], list[ServerAnswer]]:
    """What asks one request, with a client that all threads share."""
    openai = _require_openai()
    key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "none")
    client = openai.OpenAI(base_url=server.url, api_key=key, max_retries=server.retries, timeout=server.timeout)

    def clean(error: Exception) -> str:
        return " ".join(str(error).split()).replace(key, "***")[:300] if key != "none" else str(error)[:300]

    def one(request: ChatRequest) -> list[ServerAnswer]:
        try:
            answer = client.chat.completions.create(
                model=server.model, messages=list(request.messages), **request.settings
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            what = f"the server refuses the key in {' or '.join(KEYS)}: {clean(error)}"
            raise ConfigError(what, where=server.url) from None
        except openai.NotFoundError as error:
            raise ConfigError(f"no such model there: {clean(error)}", where=server.url, given=server.model) from None
        except openai.APIConnectionError as error:  # a timeout is one, too
            what = f"the server cannot be reached, after {server.retries} further tries: {clean(error)}"
            hint = "what was answered is kept: the same command goes on"
            raise CheckpointError(what, where=server.url, hint=hint) from None
        except openai.OpenAIError as error:
            raise _RefusedError(f"{type(error).__name__}: {clean(error)}") from None
        except ValueError as error:
            raise _RefusedError(f"the answer is not JSON: {clean(error)}") from None
        return _parse_answer(answer, int(request.settings.get("n", 1)))

    return one


def _parse_answer(answer: Any, wanted: int) -> list[ServerAnswer]:
    choices = list(getattr(answer, "choices", None) or ())
    texts = [getattr(choice.message, "content", None) for choice in choices if getattr(choice, "message", None)]
    if len(texts) != wanted or any(text is None for text in texts):
        raise _RefusedError(f"{len(texts)} answers where {wanted} were asked for, or one without text")
    return [
        ServerAnswer(str(text), choice.finish_reason == "stop") for text, choice in zip(texts, choices, strict=True)
    ]


def _require_openai() -> Any:
    try:
        return import_module("openai")
    except ImportError as error:
        raise PlanError("asking a server needs its client", given="http", hint="pip install 'rung[remote]'") from error
