"""Servers under load: `.venv/bin/python -m benchmarks.serving`, a quarter of an hour.

Clients ask questions of examples/finance as streams, greedy and of at most 48 tokens, one after the other without a
pause, of `rung serve`, llama.cpp's server and `transformers serve` on SmolLM2-135M in float32. A client that is told
to come later does. Beside them stands `rung generate` on the same questions in batches of eight. Clients run on the
same machine as the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import httpx2

from benchmarks.machine import processor
from benchmarks.memory import resident
from benchmarks.results_page import machine_class, replace_section
from benchmarks.runner import OURS, PEERS, ROOT

BASE = "smollm2-135m"
TOKENS, ROWS = 48, 16
START_SECONDS, WARM_SECONDS, DRAIN_SECONDS = 180, 15, 120
QUESTIONS = [json.loads(line)["question"] for line in (ROOT / "examples/finance/data.jsonl").read_text().splitlines()]


@dataclass
class Load:
    """What clients met."""

    seconds: float = 0.0
    first_token: list[float] = field(default_factory=list)
    """Seconds from a request to its first token, for each that was answered."""
    tokens: int = 0
    """Parts with text that came in time: tokens, except where a server joins several into one part."""
    refused: int = 0
    """Answers 429."""
    failed: list[str] = field(default_factory=list)
    """Any other end, in words."""
    memory: list[int] = field(default_factory=list)
    """Resident bytes of the server, a second each."""

    @property
    def growth(self) -> float:
        """Largest memory of the last half over that of the second quarter, less one."""
        quarter = len(self.memory) // 4
        return max(self.memory[2 * quarter :]) / max(self.memory[quarter : 2 * quarter]) - 1

    def summary(self) -> dict[str, Any]:
        """Numbers of a table."""
        ordered = sorted(self.first_token) or [float("nan")]
        return {
            "answered": len(self.first_token),
            "refused": self.refused,
            "failed": len(self.failed),
            "p50": median(ordered),
            "p95": ordered[int(0.95 * (len(ordered) - 1))],
            "tokens_per_second": self.tokens / self.seconds,
            "memory": max(self.memory),
            "growth": self.growth,
        }


async def put_load(url: str, model: str, clients: int, seconds: float, pid: int, headers: Mapping[str, str]) -> Load:
    """Let clients ask for so many seconds, and wait for the answers that they began."""
    load = Load()
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx2.AsyncClient(timeout=None, limits=limits, trust_env=False, headers=headers) as http:
        deadline = time.perf_counter() + seconds
        askers = [asyncio.create_task(_client(http, url, model, i, deadline, load)) for i in range(clients)]
        watcher = asyncio.create_task(_watch(pid, load))
        try:
            async with asyncio.timeout(seconds + DRAIN_SECONDS):
                await asyncio.gather(*askers)
        except TimeoutError:
            load.failed += ["not answered"] * sum(not asker.done() for asker in askers)
        load.seconds = seconds
        watcher.cancel()
        await asyncio.gather(*askers, watcher, return_exceptions=True)
    return load


async def _client(http: httpx2.AsyncClient, url: str, model: str, number: int, deadline: float, load: Load) -> None:
    order = random.Random(number)
    while time.perf_counter() < deadline:
        body = {"model": model, "messages": [{"role": "user", "content": order.choice(QUESTIONS)}], "stream": True}
        body |= {"max_tokens": TOKENS, "temperature": 0}
        begun, first = time.perf_counter(), None
        try:
            async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                if response.status_code == httpx2.codes.TOO_MANY_REQUESTS:
                    load.refused += 1
                    await asyncio.sleep(float(response.headers.get("retry-after", 1)) * order.uniform(0.5, 1.5))
                    continue
                if response.status_code != httpx2.codes.OK:
                    load.failed.append(f"{response.status_code}: {(await response.aread())[:200]!r}")
                    await asyncio.sleep(1)
                    continue
                ended = False
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    part = json.loads(line.removeprefix("data: "))
                    choice = (part.get("choices") or [{}])[0]
                    if (choice.get("delta") or {}).get("content"):
                        first = first or time.perf_counter() - begun
                        load.tokens += time.perf_counter() < deadline
                    ended = ended or choice.get("finish_reason") is not None
        except httpx2.HTTPError as error:
            load.failed.append(type(error).__name__)
            await asyncio.sleep(1)
            continue
        if not ended:
            load.failed.append("a stream without an end")
        else:
            load.first_token.append(first if first is not None else time.perf_counter() - begun)


async def _watch(pid: int, load: Load) -> None:
    while True:
        load.memory.append(resident(pid))
        await asyncio.sleep(1)


@dataclass(frozen=True)
class Server:
    """A server that listens."""

    url: str
    model: str
    pid: int
    headers: Mapping[str, str] = field(default_factory=dict)


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def started(command: Sequence[str | Path], port: int, model: str) -> Iterator[Server]:
    """A server by its command, once it answers."""
    with tempfile.TemporaryFile() as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            _wait_until_it_listens(process, port)
            yield Server(f"http://127.0.0.1:{port}", model, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx2.HTTPError):
            if httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == httpx2.codes.OK:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{process.args!r} does not listen")


@contextmanager
def rung_server(*options: str) -> Iterator[Server]:
    """`rung serve` on the embedded base."""
    port = free_port()
    command = [OURS / "rung", "serve", BASE, "--port", str(port), "--dtype", "float32", "--rows", str(ROWS), *options]
    with started(command, port, BASE) as server:
        yield server


@contextmanager
def llama_cpp_server(scratch: Path) -> Iterator[Server]:
    """llama.cpp's own server on the same weights in float32, with as many slots."""
    from rung.exporting.llama_cpp_process import LlamaCppOptions, LlamaCppProcess

    if not (scratch / "gguf").exists():
        command = [OURS / "rung", "export", BASE, scratch / "gguf", "--type", "f32"]
        subprocess.run(command, check=True, capture_output=True)
    options = LlamaCppOptions(1024 * ROWS, len(os.sched_getaffinity(0)), ROWS)
    process = LlamaCppProcess(scratch / "gguf/gguf-f32.gguf", options)
    try:
        headers = {"authorization": f"Bearer {process.key}"}
        yield Server(process.url, "gguf", process.pid, headers)
    finally:
        process.close()


