"""Models that this process computes, behind the routes: what a request becomes in the engine, and its response.

`EngineModel` writes answers, `RewardModel` gives scores. Tokenizing is done in threads beside the event loop, in which
a long prompt would stop everybody.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rung.errors import RungError
from rung.models.slot_batch import RowSampling, SlotPrompt
from rung.serving.answers import AnswerText
from rung.serving.catalog import ServedModel
from rung.serving.engine import Engine
from rung.serving.events import chat_events, completion_events, event_stream, tool_events
from rung.serving.protocol import (
    DEFAULT_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Reply,
    RequestError,
    ScoreRequest,
    chat_choice,
    completion_logprobs,
    no_embeddings_error,
    no_scores_error,
    usage,
)
from rung.serving.running import RunningJob
from rung.serving.scoring import prompt_logprobs, scored_documents

T = TypeVar("T")
_TOKENIZING = threading.Lock()
"""Of all models: tokenizers of one base may be one object."""


async def _tokenized(tokenize: Callable[[], T], refused: str, param: str) -> T:
    """What `tokenize` returns, called in another thread. Raises `RequestError` for what it refuses."""

    def locked() -> T:
        with _TOKENIZING:
            return tokenize()

    try:
        return await asyncio.to_thread(locked)
    except RungError as error:
        raise RequestError(f"{refused}: {error.summary}", param=param) from None


class EngineModel:
    """A model that writes answers."""

    def __init__(self, engine: Engine, served: ServedModel) -> None:
        self.engine, self.served = engine, served
        # whoever asks may open no turns
        self.chat_template = served.model.chat.with_control_tokens(None)

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked.refuse_unknown()
        served, chat = self.served, self.chat_template
        turns = asked.turns()
        library = served.model.library
        if library is not None and turns[-1].role == "user":
            # a model that was trained with passages and is asked without them would be another model
            turns[-1] = replace(turns[-1], content=await asyncio.to_thread(library.prepend_passages, turns[-1].content))
        tools = json.dumps(asked.tools) if asked.tools else None
        refused = "the template refuses these messages"
        prompt = await _tokenized(lambda: chat.prompt_ids(turns, tools=tools), refused, "messages")
        limit = self._limit(prompt, asked.max_new_tokens)
        samplings = asked.samplings(limit, asked.shown_logprobs)
        self._require_room(prompt, samplings)
        answers = [AnswerText(chat, limit, (*served.stop_texts, *(asked.stop or ()))) for _ in samplings]
        run = RunningJob(self.engine, served.name, prompt, samplings, answers)
        reply = Reply("chat.completion", served.name)
        logprobs, has_tools = bool(asked.logprobs), bool(asked.tools)
        if asked.stream and not has_tools:
            return event_stream(chat_events(run, reply, chat, logprobs, asked.include_usage))
        await run.finish(request)
        choices = [chat_choice(chat, i, a, logprobs=logprobs, tools=has_tools) for i, a in enumerate(answers)]
        whole = reply.whole(choices, run.usage())
        if asked.stream:  # calls are read from whole answers
            return event_stream(tool_events(reply, whole, asked.include_usage))
        return JSONResponse(whole)

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        """POST /v1/completions."""
        asked.refuse_unknown()
        max_tokens = asked.checked_max_tokens()
        prompts = [await self._prompt_ids(prompt) for prompt in asked.prompts()]
        for prompt in prompts:  # before the first of them is submitted
            self._limit(prompt, max_tokens)
        runs: list[RunningJob] = []
        reply = Reply("text_completion", self.served.name)
        try:
            for number, prompt in enumerate(prompts):
                runs.append(self._completion(asked, prompt, max_tokens, number))
            if asked.stream:
                return event_stream(completion_events(runs[0], reply, self.chat_template, asked))
            for run in runs:
                await run.finish(request)
        except BaseException:
            for run in runs:
                run.cancel()
            raise
        choices = [choice for run in runs for choice in self._choices(run, asked)]
        for index, choice in enumerate(choices):
            choice["index"] = index
        prompt_tokens, answer_tokens = (sum(counts) for counts in zip(*(run.counts() for run in runs), strict=True))
        return JSONResponse(reply.whole(choices, usage(prompt_tokens, answer_tokens)))

    async def score(self, asked: ScoreRequest, request: Request) -> Response:
        """POST /v1/score: not here."""
        raise no_scores_error()

    async def embed(self, asked: EmbeddingRequest, request: Request) -> Response:
        """POST /v1/embeddings: not here."""
        raise no_embeddings_error()

    def _completion(self, asked: CompletionRequest, prompt: list[int], max_tokens: int, number: int) -> RunningJob:
        name, policy = self.served.name, self.served.model.policy
        samplings = asked.samplings(max_tokens, asked.logprobs or 0, number) if max_tokens else []
        self._require_room(prompt, samplings)
        answers = [AnswerText(self.chat_template, max_tokens, asked.stop or (), is_turn=False) for _ in samplings]
        run: RunningJob

        def compute() -> None:
            run.prompt_tokens = prompt_logprobs(policy, prompt, asked.logprobs or 0)

        scores_prompt = asked.echo and asked.logprobs is not None
        run = RunningJob(self.engine, name, prompt, samplings, answers, compute=compute if scores_prompt else None)
        return run

    def _choices(self, run: RunningJob, asked: CompletionRequest) -> list[dict[str, Any]]:
        chat = self.chat_template
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

    def _limit(self, prompt: Sequence[int], wanted: int | None) -> int:
        """Tokens of an answer: as many as were asked for, or by default as there is room for."""
        room, least = self.engine.batches[self.served.name].max_tokens - len(prompt), 1 if wanted is None else wanted
        if room < least:
            message = f"{len(prompt)} tokens of prompt and {least} more do not fit into {room + len(prompt)}"
            raise RequestError(message, code="context_length_exceeded")
        return min(room, DEFAULT_MAX_TOKENS) if wanted is None else wanted

    def _require_room(self, prompt: Sequence[int], samplings: Sequence[RowSampling]) -> None:
        """Raise `RequestError` for what would not fit if it were alone here."""
        if len(samplings) > self.engine.max_rows:
            raise RequestError(f"this server generates {self.engine.max_rows} answers at once", param="n")
        batch = self.engine.batches[self.served.name]
        asked = [SlotPrompt(prompt, samplings)]
        if samplings and batch.cache_bytes(asked, alone=True) > self.engine.cache_bytes:
            raise RequestError("so many answers of this length do not fit into memory", param="n")

    async def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        chat, vocabulary = self.chat_template, self.served.model.policy.base.vocab_size
        if isinstance(prompt, str):
            text = prompt
            prompt = (await _tokenized(lambda: chat.encode([text]), "this is no prompt", "prompt"))[0]
        if not prompt or not all(0 <= token < vocabulary for token in prompt):
            raise RequestError(f"a prompt has at least one token, each below {vocabulary}", param="prompt")
        return prompt


class RewardModel:
    """A reward model: scores, and no answers."""

    def __init__(self, engine: Engine, served: ServedModel) -> None:
        self.engine, self.served = engine, served
        self.chat_template = served.model.chat.with_control_tokens(None)

    async def score(self, asked: ScoreRequest, request: Request) -> Response:
        """POST /v1/score: only differences between answers to one question count."""
        name, scorer = self.served.name, self.served.scorer
        if scorer is None:
            raise no_scores_error()
        limit, answers = self.engine.batches[name].max_tokens, asked.answers()

        def tokenize() -> list[Any]:
            return scored_documents(self.chat_template, asked.text_1, answers, limit)

        documents = await _tokenized(tokenize, "this cannot be scored", "text_2")
        found: list[float] = []
        run = RunningJob(self.engine, name, [], [], [], compute=lambda: found.extend(scorer(documents)))
        await run.finish(request)
        data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(found)]
        head = {"id": f"score-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": name}
        return JSONResponse({**head, "data": data, "usage": usage(sum(map(len, documents)), 0)})

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions: not here."""
        raise _writes_nothing_error()

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        """POST /v1/completions: not here."""
        raise _writes_nothing_error()

    async def embed(self, asked: EmbeddingRequest, request: Request) -> Response:
        """POST /v1/embeddings: not here."""
        raise no_embeddings_error()


def _writes_nothing_error() -> RequestError:
    return RequestError("a reward model writes nothing: /v1/score asks it", param="model")
