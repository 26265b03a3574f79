"""The process behind the `math` metric: reads pairs of answers as lines of JSON, writes true, false or null.

A script without any import of Rung, so that it starts as fast as sympy does; `math_answers.py` starts and kills it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MEMORY = 2 << 30
"""Bytes of address space: a number of a billion digits ends in `MemoryError` instead of a full machine."""


def compare(answer: str, expected: str) -> bool | None:
    """Whether the answer is the expected one; None if math-verify cannot read the expected one."""
    from math_verify import parse, verify

    # without its own time limits, which are signals: the parent kills this process
    try:
        gold: list[Any] = parse(expected, parsing_timeout=None)
    except Exception:
        return None
    if not gold:
        return None
    try:
        return bool(verify(gold, parse(answer, parsing_timeout=None), timeout_seconds=None))
    except Exception:
        return False


def main() -> None:
    """Answer until the pipe closes."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):
        pass  # Windows and some systems have no such limit; the time limit stays
    import math_verify  # noqa: F401

    print("ready", flush=True)
    for line in iter(sys.stdin.readline, ""):
        answer, expected = json.loads(line)
        print(json.dumps(compare(answer, expected)), flush=True)


if __name__ == "__main__":
    main()
