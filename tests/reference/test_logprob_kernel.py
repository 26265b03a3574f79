"""The head's Triton kernel in Triton's interpreter, against log-softmax and autograd in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rung.models import logprobs
from rung.models.logprobs import KERNEL_TILE_BYTES, LogitTransform, TileSize, has_logprob_kernel, token_logprobs

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")

MAPS = [
    LogitTransform(),
    LogitTransform(scale=0.3, temperature=0.7),
    LogitTransform(softcap=4.0),
    LogitTransform(scale=2.0, softcap=3.0, temperature=1.3),
]
ROUNDING = 2.0**-7
"""Of bfloat16 in the interpreter, which cuts the bits off; a card rounds to the nearest number, 2^-8."""


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The kernel as Triton's interpreter runs it (`conftest.py` sets TRITON_INTERPRET)."""
    from rung.models import logprob_kernel

    assert "Interpreted" in type(logprob_kernel._log_softmax_gradient).__name__
    monkeypatch.setattr(logprob_kernel, "BLOCK", 8)  # several blocks, and one that is not full
    yield logprob_kernel


def naive(h: Tensor, head: nn.Linear, target: Tensor, logit_map: LogitTransform) -> Tensor:
    z = head(h) * logit_map.scale
    if logit_map.softcap is not None:
        z = logit_map.softcap * torch.tanh(z / logit_map.softcap)
    return (z / logit_map.temperature).log_softmax(-1).gather(1, target[:, None])[:, 0]


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients(
    logit_map: LogitTransform, bias: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    exact_head = nn.Linear(6, 21, bias=bias, dtype=torch.float64).requires_grad_(not frozen)
    head = nn.Linear(6, 21, bias=bias).requires_grad_(not frozen)
    head.load_state_dict(exact_head.state_dict())
    exact_head.load_state_dict(head.state_dict())  # the same numbers: those of float32
    target, weight = torch.randint(21, (9,)), torch.randn(9)
    hidden = torch.randn(9, 6)
    calls = []
    monkeypatch.setattr(logprobs, "has_logprob_kernel", lambda device, dtype: calls.append(dtype) or True)
    monkeypatch.setattr(logprobs._KernelHead, "entries", 4)  # three tiles
    results = []
    for call, model, dtype in ((naive, exact_head, torch.float64), (token_logprobs, head, torch.float32)):
        h = hidden.to(dtype).requires_grad_()
        value = call(h, model, target, logit_map)
        (value * weight.to(dtype)).sum().backward()
        results.append([value.detach(), h.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(calls) == (1 if frozen else 2)
    assert len(results[0]) == len(results[1]) == 2 + (0 if frozen else 1 + bias)
    for theirs, ours in zip(*results, strict=True):
        assert ours is not None and theirs is not None
        assert (ours.double() - theirs).norm() / theirs.norm() < 1e-6


@pytest.mark.parametrize("frozen", [False, True])
def test_a_gradient_that_was_expanded(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a plain sum is one number with a stride of 0, and targets may be a column of something."""
    head = nn.Linear(6, 21).requires_grad_(not frozen)
    target, hidden = torch.randint(21, (9, 2))[:, 0], torch.randn(9, 6)
    monkeypatch.setattr(logprobs, "has_logprob_kernel", lambda device, dtype: True)
    gradients = []
    for call in (naive, token_logprobs):
        h = hidden.clone().requires_grad_()
        head.zero_grad()
        call(h, head, target, LogitTransform()).sum().backward()
        gradients.append([h.grad, *(p.grad for p in head.parameters() if p.grad is not None)])
    assert all((a - b).norm() / b.norm() < 1e-6 for a, b in zip(*gradients, strict=True))


def test_bfloat16_rounds_once(interpreter: Any) -> None:
    """The gradient in place of bfloat16 logits: each entry is that of the same logits in float64, rounded."""
    z = (3 * torch.randn(5, 40)).bfloat16()
    target = torch.tensor([0, 39, 7, 8, 16])
    exact = z.double().requires_grad_()
    exact.log_softmax(-1)[range(5), target].sum().backward()
    lse, logit = interpreter.log_softmax_gradient_(z_ := z.clone(), target, scale=1.0, softcap=None, temperature=1.0)
    assert exact.grad is not None and z_.dtype == torch.bfloat16
    assert ((z_.double() - exact.grad).abs() <= 1.01 * ROUNDING * exact.grad.abs()).all()
    assert (lse - exact.logsumexp(-1)).abs().max() < 1e-5
    assert torch.equal(logit, z[range(5), target].float())


def test_a_sure_target_keeps_its_gradient(interpreter: Any) -> None:
    """1 - p is taken before it is rounded: for p = 0.9999 the gradient of the target is 1e-4 and not 0."""
    z = torch.zeros(1, 16, dtype=torch.bfloat16)
    z[0, 3] = 12.0
    exact = z.double().log_softmax(-1).exp()[0, 3]
    interpreter.log_softmax_gradient_(z, torch.tensor([3]), scale=1.0, softcap=None, temperature=1.0)
    assert float(z[0, 3]) == pytest.approx(1.0 - float(exact), rel=ROUNDING)


def test_evaluation_writes_no_gradient(interpreter: Any) -> None:
    z = torch.randn(3, 11)
    before = z.clone()
    options: dict[str, Any] = {"scale": 1.0, "softcap": None, "temperature": 1.0}
    lse, _ = interpreter.log_softmax_gradient_(z, torch.tensor([1, 2, 3]), writes_gradient=False, **options)
    assert torch.equal(z, before) and (lse - before.logsumexp(-1)).abs().max() < 1e-6
    nothing, _ = interpreter.log_softmax_gradient_(z[:0], torch.zeros(0, dtype=torch.long), **options)
    assert nothing.shape == (0,)


def test_extreme_logits_stay_finite(interpreter: Any) -> None:
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    lse, logit = interpreter.log_softmax_gradient_(z, torch.tensor([0, 0]), scale=1.0, softcap=None, temperature=1.0)
    assert (logit - lse).tolist() == [0.0, -2e4] and torch.isfinite(z).all()
    assert z[1].tolist() == [1.0, -1.0, 0.0]


def test_a_gradient_without_the_slope_is_noticed(interpreter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: the softcap's slope left out of the gradient, which flat logits would not show."""
    results = []
    for softcap in (2.0, None):
        z = torch.linspace(-6.0, 6.0, 12)[None].clone()
        if softcap is None:
            z = 2.0 * torch.tanh(z / 2.0)  # the same logits
        interpreter.log_softmax_gradient_(z, torch.tensor([4]), scale=1.0, softcap=softcap, temperature=1.0)
        results.append(z)
    assert (results[0] - results[1]).abs().max() > 1e-2


def test_where_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "has_triton", lambda: True)
    card, processor = torch.device("cuda"), torch.device("cpu")
    assert has_logprob_kernel(card, torch.bfloat16) and has_logprob_kernel(card, torch.float32)
    assert not has_logprob_kernel(card, torch.float64) and not has_logprob_kernel(processor, torch.float32)
    monkeypatch.setattr(logprobs, "has_triton", lambda: False)
    assert not has_logprob_kernel(card, torch.bfloat16)


def test_a_given_tile_is_taken_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "has_logprob_kernel", lambda device, dtype: True)
    weight = torch.zeros(8, 3)
    assert logprobs._head_of(weight, None, LogitTransform(), torch.float32, TileSize(4, 3)).entries == 4


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "entries"), [(128_256, torch.bfloat16, 1536), (49_152, torch.float32, 2048)]
)
def test_a_tile_has_the_planned_bytes(vocabulary: int, dtype: torch.dtype, entries: int) -> None:
    weight = torch.empty(vocabulary, 1, dtype=dtype, device="meta")
    tile = logprobs._KernelHead(weight, None, LogitTransform()).entries
    assert tile == entries and tile * vocabulary * dtype.itemsize <= KERNEL_TILE_BYTES
