"""GGUF files as bases: transformers dequantizes the weights, Rung repairs what the tokenizer loses in the conversion.

Dequantized weights take the memory of an ordinary model; quantized training is the task of `methods/qlora.py`.
`models/load.py` opens a user's GGUF file here, and `models/download.py` converts the file of a catalog base.
"""

from __future__ import annotations

import io
import re
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

from rung.errors import ConfigError, RungError
from rung.models.base_model import (
    NO_REMOTE_CODE,
    LoadedWeights,
    prepare_config,
    quiet_transformers,
    require_all_weights,
)

_LAYER = re.compile(r"blk\.(\d+)\.")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to a transformers folder: safetensors in float32 and the tokenizer."""
    model, tokenizer = load_gguf(gguf, torch.float32)
    # The repaired tokenizer pads with another token than the file says.
    model.config.pad_token_id = tokenizer.pad_token_id
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def load_gguf(path: Path, dtype: torch.dtype) -> LoadedWeights:
    """Load a GGUF file with its weights dequantized to `dtype`. Raises `ConfigError` if the file cannot be read."""
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, **NO_REMOTE_CODE)
        prepare_config(config)
        options = {"config": config, "quantization_config": GgufConfig(dequantize=True), "dtype": dtype}
        options["output_loading_info"] = True
        # its progress bar obeys no setting of transformers: shown on a terminal, and no lines of it in a log file
        hidden = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
        with quiet_transformers(), hidden:
            model, report = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, **options, **NO_REMOTE_CODE
            )
        require_all_weights(report, path)
        require_all_layers(path, config)
        return model, gguf_tokenizer(path)
    except RungError:
        raise
    except Exception as error:  # the reader raises many types for a file that is not GGUF
        reason = f"this GGUF file cannot be read: {message_of(error)}"
        raise ConfigError(reason, where="model.name", given=str(path)) from error


def require_all_layers(path: Path, config: Any) -> None:
    """Raise `ConfigError` for layers in the file beyond those of its metadata, which transformers passes over."""
    from gguf import GGUFReader

    numbers = [int(match[1]) for t in GGUFReader(str(path)).tensors if (match := _LAYER.match(t.name))]
    if (layers := max(numbers, default=-1) + 1) != config.num_hidden_layers:
        summary = "the tensors of this GGUF file are not those of its metadata"
        given = f"{layers} layers of tensors, {config.num_hidden_layers} in the metadata"
        raise ConfigError(summary, where="model.name", given=f"{path}: {given}")


def gguf_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a GGUF file and repair what transformers loses.

    GGUF files of the SmolLM family state `pre = smollm`. transformers builds a plain byte-level pre-tokenizer for them
    and loses the splitting of digits, so numbers would be tokenized differently than in pretraining. It also pads with
    the end-of-turn token, which the family does not.
    """
    from gguf import GGUFReader

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **NO_REMOTE_CODE)
    field = GGUFReader(str(gguf)).fields.get("tokenizer.ggml.pre")
    if field is None or bytes(field.parts[field.data[0]]).decode() != "smollm":
        return tokenizer
    backend, digits = tokenizer.backend_tokenizer, pre_tokenizers.Digits(individual_digits=True)
    # Digits first: the byte-level step then sees single digits, as in the original tokenizer.
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.pad_token = "<|endoftext|>"  # noqa: S105 - a token of text, not a secret
    return tokenizer


MAX_MESSAGE_CHARACTERS = 300


def message_of(error: Exception) -> str:
    """An error's text in one line, cut where it is long, or its type name if it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else f"{text[:MAX_MESSAGE_CHARACTERS]}..."
