"""llama.cpp on a GGUF file: what it tokenizes, renders, answers, and how likely it finds a token.

The package xllamacpp holds llama.cpp's server, which `llama_cpp_server.py` starts in a process of its own: ggml ends
the process at an error, and an export must survive that to remove the file. `proof.py` compares a run with it, and
`commands/export_gguf.py` measures with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from rung.errors import GateError

REQUEST_SECONDS = 600.0
"""Longest wait for one answer."""
CERTAIN = 1000.0
"""Added to a token's logit, it makes the token certain."""
STOP_SECONDS = 10.0
"""Longest wait for the process to end by itself."""


_DIRECT = build_opener(ProxyHandler({}))
"""Without the proxy of the environment, which would get the prompts of a server on this machine."""


def is_installed() -> bool:
    """Whether llama.cpp is there (`pip install 'rung[export]'`)."""
    return find_spec("xllamacpp") is not None


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
        options = {"model": str(model), "context": context, "threads": threads, "exact": exact}
        options["adapter"] = None if adapter is None else str(adapter)
        # a file, since a pipe that nobody empties would stop the server
        self._log: IO[bytes] = tempfile.TemporaryFile()
        script = Path(__file__).with_name("llama_cpp_server.py")
        command = [sys.executable, "-P", str(script), json.dumps(options)]
        self._process = subprocess.Popen(  # noqa: S603 -- our own script
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True
        )
        try:
            self.url = self._read_address()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _read_address(self) -> str:
        # llama.cpp may write lines of its own there
        for line in self._process.stdout or ():
            try:
                return str(json.loads(line))
            except ValueError:
                continue
        raise self._failure("llama.cpp does not load this file")

    def _failure(self, summary: str) -> GateError:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        reasons = [line for line in lines if "error" in line.lower() or "failed" in line.lower()] or lines[-1:]
        return GateError(f"gate publish.gguf failed: {summary}", where=self.model.name, given=" ".join(reasons[:1]))

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        data = json.dumps(body).encode()
        request = Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})  # noqa: S310 -- our own URL
        try:
            with _DIRECT.open(request, timeout=REQUEST_SECONDS) as response:
                return json.loads(response.read())
        except HTTPError as error:
            reason = error.read().decode(errors="replace")[:300]
            summary = "gate publish.gguf failed: llama.cpp refuses a request"
            raise GateError(summary, where=self.model.name, given=reason) from error
        except (URLError, ConnectionError, TimeoutError) as error:
            raise self._failure("llama.cpp ended") from error

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
