"""Operations of a run and the hours they take at a rate.

With P the numbers of a layer's linears, L the layers (L' from the lowest that moves upwards), r those of the method
beside them, V x H the head, n tokens of which m are learned, s the length of a document:

    forward          2 P L n + 2 r n + 4 H_q L sum(s^2 / 2)
    input gradient   2 P L' n + 2 r n + 8 H_q L' sum(s^2 / 2)
    weight gradient  2 r n, or 2 P L n where all moves
    head             2 V H m forward and again backward, and once more for its weights where they move

so 4 P L a token with a frozen base and 6 P L without one. Not counted: embeddings, norms, activations, softmax, what is
computed again, the optimizer; a measured rate has them in it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rung.config.objective import ROLLOUT_KINDS
from rung.config.run import RunConfig
from rung.files import cache_folder, write_text
from rung.planning.architecture import ModelShape
from rung.planning.method_cost import method_cost

CHARACTERS_PER_TOKEN = 4.0
"""Of English text, roughly: what a file's size is divided by as long as nothing has been tokenized."""
DEFAULT_DOCUMENT_TOKENS = 300.0
"""Tokens of a document, as long as none was read."""
MFU = 0.4
"""Share of a device's peak that training reaches where nothing was measured."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan is for. Peaks are the makers' dense bfloat16 figures; none of them was measured by this project."""

    name: str
    memory: int
    """Bytes."""
    flops: float
    """Operations a second at the peak."""
    compute: str = "bfloat16"


GiB = 2**30
DEVICES = {
    device.name: device
    for device in (
        Device("t4", 16 * GiB, 65e12, "float32"),  # multiplies float16, which Rung does not train in
        Device("l4", 24 * GiB, 121e12),
        Device("a10", 24 * GiB, 125e12),
        Device("rtx3090", 24 * GiB, 71e12),
        Device("rtx4090", 24 * GiB, 165e12),
        Device("rtx5090", 32 * GiB, 209e12),
        Device("a100-40", 40 * GiB, 312e12),
        Device("l40s", 48 * GiB, 362e12),
        Device("a100", 80 * GiB, 312e12),
        Device("h100", 80 * GiB, 989e12),
        Device("h200", 141 * GiB, 989e12),
        Device("mi300x", 192 * GiB, 1307e12),
        Device("b200", 192 * GiB, 2250e12),
    )
}


@dataclass(frozen=True, slots=True)
class DataVolume:
    """What a run reads."""

    tokens: float
    """Of one epoch, those of all answers of a row among them."""
    supervised_share: float
    """Share of them that the loss is taken of."""
    document_tokens: float
    """Tokens of a document, in the mean."""
    is_counted: bool
    """Whether they were counted, or taken from the size of a file."""


def estimate_data_volume(
    files: list[Path], *, supervised_share: float = 0.4, document_tokens: float = DEFAULT_DOCUMENT_TOKENS
) -> DataVolume:
    """From the sizes of data files that are there; no more than a first guess."""
    characters = sum(file.stat().st_size for file in files if file.is_file())
    return DataVolume(characters / CHARACTERS_PER_TOKEN, supervised_share, document_tokens, is_counted=False)


def run_flops(config: RunConfig, shape: ModelShape, volume: DataVolume, teacher: ModelShape | None = None) -> float:
    """Operations of the whole run: its epochs, a reference's and a teacher's passes, and the answers it makes."""
    passes: float = config.training.epochs
    if config.training.max_steps is not None and volume.tokens:
        passes = min(
            passes,
            config.training.max_steps * config.training.examples_per_step * volume.document_tokens / volume.tokens,
        )
    training_flops = token_flops(config, shape, volume)
    forward = _forward_flops(shape, volume)
    rollout = getattr(config.objective, "rollout", None)
    if rollout is not None and generates_rollouts(config):
        answer_ratio: float = (
            rollout.num_generations * (volume.document_tokens + rollout.max_new_tokens) / volume.document_tokens
        )
        answer_flops: float = (
            forward
            + rollout.num_iterations * training_flops
            + (forward if getattr(config.objective, "reference_model", None) else 0.0)
        )
        return passes * volume.tokens * answer_ratio * answer_flops
    extra_flops = 0.0
    if config.objective.kind == "preference" and getattr(config.objective, "reference_model", None):
        extra_flops = forward  # kept by document: read once a run
    if config.objective.kind == "distill":
        extra_flops = _forward_flops(teacher or shape, volume) * (
            1.0 if config.objective.cache_teacher_states else passes
        )
    return volume.tokens * (passes * training_flops + extra_flops)


def generates_rollouts(config: RunConfig) -> bool:
    """Whether the policy makes answers of its own."""
    return config.objective.kind in ROLLOUT_KINDS or bool(getattr(config.objective, "on_policy", 0.0))


def token_flops(config: RunConfig, shape: ModelShape, volume: DataVolume) -> float:
    """Operations for one token of training, forward and backward."""
    cost = method_cost(config.method, shape)
    backward_layers = shape.layers - min(cost.lowest_layer, shape.layers)
    full = config.method.kind == "full"
    adapter = 0 if full or config.method.kind in ("head", "prompt", "prefix", "p_tuning") else (cost.trainable or 0)
    attention = 4.0 * shape.query * volume.document_tokens / 2
    forward = 2.0 * (shape.linear_parameters * shape.layers + adapter) + attention * shape.layers
    backward = 2.0 * (shape.linear_parameters * backward_layers + adapter) + 2 * attention * backward_layers
    weight = 2.0 * (shape.linear_parameters * shape.layers if full else adapter)
    head = (
        2.0 * shape.embedding_parameters * volume.supervised_share * (3 if full or config.method.kind == "head" else 2)
    )
    return forward + backward + weight + head


def _forward_flops(shape: ModelShape, volume: DataVolume) -> float:
    attention = 4.0 * shape.query * volume.document_tokens / 2
    return (
        2.0 * shape.linear_parameters * shape.layers
        + attention * shape.layers
        + 2.0 * shape.embedding_parameters * volume.supervised_share
    )


@dataclass(frozen=True, slots=True)
class Throughput:
    """Operations a second, and where the number comes from."""

    flops: float
    source: str


def throughput_for(device: Device | None, compute: str) -> Throughput | None:
    """Of a known device, stated; of this machine, measured by the runs it has finished. None where nothing is known."""
    if device is not None:
        return Throughput(MFU * device.flops, f"{MFU:.0%} of {device.name}'s stated peak: not measured")
    rate = _read_rates().get(compute)
    if rate is None:
        return None
    return Throughput(rate["flops"], f"the fastest run on this machine ({rate['run']})")


def record_throughput(compute: str, flops: float, run: str) -> None:
    """What a finished run reached on this machine, for later plans: the fastest, as others may have had company."""
    rates = _read_rates()
    if flops <= rates.get(compute, {}).get("flops", 0.0):
        return
    new_rates = {**rates, compute: {"flops": flops, "run": run}}
    write_text(_rates_path(), json.dumps(new_rates, indent=2) + "\n")


def _read_rates() -> dict[str, dict[str, Any]]:
    try:
        rates: dict[str, dict[str, Any]] = json.loads(_rates_path().read_text())
    except (OSError, ValueError):
        return {}
    return rates


def _rates_path() -> Path:
    return cache_folder() / "rates.json"
