"""Adapter files: peft's format, and that of Rung's tuners, which peft reads once `rung.peft` is imported.

One format means that adapters load without Rung; the cost is that names and settings follow peft's conventions.
Every adapter method saves and loads through these functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rung.methods.protocol import require_same_keys, require_same_shapes

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


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


def read_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter that belong to the method."""
    return {name: value for name, value in load_file(folder / WEIGHTS).items() if not is_score_head(name)}


def named_adapter_parameters(hosts: Mapping[str, nn.Module], submodule: str) -> dict[str, nn.Parameter]:
    """Trainable parameters of the tuner: those of `submodule` in each host module."""
    return {
        f"{name}.{submodule}.{parameter_name}": parameter
        for name, host in hosts.items()
        for parameter_name, parameter in host.get_submodule(submodule).named_parameters()
    }


def write_rung_tuner(folder: Path, hosts: Mapping[str, nn.Module], submodule: str, config: Mapping[str, Any]) -> None:
    """Write weights under peft's names, and the settings to rebuild the modules."""
    peft_config = {
        "peft_type": f"RUNG_{submodule.upper()}",
        "task_type": "CAUSAL_LM",
        "target_modules": list(hosts),
        "method_config": dict(config),
    }
    write_peft_files(
        folder,
        {_key(name, submodule): p for name, p in named_adapter_parameters(hosts, submodule).items()},
        peft_config,
    )


def read_rung_tuner(folder: Path, hosts: Mapping[str, nn.Module], submodule: str) -> None:
    """Load saved weights; missing or unexpected keys raise `CheckpointError`."""
    state, parameters = read_state(folder), named_adapter_parameters(hosts, submodule)
    keys: Iterable[str] = [_key(name, submodule) for name in parameters]
    require_same_keys(state.keys(), keys, str(folder))
    require_same_shapes({_key(name, submodule): p for name, p in parameters.items()}, state, str(folder))
    # Copied into the existing parameters: the optimizer and the hooks hold references to them.
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[_key(name, submodule)])


def _key(name: str, submodule: str) -> str:
    return "base_model.model." + name.replace(f".{submodule}.", ".rung_adapters.")
