"""A smaller model out of some layers of a larger one, as DistilBERT begins (Sanh et al. 2019, section 2)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from rung.errors import ConfigError, PlanError
from rung.model.layers import layers_of, put_layers
from rung.spec.model import StudentLayers

if TYPE_CHECKING:
    from rung.model.load import Base


def chosen(layers: StudentLayers, count: int) -> tuple[int, ...]:
    """Numbers of the layers that stay. Raises `ConfigError` for some that are not there, or all of them."""
    half = max(1, count // 2)
    if layers == "every_other":  # evenly, first and last among them: 0, 2, 4, 7, 9, 11 of twelve
        own = tuple(sorted({round(i * (count - 1) / max(1, half - 1)) for i in range(half)}))
    elif layers == "first":
        own = tuple(range(half))
    elif layers == "last":
        own = tuple(range(count - half, count))
    else:
        own = tuple(layers)
    if sorted(set(own)) != list(own) or not own or own[0] < 0 or own[-1] >= count:
        allowed = f"rising numbers from 0 to {count - 1}"
        raise ConfigError("these are no layers of the teacher", where="model.layers", given=layers, allowed=allowed)
    if len(own) == count:
        raise ConfigError("a student with all layers is its teacher", where="model.layers", given=layers)
    return own


def student(base: Base, layers: StudentLayers) -> Base:
    """The same model with these layers alone; embeddings, final norm and head stay. In place: the rest is gone."""
    config = base.model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        what = "its layers know their own number, so taking some out would change the others"
        raise PlanError(what, where="model.student_of", given=config.model_type)
    every = layers_of(base.model)
    own = chosen(layers, len(every))
    kept = [every[i] for i in own]
    for number, layer in enumerate(kept):
        _renumber(layer, number)
    put_layers(base.model, kept)
    config.num_hidden_layers = len(kept)
    if types := getattr(config, "layer_types", None):
        config.layer_types = [types[i] for i in own]
    weights = hashlib.sha256(f"{base.fingerprint} layers {own}".encode()).hexdigest()
    return replace(base, fingerprint=weights)


def _renumber(layer: nn.Module, number: int) -> None:
    """Where a layer keeps its keys and values goes by its number."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            vars(module)["layer_idx"] = number
