"""Log-probabilities of chosen tokens without storing the logits of a row.

The gradient of log p(y | h) with respect to h is

    u = s * (W[y] - sum_v p_v W[v])            (softmax cross-entropy; s is the logit scale)

which is attention with W as keys and as values. So it is computed as in flash attention (Dao et al. 2022, algorithm 1):
over tiles of the vocabulary, with a running maximum and a running sum; each tile of logits is overwritten in place and
used for both products while it is in the processor's cache. On a card with Triton a tile is a few entries of the whole
vocabulary, and one kernel stands between its two products (`models/logprob_kernel.py`). With a frozen head u is stored
as N vectors and the backward pass is a row-wise product. With a trainable head the backward pass computes the tiles
again, because the gradient of W needs the incoming gradient of each entry. `models/policy.py` calls `token_logprobs`.

Suffixes: N entries of the loss index, V vocabulary, C vocabulary entries of a tile, H width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from rung.models.matmul import linear, matmul, product_dtype, wide_zeros


class TileSize(NamedTuple):
    """Number of entries and of vocabulary rows in one tile."""

    entries: int
    columns: int


TILE = TileSize(512, 2048)
"""4 MB of float32 logits: they fit a processor's cache, and products of this size run at full rate (docs/log.md)."""
CARD_TILE = TileSize(2048, 16_384)
"""A tile costs 23 kernel launches, whatever its size: 16,384 learned tokens and a vocabulary of 128,000 would be 46,000
launches in tiles for a processor, and are 1,500 in these, for 134 MB of float32 logits (counted, not measured)."""
KERNEL_TILE_BYTES = 3 * 4 * CARD_TILE.entries * CARD_TILE.columns
"""Bytes of logits in a tile of the kernel: what the plan counts for `CARD_TILE`, whose logits exist three times. 1,536
entries with a vocabulary of 128,000 in bfloat16."""


def tile_of(device: torch.device) -> TileSize:
    """The tile for a device."""
    return TILE if device.type == "cpu" else CARD_TILE


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """Map from head products z to logits: softcap * tanh(scale * z / softcap) / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    """Sampling temperature; log-probabilities are those of the distribution that tokens are drawn from."""

    @staticmethod
    def of(config: Any) -> LogitTransform:
        """Read the map from a transformers config (Cohere multiplies, Granite divides, Gemma 2 caps)."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))

    def apply_(self, z_NV: Tensor) -> Tensor:
        """Apply the map in place; return the argument."""
        if self.scale != 1.0:
            z_NV.mul_(self.scale)
        if self.softcap is not None:
            z_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            z_NV.div_(self.temperature)
        return z_NV

    def derivative(self, logits_NV: Tensor) -> Tensor | float:
        """The derivative d logits / d z, computed from the logits."""
        scale = self.scale / self.temperature
        if self.softcap is None:
            return scale
        return (1.0 - (logits_NV * (self.temperature / self.softcap)).square_()).mul_(scale)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logit_map: LogitTransform, tile: TileSize | None, target_N: Tensor, *tensors: Any) -> Tensor:
        h_NH, weight_VH, bias_V = tensors
        head_trainable = weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad)
        # Without a gradient of the hidden states (evaluation) no direction is needed.
        keep_direction = h_NH.requires_grad and not head_trainable
        dtype = product_dtype(h_NH, weight_VH)
        wide_dtype = torch.promote_types(dtype, torch.float32)
        lse_N = torch.empty(len(h_NH), dtype=wide_dtype, device=h_NH.device)
        logprob_N = torch.empty_like(lse_N)
        direction_NH = torch.empty_like(h_NH) if keep_direction else None
        # Autocast would convert each tile again; the product dtype is chosen once.
        with torch.autocast(h_NH.device.type, enabled=False):
            head = _head_of(weight_VH, bias_V, logit_map, dtype, tile)
            for rows in _slices(len(h_NH), head.entries):
                hidden = h_NH[rows].to(dtype)
                lse, logit, direction = head.scan(hidden, target_N[rows], wide_dtype, direction=keep_direction)
                lse_N[rows], logprob_N[rows] = lse, logit - lse
                if direction_NH is not None and direction is not None:
                    direction_NH[rows] = direction.to(h_NH.dtype)
        ctx.logit_map, ctx.tile, ctx.product_dtype = logit_map, tile, dtype
        # With a frozen head the direction replaces the hidden states.
        ctx.save_for_backward(h_NH if head_trainable else None, weight_VH, bias_V, target_N, lse_N, direction_NH)
        return logprob_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        h_NH, weight_VH, bias_V, target_N, lse_N, direction_NH = ctx.saved_tensors
        if direction_NH is not None:
            return None, None, None, direction_NH * grad_N[:, None].to(direction_NH.dtype), None, None
        if h_NH is None:
            return (None,) * 6
        need_h, need_w, need_b = ctx.needs_input_grad[3:]
        grad_h = torch.empty_like(h_NH) if need_h else None
        # Sums over tiles are float32: in bfloat16 75 tiles of a vocabulary would lose more than their products.
        sums = _HeadGradients(*(wide_zeros(p) if need else None for p, need in ((weight_VH, need_w), (bias_V, need_b))))
        head = _head_of(weight_VH, bias_V, ctx.logit_map, ctx.product_dtype, ctx.tile)
        for rows in _slices(len(h_NH), head.entries):
            hidden = h_NH[rows].to(ctx.product_dtype)
            d_hidden = head.backward(hidden, target_N[rows], lse_N[rows], grad_N[rows], sums, need_h=need_h)
            if grad_h is not None and d_hidden is not None:
                grad_h[rows] = d_hidden.to(grad_h.dtype)
        grad_w, grad_b = (g if g is None else g.to(p.dtype) for g, p in zip(sums, (weight_VH, bias_V), strict=True))
        return None, None, None, grad_h, grad_w, grad_b


