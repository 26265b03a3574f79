"""What processes forked by a test do: the same steps in float64, each with its share of the rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from builders import documents, policy_of
from models import tiny_model
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import PreferenceConfig, SftConfig
from rung.config.training import TrainingConfig
from rung.methods.registry import attach_method
from rung.models.fused_modules import install_fused_forwards
from rung.objectives.registry import OBJECTIVES
from rung.training import distributed
from rung.training.distributed import World, join_process_group
from rung.training.run_folder import RunFolder
from rung.training.trainer import Trainer
from rung.types import Example


def rows(objective: str) -> list[list[Example]]:
    """Of very different lengths, some of them weighed, the last window smaller than four processes."""
    found = documents(count=38, shared=5)
    if objective == "sft":
        return [[e] for e in found]
    pairs = [found[i : i + 2] for i in range(0, len(found), 2)]
    return [
        [replace(e, row=number, score=float(1 - place)) for place, e in enumerate(pair)]
        for number, pair in enumerate(pairs)
    ]


def train(arguments: list[str]) -> None:
    """Ten steps; weights, losses and gradient norms go to a file, from the process that writes."""
    method, objective, output, mutation, *sharded = arguments
    torch.set_default_dtype(torch.float64)
    with join_process_group() as world:
        _mutate(mutation)
        _steps(world, method, objective, Path(output), sharded=bool(sharded))


def _steps(world: World, kind: str, aim: str, output: Path, *, sharded: bool) -> None:
    model = tiny_model(dtype=torch.float64)
    install_fused_forwards(model)
    upper = kind == "lora-upper"  # what lies below does not move, and is computed once a document
    method = attach_method(model, METHOD_CONFIGS["lora"](layers=(1,)) if upper else METHOD_CONFIGS[kind](), seed=0)
    with torch.no_grad():  # away from the start, where half of LoRA has no gradient
        for parameter in method.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    install_fused_forwards(model, method.linear_params)
    config = SftConfig() if aim == "sft" else PreferenceConfig(beta=0.5)
    folder = RunFolder(output, {"gates": []}, writes=world.is_rank0)
    output.mkdir(parents=True, exist_ok=True)
    policy = policy_of(model, method)
    if kind == "full":  # which leaves no base to compare with
        policy.reference = policy_of(tiny_model(dtype=torch.float64))
    trainer = Trainer(
        policy,
        method,
        objective=OBJECTIVES[config.kind](config),
        config=TrainingConfig(examples_per_step=9, epochs=10, max_steps=10, eval_every=5),
        peak_rate=1e-3,
        budget=120,
        seed=5,
        folder=folder,
        world=world,
        in_parts=bool(sharded),
    )
    data = rows(aim)
    trainer.run(data[:-6], data[-6:])
    if sharded:
        held = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
        (output / f"held.{world.rank}").write_text(str(sum(map(torch.Tensor.numel, held))))
    trainer.gather_model()
    folder.close()
    if world.is_rank0:
        save_file({n: p.detach().contiguous() for n, p in trainer.trainable.items()}, output / "weights.safetensors")


def _mutate(how: str) -> None:
    """Wrong ways to share a step."""
    if how == "counts of its own":
        distributed.World.sum_values = lambda self, values: list(values)  # type: ignore[method-assign]
    elif how == "no sum of gradients":
        distributed.World.sum_gradients = lambda self, parameters: None  # type: ignore[method-assign]
    elif how != "none":
        raise ValueError(how)


def other_size(arguments: list[str]) -> None:
    """A group that is not the one that was announced."""
    (output,) = arguments
    torch.distributed.get_world_size = lambda *_: 1  # type: ignore[assignment]
    try:
        with join_process_group():
            said = "started"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    Path(output).with_suffix(f".{distributed.os.environ['RANK']}").write_text(json.dumps(said))
