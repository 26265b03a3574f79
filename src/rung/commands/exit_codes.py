"""How a command ends: what went wrong in words, and the exit code."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import typer

from rung.errors import RungError

BUG, INTERRUPTED = 1, 130
USAGE: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
"""What a wrong command line raises, of the click that typer itself uses."""


def exit_code_of(verb: Callable[[], int | None], *, as_json: bool) -> int:
    """Run a verb; say what ended it, as one JSON object too where that was asked for."""
    try:
        code = verb()
    except RungError as error:
        if as_json:
            typer.echo(json.dumps({"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}))
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except USAGE as error:
        error.show()  # type: ignore[attr-defined]
        return int(error.exit_code)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        traceback.print_exc()
        print("\nThis is a bug in Rung: the traceback above is what a report needs.", file=sys.stderr)
        return BUG
    return int(code or 0)


def exit_process(code: int) -> NoReturn:
    """End the process.

    One of several processes leaves without taking the interpreter down: gloo's threads may still hold tensors, and
    letting one go without an interpreter aborts the process (pytorch/pytorch#179291), once in a dozen runs in parts.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
