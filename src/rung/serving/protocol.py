"""Requests and responses of OpenAI's API.

A field that Rung does not have is refused unless it has the value that changes nothing: a client must not believe that
a penalty or a schema was followed. Errors have OpenAI's form.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rung.data.chat import ChatTemplate
from rung.models.slot_batch import DrawnToken, RowSampling
from rung.serving.answers import HALF_CHARACTER, AnswerText
from rung.types import Message

MIN_TEMPERATURE = 1e-5
"""Below it answers are greedy: logits divided by less overflow."""
MAX_ANSWERS, MAX_TOP_LOGPROBS, MAX_STOPS, MAX_TEXTS = 64, 20, 16, 2048
DEFAULT_MAX_TOKENS = 256
"""Tokens of an answer where the request says nothing, as in `rung generate`."""


class RequestError(Exception):
    """A request that cannot be answered."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def body(self) -> dict[str, Any]:
        """The response."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def validation_request_error(error: ValidationError) -> RequestError:
    """The first thing that is wrong with a request."""
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return RequestError(f"{where}: {first['msg']}", param=where or None)


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "top_k": (-1, 0),
}
"""Fields of other servers with the values that change nothing."""
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Fields that say nothing about the answer."""

Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=500)]], Field(max_length=MAX_STOPS)]


class GenerationRequest(BaseModel):
    """What both kinds of completion have."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: int = Field(default=1, ge=1, le=MAX_ANSWERS)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stops | None = None
    temperature: float | int | None = Field(default=None, ge=0, le=100)
    top_p: float | int | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _one_stop(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("stop"), str):
            data = {**data, "stop": [data["stop"]]}
        return data

    def refuse_unknown(self, followed: Collection[str] = ()) -> None:
        """Raise `RequestError` for a field that would not be followed; `followed`: those that the model also has."""
        extra = self.model_extra or {}
        if "tool_choice" not in followed and extra.get("tool_choice") == "none" and getattr(self, "tools", None):
            raise RequestError("leave `tools` out where none may be called", param="tool_choice")
        for name, value in extra.items():
            if name in IGNORED or name in followed or value is None or (name in NEUTRAL and value in NEUTRAL[name]):
                continue
            raise RequestError(f"this server does not have `{name}`: leave it out", param=name)
        options = self.stream_options or {}
        if unknown := set(options) - {"include_usage"}:
            raise RequestError(f"this server does not have `stream_options.{unknown.pop()}`", param="stream_options")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))

    def samplings(self, max_new_tokens: int, top_logprobs: int, prompt_number: int = 0) -> list[RowSampling]:
        """One for each answer to a prompt; without a seed each request draws another one."""
        temperature = 1.0 if self.temperature is None else float(self.temperature)
        temperature = temperature if temperature >= MIN_TEMPERATURE else 0.0
        top_p = 1.0 if self.top_p is None else float(self.top_p)
        seed = uuid.uuid4().int if self.seed is None else self.seed % 2**64
        # hashed: the second answer of one seed must not be the first of the next one
        seeds = [
            np.random.SeedSequence([seed, prompt_number, i]).generate_state(1, np.uint64)[0] for i in range(self.n)
        ]
        return [RowSampling(max_new_tokens, temperature, top_p, int(s) % 2**63, top_logprobs) for s in seeds]


class ChatMessage(BaseModel):
    """A turn."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def turn(self) -> Message:
        """The turn as templates get it. Raises `RequestError` for parts that are no text."""
        role: Any = "system" if self.role == "developer" else self.role
        calls = json.dumps(self.tool_calls) if self.tool_calls else None
        return Message(role, self._text(), tool_calls=calls, name=self.name, tool_call_id=self.tool_call_id)

    def _text(self) -> str:
        if not isinstance(self.content, list):
            return self.content or ""
        for part in self.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestError("this server reads text alone", param="messages")
        return "".join(part["text"] for part in self.content)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=2000)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = None

    @property
    def max_new_tokens(self) -> int | None:
        """The limit of an answer, if the request has one."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def shown_logprobs(self) -> int:
        """Most probable tokens that are shown beside each token."""
        return self.top_logprobs or 0 if self.logprobs else 0

    def turns(self) -> list[Message]:
        """The messages as templates get them. Raises `RequestError` where no answer can follow."""
        turns = [message.turn() for message in self.messages]
        if turns[-1].role == "assistant":
            raise RequestError("the last message is an answer already", param="messages")
        return turns


Prompt = str | list[str] | list[int] | list[list[int]]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def shown_logprobs(self) -> int:
        """Most probable tokens that are shown beside each token."""
        return self.logprobs or 0

    def prompts(self) -> list[str | list[int]]:
        """The prompts, texts or ids. Raises `RequestError` for none or too many."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        if not prompt or len(prompt) > MAX_ANSWERS:
            raise RequestError(f"1 to {MAX_ANSWERS} prompts a request", param="prompt")
        if self.stream and len(prompt) > 1:
            raise RequestError("a stream has one prompt", param="stream")
        return list(prompt)

    def checked_max_tokens(self) -> int:
        """The limit of an answer. Raises `RequestError` for what no response can be made of."""
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        if self.stream and self.echo:
            raise RequestError("a stream has no echo", param="stream")
        if not max_tokens and not self.echo:
            raise RequestError("max_tokens 0 needs echo: nothing would be answered", param="max_tokens")
        return max_tokens


