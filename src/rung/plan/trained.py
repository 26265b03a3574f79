"""How many numbers a method moves, and holds beside the base, by the formulas of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rung.plan.shape import Matrix, Shape
from rung.spec.layers import layers_named
from rung.spec.method import SUBTRACTED, LowRankSpec, MixtureSpec, PrefixSpec, encoder_parameters


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
