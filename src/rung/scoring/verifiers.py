"""Verifiable rewards: a function of the answer and of its row, from a metric, a pattern, tests or a Python file.

No model is needed, so a reward costs microseconds and cannot be gamed through a reward model's flaws, only through the
rule itself. A function from a file runs with the user's rights: it is the user's own code and is not sandboxed, while
the programs of answers are (`code_sandbox`).
`runs.auxiliary_models` makes the verifier of GRPO and PPO runs with `make_verifier`.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rung.config.objective import (
    CodeRewardConfig,
    FunctionRewardConfig,
    JudgeRewardConfig,
    RegexRewardConfig,
    VerifierConfig,
)
from rung.errors import ConfigError, DataError
from rung.scoring.answers import read_value
from rung.scoring.code_answers import run_answers
from rung.scoring.code_sandbox import require_isolation
from rung.scoring.math_answers import require_math_verify
from rung.scoring.metrics import METRICS, best_score, normalized, numeric
from rung.types import CodeTests

Row = Mapping[str, Any]
"""`question`, `expected`, `references` (further accepted answers), `tests` and `test_setup` (Python source, or None),
`context`, `task`, `group`, `source` (path, line), and `reasoning`: what the model wrote before its answer.
`expects_calls` is True where the row ends in tool calls; then `expected` is their canonical text (JSON with sorted
keys), and `calls` that of the calls in the answer, or None."""
Verifier = Callable[[str, Row], float]
RuleConfig = VerifierConfig | RegexRewardConfig | CodeRewardConfig | FunctionRewardConfig
"""Rewards without a model."""


class CodeVerifier:
    """The verifier that runs programs: 1 where all tests of the row pass. Several answers run at once."""

    def __init__(self, limits: CodeRewardConfig) -> None:
        self._limits = limits

    def __call__(self, answer: str, row: Row) -> float:
        """The reward of one answer."""
        return self.verify_all([answer], [row])[0]

    def verify_all(self, answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
        """The rewards of answers, each with the row beside it."""
        tests = [CodeTests(row["tests"], row.get("test_setup") or "") for row in rows]
        return [float(result.passed) for result in run_answers(answers, tests, self._limits)]


def verify_all(verifier: Verifier, answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """The rewards of answers, each with the row beside it."""
    if isinstance(verifier, CodeVerifier):
        return verifier.verify_all(answers, rows)
    return [verifier(answer, row) for answer, row in zip(answers, rows, strict=True)]


def make_verifier(config: RuleConfig, where: str = "objective.reward") -> Verifier:
    """The verifier of a config; `where` is the setting that names it.

    Raises `ConfigError` if the file or function does not exist, `PlanError` if programs cannot be isolated here.
    """
    if isinstance(config, CodeRewardConfig):
        require_isolation(f"{where}.kind")
        return CodeVerifier(config)
    if isinstance(config, RegexRewardConfig):
        return _pattern_verifier(re.compile(config.pattern))
    if isinstance(config, FunctionRewardConfig):
        return _function_verifier(config.path, f"{where}.path")
    metric = METRICS[config.kind].function
    if config.kind == "math":
        require_math_verify(f"{where}.kind")

    def verify(answer: str, row: Row) -> float:
        if row.get("expects_calls"):
            return float(row["calls"] == row["expected"])
        return best_score(metric, answer, row["expected"], row.get("references", ()))

    return verify


def needs_expected_answer(config: RuleConfig | JudgeRewardConfig) -> bool:
    """True if the verifier reads the expected answer: for a row without one the empty answer would be right."""
    if isinstance(config, JudgeRewardConfig):
        return config.against == "expected" or config.reference
    if isinstance(config, RegexRewardConfig):
        return re.compile(config.pattern).groups > 0
    return isinstance(config, VerifierConfig)


def _pattern_verifier(pattern: re.Pattern[str]) -> Verifier:
    def verify(answer: str, row: Row) -> float:
        match = pattern.search(answer)
        if match is None or not pattern.groups:
            return float(match is not None)
        # the group extracts the answer from its format
        return best_score(_same_answer, match.group(1) or "", row["expected"], row.get("references", ()))

    return verify


def _same_answer(text: str, expected: str) -> float:
    """`numeric` where the expected answer states a value, else `normalized`.

    Not the better of both: they disagree where `normalized` drops the brackets or signs that make another value.
    """
    metric = normalized if read_value(expected) is None else numeric
    return metric(text, expected)


def _function_verifier(path: str, where: str) -> Verifier:
    file, _, name = path.rpartition(":")
    spec = importlib.util.spec_from_file_location("rung_reward", file) if Path(file).is_file() else None
    if spec is None or spec.loader is None:
        raise ConfigError("there is no such file", where=where, given=file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look up their module by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        summary = f"this file does not run: {type(error).__name__}: {error}"
        raise ConfigError(summary, where=where, given=file) from error
    # only the name is looked up here; a wrong signature fails at the first answer
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise ConfigError("this file has no such function", where=where, given=path)

    def verify(answer: str, row: Row) -> float:
        try:
            # a copy: a function that changes its row must not change that of the next answer
            value = function(answer, dict(row))
        except Exception as error:
            summary = f"the reward function failed: {type(error).__name__}: {error}"
            raise DataError(summary, where=str(row["source"]), given=repr(answer[:80])) from error
        try:
            # float("1.0") would accept text that the function returned by mistake
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
        raise DataError(f"the reward function gave {value!r}, not a number", where=str(row["source"]))

    return verify
