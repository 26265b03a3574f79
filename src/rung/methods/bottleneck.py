"""Bottleneck adapters for decoders that normalize before each block: Houlsby's, Pfeiffer's, and the parallel one.

With x the residual stream and f a block (its norm included), a layer becomes

    houlsby    x + f(x) + Ad(f(x))       behind attention and behind the feed-forward block
    pfeiffer   y + Ad(y), y the layer    once a layer
    parallel   x + f(x) + s Ad(norm(x))  beside the feed-forward block
    Ad(h) = up(activation(down(h)))

up starts at zero, so the model starts as the base. The adapters hang on forward hooks: no module changes its place or
its name, so taking them off leaves the base bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from rung.config.layers import resolve_layers
from rung.config.method import BottleneckConfig
from rung.errors import ConfigError, PlanError
from rung.methods.adapter_files import named_adapter_parameters, read_rung_tuner, write_rung_tuner
from rung.methods.protocol import Method, switched_off
from rung.models.layers import layers_of
from rung.models.targets import layer_number, linears_by_role

NAME = "bottleneck"
"""Of the submodule that a host gets."""
START = 0.02
"""Standard deviation of down at the start."""
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class BottleneckAdapter(nn.Module):
    """up(activation(down(h))) on the last axis (Houlsby et al. 2019, section 2.1)."""

    def __init__(self, features: int, config: BottleneckConfig, like: Tensor) -> None:
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.down = nn.Linear(features, config.width, device=like.device, dtype=dtype)
        self.up = nn.Linear(config.width, features, device=like.device, dtype=dtype)
        self.activation, self.scale = _ACTIVATIONS[config.activation], config.scale
        nn.init.normal_(self.down.weight, std=START)
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)

    def forward(self, h: Tensor) -> Tensor:
        """The same shape and, under autocast too, the type of `h`."""
        wide = h.to(torch.promote_types(h.dtype, self.down.weight.dtype))
        added: Tensor = self.scale * self.up(self.activation(self.down(wide)))
        return added.to(h.dtype)


class Bottleneck(Method):
    """A narrow network behind or beside blocks of every chosen layer; the base never moves."""

    kind = NAME
    artifact = "adapter"
    starts_as_base = True

    def __init__(self, model: PreTrainedModel, config: BottleneckConfig) -> None:
        self.model, self.config = model, config
        self.on = True
        features = int(model.config.hidden_size)
        like = next(model.parameters())
        self.hosts = _hosts(model, config)
        for host in self.hosts.values():
            host.add_module(NAME, BottleneckAdapter(features, config, like))
        for name, host in self.hosts.items():
            at = _block_ending_in(model, name) or host if config.placement == "houlsby" else host
            joined = self._parallel_hook if config.placement == "parallel" else self._sequential_hook
            at.register_forward_hook(partial(joined, host.get_submodule(NAME)))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Down and up of every adapter."""
        return named_adapter_parameters(self.hosts, NAME)

    def declared_parameters(self) -> int:
        """Adapters times 2 H w + w + H."""
        features, width = int(self.model.config.hidden_size), self.config.width
        return len(self.hosts) * (2 * features * width + width + features)

    def disabled(self) -> AbstractContextManager[None]:
        """The base alone, inside the context."""
        return switched_off(self)

    def save(self, folder: Path) -> None:
        """Write two files that peft loads once `rung.peft` is imported."""
        write_rung_tuner(
            folder,
            self.hosts,
            NAME,
            {**self.config.model_dump(mode="json"), "features": int(self.model.config.hidden_size)},
        )

    def load(self, folder: Path) -> None:
        """Read them; keys missing or left over raise `CheckpointError`."""
        read_rung_tuner(folder, self.hosts, NAME)

    def merge(self) -> nn.Module:
        """Raises `PlanError`: what is not linear has no place in a weight."""
        raise PlanError(
            "a bottleneck adapter cannot be folded into the base: its activation is not linear",
            hint="serve the base with the adapter, or train a lora",
        )

    def _sequential_hook(self, adapter: nn.Module, at: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not self.on:
            return output
        if isinstance(output, tuple):
            return (output[0] + adapter(output[0]), *output[1:])
        return output + adapter(output)

    def _parallel_hook(self, adapter: nn.Module, at: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return output + adapter(inputs[0]) if self.on else output


def _block_ending_in(model: nn.Module, name: str) -> nn.Module | None:
    """The gated block whose output is this linear's: without a hook inside it computes as one, and keeps less."""
    parent, _, own = name.rpartition(".")
    block = model.get_submodule(parent)
    return block if own == "down_proj" and {"gate_proj", "up_proj"} <= dict(block.named_children()).keys() else None


def _hosts(model: PreTrainedModel, config: BottleneckConfig) -> dict[str, nn.Module]:
    """The modules whose output an adapter joins, by name. Raises `ConfigError` where the model has none of the kind."""
    layers = layers_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    wanted = resolve_layers(config.layers, range(len(layers)))
    if config.placement == "pfeiffer":
        return {names[id(layer)]: layer for number, layer in enumerate(layers) if number in wanted}
    by_role = linears_by_role(model)
    found = (
        [*by_role.get("o", ()), *by_role.get("down", ())] if config.placement == "houlsby" else by_role.get("down", ())
    )
    if config.placement == "parallel":  # beside the whole block, which must be a module of its own
        blocks = dict.fromkeys(name.rpartition(".")[0] for name in found)
        found = [name for name in blocks if id(model.get_submodule(name)) not in {id(layer) for layer in layers}]
    chosen = {name: model.get_submodule(name) for name in found if layer_number(f"{name}.") in wanted}
    if not chosen:
        raise ConfigError(
            "this model has no blocks of the kind that this adapter stands at",
            where="method.placement",
            given=config.placement,
            allowed="pfeiffer, which needs layers alone",
        )
    return chosen
