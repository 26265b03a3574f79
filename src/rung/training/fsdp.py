"""Fully sharded training: each rank holds some rows of every weight and gathers a layer while it computes with it.

Layers are sharded by torch's FSDP2 (`fully_shard`; Zhao et al. 2023): one layer at a time is gathered, in the forward
and in the backward pass, and each rank receives the summed gradient of its own rows. Trained weights outside the layers
(embeddings and head) are gathered when they are read. Memory per rank falls with the number of ranks; the cost is one
gather per layer and pass, and that all ranks must run equally many passes. A base whose weights are still in its files
(`models/weight_files.py`) is read here, by each rank its own rows, so that nobody ever holds it whole. `runs/train.py`
calls `shard_policy`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from rung.errors import PlanError
from rung.methods.protocol import Method
from rung.models.fused_modules import LinearParamsOf, install_fused_forwards, plain_linear_params
from rung.models.layers import layers_of
from rung.models.policy import Policy
from rung.models.weight_files import StoredTensor, read_rows, stored_tensor

_BY_ROWS = (Shard(0),)


def shard_policy(policy: Policy, method: Method, *, fused: bool) -> None:
    """Shard the model of a policy with its method, and its reference if it is a model of its own.

    An adapter stays replicated. With `fused`, modules that were built without values get their fused forwards now.
    """
    models = [(policy, method.adapter_parameters(), method.linear_params)]
    if policy.reference is not None:
        models.append((policy.reference, [], plain_linear_params))
    for sharded, whole, params_of in models:
        was_in_files = any(parameter.is_meta for parameter in sharded.model.parameters())
        shard_model(sharded.model, whole, compute=sharded.base.compute_dtype)
        if was_in_files and fused:
            _fuse_layers(sharded.model, params_of)
    method.on_base_read()


def shard_model(model: nn.Module, replicated: Iterable[nn.Parameter], *, compute: torch.dtype = torch.float32) -> None:
    """Shard the weights of the layers and the trained matrices outside them by rows.

    Parameters in `replicated` stay whole, as do vectors and frozen weights outside the layers: their gradients are
    summed as for replicas (`World.sum_gradients`). Where the run computes in bfloat16, wider weights are gathered in
    bfloat16, and their gradients are summed in float32.
    """
    trunk: nn.Module = getattr(model, str(model.base_model_prefix))
    ignored, precision = set(replicated), _precision(compute)
    for parameter in model.parameters():  # frozen linears may lie by columns (`models/weight_layout.py`)
        parameter.data = parameter.data.contiguous()
    sources = (source for parameter in model.parameters() if (source := stored_tensor(parameter)) is not None)
    device = next((source.device for source in sources), next(model.parameters()).device)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in layers_of(model):
        _shard_layer(layer, mesh, ignored & set(layer.parameters()), precision)
    # the root module gets FSDP hooks too, but none of its own weights: they are handled below or replicated
    outside = {p for p in trunk.parameters() if p in ignored or not isinstance(p, DTensor)}
    _shard(trunk, mesh, outside, precision)
    shards: dict[int, nn.Parameter] = {}  # by identity: tied embeddings and head stay tied
    for module, name, parameter in _parameters(model):
        if isinstance(parameter, DTensor) or parameter in ignored or parameter.dim() < 2 or not parameter.requires_grad:
            continue
        if id(parameter) not in shards:
            shards[id(parameter)] = nn.Parameter(_shard_of(parameter, mesh))
        _gather_on_read(module, name, shards[id(parameter)], precision.param_dtype)


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor of a part; a collective that all ranks call for the same tensors. Any other tensor as it is."""
    return _gather_parameter(tensor).detach() if isinstance(tensor, DTensor) else tensor.detach()


def local_tensor(parameter: nn.Parameter) -> nn.Parameter:
    """The part of a parameter on this rank, all of it or its rows, sharing the same memory."""
    return nn.Parameter(_local_shard(parameter).detach()) if isinstance(parameter, DTensor) else parameter


def local_rows(parameter: Tensor) -> slice | None:
    """The rows of a parameter that this rank holds; None for a replicated parameter."""
    if not isinstance(parameter, DTensor):
        return None
    return _rows_of_rank(len(parameter), parameter.device_mesh)


