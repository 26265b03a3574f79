"""Adapter files: peft's format, and that of Rung's tuners, which peft reads once `rung.peft` is imported.

One format means that adapters load without Rung; the cost is that names and settings follow peft's conventions.
Every adapter method saves and loads through these functions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rung.errors import CheckpointError
from rung.methods.protocol import require_same_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_UPDATE_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def write_peft_files(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write peft's two files: tensors by name, and the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, because some tuners (RandLoRA) share tensors and safetensors refuses shared memory.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    # peft holds module names in sets, which JSON lacks; sorted, the file is the same every time.
    json_config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / CONFIG).write_text(json.dumps({**json_config, "inference_mode": True}, indent=2, default=str) + "\n")


def is_score_head(name: str) -> bool:
    """Whether a tensor of an adapter file is a reward model's score head, which belongs to the objective."""
    return name.endswith(".score.weight")


def read_state(folder: Path, expected: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a saved adapter that belong to the method. Other keys or shapes raise `CheckpointError`."""
    state = {name: value for name, value in load_file(folder / WEIGHTS).items() if not is_score_head(name)}
    if expected is not None:
        require_same_tensors(expected, state, str(folder))
    return state


class SavedUpdate(NamedTuple):
    """The update of one linear in a saved LoRA: scale * B A."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    transposed: bool
    """Whether the base keeps the weight as [I, O], as GPT-2 does."""


def other_than_plain_lora(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> str | None:
    """What a saved adapter holds besides sums of B A, or None: such an adapter can only be applied by peft itself."""
    if config.get("peft_type") != "LORA":
        return str(config.get("peft_type"))
    for setting in ("use_dora", "lora_bias", "modules_to_save"):
        if config.get(setting):
            return f"{setting}: {config[setting]}"
    return next((key for key in state if _UPDATE_KEY.fullmatch(key) is None), None)


def lora_updates(state: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, SavedUpdate]:
    """Updates of a saved plain LoRA by module name, with each module's own rank and scale (rsLoRA included).

    Rank and alpha patterns are matched by peft's own function: a key is a regular expression for the end of a name, and
    the first key that matches counts. Raises `CheckpointError` where half of an update or a whole one is missing, or
    where a matrix has another rank than the settings say: peft would refuse to load it.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if (match := _UPDATE_KEY.fullmatch(key)) is not None:
            halves.setdefault(match[1], {})[match[2]] = tensor
    updates: dict[str, SavedUpdate] = {}
    for module, half in halves.items():
        rank = _pattern_value(config.get("rank_pattern"), module, config["r"])
        if set(half) != {"A", "B"} or half["B"].shape[1] != half["A"].shape[0] or half["A"].shape[0] != rank:
            raise CheckpointError("half of this update is missing or of another rank", where=where, given=module)
        scale, transposed = saved_scale(config, module), bool(config.get("fan_in_fan_out"))
        updates[module] = SavedUpdate(half["A"], half["B"], scale, transposed)
    targets = config.get("target_modules")
    names = targets if isinstance(targets, list) else []
    unmatched = [name for name in names if not any(m == name or m.endswith(f".{name}") for m in updates)]
    if unmatched or not updates:
        given = ", ".join(unmatched[:3])
        raise CheckpointError("the adapter lacks updates that it names", where=where, given=given)
    return updates


def saved_scale(config: Mapping[str, Any], module: str) -> float:
    """Factor of B A that the settings of a saved LoRA give a module."""
    rank = _pattern_value(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    return (pattern or {}).get(get_pattern_key(list(pattern or {}), module), default)


def named_adapter_parameters(hosts: Mapping[str, nn.Module], submodule: str) -> dict[str, nn.Parameter]:
    """Trainable parameters of the tuner: those of `submodule` in each host module."""
    modules = {f"{name}.{submodule}": host.get_submodule(submodule) for name, host in hosts.items()}
    return {f"{prefix}.{name}": p for prefix, m in modules.items() for name, p in m.named_parameters()}


def write_rung_tuner(folder: Path, hosts: Mapping[str, nn.Module], submodule: str, config: Mapping[str, Any]) -> None:
    """Write weights under peft's names, and the settings to rebuild the modules."""
    peft_config = {"peft_type": f"RUNG_{submodule.upper()}", "task_type": "CAUSAL_LM"}
    settings = {**peft_config, "target_modules": list(hosts), "method_config": dict(config)}
    write_peft_files(folder, _rung_tuner_state(hosts, submodule), settings)


def read_rung_tuner(folder: Path, hosts: Mapping[str, nn.Module], submodule: str) -> None:
    """Load saved weights; missing or unexpected keys raise `CheckpointError`."""
    parameters = _rung_tuner_state(hosts, submodule)
    state = read_state(folder, parameters)
    # Copied into the existing parameters: the optimizer and the hooks hold references to them.
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state[key])


def _rung_tuner_state(hosts: Mapping[str, nn.Module], submodule: str) -> dict[str, nn.Parameter]:
    parameters = named_adapter_parameters(hosts, submodule).items()
    return {f"base_model.model.{name.replace(f'.{submodule}.', '.rung_adapters.')}": p for name, p in parameters}
