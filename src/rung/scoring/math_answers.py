r"""The `math` metric: answers compared by math-verify, which parses LaTeX with a grammar and asks sympy.

It knows what `numeric` does not: `x + 1` is `1 + x`, `\{1, 2\}` is `\{2, 1\}`. The price is milliseconds an answer, and
that a hostile answer such as a tower of powers keeps sympy busy for hours inside one C call, where no signal reaches
Python; math-verify's own limit is such a signal, and works in the main thread alone. So one process of its own
(`math_worker.py`) compares for all threads of this one, and is killed at `TIMEOUT`.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

from rung.errors import ConfigError
from rung.scoring.answers import MAX_CHARACTERS, final_texts
from rung.scoring.latex import last_boxes, plain_math
from rung.scoring.words import normalize

TIMEOUT = 5.0
"""Seconds for one comparison: math-verify's own default for each of its steps."""
START_TIMEOUT = 120.0
"""Seconds for a new process to import sympy, on a machine that is busy."""


def math(answer: str, expected: str) -> float:
    r"""1 when math-verify finds the answer equal to the expected one, else 0: `\frac{1}{2}` equals `0.5` and `2/4`.

    What is compared: the line behind the first `####`, else the last `\boxed{}` (boxes that a comma or `and` joins are
    one answer) or formula, else the last number. An expected answer that math-verify cannot read as a whole, with an
    ellipsis, or with several numbers among words, is compared by words, as `normalized` does. A comparison that takes
    longer than `TIMEOUT` or needs more than 2 GiB scores 0. Raises `ConfigError` without the extra `math`.
    """
    if answer.strip() == expected.strip():
        return 1.0
    if not answer.strip():
        return 0.0
    # of several numbers among words, as in `2 hours and 20 minutes`, math-verify would compare the last alone
    # and of `1, 2, \ldots, n` it would read a part
    formula = _formula(expected)
    if not _has_numbers_among_words(expected) and not _ELLIPSIS.search(formula):
        verdict = _WORKER.compare(_formula(answer), formula)
        if verdict is not None:
            return float(verdict)
    expected_words = normalize(plain_math(expected))
    return float(any(normalize(plain_math(text)) == expected_words for text in final_texts(answer)))


def require_math_verify(where: str) -> None:
    """Raise `ConfigError` if the extra of this metric is not installed. Imports nothing."""
    if importlib.util.find_spec("math_verify") is None:
        hint = "pip install 'rung[math]'"
        raise ConfigError("the metric math needs math-verify", where=where, given="math", hint=hint)


def _has_numbers_among_words(text: str) -> bool:
    if "####" in text or "\\" in text or "$" in text:
        return False
    words = text.split()
    is_word = [len(word) > 1 and word.strip(".,;:").isalpha() for word in words]
    return any(is_word) and sum(any(c.isdigit() for c in word) for word in words) > 1


def _formula(text: str) -> str:
    """The part of a text that is compared, between the delimiters that math-verify looks for."""
    text = text.split("####", 2)[1].strip().split("\n")[0] if "####" in text else text[-MAX_CHARACTERS:]
    # math-verify reads `\mathrm{e}` as the end of the formula, and all boxes of a text as one set
    text = _UPRIGHT_LETTER.sub(r"\1", last_boxes(text) or text)
    has_delimiters = "$" in text.replace("\\$", "") or any(mark in text for mark in ("\\boxed", "\\(", "\\["))
    is_prose = len(text.split()) > 1 and any(len(word) > 1 and word.isalpha() for word in text.split())
    if has_delimiters or (is_prose and "\\" not in text):
        return text
    return f"${_ASCII_NAME.sub(_as_command, text.strip().removesuffix('.'))}$"


_UPRIGHT_LETTER = re.compile(r"\\(?:mathrm|operatorname)\s*\{\s*([A-Za-z])\s*\}")
_ASCII_NAME = re.compile(r"(?<![A-Za-z\\])(?:pi(?![A-Za-z])|(?:exp|sin|cos|tan|log|ln)(?=\())")
"""Names of the language of sympy, which LaTeX would read as products of letters."""
_ELLIPSIS = re.compile(r"\\[lc]?dots(?![A-Za-z])|\u2026|\.\.\.")


def _as_command(match: re.Match[str]) -> str:
    return f"\\{match[0]} " if match[0] == "pi" else f"\\{match[0]}"


class _Worker:
    """The process that compares; started when it is first needed, and again after it was killed or forked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def compare(self, answer: str, expected: str) -> bool | None:
        """Whether they are equal; None if the expected answer cannot be read. False at the time limit."""
        with self._lock:
            process = self._running()
            reply = self._ask(process, json.dumps([answer, expected]) + "\n", TIMEOUT)
            if not reply:
                self.close()
                return False
        verdict: bool | None = json.loads(reply)
        return verdict

    def close(self) -> None:
        """Kill the process."""
        # a process inherited from a fork belongs to the parent
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._owner == os.getpid():
            return self._process
        require_math_verify("evaluation.metrics")
        # -P: no file beside the worker hides a module of the standard library
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # a session of its own: Ctrl-C is for the parent, whose end closes the pipe
        process = subprocess.Popen(command, text=True, encoding="ascii", start_new_session=True, **pipes)  # noqa: S603
        self._process, self._owner = process, os.getpid()
        if not self._ask(process, "", START_TIMEOUT):
            self.close()
            raise ConfigError(
                "math-verify does not start", given=" ".join(command), hint="python -c 'import math_verify'"
            )
        return process

    @staticmethod
    def _ask(process: subprocess.Popen[str], line: str, seconds: float) -> str:
        """The line that the process answers; empty if it is killed or dead."""
        assert process.stdin is not None and process.stdout is not None  # noqa: S101
        streams: tuple[IO[str], IO[str]] = (process.stdin, process.stdout)
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            streams[0].write(line)
            streams[0].flush()
            return streams[1].readline()
        except OSError:
            return ""
        finally:
            timer.cancel()


_WORKER = _Worker()
atexit.register(_WORKER.close)
