"""AdamW with parameter groups, the learning-rate schedule, gradient clipping, and optimizer state on disk.

`OptimizerState` steps either replicated parameters or the local rows of sharded ones, and its checkpoint can be loaded
by another number of ranks. Own reading code instead of torch's sharded checkpoints keeps files in safetensors, so that
loading cannot run code. `Trainer` owns the object; `set_learning_rate` sets the rate before every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rung.config.training import OptimizerConfig
from rung.console import print_status
from rung.errors import PlanError
from rung.methods.protocol import TrainableSet, require_same_tensors
from rung.training.distributed import SINGLE_PROCESS, World
from rung.training.fsdp import digests, local_rows, local_tensor
from rung.training.memory_use import return_freed_memory
from rung.training.random_state import CARD_STATE, CPU_STATE, generator_states, restore_generators

NamedParameters = Mapping[str, nn.Parameter]


def make_optimizer(
    trainable: NamedParameters, config: OptimizerConfig, rate_factor: Callable[[str], float] = lambda _: 1.0
) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only. The rate is 0 until `set_learning_rate` sets it for a step."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        groups.setdefault((parameter.dim() > 1, rate_factor(name)), []).append(parameter)
    # sorted: a checkpoint numbers the moments by the order of groups, so a resume needs the same order
    parameter_groups = [
        {"params": members, "weight_decay": config.weight_decay if is_matrix else 0.0, "rate_factor": factor}
        for (is_matrix, factor), members in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    device = next((parameter.device for parameter in trainable.values()), torch.device("cpu"))
    # One kernel for all tensors on a card; torch's default there adds temporaries of four bytes a parameter.
    optimizer_class: Callable[..., torch.optim.Optimizer] = partial(torch.optim.AdamW, fused=is_fused(device))
    if config.state_dtype != "float32":
        optimizer_class = _eight_bit_adamw(device)
    return optimizer_class(parameter_groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon)


def is_fused(device: torch.device) -> bool:
    """Whether AdamW updates all tensors in one kernel; on a processor it updates them one by one."""
    return device.type == "cuda"


def _eight_bit_adamw(device: torch.device) -> Any:
    """The AdamW class of bitsandbytes with 8-bit state. Raises `PlanError` where the library is not installed."""
    try:
        bnb: Any = import_module("bitsandbytes.optim")
    except ImportError as error:
        where, hint = "training.optimizer.state_dtype", "pip install 'rung[quantized]'"
        raise PlanError("moments in 8 bits need bitsandbytes", where=where, given="int8", hint=hint) from error
    if device.type == "cuda":
        return bnb.PagedAdamW8bit
    print_status("moments in 8 bits, without paging: that needs a graphics card")
    return bnb.AdamW8bit


def count_trained(optimizer: torch.optim.Optimizer, among: Collection[int] | None = None) -> int:
    """Elements of the optimizer's parameters that require gradients; `among` limits them to these ids."""
    parameters = (p for p in _numbered_parameters(optimizer) if p.requires_grad)
    return sum(p.numel() for p in parameters if among is None or id(p) in among)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group: the rate of this step times the factor of the group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]


def train_only(optimizer: torch.optim.Optimizer, trainable: NamedParameters, selection: TrainableSet) -> None:
    """Train only the selected parameters: freeze all others and drop their moments, whose memory would pile up."""
    for name, parameter in trainable.items():
        is_trained = name in selection.names
        parameter.requires_grad_(is_trained)
        if selection.restart_moments or not is_trained:
            optimizer.state.pop(parameter, None)


def learning_rate_at(step: int, *, total: int, peak: float, schedule: str, warmup: float) -> float:
    """Learning rate of the step counted from 0.

    It rises linearly over ceil(warmup * total) steps, the first of them already above 0, and then follows the schedule
    over the steps that remain: cosine and linear would reach 0 one step after the last.
    """
    # (step + 1): a rate of 0 would waste the first step
    warmup_steps = math.ceil(warmup * total)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    return peak * (0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress)


WEIGHTS, MOMENTS = "weights.safetensors", "optimizer.safetensors"


