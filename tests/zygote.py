"""Runs of the command line forked from a process that has imported everything: a start costs a tenth of a second.

As a script it reads requests, a JSON list of arguments a line, forks, and says the child's number; an empty line waits
for the child and says how it ended, by exit code, or minus a signal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Zygote:
    """The forking process; `close` ends it."""

    def __init__(self, log: Path, **env: str) -> None:
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **env},
        )

    def start(self, *arguments: object) -> int:
        """Begin `rung` with these arguments; the process's number."""
        return int(self._ask(json.dumps([str(a) for a in arguments])))

    def wait(self) -> int:
        """How it ended: its exit code, or minus the signal."""
        return int(self._ask(""))

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


def serve(log: str) -> None:
    """Answer requests until there are no more."""
    import rung.cli
    import rung.pipeline.climb
    import rung.run

    child = 0
    for line in sys.stdin:
        if line.strip():
            child = os.fork()
            if child == 0:
                _be(rung.cli._exit_code, json.loads(line), log)
            print(child, flush=True)
            continue
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _be(exit_code: Any, arguments: list[str], log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(out, number)
    code = 1
    try:
        code = exit_code(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