class _HeadGradients(NamedTuple):
    """Sums over tiles, float32 or wider; None where no gradient is needed."""

    weight_VH: Tensor | None
    bias_V: Tensor | None


class _Head(Protocol):
    """The passes over one tile of entries, for one kind of device."""

    @property
    def entries(self) -> int:
        """Entries of a tile."""

    def scan(
        self, h_NH: Tensor, target_N: Tensor, wide_dtype: torch.dtype, *, direction: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-sum-exp and the targets' logits [N], and the gradient of log p with respect to h if `direction`."""

    def backward(
        self, h_NH: Tensor, target_N: Tensor, lse_N: Tensor, grad_N: Tensor, sums: _HeadGradients, *, need_h: bool
    ) -> Tensor | None:
        """Add the gradients of weight and bias to `sums`; return that of the hidden states [N, H] if `need_h`."""


def _head_of(
    weight_VH: Tensor, bias_V: Tensor | None, logit_map: LogitTransform, dtype: torch.dtype, tile: TileSize | None
) -> _Head:
    """The head of a device; a given `tile` means small tiles on any device."""
    if tile is None and has_logprob_kernel(weight_VH.device, dtype):
        return _KernelHead(weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype), logit_map)
    return _TiledHead(weight_VH, bias_V, logit_map, dtype, tile or tile_of(weight_VH.device))


