"""Base class of all config classes, and types that several of them use.

Every section of a config is a frozen pydantic model: it is validated on construction, refuses unknown keys, and takes
its help texts and JSON schema from docstrings below the fields, so that documentation and code cannot drift apart.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Config(BaseModel):
    """Base of all config classes. The docstring below a field is its description in the JSON schema."""

    # frozen: overrides and rungs build new configs. allow_inf_nan: YAML has .inf and .nan, run.json cannot hold them
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _merge_section_defaults(cls, values: Any) -> Any:
        """Fill a nested section, of which only some settings are given, with the defaults that this class gives it.

        PPO's rollouts have other defaults than GRPO's: without this, one setting would reset the others to the defaults
        of the section's own class.
        """
        if not isinstance(values, Mapping):
            return values
        merged = dict(values)
        for name, field in cls.model_fields.items():
            default, value = field.default, values.get(name)
            if not isinstance(default, Config) or not isinstance(value, Mapping | type(default)):
                continue
            # only what this class sets: the rest are defaults of the section itself
            if defaults := {n: getattr(default, n) for n in default.model_fields_set}:
                merged[name] = {**defaults, **_settings_of(value)}
        return merged

    @model_validator(mode="before")
    @classmethod
    def _refuse_truth_values(cls, values: Any) -> Any:
        """Refuse true and false where a number is asked for: pydantic would read them as 1 and 0.

        YAML reads yes, no, on and off as truth values, so that `max_steps: on` was one step.
        """
        for name, field in cls.model_fields.items() if isinstance(values, Mapping) else ():
            if isinstance(value := values.get(name), bool) and not _takes_truth_values(field.annotation):
                raise ValueError(f"{name} is {str(value).lower()}, a truth value (YAML reads yes, no, on and off so)")
        return values

    @model_validator(mode="after")
    def _run_check(self) -> Self:
        self._check()
        return self

    def _check(self) -> None:
        """Raise `ValueError` for settings that do not go together; called once all fields are valid."""


def _takes_truth_values(annotation: Any) -> bool:
    """Whether a field of this type has truth values of its own, or is no number, which pydantic itself refuses."""
    members = _flat_types(annotation)
    return bool in members or True in members or False in members or not {int, float} & set(members)


def _flat_types(annotation: Any) -> list[Any]:
    """The types in a union and the values in a literal, without their annotations."""
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        inner = inner[:1]
    return [t for part in inner for t in _flat_types(part)] if inner else [annotation]


def _settings_of(section: Mapping[str, Any] | Config) -> dict[str, Any]:
    """The settings of a section that were given, without its defaults."""
    if isinstance(section, Config):
        return {name: getattr(section, name) for name in section.model_fields_set}
    return dict(section)


MAX_SEED = 2**63 - 2
"""Largest seed: torch takes 64 bits, and some generators take the seed and the number after it."""
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _local_path(path: str) -> str:
    if "\0" in path:
        raise ValueError("a path holds no NUL character")
    return os.path.expanduser(path)


LocalPath = Annotated[str, AfterValidator(_local_path)]
"""A path with ~ as the home folder: no shell has read it, and a folder of that name would be made."""


def _pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"this is no regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_pattern)]
"""A regular expression of Python."""


def shorthand(setting: str) -> BeforeValidator:
    """For a section of which YAML may give one setting alone, as a text or a list: `teacher: smollm2-135m`."""
    return BeforeValidator(lambda value: {setting: value} if isinstance(value, str | list | tuple) else value)


LinearRole = Literal["q", "k", "v", "o", "gate", "up", "down"]
# roles instead of module names: the same config fits every architecture (`models.targets` maps them)
ALL_LINEAR: tuple[LinearRole, ...] = ("q", "k", "v", "o", "gate", "up", "down")


def _require_distinct_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names) or "" in names:
        raise ValueError("tasks have different names, none of them empty")
    return names


Tasks = Annotated[tuple[str, ...], AfterValidator(_require_distinct_names)]
"""Task names, as in the data."""
