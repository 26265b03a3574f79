"""Operations of a run and the hours they take at a rate.

With P the numbers of a layer's linears, L the layers (L' from the lowest that moves upwards), r those of the method
beside them, V x H the head, n tokens of which m are learned, s the length of a document:

    forward          2 P L n + 2 r n + 4 H_q L sum(s^2 / 2)
    input gradient   2 P L' n + 2 r n + 8 H_q L' sum(s^2 / 2)
    weight gradient  2 r n, or 2 P L n where all moves
    head             2 V H m forward and again backward, and once more for its weights where they move

so 4 P L a token with a frozen base and 6 P L without one. Not counted: embeddings, norms, activations, softmax, what is
computed again, the optimiser; a measured rate has them in it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rung.config.objective import ROLLING
from rung.config.run import RunSpec
from rung.files import cache_folder, write_text
from rung.planning.architecture import Shape
from rung.planning.method_cost import trained

CHARACTERS_PER_TOKEN = 4.0
"""Of English text, roughly: what a file's size is divided by as long as nothing has been tokenised."""
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
class Amount:
    """What a run reads."""

    tokens: float
    """Of one epoch, those of all answers of a row among them."""
    learned: float
    """Share of them that the loss is taken of."""
    length: float
    """Tokens of a document, in the mean."""
    known: bool
    """Whether they were counted, or taken from the size of a file."""


def amount_of(files: list[Path], *, learned: float = 0.4, length: float = LENGTH) -> Amount:
    """From the sizes of data files that are there; no more than a first guess."""
    characters = sum(file.stat().st_size for file in files if file.is_file())
    return Amount(characters / CHARACTERS_PER_TOKEN, learned, length, known=False)


def run_flops(spec: RunSpec, shape: Shape, amount: Amount, teacher: Shape | None = None) -> float:
    """Operations of the whole run: its epochs, a reference's and a teacher's passes, and the answers it makes."""
    passes: float = spec.engine.epochs
    if spec.engine.max_steps is not None and amount.tokens:
        passes = min(passes, spec.engine.max_steps * spec.engine.examples_per_step * amount.length / amount.tokens)
    own = token_flops(spec, shape, amount)
    forward = _forward(shape, amount)
    rollout = getattr(spec.objective, "rollout", None)
    if rollout is not None and rolls(spec):
        answered: float = rollout.answers * (amount.length + rollout.max_new_tokens) / amount.length
        each: float = forward + rollout.epochs * own + (forward if getattr(spec.objective, "against", None) else 0.0)
        return passes * amount.tokens * answered * each
    once = 0.0
    if spec.objective.kind == "preference" and getattr(spec.objective, "against", None):
        once = forward  # kept by document: read once a run
    if spec.objective.kind == "distill":
        once = _forward(teacher or shape, amount) * (1.0 if spec.objective.keep_states else passes)
    return amount.tokens * (passes * own + once)


def rolls(spec: RunSpec) -> bool:
    """Whether the policy makes answers of its own."""
    return spec.objective.kind in ROLLING or bool(getattr(spec.objective, "on_policy", 0.0))


def token_flops(spec: RunSpec, shape: Shape, amount: Amount) -> float:
    """Operations for one token of training, forward and backward."""
    own = trained(spec.method, shape)
    upper = shape.layers - min(own.lowest, shape.layers)
    full = spec.method.kind == "full"
    beside = 0 if full or spec.method.kind in ("head", "prompt", "prefix", "p_tuning") else (own.moving or 0)
    attention = 4.0 * shape.query * amount.length / 2
    forward = 2.0 * (shape.linear * shape.layers + beside) + attention * shape.layers
    backward = 2.0 * (shape.linear * upper + beside) + 2 * attention * upper
    weight = 2.0 * (shape.linear * shape.layers if full else beside)
    head = 2.0 * shape.embedding * amount.learned * (3 if full or spec.method.kind == "head" else 2)
    return forward + backward + weight + head


def _forward(shape: Shape, amount: Amount) -> float:
    attention = 4.0 * shape.query * amount.length / 2
    return 2.0 * shape.linear * shape.layers + attention * shape.layers + 2.0 * shape.embedding * amount.learned


@dataclass(frozen=True, slots=True)
class Rate:
    """Operations a second, and where the number comes from."""

    flops: float
    source: str


def rate_for(device: Device | None, compute: str) -> Rate | None:
    """Of a known device, stated; of this machine, measured by the runs it has finished. None where nothing is known."""
    if device is not None:
        return Rate(MFU * device.flops, f"{MFU:.0%} of {device.name}'s stated peak: not measured")
    measured = _measured().get(compute)
    if measured is None:
        return None
    return Rate(measured["flops"], f"the fastest run on this machine ({measured['run']})")


def keep_rate(compute: str, flops: float, run: str) -> None:
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
