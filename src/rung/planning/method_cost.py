"""How many numbers a method moves, and holds beside the base, by the formulas of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rung.config.layers import resolve_layers
from rung.config.method import (
    SUBTRACTED_INITS,
    LowRankConfig,
    MixtureConfig,
    PrefixConfig,
    PTuningConfig,
    QloraConfig,
    encoder_parameter_count,
)
from rung.planning.architecture import BYTES, LinearShape, ModelShape


@dataclass(frozen=True, slots=True)
class MethodCost:
    """What a method adds to a base."""

    trainable: int | None
    """Numbers that an optimizer steps; None for a tuner of peft's, which alone knows."""
    frozen: int = 0
    """Numbers beside the base that stand still: the half of an adapter that takes its start off again."""
    saved: int = 0
    """Numbers that the published folder holds."""
    largest: int = 0
    """Numbers in the largest tensor that moves."""
    lowest: int = 0
    """The lowest layer that anything moves in; those below keep nothing for the backward pass."""


def method_cost(config: Any, shape: ModelShape) -> MethodCost:
    """What `config`, a method's, moves in a model of this shape. Raises `ConfigError` for layers that are not there."""
    made = _BY_KIND.get(config.kind)
    return MethodCost(None) if made is None else made(config, shape)


def _full(config: Any, shape: ModelShape) -> MethodCost:
    return MethodCost(shape.parameters, saved=shape.parameters, largest=shape.embedding)


def _head(config: Any, shape: ModelShape) -> MethodCost:
    own = shape.embedding + (shape.vocabulary if shape.kind == "phi" else 0)
    whole = shape.parameters + (shape.embedding if shape.tied else 0)  # untied first
    return MethodCost(own, saved=whole, largest=shape.embedding, lowest=shape.layers)


def _low_rank(config: LowRankConfig, shape: ModelShape) -> MethodCost:
    chosen = resolve_layers(config.layers, range(shape.layers))
    numbers = largest = 0
    for layer in chosen:
        for matrix in targeted_linears(config.targets, shape):
            rank = rank_at(config, layer, matrix)
            numbers += rank * (matrix.inputs + matrix.outputs) + (matrix.outputs if config.dora else 0)
            largest = max(largest, rank * max(matrix.inputs, matrix.outputs))
    whole = shape.embedding * sum(name in ("lm_head", "embed_tokens", "wte") for name in config.modules_to_save)
    halves = 2 if config.init in SUBTRACTED_INITS else 1
    moving = numbers + whole
    return MethodCost(moving, numbers * (halves - 1), numbers * halves + whole, max(largest, whole), min(chosen))


def _mixture(config: MixtureConfig, shape: ModelShape) -> MethodCost:
    chosen = resolve_layers(config.layers, range(shape.layers))
    own = targeted_linears(config.targets, shape)
    each = sum(config.experts * (config.rank * (m.inputs + m.outputs) + m.inputs) for m in own)
    widest = max((max(m.inputs, m.outputs) for m in own), default=0)
    return MethodCost(len(chosen) * each, 0, len(chosen) * each, config.experts * config.rank * widest, min(chosen))


def _bottleneck(config: Any, shape: ModelShape) -> MethodCost:
    chosen = resolve_layers(config.layers, range(shape.layers))
    each = 2 * shape.width * config.width + config.width + shape.width
    numbers = len(chosen) * (2 if config.placement == "houlsby" else 1) * each
    return MethodCost(numbers, 0, numbers, shape.width * config.width, min(chosen))


