"""Log-probabilities of chosen tokens without ever holding the logits of the whole row.

The gradient of log p(y | h) with respect to h is

    u = s * (W[y] - sum_v p_v W[v])            (softmax cross-entropy; s is the logit scale)

which needs the probabilities only once. With a frozen head it is computed in the forward pass, while the tile of logits
is live, and kept as N vectors; the backward pass is then a row-wise product. With a trainable head the tiles are
computed again in the backward pass, because the gradient of W needs the incoming gradient of each entry.

Suffixes: N entries of the loss index, V vocabulary, H width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TILE_ENTRIES = 128
"""Entries per tile: 128 x 49,152 logits are 25 MB in float32."""


@dataclass(frozen=True, slots=True)
class LogitMap:
    """What a model does to the product of head and hidden state: softcap * tanh(scale * z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(config: Any) -> LogitMap:
        """Read from a transformers config (Cohere multiplies, Granite divides, Gemma 2 caps)."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return LogitMap(scale, getattr(config, "final_logit_softcapping", None))

    def apply_(self, z_NV: Tensor) -> Tensor:
        """In place; returns its argument."""
        if self.scale != 1.0:
            z_NV.mul_(self.scale)
        if self.softcap is not None:
            z_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return z_NV

    def derivative(self, logits_NV: Tensor) -> Tensor | float:
        """D logits / d z, from the logits themselves."""
        if self.softcap is None:
            return self.scale
        return (1.0 - (logits_NV / self.softcap).square_()).mul_(self.scale)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        logit_map: LogitMap,
        tile: int,
    ) -> Tensor:
        head_moves = weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad)
        keep_direction = h_NH.requires_grad and not head_moves
        logprob_N = torch.empty(len(h_NH), dtype=torch.promote_types(h_NH.dtype, torch.float32), device=h_NH.device)
        direction_NH = torch.empty_like(h_NH) if keep_direction else None
        for rows in _tiles(len(h_NH), tile):
            logits = logit_map.apply_(_product(h_NH[rows], weight_VH, bias_V)).to(logprob_N.dtype)
            target = target_N[rows, None]
            lse = torch.logsumexp(logits, dim=-1)
            logprob_N[rows] = logits.gather(1, target)[:, 0] - lse
            if direction_NH is not None:
                direction_NH[rows] = _logit_gradient_(logits, lse, target, logit_map).to(h_NH.dtype) @ weight_VH
        ctx.logit_map, ctx.tile = logit_map, tile
        ctx.save_for_backward(h_NH if head_moves else None, weight_VH, bias_V, target_N, direction_NH)
        return logprob_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        h_NH, weight_VH, bias_V, target_N, direction_NH = ctx.saved_tensors
        if direction_NH is not None:
            return direction_NH * grad_N[:, None].to(direction_NH.dtype), None, None, None, None, None
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        if h_NH is None:
            return None, None, None, None, None, None
        grad_h = torch.empty_like(h_NH) if need_h else None
        grad_w = torch.zeros_like(weight_VH) if need_w else None
        grad_b = torch.zeros_like(bias_V) if need_b else None
        for rows in _tiles(len(h_NH), ctx.tile):
            logits = ctx.logit_map.apply_(_product(h_NH[rows], weight_VH, bias_V)).to(grad_N.dtype)
            lse = torch.logsumexp(logits, dim=-1)
            d_z = (
                _logit_gradient_(logits, lse, target_N[rows, None], ctx.logit_map)
                .mul_(grad_N[rows, None])
                .to(h_NH.dtype)
            )
            if grad_h is not None:
                grad_h[rows] = d_z @ weight_VH
            if grad_w is not None:
                grad_w.addmm_(d_z.T, h_NH[rows])
            if grad_b is not None:
                grad_b += d_z.sum(0)
        return grad_h, grad_w, grad_b, None, None, None


def _tiles(entries: int, tile: int) -> list[slice]:
    return [slice(at, min(at + tile, entries)) for at in range(0, entries, tile)]


def _product(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.addmm(bias, h, weight.T) if bias is not None else h @ weight.T


def _logit_gradient_(logits: Tensor, lse: Tensor, target: Tensor, logit_map: LogitMap) -> Tensor:
    """D log p(target) / d z, written over `logits` where no softcap needs them."""
    derivative = logit_map.derivative(logits)
    probability = logits.sub_(lse[:, None]).exp_()
    gradient = probability.neg_().scatter_add_(1, target, torch.ones_like(target, dtype=logits.dtype))
    return gradient.mul_(derivative)


def effective_linear(module: nn.Module) -> nn.Module:
    """The linear layer that acts: peft wraps a head that is trained whole beside an adapter."""
    copies = getattr(module, "modules_to_save", None)
    if copies is None:
        return module
    if getattr(module, "disable_adapters", False):
        return module.original_module  # type: ignore[return-value]
    return copies[module.active_adapters[0]]  # type: ignore[index,no-any-return]


def token_logprobs(
    h_NH: Tensor, head: nn.Module, target_N: Tensor, logit_map: LogitMap, tile: int = TILE_ENTRIES
) -> Tensor:
    """Log-probability in nats of each target, shape [N], float32 or wider.

    `head` is the model's output layer (weight [V, H], optional bias [V]); `h_NH` the hidden states that predict.
    A uniform head gives -log V.
    """
    linear = effective_linear(head)
    weight: Tensor = linear.weight  # type: ignore[assignment]
    # A head that moves is float32 beside bfloat16 layers, and the backward pass runs outside autocast.
    result: Tensor = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        h_NH.to(weight.dtype), weight, getattr(linear, "bias", None), target_N, logit_map, tile
    )
    return result