@contextmanager
def transformers_server() -> Iterator[Server]:
    """`transformers serve` with its continuous batching."""
    from rung.config.model import ModelConfig
    from rung.models.load import base_files

    folder, port = base_files(ModelConfig(name=BASE)), free_port()
    command = [PEERS / "transformers", "serve", str(folder), "--port", str(port), "--host", "127.0.0.1"]
    command += ["--dtype", "float32", "--device", "cpu", "--continuous-batching"]
    with started(command, port, str(folder)) as server:
        yield server


def generate_speed(batches: int) -> float:
    """Tokens a second of `rung generate` on the same questions in batches of eight, in a process of its own."""
    command = [OURS / "python", "-m", "benchmarks.generate_speed", BASE, str(TOKENS)]
    asked = json.dumps(QUESTIONS[: 8 * (batches + 1)])
    done = subprocess.run(command, input=asked, text=True, check=True, capture_output=True, cwd=ROOT)
    return float(done.stdout)


def measure(server: Server, clients: int, seconds: float) -> Load:
    """Load on a server that has answered before."""
    asyncio.run(put_load(server.url, server.model, min(clients, 8), WARM_SECONDS / 3, server.pid, server.headers))
    return asyncio.run(put_load(server.url, server.model, clients, seconds, server.pid, server.headers))


def table(rows: Sequence[tuple[str, int, Mapping[str, Any]]], generated: float) -> str:
    """The section of the page."""
    machine = processor()
    name = machine_class(machine["instructions"])
    heads = (
        "server",
        "clients",
        "answered",
        "429",
        "failed",
        "first token, p50",
        "p95",
        "tokens/s",
        "memory",
        "growth",
    )
    lines = [f"## Serving, {name}", ""]
    where = f"{machine['processor']}, {machine['cores']} cores, {date.today():%Y-%m-%d}"
    lines += [
        f"{where}. SmolLM2-135M in float32, answers of at most {TOKENS} tokens to questions of examples/finance, "
        f"{ROWS} at once. Clients ask without a pause, as streams, on the same machine. Memory is the largest of the "
        "server; growth is that of the last half of the time over the second quarter.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for server, clients, found in rows:
        times = [f"{found[name]:.2f} s" for name in ("p50", "p95")]
        counts = [f"{found[name]:,}" for name in ("answered", "refused", "failed")]
        rest = [f"{found['tokens_per_second']:.0f}", f"{found['memory'] / 2**30:.2f} GiB", f"{found['growth']:+.1%}"]
        lines.append(f"| {' | '.join([server, str(clients), *counts, *times, *rest])} |")
    lines += ["", f"`rung generate` on the same questions in batches of eight: {generated:.0f} tokens/s."]
    ratios = [found["tokens_per_second"] / generated for server, count, found in rows if (server, count) == ("Rung", 8)]
    return "\n".join(lines) + "".join(f" `rung serve` has {ratio:.2f} of that with 8 clients." for ratio in ratios)


def main() -> int:
    """Measure, print and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", default="8,200")
    parser.add_argument("--only", default="rung,llama.cpp,transformers")
    parser.add_argument("--page", action="store_true", help="write benchmarks/RESULTS.md")
    options = parser.parse_args()
    names, counts = options.only.split(","), [int(count) for count in options.clients.split(",")]
    scratch = Path(tempfile.mkdtemp(prefix="rung-serving-"))
    servers = {
        "rung": ("Rung", rung_server),
        "llama.cpp": ("llama.cpp", lambda: llama_cpp_server(scratch)),
        "transformers": ("transformers serve", transformers_server),
    }
    rows = []
    try:
        generated = generate_speed(8)
        print(f"rung generate: {generated:.1f} tokens/s", flush=True)
        for clients in counts:
            for name in names:
                label, begin = servers[name]
                with begin() as server:
                    load = measure(server, clients, options.seconds)
                rows.append((label, clients, load.summary()))
                print(label, clients, json.dumps(rows[-1][2]), *load.failed[:3], flush=True)
        again = generate_speed(8)
        print(f"rung generate: {again:.1f} tokens/s", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    text = table(rows, (generated + again) / 2)
    print(text)
    if options.page:
        replace_section(f"serving {machine_class(processor()['instructions'])}", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
