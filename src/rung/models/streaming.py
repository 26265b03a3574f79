"""Bases whose linears stay in their file until a method has quantized them, one matrix at a time.

Loaded the usual way, a base would be on the device in full before it is quantized: 141 GB for 70 billion parameters.
Here the linears of the layers stay on the host, in the dtype of the file (safetensors files are mapped, so the system
can reclaim their memory), while everything else goes to the device. Such a base cannot compute until `clear_placement`.
`models/load.py` calls `leave_linears_stored`, `methods/qlora.py` takes the weights with `stored_linear`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rung.models.targets import layer_number


class LinearPlacement(NamedTuple):
    """Where the stored linears of a base belong, and in which dtypes."""

    device: torch.device
    loaded: torch.dtype
    """Dtype of a base that is loaded as a whole; linears are rounded to it first, so that both ways give one model."""
    compute: torch.dtype


_ATTRIBUTE = "_linear_placement"


def placement_of(model: nn.Module) -> LinearPlacement | None:
    """The placement of linears that are still stored; None for a base that can compute."""
    return getattr(model, _ATTRIBUTE, None)


def layer_linears(model: nn.Module) -> dict[str, Any]:
    """The linears of all layers by name."""
    named = model.named_modules()
    return {name: m for name, m in named if type(m) in (nn.Linear, Conv1D) and layer_number(f"{name}.") is not None}


def leave_linears_stored(model: PreTrainedModel, placement: LinearPlacement) -> None:
    """Move everything but the linears of the layers to the device and dtype of the placement."""
    stored = {id(p) for linear in layer_linears(model).values() for p in linear.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in stored:
            parameter.data = _placed(parameter.data, placement)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            is_narrow = buffer.dtype in (torch.float16, torch.bfloat16)
            setattr(module, name, buffer.to(placement.device, placement.loaded if is_narrow else buffer.dtype))
    setattr(model, _ATTRIBUTE, placement)


def stored_linear(model: nn.Module, tensor: Tensor | None) -> Tensor | None:
    """A weight or bias of a linear on its device, as a base loaded as a whole would hold it."""
    if tensor is None or (placement := placement_of(model)) is None:
        return tensor
    return _placed(tensor.detach(), placement)


def clear_placement(model: nn.Module) -> None:
    """Say that the model can compute: no linear is stored any more."""
    if placement_of(model) is not None:
        delattr(model, _ATTRIBUTE)


def _placed(tensor: Tensor, placement: LinearPlacement) -> Tensor:
    dtype = placement.loaded
    if placement.compute is not dtype:  # float32 vectors of a bfloat16 base stay float32 (`compute_in_float32`)
        dtype = torch.promote_types(tensor.dtype, dtype)
    return tensor.to(placement.device, dtype)
