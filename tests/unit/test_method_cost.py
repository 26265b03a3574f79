"""What a layer is said to keep of each token, against what the allocator has handed out and not got back."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from builders import example, policy_of
from models import tiny_model
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import SftConfig
from rung.methods.registry import attach_method
from rung.models.packing import pack
from rung.objectives.sft import SftObjective
from rung.planning.architecture import shape_from_config
from rung.planning.method_cost import activation_bytes_per_token, layer_bytes_per_token, method_bytes_per_token

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
    "qlora, 8 bits, two roles": ("qlora", {"bits": 8, "targets": ("q", "v")}),
    "qlora, 8 bits, dropout": ("qlora", {"bits": 8, "dropout": 0.1}),
    "rank_pattern": ("lora", {"rank_pattern": {"q": 32}}),
    "mixture": ("mixture", {"experts": 3, "rank": 4}),
    "mixture, one role": ("mixture", {"experts": 3, "rank": 4, "targets": ("q",)}),
    "mixture, another": ("mixture", {"experts": 3, "rank": 4, "targets": ("gate",)}),
    "houlsby": ("bottleneck", {}),
    "pfeiffer": ("bottleneck", {"placement": "pfeiffer"}),
    "parallel": ("bottleneck", {"placement": "parallel"}),
    "prefix": ("prefix", {"virtual_tokens": 4}),
    "full": ("full", {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_keeps_what_is_planned(name: str) -> None:
    kind, given = METHODS[name]
    config = METHOD_CONFIGS[kind](**given)
    shape = shape_from_config(tiny_model().config.to_dict())
    planned = layer_bytes_per_token(shape) + method_bytes_per_token(config, replace(shape, layers=1))
    measured = (kept(config, layers=4) - kept(config, layers=2)) / 2 / TOKENS
    assert planned <= measured <= planned * (1 + SMALL), (planned / 4, measured / 4)


def test_layers_without_the_method_keep_what_the_base_does() -> None:
    """Of four layers the lowest has it, and with another setting a second one."""
    shape = shape_from_config(tiny_model(num_hidden_layers=4).config.to_dict())
    one, two = (METHOD_CONFIGS["lora"](dropout=0.1, layers=layers) for layers in ((0,), (0, 2)))
    planned = method_bytes_per_token(two, shape) - method_bytes_per_token(one, shape)
    measured = (kept(two, layers=4) - kept(one, layers=4)) / TOKENS
    assert measured == pytest.approx(planned, rel=SMALL)
    assert activation_bytes_per_token(shape) == 4 * layer_bytes_per_token(shape)


def kept(config: Any, *, layers: int) -> int:
    """Bytes that a forward pass has taken and not given back."""
    model = tiny_model(num_hidden_layers=layers, max_position_embeddings=TOKENS)
    policy = policy_of(model, attach_method(model, config, seed=0))
    model.train()
    (batch,) = pack([example([5] * (TOKENS // 2), 10, line=n) for n in (1, 2)], TOKENS, share_prefixes=False)
    objective = SftObjective(SftConfig())
    objective.loss(policy, batch)[0].total.backward()  # what is made once is there from here on
    gc.collect()  # or what an earlier pass left goes while it is counted
    gc.disable()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        loss = objective.loss(policy, batch)[0].total
    gc.enable()
    assert torch.isfinite(loss)
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(event.nbytes() for event in events if event.name() == "[memory]")
