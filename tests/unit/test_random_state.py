"""The states of random generators, of a card too: with stand-ins for the card's functions."""

from __future__ import annotations

import math

import pytest
import torch

from rung.training import random_state
from rung.training.distributed import _backends
from rung.training.optimizer import _squared_norm
from rung.training.random_state import generator_states, restore_generators

CARD = torch.device("cuda", 1)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, torch.Tensor]:
    """The generators of cards, by card."""
    states = {CARD: torch.tensor([1, 2, 3], dtype=torch.uint8)}
    monkeypatch.setattr(random_state.torch.cuda, "get_rng_state", lambda device: states[device].clone())
    monkeypatch.setattr(random_state.torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    return states


def test_both_generators_continue(card: dict[torch.device, torch.Tensor]) -> None:
    torch.manual_seed(5)
    before = generator_states(CARD)
    expected = torch.rand(4)
    card[CARD] = torch.zeros(3, dtype=torch.uint8)
    torch.manual_seed(9)
    restore_generators(before, CARD)
    assert torch.equal(torch.rand(4), expected) and card[CARD].tolist() == [1, 2, 3]


def test_a_run_that_goes_on_elsewhere(card: dict[torch.device, torch.Tensor]) -> None:
    """From a card to a processor and back: each generator that is there continues, and nothing is asked of others."""
    processor = torch.device("cpu")
    assert set(generator_states(processor)) == {"rng"}
    restore_generators(generator_states(CARD), processor)
    card[CARD] = torch.tensor([7], dtype=torch.uint8)
    restore_generators(generator_states(processor), CARD)
    assert card[CARD].tolist() == [7]


def test_which_library_carries_what() -> None:
    """Messages between the processes lie in the host's memory, tensors of a model on the card."""
    assert _backends(CARD) == {"backend": "cpu:gloo,cuda:nccl", "device_id": CARD}
    assert _backends(torch.device("cpu")) == {"backend": "gloo"}


def test_the_norm_of_all_gradients() -> None:
    """Against Python's own sum of squares, in bfloat16 too; parameters without a gradient do not count."""
    draw, parameters = torch.Generator().manual_seed(0), []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        parameter = torch.nn.Parameter(torch.zeros(3, 50, dtype=dtype))
        parameter.grad = torch.randn(3, 50, generator=draw).to(dtype)
        parameters.append(parameter)
    parameters.append(torch.nn.Parameter(torch.zeros(2)))
    exact = math.fsum(x * x for p in parameters if p.grad is not None for x in p.grad.double().flatten().tolist())
    assert _squared_norm(parameters) == pytest.approx(exact, rel=1e-12)
    assert _squared_norm(parameters[3:]) == 0.0
