"""Rewards that can be checked: a function of the answer and of its row."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rung.config.objective import FunctionSpec, RegexSpec, VerifierSpec
from rung.errors import ConfigError, DataError
from rung.scoring.metrics import METRICS, normalised, numeric

Row = Mapping[str, Any]
"""`question`, `expected`, `context`, `task`, `group`, and `source`, where the row came from."""
Verifier = Callable[[str, Row], float]


def verifier(spec: VerifierSpec | RegexSpec | FunctionSpec) -> Verifier:
    """What a spec says. Raises `ConfigError` for a function that is not there."""
    if isinstance(spec, RegexSpec):
        return _by_pattern(re.compile(spec.pattern))
    if isinstance(spec, FunctionSpec):
        return _by_function(spec.path)
    metric = METRICS[spec.kind].function
    return lambda answer, row: float(metric(answer, row["expected"]))


def expects(spec: VerifierSpec | RegexSpec | FunctionSpec) -> bool:
    """Whether it compares with the expected answer: of a row without one the empty answer would be right."""
    return isinstance(spec, VerifierSpec) or (isinstance(spec, RegexSpec) and re.compile(spec.pattern).groups > 0)


def _by_pattern(pattern: re.Pattern[str]) -> Verifier:
    def verify(answer: str, row: Row) -> float:
        found = pattern.search(answer)
        if found is None or not pattern.groups:
            return float(found is not None)
        said = found.group(1) or ""
        return max(normalised(said, row["expected"]), numeric(said, row["expected"]))

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
