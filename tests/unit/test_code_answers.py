"""The program of an answer, the tests of a row, and the reward and the metric that run one against the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rung.config.code import CodeLimitsConfig
from rung.config.data import DataConfig
from rung.config.evaluation import EvaluationConfig
from rung.config.objective import CodeRewardConfig
from rung.data.check import inspect_data
from rung.data.code_tests import parse_code_tests
from rung.data.formats import load_records
from rung.data.records import Records, encode_record, fingerprint
from rung.errors import DataError
from rung.scoring.code_answers import extract_program, require_tests, run_answers
from rung.scoring.verifiers import CodeVerifier, make_verifier, needs_expected_answer, verify_all
from rung.types import CodeTests, Message, Record, Source
from sandboxes import needs_isolation

LIMITS = CodeLimitsConfig(timeout_seconds=30.0)


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```py\nx = 1\n```", "x = 1\n"),
        ("```Python3\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("``` python\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nbetter:\n```python\nx = 2\n```", "x = 2\n"),
        # a block of another language is not the program
        ("```python\nx = 1\n```\nRun it:\n```sh\npython x.py\n```", "x = 1\n"),
        ("```sh\nls\n```", "```sh\nls\n```"),
        # truncated, or a stop text took the closing fence
        ("```python\nx = 1\n", "x = 1\n"),
        ("```python\nx = 1\n```\n```python\nx = 2", "x = 2\n"),
        # fences inside of a program
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
        ("~~~python\nx = 1\n~~~", "x = 1\n"),
        ("```python\n~~~\n```", "~~~\n"),
        ("  ```python\nx = 1\n  ```", "x = 1\n"),
        ("use `x` and ```y```", "use `x` and ```y```"),
        ("```python\n```", "\n"),
        ("", ""),
        # an example of use or its output behind the program is not the program
        ("```python\ndef f(): pass\n```\nUse it:\n```python\nf()\n```\n```\n1\n```", "def f(): pass\n"),
        ("```python\nx = 1\n```\nprints\n```\n1\n```", "x = 1\n"),
        ("```python\ndef f(): pass\n```\nor\n```\nclass A: pass\n```", "class A: pass\n"),
    ],
)
def test_the_program_of_an_answer(answer: str, program: str) -> None:
    assert extract_program(answer) == program


def get(row: dict[str, Any]) -> Callable[[str], Any]:
    return row.get


@pytest.mark.parametrize(
    ("row", "tests"),
    [
        ({}, None),
        ({"tests": None}, None),
        ({"tests": []}, None),
        ({"tests": "", "entry_point": "f"}, None),
        ({"tests": "assert f(1)"}, CodeTests("assert f(1)")),
        ({"tests": ["assert f(1)", "assert f(2)"]}, CodeTests("assert f(1)\nassert f(2)")),
        (
            {"tests": ["assert f(1)"], "test_setup": ["import math", "import re"]},
            CodeTests("assert f(1)", "import math\nimport re"),
        ),
        (
            {"tests": "def check(c): assert c(1)", "entry_point": "f"},
            CodeTests("def check(c): assert c(1)\ncheck(f)"),
        ),
        ({"tests": "for x in (1, 2):\n    if f(x): raise ValueError"}, ...),
        ({"tests": "def main(): assert f(1)\nmain()"}, ...),
    ],
)
def test_the_tests_of_a_row(row: dict[str, Any], tests: Any) -> None:
    parsed = parse_code_tests(get(row))
    assert parsed is not None if tests is ... else parsed == tests


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tests": "assert f("}, "tests is no Python"),
        ({"tests": "assert 1", "test_setup": "import"}, "test_setup is no Python"),
        ({"tests": "x = '\0'"}, "tests is no Python"),
        ({"tests": {"inputs": ["1"], "outputs": ["2"]}}, "not Python source"),
        ({"tests": [{"input": "1"}]}, "not Python source"),
        ({"tests": '[{"input": "1", "output": "2"}]'}, "run nothing"),
        # what every program would pass
        ({"tests": "def check(candidate):\n    assert candidate(1) == 2"}, "run nothing"),
        ({"tests": "class T(TestCase):\n    def test(self): self.assertTrue(f(1))"}, "run nothing"),
        ({"tests": "# nothing"}, "run nothing"),
        # a wrong program passed: failures are counted, and nothing is raised
        ({"tests": "import unittest\nunittest.main(exit=False)"}, "tests call unittest.main"),
        ({"tests": "import doctest\ndoctest.testmod()"}, "tests call doctest.testmod"),
        ({"tests": "unittest.TextTestRunner().run(suite)"}, "tests call unittest.TextTestRunner"),
        ({"tests": "import math\nx = 1\nf = lambda: g()"}, "run nothing"),
        ({"tests": "assert 1", "entry_point": "f(); x"}, "not the name of a function"),
        ({"tests": "assert 1", "entry_point": 7}, "not the name of a function"),
    ],
)
def test_tests_that_cannot_test(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parse_code_tests(get(row))


MBPP = {
    "task_id": 2,
    "text": "Write a function to add one.",
    "code": "def add(x):\n    return x + one",
    "test_list": ["assert add(1) == 2", "assert add(-1) == 0"],
    "test_setup_code": "one = 1",
    "challenge_test_list": [],
}
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Sum of xs."""\n',
    "canonical_solution": "    return sum(xs)\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n",
    "entry_point": "total",
}
SANITIZED = {
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "task_id": 2,
    "prompt": "Write a function to take a square root.",
    "code": "def root(x):\n    return math.sqrt(x)",
    "test_imports": ["import math"],
    "test_list": ["assert root(4) == 2", "assert root(9) == 3"],
}
MAPS = {
    "sanitized": {"completion": "code", "tests": "test_list", "test_setup": "test_imports"},
    "mbpp": {"prompt": "text", "completion": "code", "tests": "test_list", "test_setup": "test_setup_code"},
    "human_eval": {"prompt": "prompt", "completion": "canonical_solution", "tests": "test", "test_setup": "prompt"},
}


