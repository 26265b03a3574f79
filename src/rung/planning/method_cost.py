"""How many numbers a method moves, and holds beside the base, by the formulas of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rung.config.layers import layers_named
from rung.config.method import SUBTRACTED, LowRankSpec, MixtureSpec, PrefixSpec, encoder_parameters
from rung.planning.architecture import BYTES, Matrix, Shape


@dataclass(frozen=True, slots=True)
class Trained:
    """What a method adds to a base."""

    moving: int | None
    """Numbers that an optimiser steps; None for a tuner of peft's, which alone knows."""
    frozen: int = 0
    """Numbers beside the base that stand still: the half of an adapter that takes its start off again."""
    saved: int = 0
    """Numbers that the published folder holds."""
    largest: int = 0
    """Numbers in the largest tensor that moves."""
    lowest: int = 0
    """The lowest layer that anything moves in; those below keep nothing for the backward pass."""


def trained(spec: Any, shape: Shape) -> Trained:
    """What `spec`, a method's, moves in a model of this shape. Raises `ConfigError` for layers that are not there."""
    made = _BY_KIND.get(spec.kind)
    return Trained(None) if made is None else made(spec, shape)


def _full(spec: Any, shape: Shape) -> Trained:
    return Trained(shape.parameters, saved=shape.parameters, largest=shape.embedding)


def _head(spec: Any, shape: Shape) -> Trained:
    own = shape.embedding + (shape.vocabulary if shape.kind == "phi" else 0)
    whole = shape.parameters + (shape.embedding if shape.tied else 0)  # untied first
    return Trained(own, saved=whole, largest=shape.embedding, lowest=shape.layers)


def _low_rank(spec: LowRankSpec, shape: Shape) -> Trained:
    chosen = layers_named(spec.layers, range(shape.layers))
    numbers = largest = 0
    for layer in chosen:
        for matrix in aimed_at(spec.targets, shape):
            rank = rank_of(spec, layer, matrix)
            numbers += rank * (matrix.inputs + matrix.outputs) + (matrix.outputs if spec.dora else 0)
            largest = max(largest, rank * max(matrix.inputs, matrix.outputs))
    whole = shape.embedding * sum(name in ("lm_head", "embed_tokens", "wte") for name in spec.modules_to_save)
    halves = 2 if spec.init in SUBTRACTED else 1
    moving = numbers + whole
    return Trained(moving, numbers * (halves - 1), numbers * halves + whole, max(largest, whole), min(chosen))


def _mixture(spec: MixtureSpec, shape: Shape) -> Trained:
    chosen = layers_named(spec.layers, range(shape.layers))
    own = aimed_at(spec.targets, shape)
    each = sum(spec.experts * (spec.rank * (m.inputs + m.outputs) + m.inputs) for m in own)
    widest = max((max(m.inputs, m.outputs) for m in own), default=0)
    return Trained(len(chosen) * each, 0, len(chosen) * each, spec.experts * spec.rank * widest, min(chosen))


def _bottleneck(spec: Any, shape: Shape) -> Trained:
    chosen = layers_named(spec.layers, range(shape.layers))
    each = 2 * shape.width * spec.width + spec.width + shape.width
    numbers = len(chosen) * (2 if spec.placement == "houlsby" else 1) * each
    return Trained(numbers, 0, numbers, shape.width * spec.width, min(chosen))


