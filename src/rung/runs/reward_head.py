"""A reward run's files as transformers' and peft's sequence classification reads them: the score head among the rest.

`AutoModelForSequenceClassification` loads the folder of a full run, `PeftModelForSequenceClassification` puts that of
an adapter on the base. Both read the score off the last token, as training did.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rung.console import print_status
from rung.errors import CheckpointError
from rung.methods.adapter_files import CONFIG, WEIGHTS, is_score_head
from rung.models.load import classifier_keys
from rung.training.run_folder import write_json

HEAD_KEY = "score.weight"
HEAD_FILE = "score.safetensors"
"""Where the head stands when no library has a place for it."""


def write_score_head(folder: Path, weight: Tensor, pad_id: int) -> None:
    """Add the head [1, H] to a written adapter or model."""
    weight = weight.detach().cpu().contiguous()
    if (folder / WEIGHTS).exists():
        _add_to_adapter(folder, weight)
    elif (folder / "config.json").exists():
        _add_to_model(folder, weight, pad_id)
    else:
        save_file({HEAD_KEY: weight}, folder / HEAD_FILE)


def read_score_head(folder: Path) -> Tensor:
    """The head of a written adapter or model. Raises `CheckpointError` where there is none."""
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            if name == HEAD_KEY or is_score_head(name):
                return value
    raise CheckpointError("there is no score head: this is no reward model", where=str(folder))


def _add_to_adapter(folder: Path, weight: Tensor) -> None:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    # peft names what it saves after where it stands; under a prompt the base is not wrapped once more
    inner = "base_model" if "num_virtual_tokens" in config else "base_model.model"
    state = {**load_file(folder / WEIGHTS), f"{inner}.{HEAD_KEY}": weight}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    modules = [name for name in config.get("modules_to_save") or () if name != "score"]
    write_json(folder / CONFIG, {**config, "task_type": "SEQ_CLS", "modules_to_save": [*modules, "score"]})


def _add_to_model(folder: Path, weight: Tensor, pad_id: int) -> None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    classifier = classifier_keys(folder)
    if classifier is None:
        print_status(
            f"transformers has no sequence classification for {config['model_type']}: the head stands in {HEAD_FILE}"
        )
        save_file({HEAD_KEY: weight}, folder / HEAD_FILE)
        return
    architecture, keys = classifier
    files = sorted(folder.glob("*.safetensors"))
    state = {key: value for file in files for key, value in load_file(file).items()}
    dtype = next(iter(state.values())).dtype
    classifier_state = {key: value for key, value in state.items() if key in keys}
    if missing_keys := keys - classifier_state.keys() - {HEAD_KEY}:
        raise CheckpointError("the classifier would lack tensors", where=str(folder), given=sorted(missing_keys)[:2])
    for file in [*files, *folder.glob("*.index.json")]:
        file.unlink()
    save_torch_state_dict({**classifier_state, HEAD_KEY: weight.to(torch.promote_types(dtype, torch.float32))}, folder)
    labels = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "problem_type": "regression"}
    write_json(folder / "config.json", {**config, **labels, "architectures": [architecture], "pad_token_id": pad_id})
