"""An OpenAI-compatible server for tests, in a process of its own: answers by rule, and fails when its rules say so.

    python tests/server.py LOG RULES     prints its port; each request is a line of LOG

RULES is a JSON object, read anew at every request: `fail` names, by a word of the question, how many times it fails
and how (a status, `drop`, `garbage`, `empty`, a URL to redirect to, or {"body": ...}, which is sent as it is); `key` is
the key that is asked for; `slow` seconds pass before an answer; with `judge` it prefers the answer with more apples in
it, or with more of the text that `judge` is, and writes no verdict on box 6; with `teach` it writes questions about
boxes and answers them, drawn by what it was asked, some of them refusals; with `think` it writes reasoning before them,
with `single` it gives one answer whatever `n` is; with `rotten` it says that fruit is good or rotten, and as a critic
by the name `critic` it finds `rotten`, writes answers without it, and prefers the answer with less of it, with the
log-probabilities of `preference`, a number of nats a word, or none. `refuse` is a word of a request, such as logprobs,
for which it gets 400.
"""

from __future__ import annotations

import hashlib
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


def _body(message: object, finish: object = "stop") -> dict[str, str]:
    return {"body": json.dumps({"choices": [{"index": 0, "finish_reason": finish, "message": message}]})}


HOSTILE: tuple[Any, ...] = (
    *(429, 500, 502, 503, 408, 409, "drop", "drop", "garbage", "empty", 400, 413, 422),
    *({"body": text} for text in ("", "{", "null", "[]", "<html>busy</html>", '{"choices": [{}]}', "[" * 5000)),
    *(_body({"role": "user", "content": "What do you want?"}), _body({"role": "assistant", "content": None})),
    *(_body("a text"), _body({"content": ["a", 5]}), _body({"content": "x" * 300_000}), _body({"content": "   "})),
    *(_body({"content": "I'm sorry, but I can't help with that."}), _body({"content": "half \ud800"}, finish=7)),
)


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
        how = self._failure(rules, asked)
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
            is_judged = rules.get("judge") and "[Answer A]" in question
            said = [verdict(question, rules["judge"])] if is_judged else taught(asked) if rules.get("teach") else None
            said = constitution(asked) if rules.get("rotten") else said
            said = [f"<think>hm, {text}</think>\n\n{text}" for text in said] if said and rules.get("think") else said
            count = 1 if rules.get("single") else asked.get("n", 1)
            whole = answer(asked, count, said)
            if "preference" in rules and asked.get("logprobs"):
                whole["choices"][0]["logprobs"] = preference(asked, rules["preference"])
            self._send(200, json.dumps(whole).encode())
        else:
            self._send(int(how), json.dumps({"error": {"message": f"no: {self.headers['Authorization']}"}}).encode())

    def _failure(self, rules: dict[str, Any], asked: dict[str, Any]) -> Any:
        question = asked["messages"][-1]["content"]
        if rules.get("hostile"):
            return self._hostility(question)
        if rules.get("key") and self.headers["Authorization"] != f"Bearer {rules['key']}":
            return 401
        if rules.get("refuse") in asked:
            return rules.get("refuse_status", 400)
        for word, (times, how) in rules.get("fail", {}).items():
            with LOCK:
                if word in question.split() and FAILED[word] < times:
                    FAILED[word] += 1
                    return how
        return None

    def _hostility(self, question: str) -> Any:
        """The first answer to half of the questions is one of HOSTILE; some are for good, most are not."""
        drawn = hashlib.sha256(question.encode()).digest()
        with LOCK:
            FAILED[question] += 1
            if drawn[0] % 2 or FAILED[question] > 1:
                return None
        return HOSTILE[drawn[1] % len(HOSTILE)]

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


def verdict(question: str, rule: str | bool) -> str:
    if "box 6\n" in question:
        return "Both are fine."
    wanted = rule if isinstance(rule, str) else "apples"
    answers = question.split("[Answer A]")[1].rpartition("\n\nWhich answer is better?")[0].split("[Answer B]")
    first, second = (answer.count(wanted) for answer in answers)
    return f"{first} and {second} {wanted}. [[{'A' if first > second else 'B' if second > first else 'C'}]]"


