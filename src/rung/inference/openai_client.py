"""Client for models behind an OpenAI-compatible server (vLLM, llama.cpp, Ollama).

Every answer is written to a journal when it arrives, so a killed command resumes without asking again (FAILURES 28).
The openai client retries temporary failures (connections, 408, 409, 429, 5xx) with exponential backoff or the delay the
server requests. Permanent failures are returned by name, never as rows. Threads instead of asyncio: the caller stays
synchronous, and a few dozen requests need no more. `commands.generate` and `commands.judge` use it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from ipaddress import ip_address
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from rung.console import visible
from rung.errors import CheckpointError, ConfigError, PlanError
from rung.files import Journal

API_KEY_VARIABLE = "RUNG_API_KEY"
"""Environment variable with the API key for the server that is asked; it is never written to a file or message."""
OPENAI_HOST, OPENAI_KEY_VARIABLE = "api.openai.com", "OPENAI_API_KEY"
"""OpenAI's host, the only one that gets the key which other programs keep in `OPENAI_API_KEY`: the server's name may
come from a config or a run folder that somebody else wrote."""
ALLOW_HTTP_VARIABLE = "RUNG_ALLOW_HTTP"
"""Environment variable that allows plain http to other machines; not a setting, which a config could carry."""
DEFAULT_CONCURRENCY = 8
"""Concurrent requests by default."""
_URL_HINT = "for example http://localhost:8000/v1 or https://api.openai.com/v1"
NO_KEY = "none"
SENT_HEADERS = frozenset(
    {"host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length", "authorization"}
)
"""Headers that other servers than OpenAI's get."""
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
QUEUED_PER_WORKER = 4
"""Submitted requests per concurrent one: enough to keep all workers busy, few enough to cancel quickly."""


@dataclass(frozen=True)
class Server:
    """Address of a model and the settings of its requests."""

    url: str
    """URL up to and including `/v1`."""
    model: str
    """Name of the model on the server."""
    concurrency: int = DEFAULT_CONCURRENCY
    """Concurrent requests."""
    retries: int = 6
    """Retries of a request that fails temporarily."""
    timeout: float = 300.0
    """Seconds per try."""


@dataclass(frozen=True, slots=True)
class ServerAnswer:
    """One answer."""

    text: str
    stopped: bool
    """True if the model ended the answer, False if it was truncated."""


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A prompt that got no answers."""

    prompt: int
    reason: str


@dataclass(frozen=True)
class ChatRequest:
    """One prompt in the form of the server's API."""

    messages: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    """Other arguments: n, temperature, max_tokens, seed, tools."""


def ask_server(
    server: Server, requests: Sequence[ChatRequest], journal: Journal, on_answer: Callable[[], None]
) -> tuple[dict[int, list[ServerAnswer]], list[FailedRequest]]:
    """Answers by the index of their request, each written when it arrives, and permanent failures.

    Requests in the journal are not repeated. Raises `ConfigError` if the server refuses the key or does not know the
    model, `CheckpointError` if it cannot be reached; answers up to then are kept.
    """
    answers = {int(number): [ServerAnswer(*fields) for fields in rows] for number, rows in journal.results.items()}
    failures: list[FailedRequest] = []
    unanswered = (number for number in range(len(requests)) if number not in answers)
    client = _make_client(server)
    ask_one = partial(_ask_one, client, server)
    in_flight: dict[Future[list[ServerAnswer]], int] = {}

    def record_result(future: Future[list[ServerAnswer]]) -> None:
        number = in_flight.pop(future)
        try:
            answers[number] = future.result()
        # only this request fails; every other error stops all of them
        except _RefusedError as error:
            failures.append(FailedRequest(number, str(error)))
            return
        journal.add(str(number), [[a.text, a.stopped] for a in answers[number]])
        on_answer()

    with closing(client), ThreadPoolExecutor(server.concurrency) as pool:
        try:
            # a bounded queue instead of submitting all: memory, and a stop that does not wait for thousands
            while True:
                for number in islice(unanswered, QUEUED_PER_WORKER * server.concurrency - len(in_flight)):
                    in_flight[pool.submit(ask_one, requests[number])] = number
                if not in_flight:
                    break
                for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                    record_result(future)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)  # requests in flight have been paid for
            for future in [f for f in in_flight if f.done() and not f.cancelled() and f.exception() is None]:
                record_result(future)
            raise
    # completion order differs between runs
    return answers, sorted(failures, key=lambda failure: failure.prompt)


class _RefusedError(Exception):
    """The server rejects one request for good; others may succeed."""


def _make_client(server: Server) -> Any:
    """One client for all threads."""
    try:
        openai: Any = import_module("openai")
    except ImportError as error:
        raise PlanError("asking a server needs its client", given="http", hint="pip install 'rung[remote]'") from error
    _check_url(server.url)
    # local servers need no key, but the client refuses to start without one
    key = _api_key(server.url) or NO_KEY
    # A redirect would send the prompts to a server that nobody named.
    hooks = {} if _is_openai(server.url) else {"event_hooks": {"request": [partial(_keep_own_headers, key)]}}
    transport = openai.DefaultHttpxClient(follow_redirects=False, **hooks)
    options = {"max_retries": server.retries, "timeout": server.timeout, "http_client": transport}
    return openai.OpenAI(base_url=server.url, api_key=key, **options)


