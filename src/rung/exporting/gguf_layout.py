"""How GGUF stores each architecture: tensor names, hyperparameters, and the changes that llama.cpp expects.

One table says what llama.cpp computes for an architecture; a model that computes anything else is refused by name,
because llama.cpp would load it and answer wrongly. Names come from the gguf package. `gguf_file.py` writes what this
module describes, and `proof.py` compares the result with the run.

Sources: convert_hf_to_gguf.py and src/llama-model.cpp of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor

from rung.errors import PlanError
from rung.exporting.weights import ModelWeights

Change = Literal["none", "interleave_halves", "transpose", "add_one"]
"""What happens to a tensor on its way: rotary halves interleaved (llama.cpp rotates neighbors), transposed, plus 1."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What llama.cpp assumes of an architecture of transformers."""

    gguf: MODEL_ARCH
    activations: tuple[str, ...]
    interleaves_halves: bool = False
    """Rows of q and k are reordered: transformers rotates halves of a head, llama.cpp neighboring pairs."""
    adds_one: bool = False
    """Norms store their weight minus 1, as Gemma does; llama.cpp stores the weight."""
    transposes: bool = False
    """Linears store [I, O], as GPT-2 does."""
    window_pattern: int | None = None
    """Every n-th layer attends to everything and the others to a window; None: llama.cpp knows no window."""
    ties_always: bool = False
    """The output head is always the embedding."""

    @property
    def reads_gelu_from_a_table(self) -> bool:
        """Whether ggml takes the activation from a table in float16."""
        return "silu" not in self.activations


_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(MODEL_ARCH.LLAMA, ("silu",), interleaves_halves=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, ("silu",), interleaves_halves=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, ("silu",)),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, ("silu",)),
    "phi": Architecture(MODEL_ARCH.PHI2, _GELU),
    "phi3": Architecture(MODEL_ARCH.PHI3, ("silu",)),
    "gemma": Architecture(MODEL_ARCH.GEMMA, (*_GELU, "gelu"), adds_one=True, ties_always=True),
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, _GELU, adds_one=True, window_pattern=2, ties_always=True),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, _GELU, adds_one=True, window_pattern=6, ties_always=True),
    "gpt2": Architecture(MODEL_ARCH.GPT2, _GELU, transposes=True),
}
"""By `model_type` of transformers. Gemma says `gelu` in old configs and computes the tanh form all the same."""
_LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the 27B models, whose scores llama.cpp divides by the root of width over heads."""
_YARN_KEYS = {
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
_ROPE_SCALING = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN, "longrope": RopeScalingType.LONGROPE}


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers config. Raises `PlanError` with the reason if llama.cpp computes another."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        hint = "rung export --as merged writes a transformers folder"
        summary = "the GGUF export does not know this architecture"
        raise PlanError(summary, given=config.model_type, allowed=", ".join(ARCHITECTURES), hint=hint)
    for problem in _differences(config, architecture):
        hint = "rung export --as merged writes a transformers folder"
        raise PlanError("llama.cpp computes this model otherwise", given=problem, hint=hint)
    return architecture


def _differences(config: Any, architecture: Architecture) -> Iterator[str]:
    """Settings of a model that llama.cpp does not follow."""
    activation = _activation(config)
    if activation not in architecture.activations:
        yield f"activation {activation}, where llama.cpp computes {architecture.activations[0]}"
    rope_type = rope(config).get("rope_type", "default")
    if rope_type not in ("default", "llama3", *_ROPE_SCALING):
        yield f"rope_type: {rope_type}"
    for name in (
        "qk_layernorm",
        "scale_attn_by_inverse_layer_idx",
        "add_cross_attention",
        "use_bidirectional_attention",
    ):
        if getattr(config, name, False):
            yield f"{name}: true"
    if architecture.window_pattern is not None:
        pattern = architecture.window_pattern
        layers = range(config.num_hidden_layers)
        expected = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in layers]
        if list(config.layer_types) != expected:
            yield f"layer_types other than every {pattern}th layer with full attention"
        scale = config.query_pre_attn_scalar
        is_largest = config.num_hidden_layers == _LARGEST_GEMMA[config.model_type]
        used = config.hidden_size // config.num_attention_heads if is_largest else config.head_dim
        if scale != used:
            yield f"query_pre_attn_scalar: {scale}, where llama.cpp takes {used}"


def _activation(config: Any) -> str:
    # Gemma's older configs have both, and transformers computes the second
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next(str(value) for name in names if (value := getattr(config, name, None)))


def rope(config: Any, layers: str = "full_attention") -> dict[str, Any]:
    """Rotary settings of the layers with this attention; empty for learned positions."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    return dict(parameters.get(layers) or {}) if "full_attention" in parameters else parameters


def context_length(config: Any, architecture: Architecture) -> int:
    """Tokens up to which llama.cpp computes what the model does.

    That is the model's context, unless it has a window that llama.cpp does not know, or LongRoPE: the run chooses short
    or long factors for each document, llama.cpp once by the size of its context.
    """
    context = int(config.max_position_embeddings)
    if (parameters := rope(config)).get("rope_type") == "longrope":
        context = min(context, _original_context(config, parameters))
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"]
    if architecture.window_pattern is not None or window is None or "sliding_attention" not in layer_types:
        return context
    return min(context, int(window))


