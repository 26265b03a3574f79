"""A model in parts: each process holds some rows of every weight, and gathers the rest where it computes with it.

Layers are split by torch's FSDP2 (`fully_shard`; Zhao et al. 2023): one at a time is whole, forwards and backwards, and
of its gradient each process gets the sum, at its own rows. What moves outside the layers, embeddings and head, is
gathered where it is read. Every process must run as many forwards and backwards as the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

_ROWS = (Shard(0),)


def shard_model(model: nn.Module, layers: Sequence[nn.Module], whole: Iterable[nn.Parameter]) -> None:
    """Leave each process its rows of the layers' weights, and of what moves outside them.

    Nothing of `whole` is split, nor are vectors and frozen weights outside the layers: their gradients are those of
    replicas, and are added up as ever.
    """
    trunk: nn.Module = getattr(model, str(model.base_model_prefix))
    kept = set(whole)
    mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.get_world_size(),))
    for layer in layers:
        _shard(layer, mesh, kept & set(layer.parameters()))
    outside = {p for p in trunk.parameters() if p in kept or not isinstance(p, DTensor)}
    _shard(trunk, mesh, outside)
    made: dict[int, nn.Parameter] = {}  # a head that is tied stays so
    for module, name, parameter in _parameters(model):
        if isinstance(parameter, DTensor) or parameter in kept or parameter.dim() < 2 or not parameter.requires_grad:
            continue
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(distribute_tensor(parameter.detach(), mesh, _ROWS, src_data_rank=None))
        _gather_on_read(module, name, made[id(parameter)])


def gather_full(model: nn.Module, *, keep: bool) -> None:
    """Make whole what moves, in the memory of the processor that keeps it; in the others nothing is left of it."""
    made: dict[int, nn.Parameter] = {}
    for module, name, parameter in _parameters(model):
        if not isinstance(parameter, DTensor) or not parameter.requires_grad:
            continue
        if id(parameter) not in made:
            gathered = _gather_parameter(parameter).detach()  # all take part
            made[id(parameter)] = nn.Parameter(gathered.cpu() if keep else gathered.new_empty(0))
        module._parameters[name] = made[id(parameter)]
        if (kind := getattr(module, _WITHOUT, None)) is not None:
            module.__class__ = kind


def local_tensor(parameter: nn.Parameter) -> nn.Parameter:
    """What this process holds of a parameter, in the same memory: all of it, or its rows."""
    return nn.Parameter(_local_shard(parameter).detach()) if isinstance(parameter, DTensor) else parameter


def local_rows(parameter: Tensor) -> slice | None:
    """Which rows of a parameter this process holds; None is all of it."""
    if not isinstance(parameter, DTensor):
        return None
    rows = len(parameter)
    each = -(-rows // parameter.device_mesh.size())
    start = min(parameter.device_mesh.get_rank() * each, rows)
    return slice(start, min(start + each, rows))


def digests(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, int]:
    """An exact 64-bit reduction of each tensor, of one in parts of what is held here."""
    own = ((name, _local_shard(p)) for name, p in parameters)
    return {name: int(torch.hash_tensor(p.detach()).item()) for name, p in own if p.numel()}


_WITHOUT = "_kind_without_parts"


def _shard(module: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter]) -> None:
    sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    sharded.set_gradient_divide_factor(1.0)  # the loss is divided by the count of the whole step already
    sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def _gather_on_read(module: nn.Module, name: str, part: nn.Parameter) -> None:
    """Hold a part under a parameter's name. Who reads it there gets the whole."""

    def whole(self: nn.Module) -> Tensor:
        return _gather_parameter(self._parameters[name])

    module._parameters[name] = part
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {name: property(whole), _WITHOUT: kind})


def _gather_parameter(tensor: Tensor | None) -> Tensor:
    """Gathered from all processes; its gradient is summed over them into the parts."""
    if not isinstance(tensor, DTensor):
        raise TypeError(f"no part of anything: {type(tensor)}")
    whole: Tensor = tensor.full_tensor(grad_placements=[Partial()])
    return whole


def _local_shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every place that holds one, those of tied weights all."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                yield module, name, parameter
