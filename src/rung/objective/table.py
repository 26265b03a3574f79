"""The table of objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rung.objective.base import Objective
from rung.objective.distill import Distill
from rung.objective.grpo import Grpo
from rung.objective.ppo import Ppo
from rung.objective.preference import preference
from rung.objective.reward import Reward
from rung.objective.sft import Sft

OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "sft": Sft,
    "preference": preference,
    "reward": Reward,
    "grpo": Grpo,
    "ppo": Ppo,
    "distill": Distill,
}