def _virtual(config: Any, shape: ModelShape) -> MethodCost:
    tasks, tokens = max(1, len(config.tasks)), config.virtual_tokens
    every_layer = isinstance(config, PrefixConfig) or (isinstance(config, PTuningConfig) and config.layers == "all")
    width = 2 * shape.layers * shape.kv if every_layer else shape.width
    encoder = encoder_parameter_count(config, shape.width, width)
    rows = tasks * tokens * (shape.width if encoder else width)
    return MethodCost(rows + encoder, 0, tasks * tokens * width, max(rows // tasks, encoder))


def targeted_linears(targets: tuple[Any, ...], shape: ModelShape) -> list[LinearShape]:
    """The linears of a layer that a method goes to."""
    return [m for m in shape.matrices if set(m.roles) & set(targets)]


def rank_at(config: LowRankConfig, layer: int, matrix: LinearShape) -> int:
    """The most specific entry of `ranks`: layer and role, then layer, then role."""
    keys = [*(f"{layer}.{role}" for role in matrix.roles), str(layer), *matrix.roles]
    return next((config.rank_pattern[key] for key in keys if key in config.rank_pattern), config.rank)


_BY_KIND: dict[str, Any] = {
    "full": _full,
    "head": _head,
    **dict.fromkeys(("lora", "qlora", "lottery"), _low_rank),
    "mixture": _mixture,
    "bottleneck": _bottleneck,
    **dict.fromkeys(("prompt", "prefix", "p_tuning"), _virtual),
}


def layer_bytes_per_token(shape: ModelShape, compute: str = "float32") -> int:
    """What one layer of the base keeps."""
    return 2 * (shape.width + shape.query + shape.kv + shape.mlp) * BYTES[compute]


def activation_bytes_per_token(shape: ModelShape, compute: str = "float32", *, lowest: int = 0) -> int:
    """The same of all layers from `lowest` on: those below a method's lowest keep nothing."""
    return (shape.layers - lowest) * layer_bytes_per_token(shape, compute)


def method_bytes_per_token(config: Any, shape: ModelShape, compute: str = "float32") -> int:
    """What `config`, a method's, makes its layers keep besides."""
    if not hasattr(config, "targets") and config.kind != "bottleneck":
        return 0
    chosen = resolve_layers(config.layers, range(shape.layers))
    return sum(extra_activations_per_token(config, shape, layer) for layer in chosen) * BYTES[compute]


def extra_activations_per_token(config: Any, shape: ModelShape, layer: int) -> int:
    """Numbers a token that a method makes one of its layers keep besides."""
    if isinstance(config, LowRankConfig):
        return _low_rank_activations(config, shape, layer)
    if isinstance(config, MixtureConfig):
        return _mixture_activations(config, shape)
    if config.kind == "bottleneck":  # its middle before and behind the activation, and its input unless a norm made it
        own = 2 * config.width + (0 if config.placement == "parallel" else shape.width)
        return int(own * (2 if config.placement == "houlsby" else 1))
    return 0


def _low_rank_activations(config: LowRankConfig, shape: ModelShape, layer: int) -> int:
    """The products with A. Dropout keeps its mask and what it let through, DoRA two outputs, each linear its own.

    Their last linear computes by itself and keeps what enters it, as an adapted one in 4 bits does; 8 bits keep every
    input (bitsandbytes).
    """
    aimed = targeted_linears(config.targets, shape)
    low = sum(rank_at(config, layer, matrix) for matrix in aimed) * (2 if config.init in SUBTRACTED_INITS else 1)
    bits = config.bits if isinstance(config, QloraConfig) else 32
    dropped = 2 * sum(m.inputs for m in aimed) if config.dropout else 0
    scaled = 2 * sum(m.outputs for m in aimed) if config.dora else 0
    if bits == 8:
        return low + dropped + scaled + 2 * shape.width + shape.mlp
    apart = (bits == 4 or scaled) and not dropped and any("down" in m.roles for m in aimed)
    return low + dropped + scaled + (shape.mlp if apart else 0)


def _mixture_activations(config: MixtureConfig, shape: ModelShape) -> int:
    """Inputs of every linear, and what each expert makes of them, before and behind its weight."""
    aimed = targeted_linears(config.targets, shape)
    roles = {role for matrix in aimed for role in matrix.roles}
    normed = sum(shape.width for own in ({"q", "k", "v"}, {"gate", "up"}) if own & roles)
    hidden = shape.mlp if "down" in roles else 0
    return normed + hidden + len(aimed) * config.experts * (2 * config.rank + 1)
