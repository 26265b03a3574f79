"""GGUF files behind the routes: llama.cpp computes them, in a process a file.

llama.cpp's server speaks OpenAI's API too, but not to the letter: it samples by defaults of its own, ignores fields
that it does not know, counts the tokens of one answer of several, and lets any number of requests wait. Here a request
is read as for a run, each answer is asked for alone with every setting said, and parts are written in the same form.

What llama.cpp has beyond a run is followed: JSON schemas, penalties, a choice of tools, calls of tools as streams.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import httpx2
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from rung.errors import ConfigError, PlanError
from rung.exporting.llama_cpp_process import LlamaCppError, LlamaCppOptions, LlamaCppProcess, is_installed
from rung.models.slot_batch import RowSampling
from rung.serving.engine import Counters
from rung.serving.events import DONE, error_event, event_stream
from rung.serving.gguf_facts import GgufFacts, read_gguf_facts
from rung.serving.protocol import (
    DEFAULT_MAX_TOKENS,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerationRequest,
    Reply,
    RequestError,
    ScoreRequest,
    no_embeddings_error,
    no_scores_error,
    usage,
    validation_request_error,
)
from rung.serving.running import queue_full_error, unless_client_leaves
from rung.types import Message

T = TypeVar("T")
CONNECT_SECONDS = 10.0
SEEDS = 2**32 - 1
"""llama.cpp's seeds; the next number would be a random one."""
MIN_CONTEXT = 512
"""Tokens of a request below which a file is not served."""
NEUTRAL_SAMPLING = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
"""What a request to OpenAI's API expects where it says nothing; llama.cpp's own defaults are others."""
MAX_ROWS = 256
"""llama.cpp's sequences."""
MAX_SCHEMA_BYTES, MAX_TOOLS_BYTES = 16 * 2**10, 64 * 2**10
"""A grammar is made of a schema, of 3,000 optional properties in minutes, and nobody else is answered meanwhile."""
HEALTH_SECONDS = 5.0
"""How long llama.cpp may take to say that it is well."""
AnswerRequest = ChatRequest | CompletionRequest
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class PlainFormat(BaseModel):
    """`response_format` of text, or of any JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object"]


class JsonSchema(BaseModel):
    """A schema with its name."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    name: str = "schema"
    description: str | None = None
    strict: bool | None = None
    fields: dict[str, Any] = Field(alias="schema")