def digests(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """An exact 64-bit hash of each tensor, of a sharded one over the rows of this rank."""
    local_tensors = ((name, _local_shard(tensor).detach()) for name, tensor in parameters)
    # Apple's GPUs have no such kernel; their memory is that of the processor.
    hashable = ((name, t.cpu() if t.device.type == "mps" else t) for name, t in local_tensors if t.numel())
    return {name: int(torch.hash_tensor(tensor).item()) for name, tensor in hashable}


def _precision(compute: torch.dtype) -> MixedPrecisionPolicy:
    """What is gathered and summed in which dtype; without bfloat16 everything in the dtype of the weights."""
    if compute is not torch.bfloat16:
        return MixedPrecisionPolicy()
    # inputs are not cast: the residual stream stays as wide as it is in one process
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


def _shard(module: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter], precision: MixedPrecisionPolicy) -> None:
    sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored, mp_policy=precision)
    sharded.set_gradient_divide_factor(1.0)  # losses are divided by the count of the whole step already
    sharded.set_force_sum_reduction_for_comms(True)  # gloo has no averaging reduction


def _shard_layer(
    layer: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter], precision: MixedPrecisionPolicy
) -> None:
    """Shard a layer; rows of weights that are still in their files are read."""
    on_meta = [name for name, parameter in layer.named_parameters() if parameter.is_meta]
    sources = {name: _source_of(name, layer.get_parameter(name)) for name in on_meta}
    _shard(layer, mesh, ignored, precision)
    if sources:
        shards = {name: _read_shard(layer.get_parameter(name), source, mesh) for name, source in sources.items()}
        layer.load_state_dict(shards, strict=False, assign=True)  # FSDP watches this call and takes the new tensors


def _source_of(name: str, parameter: Tensor) -> StoredTensor:
    if (source := stored_tensor(parameter)) is None:
        summary = "a copy of a module of the layers cannot be trained whole where the layers are shared in parts"
        raise PlanError(summary, where="method.modules_to_save", given=name, hint="leave model.sharded out")
    return source


def _read_shard(parameter: Tensor, source: StoredTensor, mesh: DeviceMesh) -> DTensor:
    """The rows of this rank of a parameter, read from its file."""
    rows = _rows_of_rank(len(parameter), mesh)
    local = torch.empty((rows.stop - rows.start, *parameter.shape[1:]), dtype=parameter.dtype, device=source.device)
    read_rows(source, rows, local)
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(local, mesh, _BY_ROWS, run_check=False, shape=shape, stride=stride)


def _shard_of(parameter: nn.Parameter, mesh: DeviceMesh) -> DTensor:
    if (source := stored_tensor(parameter)) is not None:
        return _read_shard(parameter, source, mesh)
    # src_data_rank=None: every rank has the full weight already, nothing is sent
    return distribute_tensor(parameter.detach(), mesh, _BY_ROWS, src_data_rank=None)


def _fuse_layers(model: nn.Module, params_of: LinearParamsOf) -> None:
    """Install the fused forwards in every layer, gathered for it: whether they fit is decided with its weights."""
    known: dict[type, bool] = {}
    for layer in layers_of(model):
        sharded = cast(FSDPModule, layer)
        sharded.unshard()
        install_fused_forwards(layer, params_of, known)
        sharded.reshard()


def _gather_on_read(module: nn.Module, name: str, shard: nn.Parameter, dtype: torch.dtype | None) -> None:
    """Register a shard as the parameter; reading the attribute returns the gathered tensor."""

    def full_parameter(self: nn.Module) -> Tensor:
        return _gather_parameter(self._parameters[name], dtype)

    module._parameters[name] = shard
    # a property must be on the class, so this one module gets a subclass of its own; state dicts still see the shard
    original_class = type(module)
    module.__class__ = type(original_class.__name__, (original_class,), {name: property(full_parameter)})


def _gather_parameter(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """The full tensor of a shard, differentiable: the backward pass sums its gradient over ranks into the shards.

    With `dtype` it is sent in that dtype and widened again; gradients are sent in the dtype of the shard.
    """
    if not isinstance(tensor, DTensor):
        raise TypeError(f"no part of anything: {type(tensor)}")
    gathered = tensor.redistribute(placements=[Replicate()], forward_dtype=dtype, backward_dtype=dtype and tensor.dtype)
    # Partial: the local gradients are addends of the sum, not copies of one gradient
    full_tensor: Tensor = gathered.to_local(grad_placements=[Partial()])
    return full_tensor.to(tensor.dtype)


def _rows_of_rank(row_count: int, mesh: DeviceMesh) -> slice:
    # torch's rule for Shard(0): equal chunks rounded up; the last ranks may hold fewer rows or none
    rows_per_rank = -(-row_count // mesh.size())
    start = min(mesh.get_local_rank() * rows_per_rank, row_count)
    return slice(start, min(start + rows_per_rank, row_count))


def _local_shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every registration of a parameter: tied weights appear once for each module."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            yield module, name, parameter
