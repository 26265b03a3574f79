"""Unsupported models, devices and combinations, each with the reason that the error message gives.

One table instead of checks in many places: documentation and tests read the same entries, and no limit is silent.
`models.load` and `runs.checks` raise the errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# state-space and recurrent models: a state cannot be masked per document as attention can
_SEGMENT_FREE = "its layers carry state from token to token, which packing cannot isolate"

MODEL_REFUSALS: dict[str, str] = {
    "falcon": "falcon computes attention inside its own module and takes no other attention function",
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "jamba", "bamba"), _SEGMENT_FREE),
    **dict.fromkeys(("zamba", "zamba2", "recurrent_gemma"), _SEGMENT_FREE),
    "stablelm": "its layers do not pass on to attention where documents begin, so packing cannot keep them apart",
}

UNTESTED_DEVICES = {
    "cuda": "dispatched by capability, never measured: no number of this project comes from a graphics card",
    "mps": "dispatched, in float32, never run: no test of this project ran on Apple's GPUs",
}
"""Device types that run but were never measured."""

TESTED_MODELS = ("llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "gpt2", "opt")
"""Architectures with a test that packed logits equal unpacked ones. Others are checked by the step-0 gate only."""


ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers, as `layer_types` of a config names them, that see other tokens through attention alone."""


def model_refusal(config: Mapping[str, Any]) -> str | None:
    """Why a model with this config.json cannot be trained here, or None."""
    if config.get("is_encoder_decoder"):
        return "encoder-decoder models are not supported: a segment tree has one row of tokens, they need two"
    # hybrids are many and have no name in common: linear attention, convolutions, state-space layers
    if other_layers := sorted({str(kind) for kind in config.get("layer_types") or ()} - ATTENTION_LAYERS):
        return f"{_SEGMENT_FREE} (layer_types: {', '.join(other_layers)})"
    return MODEL_REFUSALS.get(str(config.get("model_type")))


def quantization_refusal(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Why a model with this config.json cannot be a base because its weights are quantized, and the remedy; or None."""
    settings = config.get("quantization_config")
    if not settings:
        return None
    kind = settings.get("quant_method") if isinstance(settings, Mapping) else None
    reason = f"the weights of this model are quantized ({kind or 'quantization_config'}), which nothing here widens"
    return reason, "take the model that it was made from; `method: {kind: qlora}` quantizes that while it loads"


PROCESS_REFUSALS = {
    "mixture": "a router's load is counted in each process alone",
}
"""Methods that only a single process can train, with the reason."""


def multi_process_refusal(method: str, *, own_answers: bool) -> str | None:
    """Why several processes cannot share such a run, or None. `own_answers`: the policy generates its documents."""
    if own_answers:
        return "a policy that makes its own answers is not shared out over processes"
    return PROCESS_REFUSALS.get(method)


def sharding_refusal(method: str, objective: str, *, reference: object, moments: str, init: str | None) -> str | None:
    """Why such a run cannot shard its model over processes, or None."""
    # a list of what is tested, not of what is known to fail: a silent error in sharding would ruin a run
    if method not in ("lora", "full"):
        return f"a model in parts has been tested under lora and full alone, not under {method}"
    if objective not in ("sft", "preference"):
        return f"a model in parts has been tested with sft and preference alone, not with {objective}"
    if method == "full" and moments != "float32":
        return "moments in 8 bits have scales for blocks of numbers, which do not follow the rows of a part"
    if init == "lora_ga":
        return "init: lora_ga needs the gradients of whole weights of the base, which nobody holds in parts"
    if reference not in (None, "base", "none"):
        return "a reference of its own would be a second model, held whole"
    return None
