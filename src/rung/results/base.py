"""What all results have in common, and the two that stand in most of them: a score with its interval, and a gate."""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer


class Result(BaseModel):
    """The base of all results. Unknown fields are kept, for example the numbers that only one objective logs."""

    # extra="allow": a manifest that a later version wrote must survive being read and written by this one
    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the fields that were given, under their own names."""
        return self.model_dump(mode="json", exclude_unset=True, by_alias=True)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return self.model_copy(update=changes)


# JSON has no infinity and no NaN: they are null there
_finite_or_null = PlainSerializer(lambda number: number if math.isfinite(number) else None, when_used="json")


Mean = Annotated[float, BeforeValidator(lambda number: math.nan if number is None else number), _finite_or_null]


LowerBound = Annotated[float, BeforeValidator(lambda number: -math.inf if number is None else number), _finite_or_null]


UpperBound = Annotated[float, BeforeValidator(lambda number: math.inf if number is None else number), _finite_or_null]


class Estimate(Result):
    """A mean score, or a paired difference of two, with its 95 % interval."""

    mean: Mean
    """Of a difference: second minus first, in points of the metric."""
    low: LowerBound
    """Minus infinity where these items give no lower bound."""
    high: UpperBound
    """Infinity where these items give no upper bound."""
    examples: int = 0
    clusters: int = 0
    method: str = ""
    """How the interval was computed, for example `clopper-pearson` or `t on clusters`."""
    p_value: float | None = None
    """Of a difference, two-sided: exact McNemar for binary scores without clusters, or a test that replaced it."""

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


class GateResult(Result):
    """What a gate measured."""

    name: str
    state: str
    """passed, failed or not_reached; a later version may write others."""
    measured: Any = None
    limit: Any = None
