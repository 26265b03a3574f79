"""What processes forked by a test do: the same steps in float64, each with its share of the rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from builders import documents, policy_of
from models import tiny_model
from rung.config.method import METHOD_CONFIGS
from rung.config.model import ModelConfig
from rung.config.objective import PreferenceConfig, SftConfig
from rung.config.training import TrainingConfig
from rung.methods.qlora import dense_weight, quantized_tensors
from rung.methods.registry import attach_method
from rung.models import weight_files
from rung.models.fused_modules import install_fused_forwards
from rung.models.load import load_base
from rung.models.packing import pack
from rung.models.policy import Policy
from rung.objectives.registry import OBJECTIVES
from rung.planning.recomputation import CPU_DOCUMENT_BYTES, DocumentLimit
from rung.runs.load import load_base_in_parts
from rung.training import distributed
from rung.training.distributed import World, join_process_group
from rung.training.fsdp import digests, gather, shard_policy
from rung.training.run_folder import RunFolder
from rung.training.step import CalibrationBatch
from rung.training.trainer import Trainer
from rung.types import Example

LAYER_BYTES = 4 * 2 * (32 + 32 + 16 + 48)
"""What a layer of the tiny model stores of a token, as it is planned."""


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
    method, objective, output, mutation, *how = arguments
    if not method.endswith("-bfloat16"):
        torch.set_default_dtype(torch.float64)
    with join_process_group() as world:
        _mutate(mutation)
        _steps(world, method, objective, Path(output), *how)


def _steps(world: World, kind: str, aim: str, output: Path, how: str = "replicas") -> None:
    """`how`: replicas, sharded, or recomputing: sharded, and rows of over 20 tokens (a pair: 45) recompute layers."""
    sharded, recomputes = how != "replicas", how == "recomputing"
    packing: Any = "none" if recomputes else "tree"
    limit = 20 if aim == "sft" else 45
    compute = torch.bfloat16 if kind.endswith("-bfloat16") else torch.float32
    kind = kind.removesuffix("-bfloat16")
    dtype = torch.float32 if compute is torch.bfloat16 else torch.float64
    model = tiny_model(dtype=dtype)
    install_fused_forwards(model)
    upper = kind == "lora-upper"  # what lies below does not move, and is computed once a document
    config_of_method = METHOD_CONFIGS["lora"](layers=(1,)) if upper else METHOD_CONFIGS[kind]()
    if kind == "qlora":
        _multiply_in_float64()
        torch.set_default_dtype(torch.float32)  # of the tables by which bitsandbytes quantizes
    method = attach_method(model, config_of_method, seed=0)
    torch.set_default_dtype(dtype)
    with torch.no_grad():  # away from the start, where half of LoRA has no gradient
        for parameter in method.trainable().values():
            parameter.data = parameter.data.to(dtype)  # of a quantized base peft takes float32
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    install_fused_forwards(model, method.linear_params)
    config = SftConfig() if aim == "sft" else PreferenceConfig(beta=0.5)
    folder = RunFolder(output, {"gates": []}, writes=world.is_rank0)
    output.mkdir(parents=True, exist_ok=True)
    if kind == "qlora":
        (output / f"quantized.{world.rank}").write_text(json.dumps(digests(quantized_tensors(model))))
    policy = policy_of(model, method, compute=compute)
    if kind == "full":  # which leaves no base to compare with
        policy.reference = policy_of(tiny_model(dtype=dtype), compute=compute)
    if sharded:
        shard_policy(policy, method, fused=True)
        world = replace(world, sharded=True)
    trainer = Trainer(
        policy,
        method,
        objective=OBJECTIVES[config.kind](config),
        config=TrainingConfig(examples_per_step=9, epochs=10, max_steps=10, eval_every=5, packing=packing),
        peak_rate=1e-3,
        budget=120,
        seed=5,
        folder=folder,
        world=world,
        document_limit=DocumentLimit(limit * (1 if upper else 2) * LAYER_BYTES if recomputes else CPU_DOCUMENT_BYTES),
    )
    recomputed, layers_of = list[int](), policy.layers_to_recompute

    def note(tokens: int) -> range:
        recomputed.append(len(layers_of(tokens)))
        return layers_of(tokens)

    policy.layers_to_recompute = note
    policy.layers_to_offload = lambda tokens: layers_of(tokens)[:1]  # as a card does for still longer documents
    data = rows(aim)
    trainer.run(data[:-6], data[-6:])
    if sharded:
        held = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
        (output / f"held.{world.rank}").write_text(str(sum(map(torch.Tensor.numel, held))))
        (output / f"recomputed.{world.rank}").write_text(json.dumps(recomputed))
    whole = {name: gather(parameter).contiguous() for name, parameter in trainer.trainable.items()}
    folder.close()
    if world.is_rank0:
        save_file(whole, output / "weights.safetensors")


def _multiply_in_float64() -> None:
    """bitsandbytes' products know no float64: the same numbers, dequantized, by torch's."""
    import bitsandbytes

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, dense_weight(self).to(x.dtype))

    bitsandbytes.nn.Linear4bit.forward = forward


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


def load_in_parts(arguments: list[str]) -> None:
    """Load each case whole and in parts: log-probabilities, starts, and the bytes that this process reads."""
    bases, output, cases = Path(arguments[0]), Path(arguments[1]), json.loads(arguments[2])
    found: dict[str, Any] = {}
    with join_process_group() as world:
        for case, (shape, settings) in cases.items():
            kind = "full" if case == "full" else "lora"
            found[case] = _loaded(world, bases / shape, METHOD_CONFIGS[kind](**settings))
        output.with_suffix(f".{world.rank}").write_text(json.dumps(found))


def _loaded(world: World, folder: Path, config: Any) -> dict[str, Any]:
    batch = pack(documents(count=6), 10_000)[0]
    logprobs, starts, fused = [], [], []
    read_bytes = 0
    read = weight_files._read_into

    def note(stream: Any, part: torch.Tensor, source: Any) -> None:
        nonlocal read_bytes
        read_bytes += part.nbytes
        read(stream, part, source)

    weight_files._read_into = note
    for in_parts in (False, True):
        model = ModelConfig(name=str(folder), dtype="float32")
        base = load_base_in_parts(model, world, trains_base=config.kind == "full") if in_parts else load_base(model)
        method = attach_method(base.model, config, seed=0)
        policy = Policy(base, method)
        if in_parts:
            shard_policy(policy, method, fused=True)
        objective = OBJECTIVES["sft"](SftConfig())
        if method.sample_size:
            method.calibrate(CalibrationBatch(policy, objective, documents(count=6), 200))
        trainable = {**method.trainable(), **{f"offset {i}": p for i, p in enumerate(getattr(method, "_offsets", ()))}}
        starts.append({name: p.detach() for name, p in trainable.items() if not isinstance(p, DTensor)})
        logprobs.append(policy.logprobs(batch).detach())
        fused.append([name for name, m in base.model.named_modules() if "forward" in vars(m)])
    weight_files._read_into = read
    layers = [p for n, p in base.model.named_parameters() if ".0." in n or ".1." in n or config.kind == "full"]
    local = [p.to_local() for p in layers if isinstance(p, DTensor)]
    return {
        "logprobs": float((logprobs[0] - logprobs[1]).abs().max()),
        "starts": max([float((starts[0][n] - p).abs().max()) for n, p in starts[1].items()] or [0.0]),
        "same fused": fused[0] == fused[1] and bool(fused[0]),
        "read": read_bytes,
        "local": sum(p.nbytes for p in local),
        "whole": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }
