"""What a layer is said to keep of each token, against what the allocator has handed out and not got back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from builders import example, policy_of
from models import tiny_model
from rung.engine.pack import pack
from rung.method.table import attach
from rung.objective.sft import Sft
from rung.plan.kept import layer_bytes_per_token, numbers_beside
from rung.plan.shape import shape_of
from rung.spec.method import METHOD_SPECS
from rung.spec.objective import SftSpec

TOKENS = 2400
SMALL = 0.04
"""Of what is kept: a number a row of each norm, one a head of attention, none of which is planned."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "lora, two roles": ("lora", {"targets": ("q", "down"), "rank": 4}),
    "pissa": ("lora", {"init": "pissa"}),
    "dropout": ("lora", {"dropout": 0.1}),
    "dropout, two roles": ("lora", {"dropout": 0.1, "targets": ("q", "v")}),
    "dora": ("lora", {"dora": True}),
    "qlora": ("qlora", {}),
    "qlora, 8 bits": ("qlora", {"bits": 8}),
    "qlora, two roles": ("qlora", {"targets": ("q", "v")}),
    "mixture": ("mixture", {"experts": 3, "rank": 4}),
    "houlsby": ("bottleneck", {}),
    "pfeiffer": ("bottleneck", {"placement": "pfeiffer"}),
    "parallel": ("bottleneck", {"placement": "parallel"}),
    "prefix": ("prefix", {"virtual_tokens": 4}),
    "full": ("full", {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_keeps_what_is_planned(name: str) -> None:
    kind, given = METHODS[name]
    spec = METHOD_SPECS[kind](**given)
    shape = shape_of(tiny_model().config.to_dict())
    planned = layer_bytes_per_token(shape, beside=numbers_beside(spec, shape))
    measured = (kept(spec, layers=4) - kept(spec, layers=2)) / 2 / TOKENS
    assert planned <= measured <= planned * (1 + SMALL), (planned / 4, measured / 4)


def kept(spec: Any, *, layers: int) -> int:
    """Bytes that a forward pass has taken and not given back."""
    model = tiny_model(num_hidden_layers=layers, max_position_embeddings=TOKENS)
    policy = policy_of(model, attach(model, spec, seed=0))
    model.train()
    (batch,) = pack([example([5] * (TOKENS // 2), 10, line=n) for n in (1, 2)], TOKENS, share_prefixes=False)
    objective = Sft(SftSpec())
    objective.loss(policy, batch)[0].total.backward()  # what is made once is there from here on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = objective.loss(policy, batch)[0].total
    assert torch.isfinite(loss)
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(event.nbytes() for event in events if event.name() == "[memory]")
