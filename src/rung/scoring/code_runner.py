"""The process in which one answer runs: isolates itself, runs the program, then its tests, and reports what happened.

A script without any import of Rung: `code_sandbox.py` starts it in a bare interpreter. It reads four messages from a
pipe, each when it needs it, so that neither the tests nor the token can be read from frames while the program runs:
what runs before the program (setup), the program, its tests, and a token. The token is read only after the tests have
ended, and is the proof that they have: a program that exits, prints or reports something else has not passed.
"""

from __future__ import annotations

import os
import sys
from builtins import compile as _compile
from builtins import exec as _exec
from os import _exit
from os import read as _read
from os import write as _write
from types import ModuleType

MAX_DETAIL = 2_000
"""Characters of a report: the end of a traceback."""
DENIED = "denied by the sandbox: processes, network, files outside the program's folder, attributes of files"
"""Behind the traceback of a `PermissionError`, whose own text does not say who denied what."""


def main() -> None:
    """Run one program. Arguments: two pipes, the parent, bytes of memory, seconds of processor time, 1 to insist."""
    requests, reports, parent, memory, cpu_seconds, is_strict = map(int, sys.argv[1:])
    sys.path.insert(0, os.path.dirname(__file__))
    from code_isolation import isolate  # type: ignore[import-not-found]

    del sys.path[0]
    missing = isolate(os.getcwd(), memory=memory, cpu_seconds=cpu_seconds)
    if os.getppid() != parent:
        _exit(1)  # it ended before this process asked to end with it
    if missing and is_strict:
        _report(reports, "unsafe", "; ".join(missing))
    module = ModuleType("answer")
    # the program finds itself under both names, and not the names of this file
    sys.modules["answer"] = sys.modules["__main__"] = module
    sys.argv[:] = ["answer"]
    sources: dict[str, str] = {}
    for title in ("setup", "answer", "tests"):
        if title == "tests":
            # a tracer of the program could skip lines; tests that ask for it run as the main program
            sys.settrace(None)
            sys.setprofile(None)
            module.__dict__["__name__"] = "__main__"
        sources[title] = _receive(requests).decode("utf-8", "surrogatepass")
        try:
            # dont_inherit: the future imports of this file are not those of the program
            _exec(_compile(sources[title], f"<{title}>", "exec", dont_inherit=True), module.__dict__)  # noqa: S102
        except MemoryError:
            _report(reports, "memory", "MemoryError")
        except BaseException as error:
            is_failure = title == "tests" and isinstance(error, AssertionError)
            _report(reports, "failed" if is_failure else "error", _describe(error, sources))
    _report(reports, "passed", _receive(requests).decode())


def _receive(pipe: int) -> bytes:
    """The next message: four bytes of length, then as many."""
    return _receive_bytes(pipe, int.from_bytes(_receive_bytes(pipe, 4), "big"))


def _receive_bytes(pipe: int, count: int) -> bytes:
    parts = []
    while count:
        part = _read(pipe, min(count, 1 << 16))
        if not part:
            _exit(1)  # the parent is gone
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _report(pipe: int, reason: str, detail: str) -> None:
    """Report and end: without `atexit`, threads and buffers of the program."""
    _write(pipe, f"{reason}\n{detail[-MAX_DETAIL:]}".encode("utf-8", "replace"))
    _exit(0)


def _describe(error: BaseException, sources: dict[str, str]) -> str:
    """The traceback without the frames of this file; the kind of the error where the program broke what prints it."""
    try:
        import linecache
        import traceback

        for title, source in sources.items():
            linecache.cache[f"<{title}>"] = (len(source), None, source.splitlines(keepends=True), title)
        frame = error.__traceback__
        while frame is not None and frame.tb_frame.f_code.co_filename == __file__:
            frame = frame.tb_next
        text = "".join(traceback.format_exception(type(error), error, frame, limit=-8)).rstrip()
        return f"{text}\n{DENIED}" if isinstance(error, PermissionError) else text
    except BaseException:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
