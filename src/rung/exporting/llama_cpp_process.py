"""llama.cpp's own server on a GGUF file, in a process of its own that ends with this one.

ggml ends its process at an error, which neither an export nor a server may be ended by. The package xllamacpp holds the
server; `llama_cpp_server.py` is the script that starts it. It listens on this machine alone, behind a key that only
this process knows: other users of the machine and pages in a browser must not reach it. `llama_cpp.py` compares runs
with it, and
`serving/llama_cpp_model.py` serves files through it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

_TIME_AND_LEVEL = re.compile(r"^[\d.]+ [A-Z] ")
STOP_SECONDS = 10.0
"""Longest wait for the process to end by itself."""


def is_installed() -> bool:
    """Whether llama.cpp is there (`pip install 'rung[export]'`)."""
    return find_spec("xllamacpp") is not None


class LlamaCppError(Exception):
    """llama.cpp has ended, or does not load a file; the message is what it said last."""


@dataclass(frozen=True)
class LlamaCppOptions:
    """How llama.cpp runs a file."""

    context: int
    """Tokens of prompt and answer together, of all slots."""
    threads: int
    slots: int = 1
    """Answers that are generated at once; each has an equal part of the context."""
    adapter: Path | None = None
    is_exact: bool = False
    """Keys and values in float32 and no flash attention, to be compared with; else as people run it."""
    computes_embeddings: bool = False
    """For an encoder, which writes nothing."""
    kept_bytes: int = 0
    """Memory for the keys and values of earlier prompts, beside those of the slots."""


class LlamaCppProcess:
    """The process; `close` ends it. Raises `LlamaCppError` if the file does not load."""

    def __init__(self, model: Path, options: LlamaCppOptions) -> None:
        # a file, since a pipe that nobody empties would stop the server
        self._log: IO[bytes] = tempfile.TemporaryFile()
        settings = {"model": str(model), **asdict(options)}
        script = Path(__file__).with_name("llama_cpp_server.py")
        command = [sys.executable, "-P", str(script), json.dumps(settings, default=str)]
        self._process = subprocess.Popen(  # noqa: S603 -- our own script
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True
        )
        try:
            self.url, self.key = self._read_address()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

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

    def last_error(self) -> str:
        """The line in which llama.cpp says what is wrong, or else its last one."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        reasons = [line for line in lines if "error" in line.lower() or "failed" in line.lower()] or lines[-1:]
        return _TIME_AND_LEVEL.sub("", " ".join(reasons[:1]))

    def _read_address(self) -> tuple[str, str]:
        # llama.cpp may write lines of its own there
        for line in self._process.stdout or ():
            try:
                address = json.loads(line)
                return str(address["url"]), str(address["key"])
            except (ValueError, TypeError, KeyError):
                continue
        raise LlamaCppError(self.last_error())
