"""Rewards that can be checked: a function of the answer and of its row."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rung.config.objective import FunctionRewardConfig, RegexRewardConfig, VerifierConfig
from rung.errors import ConfigError, DataError
from rung.scoring.metrics import METRICS, normalized, numeric

Row = Mapping[str, Any]
"""`question`, `expected`, `context`, `task`, `group`, and `source`, where the row came from."""
Verifier = Callable[[str, Row], float]


def make_verifier(config: VerifierConfig | RegexRewardConfig | FunctionRewardConfig) -> Verifier:
    """What a config says. Raises `ConfigError` for a function that is not there."""
    if isinstance(config, RegexRewardConfig):
        return _by_pattern(re.compile(config.pattern))
    if isinstance(config, FunctionRewardConfig):
        return _by_function(config.path)
    metric = METRICS[config.kind].function
    return lambda answer, row: float(metric(answer, row["expected"]))


def needs_expected_answer(config: VerifierConfig | RegexRewardConfig | FunctionRewardConfig) -> bool:
    """Whether it compares with the expected answer: of a row without one the empty answer would be right."""
    return isinstance(config, VerifierConfig) or (
        isinstance(config, RegexRewardConfig) and re.compile(config.pattern).groups > 0
    )


def _by_pattern(pattern: re.Pattern[str]) -> Verifier:
    def verify(answer: str, row: Row) -> float:
        found = pattern.search(answer)
        if found is None or not pattern.groups:
            return float(found is not None)
        said = found.group(1) or ""
        return max(normalized(said, row["expected"]), numeric(said, row["expected"]))

    return verify


def _by_function(path: str) -> Verifier:
    file, _, name = path.rpartition(":")
    found = importlib.util.spec_from_file_location("rung_reward", file) if Path(file).is_file() else None
    if found is None or found.loader is None:
        raise ConfigError("there is no such file", where="objective.reward.path", given=file)
    module = importlib.util.module_from_spec(found)
    sys.modules[module.__name__] = module  # dataclasses look their own module up
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            f"this file does not run: {type(error).__name__}: {error}", where="objective.reward.path", given=file
        ) from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise ConfigError("this file has no such function", where="objective.reward.path", given=path)

    def verify(answer: str, row: Row) -> float:
        try:
            value = function(answer, dict(row))
        except Exception as error:
            what = f"the reward function failed: {type(error).__name__}: {error}"
            raise DataError(what, where=str(row["source"]), given=repr(answer[:80])) from error
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
        raise DataError(f"the reward function gave {value!r}, not a number", where=str(row["source"]))

    return verify
