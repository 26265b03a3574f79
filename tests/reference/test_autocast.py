"""Our functions under autocast to bfloat16."""

from __future__ import annotations

import pytest
import torch

from builders import documents, policy_of, tuned
from rung.config.objective import SftConfig
from rung.models.packing import pack
from rung.objectives.sft import SftObjective
from rung.training.step import accumulate


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_our_functions_under_autocast_stay_near_float32(kind: str) -> None:
    """bfloat16 has 8 bits of mantissa; a wrong transpose or a lost factor is off by far more than 6 %."""
    gradients = []
    for compute in (torch.float32, torch.bfloat16):
        policy, method = tuned(kind)
        policy = policy_of(policy.model, method, compute=compute)
        accumulate(policy, SftObjective(SftConfig()), pack(documents(3, shared=18), 60))
        gradients.append(torch.cat([p.grad.flatten() for p in method.trainable().values() if p.grad is not None]))
    wide, low = gradients
    assert low.dtype is torch.float32
    assert 0 < (wide - low).norm() / wide.norm() < 6e-2