WORDS = (
    "apple pear plum fig cherry quince lemon melon cellar attic shed barn kitchen boat market garden ladder basket "
    "knife river bridge miller baker sailor winter summer morning evening silver copper wooden heavy broken narrow "
    "ancient gentle quiet hidden carried counted painted mended borrowed forgot followed washed buried opened traded "
    "weighed"
).split()


def taught(asked: dict[str, Any]) -> list[str]:
    """Questions or answers, drawn by the whole request."""
    return [_taught(asked, i) for i in range(asked.get("n", 1))]


def _taught(asked: dict[str, Any], place: int) -> str:
    drawn = hashlib.sha256(json.dumps([asked, place], sort_keys=True).encode()).digest()
    words = " ".join(WORDS[byte % len(WORDS)] for byte in drawn[: 6 + drawn[11] % 4])
    last = asked["messages"][-1]["content"]
    if any(request in last for request in ("Write a", "Write the next")):
        return "What?" if drawn[9] % 11 == 0 else f"Why is the {words}?"
    return "I'm sorry, I cannot help with that." if drawn[9] % 7 == 0 else f"There were {drawn[10]} of them, {words}."


def constitution(asked: dict[str, Any]) -> list[str]:
    """Answers about fruit, or what a critic of rotten fruit says of them."""
    *_, last = asked["messages"]
    request = last["content"]
    if asked["model"] != "critic":
        drawn = [hashlib.sha256(json.dumps([asked, i]).encode()).digest() for i in range(asked.get("n", 1))]
        return [
            " ".join(("The fruit is good.", "It is rotten.")[b % 2] for b in bytes_[: 1 + i])
            for i, bytes_ in enumerate(drawn)
        ]
    if (counts := compared(asked)) is not None:
        first, second = counts
        if "reasons" in request:
            return [f"A has {first} and B has {second} of them."]
        return [f"({'A' if first < second else 'B' if second < first else 'A'})"]
    if request.startswith("Say in a few sentences"):
        return [f"It says {asked['messages'][-2]['content'].count('rotten')} times that fruit is rotten."]
    answered = [m["content"] for m in asked["messages"] if m["role"] == "assistant"]
    revised = answered[-2 if "Say in a few" in asked["messages"][-3]["content"] else -1]
    return [revised.replace("rotten", "fresh", 1)]


def compared(asked: dict[str, Any]) -> tuple[int, int] | None:
    """How often each of two answers says rotten; None where none are compared."""
    texts = [m["content"] for m in asked["messages"] if "[Answer A]" in m["content"]]
    if not texts:
        return None
    first, second = (part.count("rotten") for part in texts[-1].split("[Answer A]")[1].split("[Answer B]"))
    return first, second


def preference(asked: dict[str, Any], nats: float) -> dict[str, Any]:
    """Log-probabilities of A and B: A has `nats` for each rotten fruit of B more than of A, and one for its place."""
    first, second = compared(asked) or (0, 0)
    difference = nats * (second - first) + 1.0
    both = [{"token": name, "logprob": -5.0 + value} for name, value in ((" A", difference), ("B", 0.0), ("x", -3.0))]
    named = " A" if first <= second else "B"
    tokens = [{"token": "(", "logprob": -0.1, "top_logprobs": []}]
    return {"content": [*tokens, {"token": named, "logprob": -1.0, "top_logprobs": both}]}


def answer(asked: dict[str, Any], count: int, said: list[str] | None = None) -> dict[str, Any]:
    """Texts that were drawn end; of others, which repeat the question, all but the first are cut."""
    repeated = [f"{i} to {asked['messages'][-1]['content']}" for i in range(count)]
    texts = [said[i] if i < len(said) else said[0] for i in range(count)] if said else repeated
    choices = [
        {
            "index": i,
            "finish_reason": "stop" if i == 0 or said else "length",
            "message": {"role": "assistant", "content": text},
        }
        for i, text in enumerate(texts)
    ]
    prompt_tokens = len(json.dumps(asked["messages"])) // 4
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 9 * count, "total_tokens": prompt_tokens + 9 * count}
    whole = {"id": "x", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": choices}
    return {**whole, "usage": usage}


if __name__ == "__main__":
    Handler.log_file, Handler.rules_file = map(Path, sys.argv[1:])
    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(served.server_port, flush=True)
    served.serve_forever()
