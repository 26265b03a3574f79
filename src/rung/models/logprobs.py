"""Log-probabilities of chosen tokens without ever holding the logits of a row.

The gradient of log p(y | h) with respect to h is

    u = s * (W[y] - sum_v p_v W[v])            (softmax cross-entropy; s is the logit scale)

which is attention with W as keys and as values. So it is computed as flash attention is (Dao et al. 2022,
algorithm 1): over tiles of the vocabulary, with a running maximum and a running sum, each tile of logits overwritten in
place and used for both products while it is in the processor's cache. With a frozen head u is kept as N vectors and the
backward pass is a row-wise product. With a trainable head the tiles are computed again in the backward pass, because
the gradient of W needs the incoming gradient of each entry.

Suffixes: N entries of the loss index, V vocabulary, C vocabulary entries of a tile, H width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rung.models.matmul import linear, matmul


class TileSize(NamedTuple):
    """How many entries and how many vocabulary rows meet at once."""

    entries: int
    columns: int


TILE = TileSize(512, 2048)
"""4 MB of logits in float32: they stay in a processor's cache, and products of this size run at full rate."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What is done to the product of head and hidden state: softcap * tanh(scale * z / softcap) / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    """Of sampling: log-probabilities are then those of the distribution that tokens are drawn from."""

    @staticmethod
    def of(config: Any) -> LogitTransform:
        """Read from a transformers config (Cohere multiplies, Granite divides, Gemma 2 caps)."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))

    def apply_(self, z_NV: Tensor) -> Tensor:
        """In place; returns its argument."""
        if self.scale != 1.0:
            z_NV.mul_(self.scale)
        if self.softcap is not None:
            z_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            z_NV.div_(self.temperature)
        return z_NV

    def derivative(self, logits_NV: Tensor) -> Tensor | float:
        """D logits / d z, from the logits themselves."""
        scale = self.scale / self.temperature
        if self.softcap is None:
            return scale
        return (1.0 - (logits_NV * (self.temperature / self.softcap)).square_()).mul_(scale)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        logit_map: LogitTransform,
        tile: TileSize,
    ) -> Tensor:
        head_moves = weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad)
        keep_direction = h_NH.requires_grad and not head_moves
        compute = compute_dtype(h_NH, weight_VH)
        exact = torch.promote_types(compute, torch.float32)
        lse_N = torch.empty(len(h_NH), dtype=exact, device=h_NH.device)
        logprob_N = torch.empty_like(lse_N)
        direction_NH = torch.empty_like(h_NH) if keep_direction else None
        with torch.autocast(h_NH.device.type, enabled=False):
            head = _Head(weight_VH, bias_V, logit_map, compute, tile.columns)
            for rows in _slices(len(h_NH), tile.entries):
                found = head.scan(h_NH[rows], target_N[rows], exact, direction=keep_direction)
                lse_N[rows], logprob_N[rows] = found.lse_N, found.logit_N - found.lse_N
                if direction_NH is not None and found.direction_NH is not None:
                    direction_NH[rows] = found.direction_NH
        ctx.logit_map, ctx.tile, ctx.compute = logit_map, tile, compute
        ctx.save_for_backward(h_NH if head_moves else None, weight_VH, bias_V, target_N, lse_N, direction_NH)
        return logprob_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        h_NH, weight_VH, bias_V, target_N, lse_N, direction_NH = ctx.saved_tensors
        if direction_NH is not None:
            return direction_NH * grad_N[:, None].to(direction_NH.dtype), None, None, None, None, None
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        if h_NH is None:
            return None, None, None, None, None, None
        grad_h = torch.zeros_like(h_NH) if need_h else None
        grad_w = torch.zeros_like(weight_VH) if need_w else None
        grad_b = torch.zeros_like(bias_V) if need_b else None
        head = _Head(weight_VH, bias_V, ctx.logit_map, ctx.compute, ctx.tile.columns)
        for rows in _slices(len(h_NH), ctx.tile.entries):
            h, grad, target = h_NH[rows].to(ctx.compute), grad_N[rows, None], target_N[rows]
            for columns, weight, logits in head.tiles(h, lse_N.dtype):
                slope = ctx.logit_map.derivative(logits)
                d_z = logits.sub_(lse_N[rows, None]).exp_().neg_()
                inside, at = _targets_in_columns(target, columns)
                d_z.scatter_add_(1, at[:, None], inside[:, None].to(d_z.dtype))
                d_z = d_z.mul_(slope).mul_(grad).to(ctx.compute)
                if grad_h is not None:
                    grad_h[rows] += matmul(d_z, weight)
                if grad_w is not None:
                    grad_w[columns] += matmul(d_z.T, h)
                if grad_b is not None:
                    grad_b[columns] += d_z.sum(0)
        return grad_h, grad_w, grad_b, None, None, None


class _VocabularyScan(NamedTuple):
    lse_N: Tensor
    logit_N: Tensor
    direction_NH: Tensor | None


@dataclass(frozen=True, slots=True)
class _Head:
    weight_VH: Tensor
    bias_V: Tensor | None
    logit_map: LogitTransform
    compute: torch.dtype
    columns: int

    def tiles(self, h_NH: Tensor, exact: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Columns, their rows of W in the compute type, their logits [N, C] in the exact one, to be overwritten."""
        for columns in _slices(len(self.weight_VH), self.columns):
            weight = self.weight_VH[columns].to(self.compute)
            bias = None if self.bias_V is None else self.bias_V[columns].to(self.compute)
            yield columns, weight, self.logit_map.apply_(linear(h_NH, weight, bias).to(exact))

    def scan(self, h_NH: Tensor, target_N: Tensor, exact: torch.dtype, *, direction: bool) -> _VocabularyScan:
        """One pass over the vocabulary: log-sum-exp, the targets' logits and, if asked for, the direction."""
        n = len(h_NH)
        top = torch.full((n, 1), -torch.inf, dtype=exact, device=h_NH.device)
        total, logit = torch.zeros_like(top), torch.zeros_like(top)
        mean = torch.zeros(n, h_NH.shape[1], dtype=exact, device=h_NH.device) if direction else None
        for columns, weight, logits in self.tiles(h_NH.to(self.compute), exact):
            inside, at = _targets_in_columns(target_N, columns)
            logit = torch.where(inside[:, None], logits.gather(1, at[:, None]), logit)
            slope = self.logit_map.derivative(logits)
            higher = torch.maximum(top, logits.amax(1, keepdim=True))
            shrink = (top - higher).exp_()
            top = higher
            odds = logits.sub_(top).exp_()
            total.mul_(shrink).add_(odds.sum(1, keepdim=True))
            if mean is not None:
                mean.mul_(shrink)
                odds = odds.mul_(slope).to(self.compute)
                mean.add_(matmul(odds, weight))
        if mean is not None:
            slope = self.logit_map.derivative(logit)
            mean = (self.weight_VH[target_N].to(exact) * slope).sub_(mean.div_(total)).to(h_NH.dtype)
        return _VocabularyScan((top + total.log())[:, 0], logit[:, 0], mean)


