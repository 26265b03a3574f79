"""The base of all configs: frozen, unknown keys refused, documented by attribute docstrings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """A part of a config. The docstring below each field is its help text and its text in the JSON schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
LinearRole = Literal["q", "k", "v", "o", "gate", "up", "down"]
ALL_LINEAR: tuple[LinearRole, ...] = ("q", "k", "v", "o", "gate", "up", "down")
