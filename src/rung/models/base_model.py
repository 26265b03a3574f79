"""A loaded base model, and the rules that hold for every base, whatever file it came from.

`load.py` and `gguf.py` both make a `Base`; nothing here reads weights.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rung.config.support import model_refusal
from rung.errors import PlanError
from rung.planning.architecture import ModelShape, shape_from_config


@dataclass(frozen=True)
class BaseModel:
    """A loaded base and what must be known to load it again."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    """As the user gave it."""
    fingerprint: str
    """Of the weights, independent of the dtype they are loaded in."""
    compute_dtype: torch.dtype

    def share_weights(self) -> BaseModel:
        """The same weights in modules of its own: an adapter on one is not seen by the other. For a base as loaded."""
        held: dict[int, Tensor] = {id(t): t for t in self.model.buffers()}
        # parameters of its own over the same memory: whatever widens one of them leaves the others as they are
        held |= {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in self.model.parameters()}
        return replace(self, model=copy.deepcopy(self.model, held))

    @property
    def vocab_size(self) -> int:
        """Rows of the input embeddings: ids from here on are virtual tokens."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def shape(self) -> ModelShape:
        """Its numbers, that memory follows from."""
        return shape_from_config(self.model.config.to_dict())

    @property
    def context(self) -> int:
        """Longest document in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**20)


NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Code that comes with a model never runs; unless this is said, transformers asks at the terminal."""


def compute_dtype(wanted: str, device: torch.device | None = None) -> torch.dtype:
    """The dtype products run in. `auto` takes bfloat16 only where hardware multiplies it."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    if device is not None and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def fingerprint(where: Path | str, config: Any) -> str:
    """Names the weights, whatever dtype they are loaded in: SHA-256 over the files, or a hub id with its commit."""
    if isinstance(where, str):
        return f"{where}@{getattr(config, '_commit_hash', None)}"
    files = [where] if where.is_file() else sorted(where.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def disable_dropout(config: Any) -> None:
    """Dropout that a base ships with (GPT-2, Phi-2: 0.1) would make packed and unpacked runs differ."""
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "dropout"):
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)


def refuse_unsupported(config: Any) -> None:
    """Raise `PlanError` with the reason for an architecture that cannot be trained here."""
    if reason := model_refusal(config.model_type, encoder_decoder=bool(getattr(config, "is_encoder_decoder", False))):
        raise PlanError(reason, where="model.name", given=config.model_type)


def first_line(error: Exception) -> str:
    """The first line of an error's text; its type where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
