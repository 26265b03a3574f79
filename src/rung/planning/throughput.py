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

from rung.config.run import RunConfig
from rung.files import cache_folder, write_text
from rung.planning.architecture import ModelShape
from rung.planning.method_cost import method_cost

CHARACTERS_PER_TOKEN = 4.0
"""Of English text, roughly: what a file's size is divided by as long as nothing has been tokenized."""
LENGTH = 300.0
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
    learned: float
    """Share of them that the loss is taken of."""
    length: float
    """Tokens of a document, in the mean."""
    known: bool
    """Whether they were counted, or taken from the size of a file."""


def estimate_data_volume(files: list[Path], *, learned: float = 0.4, length: float = LENGTH) -> DataVolume:
    """From the sizes of data files that are there; no more than a first guess."""
    characters = sum(file.stat().st_size for file in files if file.is_file())
    return DataVolume(characters / CHARACTERS_PER_TOKEN, learned, length, known=False)


def run_flops(config: RunConfig, shape: ModelShape, amount: DataVolume, teacher: ModelShape | None = None) -> float:
    """Operations of the whole run: its epochs, a reference's and a teacher's passes, and the answers it makes."""
    passes: float = config.training.epochs
    if config.training.max_steps is not None and amount.tokens:
        passes = min(
            passes, config.training.max_steps * config.training.examples_per_step * amount.length / amount.tokens
        )
    own = token_flops(config, shape, amount)
    forward = _forward(shape, amount)
    rollout = config.objective.rollout
    if rollout is not None and generates_rollouts(config):
        answered: float = rollout.num_generations * (amount.length + rollout.max_new_tokens) / amount.length
        each: float = forward + rollout.num_iterations * own + (forward if config.objective.reference_model else 0.0)
        return passes * amount.tokens * answered * each
    once = 0.0
    if config.objective.kind == "preference" and config.objective.reference_model:
        once = forward  # kept by document: read once a run
    if config.objective.kind == "distill":
        once = _forward(teacher or shape, amount) * (1.0 if config.objective.cache_teacher_states else passes)
    return amount.tokens * (passes * own + once)


def generates_rollouts(config: RunConfig) -> bool:
    """Whether the policy makes answers of its own."""
    return config.objective.on_policy_share > 0.0


def token_flops(config: RunConfig, shape: ModelShape, amount: DataVolume) -> float:
    """Operations for one token of training, forward and backward."""
    own = method_cost(config.method, shape)
    upper = shape.layers - min(own.lowest, shape.layers)
    full = config.method.kind == "full"
    beside = 0 if full or config.method.kind in ("head", "prompt", "prefix", "p_tuning") else (own.trainable or 0)
    attention = 4.0 * shape.query * amount.length / 2
    forward = 2.0 * (shape.linear * shape.layers + beside) + attention * shape.layers
    backward = 2.0 * (shape.linear * upper + beside) + 2 * attention * upper
    weight = 2.0 * (shape.linear * shape.layers if full else beside)
    head = 2.0 * shape.embedding * amount.learned * (3 if full or config.method.kind == "head" else 2)
    return forward + backward + weight + head


def _forward(shape: ModelShape, amount: DataVolume) -> float:
    attention = 4.0 * shape.query * amount.length / 2
    return 2.0 * shape.linear * shape.layers + attention * shape.layers + 2.0 * shape.embedding * amount.learned


@dataclass(frozen=True, slots=True)
class Throughput:
    """Operations a second, and where the number comes from."""

    flops: float
    source: str


def throughput_for(device: Device | None, compute: str) -> Throughput | None:
    """Of a known device, stated; of this machine, measured by the runs it has finished. None where nothing is known."""
    if device is not None:
        return Throughput(MFU * device.flops, f"{MFU:.0%} of {device.name}'s stated peak: not measured")
    measured = _measured().get(compute)
    if measured is None:
        return None
    return Throughput(measured["flops"], f"the fastest run on this machine ({measured['run']})")


def record_throughput(compute: str, flops: float, run: str) -> None:
    """What a finished run reached on this machine, for later plans: the fastest, as others may have had company."""
    known = _measured()
    if flops <= known.get(compute, {}).get("flops", 0.0):
        return
    found = {**known, compute: {"flops": flops, "run": run}}
    write_text(_rates(), json.dumps(found, indent=2) + "\n")


def _measured() -> dict[str, dict[str, Any]]:
    try:
        found: dict[str, dict[str, Any]] = json.loads(_rates().read_text())
    except (OSError, ValueError):
        return {}
    return found


def _rates() -> Path:
    return cache_folder() / "rates.json"
