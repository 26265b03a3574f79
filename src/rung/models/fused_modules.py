"""Puts the functions of `models/fused_ops.py` under the modules of a model, where they compute the same.

A module is recognized by its structure and, where a formula could differ between architectures, by trying: it keeps its
own forward unless ours agrees with it. The files a run writes do not change, only what a step keeps and how fast it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rung.models.fused_ops import ACTIVATIONS, Activation, LinearParams, gated, gated_linear, linears, rms_norm

LinearParamsOf = Callable[[nn.Module], LinearParams | None]
"""Reads a linear module at the moment of a call; None where only the module itself can compute."""

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_AGREES = 1e-5
"""Largest difference of a norm from ours on unit normal input; one rounding of float32 is 1e-7."""


def plain_linear_params(module: nn.Module) -> LinearParams | None:
    """A linear without an adapter; transposed for GPT-2's Conv1D."""
    linear: Any = module
    if type(module) is nn.Linear:
        return LinearParams(linear.weight, linear.bias)
    if type(module) is Conv1D:
        return LinearParams(linear.weight.T, linear.bias)
    return None


def install_fused_forwards(model: nn.Module, part_of: LinearParamsOf = plain_linear_params) -> dict[str, int]:
    """Install everything that fits; returns how many norms, gated blocks and linears compute through our functions.

    All linears do, adapted or not: a weight may be narrower than its input, and the fused function widens it.
    """
    remove_fused_forwards(model)
    counts = {"norms": 0, "gated": 0, "linears": 0}
    tried: dict[type, bool] = {}
    for module in list(model.modules()):
        counts["norms"] += _fuse_norm(module)
        counts["gated"] += _fuse_gated(module, part_of, tried)
    done: set[nn.Module] = set()
    for module in list(model.modules()):
        for names in _TOGETHER:
            members = [getattr(module, name, None) for name in names]
            if all(isinstance(m, nn.Module) and part_of(m) is not None for m in members):
                shared = _SharedInputLinears(members, part_of)  # type: ignore[arg-type]
                for member in shared.members:
                    member.forward = _FusedLinear(member, part_of, shared)
                done.update(shared.members)
    for module in list(model.modules()):
        if module not in done and part_of(module) is not None:
            module.forward = _FusedLinear(module, part_of)
            done.add(module)
    counts["linears"] = len(done)
    return counts


def unfused_linears(model: nn.Module, part_of: LinearParamsOf) -> list[str]:
    """Names of adapted linears that compute through their library's own forward (dropout, DoRA)."""
    return [name for name, m in model.named_modules() if hasattr(m, "base_layer") and part_of(m) is None]


