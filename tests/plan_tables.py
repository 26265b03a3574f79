"""The tables of docs/plan.md, from the plan itself: `python tests/plan_tables.py` prints them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from rung.config.run import RunConfig
from rung.planning.architecture import ModelShape, shape_from_config
from rung.planning.memory import MemoryEstimate, MicroBatch, estimate_memory
from rung.report.formatting import format_bytes as in_words

KNOWN: dict[str, dict[str, Any]] = {
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "13B": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
    "30B": {"hidden_size": 6656, "num_hidden_layers": 60, "num_attention_heads": 52, "intermediate_size": 17920},
    "70B": {
        **{"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
        "num_key_value_heads": 8,
    },
    "110B": {
        **{"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 49152},
        **{"num_key_value_heads": 8, "vocab_size": 152064, "model_type": "qwen2"},
    },
}
"""Llama 2 7B, 13B and 70B, Llama 1 33B (which lists call 30B), Qwen 1.5 110B."""
LISTED = {
    "full, 16 bits": (67, 125, 288, 672, 1056),
    "LoRA, 16 bits": (15, 28, 63, 146, 229),
    "QLoRA, 8 bits": (9, 17, 38, 88, 138),
    "QLoRA, 4 bits": (5, 9, 20, 46, 72),
}
"""GB that lists in circulation give for 7B, 13B, 30B, 70B and 110B."""
PER_NUMBER = {"full, 16 bits": 9.6, "LoRA, 16 bits": 2.08, "QLoRA, 8 bits": 1.25, "QLoRA, 4 bits": 0.65}
"""Bytes a parameter that give them back."""
METHODS: dict[str, dict[str, Any]] = {
    "full, 16 bits": {"kind": "full"},
    "LoRA, 16 bits": {"kind": "lora"},
    "QLoRA, 8 bits": {"kind": "qlora", "bits": 8},
    "QLoRA, 4 bits": {"kind": "qlora", "bits": 4},
}


def known(name: str) -> ModelShape:
    """A well-known shape, as its config gives it."""
    config = {"model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False, "dtype": "bfloat16"}
    return shape_from_config({**config, **KNOWN[name]})


def planned(name: str, tokens: int = 1024, compute: str = "bfloat16", **settings: Any) -> MemoryEstimate:
    """The plan of a run on a well-known shape."""
    config = RunConfig.model_validate({"data": {"path": "rows.jsonl"}, "output": "run", **settings})
    return estimate_memory(config, known(name), MicroBatch(compute, tokens, tokens // 2, device="cuda"))


def listed(method: str) -> tuple[int, ...]:
    """What bytes a parameter give: full rounded to the nearest GB, the others up."""
    sizes = (7, 13, 30, 70, 110)
    whole = round if method.startswith("full") else math.ceil
    return tuple(whole(round(PER_NUMBER[method] * size, 6)) for size in sizes)


def rule_rows() -> list[str]:
    """The list in circulation, and Rung's plan for the same."""
    lines = ["| | " + " | ".join(KNOWN) + " |", "|---" * (len(KNOWN) + 1) + "|"]
    for method, settings in METHODS.items():
        lines.append(f"| {method}, listed | " + " | ".join(str(gb) for gb in listed(method)) + " |")
        own = [planned(name, method=settings).required_bytes / 1e9 for name in KNOWN]
        lines.append(f"| {method}, planned | " + " | ".join(f"{gb:,.0f}" for gb in own) + " |")
    return lines


LEVERS: tuple[tuple[str, int, str, dict[str, Any]], ...] = (
    ("LoRA of rank 16, bfloat16, 1,024 tokens at once", 1024, "bfloat16", {}),
    ("512 tokens at once", 512, "bfloat16", {}),
    ("8,192 tokens at once, or one document of that length", 8192, "bfloat16", {}),
    (
        "twice the examples a step (more micro-batches, none larger)",
        1024,
        "bfloat16",
        {"training": {"examples_per_step": 32}},
    ),
    ("float32, from a file in float32", 1024, "float32", {"model": {"dtype": "float32"}}),
    ("rank 64", 1024, "bfloat16", {"method": {"kind": "lora", "rank": 64}}),
    ("layers 16-31 alone", 1024, "bfloat16", {"method": {"kind": "lora", "layers": "16-31"}}),
    ("QLoRA, 4 bits", 1024, "bfloat16", {"method": {"kind": "qlora"}}),
    ("full", 1024, "bfloat16", {"method": {"kind": "full"}}),
    (
        "full, moments in 8 bits",
        1024,
        "bfloat16",
        {"method": {"kind": "full"}, "training": {"optimizer": {"state_dtype": "int8"}}},
    ),
    (
        "full, DPO (the reference is a second model)",
        1024,
        "bfloat16",
        {"method": {"kind": "full"}, "objective": {"kind": "preference"}},
    ),
)


def lever_rows() -> list[str]:
    """What each lever does to a model of 7B."""
    first = planned("7B").required_bytes
    lines = ["| Llama 2 7B | needed | beside the first |", "|---|---|---|"]
    for name, tokens, compute, settings in LEVERS:
        others = {"reference": known("7B")} if "objective" in settings else {}
        config = RunConfig.model_validate({"data": {"path": "rows.jsonl"}, "output": "run", **settings})
        shape = replace(known("7B"), stored_dtype=compute)
        peak = estimate_memory(
            config, shape, MicroBatch(compute, tokens, tokens // 2, device="cuda"), others
        ).required_bytes
        lines.append(f"| {name} | {in_words(peak)} | {peak / first:.2f}x |")
    return lines


if __name__ == "__main__":
    print("\n".join([*rule_rows(), "", *lever_rows()]))
