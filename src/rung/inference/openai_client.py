"""Client for models behind an OpenAI-compatible server (vLLM, llama.cpp, Ollama).

Every answer is written to a journal when it arrives, so a killed command resumes without asking again (FAILURES 28).
The openai client retries temporary failures (connections, 408, 409, 429, 5xx) with exponential backoff or the delay the
server requests. Permanent failures are returned by name, never as rows. Threads instead of asyncio: the caller stays
synchronous, and a few dozen requests need no more. `Server` is one of the two models of `inference.ask`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from ipaddress import ip_address
from itertools import islice
from threading import Lock
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from rung.console import ProgressBar, print_status, visible
from rung.data.messages import message_to_json
from rung.errors import CheckpointError, ConfigError, PlanError
from rung.inference.ask import Answer, Choices, Conversation, FailedRequest, Replies, Reply, chunk_seed
from rung.inference.journal import Journal, request_key
from rung.inference.options import named_logprobs, option_logprobs
from rung.models.generate import Sampling

T = TypeVar("T")
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
OUTAGE_STATUSES = frozenset({402, 408, 409, 425, 429, 502, 503, 504})
"""Statuses that say nothing about one request: an account without money or quota, a server that is overloaded."""
MAX_ERRORS_IN_A_ROW = 8
"""Requests in a row that end in an error of the server (500) before it counts as down."""
FAILED = "failed"
"""Name of the reason in the journal entry of a request that failed for good."""
SENT_HEADERS = frozenset(
    {"host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length", "authorization"}
)
"""Headers that other servers than OpenAI's get."""
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
TOP_LOGPROBS = 20
"""Most probable tokens that a server is asked for where an option is chosen: the most that OpenAI's API gives."""
RESUME_HINT = "the answers so far are kept: the same command continues, of training with --resume"
_WITHOUT_LOGPROBS = "without logprobs"
"""Key of the journal entry that says that a server gives none."""
QUEUED_PER_WORKER = 4
"""Submitted requests per concurrent one: enough to keep all workers busy, few enough to cancel quickly."""


@dataclass(frozen=True)
class Server:
    """A model behind a server, and the settings of its requests."""

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
    hint: str = RESUME_HINT
    """What to do when it cannot be reached."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """URL and name of the model."""
        return {"url": self.url, "model": self.model}

    def ask(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        journal: Journal,
        *,
        title: str | None = "ask",
        keep_failures: bool = False,
    ) -> Replies:
        """Answer every conversation, each reply written to the journal when it arrives; permanent failures by name.

        Equal requests are sent once. Raises `ConfigError` if the server refuses the key or does not know the model,
        `CheckpointError` if it cannot be reached; replies up to then are kept.
        """
        requests = [_chat_request(conversation, i, sampling) for i, conversation in enumerate(conversations)]
        return self._send(requests, journal, title=title, keep_failures=keep_failures)

    def choose(
        self,
        conversations: Sequence[Conversation],
        options: Sequence[str],
        journal: Journal,
        *,
        max_new_tokens: int,
        title: str | None = "choose",
    ) -> Choices:
        """Log-probabilities of the token with which the server names an option, normalized over the options.

        A server without log-probabilities is asked again without them, and then the option that it names has all of the
        probability. NaN where it names none.
        """
        # temperature 0: the probabilities are those of the token, whatever is drawn
        sampling = Sampling(max_new_tokens)
        plain = [_chat_request(conversation, 0, sampling) for conversation in conversations]
        settings: dict[str, Any] = {"keep_failures": True, "options": tuple(options)}
        replies: list[Reply | None] = [None] * len(plain)
        if journal.get(_WITHOUT_LOGPROBS) is None:
            requests = [{**request, "logprobs": True, "top_logprobs": TOP_LOGPROBS} for request in plain]
            try:
                replies, _ = self._send(requests, journal, title=title, **settings)
            except _FailingServerError:  # some answer 500 to a setting that they do not know
                replies = [None] * len(plain)
        missing = [i for i, reply in enumerate(replies) if reply is None]
        without, _ = self._send([plain[i] for i in missing], journal, title=None, **settings)
        if len(missing) == len(plain) and any(without) and journal.get(_WITHOUT_LOGPROBS) is None:
            # every later request would be sent twice
            journal.add(_WITHOUT_LOGPROBS, {"url": self.url})
            print_status("the server gives no log-probabilities: the option that it names gets all of them")
        for i, reply in zip(missing, without, strict=True):
            replies[i] = reply
        rows = [option_logprobs(reply, options) for reply in replies]
        return Choices(np.array(rows, dtype=np.float64).reshape(len(rows), len(options)), replies)

    def _send(
        self,
        requests: Sequence[dict[str, Any]],
        journal: Journal,
        *,
        title: str | None,
        keep_failures: bool,
        options: tuple[str, ...] = (),
    ) -> Replies:
        keys = [request_key(self.model, request) for request in requests]
        kept = {key: value for key in keys if (value := journal.get(key)) is not None}
        if not keep_failures:
            kept = {key: value for key, value in kept.items() if FAILED not in value}
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in kept}
        known = sum(key in kept for key in keys)
        if known and title is not None:
            print_status(f"going on after {known:,} of {len(keys):,} requests, kept in {journal.path}")
        with ProgressBar(title, known + len(missing), known) as bar:

            def keep(key: str, reply: Reply) -> None:
                kept[key] = {"reply": reply.to_json()}
                journal.add(key, kept[key])
                bar.advance()

            ask = partial(_ask_for_all, server=self, options=options)
            for key, reason in answer_concurrently(self, missing, ask, keep).items():
                kept[key] = {FAILED: reason}
                if keep_failures:
                    journal.add(key, kept[key])
        stored = [kept[key] for key in keys]
        failures = [FailedRequest(i, value[FAILED]) for i, value in enumerate(stored) if FAILED in value]
        return Replies([Reply.from_json(v["reply"]) if "reply" in v else None for v in stored], failures)


def _chat_request(conversation: Conversation, index: int, sampling: Sampling) -> dict[str, Any]:
    """The arguments of a request in the form of the server's API."""
    settings: dict[str, Any] = {"n": sampling.answers_per_prompt, "temperature": sampling.temperature}
    # Not negative in a signed 32-bit integer, in which a server may read it.
    settings |= {"max_tokens": sampling.max_new_tokens, "seed": chunk_seed(sampling.seed, index) % 2**31}
    if conversation.tools:
        settings["tools"] = json.loads(conversation.tools)
    return {"messages": [message_to_json(turn) for turn in conversation.turns], **settings}


