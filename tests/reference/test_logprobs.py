"""The log-probability head against a full log-softmax and autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rung.models.logprobs import CARD_TILE, TILE, LogitTransform, TileSize, tile_of, token_logprobs
from rung.planning.memory import CARD_TILE_LOGITS, TILE_LOGITS
from tolerances import FLOAT64

MAPS = [
    LogitTransform(),
    LogitTransform(scale=0.3),
    LogitTransform(softcap=4.0),
    LogitTransform(scale=2.0, softcap=3.0),
]


def naive(h: torch.Tensor, head: nn.Linear, target: torch.Tensor, logit_map: LogitTransform) -> torch.Tensor:
    z = head(h) * logit_map.scale
    if logit_map.softcap is not None:
        z = logit_map.softcap * torch.tanh(z / logit_map.softcap)
    return z.log_softmax(-1).gather(1, target[:, None])[:, 0]


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients(logit_map: LogitTransform, bias: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 11, bias=bias, dtype=torch.float64).requires_grad_(not frozen)
    target = torch.randint(11, (9,))
    weight = torch.randn(9, dtype=torch.float64)
    results = []
    for call in (
        lambda h: naive(h, head, target, logit_map),
        lambda h: token_logprobs(h, head, target, logit_map, tile=TileSize(4, 3)),
    ):
        h = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        head.zero_grad()
        value = call(h)
        (value * weight).sum().backward()
        results.append([value.detach(), h.grad, *(p.grad for p in head.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) == 2 + (0 if frozen else 1 + bias)
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < FLOAT64


def test_gradcheck() -> None:
    head = nn.Linear(3, 5, dtype=torch.float64).requires_grad_(False)
    h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, 2, 2])
    assert torch.autograd.gradcheck(
        lambda x: token_logprobs(x, head, target, LogitTransform(), tile=TileSize(3, 2)), (h,)
    )


def test_extreme_logits_stay_finite() -> None:
    head = nn.Linear(2, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 1.0]]))
    h = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    value = token_logprobs(h, head, torch.tensor([0, 0]), LogitTransform())
    value.sum().backward()
    assert value[0] == 0.0 and value[1] == -2e4
    assert torch.isfinite(h.grad).all()


def test_no_entries() -> None:
    head = nn.Linear(3, 5).requires_grad_(False)
    h = torch.zeros(0, 3, requires_grad=True)
    value = token_logprobs(h, head, torch.zeros(0, dtype=torch.long), LogitTransform())
    value.sum().backward()
    assert value.shape == (0,) and h.grad.shape == (0, 3)


def test_uniform_head_is_log_vocabulary() -> None:
    head = nn.Linear(3, 8, bias=False).requires_grad_(False)
    head.weight.zero_()
    value = token_logprobs(torch.randn(2, 3), head, torch.tensor([1, 5]), LogitTransform())
    assert torch.allclose(value, torch.full((2,), -2.0794415), atol=1e-6)


def test_autocast_bfloat16_keeps_the_gradient_near() -> None:
    torch.manual_seed(0)
    head = nn.Linear(32, 50).requires_grad_(False)
    target = torch.randint(50, (7,))
    gradients = []
    for low in (False, True):
        h = torch.randn(7, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            token_logprobs(h, head, target, LogitTransform()).sum().backward()
        gradients.append(h.grad)
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 2e-2  # bfloat16 has 8 bits of mantissa


def test_tiles_of_a_trainable_head_add_up_in_float32_on_bfloat16_states() -> None:
    """75 tiles of the vocabulary, and slices of entries: the sums round no more than their products do.

    The bound is the rounding of one bfloat16 product (2^-8) with the float64 gradient of the same rounded inputs.
    """
    torch.manual_seed(0)
    vocabulary, width, entries = 75 * 8, 16, 64 * 8
    h = torch.randn(entries, width).bfloat16()
    head = nn.Linear(width, vocabulary, bias=True).bfloat16()
    target = torch.randint(vocabulary, (entries,))
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        states, copy = h.to(dtype).requires_grad_(), nn.Linear(width, vocabulary).to(dtype)
        copy.load_state_dict(head.state_dict())
        token_logprobs(states, copy, target, LogitTransform(), tile=TileSize(8, 8)).sum().backward()
        gradients.append([states.grad, copy.weight.grad, copy.bias.grad])
    for exact, ours in zip(*gradients, strict=True):
        assert float((ours.double() - exact).norm() / exact.norm()) < 2.0**-8


def test_a_card_has_larger_tiles_and_the_plan_counts_them() -> None:
    assert tile_of(torch.device("cpu")) is TILE and tile_of(torch.device("cuda")) is CARD_TILE
    assert (TILE.entries * TILE.columns, CARD_TILE.entries * CARD_TILE.columns) == (TILE_LOGITS, CARD_TILE_LOGITS)
