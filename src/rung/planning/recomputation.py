"""What a document too long for memory does not keep: which layers compute again, and whose inputs leave the card.

A layer that is computed again in the backward pass (Chen et al. 2016) stores its input alone; where the inputs of all
layers are too much for a card, those of the lowest layers wait in the pinned memory of the host. Both cost time and
change no result: a second forward pass of those layers, and two copies of an input over the bus. The planner and the
trainer ask the same rule, so that a run does what its plan says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rung.config.run import RunConfig
from rung.planning.architecture import DTYPE_BYTES, ModelShape
from rung.planning.method_cost import has_row_kernel, layer_bytes_per_token, method_bytes_per_token, method_cost

CPU_DOCUMENT_BYTES = 4 * 2**30
"""Activation bytes of one document on a processor; one that needs more has its lowest trained layers recomputed."""
CUDA_FRAGMENTATION = 0.10
"""Share of a step's memory that torch's CUDA allocator cannot reuse: it keeps blocks of each size (assumed, not
measured)."""


UNFUSED_FACTOR = 3.4
"""Factor on stored activations with transformers' and peft's forward (`model.fused: false`) (measured)."""


class DocumentLimit(NamedTuple):
    """Memory that the activations of one document may take, and what its layers store beside those of the base."""

    bytes: int
    method_bytes: int = 0
    """Bytes a token that the method stores, summed over the trained layers."""
    factor: float = 1.0
    """`UNFUSED_FACTOR` without the fused functions, otherwise 1."""


def document_limit(config: RunConfig, shape: ModelShape, compute: str, size: int, device: str) -> DocumentLimit:
    """The limit of a run whose documents may take `size` bytes; a processor counts the layers of the base alone."""
    if device == "cpu":
        return DocumentLimit(size)
    factor = 1.0 if config.model.fused else UNFUSED_FACTOR
    return DocumentLimit(size, method_bytes_per_token(config.method, shape, compute), factor)


def document_bytes_that_fit(config: RunConfig, shape: ModelShape, compute: str, tokens: int) -> int:
    """Activation bytes of a document on a card where a micro-batch of `tokens` fits: a longer one recomputes layers."""
    trained_layers = shape.layers - min(method_cost(config.method, shape).lowest_layer, shape.layers)
    limit = document_limit(config, shape, compute, 0, "cuda")
    return tokens * trained_layers * stored_layer_bytes(shape, compute, "cuda", trained_layers, limit)


def stored_layer_bytes(shape: ModelShape, compute: str, device: str, trained_layers: int, limit: DocumentLimit) -> int:
    """Bytes a token that a trained layer stores unless it is computed again, with an equal share of the method's."""
    method_bytes = limit.method_bytes // max(1, trained_layers)
    return int((layer_bytes_per_token(shape, compute, device) + method_bytes) * limit.factor)


def scratch_bytes_per_token(shape: ModelShape, compute: str, device: str = "cpu") -> int:
    """Bytes a token of what one layer makes and forgets: its feed-forward block, or on a card its attention."""
    width = DTYPE_BYTES[compute]
    block = width * (4 * shape.mlp + 4 * shape.width)
    if device == "cpu" or not has_row_kernel(shape, compute):
        return block
    # flash attention's backward pass: gradients of output, queries, keys and values (these for all heads before they
    # are summed), and the sum of the queries' in float32 (Dao 2023)
    attention = width * (4 * shape.query + 2 * shape.kv) + 4 * shape.query
    return max(block, attention)


@dataclass(frozen=True)
class RecomputeRule:
    """Which layers a document computes again, and whose inputs leave the card, by the length of the document.

    Layers below `lowest` are frozen and store nothing. On a card `limit` is for the longest document that keeps
    everything (`document_bytes_that_fit`); a longer one leaves less for activations, because its head and temporaries
    are larger, and a layer that is computed again.
    """

    shape: ModelShape
    limit: DocumentLimit
    compute: str = "float32"
    device: str = "cpu"
    lowest: int = 0

    @property
    def trained_layers(self) -> int:
        """Layers from the lowest trained one up."""
        return self.shape.layers - self.lowest

    @property
    def layer_bytes(self) -> int:
        """Bytes a token that a layer stores which is not computed again."""
        return stored_layer_bytes(self.shape, self.compute, self.device, self.trained_layers, self.limit)

    @property
    def input_bytes(self) -> int:
        """Bytes a token of a layer's input, H numbers: what a recomputed layer stores."""
        return DTYPE_BYTES[self.compute] * self.shape.width

    def layers_to_recompute(self, tokens: int) -> range:
        """The layers that a document of `tokens` tokens must recompute so that its activations fit into the limit.

        On a card a single trained layer is not computed again: it would store everything meanwhile.
        """
        is_lone = self.device != "cpu" and self.trained_layers < 2
        all_bytes = tokens * self.trained_layers * self.layer_bytes
        if is_lone or all_bytes <= self.limit.bytes:
            return self._lowest_layers(0)
        saved_bytes = tokens * (self.layer_bytes - self.input_bytes)
        return self._lowest_layers(min(self.trained_layers, -(-(all_bytes - self._room(tokens)) // saved_bytes)))

    def layers_to_offload(self, tokens: int) -> range:
        """Those of the layers to recompute whose inputs wait in the memory of the host.

        None while some layer still keeps everything, and none on a processor, whose memory that is.
        """
        count, input_bytes = len(self.layers_to_recompute(tokens)), tokens * self.input_bytes
        if self.device == "cpu" or not count or count < self.trained_layers:
            return self._lowest_layers(0)
        excess_bytes = max(0, count * input_bytes - self._room(tokens))
        return self._lowest_layers(min(count, -(-excess_bytes // input_bytes)))

    def _lowest_layers(self, count: int) -> range:
        return range(self.lowest, self.lowest + count)

    def _room(self, tokens: int) -> int:
        """Bytes that are left for the activations of a document that recomputes layers."""
        if self.device == "cpu":
            return self.limit.bytes
        fitting_tokens = self.limit.bytes // (self.trained_layers * self.layer_bytes)
        # the head stores three vectors a learned token, all of them here
        head = 3 * self.input_bytes / (1.0 + CUDA_FRAGMENTATION)
        other = int(scratch_bytes_per_token(self.shape, self.compute, self.device) + head)
        return self.limit.bytes - max(0, tokens - fitting_tokens) * other - tokens * self.layer_bytes