def answer_concurrently(
    server: Server,
    requests: Mapping[str, dict[str, Any]],
    send: Callable[[Any, dict[str, Any]], T],
    on_reply: Callable[[str, T], None],
) -> dict[str, str]:
    """Send all requests; `on_reply` gets each reply with its key as it arrives. Returns why others fail for good.

    `send` gets the client and a request. `on_reply` is called by the thread that asked, one at a time: a reply is kept
    before that thread asks for the next. Raises a `RungError` for what would stop all of them.
    """
    client = make_client(server)
    remaining = iter(requests.items())
    in_flight: dict[Future[None], str] = {}
    reasons: dict[str, str] = {}
    errors_in_a_row, lock = 0, Lock()

    def ask(key: str, request: dict[str, Any]) -> None:
        reply = send(client, request)
        with lock:
            on_reply(key, reply)

    def take(future: Future[None]) -> None:
        nonlocal errors_in_a_row
        key = in_flight.pop(future)
        try:
            future.result()
        # only this request fails; every other error stops all of them
        except RefusedError as error:
            reasons[key] = str(error)
            errors_in_a_row = errors_in_a_row + 1 if error.is_of_server else 0
            if errors_in_a_row >= MAX_ERRORS_IN_A_ROW:
                summary = f"the server fails: {error}"
                raise _FailingServerError(summary, where=server.url, hint=server.hint) from None
        else:
            errors_in_a_row = 0

    with closing(client), ThreadPoolExecutor(server.concurrency) as pool:
        try:
            # a bounded queue instead of submitting all: memory, and a stop that does not wait for thousands
            while True:
                for key, request in islice(remaining, QUEUED_PER_WORKER * server.concurrency - len(in_flight)):
                    in_flight[pool.submit(ask, key, request)] = key
                if not in_flight:
                    return reasons
                for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                    take(future)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)  # requests in flight have been paid for, and are kept
            raise


class _FailingServerError(CheckpointError):
    """Every request ends in an error of the server."""


class RefusedError(Exception):
    """The server rejects one request for good; others may succeed."""

    def __init__(self, reason: str, *, is_of_server: bool = False) -> None:
        super().__init__(reason)
        self.is_of_server = is_of_server
        """Whether it is an error of the server, which a server that is down gives to every request."""


def make_client(server: Server) -> Any:
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


