"""Programs of answers, each run in an isolated process: whether its tests pass, or why not.

An answer is text of a model, and its program is nobody's: it may delete files, read keys, open connections or run for
ever, by accident or because a reward teaches it. `code_isolation.py` says what a program can reach, `code_runner.py` is
the process. Both sides of the pipe are here: a fresh interpreter a program (20 ms), as many at once as there are
processors, an empty environment, a folder of its own, and a deadline after which the process is killed. What a program
prints is not read, so that it can flood nobody. Where files or network cannot be closed nothing runs, unless
`RUNG_ALLOW_UNSANDBOXED_CODE=1` says so.

What no sandbox of one process can prevent: the tests run beside the program, so a program that is written to deceive
them (an object that equals everything, a patched `builtins`, bytes from the pipe) passes.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from rung.config.code import CodeLimitsConfig
from rung.errors import PlanError
from rung.scoring import code_isolation, code_runner

ALLOW_VARIABLE = "RUNG_ALLOW_UNSANDBOXED_CODE"
"""Environment variable that allows programs without closed files or network; not a setting, which a config could
carry."""
_IS_POSIX = os.name == "posix"
MAX_REPORT = 1 << 14
"""Bytes that are read from a program's process."""
Reason = Literal["passed", "failed", "error", "memory", "timeout", "exited"]


class Program(NamedTuple):
    """What runs in one process, in this order and in one namespace: Python source each."""

    source: str
    tests: str
    setup: str = ""


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """What became of one program."""

    reason: Reason
    """`failed`: an assertion of the tests; `error`: any other exception; `exited`: the process ended before the tests
    had, by its own doing or by a signal; `memory`, `timeout`: a limit."""
    detail: str = ""
    """The end of the traceback, at most `code_runner.MAX_DETAIL` characters of text that the program decides."""
    seconds: float = 0.0
    """Wall time, the start of the interpreter included."""

    @property
    def passed(self) -> bool:
        """Whether all tests ran to their end."""
        return self.reason == "passed"


def run_programs(programs: Sequence[Program], limits: CodeLimitsConfig) -> list[ProgramResult]:
    """Run programs, as many at once as there are processors; results are in their order.

    Raises `PlanError` where this machine cannot isolate them.
    """
    if not programs:
        return []
    with ThreadPoolExecutor(min(len(programs), _processors())) as pool:
        try:
            return list(pool.map(partial(run_program, limits=limits), programs))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def run_program(program: Program, limits: CodeLimitsConfig) -> ProgramResult:
    """Run one program in a process and a folder of its own, of which nothing remains.

    Raises `PlanError` where this machine cannot isolate it.
    """
    _require_posix()
    token, start = secrets.token_hex(16), time.monotonic()
    request = b"".join(map(_message, (program.setup, program.source, program.tests, token)))
    folder = Path(tempfile.mkdtemp(prefix="rung-code-")).resolve()
    try:
        report, exit_code = _run(folder, request, limits, start + limits.timeout_seconds)
    finally:
        remove_folder(folder)
    return _result(report, exit_code, token, time.monotonic() - start)


def require_isolation(where: str) -> None:
    """Raise `PlanError` if this machine cannot isolate programs; `where` is the setting that asks for them."""
    try:
        # a generous limit: this machine may be busy
        run_program(Program("", ""), CodeLimitsConfig(timeout_seconds=60.0))
    except PlanError as error:
        raise PlanError(error.summary, where=where, given=error.given, hint=error.hint) from error


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _message(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(4, "big") + data


def _run(folder: Path, request: bytes, limits: CodeLimitsConfig, deadline: float) -> tuple[bytes | None, int]:
    """What the process reported, None at the deadline, and its exit code."""
    (requests, to_process), (from_process, reports) = os.pipe(), os.pipe()
    try:
        cpu_seconds = int(limits.timeout_seconds) + 1
        is_strict = os.environ.get(ALLOW_VARIABLE) != "1"
        arguments = (requests, reports, os.getpid(), limits.memory_mib << 20, cpu_seconds, int(is_strict))
        # -P and -s: no folder of the user's, -S: no site-packages, -B: nothing is written beside the library
        command = [sys.executable, "-s", "-S", "-P", "-B", str(code_runner.__file__), *map(str, arguments)]
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(folder),
            pass_fds=(requests, reports),
            start_new_session=True,
        )
    finally:
        os.close(requests)
        os.close(reports)
    try:
        return _exchange(to_process, from_process, request, deadline), _kill(process)
    finally:
        _kill(process)
        os.close(to_process)
        os.close(from_process)


