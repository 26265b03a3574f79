"""Which rungs are measured and when one is enough."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from rung.config.base import Config, Fraction
from rung.config.evaluation import Context

RungKind = Literal[
    "zero_shot",
    "few_shot",
    "rag",
    "few_shot+rag",
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

UNTUNED = ("zero_shot", "few_shot", "rag", "few_shot+rag")
"""Rungs that ask the base as it is."""
WITH_SHOTS = ("few_shot", "few_shot+rag")
RETRIEVING = ("rag", "few_shot+rag")
ExampleSelection = Literal["random", "similarity", "coverage"]


class RungConfig(Config):
    """One rung. In YAML the kind alone is enough: `rungs: [zero_shot, few_shot, lora]`."""

    kind: RungKind
    name: str | None = None
    """Name in the ladder; none is the kind."""
    shots: PositiveInt | None = None
    """few_shot and few_shot+rag only: worked examples, instead of `evaluation.shots`."""
    example_selection: ExampleSelection | None = None
    """few_shot and few_shot+rag only: a draw by the seed (none is that), for each question those whose questions are
    most alike, or a fixed set whose questions cover the words of all."""
    context: Context | None = None
    """What stands before the question, in training and in the test: none is `retrieved` for rag and few_shot+rag and
    `evaluation.context` for all others."""
    method: dict[str, Any] = Field(default_factory=dict)
    """Tuned rungs only: settings of the method that differ from the config's `method`."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Tuned rungs only: settings that differ from the config's `training`."""

    @property
    def label(self) -> str:
        """Name in the ladder."""
        return self.name or self.kind

    def context_of(self, usual: Context) -> Context:
        """What stands before the question, where `evaluation.context` is `usual`."""
        return "retrieved" if self.kind in RETRIEVING else self.context or usual

    def refuse_nonsense(self) -> None:
        """Raise `ValueError` for a setting that this kind of rung does not read."""
        if self.kind in UNTUNED and (self.method or self.training):
            raise ValueError(f"rung {self.label!r} trains nothing: it takes neither `method` nor `training`")
        if "kind" in self.method:
            raise ValueError(f"rung {self.label!r} is a {self.kind}: its `method` takes no other kind")
        for name in ("shots", "example_selection"):
            if getattr(self, name) is not None and self.kind not in WITH_SHOTS:
                raise ValueError(f"rung {self.label!r} takes no `{name}`: only few_shot and few_shot+rag do")
        if self.kind in RETRIEVING and self.context not in (None, "retrieved"):
            raise ValueError(f"rung {self.label!r} retrieves: its `context` is retrieved")

    @property
    def slug(self) -> str:
        """Name of its folder."""
        return _slug(self.label) or self.kind


class OnTopConfig(Config):
    """A run on top of a tuned rung: from preferences, or from what its own answers are worth."""

    kind: Literal["on_top"] = "on_top"
    base_rung: str
    """The tuned rung that it begins from, by its name in the ladder."""
    objective: dict[str, Any]
    """As `objective` of a config: preference, grpo, ppo, or sft on further rows."""
    name: str | None = None
    """Name in the ladder; none is `ABOVE then OBJECTIVE`."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Rows of its own, as `data` of a config; none takes the climb's. Their prompts must not stand in the test."""
    method: dict[str, Any] = Field(default_factory=lambda: {"kind": "lora"})
    """What moves on top."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Settings that differ from the config's `training`; the learning rate is the method's default unless given."""

    @property
    def label(self) -> str:
        """Name in the ladder."""
        kind = self.objective.get("kind")
        usual = "dpo" if kind == "preference" else kind
        return self.name or f"{self.base_rung} then {self.objective.get('loss', usual)}"

    @property
    def slug(self) -> str:
        """Name of its folder."""
        return _slug(self.label) or "on_top"


