"""Rotary embeddings in one kernel a tensor on a card, in place of ten operations forward and twenty backward.

transformers' attention modules call a function of their own module, `apply_rotary_pos_emb`. Where it computes what
`pointwise.rotate` computes (compared on random input), a dispatcher takes its name: tensors on a card go through our
function, which stores cosine and sine alone, and all others through the original. `models/fused_modules.py` installs
it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rung.models.pointwise import on_card, rotate, rotate_backward

NAME = "apply_rotary_pos_emb"
_TOLERANCE = 1e-12
"""Largest difference in float64 from the function of a module."""


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_1HTD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_1TD, sin_1TD)
        return rotate(x_1HTD, cos_1TD, sin_1TD)

    @staticmethod
    def backward(ctx: Any, grad_1HTD: Tensor) -> tuple[Tensor | None, ...]:
        return rotate_backward(grad_1HTD, *ctx.saved_tensors), None, None


class FusedRotary:
    """Replacement for `apply_rotary_pos_emb` of one modeling module."""

    disabled = False
    """While set, every tensor goes through the original: the oracle of the step-0 gate."""

    def __init__(self, original: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.original = original

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Queries and keys with their positions, shaped as they came."""
        # a further argument is the dimension of the heads where it is not the usual one
        if self.disabled or args or kwargs or not on_card(q):
            return self.original(q, k, cos, sin, *args, **kwargs)
        return tuple(_Rotary.apply(x, cos, sin) for x in (q, k))  # type: ignore[no-untyped-call]


def install_fused_rotary(model: nn.Module) -> None:
    """Install the dispatcher in the modules of the model's classes whose function it replaces. Safe to call twice."""
    for name in {type(module).__module__ for module in model.modules()}:
        function = getattr(sys.modules[name], NAME, None)
        if function is not None and not isinstance(function, FusedRotary) and _is_standard(function):
            setattr(sys.modules[name], NAME, FusedRotary(function))


@contextmanager
def original_rotary() -> Iterator[None]:
    """Within the context every rotary embedding is computed by transformers."""
    previous, FusedRotary.disabled = FusedRotary.disabled, True
    try:
        yield
    finally:
        FusedRotary.disabled = previous


@torch.no_grad()
def _is_standard(function: Callable[..., Any]) -> bool:
    """Whether the function turns [1, H, T, D] queries and keys by [1, T, D] cosines and sines as `rotate` does."""
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((1, 3, 5, 8), (1, 2, 5, 8), (1, 5, 8), (1, 5, 8))
    )
    try:
        outputs = function(q, k, cos, sin)
    except (TypeError, RuntimeError, ValueError, IndexError):
        return False  # another signature, such as that of the architectures that need position ids
    if not isinstance(outputs, tuple) or len(outputs) != 2:
        return False
    expected = (rotate(x, cos, sin) for x in (q, k))
    return all(
        isinstance(a, Tensor) and a.shape == b.shape and bool((a - b).abs().max() < _TOLERANCE)
        for a, b in zip(outputs, expected, strict=True)
    )