def remove_fused_forwards(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for module in _fused_modules(model):
        del module.forward


@contextmanager
def original_forwards(model: nn.Module) -> Iterator[None]:
    """Inside, every module computes as transformers and peft wrote it: the oracle of the step-0 gate."""
    taken = {module: module.forward for module in _fused_modules(model)}
    remove_fused_forwards(model)
    try:
        yield
    finally:
        for module, ours in taken.items():
            module.forward = ours


def _fused_modules(model: nn.Module) -> list[nn.Module]:
    return [
        m for m in model.modules() if isinstance(vars(m).get("forward"), _FusedLinear | _FusedNorm | _FusedGatedBlock)
    ]


class _SharedInputLinears:
    """Linears that are called one after another with the same tensor: the first call computes all of them."""

    def __init__(self, members: Sequence[nn.Module], part_of: LinearParamsOf) -> None:
        self.members = list(members)
        self.part_of = part_of
        self.source: Tensor | None = None
        self.waiting: dict[nn.Module, Tensor] = {}
        self.apart = False

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The output for `module`, or None where it must compute alone."""
        if self.source is x and module in self.waiting:
            found = self.waiting.pop(module)
            if not self.waiting:
                self.source = None
            return found
        if module in self.waiting and self.source is not None and self.source.shape == x.shape:
            self.apart = True  # the members get different tensors in this architecture: together they would waste
        self.source, self.waiting = None, {}
        parts = [self.part_of(member) for member in self.members]
        if self.apart or any(part is None for part in parts):
            return None
        outputs = dict(zip(self.members, linears(x, parts), strict=True))  # type: ignore[arg-type]
        found = outputs.pop(module)
        self.source, self.waiting = x, outputs
        return found


class _FusedLinear:
    """The forward of a linear module."""

    def __init__(self, module: nn.Module, part_of: LinearParamsOf, shared: _SharedInputLinears | None = None) -> None:
        self.module, self.part_of, self.shared = module, part_of, shared
        self.own = module.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return self.own(x, *args, **kwargs)
        if self.shared is not None and (found := self.shared(self.module, x)) is not None:
            return found
        part = self.part_of(self.module)
        return self.own(x) if part is None else linears(x, [part])[0]


def _fuse_norm(module: nn.Module) -> bool:
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or not isinstance(eps, float) or not isinstance(weight, nn.Parameter):
        return False
    if weight.dim() != 1 or weight.device.type == "meta":
        return False
    draw = torch.Generator().manual_seed(0)
    probe, other = (torch.randn(n, len(weight), generator=draw).to(weight.device, weight.dtype) for n in (4, 1))
    own, weight.data = weight.data, other[0]  # weights of 1 would not tell offset and factor apart
    try:
        with torch.no_grad():
            expected = module(probe)
            candidates = [(offset, rms_norm(probe, weight, eps, offset)) for offset in (0.0, 1.0)]
    finally:
        weight.data = own
    limit = 1e-1 if weight.dtype in (torch.bfloat16, torch.float16) else _AGREES
    for offset, ours in candidates:
        if ours.dtype == expected.dtype and (ours - expected).abs().max() <= limit:
            module.forward = _FusedNorm(module, eps, offset)
            return True
    return False


class _FusedNorm:
    def __init__(self, module: nn.Module, eps: float, offset: float) -> None:
        self.module, self.eps, self.offset = module, eps, offset

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.module.weight, self.eps, self.offset)  # type: ignore[arg-type]


def _fuse_gated(module: nn.Module, part_of: LinearParamsOf, tried: dict[type, bool]) -> bool:
    """down(act(gate(x)) * up(x)) as one backward pass, where that is what the module computes: tried once a class."""
    linear = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(m, nn.Module) and hasattr(m, "in_features") for m in linear):
        return False
    if (activation := _activation(getattr(module, "act_fn", None))) is None:
        return False
    ours = _FusedGatedBlock(module, activation, part_of)
    if type(module) not in tried:
        tried[type(module)] = _computes_the_same(module, ours, linear)
    if tried[type(module)]:
        module.forward = ours
    return tried[type(module)]


@torch.no_grad()
def _computes_the_same(module: nn.Module, ours: _FusedGatedBlock, linears: Sequence[Any]) -> bool:
    """On a little random input, in float32 at least: a base held narrow could not run its own forward."""
    parameters = [p for linear in linears for p in linear.parameters() if p.is_floating_point()]
    device = next(linears[0].parameters()).device
    if device.type == "meta":
        return False
    held = [p.data for p in parameters]
    wide = torch.promote_types(parameters[0].dtype if parameters else torch.float32, torch.float32)
    draw = torch.Generator().manual_seed(0)
    try:
        for p in parameters:
            p.data = p.data.to(wide)
        probe = torch.randn(2, linears[0].in_features, generator=draw, dtype=torch.float64)
        probe = probe.to(device, wide)
        expected, found = module.forward(probe), ours(probe)
    finally:
        for p, data in zip(parameters, held, strict=True):
            p.data = data
    same_shape = isinstance(expected, Tensor) and expected.shape == found.shape
    return same_shape and bool(torch.allclose(expected, found, rtol=1e-3, atol=1e-3 * float(expected.abs().max())))


class _FusedGatedBlock:
    def __init__(self, module: nn.Module, activation: Activation, part_of: LinearParamsOf) -> None:
        self.module, self.activation, self.part_of = module, activation, part_of

    def __call__(self, x: Tensor) -> Any:
        gate, up = self.module.gate_proj(x), self.module.up_proj(x)  # type: ignore[operator]
        last: Any = self.module.down_proj
        part = self.part_of(last)
        if part is None or last._forward_hooks or last._forward_pre_hooks:  # hooks want it called as a module
            return last(gated(gate, up, self.activation))
        return gated_linear(gate, up, self.activation, part)


def _activation(function: Any) -> Activation | None:
    """The known activation that gives what `function` gives."""
    if not callable(function):
        return None
    x = torch.linspace(-6.0, 6.0, 101, dtype=torch.float64)
    for known in ACTIVATIONS.values():
        if torch.allclose(function(x), known[0](x), rtol=0.0, atol=1e-9):
            return known
    return None
