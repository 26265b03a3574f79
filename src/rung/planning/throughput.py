"""Floating-point operations of a run, and the time they take at a known throughput.

With P the parameters of a layer's linears, L the layers (L' from the lowest trainable one upwards), r the parameters of
the method, V x H the head, n tokens of which m are supervised, s the length of a document:

    forward          2 P L n + 2 r n + 4 H_q L sum(s^2 / 2)
    input gradient   2 P L' n + 2 r n + 8 H_q L' sum(s^2 / 2)
    weight gradient  2 r n, or 2 P L n if the base is trained
    head             2 V H m forward and again backward, and once more for its weights if they are trained

so 4 P L a token with a frozen base and 6 P L otherwise. Not counted: embeddings, norms, activations, softmax,
recomputation, the optimizer; a measured throughput includes them. `runs/checks.py` records that of finished runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rung.config.data_files import COMPRESSIONS, SavedDataset, find_data
from rung.config.run import RunConfig
from rung.errors import DataError
from rung.files import cache_folder, write_text
from rung.planning.architecture import ModelShape
from rung.planning.devices import Device
from rung.planning.method_cost import MethodCost

CHARACTERS_PER_TOKEN = 4.0
"""Rough value for English text; divides a file's size before anything has been tokenized."""
COMPRESSION_RATIO = 3.1
"""Characters per byte of a compressed file: GSM8K's training rows, 1,110,789 bytes, are 357,677 after gzip -6."""
DEFAULT_DOCUMENT_TOKENS = 300.0
"""Assumed tokens of a document before the data is read."""
MFU = 0.4
"""Assumed share of a device's peak that training reaches, where nothing was measured."""


@dataclass(frozen=True, slots=True)
class DataVolume:
    """Size of a run's training data."""

    tokens: float
    """Tokens of one epoch, including all answers of a row."""
    supervised_share: float = 0.4
    """Share of supervised tokens; the default is assumed before the data is read."""
    document_tokens: float = DEFAULT_DOCUMENT_TOKENS
    """Mean tokens of a document."""
    is_counted: bool = False
    """Whether the tokens were counted; otherwise they are estimated from file sizes."""


def guess_data_volume(config: RunConfig) -> DataVolume | None:
    """Data volume from the file sizes and the config's splits and limit; None if no file exists."""
    paths = [config.data.path] if isinstance(config.data.path, str) else [source.path for source in config.data.path]
    shares = [s for s in (config.data.validation, config.data.test) if isinstance(s, float | int)]
    characters = sum(map(_estimated_characters, paths))
    if not characters:
        return None
    tokens = characters / CHARACTERS_PER_TOKEN * max(0.0, 1.0 - sum(shares))
    if config.data.limit is not None:
        tokens = min(tokens, config.data.limit * DEFAULT_DOCUMENT_TOKENS)
    return DataVolume(tokens)


def _estimated_characters(path: str) -> float:
    """Characters of a source by the sizes of its files; 0 for what is not in files, or not there."""
    try:
        found = find_data(path)
    except DataError:
        return 0.0  # the plan says nothing of the data; reading them says what is wrong
    if found is None:
        return 0.0
    files = [file for file in found.folder.iterdir()] if isinstance(found, SavedDataset) else found.paths
    return sum(f.stat().st_size * (COMPRESSION_RATIO if f.suffix.lower() in COMPRESSIONS else 1.0) for f in files)


