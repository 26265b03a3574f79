"""A smaller model out of some layers of a larger one, as DistilBERT begins (Sanh et al. 2019, section 2)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from rung.errors import PlanError
from rung.model.layers import layers_of, put_layers
from rung.spec.layers import student_layers
from rung.spec.model import StudentLayers

if TYPE_CHECKING:
    from rung.model.load import Base


def student(base: Base, layers: StudentLayers) -> Base:
    """The same model with these layers alone; embeddings, final norm and head stay. In place: the rest is gone."""
    config = base.model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        what = "its layers know their own number, so taking some out would change the others"
        raise PlanError(what, where="model.student_of", given=config.model_type)
    every = layers_of(base.model)
    own = student_layers(layers, len(every))
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
