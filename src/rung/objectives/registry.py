"""The table of objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rung.objectives.distill import Distill
from rung.objectives.grpo import Grpo
from rung.objectives.ppo import Ppo
from rung.objectives.preference import preference
from rung.objectives.protocol import Objective
from rung.objectives.reward import Reward
from rung.objectives.sft import Sft

OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "sft": Sft,
    "preference": preference,
    "reward": Reward,
    "grpo": Grpo,
    "ppo": Ppo,
    "distill": Distill,
}
