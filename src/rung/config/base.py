"""Base class of all config classes, and types that several of them use.

Every section of a config is a frozen pydantic model: it is validated on construction, refuses unknown keys, and takes
its help texts and JSON schema from docstrings below the fields, so that documentation and code cannot drift apart.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """Base of all config classes. The docstring below a field is its description in the JSON schema."""

    # frozen: overrides and rungs build new configs. allow_inf_nan: YAML has .inf and .nan, run.json cannot hold them
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _run_check(self) -> Self:
        self._check()
        return self

    def _check(self) -> None:
        """Raise `ValueError` for settings that do not go together; called once all fields are valid."""


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
LinearRole = Literal["q", "k", "v", "o", "gate", "up", "down"]
# roles instead of module names: the same config fits every architecture (`models.targets` maps them)
ALL_LINEAR: tuple[LinearRole, ...] = ("q", "k", "v", "o", "gate", "up", "down")


def _require_distinct_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names) or "" in names:
        raise ValueError("tasks have different names, none of them empty")
    return names


Tasks = Annotated[tuple[str, ...], AfterValidator(_require_distinct_names)]
"""Task names, as in the data."""
