"""Rewards that can be checked."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from rung.config.objective import FunctionRewardConfig, RegexRewardConfig, VerifierConfig
from rung.errors import ConfigError, DataError
from rung.scoring.verifiers import make_verifier

ROW = {"question": "What is 3 + 4?", "expected": "7", "group": "sums", "source": "rows.jsonl line 3"}


@pytest.mark.parametrize(
    ("kind", "answer", "worth"),
    [
        ("exact", "7", 1.0),
        ("exact", "seven", 0.0),
        ("normalized", " 7. ", 1.0),
        ("numeric", "that is 7.0", 1.0),
        ("numeric", "that is 8", 0.0),
    ],
)
def test_metrics(kind: str, answer: str, worth: float) -> None:
    assert make_verifier(VerifierConfig(kind=kind))(answer.strip() if kind != "exact" else answer, ROW) == worth  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["exact", "normalized", "numeric"])
def test_a_reward_for_saying_nothing(kind: str) -> None:
    """Rows that end in a tool call had an empty expected answer: nothing was worth 1 and the right call 0."""
    verify, call = make_verifier(VerifierConfig(kind=kind)), '[{"arguments": {"x": 1}, "name": "f"}]'  # type: ignore[arg-type]
    row = {**ROW, "expected": call, "expects_calls": True}
    assert verify("<call>f(x=1)", {**row, "calls": call}) == 1.0
    assert verify("", {**row, "calls": None}) == verify(call, {**row, "calls": call.replace("1", "2")}) == 0.0


def test_patterns() -> None:
    """Without a group a pattern must occur; with one it must catch the expected answer, as text or as a number."""
    assert make_verifier(RegexRewardConfig(pattern=r"^The answer"))("The answer is 9", ROW) == 1.0
    assert make_verifier(RegexRewardConfig(pattern=r"^The answer"))("It is 7", ROW) == 0.0
    boxed = make_verifier(RegexRewardConfig(pattern=r"#### *(-?[\d.]+)"))
    assert boxed("3 + 4 = 7 #### 7.0", ROW) == 1.0
    assert boxed("#### 8", ROW) == boxed("7", ROW) == 0.0
    assert make_verifier(RegexRewardConfig(pattern="a|(b)"))("a", ROW) == 0.0
    with pytest.raises(ValidationError, match="no regular expression"):
        RegexRewardConfig(pattern="(")


def test_a_group_catches_a_quantity_and_not_a_part_of_it() -> None:
    """`either metric may accept it`: 3/2 for 1/2, and (2, x) for [2, x]."""
    boxed = make_verifier(RegexRewardConfig(pattern=r"^answer: (.*)$"))
    for answer, expected in (
        ("3/2", "1/2"),
        ("(5, 4)", "(3, 4)"),
        (r"2\pi", "2"),
        ("3:30", "2:30"),
        ("(2,x)", "[2,x]"),
    ):
        assert boxed(f"answer: {answer}", {**ROW, "expected": expected}) == 0.0
        assert boxed(f"answer: {expected}", {**ROW, "expected": expected}) == 1.0
    assert boxed("answer: 0.5", {**ROW, "expected": "1/2"}) == 1.0
    assert boxed("answer: Not disclosed.", {**ROW, "expected": "not disclosed"}) == 1.0


@pytest.mark.parametrize("kind", ["exact", "normalized", "numeric"])
def test_each_of_several_references_is_right(kind: str) -> None:
    verify = make_verifier(VerifierConfig(kind=kind))  # type: ignore[arg-type]
    row = {**ROW, "references": ("8", "9")}
    assert verify("7", row) == verify("9", row) == 1.0
    assert verify("6", row) == 0.0
    assert make_verifier(RegexRewardConfig(pattern=r"(\d+)"))("it is 8", row) == 1.0


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def worth(answer, row):\n    return 0.5 * (row['expected'] in answer) + (row['group'] == 'sums')\n"
        "def broken(answer, row):\n    return 1 / 0\n"
        "def odd(answer, row):\n    return 'much'\n"
        "value = 3\n"
    )
    assert make_verifier(FunctionRewardConfig(path=f"{file}:worth"))("it is 7", ROW) == 1.5
    for name, said in (("broken", "division by zero"), ("odd", "not a number")):
        with pytest.raises(DataError, match=said) as caught:
            make_verifier(FunctionRewardConfig(path=f"{file}:{name}"))("7", ROW)
        assert "line 3" in str(caught.value)
    for name in ("none", "value"):
        with pytest.raises(ConfigError, match="no such function"):
            make_verifier(FunctionRewardConfig(path=f"{file}:{name}"))
    with pytest.raises(ConfigError, match="no such file"):
        make_verifier(FunctionRewardConfig(path=f"{tmp_path}/none.py:worth"))
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(ConfigError, match="does not run"):
        make_verifier(FunctionRewardConfig(path=f"{file}:worth"))
