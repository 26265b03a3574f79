"""The `math` metric: equal by algebra, in bounded time, from any thread."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from typing import Any

import pytest

from rung.config.objective import VerifierConfig
from rung.errors import ConfigError
from rung.scoring import math_answers
from rung.scoring.math_answers import math
from rung.scoring.verifiers import make_verifier

needs_math_verify = pytest.mark.skipif(find_spec("math_verify") is None, reason="the extra math is not installed")


@needs_math_verify
@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("x + 1", "1 + x", 1),
        ("x + 1", "x - 1", 0),
        (r"\frac{1}{2}", "0.5", 1),
        (r"The answer is $\frac{2}{4}$.", r"\frac12", 1),
        (r"so \boxed{\{2, 1\}} of 3", r"\{1, 2\}", 1),
        ("(1, 2)", "(2, 1)", 0),
        ("6 + 12 = 18\n#### 18\n\nQuestion\n#### 7", "18", 1),
        ("#### 7\n#### 18", "18", 0),
        ("East.", r"\text{east}", 1),
        ("west", r"\text{east}", 0),
        (r"\boxed{B}", "(B)", 1),
        ("", "5", 0),
        ("2 hours and 20 minutes", "3 hours and 20 minutes", 0),
        ("It takes 3 hours and 20 minutes", "3 hours and 20 minutes", 0),
        ("3 of 5", "4 of 5", 0),
        ("", "", 1),
        (r"3\sqrt{20}", r"6\sqrt{5}", 1),
    ],
)
def test_math(answer: str, expected: str, score: float) -> None:
    assert math(answer, expected) == score


@needs_math_verify
def test_a_hostile_answer_costs_its_time_limit_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """sympy computes a tower of powers within one C call, which no signal interrupts."""
    assert math("3", "5") == 0.0  # the process runs
    monkeypatch.setattr(math_answers, "TIMEOUT", 0.5)
    start = time.monotonic()
    assert math("$10^{10^{10^{10}}}$", "5") == 0.0
    assert time.monotonic() - start < 5.0
    monkeypatch.undo()
    # a new process answers the next one
    assert math("x + 1", "1 + x") == 1.0


@needs_math_verify
def test_it_works_outside_the_main_thread() -> None:
    scores: list[float] = []
    threads = [threading.Thread(target=lambda: scores.append(math("2x", "x + x"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert scores == [1.0, 1.0, 1.0]


@needs_math_verify
def test_as_a_reward() -> None:
    row: dict[str, Any] = {"expected": "x + 1", "references": ("2", r"\frac{1}{2}"), "source": "here"}
    verify = make_verifier(VerifierConfig(kind="math"))
    assert verify("$1 + x$", row) == verify("0.5", row) == 1.0
    assert verify("3", row) == 0.0


def test_without_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"rung\[math\]"):
        make_verifier(VerifierConfig(kind="math"))


def test_nothing_heavy_is_imported_by_the_other_metrics() -> None:
    code = (
        "import sys; from rung.scoring.metrics import METRICS; METRICS['numeric'].function('1/2', '0.5');"
        "assert not {'math_verify', 'sympy', 'antlr4', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@needs_math_verify
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"$\frac{1}{2^{99}}$", r"$\frac{1}{2^{98}}$"),
        (r"$\frac{1}{2004!}$", r"$\frac{1}{2006!}$"),
        (r"$\frac{2^{2005}+1}{3 \cdot 2^{2006}}$", r"$\frac{1}{3 \cdot 2^{2006}}$"),
        ("0", r"$\frac{1}{2^{99}}$"),
        (r"$1 + \frac{1}{\mathrm{e}}$", r"$1 - \frac{1}{\mathrm{e}}$"),
        (r"$1, 2, \ldots, n$", r"$1, 3, 5, \ldots, 2n-1$"),
    ],
)
def test_different_answers_that_math_verify_takes_for_equal(answer: str, expected: str) -> None:
    """It takes differences below 1e-15 for nothing, and reads only the beginning of some formulas."""
    assert math(answer, expected) == 0.0
    assert math(f"The answer is {expected}", expected) == 1.0


@needs_math_verify
@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        (r"\boxed{2}. Wait, \boxed{3}", "3", 1),
        (r"\boxed{35 cm} then \boxed{4}", "4", 1),
        (r"C is wrong \boxed{C} ... \boxed{\text{E}}", "E", 1),
        (r"$x=\boxed{1}$ or $x=\boxed{2}$", "1, 2", 1),
        (r"\boxed{1}, \boxed{2}", "2", 0),
        ("pi/2", r"\dfrac{\pi}{2}", 1),
        ("-2*pi", r"-2\pi", 1),
        ("-1 + exp(16)", "e^{16} - 1", 1),
        (r"1/\mathrm{e}", "1/e", 1),
        ("0.333333", r"\frac13", 1),
        ("pie", "pi", 0),
    ],
)
def test_the_last_box_counts_and_names_of_sympy_are_read(answer: str, expected: str, score: float) -> None:
    assert math(answer, expected) == score
