"""How many tokens to compute at once, from the shape of the model alone, so that a resume computes the same."""

from __future__ import annotations

from typing import Any

ACTIVATION_BYTES = 512 * 2**20
"""What the activations of one micro-batch may hold on a processor."""
FEWEST, MOST = 256, 4096
"""Below some hundred rows matrix products slow down; beyond a few thousand nothing is gained on a processor."""
CUDA_TOKENS = 16_384


def tokens_per_micro_batch(config: Any, device_type: str) -> int:
    """The `auto` budget. 600 to 800 tokens for a 135M model, where products are at full speed."""
    if device_type == "cuda":
        return CUDA_TOKENS
    return max(FEWEST, min(MOST, ACTIVATION_BYTES // activation_bytes_per_token(config)))


def activation_bytes_per_token(config: Any) -> int:
    """Bytes kept for the backward pass per token in float32: 4 * layers * (4 H + 2 H_kv + 2 H_mlp)."""
    width = config.hidden_size
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * head_width
    mlp = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    return int(4 * config.num_hidden_layers * (4 * width + 2 * kv + 2 * mlp))