class ScoreRequest(BaseModel):
    """POST /v1/score, as vLLM has it: answers to a question, scored by a reward model."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    text_1: str
    """The question."""
    text_2: str | list[str]
    """Answers."""

    def answers(self) -> list[str]:
        """The answers. Raises `RequestError` for none or too many."""
        answers = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if not 1 <= len(answers) <= MAX_ANSWERS:
            raise RequestError(f"1 to {MAX_ANSWERS} answers a request", param="text_2")
        return answers


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    def texts(self) -> list[str]:
        """The texts. Raises `RequestError` for none, too many or an empty one."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not 1 <= len(texts) <= MAX_TEXTS or not all(texts):
            raise RequestError(f"1 to {MAX_TEXTS} texts a request, none of them empty", param="input")
        return texts


def no_scores_error() -> RequestError:
    """For /v1/score at a model that writes."""
    return RequestError("only a reward model gives scores", param="model")


def no_embeddings_error() -> RequestError:
    """For /v1/embeddings at a model that has none."""
    message = "this model has no embeddings: a GGUF file of an encoder has"
    return RequestError(message, status=404, param="model")


class Reply:
    """The parts that every response of one request has."""

    def __init__(self, kind: Literal["chat.completion", "text_completion"], model: str) -> None:
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int]) -> dict[str, Any]:
        """A response that is sent at once."""
        return {**self.head, "choices": list(choices), "usage": dict(usage)}

    def chunk(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int] | None = None) -> dict[str, Any]:
        """A part of a stream."""
        kind = "chat.completion.chunk" if self.head["object"] == "chat.completion" else "text_completion"
        return {**self.head, "object": kind, "choices": list(choices), **({"usage": dict(usage)} if usage else {})}


def usage(prompt_tokens: int, answer_tokens: int) -> dict[str, int]:
    """Numbers of tokens."""
    total = prompt_tokens + answer_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": answer_tokens, "total_tokens": total}


def token_text(chat: ChatTemplate, token: int) -> str:
    """A token by itself as text."""
    return chat.decode([[token]], mid_document=True)[0]


def chat_logprobs(chat: ChatTemplate, tokens: Sequence[DrawnToken]) -> dict[str, Any]:
    """The `logprobs` of a chat completion; a token that is part of a character has no bytes of its own here."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(chat, token)
        return {"token": text, "logprob": logprob, "bytes": None if HALF_CHARACTER in text else list(text.encode())}

    return {
        "content": [{**entry(t.token, t.logprob), "top_logprobs": [entry(*pair) for pair in t.top]} for t in tokens],
        "refusal": None,
    }


def completion_logprobs(
    chat: ChatTemplate, tokens: Sequence[DrawnToken | None], first_token: int | None, start: int = 0
) -> dict[str, Any]:
    """The `logprobs` of a completion. `first_token` is that of an echoed prompt, which nothing predicts."""
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    place, parts = start, list[int]()
    for t in tokens:
        token = t.token if t is not None else int(first_token or 0)
        found["tokens"].append(token_text(chat, token))
        found["token_logprobs"].append(None if t is None else t.logprob)
        # several tokens may have one text, such as halves of characters: the most probable one keeps it
        tops = None if t is None else {token_text(chat, other): logprob for other, logprob in reversed(t.top)}
        found["top_logprobs"].append(tops)
        found["text_offset"].append(place)
        # a character may come in several tokens: all of them begin where it does
        parts.append(token)
        text = chat.decode([parts], mid_document=True)[0]
        if not text.endswith(HALF_CHARACTER):
            place, parts = place + len(text), []
    return found


def chat_choice(chat: ChatTemplate, index: int, answer: AnswerText, *, logprobs: bool, tools: bool) -> dict[str, Any]:
    """An answer of a chat completion; calls of tools are read in the form of the template."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text.strip()}
    finish_reason: str | None = answer.finish_reason
    if tools and chat.reads_tool_calls and (calls := chat.canonical_calls(answer.text)):
        parsed = [
            {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": _function(call)}
            for call in json.loads(calls)
        ]
        message, finish_reason = {"role": "assistant", "content": None, "tool_calls": parsed}, "tool_calls"
    choice = {"index": index, "message": message, "finish_reason": finish_reason}
    return {**choice, "logprobs": chat_logprobs(chat, answer.tokens) if logprobs else None}


def _function(call: Mapping[str, Any]) -> dict[str, str]:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    return {
        "name": function.get("name", ""),
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
    }
