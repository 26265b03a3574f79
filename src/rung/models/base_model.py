"""A loaded base model, and the rules that hold for every base, whatever file it came from.

`load.py` and `gguf.py` both build a `BaseModel`; this file reads weights only to hash them. It is separate from the
loaders so that neither loader imports the other.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from rung.config.support import model_refusal, quantization_refusal
from rung.errors import ConfigError, PlanError
from rung.models.rotary import rope_boundary
from rung.models.streaming import placement_of
from rung.planning.architecture import ModelShape, shape_from_config

SHARES_MEMORY = "_rung_shares_memory"
"""Attribute of parameters whose memory belongs to several models: none of them may move it."""


@dataclass(frozen=True)
class BaseModel:
    """A loaded base and what is needed to load it again."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    """The name from the config: a catalog name, a path or a hub id."""
    fingerprint: str
    """Hash of the weights, independent of the dtype they are loaded in."""
    compute_dtype: torch.dtype

    def share_weights(self) -> BaseModel:
        """Return a copy with new modules over the same weights, so that an adapter on one does not affect the other.

        Call it on a base as loaded, before a method is attached.
        """
        if placement_of(self.model) is not None:
            raise RuntimeError("the linears of this base are still in their file: nothing can share them")
        # deepcopy takes a tensor from this memo instead of copying it, so only the modules are duplicated (a few MB).
        memo: dict[int, Tensor] = {id(t): t for t in self.model.buffers()}
        # New Parameter objects over the same memory: widening one of them to float32 leaves the other copy unchanged.
        copies = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in self.model.parameters()}
        for parameter in (*self.model.parameters(), *copies.values()):
            setattr(parameter, SHARES_MEMORY, True)
        memo |= copies
        return replace(self, model=copy.deepcopy(self.model, memo))

    @property
    def dtype_name(self) -> str:
        """The compute type as configs name it."""
        return str(self.compute_dtype).removeprefix("torch.")

    @property
    def vocab_size(self) -> int:
        """Rows of the input embeddings: ids from here on are virtual tokens."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens at which the model ends a text, by its generation config and its config; Llama 3 has three."""
        configs = (getattr(self.model, "generation_config", None), self.model.config)
        values = [getattr(config, "eos_token_id", None) for config in configs]
        ids = (i for value in values for i in (value if isinstance(value, list | tuple) else [value]))
        return tuple(dict.fromkeys(int(i) for i in ids if i is not None))

    @property
    def shape(self) -> ModelShape:
        """Layer counts and widths, from which memory is planned."""
        return shape_from_config(self.model.config.to_dict())

    @property
    def rope_boundary(self) -> int | None:
        """Longest document in tokens before the rotary frequencies change; None for most models."""
        return rope_boundary(self.model.config)

    @property
    def context(self) -> int:
        """Longest document in tokens."""
        # A model without a limit on positions gets one that no document reaches.
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**20)


_OLD_BUFFER = re.compile(r"(^|\.)attn\.(bias|masked_bias)$")
"""Causal masks that transformers stored with GPT-2, GPT-J and their kin until 4.27; the code computes them."""

LoadedWeights = tuple[PreTrainedModel, PreTrainedTokenizerFast]
NO_REMOTE_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Code shipped with a model never runs. Without this argument transformers would ask at the terminal."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers prints no progress bars and no tables of tensors, whose faults are errors here."""
    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


def compute_dtype(name: str, device: torch.device | None = None) -> torch.dtype:
    """The dtype of matrix products. `auto` takes bfloat16 only where the hardware multiplies it."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device is not None and device.type == "cuda":
        # Cards before Ampere emulate bfloat16 products, which is slower than float32.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device is not None and device.type != "cpu":
        return torch.float32
    # Without these units bfloat16 products are emulated, which is slower than float32.
    has_bfloat16_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16_units else torch.float32


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype for sums that must not round: float64, which Apple's GPUs do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def fingerprint(source: Path | str, config: Any) -> str:
    """Identify the weights, whatever dtype they are loaded in: SHA-256 over the files, or a hub id with its commit."""
    if isinstance(source, str):
        return f"{source}@{getattr(config, '_commit_hash', None)}"
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    digest = hashlib.sha256()
    # Hashing each file first keeps the boundary between files in the digest.
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def require_all_weights(report: Mapping[str, Any], source: object, heads: Collection[str] = ()) -> None:
    """Raise `ConfigError` unless the tensors of a file and those of its model are the same.

    `report` is transformers' own of the load, without tied heads and buffers that it knows. A tensor that is missing
    has random values, others at every load; one too many belongs to a model that the config does not describe. `heads`
    are tensors that may be in one of the two only, because the caller reads or ignores them.
    """
    faults = {
        "missing in the file": set(report.get("missing_keys") or ()) - set(heads),
        "in the file, but not in the model of its config": {
            name for name in report.get("unexpected_keys") or () if name not in heads and not _OLD_BUFFER.search(name)
        },
        "of another shape than the config says": report.get("mismatched_keys"),
    }
    parts = []
    for fault, keys in faults.items():
        # a mismatch is a tuple of the name and both shapes, first that in the file
        if names := sorted(k if isinstance(k, str) else f"{k[0]} {[*k[1]]}, not {[*k[2]]}" for k in keys or ()):
            parts.append(f"{len(names)} {fault}: {', '.join(names[:3])}")
    if not parts:
        return
    given = "; ".join(parts)
    hint = "the file is damaged or incomplete, or config.json belongs to another model: fetch both again"
    summary = "the weights are not those of the model that config.json describes"
    raise ConfigError(summary, where="model.name", given=f"{source}: {given}", hint=hint)


def prepare_config(config: Any) -> None:
    """Turn off the dropout that a base ships with (GPT-2, Phi-2: 0.1): packed and unpacked runs would differ.

    Raises `PlanError` with the reason if Rung cannot train this architecture, `ConfigError` for quantized weights.
    """
    if reason := model_refusal(config.to_dict()):
        raise PlanError(reason, where="model.name", given=config.model_type)
    if refusal := quantization_refusal(config.to_dict()):
        raise ConfigError(refusal[0], where="model.name", hint=refusal[1])
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "dropout"):
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)
