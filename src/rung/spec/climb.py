"""Which rungs are measured and when one is enough."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from rung.spec.base import Share, Spec

RungKind = Literal[
    "zero_shot",
    "few_shot",
    "prompt",
    "prefix",
    "p_tuning",
    "head",
    "bottleneck",
    "lora",
    "qlora",
    "lottery",
    "mixture",
    "peft",
    "full",
]


class RungSpec(Spec):
    """One rung. In YAML the kind alone is enough: `rungs: [zero_shot, few_shot, lora]`."""

    kind: RungKind
    name: str | None = None
    """Name in the ladder; none is the kind."""
    shots: PositiveInt | None = None
    """few_shot only: worked examples, instead of `evaluate.shots`."""
    method: dict[str, Any] = Field(default_factory=dict)
    """Tuned rungs only: settings of the method that differ from the config's `method`."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Tuned rungs only: settings that differ from the config's `engine`."""

    @property
    def label(self) -> str:
        """Name in the ladder."""
        return self.name or self.kind

    @property
    def slug(self) -> str:
        """Name of its folder."""
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in self.label.lower()).strip(".") or self.kind


class ClimbSpec(Spec):
    """The ladder."""

    rungs: tuple[RungSpec, ...] = (RungSpec(kind="zero_shot"), RungSpec(kind="few_shot"), RungSpec(kind="lora"))
    """Rungs to measure, lowest first."""
    margin: Share = 0.05
    """A rung is enough when its interval excludes being worse than the best by more than this."""
    target: PositiveFloat | None = None
    """A rung is also enough when its score surely reaches this (perplexity: stays below)."""
    seeds: PositiveInt = 1
    """Training runs per tuned rung. Above 1 the spread between them widens the intervals."""

    @field_validator("rungs", mode="before")
    @classmethod
    def _names_alone(cls, rungs: Any) -> Any:
        return [{"kind": r} if isinstance(r, str) else r for r in rungs] if isinstance(rungs, list | tuple) else rungs

    @field_validator("rungs")
    @classmethod
    def _distinct(cls, rungs: tuple[RungSpec, ...]) -> tuple[RungSpec, ...]:
        labels = [r.label for r in rungs]
        if not labels:
            raise ValueError("a ladder needs at least one rung")
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"rung {twice[0]!r} stands twice; give each a `name`")
        slugs = [r.slug for r in rungs]
        if alike := [r.label for r in rungs if slugs.count(r.slug) > 1]:
            raise ValueError(f"rungs {' and '.join(map(repr, alike))} would share a folder; give each another `name`")
        for r in rungs:
            tuned = r.kind not in ("zero_shot", "few_shot")
            if not tuned and (r.method or r.engine):
                raise ValueError(f"rung {r.label!r} trains nothing: it takes neither `method` nor `engine`")
            if "kind" in r.method:
                raise ValueError(f"rung {r.label!r} is a {r.kind}: its `method` takes no other kind")
            if r.shots is not None and r.kind != "few_shot":
                raise ValueError(f"rung {r.label!r} takes no `shots`: only few_shot does")
        return rungs
