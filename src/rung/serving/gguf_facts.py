"""What a server must know of a GGUF file before llama.cpp loads it: its context, its kind, and bytes a token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rung.planning.architecture import open_gguf

STATE_BYTES = 2
"""llama.cpp keeps keys and values in float16."""
DEFAULT_CONTEXT = 4096
"""Where a file says nothing."""


@dataclass(frozen=True)
class GgufFacts:
    """Facts of a file."""

    context: int
    """Tokens that the model was trained for."""
    vocabulary: int
    token_bytes: int
    """Bytes of keys and values of one token in all layers."""
    is_encoder: bool
    """Whether it has embeddings and writes nothing."""


def read_gguf_facts(file: Path) -> GgufFacts:
    """The facts. Raises `ConfigError` for a file that is no GGUF file."""
    reader, kind = open_gguf(file)

    def setting(name: str, default: Any = None) -> Any:
        field = reader.fields.get(f"{kind}.{name}")
        return default if field is None else field.contents()

    layers, heads = int(setting("block_count", 1)), setting("attention.head_count", 1)
    kv_heads = setting("attention.head_count_kv", heads)
    width = int(setting("embedding_length", 0)) // max(1, _largest(heads))
    # a head count a layer, where layers differ
    all_heads = sum(kv_heads) if isinstance(kv_heads, list) else int(kv_heads) * layers
    per_head = int(setting("attention.key_length", width)) + int(setting("attention.value_length", width))
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    return GgufFacts(
        context=int(setting("context_length", DEFAULT_CONTEXT)),
        vocabulary=len(tokens.data) if tokens is not None else int(setting("vocab_size", 0)),
        token_bytes=max(1, all_heads * per_head * STATE_BYTES),
        # encoders say how the states of a text become one vector; decoders do not
        is_encoder=setting("pooling_type") is not None and not setting("attention.causal", True),
    )


def _largest(value: Any) -> int:
    return max(value) if isinstance(value, list) else int(value)
