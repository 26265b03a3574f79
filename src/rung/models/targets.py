"""Which modules play which role, found by the structure of a model. Routers of mixtures are never targets."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from rung.config.base import LinearRole
from rung.config.layers import resolve_layers
from rung.errors import ConfigError

# Last part of a module's name -> roles it plays. Fused projections play several.
_ROLES: dict[str, tuple[LinearRole, ...]] = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "qkv_proj": ("q", "k", "v"),  # phi3
    "query_key_value": ("q", "k", "v"),  # gpt-neox
    "c_attn": ("q", "k", "v"),  # gpt2
    "o_proj": ("o",),
    "out_proj": ("o",),  # opt
    "attn.c_proj": ("o",),
    "self_attn.dense": ("o",),  # phi
    "attention.dense": ("o",),  # gpt-neox
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "gate_up_proj": ("gate", "up"),  # phi3
    "down_proj": ("down",),
    "c_fc": ("up",),
    "mlp.c_proj": ("down",),
    "fc1": ("up",),
    "fc2": ("down",),
    "dense_h_to_4h": ("up",),
    "dense_4h_to_h": ("down",),
}
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def layer_number(name: str) -> int | None:
    """The layer a module stands in, counted from 0; None outside the layers."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def linears_by_role(model: nn.Module) -> dict[LinearRole, list[str]]:
    """Names of the linear modules of each role, in the order of the model."""
    found: dict[LinearRole, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and layer_number(name) is not None:
            for role in roles_of(name):
                found.setdefault(role, []).append(name)
    return found


def select_linears(model: nn.Module, roles: Iterable[LinearRole], layers: Iterable[int] | str | None) -> list[str]:
    """Modules that play any of `roles` in the given layers: numbers, a range "15-29", a third by name, None for all.

    A gated model has no separate `gate` in architectures without one: a role that is absent is passed over as long as
    another is found. Raises `ConfigError` when nothing is left or a layer does not exist.
    """
    by_role = linears_by_role(model)
    names = list(dict.fromkeys(name for role in roles for name in by_role.get(role, ())))
    if not names:
        raise ConfigError(
            "this model has no module of these roles",
            where="method.targets",
            given=", ".join(roles),
            allowed=", ".join(by_role) or "none of its modules are known to Rung",
        )
    wanted = resolve_layers(layers, {number for name in names if (number := layer_number(name)) is not None})
    return [name for name in names if layer_number(name) in wanted]


def roles_of(name: str) -> tuple[LinearRole, ...]:
    """Roles that a module of this name plays; none for one that is not known."""
    parts = name.split(".")
    return _ROLES.get(parts[-1]) or _ROLES.get(".".join(parts[-2:]), ())


def coverage(model: nn.Module, trainable: Iterable[str]) -> str:
    """What of the layers moves, in words: how many of their linears, and of themselves."""
    linears = {
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and roles_of(name.removesuffix(".base_layer"))
    }
    names = [f".{name}" for name in trainable]
    moved = {name for name in linears if any(own.startswith(f".{name}.") for own in names)}
    layers = {number for own in names if (number := layer_number(own)) is not None}
    present = {number for name in linears if (number := layer_number(f".{name}.")) is not None}
    of_layers = f"{len(layers)} of {len(present)} layers"
    return f"{len(moved)} of {len(linears)} linears, in {of_layers}" if moved else of_layers
