"""The plan of a run: its memory and time, those of every other method, and the cheapest change that makes it fit.

Everything follows from configs: no weights are loaded and torch is not imported, so `rung plan` answers in a second.
The price is that an estimate needs formulas for each method; `runs/checks.py` plans again with the run's own data and
compares the plan with what was measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rung.config.method import BASE_CHANGING_METHODS, METHOD_CONFIGS, LowRankConfig, QloraConfig
from rung.config.model import WITHOUT_RUN_SETTINGS, ModelConfig
from rung.config.objective import JudgeRewardConfig, ModelRewardConfig
from rung.config.run import RunConfig
from rung.config.support import multi_process_refusal, sharding_refusal
from rung.errors import ConfigError, PlanError
from rung.planning.architecture import ModelShape, read_shape
from rung.planning.devices import Device
from rung.planning.memory import (
    CUDA_TOKENS,
    SUPERVISED_SHARE,
    MemoryEstimate,
    MicroBatch,
    Stage,
    estimate_memory,
    tokens_per_micro_batch,
    tokens_that_fit,
)
from rung.planning.recomputation import CPU_DOCUMENT_BYTES, document_bytes_that_fit
from rung.planning.throughput import DataVolume, Throughput, guess_data_volume, run_flops, throughput_for

CANDIDATE_BUDGETS = {"cpu": (256, 512, 768, 1024, 1536, 2048), "cuda": (4096, 8192, 16_384, 32_768)}
"""The micro-batches, in tokens, that `probe` tries on a device of this type."""
LONGEST_DOCUMENT = 2**20
"""Tokens up to which a card is asked for the longest document that keeps everything."""
SMALL_MICRO_BATCH = 256
"""Tokens of a micro-batch when other settings change too; fewer would be slower and save little."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Memory and time of one run."""

    method: str
    trainable: int | None
    """Trainable parameters; None if only the loaded model can tell."""
    memory: MemoryEstimate
    flops: float | None
    """Operations of the run; None if the amount of data is unknown."""
    seconds: float | None
    """Time at the known throughput; None if there is none."""
    follow_up: tuple[Stage, ...]
    """Memory of `rung eval` and `rung merge` after the run."""
    limit: int | None
    """Available bytes; None if not stated."""

    @property
    def fits(self) -> bool | None:
        """Whether the required memory is within the limit; None without a limit."""
        return None if self.limit is None else self.memory.required_bytes <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "method": self.method,
            "trainable_parameters": self.trainable,
            "memory": self.memory.to_json(),
            "after": {stage.name: stage.bytes + self.memory.footprint for stage in self.follow_up},
            "flops": self.flops,
            "seconds": self.seconds,
            "fits": self.fits,
        }


@dataclass(frozen=True, slots=True)
class CheapestChange:
    """A setting that makes a run fit."""

    overrides: tuple[str, ...]
    """Settings as given on the command line."""
    cost: str
    """What the change costs."""
    plan: RunPlan


