"""The top-level config, and the checks that need more than one section.

Combinations that would ignore a setting or compute something else than asked are refused here, before anything is
loaded. Checks that need data, a model or a device are in `runs.checks`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rung.config.base import MAX_SEED, Config, LocalPath
from rung.config.climb import UNTUNED, WITH_SHOTS, ClimbConfig
from rung.config.data import DataConfig
from rung.config.evaluation import EvaluationConfig
from rung.config.method import LoraConfig, LowRankConfig, MethodConfig, inserted_token_ids
from rung.config.model import ModelConfig
from rung.config.objective import COMPARISON_KINDS, ROLLOUT_KINDS, DistillConfig, ObjectiveConfig, SftConfig
from rung.config.training import TrainingConfig


class RunConfig(Config):
    """Everything a run needs. The same file serves `rung train`, `rung climb` and `rung eval`."""

    model: ModelConfig = ModelConfig()
    """Base model, compute type and chat template."""
    data: DataConfig = Field(default=...)
    """Data sets, splits and supervised tokens."""
    method: MethodConfig = LoraConfig()
    """Which parameters are trained."""
    objective: ObjectiveConfig = SftConfig()
    """The loss."""
    training: TrainingConfig = TrainingConfig()
    """Steps, optimizer, checkpoints and validation."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How answers are generated and scored."""
    climb: ClimbConfig = ClimbConfig()
    """The ladder of rungs, for `rung climb`."""
    output: LocalPath = Field(default=..., min_length=1)
    """Folder of the run."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Seed of the order of rows, the initialization and the choice of worked examples."""

    def _check(self) -> None:
        if self.training.eval_every is not None and self.data.validation == 0:
            raise ValueError("training.eval_every measures on the validation split, and data.validation is 0")
        if self.evaluation.dequantize and "qlora" not in {self.method.kind, *(r.kind for r in self.climb.rungs)}:
            raise ValueError("evaluation.dequantize widens a quantized base, and no method here quantizes one (qlora)")
        with_shots = (r for r in self.climb.rungs if r.kind in WITH_SHOTS)
        if rung := next((r for r in with_shots if not (r.shots or self.evaluation.shots)), None):
            raise ValueError(f"the {rung.kind} rung needs evaluation.shots above 0")
        if self.climb.instructions and self.data.validation == 0:
            raise ValueError("climb.instructions are chosen on the validation split, and data.validation is 0")
        if self.evaluation.retrieve is not None and not self.retrieves:
            raise ValueError("evaluation.retrieve says where passages come from, and nothing here retrieves any")
        if self.climb.search is not None and self.data.validation == 0:
            raise ValueError("climb.search compares on the validation split, and data.validation is 0")
        self._check_own_data()
        self._check_objective()

    def _check_own_data(self) -> None:
        """Refuse rows of a rung's own behind retrieved contexts of rows: the run could not be opened as trained."""
        documents = self.evaluation.retrieve and self.evaluation.retrieve.documents
        for r in self.climb.rungs:
            is_retrieved = r.kind not in UNTUNED and r.context_of(self.evaluation.context) == "retrieved"
            if r.data and is_retrieved and documents is None:
                fault = "has `data` of its own and retrieves from the contexts of the climb's rows"
                raise ValueError(f"rung {r.label!r} {fault}: name the passages in evaluation.retrieve.documents")

    def _check_objective(self) -> None:
        if self.objective.kind in COMPARISON_KINDS and self.data.loss_on != "answer":
            raise ValueError(f"objective {self.objective.kind} compares answers: data.loss_on is answer")
        is_kto = self.objective.kind == "preference" and self.objective.loss == "kto"
        if is_kto and self.training.examples_per_step < 2:
            raise ValueError("kto reads answers behind other rows' prompts: training.examples_per_step is at least 2")
        if self.objective.kind in ROLLOUT_KINDS:
            self._check_rollouts()
        if isinstance(self.objective, DistillConfig):
            self._check_teacher(self.objective)
        # the reference is the base, whose embedding table has no rows for these ids
        if self.objective.reference_model and inserted_token_ids(self.method, 0):
            raise ValueError("a reference cannot read virtual tokens inside the text: put all of them in front")
        if self.objective.kind == "reward" and self.evaluation.server is not None:
            raise ValueError("a reward model generates nothing: evaluation.server would have nothing to do")
        if self.objective.kind == "reward" and self.method.kind == "head":
            raise ValueError("a reward model does not read the model's output head, which is all that head moves")

    def _check_rollouts(self) -> None:
        kind = self.objective.kind
        # measured on training documents, which a rollout does not have yet; the same holds for lora_ga below
        if self.training.tokens_per_micro_batch == "probe":
            raise ValueError(f"{kind} makes its own answers, so there is nothing to probe with before the first step")
        if isinstance(self.method, LowRankConfig) and self.method.init == "lora_ga":
            raise ValueError(f"init: lora_ga begins from gradients, and {kind} has none before its first answers")
        if self.data.loss_on != "answer":
            raise ValueError(f"{kind} trains on generated answers: data.loss_on must be answer")
        if self.method.adapter_dropout:
            fault = "compares with how its answers were made, which dropout would change"
            raise ValueError(f"{kind} {fault}: leave it out")
        if self.data.overflow == "trim_prompt":
            raise ValueError(f"{kind} asks its prompts as they are: data.overflow is error or drop")
        if kind == "ppo" and inserted_token_ids(self.method, 0):
            raise ValueError("a value model cannot read virtual tokens inside the text: put all of them in front")

    def _check_teacher(self, objective: DistillConfig) -> None:
        sees = objective.teacher_sees
        if sees is not None and sees.instruction and not self.evaluation.instruction:
            raise ValueError("teacher_sees.instruction is evaluation.instruction, and there is none")
        if sees is not None and sees.context == self.evaluation.context and not (sees.instruction or sees.shots):
            raise ValueError(f"teacher_sees adds nothing: the student's context is {sees.context} too")
        if (sees is not None or objective.asks_teacher) and self.data.loss_on != "answer":
            raise ValueError("teacher and student are compared on the last answer of a row: data.loss_on is answer")
        if sees is not None and self.data.overflow == "trim_prompt":
            raise ValueError("the teacher reads prompts as they are: data.overflow is error or drop")

    def with_model(self, **settings: str) -> RunConfig:
        """The config with these settings in its `model` section, for example what `auto` stands for."""
        return self.model_copy(update={"model": self.model.model_copy(update=settings)})

    @property
    def retrieves(self) -> bool:
        """Whether the run or one of its rungs retrieves passages."""
        default_context = self.evaluation.context
        sees = self.objective.teacher_sees if isinstance(self.objective, DistillConfig) else None
        teacher_context = None if sees is None else sees.context
        return "retrieved" in {
            default_context,
            teacher_context,
            *(r.context_of(default_context) for r in self.climb.rungs),
        }

    @property
    def shares_base(self) -> bool:
        """Whether another model stands on the base, which must then stay as it was loaded."""
        return self.objective.shares_base

    @property
    def learning_rate(self) -> float:
        """Peak learning rate: the setting, or the default of the method times the factor of the objective."""
        method_rate = self.method.default_learning_rate
        return float(self.training.learning_rate or method_rate * self.objective.LEARNING_RATE_SCALE)
