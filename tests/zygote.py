"""Processes forked from one that has imported everything: a start costs a tenth of a second.

As a script it reads requests, a JSON object a line: what to call, and in which environment. It forks, and says the
child's number; the number of a child as a request waits for it and says how it ended, by exit code, or minus a signal.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any


class Zygote:
    """The forking process; `close` ends it."""

    def __init__(self, log: Path, *, preload: Sequence[str] = (), **env: str) -> None:
        """`preload` are modules that the children would otherwise import one by one."""
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(log), *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **env},
        )

    def start(self, *arguments: object, call: str = "rung.cli:_exit_code", env: Mapping[str, str] | None = None) -> int:
        """Begin `rung` with these arguments, or call another function with them; the process's number."""
        request = {"call": call, "arguments": [str(a) for a in arguments], "env": dict(env or {})}
        return int(self._ask(json.dumps(request)))

    def launch(self, size: int, *arguments: object, call: str = "rung.cli:_exit_code") -> list[int]:
        """As many processes of one run, with the environment that torchrun gives them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
        return [self.start(*arguments, call=call, env=env) for env in ranks]

    def wait(self, child: int) -> int:
        """How it ended: its exit code, or minus the signal."""
        return int(self._ask(str(child)))

    def run(self, *arguments: object) -> int:
        """Begin and wait."""
        return self.wait(self.start(*arguments))

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()

    def _ask(self, line: str) -> str:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(line + "\n")
        return stdout.readline()


def serve(log: str, preload: Sequence[str]) -> None:
    """Answer requests until there are no more."""
    import rung.cli
    import rung.commands.climb
    import rung.runs.train  # noqa: F401 -- what children would otherwise import one by one

    for module in preload:
        import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, dict):
            child = os.fork()
            if child == 0:
                _be(request, log)
            print(child, flush=True)
            continue
        _, status = os.waitpid(request, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _be(request: Mapping[str, Any], log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(out, number)
    os.environ.update(request["env"])
    code = 1
    try:
        module, _, name = request["call"].partition(":")
        code = int(getattr(import_module(module), name)(request["arguments"]) or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