@dataclass(frozen=True, slots=True)
class Advice:
    """The result of `rung plan`."""

    shape: ModelShape
    device: Device | None
    """The card that the run is planned for; None for the processor of this machine."""
    micro_batch: MicroBatch
    data_volume: DataVolume | None
    """None if the data is missing and no amount was given."""
    throughput: Throughput | None
    plan: RunPlan
    alternatives: tuple[RunPlan, ...]
    change: CheapestChange | None
    """The cheapest change that fits, if the config's own run does not; None if no change fits."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        change = None
        if (c := self.change) is not None:
            change = {"overrides": list(c.overrides), "costs": c.cost, "plan": c.plan.to_json()}
        return {
            "parameters": self.shape.parameters,
            "device": self.device.name if self.device else "cpu",
            "devices": self.micro_batch.processes,
            "compute": self.micro_batch.compute_dtype,
            "tokens_per_micro_batch": self.micro_batch.tokens,
            "tokens": self.data_volume and self.data_volume.tokens,
            "tokens_given": self.data_volume is not None and self.data_volume.is_counted,
            "rate": self.throughput and asdict(self.throughput),
            "limit_bytes": self.plan.limit,
            "plan": self.plan.to_json(),
            "methods": [other.to_json() for other in self.alternatives],
            "change": change,
        }


def advise(
    config: RunConfig,
    *,
    limit: int | None = None,
    device: Device | None = None,
    processes: int = 1,
    tokens: float | None = None,
) -> Advice:
    """Plan a run and its alternatives from the configs of its models.

    `limit` is in bytes of each process, `tokens` counts one epoch, `device` None means the processor of this machine.
    Raises `ConfigError` for a model without a config, `PlanError` for a run that several processes cannot share.
    """
    if error := process_refusal(config, processes, "--devices"):
        raise error
    shape, volume = read_shape(config.model), guess_data_volume(config)
    if tokens is not None:
        volume = replace(volume or DataVolume(0.0), tokens=tokens, is_counted=True)
    if device is not None and limit is not None:
        device = replace(device, memory=limit)
    limit = limit if device is None else device.memory
    micro_batch = assumed_micro_batch(config, shape, device, processes)
    throughput = throughput_for(device, micro_batch.compute_dtype, processes)

    def plan(changed: RunConfig) -> RunPlan:
        batch = assumed_micro_batch(changed, shape, device, processes)
        auxiliary = auxiliary_shapes(changed)
        memory = estimate_memory(changed, shape, batch, auxiliary)
        flops = None if volume is None else run_flops(changed, shape, volume, memory.cost, auxiliary.get("teacher"))
        seconds = None if throughput is None or flops is None else flops / throughput.flops
        length = (volume or DataVolume(0.0)).document_tokens
        follow_up = memory.follow_up_stages(changed, shape, batch.compute_dtype, length)
        return RunPlan(_method_label(changed), memory.cost.trainable, memory, flops, seconds, follow_up, limit)

    own_plan, change = plan(config), None
    if own_plan.fits is False:
        # A generator: the changes are ordered by cost, and planning stops at the first that fits.
        changes = [c for c in _candidate_changes(config, micro_batch) if not process_refusal(c[2], processes)]
        candidates = (CheapestChange(overrides, costs, plan(changed)) for overrides, costs, changed in changes)
        change = next((c for c in candidates if c.plan.fits), None)
    other_plans = tuple(plan(other) for other in alternatives(config) if not process_refusal(other, processes))
    return Advice(shape, device, micro_batch, volume, throughput, own_plan, other_plans, change)


def process_refusal(config: RunConfig, processes: int, where: str = "WORLD_SIZE") -> PlanError | None:
    """Why this many processes cannot share a run: a combination that does not work, or that is not tested.

    `where` is the setting that asked for them.
    """
    if processes < 2:
        return None
    generates_answers = config.objective.on_policy_share > 0.0
    if refusal := multi_process_refusal(config.method.kind, own_answers=generates_answers):
        return PlanError(refusal, where=where, given=processes, hint="run it in one process")
    if config.model.sharded:
        options = {"reference": config.objective.reference_model, "init": None}
        if isinstance(config.method, LowRankConfig):
            options["init"] = config.method.init
        moments = config.training.optimizer.state_dtype
        if refusal := sharding_refusal(config.method.kind, config.objective.kind, moments=moments, **options):
            return PlanError(refusal, where="model.sharded", hint="leave model.sharded out: replicas do")
    return None


def auto_budget(config: RunConfig, shape: ModelShape, device: Device | None, processes: int = 1) -> tuple[int, int]:
    """The `auto` tokens of a micro-batch, and the activation bytes that one document may take.

    On a card the tokens are those that fit beside the weights, and a longer document recomputes layers, so that it fits
    into the memory of such a micro-batch. `device` None means a processor.
    """
    if device is None:
        return tokens_per_micro_batch(shape, "cpu"), CPU_DOCUMENT_BYTES
    compute, is_probed = compute_type(config.model, device), config.training.tokens_per_micro_batch == "probe"
    batch = MicroBatch(compute, 0, 0, device="cuda", processes=processes)
    most = CANDIDATE_BUDGETS["cuda"][-1] if is_probed else CUDA_TOKENS
    # A document may be longer than any budget is worth, and keeps everything while that fits.
    longest = tokens_that_fit(config, shape, batch, device.memory, auxiliary_shapes(config), most=LONGEST_DOCUMENT)
    return min(longest, most), document_bytes_that_fit(config, shape, compute, longest)


def assumed_micro_batch(config: RunConfig, shape: ModelShape, device: Device | None, processes: int = 1) -> MicroBatch:
    """The largest micro-batch that the budget allows, before anything has been tokenized."""
    setting, kind = config.training.tokens_per_micro_batch, "cpu" if device is None else "cuda"
    budget, document_bytes = auto_budget(config, shape, device, processes)
    if setting == "probe" and device is None:
        budget = CANDIDATE_BUDGETS["cpu"][-1]
    elif isinstance(setting, int):
        budget = setting
    max_length = config.data.max_length or 0
    # A document is never divided, so one longer than the budget is a micro-batch of its own.
    tokens = max(budget, max_length)
    return MicroBatch(
        compute_type(config.model, device),
        tokens,
        int(tokens * SUPERVISED_SHARE),
        # Memory fragments more for a single long document; see `planning/memory.py`.
        documents=1 if max_length > budget else 2,
        device=kind,
        processes=processes,
        document_bytes=document_bytes,
    )


def compute_type(model: ModelConfig, device: Device | None) -> str:
    """The dtype of products: `auto` takes bfloat16 if the hardware multiplies it."""
    if model.dtype != "auto":
        return model.dtype
    if device is not None:
        return device.compute
    return "bfloat16" if multiplies_bfloat16() else "float32"


def multiplies_bfloat16() -> bool:
    """Whether this machine's processor has AVX512-BF16 or AMX; asked without importing torch."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    # The file exists only on Linux; elsewhere the answer is no.
    except (OSError, IndexError):
        return False
    return "avx512_bf16" in flags or "amx_tile" in flags


