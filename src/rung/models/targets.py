"""Which linear modules have which role (q, k, v, o, gate, up, down), recognized by name.

Roles let one config fit every architecture; module names would differ for each. The cost is a table that needs a line
for a new architecture. Routers of mixtures of experts are never targets. Methods choose their modules here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from rung.config.base import LinearRole
from rung.config.layers import resolve_layers
from rung.errors import ConfigError

# Roles -> last part of a module's name, or its last two where one part is ambiguous. Fused projections have several.
_NAMES_BY_ROLES: dict[tuple[LinearRole, ...], tuple[str, ...]] = {
    ("q",): ("q_proj",),
    ("k",): ("k_proj",),
    ("v",): ("v_proj",),
    ("q", "k", "v"): ("qkv_proj", "query_key_value", "c_attn"),  # phi3, gpt-neox, gpt2
    ("o",): ("o_proj", "out_proj", "attn.c_proj", "self_attn.dense", "attention.dense"),  # opt, gpt2, phi, gpt-neox
    ("gate",): ("gate_proj",),
    ("up",): ("up_proj", "c_fc", "fc1", "dense_h_to_4h"),
    ("gate", "up"): ("gate_up_proj",),  # phi3
    ("down",): ("down_proj", "mlp.c_proj", "fc2", "dense_4h_to_h"),
}
_ROLES = {name: roles for roles, names in _NAMES_BY_ROLES.items() for name in names}
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def layer_number(name: str) -> int | None:
    """The number of the layer that a module belongs to, from 0; None outside the layers."""
    return int(match[1]) if (match := _LAYER.search(name)) else None


def linears_by_role(model: nn.Module) -> dict[LinearRole, list[str]]:
    """Names of the linear modules of each role, in model order."""
    names_by_role: dict[LinearRole, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and layer_number(name) is not None:
            for role in roles_of(name):
                names_by_role.setdefault(role, []).append(name)
    return names_by_role


def select_linears(model: nn.Module, roles: Iterable[LinearRole], layers: Iterable[int] | str | None) -> list[str]:
    """Names of modules with any of `roles` in `layers`: numbers, a range "15-29", a third by name, None for all.

    A role that the architecture lacks (`gate` without gating) is skipped as long as another one exists. Raises
    `ConfigError` if no module remains or a layer does not exist.
    """
    by_role = linears_by_role(model)
    # A fused projection appears under several roles and is listed once.
    names = list(dict.fromkeys(name for role in roles for name in by_role.get(role, ())))
    if not names:
        given, allowed = ", ".join(roles), ", ".join(by_role) or "none of its modules are known to Rung"
        reason = "this model has no module of these roles"
        raise ConfigError(reason, where="method.targets", given=given, allowed=allowed)
    layer_numbers = resolve_layers(layers, {number for name in names if (number := layer_number(name)) is not None})
    return [name for name in names if layer_number(name) in layer_numbers]


def roles_of(name: str) -> tuple[LinearRole, ...]:
    """Roles of a module with this name; empty for an unknown name."""
    parts = name.split(".")
    return _ROLES.get(parts[-1]) or _ROLES.get(".".join(parts[-2:]), ())


def coverage(model: nn.Module, trainable: Iterable[str]) -> str:
    """Describe what is trained: the number of linears and of layers."""
    # peft wraps an adapted linear; its original is then called `base_layer`.
    modules = {name.removesuffix(".base_layer"): module for name, module in model.named_modules()}
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D) and roles_of(name)}
    names = [f".{name}" for name in trainable]
    trained_linears = {linear for linear in linears if any(name.startswith(f".{linear}.") for name in names)}
    trained_layers = {layer_number(name) for name in names} - {None}
    all_layers = {layer_number(f".{name}.") for name in linears} - {None}
    of_layers = f"{len(trained_layers)} of {len(all_layers)} layers"
    return f"{len(trained_linears)} of {len(linears)} linears, in {of_layers}" if trained_linears else of_layers
