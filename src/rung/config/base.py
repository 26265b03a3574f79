"""The base of all specs: frozen, unknown keys refused, documented by attribute docstrings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Spec(BaseModel):
    """A part of a config. The docstring below each field is its help text and its text in the JSON schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
ALL_LINEAR: tuple[Role, ...] = ("q", "k", "v", "o", "gate", "up", "down")