class SchemaFormat(BaseModel):
    """`response_format` with a JSON schema, as OpenAI has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["json_schema"]
    json_schema: JsonSchema


class LlamaCppFields(BaseModel):
    """Fields of a request that llama.cpp follows and a run does not."""

    model_config = ConfigDict(extra="ignore", strict=True)

    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    min_p: Probability | None = None
    logit_bias: dict[str, Bias] | None = Field(default=None, max_length=1024)
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tool_choice: Literal["auto", "none", "required"] | None = None
    parallel_tool_calls: bool | None = None


CHAT_FIELDS = frozenset(LlamaCppFields.model_fields)
COMPLETION_FIELDS = CHAT_FIELDS - {"response_format", "tool_choice", "parallel_tool_calls"}


class LlamaCppModel:
    """A GGUF file in llama.cpp. Raises `PlanError` where it is not installed, or does not load the file."""

    def __init__(
        self,
        name: str,
        file: Path,
        *,
        max_rows: int,
        max_waiting: int,
        cache_bytes: int,
        threads: int,
        beginnings_bytes: int = 0,
    ) -> None:
        if not is_installed():
            raise PlanError("GGUF files are served by llama.cpp", where=str(file), hint="pip install 'rung[serve]'")
        if max_rows > MAX_ROWS:
            raise ConfigError("llama.cpp has no more rows", where="--rows", given=max_rows, allowed=f"up to {MAX_ROWS}")
        self.name, self.max_rows, self.max_waiting = name, max_rows, max_waiting
        self.counters, self.running = Counters(), 0
        self.facts = read_gguf_facts(file)
        self.context = _context(self.facts, file, max_rows, cache_bytes)
        options = LlamaCppOptions(
            self.context * max_rows,
            threads,
            max_rows,
            computes_embeddings=self.facts.is_encoder,
            kept_bytes=beginnings_bytes,
        )
        try:
            self._process = LlamaCppProcess(file, options)
        except LlamaCppError as error:
            raise PlanError("llama.cpp does not load this file", where=str(file), given=str(error)) from error
        # without the proxy of the environment; an answer may take as long as it takes
        self._client = httpx2.AsyncClient(
            base_url=self._process.url,
            headers={"authorization": f"Bearer {self._process.key}"},
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            # llama.cpp closes connections at moments of its own: none is used twice
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,
        )

    async def is_well(self) -> bool:
        """Whether llama.cpp answers."""
        try:
            response = await self._client.get("/health", timeout=HEALTH_SECONDS)
        except httpx2.HTTPError:
            return False
        return bool(response.status_code == httpx2.codes.OK)

    @property
    def waiting(self) -> int:
        """Answers that wait for a slot."""
        return max(0, self.running - self.max_rows)

    def close(self) -> None:
        """End llama.cpp."""
        self._process.close()

    async def disconnect(self) -> None:
        """Close the connections to llama.cpp, in the event loop that opened them."""
        await self._client.aclose()

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self._require_decoder()
        extra = self._followed(asked, CHAT_FIELDS)
        if extra.get("tool_choice") == "required" and not asked.tools:
            raise RequestError("there are no `tools` of which one could be called", param="tool_choice")
        _require_bounded(extra.get("response_format"), MAX_SCHEMA_BYTES, "response_format")
        _require_bounded(asked.tools, MAX_TOOLS_BYTES, "tools")
        messages = [_message(*pair) for pair in zip(asked.messages, asked.turns(), strict=True)]
        body: dict[str, Any] = {**NEUTRAL_SAMPLING, **extra, "messages": messages}
        if asked.tools:
            body["tools"] = asked.tools
        await self._require_shown(body)
        if asked.logprobs:
            body |= {"logprobs": True, "top_logprobs": max(1, asked.shown_logprobs)}
        samplings = asked.samplings(asked.max_new_tokens or min(DEFAULT_MAX_TOKENS, self.context), 0)
        bodies = [body | _sampling(sampling, asked) for sampling in samplings]
        return await self._answer(request, asked, Reply("chat.completion", self.name), bodies)

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        """POST /v1/completions."""
        self._require_decoder()
        extra = self._followed(asked, COMPLETION_FIELDS)
        if asked.echo:
            raise RequestError("llama.cpp has no echo, and no log-probabilities of a prompt", param="echo")
        max_tokens = asked.checked_max_tokens()
        body = {**NEUTRAL_SAMPLING, **extra}
        if asked.logprobs is not None:
            body["logprobs"] = max(1, asked.logprobs)
        bodies = []
        for number, prompt in enumerate(asked.prompts()):
            if not prompt or not (isinstance(prompt, str) or all(0 <= i < self.facts.vocabulary for i in prompt)):
                raise RequestError(f"a prompt has tokens, each below {self.facts.vocabulary}", param="prompt")
            samplings = asked.samplings(max_tokens, 0, number)
            bodies += [body | {"prompt": prompt} | _sampling(sampling, asked) for sampling in samplings]
        return await self._answer(request, asked, Reply("text_completion", self.name), bodies)

    async def score(self, asked: ScoreRequest, request: Request) -> Response:
        """POST /v1/score: not here."""
        raise no_scores_error()

    async def embed(self, asked: EmbeddingRequest, request: Request) -> Response:
        """POST /v1/embeddings of an encoder."""
        if not self.facts.is_encoder:
            raise no_embeddings_error()
        body = {"input": asked.texts(), "encoding_format": asked.encoding_format}
        async with _Admitted(self, len(body["input"])) as admitted:
            response = await unless_client_leaves(request, self._post("/v1/embeddings", body))
            admitted.is_done = True
        self.counters.answers += len(body["input"])
        self.counters.prompt_tokens += response["usage"]["prompt_tokens"]
        return JSONResponse({**response, "model": self.name})

    def _require_decoder(self) -> None:
        if self.facts.is_encoder:
            raise RequestError("this file is an encoder: /v1/embeddings asks it", param="model")

    async def _answer(
        self, request: Request, asked: AnswerRequest, reply: Reply, bodies: Sequence[dict[str, Any]]
    ) -> Response:
        """A response of as many answers as bodies."""
        path = "/v1/chat/completions" if isinstance(asked, ChatRequest) else "/v1/completions"
        if asked.n > self.max_rows:
            raise RequestError(f"this server generates {self.max_rows} answers at once", param="n")
        if asked.stream:
            return await self._stream(request, asked, reply, path, bodies)
        async with _Admitted(self, len(bodies)) as admitted:
            wholes = await unless_client_leaves(request, _all([self._post(path, body) for body in bodies]))
            admitted.is_done = True
        shape = _shape(asked)
        choices = [shape(whole["choices"][0], 0) | {"index": i} for i, whole in enumerate(wholes)]
        counts = [_counts(whole) for whole in wholes]
        # answers to one prompt: its tokens count once
        total = usage(sum(c[0] for c in counts[:: asked.n]), sum(c[1] for c in counts))
        self._count(total, len(wholes))
        return JSONResponse(reply.whole(choices, total))

    async def _stream(
        self,
        request: Request,
        asked: AnswerRequest,
        reply: Reply,
        path: str,
        bodies: Sequence[dict[str, Any]],
    ) -> Response:
        stack = AsyncExitStack()
        try:
            admitted = await stack.enter_async_context(_Admitted(self, len(bodies)))
            # an error comes before the status is sent
            beginnings = [self._begin(stack, path, body) for body in bodies]
            streams = await unless_client_leaves(request, _all(beginnings))
        except BaseException:
            await stack.aclose()
            raise
        return _Relay(stack, self._events(streams, asked, reply, admitted))

    async def _begin(self, stack: AsyncExitStack, path: str, body: Mapping[str, Any]) -> httpx2.Response:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        try:
            response = await stack.enter_async_context(self._client.stream("POST", path, json={**body, **options}))
            if response.status_code != httpx2.codes.OK:
                raise _refused(await response.aread())
        except httpx2.HTTPError as error:
            raise self._ended(error) from None
        return response

    async def _events(
        self, streams: Sequence[httpx2.Response], asked: AnswerRequest, reply: Reply, admitted: _Admitted
    ) -> AsyncIterator[str]:
        """The parts of all answers as they come."""
        parts = asyncio.Queue[_Part](maxsize=64)
        readers = [asyncio.create_task(_read_parts(i, stream, parts)) for i, stream in enumerate(streams)]
        left, places, shape, counts = len(streams), [0] * len(streams), _shape(asked), [(0, 0)] * len(streams)
        try:
            while left:
                index, part = await parts.get()
                if isinstance(part, Exception):
                    admitted.is_done = True
                    yield error_event(self._ended(part).message)
                    return
                if part is None:
                    left -= 1
                    continue
                if "usage" in part:
                    counts[index] = _counts(part)
                for choice in part.get("choices", ()):
                    sent = shape(choice, places[index]) | {"index": index}
                    places[index] += len(choice.get("text", ""))
                    yield json.dumps(reply.chunk([sent]))
            admitted.is_done = True
            total = usage(counts[0][0], sum(answer for _, answer in counts))
            self._count(total, len(streams))
            if asked.include_usage:
                yield json.dumps(reply.chunk([], total))
            yield DONE
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    def _followed(self, asked: GenerationRequest, names: frozenset[str]) -> dict[str, Any]:
        """The fields that only llama.cpp follows. Raises `RequestError` for a field that nobody follows."""
        asked.refuse_unknown(names)
        given = {name: value for name, value in (asked.model_extra or {}).items() if name in names}
        try:
            fields = LlamaCppFields.model_validate(given)
        except ValidationError as error:
            raise validation_request_error(error) from None
        for token in fields.logit_bias or ():
            if not (token.isdecimal() and len(token) < 10 and int(token) < self.facts.vocabulary):
                summary = f"logit_bias: a key is the number of a token, below {self.facts.vocabulary}"
                raise RequestError(summary, param="logit_bias")
        return fields.model_dump(exclude_none=True, by_alias=True)

    async def _require_shown(self, body: Mapping[str, Any]) -> None:
        """Raise `RequestError` for tools, and calls of them, that the template of the file leaves out."""
        messages = body["messages"]
        without_calls = [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]
        # what is asked of the template: the messages, without their calls, and with tools that can be called
        asked = [{"messages": messages}]
        asked += [{"messages": without_calls}] if without_calls != messages else []
        asked += [{"messages": messages, "tools": body["tools"]}] if body.get("tools") else []
        if len(asked) == 1:
            return
        texts = [shown["prompt"] for shown in await _all([self._post("/apply-template", each) for each in asked])]
        if texts[0] in texts[1:]:
            raise RequestError("the chat template of this file shows no tools, or no calls of them", param="tools")

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        try:
            response = await self._client.post(path, json=body)
        except httpx2.HTTPError as error:
            raise self._ended(error) from None
        if response.status_code != httpx2.codes.OK:
            raise _refused(response.content)
        return response.json()

    def _count(self, total: Mapping[str, int], answers: int) -> None:
        self.counters.answers += answers
        self.counters.prompt_tokens += total["prompt_tokens"]
        self.counters.generated_tokens += total["completion_tokens"]

    def _ended(self, error: Exception) -> RequestError:
        return RequestError(f"llama.cpp does not answer: {type(error).__name__}", status=500)


class _Admitted:
    """Answers that are being computed or wait; as a context. Raises `RequestError` where too many wait."""

    def __init__(self, model: LlamaCppModel, answers: int) -> None:
        self.model, self.answers, self.is_done = model, answers, False

    async def __aenter__(self) -> _Admitted:
        if self.model.running and self.model.running + self.answers > self.model.max_rows + self.model.max_waiting:
            self.model.counters.refused += 1
            raise queue_full_error()
        self.model.counters.requests += 1
        self.model.running += self.answers
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.model.running -= self.answers
        was_refused = kind is not None and issubclass(kind, RequestError)
        self.model.counters.cancelled += not self.is_done and not was_refused


class _Relay(Response):
    """A stream whose sources are closed however it ends, also where it never began."""

    def __init__(self, stack: AsyncExitStack, parts: AsyncIterator[str]) -> None:
        self.stack, self.events = stack, event_stream(parts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.stack:
            await self.events(scope, receive, send)


def _context(facts: GgufFacts, file: Path, rows: int, cache_bytes: int) -> int:
    """Tokens of prompt and answer of each request, by the memory for keys and values."""
    if facts.is_encoder:
        return facts.context
    context = min(facts.context, cache_bytes // (rows * facts.token_bytes))
    if context < min(MIN_CONTEXT, facts.context):
        given = f"{rows} rows of {context:,} tokens in {cache_bytes / 2**20:,.0f} MB"
        hint = "a larger --cache, or fewer --rows"
        raise PlanError("there is no memory for requests to this file", where=str(file), given=given, hint=hint)
    return context


def _message(message: ChatMessage, turn: Message) -> dict[str, Any]:
    """A message as llama.cpp takes it, with its text as one."""
    given = {"tool_calls": message.tool_calls, "name": message.name, "tool_call_id": message.tool_call_id}
    return {"role": turn.role, "content": turn.content} | {name: value for name, value in given.items() if value}


def _require_bounded(value: Any, limit: int, name: str) -> None:
    if value and len(json.dumps(value)) > limit:
        raise RequestError(f"{name} has more than {limit // 2**10} KiB", param=name)


def _sampling(sampling: RowSampling, asked: GenerationRequest) -> dict[str, Any]:
    """The settings of one answer."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed % SEEDS,
        "stop": list(asked.stop or ()),
    }