def has_logprob_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `models.logprob_kernel` runs: on a card with Triton; it computes in float32."""
    return device.type == "cuda" and dtype != torch.float64 and has_triton()


@dataclass(frozen=True, slots=True)
class _KernelHead:
    """A tile holds the whole vocabulary: product, one kernel, product."""

    weight_VH: Tensor
    bias_V: Tensor | None
    logit_map: LogitTransform

    @property
    def entries(self) -> int:
        tile_entries = KERNEL_TILE_BYTES // (len(self.weight_VH) * self.weight_VH.element_size())
        # a multiple of the tiles in which cards multiply
        return max(128, tile_entries // 128 * 128)

    def scan(
        self, h_NH: Tensor, target_N: Tensor, wide_dtype: torch.dtype, *, direction: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        z_NV, lse_N, logit_N = self._pass(h_NH, target_N, None, writes_gradient=direction)
        return lse_N, logit_N, matmul(z_NV, self.weight_VH) if direction else None

    def backward(
        self, h_NH: Tensor, target_N: Tensor, lse_N: Tensor, grad_N: Tensor, sums: _HeadGradients, *, need_h: bool
    ) -> Tensor | None:
        # the log-sum-exp again: the kernel reads the logits twice in any case
        d_z_NV, _, _ = self._pass(h_NH, target_N, grad_N, writes_gradient=True)
        if sums.bias_V is not None:
            sums.bias_V.add_(d_z_NV.sum(0, dtype=sums.bias_V.dtype))
        if sums.weight_VH is not None:
            # in blocks: the gradient of the whole head in 16 bits would be as large as the head
            for rows in _slices(len(self.weight_VH), CARD_TILE.columns):
                sums.weight_VH[rows].add_(matmul(d_z_NV[:, rows].T, h_NH))
        return matmul(d_z_NV, self.weight_VH) if need_h else None

    def _pass(
        self, h_NH: Tensor, target_N: Tensor, factor_N: Tensor | None, *, writes_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        # imported where it runs: other machines have no Triton
        from rung.models.logprob_kernel import log_softmax_gradient_

        z_NV = linear(h_NH, self.weight_VH, self.bias_V)
        options: dict[str, Any] = {"writes_gradient": writes_gradient, **asdict(self.logit_map)}
        lse_N, logit_N = log_softmax_gradient_(z_NV, target_N, factor_N=factor_N, **options)
        return z_NV, lse_N, logit_N


@dataclass(frozen=True, slots=True)
class _TiledHead:
    weight_VH: Tensor
    bias_V: Tensor | None
    logit_map: LogitTransform
    product_dtype: torch.dtype
    tile: TileSize

    @property
    def entries(self) -> int:
        return self.tile.entries

    def scan(
        self, h_NH: Tensor, target_N: Tensor, wide_dtype: torch.dtype, *, direction: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        n = len(h_NH)
        running_max = torch.full((n, 1), -torch.inf, dtype=wide_dtype, device=h_NH.device)
        exp_sum, logit = torch.zeros_like(running_max), torch.zeros_like(running_max)
        weighted_sum = torch.zeros(n, h_NH.shape[1], dtype=wide_dtype, device=h_NH.device) if direction else None
        for columns, weight, logits in self._tiles(h_NH, wide_dtype):
            in_tile, index = _targets_in_columns(target_N, columns)
            # Read before the tile is overwritten below.
            logit = torch.where(in_tile[:, None], logits.gather(1, index[:, None]), logit)
            slope = self.logit_map.derivative(logits)
            new_max = torch.maximum(running_max, logits.amax(1, keepdim=True))
            # Sums so far were relative to the previous maximum (online softmax).
            rescale = (running_max - new_max).exp_()
            running_max = new_max
            exp_logits = logits.sub_(running_max).exp_()
            exp_sum.mul_(rescale).add_(exp_logits.sum(1, keepdim=True))
            if weighted_sum is not None:
                weighted_sum.mul_(rescale)
                exp_logits = exp_logits.mul_(slope).to(self.product_dtype)
                weighted_sum.add_(matmul(exp_logits, weight))
        if weighted_sum is not None:
            slope = self.logit_map.derivative(logit)
            expected_NH = weighted_sum.div_(exp_sum)
            weighted_sum = (self.weight_VH[target_N].to(wide_dtype) * slope).sub_(expected_NH)
        return (running_max + exp_sum.log())[:, 0], logit[:, 0], weighted_sum

    def backward(
        self, h_NH: Tensor, target_N: Tensor, lse_N: Tensor, grad_N: Tensor, sums: _HeadGradients, *, need_h: bool
    ) -> Tensor | None:
        d_hidden = wide_zeros(h_NH) if need_h else None
        for columns, weight, logits in self._tiles(h_NH, lse_N.dtype):
            slope = self.logit_map.derivative(logits)
            # -softmax, plus 1 at the target: the gradient of log p with respect to the logits.
            d_z = logits.sub_(lse_N[:, None]).exp_().neg_()
            in_tile, index = _targets_in_columns(target_N, columns)
            d_z.scatter_add_(1, index[:, None], in_tile[:, None].to(d_z.dtype))
            d_z = d_z.mul_(slope).mul_(grad_N[:, None])
            if sums.bias_V is not None:
                sums.bias_V[columns] += d_z.sum(0)
            d_z = d_z.to(self.product_dtype)
            if d_hidden is not None:
                d_hidden += matmul(d_z, weight)
            if sums.weight_VH is not None:
                sums.weight_VH[columns] += matmul(d_z.T, h_NH)
        return d_hidden

    def _tiles(self, h_NH: Tensor, wide_dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield columns, their rows of W in the product dtype, and logits [N, C] that may be overwritten."""
        for columns in _slices(len(self.weight_VH), self.tile.columns):
            weight = self.weight_VH[columns].to(self.product_dtype)
            bias = None if self.bias_V is None else self.bias_V[columns].to(self.product_dtype)
            yield columns, weight, self.logit_map.apply_(linear(h_NH, weight, bias).to(wide_dtype))


def _targets_in_columns(target_N: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """A mask of the targets in these columns, and their clamped index; no synchronization with the device."""
    in_tile = (target_N >= columns.start) & (target_N < columns.stop)
    return in_tile, (target_N - columns.start).clamp(0, columns.stop - columns.start - 1)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def head_tensors(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in use: peft wraps a head that is fully trained beside an adapter (`modules_to_save`)."""
    layer: Any = head
    if (copies := getattr(layer, "modules_to_save", None)) is not None:
        is_off = getattr(layer, "disable_adapters", False)
        layer = layer.original_module if is_off else copies[layer.active_adapters[0]]
    return layer.weight, getattr(layer, "bias", None)


def token_logprobs(
    h_NH: Tensor, head: nn.Module, target_N: Tensor, logit_map: LogitTransform, tile: TileSize | None = None
) -> Tensor:
    """Log-probability in nats of each target, shape [N], float32 or wider.

    `head` is the model's output layer (weight [V, H], optional bias [V]); `h_NH` the hidden states that predict.
    A uniform head gives -log V. `tile` is that of the device unless given.
    """
    return _TokenLogprobs.apply(logit_map, tile, target_N, h_NH, *head_tensors(head))  # type: ignore[no-any-return, no-untyped-call]
