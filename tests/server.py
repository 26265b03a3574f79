"""An OpenAI-compatible server for tests, in a process of its own: answers by rule, and fails when its rules say so.

    python tests/server.py LOG RULES     prints its port; each request is a line of LOG

RULES is a JSON object, read anew at every request: `fail` names, by a word of the question, how many times it fails
and how (a status, `drop`, `garbage`, `empty`, a URL to redirect to, or {"body": ...}, which is sent as it is); `key` is
the key that is asked for; `slow` seconds pass before an answer; with `judge` it prefers the answer with more apples in
it, and writes no verdict on box 6.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LOCK = threading.Lock()
FAILED: Counter[str] = Counter()
ON_THE_WAY: list[int] = [0]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log_file: Path
    rules_file: Path

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        rules = json.loads(self.rules_file.read_text())
        question = asked["messages"][-1]["content"]
        with LOCK:
            ON_THE_WAY[0] += 1
            at_once = ON_THE_WAY[0]
        time.sleep(rules.get("slow", 0))
        how = self._failure(rules, question)
        with LOCK:
            ON_THE_WAY[0] -= 1
            with self.log_file.open("a") as log:
                line = {"question": question, "at_once": at_once, "how": how, "asked": asked}
                log.write(json.dumps({**line, "headers": dict(self.headers)}) + "\n")
        if how == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif how == "garbage":
            self._send(200, b"{not json")
        elif isinstance(how, dict):
            self._send(200, how["body"].encode())
        elif how == "empty":
            self._send(200, json.dumps(answer(asked, 0)).encode())
        elif isinstance(how, str) and how.startswith("http"):
            self._send(307, b"", Location=how)
        elif how is None:
            said = verdict(question) if rules.get("judge") else None
            self._send(200, json.dumps(answer(asked, asked.get("n", 1), said)).encode())
        else:
            self._send(int(how), json.dumps({"error": {"message": f"no: {self.headers['Authorization']}"}}).encode())

    def _failure(self, rules: dict[str, Any], question: str) -> Any:
        if rules.get("key") and self.headers["Authorization"] != f"Bearer {rules['key']}":
            return 401
        for word, (times, how) in rules.get("fail", {}).items():
            with LOCK:
                if word in question.split() and FAILED[word] < times:
                    FAILED[word] += 1
                    return how
        return None

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("retry-after-ms", "10")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


def verdict(question: str) -> str:
    if "box 6\n" in question:
        return "Both are fine."
    first, second = (part.count("apples") for part in question.split("[Answer A]")[1].split("[Answer B]"))
    return f"{first} and {second} apples. [[{'A' if first > second else 'B' if second > first else 'C'}]]"


def answer(asked: dict[str, Any], count: int, verdict: str | None = None) -> dict[str, Any]:
    said = verdict or f"to {asked['messages'][-1]['content']}"
    choices = [
        {
            "index": i,
            "finish_reason": "stop" if i == 0 else "length",
            "message": {"role": "assistant", "content": f"{i} {said}"},
        }
        for i in range(count)
    ]
    return {"id": "x", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": choices}


if __name__ == "__main__":
    Handler.log_file, Handler.rules_file = map(Path, sys.argv[1:])
    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(served.server_port, flush=True)
    served.serve_forever()
