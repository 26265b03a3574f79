"""The process behind the `math` metric: reads pairs of answers as lines of JSON, writes true, false or null.

A script without any import of Rung, so that it starts as fast as sympy does; `math_answers.py` starts and kills it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MEMORY = 2 << 30
"""Bytes of address space: a number of a billion digits ends in `MemoryError` instead of a full machine."""

QUOTIENT_DIGITS = 30
QUOTIENT_TOLERANCE = 1e-15
"""Relative difference from which two exact numbers are different: that of `float64`, which math-verify evaluates to."""


def compare(answer: str, expected: str) -> bool | None:
    """Whether the answer is the expected one; None if math-verify cannot read the expected one."""
    from math_verify import parse, verify

    # without its own time limits, which are signals: the parent kills this process
    try:
        gold: list[Any] = parse(expected, parsing_timeout=None)
    except Exception:
        return None
    if not gold or _is_part(gold):
        return None
    try:
        given: list[Any] = parse(answer, parsing_timeout=None)
        return not _is_part(given) and bool(verify(gold, given, timeout_seconds=None)) and not _differ(gold, given)
    except Exception:
        return False


def _is_part(parsed: list[Any]) -> bool:
    r"""Whether only the beginning of a formula was read: its last item is the text that was, `1 - \frac{1}{`."""
    return any(isinstance(item, str) and item.count("{") != item.count("}") for item in parsed[-1:])


def _differ(gold: list[Any], given: list[Any]) -> bool:
    """Whether two exact numbers are different, though math-verify, which takes what is near 0 as 0, finds them equal.

    1/2**99 and 1/2**98 are both within 1e-15 of 0. Their quotient is 2.
    """
    from sympy import Basic, Float  # type: ignore[import-untyped,unused-ignore]

    first, second = gold[0], given[0]
    if not all(isinstance(x, Basic) and x.is_number and not x.has(Float) for x in (first, second)):
        return False
    if first.is_zero or second.is_zero:
        return bool(first.is_zero) != bool(second.is_zero)
    return bool(abs((first / second).evalf(QUOTIENT_DIGITS) - 1) > QUOTIENT_TOLERANCE)


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