def _environment(folder: Path) -> dict[str, str]:
    """No variable of Rung's own reaches a program. The order of sets is the same in every run."""
    # where the interpreter itself may find its libraries
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    own = dict.fromkeys(("HOME", "TMPDIR"), str(folder))
    return {**kept, **own, "PATH": "", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}


def _exchange(to_process: int, from_process: int, request: bytes, deadline: float) -> bytes | None:
    """Write the request as it is read, and read the report until its end. None at the deadline."""
    report, rest = b"", memoryview(request)
    os.set_blocking(to_process, False)
    with selectors.DefaultSelector() as selector:
        selector.register(to_process, selectors.EVENT_WRITE)
        selector.register(from_process, selectors.EVENT_READ)
        while len(report) < MAX_REPORT:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            for key, _ in ready:
                if key.fd == from_process:
                    part = os.read(from_process, MAX_REPORT)
                    if not part:
                        return report
                    report += part
                    continue
                try:
                    rest = rest[os.write(to_process, rest) :]
                except BrokenPipeError:  # the process has ended, or closed its end
                    rest = rest[:0]
                if not rest:
                    selector.unregister(to_process)
    return report


def _kill(process: subprocess.Popen[bytes]) -> int:
    """Kill the process and its group, and return its exit code. A process that has ended keeps its own code."""
    if process.returncode is None:
        # until it is waited for, its number belongs to nobody else
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
    return process.wait()


def _result(report: bytes | None, exit_code: int, token: str, seconds: float) -> ProgramResult:
    if report is None or -exit_code == getattr(signal, "SIGXCPU", None):
        return ProgramResult("timeout", seconds=seconds)
    reason, _, detail = report.decode("utf-8", "replace").partition("\n")
    if reason == "unsafe":
        raise _unsafe_error(detail)
    if reason == "passed" and secrets.compare_digest(detail.encode(), token.encode()):
        return ProgramResult("passed", seconds=seconds)
    if reason in get_args(Reason) and reason != "passed":
        return ProgramResult(reason, detail, seconds)  # type: ignore[arg-type]
    ending = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    return ProgramResult("exited", f"the process ended before its tests had: {ending}", seconds)


def _unsafe_error(missing: str) -> PlanError:
    hint = (
        f"use Linux 5.13 or later with Landlock, on {' or '.join(code_isolation.ARCHITECTURES)}; a container must "
        f"allow the system calls landlock_* and seccomp. On a machine where nothing can be lost: {ALLOW_VARIABLE}=1"
    )
    return PlanError("programs of answers cannot be isolated on this machine", given=missing, hint=hint)


def _require_posix() -> None:
    if not _IS_POSIX:
        hint = "use Linux 5.13 or later, for example in WSL 2"
        raise PlanError("programs of answers cannot be run on this system", given=sys.platform, hint=hint)


def remove_folder(folder: Path) -> None:
    """Remove a folder that a program wrote: nested to any depth, without any right, with links to anywhere."""
    prefix, number = secrets.token_hex(8), 0
    while directories := _remove_files(folder):
        for directory in directories:
            # what is nested is moved up, so that no path grows and nothing recurses
            for nested in _remove_files(directory):
                number += 1
                nested.rename(folder / f"{prefix}-{number}")
            directory.rmdir()
    folder.rmdir()


def _remove_files(folder: Path) -> list[Path]:
    """Remove what is no folder, and return the folders, which can be read and moved from then on."""
    with os.scandir(folder) as entries:
        children = [(Path(entry.path), entry.is_dir(follow_symlinks=False)) for entry in entries]
    for child, is_folder in children:
        if is_folder:
            child.chmod(stat.S_IRWXU)
        else:
            child.unlink()
    return [child for child, is_folder in children if is_folder]
