"""Installs the functions of `models/fused_ops.py` as the forward of a model's modules.

A module is recognized by its structure. Where a formula could differ between architectures, both forwards run on
random input, and a module keeps its forward unless the results agree. The files that a run writes do not change, only
the memory and time of a step. A trunk written here would be faster still, but for one architecture only (decision
0007). `models/load.py` installs it for a base, `methods/registry.py` again once a method is attached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rung.models.bfloat16_storage import replaced_data
from rung.models.fused_ops import ACTIVATIONS, Activation, LinearParams, gated, gated_linear, linears, rms_norm
from rung.models.fused_rotary import install_fused_rotary, original_rotary

LinearParamsOf = Callable[[nn.Module], LinearParams | None]
"""Reads the parameters of a linear module at each call; None if only the module's forward can compute it."""

# Linears that read the same tensor in all supported architectures; in others `_SharedInputLinears` notices.
_SHARED_INPUT_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_NORM_TOLERANCE = 1e-5
"""Largest difference between a norm and `rms_norm` on unit normal input; one rounding of float32 is 1e-7."""


def linear_weight(module: nn.Module) -> Tensor:
    """The matrix [O, I] of a linear; GPT-2's Conv1D stores it transposed."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def plain_linear_params(module: nn.Module) -> LinearParams | None:
    """Parameters of a linear without an adapter; None for any other module."""
    # The exact type: a subclass (a quantized linear, for example) may compute something else.
    is_plain = type(module) in (nn.Linear, Conv1D)
    return LinearParams(linear_weight(module), module.bias) if is_plain else None  # type: ignore[arg-type]


def install_fused_forwards(
    model: nn.Module, params_of: LinearParamsOf = plain_linear_params, class_matches: dict[type, bool] | None = None
) -> dict[str, int]:
    """Install every fused forward that fits; return the number of norms, gated blocks and linears replaced.

    `class_matches` keeps which gated blocks fit, by class, for a model that is passed layer by layer.

    All linears are replaced, adapted or not: a bfloat16 weight may meet a float32 input, and the fused function widens
    it.
    """
    # Installed twice in a run (base, then method): the second pass must see the original forwards.
    remove_fused_forwards(model)
    install_fused_rotary(model)
    modules, class_matches = list(model.modules()), {} if class_matches is None else class_matches
    norms = sum(_fuse_norm(module) for module in modules)
    gated_blocks = sum(_fuse_gated(module, params_of, class_matches) for module in modules)
    fused_linears: set[nn.Module] = set()
    for module, names in product(modules, _SHARED_INPUT_NAMES):
        members = [getattr(module, name, None) for name in names]
        if all(isinstance(m, nn.Module) and params_of(m) is not None for m in members):
            group = _SharedInputLinears(members, params_of)  # type: ignore[arg-type]
            for member in group.members:
                member.forward = _FusedLinear(member, params_of, group)
            fused_linears.update(group.members)
    for module in modules:
        if module not in fused_linears and params_of(module) is not None:
            module.forward = _FusedLinear(module, params_of)
            fused_linears.add(module)
    return {"norms": norms, "gated": gated_blocks, "linears": len(fused_linears)}


def unfused_linears(model: nn.Module, params_of: LinearParamsOf) -> list[str]:
    """Names of adapted linears that compute through their library's own forward (dropout, DoRA)."""
    return [name for name, m in model.named_modules() if hasattr(m, "base_layer") and params_of(m) is None]


def fused_linears(model: nn.Module) -> list[nn.Linear]:
    """The linears, of the base where there is an adapter, whose products Rung's functions compute."""
    modules = (m for m in model.modules() if isinstance(vars(m).get("forward"), _FusedLinear))
    linears = (getattr(m, "base_layer", m) for m in modules)
    return [linear for linear in linears if type(linear) is nn.Linear]


def remove_fused_forwards(model: nn.Module) -> None:
    """Restore the original forward of every module."""
    for module in _fused_modules(model):
        # The fused forward is an attribute of the instance; without it the class method applies again.
        del module.forward


@contextmanager
def original_forwards(model: nn.Module) -> Iterator[None]:
    """Within the context, every module computes as in transformers and peft: the oracle of the step-0 gate."""
    fused_forwards = {module: module.forward for module in _fused_modules(model)}
    remove_fused_forwards(model)
    try:
        with original_rotary():
            yield
    finally:
        for module, fused_forward in fused_forwards.items():
            module.forward = fused_forward


def _fused_modules(model: nn.Module) -> list[nn.Module]:
    kinds = (_FusedLinear, _FusedNorm, _FusedGatedBlock)
    return [m for m in model.modules() if isinstance(vars(m).get("forward"), kinds)]


