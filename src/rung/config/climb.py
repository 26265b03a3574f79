"""The `climb` section: which rungs are measured, how settings are searched, and when a rung is good enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from rung.config.base import Config, Fraction
from rung.config.evaluation import Context, ExampleSelection

UntunedKind = Literal["zero_shot", "few_shot", "rag", "few_shot+rag"]
VirtualTokenKind = Literal["prompt", "prefix", "p_tuning"]
WeightKind = Literal["head", "bottleneck", "lora", "qlora", "lottery", "mixture", "peft", "full"]
DISTILLED_PROMPT = "distilled_prompt"
"""A LoRA that learns to answer the bare question as the base answers the prompt of an untuned rung."""
RungKind = Literal[UntunedKind, VirtualTokenKind, Literal["distilled_prompt"], WeightKind]
UNTUNED: tuple[str, ...] = get_args(UntunedKind)
"""Rungs that train nothing."""
# kinds that put worked examples, or retrieved passages, in front of a question
WITH_SHOTS = ("few_shot", "few_shot+rag")
RETRIEVING = ("rag", "few_shot+rag")


class RungConfig(Config):
    """One rung of the ladder. In YAML the kind alone is enough: `rungs: [zero_shot, few_shot, lora]`."""

    kind: RungKind
    name: str | None = None
    """Name in the ladder; default: the kind, with the base of a rung that names one."""
    shots: PositiveInt | None = None
    """few_shot and few_shot+rag only: number of worked examples; default: `evaluation.shots`."""
    example_selection: ExampleSelection | None = None
    """few_shot and few_shot+rag only. `random` (default): drawn with the seed; `similarity`: for each question the
    examples with the most similar questions; `coverage`: one set whose questions cover the words of all questions."""
    context: Context | None = None
    """Context before the question, in training and in the test. Default: `retrieved` for rag and few_shot+rag,
    `evaluation.context` for all others."""
    replaces: str | None = None
    """distilled_prompt only: name of the untuned rung whose prompt it learns; default: the last one before it."""
    method: dict[str, Any] = Field(default_factory=dict)
    """Tuned rungs only: method settings that differ from the section `method`."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Tuned rungs only: settings that differ from the section `training`."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Tuned rungs, few_shot and few_shot+rag: as the section `data`, the rows that are trained on, distilled or shown
    as worked examples; default: those of the climb. Its prompts must not occur in the test split, that of the climb."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Settings that differ from the section `model`. One that names another base takes no revision, layers, template or
    template_kwargs from that section."""

    @property
    def label(self) -> str:
        """Name in the ladder."""
        if self.name:
            return self.name
        base = self.model.get("student_of") or self.model.get("name")
        return f"{self.kind} on {base_title(str(base))}" if base else self.kind

    @property
    def method_kind(self) -> str:
        """Kind of the method of a tuned rung."""
        return "lora" if self.kind == DISTILLED_PROMPT else self.kind

    def context_of(self, default: Context) -> Context:
        """Context of this rung, where `evaluation.context` is `default`."""
        return "retrieved" if self.kind in RETRIEVING else self.context or default

    def reject_unused_settings(self) -> None:
        """Raise `ValueError` for a setting that this kind of rung ignores."""
        if self.kind in UNTUNED and (self.method or self.training):
            raise ValueError(f"rung {self.label!r} trains nothing: it takes neither `method` nor `training`")
        if "kind" in self.method:
            raise ValueError(f"rung {self.label!r} is a {self.kind}: its `method` takes no other kind")
        for name in ("shots", "example_selection"):
            if getattr(self, name) is not None and self.kind not in WITH_SHOTS:
                raise ValueError(f"rung {self.label!r} takes no `{name}`: only few_shot and few_shot+rag do")
        if self.replaces is not None and self.kind != DISTILLED_PROMPT:
            raise ValueError(f"rung {self.label!r} takes no `replaces`: only distilled_prompt does")
        if self.kind in RETRIEVING and self.context not in (None, "retrieved"):
            raise ValueError(f"rung {self.label!r} retrieves: its `context` is retrieved")
        self._check_own_sections()

    def _check_own_sections(self) -> None:
        if self.data and self.kind in UNTUNED and self.kind not in WITH_SHOTS:
            raise ValueError(f"rung {self.label!r} neither trains nor shows worked examples: it takes no `data`")
        if "test" in self.data:
            raise ValueError(f"the `data` of rung {self.label!r} takes no `test`: all rungs answer the climb's")
        if "matmul" in self.model:
            raise ValueError(f"rung {self.label!r} takes no `model.matmul`: the models of one command share a routine")

    @property
    def slug(self) -> str:
        """Name of the folder of this rung."""
        # a label of punctuation alone leaves nothing
        return _slug(self.label) or self.kind


class OnTopConfig(Config):
    """A further run that starts from a tuned rung, for example preference tuning or reinforcement learning."""

    kind: Literal["on_top"] = "on_top"
    base_rung: str
    """Name of the tuned rung that this run starts from."""
    objective: dict[str, Any]
    """As the section `objective`: preference, grpo, ppo, or sft on further rows."""
    name: str | None = None
    """Name in the ladder; default: `BASE_RUNG then OBJECTIVE`."""
    data: dict[str, Any] = Field(default_factory=dict)
    """As the section `data`; default: the data of the climb. Its prompts must not occur in the test split."""
    method: dict[str, Any] = Field(default_factory=lambda: {"kind": "lora"})
    """As the section `method`: the method trained on top."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Settings that differ from the section `training`. The learning rate is the default of the method unless set."""

    @property
    def label(self) -> str:
        """Name in the ladder."""
        kind = self.objective.get("kind")
        default_name = "dpo" if kind == "preference" else kind
        return self.name or f"{self.base_rung} then {self.objective.get('loss', default_name)}"

    @property
    def slug(self) -> str:
        """Name of the folder of this rung."""
        return _slug(self.label) or "on_top"


