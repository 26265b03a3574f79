"""Parameters that a method trains and stores, and the activations it adds, by the formulas of its layers.

The same numbers could be counted on a loaded model (`Method.declared_parameters` does), but a plan has no model.
`tests/unit/test_planning.py` compares both. `planning/memory.py` and `planning/throughput.py` use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rung.config.base import LinearRole
from rung.config.layers import resolve_layers
from rung.config.method import (
    LOW_RANK_METHODS,
    SUBTRACTED_INITS,
    BottleneckConfig,
    LowRankConfig,
    MixtureConfig,
    PrefixConfig,
    PTuningConfig,
    QloraConfig,
    encoder_parameter_count,
)
from rung.planning.architecture import DTYPE_BYTES, LinearShape, ModelShape


@dataclass(frozen=True, slots=True)
class MethodCost:
    """What a method adds to a base."""

    trainable: int | None
    """Parameters that the optimizer updates; None for a peft tuner, whose size only peft knows."""
    frozen_parameters: int = 0
    """Frozen parameters besides the base: the half of an adapter that subtracts its initial update."""
    largest_tensor: int = 0
    """Size of the largest trainable tensor."""
    lowest_layer: int = 0
    """The lowest layer with a trainable parameter; layers below store nothing for the backward pass."""

    @property
    def stored_parameters(self) -> int:
        """Parameters in memory besides those of the base."""
        return (self.trainable or 0) + self.frozen_parameters


SOFTCAP_KINDS = frozenset({"gemma2"})
"""Models whose attention scores are capped."""


def method_cost(config: Any, shape: ModelShape) -> MethodCost:
    """Cost of a method's config for a model of this shape. Raises `ConfigError` for layers that do not exist."""
    formula = _BY_KIND.get(config.kind)
    return MethodCost(None) if formula is None else formula(config, shape)


def _full(config: Any, shape: ModelShape) -> MethodCost:
    # The embedding is taken as the largest tensor.
    return MethodCost(shape.parameters, largest_tensor=shape.embedding_parameters)


def _head(config: Any, shape: ModelShape) -> MethodCost:
    return MethodCost(_head_parameters(shape), largest_tensor=shape.embedding_parameters, lowest_layer=shape.layers)


def _head_parameters(shape: ModelShape) -> int:
    # Phi's head has a bias.
    return shape.embedding_parameters + (shape.vocabulary if shape.kind == "phi" else 0)


def _low_rank(config: LowRankConfig, shape: ModelShape) -> MethodCost:
    layers, linears = resolve_layers(config.layers, range(shape.layers)), targeted_linears(config.targets, shape)
    ranked_linears = [(rank_at(config, layer, m.roles), m) for layer in layers for m in linears]
    adapter = sum(rank * (m.inputs + m.outputs) + (m.outputs if config.dora else 0) for rank, m in ranked_linears)
    largest = max((rank * max(m.inputs, m.outputs) for rank, m in ranked_linears), default=0)
    sizes = {"lm_head": _head_parameters(shape), **dict.fromkeys(("embed_tokens", "wte"), shape.embedding_parameters)}
    full_modules = sum(sizes.get(name, 0) for name in config.modules_to_save)
    full_matrix = shape.embedding_parameters if full_modules else 0
    # A nonzero start is stored twice (decision 0013).
    frozen_parameters = adapter if config.init in SUBTRACTED_INITS else 0
    # embeddings precede all layers
    lowest = 0 if {"embed_tokens", "wte"} & set(config.modules_to_save) else min(layers)
    return MethodCost(adapter + full_modules, frozen_parameters, max(largest, full_matrix), lowest)


def _mixture(config: MixtureConfig, shape: ModelShape) -> MethodCost:
    layers, linears = resolve_layers(config.layers, range(shape.layers)), targeted_linears(config.targets, shape)
    per_layer = sum(config.experts * (config.rank * (m.inputs + m.outputs) + m.inputs) for m in linears)
    widest = max((max(m.inputs, m.outputs) for m in linears), default=0)
    return MethodCost(len(layers) * per_layer, 0, config.experts * config.rank * widest, min(layers))


def _bottleneck(config: Any, shape: ModelShape) -> MethodCost:
    layers = resolve_layers(config.layers, range(shape.layers))
    per_adapter = 2 * shape.width * config.width + config.width + shape.width
    parameters = len(layers) * (2 if config.placement == "houlsby" else 1) * per_adapter
    return MethodCost(parameters, 0, shape.width * config.width, min(layers))


def _virtual(config: Any, shape: ModelShape) -> MethodCost:
    every_layer = isinstance(config, PrefixConfig) or (isinstance(config, PTuningConfig) and config.layers == "all")
    width = 2 * shape.layers * shape.kv if every_layer else shape.width
    encoder = encoder_parameter_count(config, shape.width, width)
    rows_per_task = config.virtual_tokens * (shape.width if encoder else width)
    return MethodCost(max(1, len(config.tasks)) * rows_per_task + encoder, 0, max(rows_per_task, encoder))