def _shape(asked: AnswerRequest) -> Callable[[Mapping[str, Any], int], dict[str, Any]]:
    """Makes a choice one of the route: llama.cpp has the log-probabilities of chats for both.

    The second argument is the number of characters before the choice. llama.cpp gives log-probabilities only beside at
    least one of the most probable tokens, which are left out where none was asked for.
    """
    return partial(_chat_shape if isinstance(asked, ChatRequest) else _completion_shape, asked.shown_logprobs)


def _chat_shape(shown: int, choice: Mapping[str, Any], start: int) -> dict[str, Any]:
    found = {**choice, "logprobs": None}
    if "role" in choice.get("delta", {}) and choice["delta"].get("content") is None:
        found["delta"] = {**choice["delta"], "content": ""}
    if logprobs := choice.get("logprobs"):
        content = [
            {**_entry(entry), "top_logprobs": [_entry(top) for top in entry["top_logprobs"][:shown]]}
            for entry in logprobs["content"]
        ]
        found["logprobs"] = {"content": content, "refusal": None}
    return found


def _entry(token: Mapping[str, Any]) -> dict[str, Any]:
    return {key: token[key] for key in ("token", "logprob", "bytes")}


def _completion_shape(shown: int, choice: Mapping[str, Any], start: int) -> dict[str, Any]:
    logprobs = choice.get("logprobs")
    if not logprobs:
        return {**choice}
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in logprobs["content"]:
        found["tokens"].append(entry["token"])
        found["token_logprobs"].append(entry["logprob"])
        tops = reversed(entry["top_logprobs"][:shown])
        found["top_logprobs"].append({top["token"]: top["logprob"] for top in tops})
        found["text_offset"].append(start)
        start += len(entry["token"])
    return {**choice, "logprobs": found}


