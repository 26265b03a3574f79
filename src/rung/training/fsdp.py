"""Fully sharded training: each rank holds some rows of every weight and gathers a layer while it computes with it.

Layers are sharded by torch's FSDP2 (`fully_shard`; Zhao et al. 2023): one layer at a time is gathered, in the forward
and in the backward pass, and each rank receives the summed gradient of its own rows. Trained weights outside the layers
(embeddings and head) are gathered when they are read. Memory per rank falls with the number of ranks; the cost is one
gather per layer and pass, and that all ranks must run equally many passes. `Trainer.shard` calls this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

_BY_ROWS = (Shard(0),)


def shard_model(model: nn.Module, layers: Sequence[nn.Module], replicated: Iterable[nn.Parameter]) -> None:
    """Shard the weights of the layers and the trained matrices outside them by rows.

    Parameters in `replicated` stay whole, as do vectors and frozen weights outside the layers: their gradients are
    summed as for replicas (`World.sum_gradients`).
    """
    trunk: nn.Module = getattr(model, str(model.base_model_prefix))
    ignored = set(replicated)
    for parameter in model.parameters():  # frozen linears may lie by columns (`models/weight_layout.py`)
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.get_world_size(),))
    for layer in layers:
        _shard(layer, mesh, ignored & set(layer.parameters()))
    # the root module gets FSDP hooks too, but none of its own weights: they are handled below or replicated
    outside = {p for p in trunk.parameters() if p in ignored or not isinstance(p, DTensor)}
    _shard(trunk, mesh, outside)
    shards: dict[int, nn.Parameter] = {}  # by identity: tied embeddings and head stay tied
    for module, name, parameter in _parameters(model):
        if isinstance(parameter, DTensor) or parameter in ignored or parameter.dim() < 2 or not parameter.requires_grad:
            continue
        if id(parameter) not in shards:
            # src_data_rank=None: every rank has the full weight already, nothing is sent
            shard = distribute_tensor(parameter.detach(), mesh, _BY_ROWS, src_data_rank=None)
            shards[id(parameter)] = nn.Parameter(shard)
        _gather_on_read(module, name, shards[id(parameter)])


def gather_full(model: nn.Module, *, keep: bool) -> None:
    """Gather the trained weights into host memory where `keep` is set; other ranks are left with empty tensors."""
    gathered_parameters: dict[int, nn.Parameter] = {}
    for module, name, parameter in _parameters(model):
        if not isinstance(parameter, DTensor) or not parameter.requires_grad:
            continue
        if id(parameter) not in gathered_parameters:
            full_tensor = _gather_parameter(parameter).detach()  # a collective: also on ranks that discard it
            gathered_parameters[id(parameter)] = nn.Parameter(full_tensor.cpu() if keep else full_tensor.new_empty(0))
        # not setattr: `_gather_on_read` has put a property without a setter in place of the attribute
        module._parameters[name] = gathered_parameters[id(parameter)]
        if (original_class := getattr(module, _ORIGINAL_CLASS, None)) is not None:
            module.__class__ = original_class


def local_tensor(parameter: nn.Parameter) -> nn.Parameter:
    """The part of a parameter on this rank, all of it or its rows, sharing the same memory."""
    return nn.Parameter(_local_shard(parameter).detach()) if isinstance(parameter, DTensor) else parameter


def local_rows(parameter: Tensor) -> slice | None:
    """The rows of a parameter that this rank holds; None for a replicated parameter."""
    if not isinstance(parameter, DTensor):
        return None
    row_count = len(parameter)
    # torch's rule for Shard(0): equal chunks rounded up; the last ranks may hold fewer rows or none
    rows_per_rank = -(-row_count // parameter.device_mesh.size())
    start = min(parameter.device_mesh.get_rank() * rows_per_rank, row_count)
    return slice(start, min(start + rows_per_rank, row_count))


def digests(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, int]:
    """An exact 64-bit hash of each tensor, of a sharded one over the rows of this rank."""
    local_tensors = ((name, _local_shard(tensor).detach()) for name, tensor in parameters)
    # Apple's GPUs have no such kernel; their memory is that of the processor.
    hashable = ((name, t.cpu() if t.device.type == "mps" else t) for name, t in local_tensors if t.numel())
    return {name: int(torch.hash_tensor(tensor).item()) for name, tensor in hashable}


_ORIGINAL_CLASS = "_class_before_sharding"


def _shard(module: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter]) -> None:
    sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    sharded.set_gradient_divide_factor(1.0)  # losses are divided by the count of the whole step already
    sharded.set_force_sum_reduction_for_comms(True)  # gloo has no averaging reduction


def _gather_on_read(module: nn.Module, name: str, shard: nn.Parameter) -> None:
    """Register a shard as the parameter; reading the attribute returns the gathered tensor."""

    def full_parameter(self: nn.Module) -> Tensor:
        return _gather_parameter(self._parameters[name])

    module._parameters[name] = shard
    # a property must be on the class, so this one module gets a subclass of its own; state dicts still see the shard
    original_class = type(module)
    attributes = {name: property(full_parameter), _ORIGINAL_CLASS: original_class}
    module.__class__ = type(original_class.__name__, (original_class,), attributes)


def _gather_parameter(tensor: Tensor | None) -> Tensor:
    """The full tensor of a shard, differentiable: the backward pass sums its gradient over ranks into the shards."""
    if not isinstance(tensor, DTensor):
        raise TypeError(f"no part of anything: {type(tensor)}")
    # Partial: the local gradients are addends of the sum, not copies of one gradient
    full_tensor: Tensor = tensor.full_tensor(grad_placements=[Partial()])
    return full_tensor


def _local_shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every registration of a parameter: tied weights appear once for each module."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            yield module, name, parameter
