"""The table of objectives: one line each, beside a config class and a module.

The contract tests run over this table; `runs/train.py` looks an objective up here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rung.config.objective import DistillConfig, ObjectiveConfig, PpoConfig
from rung.models.policy import Policy
from rung.objectives.distill import DistillObjective, TeacherPrompt
from rung.objectives.grpo import GrpoObjective
from rung.objectives.ppo import PpoObjective
from rung.objectives.preference import make_preference_objective
from rung.objectives.protocol import Objective
from rung.objectives.reward import RewardObjective, ScoreHead
from rung.objectives.sft import SftObjective


@dataclass(frozen=True)
class ObjectiveModels:
    """Models that an objective computes with besides the policy and its reference; most need none."""

    value_model: Policy | None = None
    value_head: ScoreHead | None = None
    teacher: Policy | None = None
    teacher_prompt: TeacherPrompt | None = None
    """What the teacher reads before an answer, where that is not what the student reads."""


OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "sft": SftObjective,
    "preference": make_preference_objective,
    "reward": RewardObjective,
    "grpo": GrpoObjective,
    "ppo": PpoObjective,
    "distill": DistillObjective,
}


def make_objective(config: ObjectiveConfig, models: ObjectiveModels | None = None) -> Objective:
    """The objective of a config. Without the models that it needs only its settings can be read."""
    models = models or ObjectiveModels()
    if isinstance(config, PpoConfig):
        return PpoObjective(config, models.value_model, models.value_head)
    if isinstance(config, DistillConfig):
        return DistillObjective(config, models.teacher, models.teacher_prompt)
    return OBJECTIVES[config.kind](config)