class SearchConfig(Config):
    """Hyperparameter search for tuned rungs, scored on the validation split, never on the test split."""

    trials: Annotated[int, Field(ge=2)] = 9
    """Number of trials per tuned rung."""
    rank: tuple[PositiveInt, PositiveInt] | None = None
    """Lowest and highest rank, sampled log-uniformly; ignored by methods without a rank."""
    learning_rate: tuple[PositiveFloat, PositiveFloat] | None = None
    """Lowest and highest learning rate, sampled log-uniformly."""
    epochs: tuple[PositiveFloat, PositiveFloat] | None = None
    """Fewest and most epochs."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """Successive halving: after a ninth of the steps, and after each multiple of that by this factor, the best 1/factor
    of the trials continue (Jamieson and Talwalkar 2016; Li et al. 2020)."""

    def _check(self) -> None:
        ranges = {"rank": self.rank, "learning_rate": self.learning_rate, "epochs": self.epochs}
        if not any(ranges.values()):
            raise ValueError("search tries nothing: give rank, learning_rate or epochs as [lowest, highest]")
        for name, bounds in ranges.items():
            if bounds is not None and bounds[0] >= bounds[1]:
                raise ValueError(f"{name} is [lowest, highest]")


class ClimbConfig(Config):
    """The ladder of rungs that `rung climb` measures."""

    rungs: tuple[RungConfig, ...] = (RungConfig(kind="zero_shot"), RungConfig(kind="few_shot"), RungConfig(kind="lora"))
    """Rungs to measure, lowest first."""
    instructions: tuple[str, ...] = ()
    """System prompts that zero_shot compares on the validation split, in addition to `evaluation.instruction` if set.
    All untuned rungs use the one with the best score, those on other models too."""
    margin: Fraction = 0.05
    """A rung is enough when the interval of its difference to the best excludes being worse by more than this."""
    target: PositiveFloat | None = None
    """A rung is also enough when the lower end of its score interval reaches this value (perplexity: the upper end)."""
    stop_at_target: bool = False
    """Skip the rungs above the first one that reaches `target` in this sense."""
    seeds: PositiveInt = 1
    """Training runs per tuned rung. With more than 1 the spread between them widens the intervals."""
    search: SearchConfig | None = None
    """Search of settings for each tuned rung before it is trained."""
    curve: tuple[PositiveInt, ...] = ()
    """Learning curve: rising numbers of training rows with which the highest tuned rung is trained and scored again."""
    forgetting: str | None = None
    """A data file or a config of another task, on which each tuned rung is compared with its starting model."""
    on_top: tuple[OnTopConfig, ...] = ()
    """Further rungs above all others, each starting from a tuned rung."""

    @field_validator("rungs", mode="before")
    @classmethod
    def _expand_kinds(cls, rungs: Any) -> Any:
        return [{"kind": r} if isinstance(r, str) else r for r in rungs] if isinstance(rungs, list | tuple) else rungs

    @field_validator("rungs")
    @classmethod
    def _check_rungs(cls, rungs: tuple[RungConfig, ...]) -> tuple[RungConfig, ...]:
        labels = [r.label for r in rungs]
        if not labels:
            raise ValueError("a ladder needs at least one rung")
        if repeated_labels := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"rung {repeated_labels[0]!r} stands twice; give each a `name`")
        _refuse_shared_folders(rungs)
        for r in rungs:
            r.reject_unused_settings()
        return rungs

    def replaced_rung(self, rung: RungConfig) -> RungConfig:
        """The untuned rung whose prompt a distilled_prompt rung learns. Raises `ValueError` if there is none."""
        # by label: a search gives the rung other settings
        position = [r.label for r in self.rungs].index(rung.label)
        # of its own base, which is the teacher: another model may answer that prompt in another way
        untuned = [r for r in self.rungs[:position] if r.kind in UNTUNED and r.model == rung.model]
        named = [r for r in untuned if rung.replaces in (None, r.label)]
        if not named:
            names = ", ".join(r.label for r in untuned) or "there is none"
            place = "before it with the same `model`"
            raise ValueError(f"rung {rung.label!r} replaces the prompt of an untuned rung {place} ({names})")
        return named[-1]

    def _check(self) -> None:
        for rung in self.rungs:
            if rung.kind == DISTILLED_PROMPT:
                self.replaced_rung(rung)
        if (self.search or self.curve or self.forgetting) and all(r.kind in UNTUNED for r in self.rungs):
            raise ValueError("search, curve and forgetting are about tuned rungs, and there is none")
        # rising and distinct: each number is a folder and a point of the curve
        if list(self.curve) != sorted(set(self.curve)):
            raise ValueError("curve has rising numbers of rows")
        self._check_base_rungs()
        self._check_instructions()

    def _check_base_rungs(self) -> None:
        if self.stop_at_target and self.target is None:
            raise ValueError("stop waits for a rung to reach `target`: set it too")
        tuned = [r.label for r in self.rungs if r.kind not in UNTUNED]
        for r in self.on_top:
            if r.base_rung not in tuned:
                names = ", ".join(tuned) or "there is none"
                raise ValueError(f"rung {r.label!r} stands on {r.base_rung!r}, which is no tuned rung ({names})")
        # checked again with the rungs on top, which share the folder of the climb
        _refuse_shared_folders([*self.rungs, *self.on_top])

    def _check_instructions(self) -> None:
        if any(not text.strip() for text in self.instructions):
            raise ValueError("instructions holds one without a word")
        if len(set(self.instructions)) < len(self.instructions):
            raise ValueError("instructions holds one twice")
        untuned = next((r for r in self.rungs if r.kind in UNTUNED), None)
        if self.instructions and (untuned is None or untuned.kind != "zero_shot" or untuned.model):
            place = "which is to come before other untuned rungs"
            raise ValueError(f"instructions are chosen by zero_shot on the climb's model, {place}")


def base_title(name: str) -> str:
    """The last part of a base's name: of a path the folder or file, of a hub id the name without its owner."""
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or name


def _refuse_shared_folders(rungs: Sequence[RungConfig | OnTopConfig]) -> None:
    # different labels may give the same folder name: "a b" and "a-b"
    slugs = [r.slug for r in rungs]
    if labels := " and ".join(repr(r.label) for r in rungs if slugs.count(r.slug) > 1):
        raise ValueError(f"rungs {labels} would share a folder; give each another `name`")


def _slug(label: str) -> str:
    # leading and trailing dots: hidden folders, and names that Windows strips
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in label.lower()).strip(".")