class SearchConfig(Config):
    """Settings of tuned rungs that are tried on the validation split, never on the test."""

    trials: Annotated[int, Field(ge=2)] = 9
    """How many."""
    rank: tuple[PositiveInt, PositiveInt] | None = None
    """Lowest and highest, drawn by their logarithm; methods without a rank are left alone."""
    learning_rate: tuple[PositiveFloat, PositiveFloat] | None = None
    """Lowest and highest, drawn by their logarithm."""
    epochs: tuple[PositiveFloat, PositiveFloat] | None = None
    """Fewest and most."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """Of the trials that reach a ninth of their steps, and so many times that, one in so many goes on (Jamieson and
    Talwalkar 2016; Li et al. 2020)."""

    @model_validator(mode="after")
    def _something_is_searched(self) -> SearchConfig:
        ranges = {"rank": self.rank, "learning_rate": self.learning_rate, "epochs": self.epochs}
        if not any(ranges.values()):
            raise ValueError("search tries nothing: give rank, learning_rate or epochs as [lowest, highest]")
        for name, found in ranges.items():
            if found is not None and found[0] >= found[1]:
                raise ValueError(f"{name} is [lowest, highest]")
        return self


class ClimbConfig(Config):
    """The ladder."""

    rungs: tuple[RungConfig, ...] = (RungConfig(kind="zero_shot"), RungConfig(kind="few_shot"), RungConfig(kind="lora"))
    """Rungs to measure, lowest first."""
    instructions: tuple[str, ...] = ()
    """System turns that zero_shot tries on the validation split, beside `evaluation.instruction` where there is one;
    all untuned rungs take the one that scores best."""
    margin: Fraction = 0.05
    """A rung is enough when its interval excludes being worse than the best by more than this."""
    target: PositiveFloat | None = None
    """A rung is also enough when its score surely reaches this (perplexity: stays below)."""
    stop_at_target: bool = False
    """Leave out what stands above the first rung whose score surely reaches `target`."""
    seeds: PositiveInt = 1
    """Training runs per tuned rung. Above 1 the spread between them widens the intervals."""
    search: SearchConfig | None = None
    """Settings that are chosen for each tuned rung before it is trained."""
    curve: tuple[PositiveInt, ...] = ()
    """Numbers of training rows with which the highest tuned rung is trained and scored once more."""
    forgetting: str | None = None
    """A data file or a config of something else: what each tuned rung makes of it, and what it began from."""
    on_top: tuple[OnTopConfig, ...] = ()
    """Rungs above all others, each on top of a tuned one."""

    @field_validator("rungs", mode="before")
    @classmethod
    def _names_alone(cls, rungs: Any) -> Any:
        return [{"kind": r} if isinstance(r, str) else r for r in rungs] if isinstance(rungs, list | tuple) else rungs

    @field_validator("rungs")
    @classmethod
    def _distinct(cls, rungs: tuple[RungConfig, ...]) -> tuple[RungConfig, ...]:
        labels = [r.label for r in rungs]
        if not labels:
            raise ValueError("a ladder needs at least one rung")
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"rung {twice[0]!r} stands twice; give each a `name`")
        slugs = [r.slug for r in rungs]
        if alike := [r.label for r in rungs if slugs.count(r.slug) > 1]:
            raise ValueError(f"rungs {' and '.join(map(repr, alike))} would share a folder; give each another `name`")
        for r in rungs:
            r.refuse_nonsense()
        return rungs

    @model_validator(mode="after")
    def _there_is_something_to_tune(self) -> ClimbConfig:
        if (self.search or self.curve or self.forgetting) and all(r.kind in UNTUNED for r in self.rungs):
            raise ValueError("search, curve and forgetting are about tuned rungs, and there is none")
        if list(self.curve) != sorted(set(self.curve)):
            raise ValueError("curve has rising numbers of rows")
        return self

    @model_validator(mode="after")
    def _every_rung_stands_on_one(self) -> ClimbConfig:
        if self.stop_at_target and self.target is None:
            raise ValueError("stop waits for a rung to reach `target`: set it too")
        tuned = [r.label for r in self.rungs if r.kind not in UNTUNED]
        for then in self.on_top:
            if then.base_rung not in tuned:
                known = ", ".join(tuned) or "there is none"
                raise ValueError(f"rung {then.label!r} stands on {then.base_rung!r}, which is no tuned rung ({known})")
        both: list[RungConfig | OnTopConfig] = [*self.rungs, *self.on_top]
        slugs = [r.slug for r in both]
        if alike := [r.label for r in both if slugs.count(r.slug) > 1]:
            raise ValueError(f"rungs {' and '.join(map(repr, alike))} would share a folder; give each another `name`")
        return self

    @model_validator(mode="after")
    def _instructions_are_chosen_first(self) -> ClimbConfig:
        if any(not text.strip() for text in self.instructions):
            raise ValueError("instructions holds one without a word")
        if len(set(self.instructions)) < len(self.instructions):
            raise ValueError("instructions holds one twice")
        untuned = next((r.kind for r in self.rungs if r.kind in UNTUNED), None)
        if self.instructions and untuned != "zero_shot":
            raise ValueError("instructions are chosen by zero_shot, which is to come before other untuned rungs")
        return self


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in label.lower()).strip(".")
