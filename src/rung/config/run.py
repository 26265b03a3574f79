"""A whole run."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, model_validator

from rung.config.base import Spec
from rung.config.climb import WITH_SHOTS, ClimbSpec
from rung.config.data import DataSpec
from rung.config.evaluation import EvaluateSpec
from rung.config.method import LoraSpec, MethodSpec, inserted
from rung.config.model import ModelSpec
from rung.config.objective import COMPARING, ROLLING, ObjectiveSpec, PreferenceSpec, RewardSpec, SftSpec
from rung.config.training import EngineSpec


class RunSpec(Spec):
    """Everything a run needs. The same file serves `rung train`, `rung climb` and `rung eval`."""

    model: ModelSpec = ModelSpec()
    """The base."""
    data: DataSpec = Field(default=...)
    """The examples."""
    method: MethodSpec = LoraSpec()
    """Which numbers may move."""
    objective: ObjectiveSpec = SftSpec()
    """What is minimised."""
    engine: EngineSpec = EngineSpec()
    """How a step runs."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """How answers are made and scored."""
    climb: ClimbSpec = ClimbSpec()
    """The ladder, for `rung climb`."""
    output: str = Field(default=..., min_length=1)
    """The run folder."""
    seed: NonNegativeInt = 0
    """Seed of the order of rows, of the initialisation and of the choice of shots."""

    @model_validator(mode="after")
    def _nothing_asked_for_in_vain(self) -> RunSpec:
        if self.engine.eval_every is not None and self.data.validation == 0:
            raise ValueError("engine.eval_every measures on the validation split, and data.validation is 0")
        if self.evaluate.dequantise and "qlora" not in {self.method.kind, *(r.kind for r in self.climb.rungs)}:
            raise ValueError("evaluate.dequantise widens a quantised base, and no method here quantises one (qlora)")
        if bare := [r.kind for r in self.climb.rungs if r.kind in WITH_SHOTS and not (r.shots or self.evaluate.shots)]:
            raise ValueError(f"the {bare[0]} rung needs evaluate.shots above 0")
        if self.climb.instructions and self.data.validation == 0:
            raise ValueError("climb.instructions are chosen on the validation split, and data.validation is 0")
        if self.evaluate.retrieve is not None and not self.retrieves:
            raise ValueError("evaluate.retrieve says where passages come from, and nothing here retrieves any")
        if self.climb.search is not None and self.data.validation == 0:
            raise ValueError("climb.search compares on the validation split, and data.validation is 0")
        if self.objective.kind in COMPARING and self.data.loss_on != "answer":
            raise ValueError(f"objective {self.objective.kind} compares answers: data.loss_on is answer")
        if isinstance(self.objective, PreferenceSpec):
            self._answers_can_be_compared(self.objective)
        if self.objective.kind in ROLLING:
            self._answers_can_be_made()
        if getattr(self.objective, "against", None) and inserted(self.method, 0):
            raise ValueError("a reference cannot read virtual tokens inside the text: put all of them in front")
        if isinstance(self.objective, RewardSpec) and self.method.kind == "head":
            raise ValueError("a reward model does not read the model's output head, which is all that head moves")
        return self

    def _answers_can_be_compared(self, objective: PreferenceSpec) -> None:
        if objective.loss == "kto" and self.engine.examples_per_step < 2:
            raise ValueError("kto reads answers behind other rows' prompts: engine.examples_per_step is at least 2")

    def _answers_can_be_made(self) -> None:
        kind = self.objective.kind
        if self.engine.tokens_per_micro_batch == "probe":
            raise ValueError(f"{kind} makes its own answers, so there is nothing to probe with before the first step")
        if getattr(self.method, "init", None) == "lora_ga":
            raise ValueError(f"init: lora_ga begins from gradients, and {kind} has none before its first answers")
        if self.data.loss_on != "answer":
            raise ValueError(f"{kind} learns from answers of its own: data.loss_on is answer")
        if getattr(self.method, "dropout", 0.0):
            raise ValueError(
                f"{kind} compares with how its answers were made, which dropout would change: leave it out"
            )
        if self.data.overflow == "trim_prompt":
            raise ValueError(f"{kind} asks its prompts as they are: data.overflow is error or drop")
        if kind == "ppo" and inserted(self.method, 0):
            raise ValueError("a value model cannot read virtual tokens inside the text: put all of them in front")

    @property
    def retrieves(self) -> bool:
        """Whether passages are looked up, by the run itself or by a rung of the climb."""
        usual = self.evaluate.context
        return "retrieved" in {usual, *(r.context_of(usual) for r in self.climb.rungs)}

    @property
    def learning_rate(self) -> float:
        """The peak rate: the config's, or the method's default times what the objective takes of it."""
        own = getattr(self.method, "default_rate", self.method.DEFAULT_LEARNING_RATE)
        return float(self.engine.learning_rate or own * self.objective.RATE)
