"""Files of adapters: peft's own form, and that of Rung's tuners, which peft reads once `rung.peft` is imported."""

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
    """Peft's two files: a tensor by name each, and the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}  # RandLoRA shares
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / CONFIG).write_text(json.dumps({**plain, "inference_mode": True}, indent=2, default=str) + "\n")


def is_score_head(name: str) -> bool:
    """Whether a tensor of an adapter's file is the score head of a reward model: the objective's, not the method's."""
    return name.endswith(".score.weight")


def read_state(folder: Path) -> dict[str, Tensor]:
    """The method's own tensors of a written adapter."""
    return {name: value for name, value in load_file(folder / WEIGHTS).items() if not is_score_head(name)}


def named_adapter_parameters(hosts: Mapping[str, nn.Module], own: str) -> dict[str, nn.Parameter]:
    """Parameters of the submodule `own` of each host, as the tuner's trainables."""
    return {
        f"{name}.{own}.{inner}": parameter
        for name, host in hosts.items()
        for inner, parameter in host.get_submodule(own).named_parameters()
    }


def write_rung_tuner(folder: Path, hosts: Mapping[str, nn.Module], own: str, config: Mapping[str, Any]) -> None:
    """Weights by the names that peft gives them, and the settings to build them again."""
    peft_config = {
        "peft_type": f"RUNG_{own.upper()}",
        "task_type": "CAUSAL_LM",
        "target_modules": list(hosts),
        "method_config": dict(config),
    }
    write_peft_files(
        folder, {_key(name, own): p for name, p in named_adapter_parameters(hosts, own).items()}, peft_config
    )


def read_rung_tuner(folder: Path, hosts: Mapping[str, nn.Module], own: str) -> None:
    """Put saved weights back; keys missing or left over raise `CheckpointError`."""
    state, parameters = read_state(folder), named_adapter_parameters(hosts, own)
    keys: Iterable[str] = [_key(name, own) for name in parameters]
    require_same_keys(state.keys(), keys, str(folder))
    require_same_shapes({_key(name, own): p for name, p in parameters.items()}, state, str(folder))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[_key(name, own)])


def _key(name: str, own: str) -> str:
    return "base_model.model." + name.replace(f".{own}.", ".rung_adapters.")
