"""llama.cpp on a GGUF file: what it tokenizes, renders, answers, and how likely it finds a token.

Its server runs in a process of its own (`llama_cpp_process.py`), whose end an export survives to remove the file.
`proof.py` compares a run with it, and `commands/export_gguf.py` measures with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from rung.errors import GateError
from rung.exporting.llama_cpp_process import LlamaCppError, LlamaCppOptions, LlamaCppProcess

REQUEST_SECONDS = 600.0
"""Longest wait for one answer."""
CERTAIN = 1000.0
"""Added to a token's logit, it makes the token certain."""
_DIRECT = build_opener(ProxyHandler({}))
"""Without the proxy of the environment, which would get the prompts of a server on this machine."""


@dataclass(frozen=True, slots=True)
class LlamaCppAnswer:
    """A greedy answer."""

    ids: list[int]
    stopped: bool
    """False if it was cut."""


class LlamaCpp:
    """A GGUF file in llama.cpp; `with` ends its process.

    `exact` keeps keys and values in float32, to be compared with; otherwise they are as people run it. Raises
    `GateError` with llama.cpp's last words if the file does not load.
    """

    def __init__(
        self, model: Path, context: int, *, threads: int, adapter: Path | None = None, exact: bool = True
    ) -> None:
        self.model = model
        try:
            self._process = LlamaCppProcess(model, LlamaCppOptions(context, threads, adapter=adapter, is_exact=exact))
        except LlamaCppError as error:
            raise self._failure("llama.cpp does not load this file", str(error)) from error

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def _failure(self, summary: str, reason: str) -> GateError:
        return GateError(f"gate publish.gguf failed: {summary}", where=self.model.name, given=reason)

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._process.key}"}
        request = Request(f"{self._process.url}{path}", data, headers)  # noqa: S310 -- our own URL
        try:
            with _DIRECT.open(request, timeout=REQUEST_SECONDS) as response:
                return json.loads(response.read())
        except HTTPError as error:
            reason = error.read().decode(errors="replace")[:300]
            summary = "gate publish.gguf failed: llama.cpp refuses a request"
            raise GateError(summary, where=self.model.name, given=reason) from error
        except (URLError, ConnectionError, TimeoutError) as error:
            raise self._failure("llama.cpp ended", self._process.last_error()) from error

    @cached_property
    def _letter(self) -> int:
        """A token that is a letter."""
        return self.tokenize("a", as_prompt=False)[-1]

    def tokenize(self, text: str, *, as_prompt: bool) -> list[int]:
        """Ids of a text; `as_prompt`: with control tokens, and with BOS if the file says so, as its server reads it."""
        body = {"content": text, "add_special": as_prompt, "parse_special": as_prompt}
        return [int(token) for token in self._post("/tokenize", body)["tokens"]]

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
        """The text of a conversation with the opening of an answer, by the template in the file."""
        body = {"messages": list(messages), **({"tools": list(tools)} if tools else {})}
        return str(self._post("/apply-template", body)["prompt"])

    def top_logprobs(self, prompts: Sequence[Sequence[int]], count: int) -> list[dict[int, float]]:
        """Log-probabilities of the `count` most probable next tokens of each prompt, by id."""
        # The server leaves probabilities out where the token ends the answer or is part of a character, so a letter is
        # chosen; what it reports is computed before that.
        body = {"n_predict": 1, "n_probs": count, "temperature": 0.0, "logit_bias": [[self._letter, CERTAIN]]}
        answers = self._post("/completion", body | {"prompt": [list(p) for p in prompts], "cache_prompt": True})
        answers = answers if isinstance(answers, list) else [answers]
        answers.sort(key=lambda answer: answer["index"])
        entries = [answer["completion_probabilities"][0]["top_logprobs"] for answer in answers]
        return [{int(e["id"]): float(e["logprob"]) for e in entry} for entry in entries]

    def answer(
        self, prompt: Sequence[int], max_tokens: int, *, stop: Sequence[str] = (), bias: Sequence[Any] = ()
    ) -> LlamaCppAnswer:
        """The greedy answer to a prompt, without the token that ends it. `bias`: pairs of an id and what is added."""
        body = {
            "prompt": list(prompt),
            "n_predict": max_tokens,
            "temperature": 0.0,
            "return_tokens": True,
            "cache_prompt": True,
            "stop": list(stop),
            "logit_bias": [list(pair) for pair in bias],
        }
        answer = self._post("/completion", body)
        return LlamaCppAnswer([int(i) for i in answer["tokens"]], answer["stop_type"] != "limit")