def _counts(whole: Mapping[str, Any]) -> tuple[int, int]:
    return whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]


def _refused(body: bytes) -> RequestError:
    """What llama.cpp says of a request; its own faults have no status of their own."""
    try:
        error = json.loads(body)["error"]
        message, kind = str(error["message"]), error.get("type")
    except (ValueError, TypeError, KeyError):
        message, kind = "it gives no reason", None
    if message.startswith("The model produced output"):  # a cut answer is not of its format either
        summary = "the answer is not of the format that was asked for: it may have been cut at max_tokens"
        return RequestError(summary, status=500)
    is_too_long = kind == "exceed_context_size_error" or "physical batch size" in message
    if is_too_long:  # its own advice is for who started it
        message = message.partition(", try")[0].partition(". increase")[0]
    code = "context_length_exceeded" if is_too_long else None
    return RequestError(f"llama.cpp refuses this request: {message}", code=code)


async def _all(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, which run at once; the first error ends the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


_Part = tuple[int, dict[str, Any] | Exception | None]
"""Number of the answer, and a part of it, its end, or what ended it too early."""


async def _read_parts(index: int, stream: httpx2.Response, parts: asyncio.Queue[_Part]) -> None:
    try:
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                await parts.put((index, json.loads(line.removeprefix("data: "))))
    except (httpx2.HTTPError, ValueError) as error:
        await parts.put((index, error))
    else:
        await parts.put((index, None))