def _virtual(spec: Any, shape: Shape) -> Trained:
    tasks, tokens = max(1, len(spec.tasks)), spec.virtual_tokens
    every_layer = isinstance(spec, PrefixSpec) or getattr(spec, "layers", None) == "all"
    width = 2 * shape.layers * shape.kv if every_layer else shape.width
    encoder = encoder_parameters(spec, shape.width, width)
    rows = tasks * tokens * (shape.width if encoder else width)
    return Trained(rows + encoder, 0, tasks * tokens * width, max(rows // tasks, encoder))


def aimed_at(targets: tuple[Any, ...], shape: Shape) -> list[Matrix]:
    """The linears of a layer that a method goes to."""
    return [m for m in shape.matrices if set(m.roles) & set(targets)]


def rank_of(spec: LowRankSpec, layer: int, matrix: Matrix) -> int:
    """The most specific entry of `ranks`: layer and role, then layer, then role."""
    keys = [*(f"{layer}.{role}" for role in matrix.roles), str(layer), *matrix.roles]
    return next((spec.ranks[key] for key in keys if key in spec.ranks), spec.rank)


_BY_KIND: dict[str, Any] = {
    "full": _full,
    "head": _head,
    **dict.fromkeys(("lora", "qlora", "lottery"), _low_rank),
    "mixture": _mixture,
    "bottleneck": _bottleneck,
    **dict.fromkeys(("prompt", "prefix", "p_tuning"), _virtual),
}


def layer_bytes_per_token(shape: Shape, compute: str = "float32") -> int:
    """What one layer of the base keeps."""
    return 2 * (shape.width + shape.query + shape.kv + shape.mlp) * BYTES[compute]


def activation_bytes_per_token(shape: Shape, compute: str = "float32", *, lowest: int = 0) -> int:
    """The same of all layers from `lowest` on: those below a method's lowest keep nothing."""
    return (shape.layers - lowest) * layer_bytes_per_token(shape, compute)


def method_bytes_per_token(spec: Any, shape: Shape, compute: str = "float32") -> int:
    """What `spec`, a method's, makes its layers keep besides."""
    if not hasattr(spec, "targets") and spec.kind != "bottleneck":
        return 0
    chosen = layers_named(spec.layers, range(shape.layers))
    return sum(numbers_beside(spec, shape, layer) for layer in chosen) * BYTES[compute]


def numbers_beside(spec: Any, shape: Shape, layer: int) -> int:
    """Numbers a token that a method makes one of its layers keep besides."""
    if isinstance(spec, LowRankSpec):
        return _low_rank_activations(spec, shape, layer)
    if isinstance(spec, MixtureSpec):
        return _mixture_activations(spec, shape)
    if spec.kind == "bottleneck":  # its middle before and behind the activation, and its input unless a norm made it
        own = 2 * spec.width + (0 if spec.placement == "parallel" else shape.width)
        return int(own * (2 if spec.placement == "houlsby" else 1))
    return 0


def _low_rank_activations(spec: LowRankSpec, shape: Shape, layer: int) -> int:
    """The products with A. Dropout keeps its mask and what it let through, DoRA two outputs, each linear its own.

    Their last linear computes by itself and keeps what enters it, as an adapted one in 4 bits does; 8 bits keep every
    input (bitsandbytes).
    """
    aimed = aimed_at(spec.targets, shape)
    low = sum(rank_of(spec, layer, matrix) for matrix in aimed) * (2 if spec.init in SUBTRACTED else 1)
    bits = getattr(spec, "bits", 4) if spec.kind == "qlora" else 32
    dropped = 2 * sum(m.inputs for m in aimed) if spec.dropout else 0
    scaled = 2 * sum(m.outputs for m in aimed) if spec.dora else 0
    if bits == 8:
        return low + dropped + scaled + 2 * shape.width + shape.mlp
    apart = (bits == 4 or scaled) and not dropped and any("down" in m.roles for m in aimed)
    return low + dropped + scaled + (shape.mlp if apart else 0)


def _mixture_activations(spec: MixtureSpec, shape: Shape) -> int:
    """Inputs of every linear, and what each expert makes of them, before and behind its weight."""
    aimed = aimed_at(spec.targets, shape)
    roles = {role for matrix in aimed for role in matrix.roles}
    normed = sum(shape.width for own in ({"q", "k", "v"}, {"gate", "up"}) if own & roles)
    hidden = shape.mlp if "down" in roles else 0
    return normed + hidden + len(aimed) * spec.experts * (2 * spec.rank + 1)
