"""Bottleneck adapters for decoders that normalize before each block: Houlsby's, Pfeiffer's, and the parallel variant.

With x the residual stream and f a block (its norm included), a layer becomes

    houlsby    x + f(x) + Ad(f(x))       after attention and after the feed-forward block
    pfeiffer   y + Ad(y), y the layer    once a layer
    parallel   x + f(x) + s Ad(norm(x))  beside the feed-forward block
    Ad(h) = up(activation(down(h)))

up starts at zero, so the model starts as the base. The adapters are attached by forward hooks: no module changes its
place or name, so removing them restores the base bit for bit (decision 0015). They cannot be merged, because the
activation is not linear.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from rung.config.layers import resolve_layers
from rung.config.method import BottleneckConfig
from rung.errors import ConfigError
from rung.methods.adapter_files import named_adapter_parameters, read_rung_tuner, write_rung_tuner
from rung.methods.protocol import Method
from rung.models.layers import layers_of
from rung.models.targets import layer_number, linears_by_role

NAME = "bottleneck"
"""Name of the submodule added to a host."""
INIT_STD = 0.02
"""Initial standard deviation of `down`."""
_ACTIVATIONS: dict[str, Any] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class BottleneckAdapter(nn.Module):
    """up(activation(down(h))) on the last axis (Houlsby et al. 2019, section 2.1)."""

    def __init__(self, features: int, config: BottleneckConfig, reference: Tensor) -> None:
        super().__init__()
        # Trainable weights are float32 at least: small updates would vanish in bfloat16.
        dtype = torch.promote_types(reference.dtype, torch.float32)
        self.down = nn.Linear(features, config.width, device=reference.device, dtype=dtype)
        self.up = nn.Linear(config.width, features, device=reference.device, dtype=dtype)
        self.activation, self.scale = _ACTIVATIONS[config.activation], config.resolved_scale
        nn.init.normal_(self.down.weight, std=INIT_STD)
        for zero_parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero_parameter)

    def forward(self, h: Tensor) -> Tensor:
        """Return the shape and, also under autocast, the dtype of `h`."""
        h_wide = h.to(torch.promote_types(h.dtype, self.down.weight.dtype))
        update: Tensor = self.scale * self.up(self.activation(self.down(h_wide)))
        return update.to(h.dtype)


class Bottleneck(Method):
    """A narrow network after or beside the blocks of every chosen layer; the base stays frozen."""

    kind = NAME
    merge_refusal = "a bottleneck adapter cannot be folded into the base: its activation is not linear"

    def __init__(self, model: PreTrainedModel, config: BottleneckConfig) -> None:
        self.model, self.config, self.features = model, config, int(model.config.hidden_size)
        reference = next(model.parameters())
        self.hosts = _hosts(model, config)
        hook = self._parallel_hook if config.placement == "parallel" else self._sequential_hook
        for name, host in self.hosts.items():
            host.add_module(NAME, adapter := BottleneckAdapter(self.features, config, reference))
            # Tensors of the adapter belong to the linear (stable names), the hook to the gated block around it.
            hook_module = _block_ending_in(model, name) or host if config.placement == "houlsby" else host
            hook_module.register_forward_hook(partial(hook, adapter))

    def trainable(self) -> dict[str, nn.Parameter]:
        """`down` and `up` of every adapter."""
        return named_adapter_parameters(self.hosts, NAME)

    def declared_parameters(self) -> int:
        """Number of adapters times 2 H w + w + H."""
        width = self.config.width
        return len(self.hosts) * (2 * self.features * width + width + self.features)

    def save(self, folder: Path) -> None:
        """Write files that peft loads once `rung.peft` is imported."""
        settings = {**self.config.model_dump(mode="json"), "features": self.features}
        write_rung_tuner(folder, self.hosts, NAME, settings)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote; missing or unexpected keys raise `CheckpointError`."""
        read_rung_tuner(folder, self.hosts, NAME)

    def _sequential_hook(self, adapter: nn.Module, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not self.enabled:
            return output
        # Layers of some architectures return the hidden states with further values.
        if isinstance(output, tuple):
            return (output[0] + adapter(output[0]), *output[1:])
        return output + adapter(output)

    def _parallel_hook(self, adapter: nn.Module, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        # The input of the block is already normalized: norm(x) in the formula above.
        return output + adapter(inputs[0]) if self.enabled else output


def _block_ending_in(model: nn.Module, name: str) -> nn.Module | None:
    """The gated block that ends in this linear. Without a hook inside, the fused block stores less (docs/log.md)."""
    parent, _, child_name = name.rpartition(".")
    block = model.get_submodule(parent)
    is_gated = {"gate_proj", "up_proj"} <= dict(block.named_children()).keys()
    return block if child_name == "down_proj" and is_gated else None


def _hosts(model: PreTrainedModel, config: BottleneckConfig) -> dict[str, nn.Module]:
    """Modules whose output an adapter is added to, by name. Raises `ConfigError` if the model has none."""
    layers = layers_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    layer_numbers = resolve_layers(config.layers, range(len(layers)))
    if config.placement == "pfeiffer":
        return {names[id(layer)]: layer for number, layer in enumerate(layers) if number in layer_numbers}
    by_role = linears_by_role(model)
    host_names = [*(by_role.get("o", ()) if config.placement == "houlsby" else ()), *by_role.get("down", ())]
    # Beside the whole block, so the block must be a module; in OPT its linears belong to the layer directly.
    if config.placement == "parallel":
        blocks = dict.fromkeys(name.rpartition(".")[0] for name in host_names)
        host_names = [name for name in blocks if id(model.get_submodule(name)) not in {id(layer) for layer in layers}]
    hosts = {name: model.get_submodule(name) for name in host_names if layer_number(f"{name}.") in layer_numbers}
    if not hosts:
        reason = "this model has no blocks of the kind that this adapter stands at"
        allowed = "pfeiffer, which needs layers alone"
        raise ConfigError(reason, where="method.placement", given=config.placement, allowed=allowed)
    return hosts
