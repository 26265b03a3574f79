"""Floating-point operations that a step cannot do without, by the kind of matrix product that does them.

With P the weights of a block's linears, L the layers, H the width, V the vocabulary, n tokens of which m are learned:

    forward          2 P L n + 2 P_lora n + 4 H L sum(s^2 / 2)
    input gradient   2 P L' n + 2 P_lora n + 8 H L' sum(s^2 / 2)
    weight gradient  2 P_lora n, or 2 P L n in full fine-tuning
    head             2 V H m forward and again backward, and 2 V H m for its weights in full fine-tuning

so 4 P L + 6 P_lora a token with a frozen base and 6 P L in full. Attention counts each document's own tokens under
its causal triangle, s^2 / 2. L' are the layers from the lowest trained one upwards: nothing below it needs a gradient.
Where the lower layers are frozen, their outputs are the same in every epoch, so only the first epoch counts them.

Not counted: embeddings, norms, activations, softmax, recomputation, the optimizer. Layer 0 needs no input gradient of
q, k and v; it is counted all the same (0.3 % of a step).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

from rung.planning.architecture import ModelShape

KINDS = (
    *("block_forward", "block_input_grad", "block_weight_grad"),
    *("head_forward", "head_input_grad", "head_weight_grad"),
)
Flops = dict[str, float]


@dataclass(frozen=True)
class Document:
    """One row as tokens; `supervised` says which are learned."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


@dataclass(frozen=True)
class Trained:
    """What moves: everything (`rank` none), or adapters in the layers from `lowest` upwards."""

    rank: int | None
    lowest: int = 0


def step_flops(
    documents: Sequence[Document],
    shape: ModelShape,
    trained: Trained,
    *,
    first_epoch: bool = True,
    shared: bool = False,
) -> Flops:
    """Operations of one step, by kind. `shared` counts tokens that rows begin with in common once."""
    n, m, pairs = _counts(documents, shared)
    upper = shape.layers - trained.lowest
    computed = shape.layers if first_epoch else upper
    block = sum(matrix.inputs * matrix.outputs for matrix in shape.matrices)
    lora = 0
    if trained.rank is not None:
        lora = upper * trained.rank * sum(matrix.inputs + matrix.outputs for matrix in shape.matrices)
    head = 2.0 * shape.vocabulary * shape.width * m
    attention = 4.0 * shape.query * pairs
    full = trained.rank is None
    return {
        "block_forward": 2.0 * n * (block * computed + lora) + attention * computed,
        "block_input_grad": 2.0 * n * (block * upper + lora) + 2 * attention * upper,
        "block_weight_grad": 2.0 * n * (block * shape.layers if full else lora),
        "head_forward": head,
        "head_input_grad": head,
        "head_weight_grad": head if full else 0.0,
    }


def add(parts: Sequence[Flops]) -> Flops:
    """Sums by kind."""
    return {kind: sum(part[kind] for part in parts) for kind in KINDS}


def seconds_at(flops: Flops, rates: Flops) -> float:
    """Time these operations would take if each kind ran at its measured rate and nothing else took time."""
    return sum(flops[kind] / rates[kind] for kind in KINDS)


def _counts(documents: Sequence[Document], shared: bool) -> tuple[int, int, float]:
    """Tokens, learned tokens, and query-key pairs; what a row shares with its neighbour in sorted order is not new."""
    tokens, learned, pairs = 0, 0, 0.0
    before: tuple[int, ...] = ()
    for document in sorted(documents, key=lambda d: d.ids):
        old = len(commonprefix([before, document.ids])) if shared else 0
        before = document.ids
        tokens += len(document.ids) - old
        learned += sum(document.supervised[old:])
        pairs += (len(document.ids) ** 2 - old**2) / 2
    return tokens, learned, pairs
