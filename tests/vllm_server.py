"""A server that speaks vLLM's protocol for adapters and completions, with a real model: transformers and peft.

It runs in a thread of the test's process. Adapters are loaded from the folder that a request names and applied by peft;
tokens are drawn here, one by one, with transformers' own forward. `rules` make it faulty, read anew at every request:

    stale, missing, other_base    answer with the first adapter, without one, or as another model
    temperature, report           draw at this temperature; report log-probabilities at that one
    reply                         a function that changes the JSON of a reply
    slow, slow_requests           wait so many seconds; only at so many first requests
    die_after                     answer 503 after so many completions
    status                        {path: status} for refusals
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

VERSIONED = "/v1"


@dataclass
class Engine:
    """The base, the adapters in it, and what was asked."""

    folder: Path
    name: str = "base"
    rules: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    completed: int = 0
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation="eager").eval()
        self.peft: Any = None
        self.first_state: dict[str, torch.Tensor] = {}

    def load(self, name: str, path: str) -> tuple[int, str]:
        if name in self.adapters:
            return 400, f"The lora adapter '{name}' has already been loaded."
        if not (Path(path) / "adapter_config.json").is_file():
            return 404, f"Loading lora {name} failed: No adapter found for {path}"
        if self.peft is None:
            self.peft = PeftModel.from_pretrained(self.model, path, adapter_name=name).eval()
        else:
            self.peft.load_adapter(path, adapter_name=name)
        self.adapters[name] = path
        state = {k: v.clone() for k, v in self.peft.state_dict().items() if f".{name}." in k}
        self.first_state = self.first_state or {k.replace(f".{name}.", "."): v for k, v in state.items()}
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> tuple[int, str]:
        if name not in self.adapters:
            return 404, f"The lora adapter '{name}' cannot be found."
        del self.adapters[name]
        others = [other for other in self.peft.peft_config if other != name]
        if others:
            self.peft.set_adapter(others[0])  # peft goes on with the one that is deleted
            self.peft.delete_adapter(name)
        else:
            self.model, self.peft = self.peft.unload(), None
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    @contextmanager
    def active(self, name: str) -> Iterator[Any]:
        if name == self.name or self.rules.get("missing"):
            if self.peft is None:
                yield self.model
            else:
                with self.peft.disable_adapter():
                    yield self.peft
            return
        self.peft.set_adapter(name)
        if self.rules.get("stale"):
            parameters = dict(self.peft.named_parameters())
            with torch.no_grad():
                for key, value in parameters.items():
                    if f".{name}." in key:
                        value.copy_(self.first_state[key.replace(f".{name}.", ".")])
        yield self.peft

    @torch.no_grad()
    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        n, limit, temperature = asked["n"], asked["max_tokens"], asked["temperature"]
        drawn_at = self.rules.get("temperature", temperature)
        reported_at = self.rules.get("report", drawn_at) or 1.0
        stops, generator = set(asked["stop_token_ids"]), torch.Generator().manual_seed(asked["seed"])
        ids = torch.tensor([asked["prompt"]] * n)
        answers: list[list[int]] = [[] for _ in range(n)]
        logprobs: list[list[float]] = [[] for _ in range(n)]
        open_rows = set(range(n))
        with self.active(asked["model"]) as model:
            cache = None
            for _ in range(limit):
                out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache, logits = out.past_key_values, out.logits[:, -1].double()
                if self.rules.get("other_base"):
                    logits = logits.roll(7, dims=-1)
                if drawn_at == 0.0:
                    tokens = logits.argmax(-1)
                else:
                    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
                    tokens = (logits / drawn_at - (-uniform.log()).log()).argmax(-1)  # Gumbel's way to draw
                values = (logits / reported_at).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
                for row in list(open_rows):
                    answers[row].append(int(tokens[row]))
                    logprobs[row].append(float(values[row]))
                    if int(tokens[row]) in stops:
                        open_rows.discard(row)
                if not open_rows:
                    break
                ids = tokens[:, None]
        choices = [
            {
                "index": i,
                "text": "",
                "finish_reason": "length" if i in open_rows else "stop",
                "prompt_token_ids": asked["prompt"],
                "token_ids": answers[i],
                "logprobs": {"token_logprobs": logprobs[i], "tokens": ["?"] * len(answers[i])},
            }
            for i in range(n)
        ]
        return {"id": "x", "object": "text_completion", "created": 0, "model": asked["model"], "choices": choices}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: Engine

    def do_GET(self) -> None:
        engine = self.engine
        engine.requests.append((self.path.removeprefix(VERSIONED), {}))
        cards = [{"id": engine.name, "root": str(engine.folder), "parent": None}]
        cards += [{"id": name, "root": path, "parent": engine.name} for name, path in engine.adapters.items()]
        self._send(200, json.dumps({"object": "list", "data": cards}))

    def do_POST(self) -> None:
        engine, path = self.engine, self.path.removeprefix(VERSIONED)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        engine.requests.append((path, asked))
        if (status := engine.rules.get("status", {}).get(path)) is not None:
            return self._send(status, json.dumps({"error": {"message": f"no to {path}"}}))
        if path == "/completions":
            return self._complete(asked)
        with engine.lock:
            change = {"/load_lora_adapter": engine.load, "/unload_lora_adapter": engine.unload}[path]
            status, text = change(*asked.values())
        self._send(status, text if status == 200 else json.dumps({"error": {"message": text}}))

    def _complete(self, asked: dict[str, Any]) -> None:
        engine = self.engine
        engine.at_once += 1
        engine.most_at_once = max(engine.at_once, engine.most_at_once)
        if len(engine.requests) <= engine.rules.get("slow_requests", float("inf")):
            time.sleep(engine.rules.get("slow", 0))
        with engine.lock:
            engine.at_once -= 1
            engine.completed += 1
            if asked["model"] not in (engine.name, *engine.adapters):
                return self._send(404, json.dumps({"error": {"message": "The model does not exist."}}))
            if engine.completed > engine.rules.get("die_after", float("inf")):
                return self._send(503, json.dumps({"error": {"message": "the engine is dead"}}))
            reply = engine.complete(asked)
        change: Callable[[dict[str, Any]], Any] = engine.rules.get("reply", lambda whole: None)
        change(reply)
        self._send(200, json.dumps(reply))

    def _send(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if text.startswith("{") else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


@contextmanager
def serving(folder: Path) -> Iterator[Engine]:
    """A server for the base in a folder."""
    engine = Engine(folder)
    handler = type("OwnHandler", (Handler,), {"engine": engine})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        engine.url = f"http://127.0.0.1:{server.server_port}{VERSIONED}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield engine
        finally:
            server.shutdown()
            thread.join()
