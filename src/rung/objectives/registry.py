"""The table of objectives: one line each, beside a config class and a module.

The contract tests run over this table; `runs/train.py` looks an objective up here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rung.objectives.distill import DistillObjective
from rung.objectives.grpo import GrpoObjective
from rung.objectives.ppo import PpoObjective
from rung.objectives.preference import make_preference_objective
from rung.objectives.protocol import Objective
from rung.objectives.reward import RewardObjective
from rung.objectives.sft import SftObjective

OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "sft": SftObjective,
    "preference": make_preference_objective,
    "reward": RewardObjective,
    "grpo": GrpoObjective,
    "ppo": PpoObjective,
    "distill": DistillObjective,
}