class _SharedInputLinears:
    """Linears called one after another with the same tensor: the first call computes all of them."""

    def __init__(self, members: Sequence[nn.Module], params_of: LinearParamsOf) -> None:
        self.members, self.params_of = list(members), params_of
        self.shared_input: Tensor | None = None
        self.pending_outputs: dict[nn.Module, Tensor] = {}
        self.inputs_differ = False

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The output for `module`, or None if the module must compute separately."""
        if self.shared_input is x and module in self.pending_outputs:
            output = self.pending_outputs.pop(module)
            if not self.pending_outputs:
                self.shared_input = None
            return output
        if module in self.pending_outputs and self.shared_input is not None and self.shared_input.shape == x.shape:
            # This architecture gives the members different tensors: a joint product would be wasted.
            self.inputs_differ = True
        self.shared_input, self.pending_outputs = None, {}
        params = [self.params_of(member) for member in self.members]
        if self.inputs_differ or any(part is None for part in params):
            return None
        outputs = dict(zip(self.members, linears(x, params), strict=True))  # type: ignore[arg-type]
        output = outputs.pop(module)
        self.shared_input, self.pending_outputs = x, outputs
        return output


class _FusedLinear:
    """Replacement for the forward of a linear module."""

    def __init__(self, module: nn.Module, params_of: LinearParamsOf, group: _SharedInputLinears | None = None) -> None:
        self.module, self.params_of, self.group = module, params_of, group
        self.original_forward = module.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # peft passes further arguments (adapter names, for example) that only its forward understands.
        if args or kwargs:
            return self.original_forward(x, *args, **kwargs)
        if self.group is not None and (output := self.group(self.module, x)) is not None:
            return output
        params = self.params_of(self.module)
        return self.original_forward(x) if params is None else linears(x, [params])[0]


def _fuse_norm(module: nn.Module) -> bool:
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or not isinstance(eps, float) or not isinstance(weight, nn.Parameter):
        return False
    # A module on the meta device has no values to compare.
    if weight.dim() != 1 or weight.device.type == "meta" or not _takes_one_tensor(module):
        return False
    generator = torch.Generator().manual_seed(0)
    probe, random_weight = (torch.randn(n, len(weight), generator=generator).to(weight) for n in (4, 1))
    # A random weight: norms start at 1 or at 0, and those values would not distinguish weight from (1 + weight).
    with replaced_data([weight], lambda _: random_weight[0]), torch.no_grad():
        expected = module(probe)
        candidates = [(offset, rms_norm(probe, weight, eps, offset)) for offset in (0.0, 1.0)]
    # bfloat16 rounds to 8 bits; an offset of 1 instead of 0 still differs by far more than this.
    tolerance = 1e-1 if weight.dtype in (torch.bfloat16, torch.float16) else _NORM_TOLERANCE
    for offset, output in candidates:
        if output.dtype == expected.dtype and (output - expected).abs().max() <= tolerance:
            module.forward = _FusedNorm(module, eps, offset)
            return True
    return False


def _takes_one_tensor(module: nn.Module) -> bool:
    """Whether the forward needs one argument: a norm that is multiplied by a gate needs two."""
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) == 1


class _FusedNorm:
    def __init__(self, module: nn.Module, eps: float, offset: float) -> None:
        self.module, self.eps, self.offset = module, eps, offset

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.module.weight, self.eps, self.offset)  # type: ignore[arg-type]


def _fuse_gated(module: nn.Module, params_of: LinearParamsOf, class_matches: dict[type, bool]) -> bool:
    """Install down(act(gate(x)) * up(x)) with one backward pass if the module computes that; compared once a class."""
    projections = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(m, nn.Module) and hasattr(m, "in_features") for m in projections):
        return False
    if (activation := _match_activation(getattr(module, "act_fn", None))) is None:
        return False
    block = _FusedGatedBlock(module, activation, params_of)
    if type(module) not in class_matches:
        class_matches[type(module)] = _outputs_match(module, block, projections)
    if class_matches[type(module)]:
        module.forward = block
    return class_matches[type(module)]


@torch.no_grad()
def _outputs_match(module: nn.Module, block: _FusedGatedBlock, projections: Sequence[Any]) -> bool:
    """Compare both forwards on random input, in float32 or wider: a bfloat16 base cannot run its forward otherwise."""
    parameters = [p for linear in projections for p in linear.parameters() if p.is_floating_point()]
    device = next(projections[0].parameters()).device
    if device.type == "meta":
        return False
    dtype = torch.promote_types(parameters[0].dtype if parameters else torch.float32, torch.float32)
    generator = torch.Generator().manual_seed(0)
    with replaced_data(parameters, lambda data: data.to(dtype)):
        probe = torch.randn(2, projections[0].in_features, generator=generator, dtype=torch.float64)
        probe = probe.to(device, dtype)
        expected, output = module.forward(probe), block(probe)
    same_shape = isinstance(expected, Tensor) and expected.shape == output.shape
    return same_shape and bool(torch.allclose(expected, output, rtol=1e-3, atol=1e-3 * float(expected.abs().max())))


class _FusedGatedBlock:
    def __init__(self, module: nn.Module, activation: Activation, params_of: LinearParamsOf) -> None:
        self.module, self.activation, self.params_of = module, activation, params_of

    def __call__(self, x: Tensor) -> Any:
        gate, up = self.module.gate_proj(x), self.module.up_proj(x)  # type: ignore[operator]
        down_proj: Any = self.module.down_proj
        params = self.params_of(down_proj)
        # A hook runs only if the module is called.
        if params is None or down_proj._forward_hooks or down_proj._forward_pre_hooks:
            return down_proj(gated(gate, up, self.activation))
        return gated_linear(gate, up, self.activation, params)


def _match_activation(function: Any) -> Activation | None:
    """The entry of `ACTIVATIONS` with the same values as `function`; None if there is none."""
    if not callable(function):
        return None
    # Compared by values, because transformers has several classes and names for one function.
    x = torch.linspace(-6.0, 6.0, 101, dtype=torch.float64)
    matches = (a for a in ACTIVATIONS.values() if torch.allclose(function(x), a[0](x), rtol=0.0, atol=1e-9))
    return next(matches, None)
