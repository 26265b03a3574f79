"""What a layer keeps of each token for the backward pass: that of the base, and what a method's own code adds.

Fused (`rung.model.fused`), a layer of the base keeps

    2 H + 2 H_q + 2 H_kv + 2 H_mlp          numbers a token

the inputs of two norms, queries and attention's output, keys and values, both branches of a gated feed-forward block.
What a method adds follows from what it computes through its library's own forward (tested against what autograd holds).
"""

from __future__ import annotations

from typing import Any

from rung.plan.shape import Shape
from rung.plan.trained import aimed_at
from rung.spec.method import SUBTRACTED, LowRankSpec, MixtureSpec


def layer_bytes_per_token(shape: Shape, compute: str = "float32", *, beside: int = 0) -> int:
    """What one layer keeps; `beside` is what a method adds, in numbers."""
    return (2 * (shape.width + shape.query + shape.kv + shape.mlp) + beside) * (2 if compute == "bfloat16" else 4)


def activation_bytes_per_token(shape: Shape, compute: str = "float32", *, lowest: int = 0, beside: int = 0) -> int:
    """The same of all layers from `lowest` on: those below a method's lowest keep nothing."""
    return (shape.layers - lowest) * layer_bytes_per_token(shape, compute, beside=beside)


def numbers_beside(spec: Any, shape: Shape) -> int:
    """Numbers a token that `spec`, a method's, makes a layer keep besides."""
    if isinstance(spec, LowRankSpec):
        return _low_rank(spec, shape)
    if isinstance(spec, MixtureSpec):
        return _mixture(spec, shape)
    if spec.kind == "bottleneck":  # its middle before and behind the activation, and its input unless a norm made it
        own = 2 * spec.width + (0 if spec.placement == "parallel" else shape.width)
        return int(own * (2 if spec.placement == "houlsby" else 1))
    return 0


def _low_rank(spec: LowRankSpec, shape: Shape) -> int:
    """The products with A. Dropout keeps its mask and what it let through, DoRA two outputs, each linear its own.

    Their last linear computes by itself and keeps what enters it, as one in few bits does; 8 keep every input.
    """
    aimed = aimed_at(spec.targets, shape)
    low = spec.rank * len(aimed) * (2 if spec.init in SUBTRACTED else 1)
    quantised = spec.kind == "qlora"
    dropped = 2 * sum(m.inputs for m in aimed) if spec.dropout else 0
    scaled = 2 * sum(m.outputs for m in aimed) if spec.dora else 0
    apart = (quantised or scaled) and not dropped and any("down" in m.roles for m in aimed)
    inputs = 2 * shape.width if quantised and getattr(spec, "bits", 4) == 8 else 0
    return low + dropped + scaled + inputs + (shape.mlp if apart else 0)


def _mixture(spec: MixtureSpec, shape: Shape) -> int:
    """Inputs of every linear, and what each expert makes of them, before and behind its weight."""
    aimed = aimed_at(spec.targets, shape)
    hidden = shape.mlp if any("down" in m.roles for m in aimed) else 0
    return 2 * shape.width + hidden + len(aimed) * spec.experts * (2 * spec.rank + 1)
