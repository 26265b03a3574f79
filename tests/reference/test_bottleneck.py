"""Bottleneck adapters against the same network written out, and against autograd one document at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from builders import documents, policy_of, tuned
from models import tiny_model
from naive import distance, gradients, naive, naive_loss
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import SftConfig
from rung.errors import ConfigError
from rung.methods.bottleneck import NAME
from rung.methods.registry import attach_method
from rung.models.packing import MIN_PREFIX_AHEAD, pack
from rung.objectives.sft import SftObjective
from rung.training.step import accumulate
from tolerances import FLOAT32, FLOAT64

PLACEMENTS = ["houlsby", "pfeiffer", "parallel"]
SFT = SftObjective(SftConfig())


class Written(nn.Module):
    """A module with an adapter, as the equations say."""

    def __init__(self, base: nn.Module, adapter: nn.Module, placement: str) -> None:
        super().__init__()
        self.__dict__["base"], self.adapter, self.placement = base, adapter, placement

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["base"], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.__dict__["base"](x, *args, **kwargs)
        a = self.adapter
        h = x if self.placement == "parallel" else y
        middle = torch.tanh(h @ a.down.weight.T + a.down.bias)
        return y + 0.7 * (middle @ a.up.weight.T + a.up.bias)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_is_the_network_of_the_equations(placement: str) -> None:
    policy, method = tuned("bottleneck", placement=placement, width=3, activation="tanh", scale=0.7)
    plain = tiny_model()
    for name, host in method.hosts.items():
        parent, _, own = name.rpartition(".")
        written = Written(plain.get_submodule(name), host.get_submodule(NAME), placement)
        setattr(plain.get_submodule(parent), own, written)
    batch = pack(documents(), 10_000)[0]
    expected = policy_of(plain).logprobs(batch)
    assert (policy.logprobs(batch) - expected).abs().max() < 1e-5
    assert (policy.reference_logprobs(batch) - expected).abs().max() > 1e-3
    counts = {"houlsby": 4, "pfeiffer": 2, "parallel": 2}
    assert len(method.hosts) == counts[placement]


@pytest.mark.parametrize("shape", ["llama", "phi", "gpt2", "phi3", "gemma2"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients_equal_the_naive_ones(placement: str, shape: str) -> None:
    examples = documents(6, count=7, shared=MIN_PREFIX_AHEAD + 9)
    for dtype, limit in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
        config = {"placement": placement, "width": 3}
        policy, method = tuned("bottleneck", shape, dtype=dtype, **config)
        model, plain = naive("bottleneck", shape, dtype=dtype, wide_norms=dtype is torch.float64, **config)
        loss = accumulate(policy, SFT, pack(examples, 50))
        expected = naive_loss(model, examples)
        assert float(loss) == pytest.approx(float(expected), rel=limit)
        assert distance(gradients(method), gradients(plain)) < limit


def test_a_feed_forward_block_that_is_no_module_has_no_side() -> None:
    with pytest.raises(ConfigError, match=r"method\.placement"):
        attach_method(tiny_model("opt"), METHOD_CONFIGS["bottleneck"](placement="parallel"), seed=0)
    assert len(attach_method(tiny_model("opt"), METHOD_CONFIGS["bottleneck"](), seed=0).hosts) == 4
