"""What a layer keeps of each token for the backward pass: that of the base, and what a method's own code adds.

Fused (`rung.model.fused`), a layer of the base keeps

    2 H + 2 H_q + 2 H_kv + 2 H_mlp          numbers a token

the inputs of two norms, queries and attention's output, keys and values, both branches of a gated feed-forward block.
What a method adds follows from what it computes through its library's own forward (tested against what autograd holds).
"""

from __future__ import annotations

from typing import Any

from rung.plan.shape import BYTES, Shape
from rung.plan.trained import aimed_at, rank_of
from rung.spec.layers import layers_named
from rung.spec.method import SUBTRACTED, LowRankSpec, MixtureSpec


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
        return _low_rank(spec, shape, layer)
    if isinstance(spec, MixtureSpec):
        return _mixture(spec, shape)
    if spec.kind == "bottleneck":  # its middle before and behind the activation, and its input unless a norm made it
        own = 2 * spec.width + (0 if spec.placement == "parallel" else shape.width)
        return int(own * (2 if spec.placement == "houlsby" else 1))
    return 0


def _low_rank(spec: LowRankSpec, shape: Shape, layer: int) -> int:
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


def _mixture(spec: MixtureSpec, shape: Shape) -> int:
    """Inputs of every linear, and what each expert makes of them, before and behind its weight."""
    aimed = aimed_at(spec.targets, shape)
    roles = {role for matrix in aimed for role in matrix.roles}
    normed = sum(shape.width for own in ({"q", "k", "v"}, {"gate", "up"}) if own & roles)
    hidden = shape.mlp if "down" in roles else 0
    return normed + hidden + len(aimed) * spec.experts * (2 * spec.rank + 1)
