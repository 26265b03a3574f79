"""Random models of true shapes, random documents, and training steps that are timed with the device's own clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rung.config.method import METHOD_CONFIGS
from rung.config.model_catalog import CATALOG
from rung.config.objective import SftConfig
from rung.config.training import OptimizerConfig
from rung.methods.registry import attach_method
from rung.models import attention
from rung.models.base_model import BaseModel
from rung.models.policy import NoMethod, Policy
from rung.objectives.protocol import Objective
from rung.objectives.sft import SftObjective
from rung.planning.architecture import ModelShape, shape_from_config
from rung.training.memory_use import peak_memory_bytes, reset_peak_memory, synchronize
from rung.training.optimizer import OptimizerState
from rung.training.step import accumulate
from rung.types import Example, PackedBatch, Source

_LLAMA: dict[str, Any] = {
    **{"model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 16_384, "rope_theta": 500_000.0},
    **{"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        **_LLAMA,
        **{"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"intermediate_size": 8192, "head_dim": 64, "tie_word_embeddings": True},
    },
    "8B": {
        **_LLAMA,
        **{"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"intermediate_size": 14_336},
    },
    "phi-2": {**CATALOG["phi-2"].config, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "tiny": {
        **_LLAMA,
        **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": 128, "vocab_size": 320},
    },
}
"""Llama 3.2 1B, Llama 3 8B, Phi-2, and a model for a processor."""
WARM_STEPS, TIMED_STEPS = 5, 15


@dataclass
class Bench:
    """The device of a run, and how much time its current section has left."""

    device: torch.device
    quick: bool = False
    deadline: float = field(default_factory=lambda: time.monotonic() + 60.0)

    @property
    def has_card(self) -> bool:
        """Whether numbers are those of a graphics card."""
        return self.device.type == "cuda"

    def shape(self, name: str) -> str:
        """The shape to use: the one asked for on a card, a tiny one on a processor."""
        return name if self.has_card else "tiny"

    def tokens(self, count: int) -> int:
        """A length: the one asked for on a card, a hundredth of it on a processor."""
        return count if self.has_card else max(16, count // 100)

    @property
    def out_of_time(self) -> bool:
        """Whether the section should begin nothing new."""
        return time.monotonic() > self.deadline


def shape_of(name: str) -> ModelShape:
    """Layer counts and widths of one of `SHAPES`."""
    return shape_from_config(SHAPES[name])


def random_model(bench: Bench, name: str, *, dtype: torch.dtype = torch.bfloat16, implementation: str = "") -> Any:
    """A random model on the device, frozen, in eval mode, its dropout off."""
    attention.register()
    config = AutoConfig.for_model(**SHAPES[name])
    for setting in ("attention_dropout", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, setting):
            setattr(config, setting, 0.0)
    torch.manual_seed(0)
    options = {"attn_implementation": implementation or attention.NAME, "dtype": dtype}
    with bench.device:
        model = AutoModelForCausalLM.from_config(config, **options)
    return model.requires_grad_(False).eval()


def random_policy(bench: Bench, name: str, kind: str | None = "lora", **settings: Any) -> Policy:
    """A policy on a random model that computes in bfloat16, with a method or, for None, without one."""
    model = random_model(bench, name)
    method = NoMethod() if kind is None else attach_method(model, METHOD_CONFIGS[kind](**settings), seed=0)
    return Policy(BaseModel(model, None, name, name, torch.bfloat16), method)  # type: ignore[arg-type]


def random_documents(name: str, count: int, tokens: int, *, learned: float = 1.0, seed: int = 0) -> list[Example]:
    """Documents of random tokens; the last share of each is learned."""
    rng, vocabulary = np.random.default_rng(seed), SHAPES[name]["vocab_size"]
    supervised = np.arange(tokens) >= max(1, int(tokens * (1.0 - learned)))
    ids = (rng.integers(3, vocabulary, size=tokens, dtype=np.int32) for _ in range(count))
    return [Example(own, supervised, Source("random", line), 1.0) for line, own in enumerate(ids, start=1)]


class Steps:
    """Optimizer steps of a policy, as the trainer takes them."""

    def __init__(self, policy: Policy, objective: Objective | None = None) -> None:
        self.policy, self.objective = policy, objective or SftObjective(SftConfig())
        method: Any = policy.method
        self.optimizer = OptimizerState(method.trainable, OptimizerConfig(), lambda name: 1.0)
        policy.model.train()

    def take(self, batches: Sequence[PackedBatch]) -> torch.Tensor:
        """One step; the loss stays on the device."""
        self.optimizer.zero_grad()
        loss = accumulate(self.policy, self.objective, batches)
        self.optimizer.reduce_and_clip(1.0)
        self.optimizer.step(1e-4)
        self.objective.batch_metrics.clear()
        return loss


def measure(bench: Bench, work: Callable[[], Any], tokens: int) -> dict[str, Any]:
    """Milliseconds of a call, tokens per second and the peak of memory, after calls that warm it up."""
    warm, timed = (WARM_STEPS, TIMED_STEPS) if bench.has_card and not bench.quick else (2, 5)
    for number in range(warm):
        if number == 0 or not bench.out_of_time:
            work()
    synchronize(bench.device)
    reset_peak_memory(bench.device)
    milliseconds = list[float]()
    for _ in range(timed):
        milliseconds.append(_timed(bench, work))
        if bench.out_of_time:
            break
    median = float(np.median(milliseconds))
    return {
        "milliseconds": round(median, 3),
        "spread": round(float(np.ptp(milliseconds)) / median, 3),
        "tokens_per_second": round(tokens / median * 1e3, 1),
        "peak_bytes": peak_memory_bytes(bench.device),
        "steps": len(milliseconds),
    }


def _timed(bench: Bench, work: Callable[[], Any]) -> float:
    if not bench.has_card:
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def attempt(row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row with what `work` found, or with the reason why it found nothing: one row must not cost the others."""
    try:
        return {**row, **work()}
    except Exception as error:  # a missing library, memory, a kernel that another version does not have
        return {**row, "not_measured": f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"}
    finally:
        free()


def free() -> None:
    """Give memory of models that are gone back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
