"""Tiny random models of every shape Rung claims, with every bias and norm randomized: zeros hide bugs."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rung.models import attention

DEVICE = torch.device(os.environ.get("RUNG_TEST_DEVICE", "cpu"))
"""Where the tests' models are: cpu, or a graphics card with `RUNG_TEST_DEVICE=cuda`."""
VOCABULARY = 320
_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA_LIKE, "tie_word_embeddings": True},
    "qwen2": dict(_LLAMA_LIKE),
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8},
    "mistral": {**_LLAMA_LIKE, "sliding_window": 5},
    "phi": {**_LLAMA_LIKE, "num_key_value_heads": 4},
    "phi3": dict(_LLAMA_LIKE),
    "gemma": {**_LLAMA_LIKE, "head_dim": 8},
    "gemma2": {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_positions": 256,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
    "opt": {**_LLAMA_LIKE, "word_embed_proj_dim": 32, "ffn_dim": 48},
}
LAYER_NORM_SHAPES = ("gpt2", "opt", "phi")
"""RMSNorm in transformers computes in float32 inside, so only these reach float64's own accuracy."""


def tiny_model(
    shape: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A random model of a shape, in eval mode, dropout off, all parameters drawn anew and nothing trainable."""
    attention.register()
    config = AutoConfig.for_model(shape, **{**SHAPES[shape], **changes})
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            center = 1.0 if "norm" in name and "weight" in name else 0.0
            width = 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(center + width * noise)
    model.requires_grad_(False)
    return model.eval().to(DEVICE)
