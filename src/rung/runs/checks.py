"""Checks before a run starts: its config against its data, the processes and the memory, before it has a folder.

A run that cannot work is refused while that costs seconds. Memory is planned from the run's own rows; the plan is an
estimate and may refuse a run that would just fit, for which there is `--beyond-memory`. The estimates themselves are in
`planning/memory.py`. `runs/train.py` calls these checks, the climb uses them to skip rungs that do not fit.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from rung.config.data import DataConfig
from rung.config.method import LotteryConfig
from rung.config.model import ModelConfig
from rung.config.objective import CodeRewardConfig
from rung.config.run import RunConfig
from rung.console import print_status
from rung.data.splits import Splits
from rung.data.token_store import TokenizedDataset
from rung.data.tokenize import PromptDataset
from rung.errors import ConfigError, DataError, PlanError
from rung.models.policy import Policy
from rung.planning.advise import advise, auxiliary_shapes, compute_type, process_refusal
from rung.planning.architecture import read_shape
from rung.planning.devices import Device, describe_device
from rung.planning.memory import (
    BASELINE_RSS,
    CUDA_CONTEXT_BYTES,
    MIN_TOKENS,
    MemoryEstimate,
    MicroBatch,
    estimate_memory,
    weight_terms,
)
from rung.planning.throughput import DataVolume, record_throughput, token_flops
from rung.report.formatting import format_bytes
from rung.runs.dataset import RunData
from rung.scoring.code_answers import require_tests
from rung.scoring.code_sandbox import require_isolation
from rung.training.distributed import World
from rung.training.memory_use import free_memory, peak_memory_bytes
from rung.training.run_folder import total_steps
from rung.training.trainer import Trainer
from rung.types import PackedBatch


def check_tasks(config: RunConfig, data: RunData) -> None:
    """A method with parameters for each task must name every task of the data, and each needs training rows."""
    method_tasks = set(config.method.tasks)
    if not method_tasks:
        return
    train_tasks = {record.task for record in data.splits.train}
    data_tasks = train_tasks | {record.task for part in (data.splits.validation, data.splits.test) for record in part}
    if unknown_tasks := sorted(map(str, data_tasks - method_tasks)):
        hint = "name the column in data.task, or a task for each set in data.path" if data_tasks == {None} else None
        given, allowed = ", ".join(unknown_tasks), ", ".join(sorted(method_tasks))
        raise DataError("the data have a task that method.tasks does not name", given=given, allowed=allowed, hint=hint)
    if unlearned_tasks := sorted(method_tasks - train_tasks):
        summary = "method.tasks names a task without training rows: nothing would be learned for it"
        raise DataError(summary, given=", ".join(unlearned_tasks))


def check_code_reward(config: RunConfig, splits: Splits) -> None:
    """A reward for programs needs tests in every row, and a machine that can isolate programs."""
    if isinstance(config.objective.reward, CodeRewardConfig):
        require_isolation("objective.reward.kind")
        require_tests(chain(splits.train, splits.validation), "objective.reward.kind")


def check_processes(config: RunConfig, world: World) -> None:
    """Refuse combinations that do not work, or are not tested, in several processes."""
    if error := process_refusal(config, world.size):
        raise error
    if config.model.sharded and world.size == 1:
        print_status("model.sharded shares the model over several processes: this one is alone and holds all of it")


def check_lottery(config: RunConfig, rows: int) -> None:
    """Refuse a lottery run that ends before the layers are drawn: it would silently be a plain LoRA."""
    rollout = config.objective.rollout
    scout_steps = config.method.lottery.scout_steps if isinstance(config.method, LotteryConfig) else 0
    steps = total_steps(config.training, rows, rollout.steps if rollout else 1)
    if scout_steps >= steps:
        summary, where = "the run ends before the lottery is drawn", "method.lottery.scout_steps"
        raise ConfigError(summary, where=where, given=scout_steps, allowed=f"below the run's {steps} steps")


SAMPLED_STEPS = 16
"""First steps whose rows are packed beforehand, to see how large a micro-batch becomes."""
MIN_TIMED_SECONDS = 30.0
"""Seconds of training from which on the speed of a run says something about the machine."""


class DoesNotFitError(PlanError):
    """The run needs more memory than is free."""


def local_card(device: torch.device) -> Device | None:
    """A graphics card as a device to plan for, with the memory that is available; None for a processor."""
    if device.type != "cuda":
        return None
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return describe_device(name, free_memory(device) or 0, capability)


def refuse_if_too_large(config: RunConfig, device: torch.device, *, beyond: bool) -> None:
    """Raise `DoesNotFitError`, before anything is loaded, if not even the smallest micro-batch fits."""
    # Half of the tokens supervised is a guess: the rows are not tokenized yet.
    compute = compute_type(config.model, local_card(device))
    smallest = MicroBatch(compute, MIN_TOKENS, MIN_TOKENS // 2, device=device.type)
    estimate = estimate_memory(config, read_shape(config.model), smallest, auxiliary_shapes(config))
    _refuse(config, estimate, device, beyond=beyond)


def refuse_base_if_too_large(model: ModelConfig, device: torch.device) -> None:
    """Raise `DoesNotFitError`, before anything is loaded, if not even the weights of a base fit."""
    # LoRA leaves the base as it is loaded; its data are not read.
    config = RunConfig(model=model, data=DataConfig(path="unused"), output="unused")
    weights = weight_terms(config, read_shape(model), compute_type(model, local_card(device)))
    needed = sum(term.bytes for term in weights) + (CUDA_CONTEXT_BYTES if device.type == "cuda" else BASELINE_RSS)
    available = free_memory(device)
    if available is not None and needed > available:
        summary = f"this base needs {format_bytes(needed)}, its weights and the libraries alone"
        raise DoesNotFitError(summary, where="memory", given=f"{format_bytes(available)} free")


PlannedRun = tuple[MemoryEstimate, MicroBatch]
"""The memory estimate of a run, and its largest micro-batch."""


def plan_run(config: RunConfig, trainer: Trainer, data: RunData, *, beyond: bool) -> PlannedRun:
    """The plan of a run from its own rows.

    Raises `DoesNotFitError` if less memory is free, unless `beyond` is set.
    """
    device = trainer.policy.device
    estimate, micro_batch = _plan_of_rows(config, trainer, data)
    available = free_memory(device) if device.type == "cuda" else None
    # Before the rows were packed, `auto` did not know how much their trees share: a card copies what branches share.
    while available and estimate.required_bytes > available and config.training.tokens_per_micro_batch == "auto":
        if trainer.budget <= MIN_TOKENS:
            break
        trainer.set_budget(max(MIN_TOKENS, trainer.budget * 3 // 4))
        estimate, micro_batch = _plan_of_rows(config, trainer, data)
    _refuse(config, estimate, device, beyond=beyond)
    if available:
        trainer.spare_device_bytes = max(0, available - estimate.required_bytes)
    return estimate, micro_batch


def _plan_of_rows(config: RunConfig, trainer: Trainer, data: RunData) -> PlannedRun:
    """The estimate for the run's own rows, packed with its budget."""
    policy, compute = trainer.policy, str(trainer.policy.base.compute_dtype).removeprefix("torch.")
    # Rollouts have no documents yet, so a full budget is assumed, half of it answers.
    if isinstance(data.train, PromptDataset):
        micro_batch = MicroBatch(compute, trainer.budget, trainer.budget // 2, device=policy.device.type)
    else:
        micro_batch = _largest_micro_batch(trainer, data.train, compute)
    micro_batch = replace(micro_batch, document_bytes=trainer.document_limit.bytes)
    return estimate_memory(config, policy.base.shape, micro_batch, auxiliary_shapes(config)), micro_batch


def _shared_context(batch: PackedBatch) -> int:
    """Tokens before each segment of a packed row, ancestors and prefix, summed over the segments."""
    depth = list[int]()
    prefix = 0 if batch.prefix is None else len(batch.prefix.ids)
    for segment in batch.segments:
        parent = segment.parent
        before = prefix if parent is None else depth[parent] + batch.segments[parent].end - batch.segments[parent].start
        depth.append(before)
    return sum(depth)


def _largest_micro_batch(trainer: Trainer, data: TokenizedDataset, compute: str) -> MicroBatch:
    """The largest micro-batch of the first steps and the longest row, and the computed share of the tokens."""
    rows, steps = data.rows, -(-len(data.rows) // trainer.config.examples_per_step)
    windows = [trainer.pack(trainer.window(rows, step), trainer.budget) for step in range(min(SAMPLED_STEPS, steps))]
    batches = [batch for window in windows for batch in window]
    # The longest row is packed as well: it decides the peak and may come in any step.
    largest = max([*batches, *trainer.pack(data.longest_row(), trainer.budget)], key=lambda batch: len(batch.ids))
    # By identity: micro-batches that share a prefix compute it once.
    prefix_tokens = {id(batch.prefix): len(batch.prefix.ids) for batch in batches if batch.prefix is not None}
    computed_tokens = sum(len(batch.ids) for batch in batches) + sum(prefix_tokens.values())
    compute_ratio = computed_tokens / sum(batch.document_tokens for batch in batches)
    return MicroBatch(
        compute,
        tokens=len(largest.ids),
        supervised_tokens=len(largest.loss.target),
        compute_ratio=compute_ratio,
        documents=len(largest.documents),
        batches=min(map(len, windows)),
        device=trainer.policy.device.type,
        context_tokens=max(_shared_context(batch) for batch in (largest, *batches)),
    )


def _refuse(config: RunConfig, estimate: MemoryEstimate, device: torch.device, *, beyond: bool) -> None:
    available = free_memory(device)
    if available is None or estimate.required_bytes <= available:
        return
    need = f"this run needs {format_bytes(estimate.required_bytes)} at its peak"
    if beyond:
        print_status(f"{need}, and {format_bytes(available)} are free: it goes on because of --beyond-memory")
        return
    change = advise(config, limit=available, device=local_card(device)).change
    suggestion = f"the cheapest change that fits: {shlex.join(change.overrides)}" if change else "see: rung plan CONFIG"
    hint = f"{suggestion}; or start it with --beyond-memory"
    raise DoesNotFitError(need, where="memory", given=f"{format_bytes(available)} free", hint=hint)


def measured_vs_planned(
    config: RunConfig, policy: Policy, plan: PlannedRun, manifest: Mapping[str, Any], loading: int
) -> dict[str, Any]:
    """The plan and the measurements, for `run.json`. The speed of a long run is kept for later plans."""
    (estimate, micro_batch), shape, device = plan, policy.base.shape, policy.device
    seconds, tokens = manifest.get("train_seconds") or 0.0, manifest.get("tokens") or 0
    # Supervised fine-tuning without a frozen-layer cache only: rollouts, several models or cached layers have another
    # speed per token.
    if seconds >= MIN_TIMED_SECONDS and tokens and config.objective.kind == "sft" and "trunk" not in manifest:
        train = manifest.get("data", {}).get("train", {})
        rows = max(1, int(train.get("examples", 0) or 1))
        supervised, length = train["supervised_tokens"] / train["tokens"], train["tokens"] / rows
        volume = DataVolume(tokens, supervised, length, is_counted=True)
        rate = token_flops(config, shape, volume, estimate.cost) * tokens * micro_batch.compute_ratio / seconds
        record_throughput(str(manifest.get("compute_dtype")), rate, f"{config.method.kind} on {config.model.name}")
    stages = {"loading": loading, "steps": manifest.get("peak_memory_bytes"), "saving": peak_memory_bytes(device)}
    # A plan of a card counts the context, which torch's allocator does not see.
    context = CUDA_CONTEXT_BYTES if device.type == "cuda" else 0
    measured = {name: size and size + context for name, size in stages.items()}
    return {**estimate.to_json(), "measured": measured}
