"""Counts what would be launched on a card, and stands in for the attention kernel that only a card has."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rung.models import tree_attention


class LaunchCounter(TorchDispatchMode):
    """Operations that would launch a kernel, and the bytes that they read and write."""

    WITHOUT_KERNEL = frozenset(
        {"view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze"}
        | {"squeeze", "detach", "alias", "split", "split_with_sizes", "empty", "empty_like", "as_strided", "unbind"}
        | {"new_empty", "is_same_size", "lift_fresh", "empty_strided", "chunk", "narrow", "promote_types"}
        | {"new_empty_strided"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.launches = Counter[str]()
        self.bytes = 0
        self.product_bytes = 0
        """Those of matrix products and of attention among them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.WITHOUT_KERNEL:
            self.launches[name] += 1
            self.add_bytes((args, kwargs, result), is_product="mm" in name or "attention" in name)
        return result

    def add_bytes(self, values: Any, *, is_product: bool = False) -> None:
        """Count every tensor in the values."""
        tensors = [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]
        count = sum(t.numel() * t.element_size() for t in tensors)
        self.bytes += count
        self.product_bytes += count if is_product else 0


class VarlenKernel:
    """What torch's variable-length kernel promises: heads in groups, causal from the last key, windows to the left."""

    def __init__(self, *, from_the_last_key: bool = True) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.from_the_last_key = from_the_last_key

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *given: Any, **options: Any) -> tuple[Tensor, ...]:
        ends_q, ends_k, max_q, max_k, dropout, is_causal, debug = given
        self.calls.append((ends_q, ends_k))
        assert (dropout, is_causal, debug) == (0.0, True, False) and ends_q.dtype is ends_k.dtype is torch.int32
        assert max_q == int(ends_q.diff().max()) and max_k == int(ends_k.diff().max())
        assert query.is_contiguous() and len(key) == len(value) == int(ends_k[-1]) and len(query) == int(ends_q[-1])
        nothing = query.new_zeros(())
        return self._attend(query, key, value, ends_q, ends_k, options), nothing, nothing, nothing, nothing

    def backward(self, grad: Tensor, *tensors: Any, **options: Any) -> tuple[Tensor, ...]:
        query, key, value, _, _, ends_q, ends_k, *_ = tensors
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(True) for t in (query, key, value)]
            out = self._attend(*leaves, ends_q, ends_k, options)
            return torch.autograd.grad(out, leaves, grad)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, options: dict[str, Any]
    ) -> Tensor:
        groups, pieces = query.shape[1] // key.shape[1], []
        scale = options["scale"] if options["scale"] is not None else query.shape[-1] ** -0.5
        for (a, b), (c, d) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
            q, k, v = query[a:b], key[c:d].repeat_interleave(groups, 1), value[c:d].repeat_interleave(groups, 1)
            shift = d - c - (b - a) if self.from_the_last_key else 0
            distance = torch.arange(b - a)[:, None] + shift - torch.arange(d - c)
            visible = distance >= 0
            if "window_size_left" in options:
                assert options["window_size_right"] == 0
                visible &= distance <= options["window_size_left"]
            scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            pieces.append(torch.einsum("hqk,khd->qhd", weights, v.double()))
        return torch.cat(pieces).to(query.dtype)


def stand_in_varlen(monkeypatch: pytest.MonkeyPatch, kernel: VarlenKernel) -> VarlenKernel:
    """Let attention of packed rows call this kernel."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel.forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", kernel.backward)
    monkeypatch.setattr(tree_attention, "has_varlen_kernel", lambda query, value: True)
    return kernel
