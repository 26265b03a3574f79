"""Checks of a model folder before its weights are loaded: what transformers would report late or in its own terms.

Each fault is a `ConfigError` that names the file and the remedy. Only headers are read, so that the checks take
milliseconds; the values are looked at by `require_finite_weights` once they are loaded. `models/load.py` calls both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rung.errors import ConfigError
from rung.files import check_safetensors

INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files from which transformers makes a tokenizer; a folder has one of them."""
_CHUNK = 1 << 22
"""Elements that are summed at once: a sum in float32 of all at once would copy a bfloat16 tensor."""


def check_base_folder(folder: Path) -> None:
    """Raise `ConfigError` for missing, damaged or unsupported files of a model."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        _refuse_without_safetensors(folder)
    _check_index(folder / INDEX_FILE)
    for file in files:
        for name, entry in check_safetensors(file).items():
            # of vectors too: masks of old GPT-2 files are the only integers that belong to a model
            if entry["dtype"][0] in "IU" and len(entry["shape"]) == 2:
                summary = f"{name} holds integers ({entry['dtype']}): these are the weights of a quantized model"
                hint = "take the model it was made from; `method: {kind: qlora}` quantizes that while it loads"
                raise ConfigError(summary, where=str(file), hint=hint)
    check_json(folder / "tokenizer.json", "fetch tokenizer.json again")


def check_tokenizer(folder: Path) -> None:
    """Raise `ConfigError` for a folder without the files of a tokenizer."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        hint = "copy tokenizer.json and tokenizer_config.json of the model into it"
        raise ConfigError("this folder has no tokenizer", where=str(folder), allowed="tokenizer.json", hint=hint)


def check_json(file: Path, hint: str) -> Any:
    """The content of a JSON file, None without the file. Raises `ConfigError` for a file that is not JSON."""
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"this file is damaged: {error}", where=str(file), hint=hint) from error


def _refuse_without_safetensors(folder: Path) -> None:
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        # not read here, not even with weights_only: nothing of a pickle is, whoever wrote it
        load = "from transformers import AutoModelForCausalLM as M; M.from_pretrained"
        command = f"python -c \"{load}('{folder}').save_pretrained('{folder}')\""
        hint = f"if you trust its source, convert it once: {command}"
        summary = "this model has its weights as a pickle, which can run code and is not read"
        raise ConfigError(summary, where=str(folder), given=", ".join(pickles[:3]), allowed="*.safetensors", hint=hint)
    hint = "fetch the model again with its *.safetensors files"
    raise ConfigError("this folder has no weights", where=str(folder), allowed="*.safetensors", hint=hint)


def _check_index(index: Path) -> None:
    content = check_json(index, "fetch it again with all files of the model")
    if not index.exists():
        return
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise ConfigError("this index has no weight_map", where=str(index), hint="fetch it again")
    if missing := sorted({str(name) for name in weight_map.values() if not (index.parent / str(name)).exists()}):
        summary = f"{len(missing)} of the files that it names are missing"
        raise ConfigError(summary, where=str(index), given=", ".join(missing[:3]), hint="fetch the missing files")


def require_finite_weights(model: nn.Module, source: object) -> None:
    """Raise `ConfigError` for a weight that is NaN or infinite: every loss and every answer would be NaN.

    Weights that are still in their files are looked at when they are read.
    """
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point() and not value.is_meta and not is_finite(value.detach()):
            hint = "the file is damaged, or the training that made it diverged: take another copy or checkpoint"
            summary = f"weight {name} holds a value that is not finite"
            raise ConfigError(summary, where="model.name", given=str(source), hint=hint)


def is_finite(value: Tensor) -> bool:
    """Whether no element is NaN or infinite. A sum reads memory once and shows both; it may overflow, then all are."""
    flat = value.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        if not bool(torch.isfinite(part.sum(dtype=torch.float32))) and not bool(torch.isfinite(part).all()):
            return False
    return True