def auxiliary_shapes(config: RunConfig) -> dict[str, ModelShape]:
    """Shapes of further models in a run, by purpose; adapters on the run's own base do not count."""
    shapes: dict[str, ModelShape] = {}
    reference = config.objective.reference_model
    if reference == "base":
        # Other methods switch themselves off; full fine-tuning needs a second copy of the base.
        if config.method.kind == "full":
            shapes["reference"] = read_shape(config.model)
    elif reference is not None:
        shapes["reference"] = _auxiliary_shape(config, reference, "objective.reference")
    if config.objective.kind == "distill" and config.objective.teacher == "base":
        if config.method.kind in BASE_CHANGING_METHODS:
            shapes["teacher"] = read_shape(config.model)
    elif config.objective.kind == "distill":
        shapes["teacher"] = _auxiliary_shape(config, config.objective.teacher, "objective.teacher")
    reward = config.objective.reward
    if isinstance(reward, ModelRewardConfig):
        base = require_reward_run(reward.run).get("model", {}).get("name")
        is_full_model = (Path(reward.run) / "model").exists() or config.method.kind in BASE_CHANGING_METHODS
        if is_full_model or base != config.model.name:  # else it is an adapter on this run's weights
            shapes["reward"] = _auxiliary_shape(config, reward.run, "objective.reward.run")
    elif isinstance(reward, JudgeRewardConfig) and reward.server is None:
        shapes["judge"] = _auxiliary_shape(config, reward.model, "objective.reward.model")
    return shapes


def _auxiliary_shape(config: RunConfig, name: str, where: str) -> ModelShape:
    """Shape of a model that the config names outside `model.name`; errors refer to that setting."""
    try:
        return read_shape(config.model.model_copy(update={"name": name, **WITHOUT_RUN_SETTINGS}))
    except ConfigError as e:
        place = where if e.where == "model.name" else e.where
        raise ConfigError(e.summary, where=place, given=e.given, allowed=e.allowed, hint=e.hint) from e


def require_reward_run(run: str, where: str = "objective.reward.run") -> dict[str, Any]:
    """The config of a reward run. Raises `ConfigError` for a folder without a run, or a run of another kind."""
    try:
        config: dict[str, Any] = json.loads((Path(run) / "run.json").read_text())["config"]
        kind = config.get("objective", {}).get("kind", "sft")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError("there is no such run", where=where, given=run) from error
    if kind != "reward":
        raise ConfigError("this run is no reward model", where=where, given=f"{run}: objective.kind: {kind}")
    return config


