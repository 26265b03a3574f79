"""Limits of the programs that answers hold, which rewards and metrics run against the tests of their rows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rung.config.base import Config


class CodeLimitsConfig(Config):
    """Limits of one program."""

    timeout_seconds: Annotated[float, Field(gt=0.0, le=3600.0)] = 3.0
    """Seconds of wall time until a program with its tests is killed; the start of its interpreter counts."""
    memory_mib: Annotated[int, Field(ge=64)] = 1024
    """MiB of address space of a program."""
