"""Rotary scalings that depend on the length of a document (longrope: Phi-3 and its kin), decided for each document.

transformers takes one set of frequencies up to `original_max_position_embeddings` and another beyond it, and decides
by the largest position of a whole batch. A packed row would then compute a short document with the frequencies of a
long one beside it. Here the caller says which tokens belong to long documents: `Policy` and `generate` do, and packing
shares no prefix between documents of both kinds. Where a row has both, both sets are computed: two small products.

"dynamic" scaling changes beyond `max_position_embeddings` only, which is the longest document that Rung takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LongTokens = bool | Tensor
"""Whether all tokens belong to long documents, or which of them do: bool [T]."""
_CLASSES: dict[type, type] = {}


def rope_boundary(config: Any) -> int | None:
    """Longest document in tokens that takes the frequencies of short ones; None where length does not matter."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [p for p in parameters.values() if isinstance(p, Mapping)] or [parameters]
    scaled = [p for p in by_layer_type if p.get("rope_type") == "longrope"]
    if not scaled:
        return None
    config_boundary = getattr(config, "original_max_position_embeddings", None)
    boundary = min(int(p.get("original_max_position_embeddings", config_boundary)) for p in scaled)
    return boundary if boundary < int(config.max_position_embeddings) else None


def follow_document_lengths(model: nn.Module, boundary: int) -> None:
    """Let the rotary modules of a model follow `long_tokens` instead of the largest position of a batch."""
    for module in list(model.modules()):
        is_rotary = getattr(module, "rope_type", None) is not None and "RotaryEmbedding" in type(module).__name__
        if is_rotary and type(module) not in _CLASSES.values():
            module.__class__ = _length_aware(type(module))
            module.boundary, module.long_tokens = boundary, None  # type: ignore[assignment]


@contextmanager
def long_tokens(model: nn.Module, tokens: LongTokens) -> Iterator[None]:
    """Within the context `tokens` of every row belong to documents longer than the boundary."""
    modules: list[Any] = [module for module in model.modules() if type(module) in _CLASSES.values()]
    previous = [module.long_tokens for module in modules]
    for module in modules:
        module.long_tokens = tokens
    try:
        yield
    finally:
        for module, value in zip(modules, previous, strict=True):
            module.long_tokens = value


def _length_aware(original: type) -> type:
    """A subclass and not a patched method: a copy of the model must read its own `long_tokens`."""
    if original not in _CLASSES:

        def forward(self: Any, x: Tensor, position_ids: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
            def at(positions: Tensor) -> tuple[Tensor, ...]:
                return original.forward(self, x, positions, *arguments, **options)  # type: ignore[attr-defined,no-any-return]

            def long() -> tuple[Tensor, ...]:
                # one more position beyond the boundary decides for long; it is cut off again
                beyond = position_ids.new_full((len(position_ids), 1), self.boundary)
                return tuple(part[:, :-1] for part in at(torch.cat([position_ids, beyond], dim=1)))

            if self.long_tokens is None:
                return at(position_ids)
            if isinstance(self.long_tokens, bool):
                return long() if self.long_tokens else at(position_ids)
            mask = self.long_tokens[None, :, None]
            short = at(position_ids.masked_fill(self.long_tokens[None], 0))
            return tuple(torch.where(mask, a, b) for a, b in zip(long(), short, strict=True))

        _CLASSES[original] = type(f"LengthAware{original.__name__}", (original,), {"forward": forward})
    return _CLASSES[original]
