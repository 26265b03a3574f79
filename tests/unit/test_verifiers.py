"""Rewards that can be checked."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from rung.config.objective import FunctionSpec, RegexSpec, VerifierSpec
from rung.errors import ConfigError, DataError
from rung.scoring.verifiers import verifier

ROW = {"question": "What is 3 + 4?", "expected": "7", "group": "sums", "source": "rows.jsonl line 3"}


@pytest.mark.parametrize(
    ("kind", "answer", "worth"),
    [
        ("exact", "7", 1.0),
        ("exact", "seven", 0.0),
        ("normalised", " 7. ", 1.0),
        ("numeric", "that is 7.0", 1.0),
        ("numeric", "that is 8", 0.0),
    ],
)
def test_metrics(kind: str, answer: str, worth: float) -> None:
    assert verifier(VerifierSpec(kind=kind))(answer.strip() if kind != "exact" else answer, ROW) == worth  # type: ignore[arg-type]


def test_patterns() -> None:
    """Without a group a pattern must occur; with one it must catch the expected answer, as text or as a number."""
    assert verifier(RegexSpec(pattern=r"^The answer"))("The answer is 9", ROW) == 1.0
    assert verifier(RegexSpec(pattern=r"^The answer"))("It is 7", ROW) == 0.0
    boxed = verifier(RegexSpec(pattern=r"#### *(-?[\d.]+)"))
    assert boxed("3 + 4 = 7 #### 7.0", ROW) == 1.0
    assert boxed("#### 8", ROW) == boxed("7", ROW) == 0.0
    assert verifier(RegexSpec(pattern="a|(b)"))("a", ROW) == 0.0
    with pytest.raises(ValidationError, match="no regular expression"):
        RegexSpec(pattern="(")


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def worth(answer, row):\n    return 0.5 * (row['expected'] in answer) + (row['group'] == 'sums')\n"
        "def broken(answer, row):\n    return 1 / 0\n"
        "def odd(answer, row):\n    return 'much'\n"
        "value = 3\n"
    )
    assert verifier(FunctionSpec(path=f"{file}:worth"))("it is 7", ROW) == 1.5
    for name, said in (("broken", "division by zero"), ("odd", "not a number")):
        with pytest.raises(DataError, match=said) as caught:
            verifier(FunctionSpec(path=f"{file}:{name}"))("7", ROW)
        assert "line 3" in str(caught.value)
    for name in ("none", "value"):
        with pytest.raises(ConfigError, match="no such function"):
            verifier(FunctionSpec(path=f"{file}:{name}"))
    with pytest.raises(ConfigError, match="no such file"):
        verifier(FunctionSpec(path=f"{tmp_path}/none.py:worth"))
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(ConfigError, match="does not run"):
        verifier(FunctionSpec(path=f"{file}:worth"))