@pytest.mark.parametrize(("name", "row"), [("mbpp", MBPP), ("sanitized", SANITIZED), ("human_eval", HUMAN_EVAL)])
@needs_isolation
def test_public_rows(name: str, row: dict[str, Any], tmp_path: Path) -> None:
    """MBPP and HumanEval as they are published, with the maps of the docs: right answers pass, wrong ones do not."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    config = DataConfig(path=str(file), map=MAPS[name])
    (record,) = load_records(config, str(file)).records
    assert record.tests is not None
    right = row.get("code", "def total(xs: List[int]) -> int:\n    return sum(xs)")
    answers = [f"Of course:\n```python\n{right}\n```", right.replace("return ", "return 7 or "), "pass"]
    passed = [result.passed for result in run_answers(answers, [record.tests] * 3, LIMITS)]
    assert passed == [True, False, False]
    report = inspect_data(config)
    assert f"tests <- {MAPS[name]['tests']} (1 of 1 rows)" in str(report.detections[str(file)])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q"},
        {"question": "q", "answer": "a"},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_every_format_of_questions_carries_tests(row: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    tests = {"tests": ["assert f()"], "test_setup": "x = 1"}
    file.write_text(json.dumps({**row, **tests}) + "\n" + json.dumps({**row, "tests": "assert f("}) + "\n")
    config = DataConfig(path=str(file), rejects="drop", format="prompt_only" if list(row) == ["prompt"] else "auto")
    loaded = load_records(config, str(file))
    assert [record.tests for record in loaded.records] == [CodeTests("assert f()", "x = 1")]
    assert "tests is no Python" in loaded.rejected_rows[0].reason


def test_records_with_tests_stay_what_they_are_on_disk() -> None:
    plain = Record((Message("user", "q"), Message("assistant", "a")), Source("d", 1))
    records = [
        Record(plain.messages, plain.source, tests=CodeTests("assert 1")),
        Record(plain.messages, plain.source, tests=CodeTests("assert 1", "x"), references=("b",), score=0.5),
        plain,
    ]
    assert list(Records.from_records(records)) == records
    assert len({fingerprint([record]) for record in records}) == 3
    # the fingerprint of data without tests stays that of earlier versions
    assert json.loads(encode_record(plain)) == [
        [["user", "q", None, None], ["assistant", "a", None, None]],
        *(None, None, None, 1.0, None),
    ]


def test_tests_beside_a_tool_call_are_refused(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": turns, "tests": "assert f()"}) + "\n")
    with pytest.raises(DataError, match="1 of 1 rows") as caught:
        load_records(DataConfig(path=str(file)), str(file))
    assert "tests are for programs" in str(caught.value)


def test_a_row_without_tests_is_named() -> None:
    turns = (Message("user", "q"), Message("assistant", "a"))
    records = [
        Record(turns, Source("d.jsonl", 1), tests=CodeTests("assert 1")),
        Record(turns, Source("d.jsonl", 2)),
    ]
    with pytest.raises(DataError, match="^d.jsonl line 2: this row has no tests"):
        require_tests(records, "objective.reward.kind")
    require_tests(records[:1], "objective.reward.kind")


@needs_isolation
def test_the_reward() -> None:
    config = CodeRewardConfig(timeout_seconds=30.0)
    verifier = make_verifier(config)
    assert isinstance(verifier, CodeVerifier) and not needs_expected_answer(config)
    row = {"tests": "assert f() == one", "test_setup": "one = 1", "expected": "", "source": "d line 1"}
    assert verifier("def f(): return 1", row) == 1.0 and verifier("def f(): return 2", row) == 0.0
    answers = ["def f(): return 1", "def f(): return 2", "1 +", ""]
    assert verify_all(verifier, answers, [row] * 4) == [1.0, 0.0, 0.0, 0.0]
    # other verifiers are asked answer by answer
    assert verify_all(lambda answer, row: len(answer), ["a", "bc"], [row] * 2) == [1.0, 2.0]


@needs_isolation
def test_the_limits_reach_the_program() -> None:
    tests = [CodeTests("f()")]
    slow, large = "import time\ndef f(): time.sleep(5)", "def f(): bytearray(400 << 20)"
    assert run_answers([slow], tests, CodeLimitsConfig(timeout_seconds=0.5))[0].reason == "timeout"
    assert run_answers([large], tests, CodeLimitsConfig(timeout_seconds=30, memory_mib=256))[0].reason == "memory"
    assert run_answers([large], tests, CodeLimitsConfig(timeout_seconds=30, memory_mib=1024))[0].passed


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValidationError, match="code_limits is for metrics"):
        EvaluationConfig(code_limits=CodeLimitsConfig(timeout_seconds=5.0))
    assert EvaluationConfig(metrics=("code",), code_limits=CodeLimitsConfig(timeout_seconds=5.0))
    for wrong in ({"timeout_seconds": 0.0}, {"memory_mib": 1}, {"timeout_seconds": 1e9}):
        with pytest.raises(ValidationError):
            CodeRewardConfig(**wrong)  # type: ignore[arg-type]
