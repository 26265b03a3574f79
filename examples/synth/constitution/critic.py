"""A critic by rules behind an OpenAI-compatible server.

    python examples/synth/constitution/critic.py [PORT]

It finds sentences that advise, says which ones they are, leaves them out of a revision, and prefers the answer with
fewer of them. A model of several billion parameters would stand in its place; a rule shows what the method does with a
critic that is always right.
"""

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BANNED = re.compile(
    r"\b(?:should|must|recommend\w*|advise\w*|suggest\w*|best|(?:good|bad|great|smart) (?:idea|choice|option|way)"
    r"|always|never|definitely|need to|important to|consider\w*|wise)\b",
    re.IGNORECASE,
)
NOTHING_LEFT = "What it will be worth nobody knows. The decision is yours."


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def reply(messages: list[dict[str, str]]) -> str:
    """The answer to a request of `rung synth constitution`."""
    request = messages[-1]["content"]
    if "[Answer A]" in request:
        first, second = request.split("[Answer A]")[1].split("[Answer B]")
        return "A" if len(BANNED.findall(first)) < len(BANNED.findall(second)) else "B"
    if request.startswith("Say in a few sentences"):
        advising = [s for s in sentences(messages[-2]["content"]) if BANNED.search(s)]
        return "It advises: " + " ".join(advising) if advising else "It keeps the rule."
    # a revision: the answer stands before the request for the critique
    kept = [s for s in sentences(messages[-4]["content"]) if not BANNED.search(s)]
    return " ".join(kept) or NOTHING_LEFT


class Handler(BaseHTTPRequestHandler):
    """Answers POST /v1/chat/completions."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: a second one would wait for the client

    def do_POST(self) -> None:
        """Answer one request."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": reply(asked["messages"])}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = json.dumps({"object": "chat.completion", "model": asked["model"], "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8765
    print(f"http://localhost:{port}/v1", flush=True)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
