"""Second moments of inputs and gradients of weights, for as many matrices at a time as fit into a stated memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rung.method.base import Sample

BYTES = 512 * 2**20
"""What moments or gradients may hold at once; more matrices take more passes over the sample."""


def gradients(weights: Mapping[str, nn.Parameter], sample: Sample) -> Iterator[tuple[str, Tensor]]:
    """The loss's gradient of each weight over the sample, in float32 or wider, shaped as the weight."""
    for names in in_chunks({name: w.numel() for name, w in weights.items()}):
        with _widened([weights[name] for name in names]) as parameters:
            found = dict(zip(names, sample.gradients(parameters), strict=True))
        while found:
            yield found.popitem()


def second_moments(
    modules: Mapping[str, nn.Module], widths: Mapping[str, int], sample: Sample
) -> Iterator[tuple[str, Tensor]]:
    """Mean of x x^T over the tokens of the sample for the inputs of each module, [I, I] in float32 or wider."""
    for names in in_chunks({name: width**2 for name, width in widths.items()}):
        sums: dict[str, Tensor] = {}
        hooks = [modules[name].register_forward_pre_hook(partial(_add, sums, name)) for name in names]
        try:
            sample.read()
        finally:
            for hook in hooks:
                hook.remove()
        while sums:
            name, total = sums.popitem()
            yield name, total / total.new_tensor(sample.tokens)


def in_chunks(sizes: Mapping[str, int], limit: int = BYTES) -> Iterator[list[str]]:
    """Names in order, as many at a time as hold at most `limit` bytes of float32; a larger one stands alone."""
    chunk: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if chunk and filled + 4 * size > limit:
            yield chunk
            chunk, filled = [], 0
        chunk.append(name)
        filled += 4 * size
    if chunk:
        yield chunk


def _add(sums: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):  # the trunk's would multiply, and then add, in bfloat16
        moment = x.T @ x
    sums[name] = sums[name].add_(moment) if name in sums else moment


@contextmanager
def _widened(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Inside, the parameters are float32 at least and can be moved: a gradient in bfloat16 would be rounded."""
    held = [p.data for p in parameters]
    for p in parameters:
        p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
        p.requires_grad_(True)
    try:
        yield list(parameters)
    finally:
        for p, data in zip(parameters, held, strict=True):
            p.requires_grad_(False)
            p.data = data
            p.grad = None
