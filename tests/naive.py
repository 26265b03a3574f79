"""The oracle of everything that skips work: transformers and peft as they come, one document at a time, autograd.

No line of Rung's models or training package runs here but the loading of the method under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from models import tiny_model
from rung.config.method import METHOD_CONFIGS
from rung.methods.protocol import Method
from rung.methods.registry import attach_method
from rung.types import Example


def naive(
    kind: str,
    shape: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    wide_norms: bool = False,
    start: Path | None = None,
    **config: object,
) -> tuple[PreTrainedModel, Method]:
    """A tiny model under transformers' own attention and peft's own forward, its trained numbers drawn anew.

    `wide_norms` lets RMSNorm compute in the model's own type: transformers computes it in float32 whatever the type,
    which hides everything below 1e-6.
    """
    model = tiny_model(shape, dtype=dtype)
    method = attach_method(model, METHOD_CONFIGS[kind](**config), seed=0, fused=False)
    if start is not None:
        method.load(start)
    if shape != "gemma2":  # its softcap runs in eager alone, with a softmax in float32: Rung's, unpacked, is exact
        model.set_attn_implementation("sdpa")
    redraw(method)
    if wide_norms:
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.forward = partial(_norm, module, 1.0 if "Gemma" in type(module).__name__ else 0.0)
    return model, method


def logprob(model: PreTrainedModel, e: Example) -> Tensor:
    """Log-probability of the supervised tokens in nats."""
    ids = torch.from_numpy(e.ids.astype(np.int64))
    logits = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
    at = torch.from_numpy(np.flatnonzero(e.supervised))
    return logits[at - 1, ids[at]].sum()


def written_out(loss: str, c: Tensor, r: Tensor, nc: int, nr: int, beta: float) -> Tensor:
    """Of log-ratios c and r, of lengths nc and nr: each formula once more, by other functions."""
    if loss == "dpo":
        return torch.log(1 + torch.exp(-beta * (c - r)))
    if loss == "ipo":
        return (c / nc - r / nr - 0.5 / beta) ** 2
    if loss == "hinge":
        return torch.clamp(1 - beta * (c - r), min=0)
    if loss == "robust":
        right, wrong = torch.log(1 + torch.exp(-beta * (c - r))), torch.log(1 + torch.exp(beta * (c - r)))
        return (0.8 * right - 0.2 * wrong) / 0.6
    if loss == "simpo":
        return torch.log(1 + torch.exp(-beta * (c / nc - r / nr - 0.5)))
    if loss == "orpo":
        odds = [torch.exp(x) / (1 - torch.exp(x)) for x in (c / nc, r / nr)]
        return beta * torch.log(1 + odds[1] / odds[0])
    if loss == "apo_zero":
        return 1 - 1 / (1 + torch.exp(-beta * c)) + 1 / (1 + torch.exp(-beta * r))
    return torch.log(1 + torch.exp(-beta * (c / nc - r / nr)))


def score(model: PreTrainedModel, weight: Tensor, e: Example) -> Tensor:
    """Score of a document by a head [1, H] on its last token."""
    out = model(torch.from_numpy(e.ids.astype(np.int64))[None], use_cache=False, output_hidden_states=True)
    return (out.hidden_states[-1][0, -1] @ weight[0]).double()


def _norm(module: nn.Module, offset: float, x: torch.Tensor) -> torch.Tensor:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return (offset + module.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def redraw(method: Method) -> None:
    """Trained numbers at random, so that none is a zero that hides a fault."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in method.trainable().values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.05 * noise.to(parameter.dtype))


def naive_loss(model: PreTrainedModel, examples: Sequence[Example]) -> torch.Tensor:
    """Weighted mean negative log-likelihood of the supervised tokens; `.grad` is filled."""
    model.zero_grad()
    total = sum(e.weight * int(e.supervised.sum()) for e in examples)
    value = torch.zeros((), dtype=torch.float64)
    for e in examples:
        ids = torch.from_numpy(e.ids.astype("int64"))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        at = torch.from_numpy(e.supervised.nonzero()[0])
        loss = e.weight * F.cross_entropy(logits[at - 1], ids[at], reduction="sum") / total
        loss.backward()  # type: ignore[no-untyped-call]
        value += loss.detach().to(torch.float64)
    return value


def gradients(method: Method) -> dict[str, torch.Tensor]:
    """Of everything that moves; a number without a gradient has a zero one."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in method.trainable().items()}


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of two gradients: of the whole, and of each tensor.

    A tensor counts for at least a hundredth of the whole, so that one near zero is not compared with its own rounding.
    """
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name].double(), theirs[name].double()) for name in ours]
    whole = torch.stack([b.norm() for _, b in pairs]).norm()
    error = torch.stack([(a - b).norm() for a, b in pairs])
    own = torch.stack([b.norm() for _, b in pairs]).clamp(min=float(whole) / 100)
    return float(torch.maximum(error.norm() / whole, (error / own).max()))
