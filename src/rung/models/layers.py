"""Running a part of a model's layers: record the input of a layer, start from a stored input, recompute, drop layers.

A module with another forward replaces a layer in the model's list, so transformers' loop still computes masks and
positions. Cutting the loop out would need code for each architecture. `models/policy.py` uses it for cached hidden
states and recomputation, training for the lowest trainable layer, `models/load.py` for students.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rung.config.layers import student_layers
from rung.config.model import StudentLayers
from rung.errors import PlanError
from rung.models.targets import layer_number

if TYPE_CHECKING:
    from rung.models.base_model import BaseModel


# Names of the list of layers in all supported architectures.
_LAYER_LIST_NAMES = ("layers", "h", "blocks")


class _LayerReplacement(nn.Module):
    """Replaces a layer in the loop, with another forward; attributes that the loop reads come from the original."""

    def __init__(self, original: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        # Not a submodule: its parameters must not be counted twice.
        self.__dict__.update(original=original, forward=forward)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)


def _skipped(original: nn.Module) -> nn.Module:
    return _LayerReplacement(original, lambda hidden_states, *args, **kwargs: hidden_states)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of the model's trunk. Raises `PlanError` if they are not found."""
    return _layer_list(model)[2]


def start_from_layer(model: nn.Module, layer: int, states_TH: Tensor) -> AbstractContextManager[None]:
    """Within the context the layers below `layer` do not run; its input is `states_TH`."""

    def feed(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The dtype of the loop: cached states may be stored in a narrower one.
        return states_TH[None].to(hidden_states.dtype)

    def substitute(i: int, original: nn.Module) -> nn.Module:
        if i == layer - 1:
            return _LayerReplacement(original, feed)
        return original if i >= layer else _skipped(original)

    return _replaced_layers(model, substitute)


@contextmanager
def record_layer_input(model: nn.Module, layer: int) -> Iterator[Callable[[], Tensor]]:
    """Within the context only the layers below `layer` run; the yielded function returns its input, [T, H]."""
    outputs: list[Tensor] = []

    def substitute(i: int, original: nn.Module) -> nn.Module:
        def record(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            outputs.append((out[0] if isinstance(out, tuple) else out)[0])
            return out

        if i == layer - 1:
            return _LayerReplacement(original, record)
        return original if i < layer else _skipped(original)

    with _replaced_layers(model, substitute):
        yield lambda: outputs[-1]


def recompute_layers(
    model: nn.Module, layer_numbers: range, offloaded: range = range(0)
) -> AbstractContextManager[None]:
    """Within the context these layers store only their input and recompute in the backward pass (Chen et al. 2016).

    The inputs of `offloaded` layers among them are stored in the memory of the host.
    """

    def substitute(i: int, original: nn.Module) -> nn.Module:
        # A replaced layer does not run in full, so there is nothing to recompute.
        replaced = i not in layer_numbers or isinstance(original, _LayerReplacement)
        forward: Callable[..., Any] = partial(checkpoint, original, use_reentrant=False)
        if i in offloaded:
            forward = partial(_store_input_on_host, forward)
        return original if replaced else _LayerReplacement(original, forward)

    return _replaced_layers(model, substitute)


def _store_input_on_host(forward: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call a checkpointed layer; its input is copied to the host, and back when the layer is computed again."""
    # not the tensor itself, which the hooks would keep alive
    address, shape = hidden_states.data_ptr(), hidden_states.shape

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        # the other tensors that the layer takes (angles, positions) are those of all layers
        if tensor.data_ptr() != address or tensor.shape != shape:
            return tensor
        # pinned: the copies run while the card computes, in the order of its own queue
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return forward(hidden_states, *args, **kwargs)


def lowest_trainable_layer(model: nn.Module, trainable: Iterable[str]) -> int:
    """The lowest layer with a trainable parameter; the number of layers if only the output head is trained.

    0 if anything else outside the layers is trained: embeddings precede all layers, and so do virtual tokens, which are
    not part of the model. 0 also if no list of layers is found.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    head_ids = {id(p) for p in head.parameters()} if head is not None else set()
    embedding_ids = {id(p) for p in model.get_input_embeddings().parameters()}  # type: ignore[operator]
    parameters = dict(model.named_parameters())
    if _find_layer_list(model) is None:
        return 0
    lowest = len(layers_of(model))
    for name in trainable:
        number = layer_number(f".{name}")
        if number is not None:
            lowest = min(lowest, number)
        # A tied head is the embedding as well, so training it changes the input of layer 0.
        elif name not in parameters or id(parameters[name]) not in head_ids or id(parameters[name]) in embedding_ids:
            return 0
    return lowest


@contextmanager
def _replaced_layers(model: nn.Module, substitute: Callable[[int, nn.Module], nn.Module]) -> Iterator[None]:
    owner, name, layers = _layer_list(model)
    setattr(owner, name, nn.ModuleList(substitute(i, original) for i, original in enumerate(layers)))
    try:
        yield
    finally:
        setattr(owner, name, layers)


def _layer_list(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    if (layer_list := _find_layer_list(model)) is None:
        raise PlanError("this model's layers are not where Rung looks for them", allowed=", ".join(_LAYER_LIST_NAMES))
    return layer_list


def _find_layer_list(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The outermost list of layers, the module that owns it, and its attribute name (OPT: in `decoder`)."""
    trunk: nn.Module = getattr(model, str(model.base_model_prefix))
    for owner in trunk.modules():
        for name in _LAYER_LIST_NAMES:
            if isinstance(layers := getattr(owner, name, None), nn.ModuleList):
                return owner, name, layers
    return None


def drop_layers(base: BaseModel, layers: StudentLayers) -> BaseModel:
    """Keep only these layers, plus embeddings, final norm and head. Changes `base.model` in place."""
    config = base.model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        reason = "its layers know their own number, so taking some out would change the others"
        raise PlanError(reason, where="model.student_of", given=config.model_type)
    owner, name, all_layers = _layer_list(base.model)
    kept_numbers = student_layers(layers, len(all_layers))
    kept_layers = [all_layers[i] for i in kept_numbers]
    for number, layer in enumerate(kept_layers):
        # The number by which a layer finds its keys and values in the cache.
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                vars(module)["layer_idx"] = number
    setattr(owner, name, nn.ModuleList(kept_layers))
    config.num_hidden_layers = len(kept_layers)
    # Sliding-window and full-attention layers alternate in some models; the list must match the remaining layers.
    if layer_types := getattr(config, "layer_types", None):
        config.layer_types = [layer_types[i] for i in kept_numbers]
    weights_hash = hashlib.sha256(f"{base.fingerprint} layers {kept_numbers}".encode()).hexdigest()
    return replace(base, fingerprint=weights_hash)
