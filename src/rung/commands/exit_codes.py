"""How a command ends: the error message and the exit code.

The only place that turns exceptions into exit codes; everything below raises. An error of Rung's own is one message
without a traceback, any other exception is a bug and shows all of it. `cli` runs every command through it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import typer

from rung.console import print_lines
from rung.errors import CheckpointError, ConfigError, RungError

BUG, INTERRUPTED = 1, 130
_NAME_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP)
_SYSTEM_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE),
)
"""Errors of rights, disks and limits of the system: no change of Rung's code would mend them."""
USAGE: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
"""The exception of a wrong command line. Found through typer, which may bundle a click of its own."""


def exit_code_of(verb: Callable[[], int | None], *, as_json: bool) -> int:
    """Run a command and return its exit code; with `as_json` an error is also one JSON object on stdout."""
    try:
        code = verb()
    except RungError as error:
        return _refuse(error, as_json)
    # click's own text and code, as users of other command lines know them.
    except USAGE as error:
        message = io.StringIO()
        error.show(file=message)  # type: ignore[attr-defined]
        print_lines([message.getvalue().rstrip("\n")], sys.stderr)
        return int(error.exit_code)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        print_lines(["interrupted"], sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `rung ... | head` closes the pipe: no error. Without the redirection the flush at exit would raise it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if (fault := _fault_of_system(error)) is not None:
            return _refuse(fault, as_json)
        report = "This is a bug in Rung: the traceback above is what a report needs."
        print_lines([traceback.format_exc(), report], sys.stderr)
        return BUG
    return int(code or 0)


def _refuse(error: RungError, as_json: bool) -> int:
    if as_json:
        print_lines([json.dumps({"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code})])
    print_lines([f"{type(error).__name__}: {error}"], sys.stderr)
    return error.exit_code


def _fault_of_system(error: Exception) -> RungError | None:
    """An error of names, rights or disks that nothing below has reported; None for all others, which may be bugs."""
    if not isinstance(error, OSError) or error.errno not in (*_NAME_ERRORS, *_SYSTEM_ERRORS):
        return None
    where = None if error.filename is None else str(error.filename)
    return (ConfigError if error.errno in _NAME_ERRORS else CheckpointError)(str(error.strerror), where=where)


def exit_process(code: int) -> NoReturn:
    """End the process with an exit code."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    # One of several processes skips the shutdown of the interpreter: gloo's threads may still hold tensors, and freeing
    # one without an interpreter aborts the process (pytorch/pytorch#179291), about once in a dozen sharded runs.
    # `os._exit` flushes nothing by itself.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
