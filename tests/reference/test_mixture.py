"""A mixture of experts against its sum written out, and a balance loss that knows no micro-batches."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from builders import documents, policy_of, tuned
from models import tiny_model
from naive import distance, gradients, naive, naive_loss
from rung.config.objective import SftConfig
from rung.methods.mixture import NAME, balance_loss, document_of_token, expert_shares, top_k_weights
from rung.models.fused_modules import install_fused_forwards
from rung.models.packing import pack, pack_separately
from rung.objectives.sft import SftObjective
from rung.training.step import accumulate, mean_loss

SFT = SftObjective(SftConfig())


def written_out(x: torch.Tensor, experts: nn.Module, top: int | None) -> torch.Tensor:
    """Expert by expert and token by token."""
    rank, rows = experts.rank, []
    for token in x:
        weights = torch.softmax(experts.router @ token, 0)
        if top is not None:
            kept = weights.argsort(descending=True)[:top]
            weights = torch.stack([w if i in kept else w * 0 for i, w in enumerate(weights)])
            weights = weights / weights.sum()
        out = torch.zeros(len(experts.b), dtype=x.dtype)
        for e, weight in enumerate(weights):
            own = slice(e * rank, (e + 1) * rank)
            out = out + weight * experts.b[:, own] @ (experts.a[own] @ token)
        rows.append(experts.scale * out)
    return torch.stack(rows)


@pytest.mark.parametrize("top", [None, 2])
def test_it_is_the_sum_of_its_experts(top: int | None) -> None:
    _, method = tuned("mixture", dtype=torch.float64, experts=3, rank=2, alpha=5.0, top_k=top)
    for name, host in method.hosts.items():
        experts = host.get_submodule(NAME)
        x = torch.randn(6, experts.a.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        # the softmax runs in float32
        assert (experts(x) - written_out(x, experts, top)).abs().max() < 1e-6, name


@pytest.mark.parametrize("shape", ["llama", "gpt2", "phi3"])
def test_without_balance_gradients_equal_the_naive_ones(shape: str) -> None:
    examples = documents(6, count=7, shared=20)
    config = {"experts": 3, "rank": 2, "balance": 0.0}
    policy, method = tuned("mixture", shape, dtype=torch.float64, **config)
    model, plain = naive("mixture", shape, dtype=torch.float64, wide_norms=True, **config)
    accumulate(policy, SFT, pack(examples, 50))
    naive_loss(model, examples)
    assert distance(gradients(method), gradients(plain)) < 1e-6


@pytest.mark.parametrize("top", [None, 2])
def test_the_balance_does_not_depend_on_micro_batches(top: int | None) -> None:
    examples = documents(6, count=9)
    found = []
    for batches in (
        pack_separately(examples),
        pack(examples, 10_000, share_prefixes=False),
        pack(examples, 60, share_prefixes=False),
    ):
        policy, method = tuned("mixture", "gpt2", dtype=torch.float64, experts=3, rank=2, balance=0.5, top_k=top)
        loss = accumulate(policy, SFT, batches)
        found.append((float(loss), gradients(method), method.statistics()))
    for loss, own, statistics in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-7)
        assert distance(own, found[0][1]) < 1e-6
        assert statistics == found[0][2]
    shares = next(iter(found[0][2]["router_load"].values()))
    assert sum(shares) == pytest.approx(1.0, abs=1e-3) and len(shares) == 3


def test_the_balance_is_one_when_even_and_the_number_of_experts_when_not() -> None:
    (batch,) = pack(documents(6, count=3), 10_000, share_prefixes=False)
    even = torch.full((len(batch.ids), 4), 0.25, dtype=torch.float64)
    assert float(balance_loss(even, even, document_of_token(batch), batch.sequences)) == pytest.approx(3.0)
    one = torch.zeros_like(even)
    one[:, 2] = 1.0
    assert float(balance_loss(one, one, document_of_token(batch), batch.sequences)) == pytest.approx(3 * 4.0)
    mixed = torch.softmax(torch.randn(len(batch.ids), 4, dtype=torch.float64), 1)
    expected = 0.0
    for rows in batch.rows:
        routed = top_k_weights(mixed, 2)[rows] > 0
        share_E = routed.double().sum(0) / routed.sum()
        expected += 4 * float((share_E * mixed[rows].mean(0)).sum())
    routed = expert_shares(top_k_weights(mixed, 2), 2)
    assert float(balance_loss(mixed, routed, document_of_token(batch), batch.sequences)) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("top", [None, 2])
def test_the_balance_spreads_the_tokens(top: int | None) -> None:
    """Steps down the balance alone bring a router that favours one expert near 1; a constant would leave it."""
    (batch,) = pack(documents(6, count=3), 10_000, share_prefixes=False)
    x = torch.randn(len(batch.ids), 8, dtype=torch.float64)
    x[:, 0] = 1.0  # by which every token can be sent one way
    router = torch.zeros(8, 4, dtype=torch.float64)
    router[0, 1] = 3.0
    router.requires_grad_(True)
    found = []
    for _ in range(60):
        probabilities = torch.softmax(x @ router, -1)
        loss = balance_loss(
            probabilities,
            expert_shares(top_k_weights(probabilities, top), top),
            document_of_token(batch),
            batch.sequences,
        )
        (gradient,) = torch.autograd.grad(loss, router)
        router = (router - 0.5 * gradient / batch.sequences).detach().requires_grad_(True)
        found.append(float(loss.detach()) / batch.sequences)
    assert found[0] > 1.2 and found[-1] < found[0] - 0.15


def test_the_penalty_moves_the_router_and_is_no_part_of_validation() -> None:
    examples = documents()
    batches = pack(examples, 10_000, share_prefixes=False)
    losses = []
    for balance in (0.0, 0.5):
        policy, _ = tuned("mixture", experts=3, rank=2, balance=balance)
        losses.append((mean_loss(policy, SFT, batches), float(accumulate(policy, SFT, batches))))
    assert losses[0][0] == losses[1][0]
    assert losses[1][1] - losses[0][1] == pytest.approx(0.5, abs=0.1)  # a balance loss near 1 a document


def test_the_base_is_bit_identical_when_off() -> None:
    policy, _ = tuned("mixture", experts=3, rank=2)
    batch = pack(documents(), 10_000)[0]
    base = tiny_model()
    install_fused_forwards(base)
    assert torch.equal(policy.reference_logprobs(batch), policy_of(base).logprobs(batch))


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_no_graph_outlives_its_batch(balance: float) -> None:
    """What a router keeps of a batch would keep all its activations."""
    policy, method = tuned("mixture", experts=3, rank=2, balance=balance)
    accumulate(policy, SFT, pack(documents(), 10_000, share_prefixes=False))
    assert all(host.get_submodule(NAME).routing is None for host in method.hosts.values())
    assert len(method.statistics()["router_load"]) == len(method.hosts)


def test_a_resumed_mixture_goes_on_counting() -> None:
    examples = documents()
    policy, whole = tuned("mixture", experts=3, rank=2)
    accumulate(policy, SFT, pack(examples[:3], 10_000))
    kept = json.loads(json.dumps(whole.state()))
    accumulate(policy, SFT, pack(examples[3:], 10_000))
    other, resumed = tuned("mixture", experts=3, rank=2)
    resumed.load_state(kept)
    accumulate(other, SFT, pack(examples[3:], 10_000))
    assert resumed.state() == whole.state() and resumed.statistics() == whole.statistics()