def compute_dtype(h: Tensor, weight: Tensor) -> torch.dtype:
    """That of autocast where it is on; else the wider of the two, so a bfloat16 head is widened tile by tile."""
    device = h.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(h.dtype, weight.dtype)


def _targets_in_columns(target_N: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which targets stand in these columns, and where; without asking the device."""
    inside = (target_N >= columns.start) & (target_N < columns.stop)
    return inside, (target_N - columns.start).clamp(0, columns.stop - columns.start - 1)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]


def effective_linear(module: nn.Module) -> nn.Module:
    """The linear layer that acts: peft wraps a head that is trained whole beside an adapter."""
    copies = getattr(module, "modules_to_save", None)
    if copies is None:
        return module
    if getattr(module, "disable_adapters", False):
        return module.original_module  # type: ignore[return-value]
    return copies[module.active_adapters[0]]  # type: ignore[index,no-any-return]


def token_logprobs(
    h_NH: Tensor, head: nn.Module, target_N: Tensor, logit_map: LogitTransform, tile: TileSize = TILE
) -> Tensor:
    """Log-probability in nats of each target, shape [N], float32 or wider.

    `head` is the model's output layer (weight [V, H], optional bias [V]); `h_NH` the hidden states that predict.
    A uniform head gives -log V.
    """
    linear = effective_linear(head)
    weight: Tensor = linear.weight  # type: ignore[assignment]
    result: Tensor = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        h_NH, weight, getattr(linear, "bias", None), target_N, logit_map, tile
    )
    return result