def run_flops(
    config: RunConfig, shape: ModelShape, volume: DataVolume, cost: MethodCost, teacher: ModelShape | None = None
) -> float:
    """Operations of the whole run: epochs, passes of reference and teacher, and generated answers."""
    passes: float = config.training.epochs
    # A run with `max_steps` may end within an epoch.
    if config.training.max_steps is not None and volume.tokens:
        examples = config.training.max_steps * config.training.examples_per_step
        passes = min(passes, examples * volume.document_tokens / volume.tokens)
    training_flops, forward = token_flops(config, shape, volume, cost), _forward_flops(shape, volume)
    objective, rollout = config.objective, config.objective.rollout
    if rollout is not None and generates_rollouts(config):
        # Every prompt is answered several times, and each answer is trained on for several passes.
        length = volume.document_tokens
        answer_ratio: float = rollout.num_generations * (length + rollout.max_new_tokens) / length
        answer_flops: float = forward + rollout.num_iterations * training_flops
        answer_flops += forward if objective.reference_model else 0.0
        return passes * volume.tokens * answer_ratio * answer_flops
    extra_flops = 0.0
    if objective.kind == "preference" and objective.reference_model:
        extra_flops = forward  # the reference is cached by document: one pass a run
    if objective.kind == "distill":
        extra_flops = _forward_flops(teacher or shape, volume) * (1.0 if objective.cache_teacher_states else passes)
    return volume.tokens * (passes * training_flops + extra_flops)


def generates_rollouts(config: RunConfig) -> bool:
    """Whether the policy generates answers during training."""
    return config.objective.on_policy_share > 0.0


def token_flops(config: RunConfig, shape: ModelShape, volume: DataVolume, cost: MethodCost) -> float:
    """Operations for one token of training, forward and backward."""
    # Gradients stop at the lowest trainable layer.
    backward_layers = shape.layers - min(cost.lowest_layer, shape.layers)
    full = config.method.kind == "full"
    # Head and virtual tokens add no linear to a layer.
    adapter = 0 if full or config.method.kind in ("head", "prompt", "prefix", "p_tuning") else (cost.trainable or 0)
    attention = 4.0 * shape.query * volume.document_tokens / 2
    forward = 2.0 * (shape.linear_parameters * shape.layers + adapter) + attention * shape.layers
    backward = 2.0 * (shape.linear_parameters * backward_layers + adapter) + 2 * attention * backward_layers
    weight = 2.0 * (shape.linear_parameters * shape.layers if full else adapter)
    # Logits are computed only for supervised tokens.
    head = 2.0 * shape.embedding_parameters * volume.supervised_share
    head *= 3 if full or config.method.kind == "head" else 2
    return forward + backward + weight + head


def _forward_flops(shape: ModelShape, volume: DataVolume) -> float:
    attention = 4.0 * shape.query * volume.document_tokens / 2
    layers = 2.0 * shape.linear_parameters * shape.layers + attention * shape.layers
    return layers + 2.0 * shape.embedding_parameters * volume.supervised_share


@dataclass(frozen=True, slots=True)
class Throughput:
    """Operations per second, and the source of the number."""

    flops: float
    source: str


def throughput_for(device: Device | None, compute: str, processes: int = 1) -> Throughput | None:
    """Throughput of a listed device, or as measured by finished runs on this machine; None if unknown.

    `processes` devices are assumed to be that many times as fast.
    """
    if device is not None:
        if device.flops is None:
            return None
        count = f"{processes} x " if processes > 1 else ""
        source = f"{MFU:.0%} of the stated peak of {count}{device.name}: not measured"
        return Throughput(MFU * device.flops * processes, source)
    rate = _read_rates().get(compute)
    if rate is None:
        return None
    return Throughput(rate["flops"], f"the fastest run on this machine ({rate['run']})")


def record_throughput(compute: str, flops: float, run: str) -> None:
    """Store the throughput of a finished run for later plans.

    Only the fastest is kept: slower runs may have shared the machine.
    """
    rates = _read_rates()
    if flops > rates.get(compute, {}).get("flops", 0.0):
        new_rates = {**rates, compute: {"flops": flops, "run": run}}
        write_text(_rates_path(), json.dumps(new_rates, indent=2) + "\n")


def _read_rates() -> dict[str, dict[str, Any]]:
    try:
        return json.loads(_rates_path().read_text())  # type: ignore[no-any-return]
    # A missing or damaged cache only means that nothing was measured.
    except (OSError, ValueError):
        return {}


def _rates_path() -> Path:
    return cache_folder() / "rates.json"