@contextmanager
def translated_errors(client: Any, server: Server) -> Iterator[None]:
    """Raise `RefusedError` for a request that fails for good, and a `RungError` where all others would fail too."""
    openai: Any = import_module("openai")
    key = client.api_key

    # servers quote the key or whole pages in errors: both must stay out of logs
    def clean(error: Exception) -> str:
        return " ".join(str(error).split()).replace(key, "***")[:300] if key != NO_KEY else str(error)[:300]

    try:
        yield
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        summary = f"the server refuses the key in {API_KEY_VARIABLE}: {clean(error)}"
        hint = None if key != NO_KEY else f"put the key of this server into the environment: {API_KEY_VARIABLE}=..."
        raise ConfigError(summary, where=server.url, hint=hint) from None
    except openai.NotFoundError as error:
        raise ConfigError(f"no such model there: {clean(error)}", where=server.url, given=server.model) from None
    except openai.APIConnectionError as error:  # a timeout is one, too
        summary = f"the server cannot be reached, after {server.retries} further tries: {clean(error)}"
        raise CheckpointError(summary, where=server.url, hint=server.hint) from None
    except openai.APIStatusError as error:
        if 300 <= error.status_code < 400:
            target = error.response.headers.get("location")
            summary, hint = "the server redirects, which is not followed", "give the URL that answers"
            raise ConfigError(summary, where=server.url, given=target, hint=hint) from None
        if error.status_code in OUTAGE_STATUSES:
            summary = f"the server answers nobody, after {server.retries} further tries: {clean(error)}"
            raise CheckpointError(summary, where=server.url, given=error.status_code, hint=server.hint) from None
        reason, is_of_server = f"{type(error).__name__}: {clean(error)}", error.status_code >= 500
        raise RefusedError(reason, is_of_server=is_of_server) from None
    except openai.OpenAIError as error:
        raise RefusedError(f"{type(error).__name__}: {clean(error)}") from None
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the answer is not JSON: {clean(error)}") from None


def _ask_one(client: Any, server: Server, request: Mapping[str, Any], options: tuple[str, ...]) -> Reply:
    """The reply to one request; raises as `translated_errors`, and `RefusedError` for a reply of another form."""
    start_time = time.perf_counter()
    with translated_errors(client, server):
        answer = client.chat.completions.create(model=server.model, **request)
    prompt_tokens, answer_tokens = _token_counts(answer)
    answers = _parse_answers(answer, int(request["n"]), options)
    return Reply(answers, prompt_tokens, answer_tokens, time.perf_counter() - start_time)


def _ask_for_all(client: Any, request: Mapping[str, Any], server: Server, options: tuple[str, ...]) -> Reply:
    """The reply with all answers: a server that gives fewer than `n` is asked again, with other seeds."""
    reply, asked = _ask_one(client, server, request, options), 1
    while (missing := request["n"] - len(reply.answers)) > 0:
        other = {**request, "n": missing, "seed": (request["seed"] + asked) % 2**31}
        further = _ask_one(client, server, other, options)
        asked += 1
        prompt_tokens = _sum(reply.prompt_tokens, further.prompt_tokens)
        answer_tokens = _sum(reply.answer_tokens, further.answer_tokens)
        answers, seconds = (*reply.answers, *further.answers), reply.seconds + further.seconds
        reply = Reply(answers, prompt_tokens, answer_tokens, seconds)
    return reply


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second


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


def _token_counts(answer: Any) -> tuple[int | None, int | None]:
    """Tokens of the prompt and of all answers, None where the server does not say."""
    usage = getattr(answer, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    first, second = (count if isinstance(count, int) and count >= 0 else None for count in counts)
    return first, second


def _parse_answers(answer: Any, most: int, options: tuple[str, ...]) -> tuple[Answer, ...]:
    """One answer at least and `most` at most: some servers, Ollama among them, ignore `n`."""
    # the client does not check types: of a server that answers in another form any value may come
    choices = getattr(answer, "choices", None)
    choices = choices if isinstance(choices, list) else []
    texts = [_text_of(getattr(getattr(choice, "message", None), "content", None)) for choice in choices]
    if not 0 < len(texts) <= most or None in texts:
        raise RefusedError(f"{len(texts)} answers where {most} were asked for, or one without text")
    return tuple(
        Answer(
            *(str(text), getattr(choice, "finish_reason", None) == "stop"),
            option_logprobs=named_logprobs(choice, str(text), options),
        )
        for text, choice in zip(texts, choices, strict=True)
    )


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