def _keep_own_headers(key: str, request: Any) -> None:
    """Remove what the client adds from variables of OpenAI's own: organization, project and further headers."""
    for name in list(request.headers):
        if name.lower() not in SENT_HEADERS:
            del request.headers[name]
    request.headers["authorization"] = f"Bearer {key}"


def _ask_one(client: Any, server: Server, request: ChatRequest) -> list[ServerAnswer]:
    """The answers to one request; `_RefusedError` where it fails for good, a `RungError` where all others would too."""
    openai: Any = import_module("openai")
    key = client.api_key

    # servers quote the key or whole pages in errors: both must stay out of logs
    def clean(error: Exception) -> str:
        return " ".join(str(error).split()).replace(key, "***")[:300] if key != NO_KEY else str(error)[:300]

    try:
        messages = list(request.messages)
        answer = client.chat.completions.create(model=server.model, messages=messages, **request.settings)
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        summary = f"the server refuses the key in {API_KEY_VARIABLE}: {clean(error)}"
        hint = None if key != NO_KEY else f"put the key of this server into the environment: {API_KEY_VARIABLE}=..."
        raise ConfigError(summary, where=server.url, hint=hint) from None
    except openai.NotFoundError as error:
        raise ConfigError(f"no such model there: {clean(error)}", where=server.url, given=server.model) from None
    except openai.APIConnectionError as error:  # a timeout is one, too
        summary = f"the server cannot be reached, after {server.retries} further tries: {clean(error)}"
        hint = "the answers so far are kept: the same command continues"
        raise CheckpointError(summary, where=server.url, hint=hint) from None
    except openai.APIStatusError as error:
        if 300 <= error.status_code < 400:
            target = error.response.headers.get("location")
            summary, hint = "the server redirects, which is not followed", "give the URL that answers"
            raise ConfigError(summary, where=server.url, given=target, hint=hint) from None
        raise _RefusedError(f"{type(error).__name__}: {clean(error)}") from None
    except openai.OpenAIError as error:
        raise _RefusedError(f"{type(error).__name__}: {clean(error)}") from None
    except (ValueError, RecursionError) as error:
        raise _RefusedError(f"the answer is not JSON: {clean(error)}") from None
    return _parse_answer(answer, int(request.settings.get("n", 1)))


def _is_openai(url: str) -> bool:
    address = urlsplit(url)
    host = (address.hostname or "").removesuffix(".")
    return address.scheme == "https" and (host == OPENAI_HOST or host.endswith("." + OPENAI_HOST))  # eu.api.openai.com


def _api_key(url: str) -> str | None:
    """The key for the server at this URL, None without one."""
    own_key = os.environ.get(API_KEY_VARIABLE)
    return own_key or (os.environ.get(OPENAI_KEY_VARIABLE) if _is_openai(url) else None) or None


def _check_url(url: str) -> None:
    """Raise `ConfigError` for what is no URL, and for plain http to another machine.

    Prompts, answers and key would cross the network open.
    """
    try:
        address = urlsplit(url)
        host, port = address.hostname, address.port
    except ValueError as error:
        raise ConfigError(f"this is no URL: {error}", given=url, hint=_URL_HINT) from error
    host = (host or "").removesuffix(".")  # a name that ends in a dot is the whole name
    if not host or port == 0 or visible(url) != url or url != url.strip():
        raise ConfigError("this is no URL of a server", given=url, hint=_URL_HINT)
    if address.scheme != "http" or host == "localhost" or os.environ.get(ALLOW_HTTP_VARIABLE) == "1":
        return
    try:
        host_address = ip_address(host)
        # servers print 0.0.0.0 as their own address: a connection to it stays on this machine
        is_loopback = host_address.is_loopback or host_address.is_unspecified
    except ValueError:  # a name
        is_loopback = host.endswith(".localhost")
    if not is_loopback:
        hint = f"use https, a tunnel to localhost, or {ALLOW_HTTP_VARIABLE}=1 for a network that you trust"
        raise ConfigError("plain http to another machine: everybody between could read along", given=url, hint=hint)


def _parse_answer(answer: Any, expected_count: int) -> list[ServerAnswer]:
    # the client does not check types: of a server that answers in another form any value may come
    choices = getattr(answer, "choices", None)
    choices = choices if isinstance(choices, list) else []
    texts = [_text_of(getattr(getattr(choice, "message", None), "content", None)) for choice in choices]
    if len(texts) != expected_count or None in texts:
        raise _RefusedError(f"{len(texts)} answers where {expected_count} were asked for, or one without text")
    return [
        ServerAnswer(str(text), getattr(choice, "finish_reason", None) == "stop")
        for text, choice in zip(texts, choices, strict=True)
    ]


def _text_of(content: object) -> str | None:
    """The text of an answer; None without one. Parts of the type text are joined, and reasoning is left out.

    Mistral's reasoning models answer in parts (`thinking`, then `text`). Half a character becomes U+FFFD: a file in
    UTF-8 cannot hold it, and the answer has been paid for.
    """
    if isinstance(content, list):
        # of an extension of OpenAI's API the client makes no objects
        parts = [part for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        texts = [part.get("text") for part in parts]
        content = "".join(map(str, texts)) if texts and all(isinstance(text, str) for text in texts) else None
    return _HALF_CHARACTER.sub("\ufffd", content) if isinstance(content, str) else None
