"""A server of `rung serve` in this process, its clients, and requests that are none."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import uvicorn
from hypothesis import strategies as st

from rung.cli import _exit_code
from rung.serving.app import make_app
from rung.serving.catalog import model_names, open_models
from rung.serving.engine import Engine
from rung.serving.llama_cpp_model import LlamaCppModel
from rung.web.header_timeout import HeaderTimeoutProtocol
from rung.web.server import QUIET

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def trained_run(folder: Path, base: Path, questions: Path) -> Path:
    """A finished run that computes in float32, whatever the machine would choose."""
    (folder / "run.yaml").write_text(
        f"model: {{name: {base}, dtype: float32, matmul: onednn}}\n"
        f"data: {{path: {questions}, test: 0.25}}\n"
        "method: {kind: lora, rank: 4}\ntraining: {examples_per_step: 8, max_steps: 2}\n"
        f"evaluation: {{metrics: [exact]}}\noutput: {folder / 'tiny'}\n"
    )
    assert _exit_code(["train", str(folder / "run.yaml")]) == 0
    return folder / "tiny"


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Waits for a condition; a condition that never holds fails the test and does not stop the suite."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "the condition did not come to hold"
        time.sleep(0.002)


@contextmanager
def served(
    *targets: object, key: str | None = None, files: dict[str, LlamaCppModel] | None = None, **limits: int
) -> Iterator[tuple[int, Engine]]:
    """A server on a free port in a thread of this process."""
    options = {"max_rows": 8, "max_waiting": 64, "cache_bytes": 2**26, "beginnings_bytes": 2**24, **limits}
    engine = Engine(open_models(model_names([str(target) for target in targets])), **options)
    closing = threading.Event()
    computing = threading.Thread(target=engine.compute_during, args=(closing.wait,), daemon=True)
    computing.start()
    wait_until(lambda: engine.is_alive)
    options_: dict[str, Any] = {**QUIET, "http": HeaderTimeoutProtocol, "ws": "none"}
    config = uvicorn.Config(make_app(engine, files, key), port=0, **options_)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield port, engine
    for place in [place for place in CLIENTS if place[0] == port]:
        CLIENTS.pop(place).close()
    server.should_exit = True
    thread.join()
    closing.set()
    computing.join()
    assert not engine.active_rows and not engine.waiting


CLIENTS: dict[tuple[int, str], openai.OpenAI] = {}


def client(port: int, key: str = "none") -> openai.OpenAI:
    if (port, key) not in CLIENTS:
        url = f"http://127.0.0.1:{port}/v1"
        CLIENTS[port, key] = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
    return CLIENTS[port, key]


def post(port: int, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", path, body, {"content-type": "application/json", **headers})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text)


WORDS = st.sampled_from(
    ["model", "messages", "prompt", "n", "stop", "seed", "stream", "logprobs", "tools", "role", "x"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)
NO_REQUESTS = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(WORDS, JSON, max_size=5).map(
        lambda extra: json.dumps({"model": "tiny", "messages": MESSAGES, "max_tokens": 1, **extra}).encode()
    ),
)


MALFORMED: list[tuple[bytes, int, str]] = [
    (b"", 400, "not JSON"),
    (b"{", 400, "not JSON"),
    (b"[" * 100_000, 400, "not JSON"),
    (b"[1]", 400, "no JSON object"),
    (b'{"messages": []}', 400, "model"),
    (b'{"model": "NAME", "messages": []}', 400, "messages"),
    (b'{"model": "NAME", "messages": [{"role": "king", "content": "x"}]}', 400, "role"),
    (b'{"model": "NAME", "messages": [{"role": "user", "content": 5}]}', 400, "content"),
    (b'{"model": "NAME", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 400, "text alone"),
    (b'{"model": "NAME", "messages": [{"role": "assistant", "content": "x"}]}', 400, "an answer already"),
    (b'{"model": 7, "messages": [{"role": "user", "content": "x"}]}', 400, "model"),
    *(
        (b'{"model": "NAME", "messages": [{"role": "user", "content": "x"}], %b}' % extra, 400, said)
        for extra, said in (
            (b'"n": 0', "n:"),
            (b'"n": 1000000', "n:"),
            (b'"n": "two"', "n:"),
            (b'"temperature": -1', "temperature"),
            (b'"temperature": NaN', "temperature"),
            (b'"temperature": "hot"', "temperature"),
            (b'"top_p": 0', "top_p"),
            (b'"top_p": 2', "top_p"),
            (b'"max_tokens": 0', "max_tokens"),
            (b'"max_tokens": 100000', "do not fit"),
            (b'"seed": 1e400', "seed"),
            (b'"seed": 99999999999999999999999', "seed"),
            (b'"stop": [""]', "stop"),
            (b'"stop": 5', "stop"),
            (b'"stop": ["a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a"]', "stop"),
            (b'"logit_bias": {"5": 100}', "does not have `logit_bias`"),
            (b'"frequency_penalty": 0.5', "does not have `frequency_penalty`"),
            (b'"response_format": {"type": "json_object"}', "does not have `response_format`"),
            (b'"best_wishes": true', "does not have `best_wishes`"),
            (b'"stream": "yes"', "stream"),
            (b'"stream_options": {"other": 1}', "stream_options"),
            (b'"top_logprobs": 100', "top_logprobs"),
        )
    ),
]