@dataclass
class OptimizerState:
    """Optimizer, gradients and their checkpoints.

    `parameters` returns the trained parameters by name, `factor` the learning rate of each relative to that of the run.
    """

    # a function, because sharding and gathering replace the parameter objects of the model
    parameters: Callable[[], Mapping[str, nn.Parameter]]
    config: OptimizerConfig
    factor: Callable[[str], float]
    world: World = SINGLE_PROCESS
    rows: dict[str, slice] = field(default_factory=dict)
    """The rows on this rank, by name; only sharded parameters are listed."""

    def __post_init__(self) -> None:
        self._local_shards: dict[str, nn.Parameter] = {}
        self.optimizer = make_optimizer(self.local_parameters, self.config, self.factor)

    @property
    def local_parameters(self) -> dict[str, nn.Parameter]:
        """The local part of each parameter, in the memory of the model."""
        return {**self.parameters(), **self._local_shards}

    def shard_parameters(self) -> None:
        """Switch to the local rows after the model was sharded. Moments start from zero."""
        parameters = self.parameters()
        self.rows = {name: rows for name, p in parameters.items() if (rows := local_rows(p)) is not None}
        self._local_shards = {name: local_tensor(parameters[name]) for name in self.rows}
        self.optimizer = make_optimizer(self.local_parameters, self.config, self.factor)

    def trained_count(self) -> int:
        """Parameters in the optimizer that take gradients; those that are shared in parts are counted on all ranks."""
        sharded = {id(parameter) for parameter in self._local_shards.values()}
        in_parts = count_trained(self.optimizer, sharded)
        replicated = count_trained(self.optimizer) - in_parts
        return replicated + int(self.world.sum_values([in_parts])[0])

    def zero_grad(self) -> None:
        """Discard all gradients."""
        for parameter in (*self.parameters().values(), *self._local_shards.values()):
            parameter.grad = None  # not zeros: freed, and AdamW skips the parameter

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters().values())).device

    def release(self) -> None:
        """Free gradients and moments after the last step: writing the result needs memory of its own."""
        self.zero_grad()
        self.optimizer.state.clear()
        return_freed_memory()

    def reduce_and_clip(self, max_norm: float | None) -> Tensor:
        """Sum gradients over ranks and clip their global norm to `max_norm`. Returns the norm before clipping."""
        parameters = self.parameters()
        for name, shard in self._local_shards.items():
            gradient = parameters[name].grad  # FSDP has summed it over ranks in the backward pass
            shard.grad = gradient.to_local() if isinstance(gradient, DTensor) else None
        replicas = [p for name, p in parameters.items() if name not in self._local_shards]
        self.world.sum_gradients(replicas)
        if not self._local_shards:
            return torch.nn.utils.clip_grad_norm_(replicas, max_norm or math.inf)
        sharded_squares = self.world.sum_values([_squared_norm(self._local_shards.values())])[0]
        # shards are disjoint, so their squares add up over ranks; replicas count once
        norm = math.sqrt(sharded_squares + _squared_norm(replicas))
        if max_norm is not None and norm > max_norm:
            for parameter in (*replicas, *self._local_shards.values()):
                if parameter.grad is not None:
                    parameter.grad.mul_(max_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
        return torch.tensor(norm, dtype=torch.float64)

    def step(self, rate: float) -> None:
        """One optimizer step at this rate, multiplied by the factor of each group."""
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()

    def replica_digests(self) -> dict[str, int]:
        """Hashes of the replicated parameters, which must be equal on all ranks."""
        return digests((name, p) for name, p in self.parameters().items() if name not in self.rows)

    def save(self, folder: Path) -> None:
        """Write weights, moments and the RNG state. Ranks other than 0 write only their rows of sharded tensors."""
        folder.mkdir(exist_ok=True)
        local_parameters, is_rank0 = self.local_parameters, self.world.is_rank0
        # more ranks than rows leave some ranks an empty shard, and `write_folder` refuses empty tensors
        is_saved = {name: p.numel() > 0 if name in self.rows else is_rank0 for name, p in local_parameters.items()}
        weights = {name: p.detach() for name, p in local_parameters.items() if is_saved[name]}
        save_file(_cpu_tensors(weights), folder / WEIGHTS)
        names_by_id = {id(parameter): name for name, parameter in local_parameters.items()}
        # by index as in torch's own state dict: the groups of a resumed run are built in the same order
        moments: dict[str, Tensor] = generator_states(self.device) if is_rank0 else {}
        for index, parameter in enumerate(_numbered_parameters(self.optimizer)):
            is_sharded = names_by_id[id(parameter)] in self.rows
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensor = torch.as_tensor(value).detach()
                # scalars such as the step count are equal on all ranks: rank 0 saves them
                if tensor.numel() > 0 if is_sharded and tensor.dim() else is_rank0:
                    moments[f"{index}.{name}"] = tensor
        save_file(_cpu_tensors(moments), folder / MOMENTS)

    @torch.no_grad()
    def load_weights(self, folder: Path) -> None:
        """Restore the weights. Raises `CheckpointError` where names or shapes differ."""
        stored, parameters = _CheckpointTensors(folder, WEIGHTS), self.parameters()
        # meta tensors: shapes are compared without reading the file
        shapes = {name: torch.empty(stored.shape(name), device="meta") for name in stored.names()}
        require_same_tensors(parameters, shapes, "checkpoint")
        for name, parameter in self.local_parameters.items():
            parameter.copy_(stored.read(name, self.rows.get(name)))

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, also with another number of ranks."""
        self.load_weights(folder)
        stored = _CheckpointTensors(folder, MOMENTS)
        states = {name: stored.read(name) for name in stored.names() & {CPU_STATE, CARD_STATE}}
        restore_generators(states, self.device)
        parameters, names = _numbered_parameters(self.optimizer), {id(p): n for n, p in self.local_parameters.items()}
        for parameter in parameters:
            self.optimizer.state[parameter] = {}
        for key in sorted(stored.names() - states.keys()):
            index, name = key.split(".", 1)
            parameter = parameters[int(index)]
            rows = self.rows.get(names[id(parameter)]) if stored.shape(key) else None
            value = stored.read(key, rows)
            # torch counts steps in a float tensor (on the device if the update is fused), bitsandbytes in a number
            if name == "step" and value.dtype is torch.int64:
                self.optimizer.state[parameter][name] = int(value)
            else:
                on_cpu = name == "step" and not is_fused(parameter.device)
                self.optimizer.state[parameter][name] = value if on_cpu else value.to(parameter.device)


class _CheckpointTensors:
    """Tensors of a checkpoint: whole, or split by rows over the folders of several ranks, in rank order."""

    def __init__(self, folder: Path, file: str) -> None:
        folders = sorted(folder.glob("part-*")) or [folder]
        self.files: list[Any] = [safe_open(rank_folder / file, "pt") for rank_folder in folders]
        self.files_by_name: dict[str, list[int]] = {}
        for index, opened_file in enumerate(self.files):
            for name in opened_file.keys():
                self.files_by_name.setdefault(name, []).append(index)

    def names(self) -> set[str]:
        return set(self.files_by_name)

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [tuple(self.files[n].get_slice(name).get_shape()) for n in self.files_by_name[name]]
        return (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor or some of its rows; only those bytes are read, so a rank never loads the full tensor."""
        if rows is None and len(self.files_by_name[name]) == 1:
            tensor: Tensor = self.files[self.files_by_name[name][0]].get_tensor(name)
            return tensor
        rows = slice(0, self.shape(name)[0]) if rows is None else rows
        pieces, offset = [], 0
        for index in self.files_by_name[name]:
            stored = self.files[index].get_slice(name)
            stored_rows = stored.get_shape()[0]
            start, stop = max(rows.start - offset, 0), min(rows.stop - offset, stored_rows)
            if start < stop:
                pieces.append(stored[start:stop])
            offset += stored_rows
        # a rank without rows of this tensor gets an empty one of the right dtype and width
        return torch.cat(pieces) if pieces else self.files[self.files_by_name[name][0]].get_tensor(name)[:0]


def _squared_norm(parameters: Iterable[nn.Parameter]) -> float:
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    # one read of the device for all of them, without copies in float64
    norms = torch._foreach_norm(gradients, 2, torch.float64)
    return float(torch.stack(norms).square().sum())


def _cpu_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses views that are not contiguous
    return {name: value.contiguous().cpu() for name, value in tensors.items()}


def _numbered_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
