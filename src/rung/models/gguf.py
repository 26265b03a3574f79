"""GGUF files as bases: weights dequantized by transformers, the tokenizer repaired where that loses something."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rung.errors import ConfigError, RungError
from rung.models.base_model import (
    NO_CODE,
    disable_dropout,
    first_line,
    refuse_unsupported,
)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a transformers folder: safetensors in float32 and the tokenizer."""
    model, tokenizer = load_gguf(gguf, torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_gguf(where: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Read a GGUF file, its weights dequantized to `dtype`. Raises `ConfigError` where the file cannot be read."""
    try:
        config = AutoConfig.from_pretrained(where.parent, gguf_file=where.name, **NO_CODE)
        refuse_unsupported(config)
        disable_dropout(config)
        model = AutoModelForCausalLM.from_pretrained(
            where.parent,
            config=config,
            gguf_file=where.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            **NO_CODE,
        )
        return model, gguf_tokenizer(where)
    except RungError:
        raise
    except Exception as error:  # the reader fails in many ways on a file that is no GGUF
        raise ConfigError(
            f"this GGUF file cannot be read: {first_line(error)}", where="model.name", given=str(where)
        ) from error


def gguf_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """A GGUF file's tokenizer, mended where transformers loses something.

    GGUF files of the SmolLM family say `pre = smollm`; transformers builds a plain byte-level pre-tokenizer from them
    and loses the splitting of digits, so numbers would reach the model in pieces it never saw. It also pads with the
    end of turn, which the family does not.
    """
    from gguf import GGUFReader

    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **NO_CODE)
    field = GGUFReader(str(gguf)).fields.get("tokenizer.ggml.pre")
    if field is None or bytes(field.parts[field.data[0]]).decode() != "smollm":
        return tokenizer
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    tokenizer.pad_token = "<|endoftext|>"  # noqa: S105 - a token of text, not a secret
    return tokenizer
