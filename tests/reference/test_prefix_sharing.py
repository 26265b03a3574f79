"""A beginning that runs once for several micro-batches, against every document alone."""

from __future__ import annotations

import pytest
import torch

from builders import documents, policy_of, tuned
from models import SHAPES, tiny_model
from naive import distance, gradients, naive, naive_loss
from rung.config.objective import SftConfig
from rung.models import policy as policy_module
from rung.models.fused_modules import install_fused_forwards
from rung.models.packing import MIN_PREFIX_AHEAD, pack
from rung.models.policy import Policy
from rung.objectives.sft import SftObjective
from rung.training.step import accumulate, mean_loss
from rung.types import Example
from tolerances import FLOAT32, FLOAT64

BUDGET = 40


def examples(seed: int = 3) -> list[Example]:
    return documents(seed, count=7, shared=MIN_PREFIX_AHEAD + 9)


def rows_of(given: list[Example]) -> int:
    return sum(batch.prefix is not None for batch in pack(given, BUDGET))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "config"), [("lora", {}), ("lora", {"layers": (1,)}), ("full", {})], ids=str)
def test_gradients_equal_the_naive_ones(shape: str, kind: str, config: dict[str, object]) -> None:
    assert rows_of(examples()) > 2
    for dtype, limit in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
        model, plain = naive(kind, shape, dtype=dtype, wide_norms=dtype is torch.float64, **config)
        expected = naive_loss(model, examples())
        policy, method = tuned(kind, shape, dtype=dtype, **config)
        loss = accumulate(policy, SftObjective(SftConfig()), pack(examples(), BUDGET))
        assert float(loss) == pytest.approx(float(expected), rel=limit)
        assert distance(gradients(method), gradients(plain)) < limit
        value = mean_loss(policy, SftObjective(SftConfig()), pack(examples(), BUDGET))
        assert value == pytest.approx(float(expected), rel=limit)


def test_reference_logprobs_come_from_the_base_with_its_own_prefix() -> None:
    policy, _ = tuned("lora", dtype=torch.float64)
    model = tiny_model(dtype=torch.float64)
    install_fused_forwards(model)
    base = policy_of(model)
    for batch in pack(examples(), BUDGET):
        with policy.shared_prefix(batch.prefix):
            on, off = policy.logprobs(batch), policy.reference_logprobs(batch)
        with base.shared_prefix(batch.prefix):
            same = base.logprobs(batch)
        assert (off - same).abs().max() < FLOAT64 and (on - off).abs().max() > 1e-3


@pytest.mark.parametrize("broken", ["not passed on", "positions", "poisoned"])
def test_a_broken_prefix_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = naive("lora", dtype=torch.float64)
    naive_loss(model, examples())
    policy, method = tuned("lora", dtype=torch.float64)
    batches = pack(examples(), BUDGET)
    if broken == "not passed on":
        monkeypatch.setattr(policy_module.PrefixCache, "backward", lambda self: None)
    if broken == "positions":
        for batch in batches:
            batch.positions.sub_(1)
    if broken == "poisoned":
        own = Policy._context_kv

        def poisoned(self: Policy, prefix: object, task: object, batch: object) -> object:
            leaves = own(self, prefix, task, batch)  # type: ignore[arg-type]
            leaves[0][1].data[..., 3, :] += 0.5
            return leaves

        monkeypatch.setattr(Policy, "_context_kv", poisoned)
    accumulate(policy, SftObjective(SftConfig()), batches)
    assert distance(gradients(method), gradients(plain)) > 1e-3


def test_a_prefix_is_forgotten_after_its_rows() -> None:
    """The next step has other weights: keys and values of the last one would be stale."""
    policy, method = tuned("lora")
    batches = pack(examples(), BUDGET)
    before = mean_loss(policy, SftObjective(SftConfig()), batches)
    with torch.no_grad():
        for parameter in method.trainable().values():
            parameter.add_(0.05)
    assert abs(mean_loss(policy, SftObjective(SftConfig()), batches) - before) > 1e-3
    with pytest.raises(RuntimeError, match="shared prefix"):
        policy.logprobs(batches[0])


def test_a_prefix_adds_up_the_gradients_of_its_micro_batches_in_float32() -> None:
    """513 micro-batches behind one prefix of bfloat16 keys: 1 + 512 / 512 is 2; in bfloat16 the sum stayed 1."""
    source = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    cache = policy_module.PrefixCache({0: (source * 1.0,)})
    for addend in [1.0, *[2.0**-9] * 512]:
        (cache.leaves[0][0].to(torch.bfloat16) * addend).sum().backward()
    cache.backward()
    assert source.grad is not None and source.grad.tolist() == [2.0, 2.0, 2.0]