def targeted_linears(targets: tuple[Any, ...], shape: ModelShape) -> list[LinearShape]:
    """The linears of a layer that a method targets."""
    return [m for m in shape.matrices if set(m.roles) & set(targets)]


def rank_at(config: LowRankConfig, layer: int | None, roles: Sequence[LinearRole]) -> int:
    """The most specific entry of `rank_pattern`: layer and role, then layer, then role (the first if several)."""
    keys = [*(f"{layer}.{role}" for role in roles), str(layer), *roles]
    return next((config.rank_pattern[key] for key in keys if key in config.rank_pattern), config.rank)


_BY_KIND: dict[str, Any] = {
    **{"full": _full, "head": _head, "mixture": _mixture, "bottleneck": _bottleneck},
    **dict.fromkeys(LOW_RANK_METHODS, _low_rank),
    **dict.fromkeys(("prompt", "prefix", "p_tuning"), _virtual),
}


def layer_bytes_per_token(shape: ModelShape, compute: str = "float32", device: str = "cpu") -> int:
    """Bytes a token that one layer of the base stores for the backward pass."""
    # Inputs of norms, attention with its output, gate and up: what the fused functions store.
    numbers = 2 * (shape.width + shape.query + shape.kv + shape.mlp)
    if device != "cpu" and not has_row_kernel(shape, compute):
        # a launch a segment: keys and values are stored repeated for all heads, and the output before it is joined
        numbers += 2 * (shape.query - shape.kv) + shape.query
    return numbers * DTYPE_BYTES[compute]


def has_row_kernel(shape: ModelShape, compute: str) -> bool:
    """Whether a card computes the attention of a whole row in one call.

    `models.varlen_attention` does there, and `models.flex_tree_attention` where scores are capped: with wide heads on
    some cards alone, which the plan does not count on. bfloat16 is computed from Ampere on, as the kernels are.
    """
    widest = 128 if shape.kind in SOFTCAP_KINDS else 256
    return compute == "bfloat16" and shape.head_width in range(8, widest + 1, 8)


def activation_bytes_per_token(
    shape: ModelShape, compute: str = "float32", *, lowest: int = 0, device: str = "cpu"
) -> int:
    """Bytes a token of all layers from `lowest` on; layers below the lowest trainable one store nothing."""
    return (shape.layers - lowest) * layer_bytes_per_token(shape, compute, device)


def method_bytes_per_token(config: Any, shape: ModelShape, compute: str = "float32") -> int:
    """Further bytes a token that a method's layers store."""
    if not isinstance(config, LowRankConfig | MixtureConfig | BottleneckConfig):
        return 0
    layers = resolve_layers(config.layers, range(shape.layers))
    if isinstance(config, LowRankConfig):
        numbers = sum(_low_rank_activations(config, shape, layer) for layer in layers)
    elif isinstance(config, MixtureConfig):
        numbers = len(layers) * _mixture_activations(config, shape)
    else:  # its middle before and behind the activation, and its input unless a norm made it
        per_adapter = 2 * config.width + (0 if config.placement == "parallel" else shape.width)
        numbers = len(layers) * per_adapter * (2 if config.placement == "houlsby" else 1)
    return numbers * DTYPE_BYTES[compute]


def _low_rank_activations(config: LowRankConfig, shape: ModelShape, layer: int) -> int:
    """Products with A. For each linear, dropout stores its mask and its output, DoRA stores two outputs.

    With DoRA the last linear of a block has its own forward and stores its input; 8 bits store every input
    (bitsandbytes).
    """
    linears = targeted_linears(config.targets, shape)
    low = sum(rank_at(config, layer, m.roles) for m in linears) * (2 if config.init in SUBTRACTED_INITS else 1)
    bits = config.bits if isinstance(config, QloraConfig) else 32
    dropout = 2 * sum(m.inputs for m in linears) if config.dropout else 0
    dora = 2 * sum(m.outputs for m in linears) if config.dora else 0
    if bits == 8:
        return low + dropout + dora + 2 * shape.width + shape.mlp
    # peft's own forward keeps the input of the last linear, which the fused function makes again
    keeps_down_input = dora and not dropout and any("down" in m.roles for m in linears)
    return low + dropout + dora + (shape.mlp if keeps_down_input else 0)


def _mixture_activations(config: MixtureConfig, shape: ModelShape) -> int:
    """Inputs of every linear, and the low-rank outputs of each expert before and after its router weight."""
    linears = targeted_linears(config.targets, shape)
    roles = {role for matrix in linears for role in matrix.roles}
    # q, k and v read one tensor, gate and up another; each is stored once.
    shared_inputs = sum(shape.width for group in ({"q", "k", "v"}, {"gate", "up"}) if group & roles)
    hidden = shape.mlp if "down" in roles else 0
    return shared_inputs + hidden + len(linears) * config.experts * (2 * config.rank + 1)
