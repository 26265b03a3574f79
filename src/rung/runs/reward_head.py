"""The score head of a reward run, in the files that transformers' and peft's sequence classification read.

`AutoModelForSequenceClassification` loads the folder of a full run, `PeftModelForSequenceClassification` puts that of
an adapter on the base; both read the score off the last token, as in training. The price is that a full run is written
twice: its saved weights are replaced by those of the classifier. `runs/train.py` writes the head, `runs/load.py` reads
it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rung.console import print_status
from rung.errors import CheckpointError
from rung.methods.adapter_files import CONFIG, WEIGHTS, is_score_head
from rung.models.load import classifier_keys
from rung.training.run_folder import read_json, write_json

HEAD_KEY = "score.weight"
OUTPUT_HEADS = ("lm_head.weight", "lm_head.bias", "embed_out.weight")
"""Tensors of output heads, which a classifier has not."""
HEAD_FILE = "score.safetensors"
"""File of the head for models without a sequence classification in transformers."""


def write_score_head(folder: Path, weight: Tensor, pad_id: int) -> None:
    """Add the head [1, H] to a saved adapter or model."""
    weight = weight.detach().cpu().contiguous()
    if (folder / WEIGHTS).exists():
        _add_to_adapter(folder, weight)
    elif (folder / "config.json").exists():
        _add_to_model(folder, weight, pad_id)
    else:
        save_file({HEAD_KEY: weight}, folder / HEAD_FILE)


def read_score_head(folder: Path) -> Tensor:
    """The head of a saved adapter or model. Raises `CheckpointError` if there is none."""
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            if name == HEAD_KEY or is_score_head(name):
                return value
    raise CheckpointError("there is no score head: this is no reward model", where=str(folder))


def _add_to_adapter(folder: Path, weight: Tensor) -> None:
    config = read_json(folder / CONFIG)
    # peft names a saved tensor by its place in the model. Around a LoRA the base is wrapped once more than around
    # virtual tokens.
    inner = "base_model" if "num_virtual_tokens" in config else "base_model.model"
    state = {**load_file(folder / WEIGHTS), f"{inner}.{HEAD_KEY}": weight}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    # peft restores a module that is no LoRA only if `modules_to_save` names it.
    modules = [name for name in config.get("modules_to_save") or () if name != "score"]
    write_json(folder / CONFIG, {**config, "task_type": "SEQ_CLS", "modules_to_save": [*modules, "score"]})


def _add_to_model(folder: Path, weight: Tensor, pad_id: int) -> None:
    config = read_json(folder / "config.json")
    classifier = classifier_keys(folder)
    if classifier is None:
        model_type = config["model_type"]
        print_status(f"transformers has no sequence classification for {model_type}: the head is in {HEAD_FILE}")
        save_file({HEAD_KEY: weight}, folder / HEAD_FILE)
        return
    architecture, keys = classifier
    files = sorted(folder.glob("*.safetensors"))
    state = {key: value for file in files for key, value in load_file(file).items()}
    dtype = next(iter(state.values())).dtype
    classifier_state = {key: value for key, value in state.items() if key in keys}
    # A classifier with randomly initialized tensors would load without an error.
    if missing_keys := keys - classifier_state.keys() - {HEAD_KEY}:
        raise CheckpointError("the classifier would lack tensors", where=str(folder), given=sorted(missing_keys)[:2])
    # The old files go first: the new ones may be sharded differently, and shards of both would stand side by side.
    for file in [*files, *folder.glob("*.index.json")]:
        file.unlink()
    save_torch_state_dict({**classifier_state, HEAD_KEY: weight.to(torch.promote_types(dtype, torch.float32))}, folder)
    # One label and regression: what transformers calls a model with a single score.
    labels = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "problem_type": "regression"}
    write_json(folder / "config.json", {**config, **labels, "architectures": [architecture], "pad_token_id": pad_id})