def alternatives(config: RunConfig) -> Iterator[RunConfig]:
    """The run with every method: with the config's settings for its own method, with defaults for others."""
    for kind, config_class in METHOD_CONFIGS.items():
        if kind == "peft":
            continue  # the size of its tuners is known only for a loaded model
        method = config.method if kind == config.method.kind else config_class.model_validate({})
        variants = [method.model_copy(update={"bits": bits}) for bits in (8, 4)] if kind == "qlora" else [method]
        for variant in variants:
            yield config.model_copy(update={"method": variant})


def _method_label(config: RunConfig) -> str:
    """Label of a config's method in the table of alternatives."""
    return f"qlora, {config.method.bits} bits" if isinstance(config.method, QloraConfig) else config.method.kind


def _with_settings(config: RunConfig, section: str, **settings: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=settings)})


def _candidate_changes(config: RunConfig, micro_batch: MicroBatch) -> Iterator[tuple[tuple[str, ...], str, RunConfig]]:
    """Changes in order of cost: first those that cost only time, last another method.

    On a card `auto` is down to the smallest micro-batch already, and takes more again where a change leaves room.
    """
    current_tokens = micro_batch.tokens
    adapts = micro_batch.device == "cuda" and config.training.tokens_per_micro_batch == "auto"
    for tokens in (128,) if adapts else (16_384, 8192, 4096, 2048, 1024, 512, 256, 128):
        if (config.data.max_length or 0) <= tokens < current_tokens:
            changed = _with_settings(config, "training", tokens_per_micro_batch=tokens)
            yield (f"training.tokens_per_micro_batch={tokens}",), "speed alone", changed
    if micro_batch.processes > 1 and not config.model.sharded:
        sharded = config.model_copy(update={"model": config.model.model_copy(update={"sharded": True})})
        yield ("model.sharded=true",), "a gather of each layer in every pass", sharded
    # Further changes assume the smallest micro-batch, because that saving costs least.
    smallest = min(SMALL_MICRO_BATCH, current_tokens)
    first = () if adapts else (f"training.tokens_per_micro_batch={smallest}",)
    small = config if adapts else _with_settings(config, "training", tokens_per_micro_batch=smallest)
    if config.training.optimizer.state_dtype != "int8":
        optimizer = config.training.optimizer.model_copy(update={"state_dtype": "int8"})
        changed = _with_settings(small, "training", optimizer=optimizer)
        yield (*first, "training.optimizer.state_dtype=int8"), "moments rounded to 8 bits", changed
    for length in (2048, 1024, 512, 256):
        if config.data.max_length and length < config.data.max_length:
            changed = _with_settings(small, "data", max_length=length)
            yield (*first, f"data.max_length={length}"), "longer documents", changed
    for rank in (8, 4):
        if (config.method.adapter_rank or 0) > rank:
            changed = _with_settings(small, "method", rank=rank)
            yield (*first, f"method.rank={rank}"), "what an adapter can hold", changed
    for kind, settings in (("lora", {}), ("qlora", {"bits": 8}), ("qlora", {}), ("prompt", {})):
        if kind != config.method.kind or settings:
            method = METHOD_CONFIGS[kind].model_validate(settings)
            override = ", ".join(f"{key}: {value}" for key, value in {"kind": kind, **settings}.items())
            yield (*first, f"method={{{override}}}"), "another method", small.model_copy(update={"method": method})


def parse_size(text: str | None) -> int | None:
    """Bytes of 24GiB, 24GB, 512MiB or a plain number. Raises `ConfigError` for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kmgt]?i?b?)", text.strip().lower())
    if match is None or (size := _UNITS.get(match[2].removesuffix("b"))) is None or not float(match[1]):
        raise ConfigError("this is no amount of memory", where="--memory", given=text, allowed="24GiB, 24GB or 512MiB")
    return int(float(match[1]) * size)


# Decimal without an i (GB), binary with it (GiB).
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
