"""Client for a vLLM server that loads adapters while it serves: answers as token ids with their log-probabilities.

Prompts and answers are token ids in both directions, because text that is tokenized again may have other tokens than
the ones that were drawn. Each adapter gets a name of its own: an adapter that replaces another under one name could
answer from cached keys and values of the older weights. Every reply is checked against its request, since a missing
stop or a shifted log-probability would be learned without an error. Connections, keys, retries and concurrency are
those of `inference.openai_client`. `training.server_sampler` draws rollouts here, `evaluation` greedy answers.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from rung.config.server import ModelServerConfig
from rung.console import print_status
from rung.errors import CheckpointError, ConfigError, PlanError, RungError
from rung.inference.ask import chunk_seed
from rung.inference.openai_client import RefusedError, Server, answer_concurrently, make_client, translated_errors
from rung.models.decoding import OnAnswered
from rung.models.generate import GeneratedAnswer, Sampling

ADAPTER_RETRIES = 2
"""Retries of a request for models or adapters: vLLM answers 500 to an adapter that it cannot load, and a server that is
not there at the start should be said at once."""
STALE_SECONDS = 24 * 3600
"""Age from which on an adapter of an evaluation counts as forgotten."""
MIN_LOGPROB = -9999.0
"""What vLLM writes for a probability of 0, which no drawn token has."""
NEUTRAL_SAMPLING: dict[str, Any] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
"""Extensions of vLLM under which a token is drawn from the plain distribution: unset ones are taken from the
`generation_config.json` of the base, and `ignore_eos` leaves the stops to the request."""


@dataclass(frozen=True)
class AdapterServer:
    """A vLLM server with the base of a run."""

    config: ModelServerConfig
    where: str
    """The setting that names it."""
    hint: str
    """What to do when it cannot be reached."""

    @property
    def _server(self) -> Server:
        config = self.config
        return Server(config.url, config.model, config.concurrency, timeout=config.timeout, hint=self.hint)

    def path_there(self, folder: Path) -> str:
        """The path of a folder as the server sees it. Raises `ConfigError` for one outside `mount`."""
        here = folder.resolve()
        if self.config.mount is None:
            return str(here)
        mounted, _, there = self.config.mount.rpartition(":")
        try:
            inside = here.relative_to(Path(mounted).expanduser().resolve())
        except ValueError:
            summary, allowed = "the server does not see this folder", f"below {mounted}"
            raise ConfigError(summary, where=f"{self.where}.mount", given=str(folder), allowed=allowed) from None
        return str(PurePosixPath(there, *inside.parts))

    def adapter_prefix(self, folder: Path) -> str:
        """What the names of adapters begin with that stand in a folder, which is one folder of the server's files."""
        return f"rung-{sha256(self.path_there(folder).encode()).hexdigest()[:12]}-"

    def adapter_name(self, folder: Path) -> str:
        """A name for a finished adapter, with the time and random digits: another process may ask for the same one."""
        return f"{self.adapter_prefix(folder)}{int(time.time()):x}-{secrets.token_hex(4)}"

    def models(self) -> dict[str, str | None]:
        """Names of the base and of loaded adapters, with the folder of each where the server gives it.

        Raises `ConfigError` where `config.model` is not among them.
        """
        server = replace(self._server, retries=ADAPTER_RETRIES)
        try:
            with closing(make_client(server)) as client, translated_errors(client, server):
                reply: Any = client.get("/models", cast_to=object)
        except RefusedError as error:
            raise self._error(f"the server does not list its models: {error}") from None
        listed = reply.get("data") if isinstance(reply, dict) else None
        cards = [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
        names = {str(card.get("id")): card.get("root") for card in cards}
        if server.model not in names:
            allowed = ", ".join(names) or "none"
            summary, where = "the server has no such model", f"{self.where}.model"
            raise ConfigError(summary, where=where, given=server.model, allowed=allowed)
        return names

    def unload_all(self, prefix: str) -> None:
        """Unload adapters whose names begin with `prefix`: what a killed process left there."""
        for name in [name for name in self.models() if name.startswith(prefix)]:
            self._unload(name)
            print_status(f"unloaded {name}, which an earlier process left on the server")

    def unload_stale(self, prefix: str) -> None:
        """Unload adapters of `adapter_name` that are older than any evaluation: what killed processes left there."""
        for name in [name for name in self.models() if name.startswith(prefix)]:
            made = name.removeprefix(prefix).partition("-")[0]
            if re.fullmatch(r"[0-9a-f]{8}", made) and time.time() - int(made, 16) > STALE_SECONDS:
                self._unload(name)

    @contextmanager
    def adapter(self, name: str, folder: Path) -> Iterator[None]:
        """Within the context the server answers as `name` with the peft adapter in `folder`."""
        self._load(name, self.path_there(folder))
        try:
            yield
        finally:
            try:
                self._unload(name)
            except RungError as error:  # what ended the context says more; the next start unloads it
                print_status(f"{name} stays loaded on the server: {error.summary}")

    def _load(self, name: str, path: str) -> None:
        try:
            self._post("/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except RefusedError as error:
            # a try that the server carried out before its connection failed
            if "already" in str(error) and self.models().get(name) == path:
                return
            hint = "start vLLM with --enable-lora and a --max-lora-rank of at least the rank of the adapter"
            raise self._error(f"the server does not load the adapter: {error}", given=path, hint=hint) from None

    def _unload(self, name: str) -> None:
        try:
            self._post("/unload_lora_adapter", {"lora_name": name})
        except RefusedError as error:
            raise self._error(f"the server does not unload the adapter: {error}", given=name) from None

    def _post(self, path: str, body: dict[str, str]) -> None:
        openai: Any = import_module("openai")
        server = replace(self._server, retries=ADAPTER_RETRIES)
        with closing(make_client(server)) as client, translated_errors(client, server):
            try:
                client.post(path, cast_to=str, body=body)
            except openai.NotFoundError as error:
                detail = " ".join(str(error).split())[:300]
                hint = "start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; where it sees other paths, set `mount`"
                summary = f"the server finds neither {path} nor the adapter: {detail}"
                raise PlanError(summary, where=self.where, given=body.get("lora_path"), hint=hint) from None

    def complete(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        stop_ids: Sequence[int],
        sampling: Sampling,
        vocab_size: int,
        *,
        on_answered: OnAnswered | None = None,
    ) -> list[GeneratedAnswer]:
        """Answers of the model `name` in the order of the prompts; all answers to one prompt are adjacent.

        Log-probabilities are those that the server reports; `on_answered` receives 1 after each prompt. Raises
        `CheckpointError` if the server cannot be reached, or if one reply is not what was asked for: an answer that is
        missing or another one must not be learned.
        """
        server = replace(self._server, model=name)
        common: dict[str, Any] = {"n": sampling.answers_per_prompt, "max_tokens": sampling.max_new_tokens}
        common |= {"temperature": sampling.temperature, "top_p": 1.0, "logprobs": 0}
        common |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
        extension = {**NEUTRAL_SAMPLING, "stop_token_ids": list(stop_ids), "return_token_ids": True}
        requests = {}
        for i, prompt in enumerate(prompts):
            seed = chunk_seed(sampling.seed, i) % 2**31
            requests[str(i)] = {**common, "prompt": list(prompt), "seed": seed, "extra_body": extension}
        answers: dict[str, list[GeneratedAnswer]] = {}
        expected = _Expected(name, frozenset(stop_ids), sampling, vocab_size)
        send = partial(self._complete_one, server=server, expected=expected)

        def keep(key: str, answers_of_prompt: list[GeneratedAnswer]) -> None:
            answers[key] = answers_of_prompt
            if on_answered is not None:
                on_answered(1)

        answer_concurrently(server, requests, send, keep)
        return [answer for key in requests for answer in answers[key]]

    def _complete_one(
        self, client: Any, request: dict[str, Any], *, server: Server, expected: _Expected
    ) -> list[GeneratedAnswer]:
        try:
            with translated_errors(client, server):
                reply = client.completions.create(model=server.model, **request)
        except RefusedError as error:
            raise self._error(f"a prompt got no answer: {error}") from None
        # of a base with several names vLLM answers with the first
        is_base = expected.name == self.config.model
        if not is_base and (name := getattr(reply, "model", None)) != expected.name:
            raise self._error("another model answered", given=name, allowed=expected.name)
        choices = getattr(reply, "choices", None)
        choices = choices if isinstance(choices, list) else []
        if len(choices) != request["n"]:
            raise self._error(f"{len(choices)} answers to a prompt, and {request['n']} were asked for")
        try:
            return [expected.parse(choice, request["prompt"]) for choice in choices]
        except _ReplyError as error:
            raise self._error(f"an answer cannot be used: {error}", hint=error.hint) from None

    def _error(self, summary: str, **parts: Any) -> CheckpointError:
        return CheckpointError(summary, where=self.config.url, **{"hint": self.hint, **parts})


class _ReplyError(Exception):
    """An answer is not what was asked for."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.hint = hint


class _Expected(NamedTuple):
    """What every answer is checked against."""

    name: str
    stop_ids: frozenset[int]
    sampling: Sampling
    vocab_size: int

    def parse(self, choice: Any, prompt: Sequence[int]) -> GeneratedAnswer:
        """The answer in a choice of a reply. Raises `_ReplyError` for anything else than what was asked for."""
        read = getattr(choice, "prompt_token_ids", None)
        if read is not None and read != list(prompt):
            raise _ReplyError("the server read another prompt than the one that was sent")
        ids = self._token_ids(choice)
        logprobs = _logprobs(choice, len(ids))
        *before, last = ids
        if not self.stop_ids.isdisjoint(before):
            raise _ReplyError("it goes on behind a stop token")
        reason, limit = getattr(choice, "finish_reason", None), self.sampling.max_new_tokens
        if last in self.stop_ids and len(ids) <= limit:
            return GeneratedAnswer(before, last, logprobs)
        if reason == "length" and len(ids) == limit:
            return GeneratedAnswer(ids, None, logprobs)
        hint = "an answer ends at a stop token or at max_new_tokens: start vLLM with a --max-model-len that has room"
        raise _ReplyError(f"it ends after {len(ids)} tokens (finish_reason {reason}) without a stop token", hint)

    def _token_ids(self, choice: Any) -> list[int]:
        ids = getattr(choice, "token_ids", None)
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            hint = "vLLM 0.10.2 and later give them (return_token_ids); text is never tokenized again"
            raise _ReplyError("it has no token ids", hint)
        if not all(0 <= i < self.vocab_size for i in ids):
            raise _ReplyError(f"a token is none of the {self.vocab_size:,} tokens of the base")
        return ids


def _logprobs(choice: Any, count: int) -> list[float]:
    values = getattr(getattr(choice, "logprobs", None), "token_logprobs", None)
    if not isinstance(values, list) or len(values) != count:
        length = len(values) if isinstance(values, list) else 0
        raise _ReplyError(f"it has {length} log-probabilities for {count} tokens")
    # a rounded logarithm of 1 may be above 0
    if not all(type(v) in (int, float) and MIN_LOGPROB < v <= 1e-3 for v in values):  # false for what is no number
        raise _ReplyError("a log-probability is no finite number of at most 0")
    return [float(value) for value in values]
