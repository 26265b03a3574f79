"""Running a part of a model's layers: recording what enters a layer, and going on from there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rung.config.layers import student_layers
from rung.config.model import StudentLayers
from rung.errors import PlanError
from rung.models.targets import layer_number

if TYPE_CHECKING:
    from rung.models.base_model import BaseModel


_NAMES = ("layers", "h", "blocks")


class _LayerReplacement(nn.Module):
    """Takes a layer's place in the loop; whatever the loop reads from a layer is read from the original."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not a submodule: its parameters must not be counted twice

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)


class _SkippedLayer(_LayerReplacement):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _FedLayer(_LayerReplacement):
    def __init__(self, original: nn.Module, states_TH: Tensor) -> None:
        super().__init__(original)
        self.states_TH = states_TH

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.states_TH[None].to(hidden_states.dtype)


class _RecordingLayer(_LayerReplacement):
    seen: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.__dict__["original"](*args, **kwargs)
        self.seen = (out[0] if isinstance(out, tuple) else out)[0]
        return out


class _RecomputedLayer(_LayerReplacement):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.__dict__["original"], *args, use_reentrant=False, **kwargs)


def layer_count(model: nn.Module) -> int:
    """How many layers the model's trunk loops over."""
    return len(layers_of(model))


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers that the model's trunk loops over. Raises `PlanError` where they are not found."""
    return _layer_list(model)[2]


def set_layers(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Take these for the model's layers, for good."""
    owner, name, _ = _layer_list(model)
    setattr(owner, name, nn.ModuleList(layers))


@contextmanager
def start_from_layer(model: nn.Module, layer: int, states_TH: Tensor) -> Iterator[None]:
    """Inside, the layers below `layer` do not run: `states_TH` enters it."""

    def stand_in(i: int, own: nn.Module) -> nn.Module:
        return own if i >= layer else _FedLayer(own, states_TH) if i == layer - 1 else _SkippedLayer(own)

    with _replaced_layers(model, stand_in):
        yield


@contextmanager
def record_layer_input(model: nn.Module, layer: int) -> Iterator[Callable[[], Tensor]]:
    """Inside, only the layers below `layer` run; the function yielded gives what would enter it, [T, H]."""
    kept: list[_RecordingLayer] = []

    def stand_in(i: int, own: nn.Module) -> nn.Module:
        if i == layer - 1:
            kept.append(_RecordingLayer(own))
            return kept[0]
        return own if i < layer else _SkippedLayer(own)

    def seen() -> Tensor:
        assert kept[0].seen is not None  # noqa: S101 -- for the type checker
        return kept[0].seen

    with _replaced_layers(model, stand_in):
        yield seen


@contextmanager
def recompute_layers(model: nn.Module, which: range) -> Iterator[None]:
    """Inside, these layers keep their input alone and compute again in the backward pass (Chen et al. 2016)."""
    with _replaced_layers(
        model, lambda i, own: own if i not in which or isinstance(own, _LayerReplacement) else _RecomputedLayer(own)
    ):
        yield


def lowest_trainable_layer(model: nn.Module, trainable: Iterable[str]) -> int:
    """The first layer that holds, or has below it, a number that moves; the number of layers where only the head does.

    0 where anything outside the layers moves that is not the output head: embeddings lie below all layers, and so do
    virtual tokens, which are no part of the model. 0 also where no list of layers is found.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    own = {id(p) for p in head.parameters()} if head is not None else set()
    below = {id(p) for p in model.get_input_embeddings().parameters()}  # type: ignore[operator]
    parameters = dict(model.named_parameters())
    if _find_layer_list(model) is None:
        return 0
    lowest = layer_count(model)
    for name in trainable:
        number = layer_number(f".{name}")
        if number is not None:
            lowest = min(lowest, number)
        elif name not in parameters or id(parameters[name]) not in own or id(parameters[name]) in below:
            return 0
    return lowest


@contextmanager
def _replaced_layers(model: nn.Module, stand_in: Callable[[int, nn.Module], nn.Module]) -> Iterator[None]:
    owner, name, layers = _layer_list(model)
    setattr(owner, name, nn.ModuleList(stand_in(i, own) for i, own in enumerate(layers)))
    try:
        yield
    finally:
        setattr(owner, name, layers)


def _layer_list(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    if (found := _find_layer_list(model)) is None:
        raise PlanError("this model's layers are not where Rung looks for them", allowed=", ".join(_NAMES))
    return found


def _find_layer_list(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The outermost list of layers, with its owner and its name there (OPT keeps it in a decoder of its own)."""
    trunk: nn.Module = getattr(model, str(model.base_model_prefix))
    for owner in trunk.modules():
        for name in _NAMES:
            if isinstance(layers := getattr(owner, name, None), nn.ModuleList):
                return owner, name, layers
    return None


def drop_layers(base: BaseModel, layers: StudentLayers) -> BaseModel:
    """The same model with these layers alone; embeddings, final norm and head stay. In place: the rest is gone."""
    config = base.model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        what = "its layers know their own number, so taking some out would change the others"
        raise PlanError(what, where="model.student_of", given=config.model_type)
    every = layers_of(base.model)
    own = student_layers(layers, len(every))
    kept = [every[i] for i in own]
    for number, layer in enumerate(kept):
        _renumber_layer(layer, number)
    set_layers(base.model, kept)
    config.num_hidden_layers = len(kept)
    if types := getattr(config, "layer_types", None):
        config.layer_types = [types[i] for i in own]
    weights = hashlib.sha256(f"{base.fingerprint} layers {own}".encode()).hexdigest()
    return replace(base, fingerprint=weights)


def _renumber_layer(layer: nn.Module, number: int) -> None:
    """Where a layer keeps its keys and values goes by its number."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            vars(module)["layer_idx"] = number