def write_hyperparameters(writer: GGUFWriter, config: Any, architecture: Architecture) -> None:
    """Write sizes, norms and rotary settings under llama.cpp's keys."""
    heads, width = config.num_attention_heads, config.hidden_size
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config, architecture))
    writer.add_embedding_length(width)
    # GPT-2 may leave its own out, which stands for four times the width
    writer.add_feed_forward_length(
        getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    )
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_vocab_size(config.vocab_size)
    if (epsilon := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(epsilon)
    if (epsilon := getattr(config, "layer_norm_eps", None) or getattr(config, "layer_norm_epsilon", None)) is not None:
        writer.add_layer_norm_eps(epsilon)
    head_width = getattr(config, "head_dim", None) or width // heads
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(head_width)
        writer.add_value_length(head_width)
    if parameters := rope(config):
        _write_rope(writer, config, parameters, head_width)
    if architecture.window_pattern is not None:
        writer.add_sliding_window(config.sliding_window)
    elif architecture.gguf is MODEL_ARCH.PHI3:
        # the key must be there; 0 is no window, and `context_length` ends where the model's window does
        writer.add_sliding_window(0)
    for name, write in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if (limit := getattr(config, name, None)) is not None:
            write(limit)


def _write_rope(writer: GGUFWriter, config: Any, parameters: Mapping[str, Any], head_width: int) -> None:
    writer.add_rope_dimension_count(int(head_width * parameters.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(parameters["rope_theta"])
    if local := rope(config, "sliding_attention"):
        # gguf 0.17 has no function for it
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", local["rope_theta"])
    kind = parameters.get("rope_type", "default")
    if kind in _ROPE_SCALING:
        writer.add_rope_scaling_type(_ROPE_SCALING[kind])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(_original_context(config, parameters))
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(_longrope_factor(config, parameters))
    if kind == "yarn":
        for name, key in _YARN_KEYS.items():
            if (value := parameters.get(name)) is not None:
                writer.add_float32(f"{writer.arch}.rope.scaling.{key}", value)


def _original_context(config: Any, parameters: Mapping[str, Any]) -> int:
    """Context of the model before its frequencies were scaled."""
    return int(parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings)


def _longrope_factor(config: Any, parameters: Mapping[str, Any]) -> float:
    """Factor of the rotated vectors (Ding et al. 2024, LongRoPE; the rule of Phi-3's own code)."""
    if (factor := parameters.get("attention_factor")) is not None:
        return float(factor)
    original = _original_context(config, parameters)
    scale = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def rope_factors(config: Any) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Tensors of rotary factors by name: by how much each frequency is divided; none for most models."""
    parameters = rope(config)
    kind = parameters.get("rope_type", "default")
    if kind == "longrope":
        names = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
        return {name: np.array(parameters[key], dtype=np.float32) for name, key in names.items()}
    if kind != "llama3":
        return {}
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = parameters["rope_theta"] ** -(np.arange(0, head_width, 2) / head_width)
    wavelengths = 2 * np.pi / frequencies
    factor, low, high = (parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    # between both limits the frequency goes over from divided to its own (Llama 3.1's rule)
    smooth = np.clip((parameters["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the file and where it comes from."""

    name: str
    """In GGUF."""
    source: str
    """In transformers."""
    shape: tuple[int, ...]
    """As written, rows first."""
    change: Change = "none"
    heads: int = 0
    """Heads whose halves are interleaved."""

    def blocks(self, weights: ModelWeights, values: int) -> Iterator[Tensor]:
        """The changed tensor, float32, in blocks of about so many values."""
        rows = max(1, values // math.prod(self.shape[1:]))
        if self.change in ("interleave_halves", "transpose"):
            whole = weights.rows(self.source, 0, weights.shapes[self.source][0])
            whole = whole.T if self.change == "transpose" else whole[interleaved_rows(self.shape[0], self.heads)]
            yield from torch.split(whole, rows)
            return
        for block in weights.blocks(self.source, rows):
            yield block + 1 if self.change == "add_one" else block


def interleaved_rows(rows: int, heads: int) -> Tensor:
    """Row numbers in the order of llama.cpp: 0, d/2, 1, d/2 + 1, ... within each head of d rows."""
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


def stored_tensors(config: Any, architecture: Architecture, weights: ModelWeights) -> list[StoredTensor]:
    """The tensors of the file in its order. Raises `PlanError` for a weight without a place in it."""
    names = get_tensor_name_map(architecture.gguf, config.num_hidden_layers)
    tensors = []
    for source, shape in weights.shapes.items():
        if _is_redundant(source, config, architecture):
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            kind = MODEL_ARCH_NAMES[architecture.gguf]
            raise PlanError(f"GGUF has no place for this tensor in its architecture {kind}", given=source)
        tensors.append(_stored_tensor(name, source, shape, config, architecture))
    return sorted(tensors, key=_file_order)


def _is_redundant(source: str, config: Any, architecture: Architecture) -> bool:
    """The head of a tied model, and what old files hold besides weights: masks and rotary frequencies."""
    is_tied = architecture.ties_always or config.tie_word_embeddings
    buffers = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
    return (is_tied and source == "lm_head.weight") or source.endswith(buffers)


def _stored_tensor(
    name: str, source: str, shape: tuple[int, ...], config: Any, architecture: Architecture
) -> StoredTensor:
    part = name.split(".")[-2]
    if architecture.interleaves_halves and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads
        if part == "attn_k":
            heads = config.num_key_value_heads or heads
        return StoredTensor(name, source, shape, "interleave_halves", heads)
    if architecture.transposes and part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down") and len(shape) == 2:
        return StoredTensor(name, source, shape[::-1], "transpose")
    if architecture.adds_one and part.endswith("_norm"):
        return StoredTensor(name, source, shape, "add_one")
    return StoredTensor(name, source, shape)


def _file_order(tensor: StoredTensor) -> tuple[int, int, str]:
    """What stands outside of layers first, then layer by layer."""
    parts = tensor.name.split(".")
    return (1, int(parts[1]), tensor.name) if parts[0] == "blk" else (0, 0, tensor.name)
