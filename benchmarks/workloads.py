"""What is run, as data: kinds of work, and the settings a peer's user could reasonably try for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rung.planning.advise import multiplies_bfloat16

RANK, ALPHA = 16, 32
BASE = "smollm2-135m"
UPPER_HALF = tuple(range(15, 30))
PACK_TOKENS = 1024
"""Length of a peer's packed row: its own default `max_length`."""


@dataclass(frozen=True)
class Target:
    """What Rung wants to reach: ratios to the peer; a speed ratio above 1 and a memory ratio below 1 are good."""

    default: float
    tuned: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Training:
    """One training run, the same for all sides: AdamW (0.9, 0.999, 1e-8, no decay), clip 1.0, cosine, no warm-up."""

    key: str
    title: str
    target: Target
    steps: int = 4
    method: Literal["lora", "full"] = "lora"
    learning_rate: float = 2e-4
    layers: tuple[int, ...] | None = None
    """Layers with an adapter, counted from 0; none is all."""
    epochs: int = 1
    examples_per_step: int = 8
    """8 is also the batch that TRL takes by default."""
    plain: bool = False
    """Rows are plain text: no template, so no common beginning, and every token is learned."""
    system: bool = False
    """Every row begins with the same system turn of 200 tokens."""
    objective: Literal["sft", "preference", "reward"] = "sft"
    """All but sft learn from pairs: a conversation with a better and a worse answer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of products, on both sides; trained weights are float32."""
    seed: int = 0

    @property
    def rows(self) -> int:
        """Distinct rows; `steps` counts the steps of all epochs."""
        return self.examples_per_step * (self.steps // self.epochs)

    def shortened(self) -> Training:
        """For `--quick`: two small steps an epoch, enough to see that everything runs."""
        return replace(self, steps=2 * self.epochs, examples_per_step=4)

    def config(self, data: str, output: str) -> dict[str, Any]:
        """The same work as a config of `rung train`."""
        layers = {"layers": list(self.layers)} if self.layers else {}
        lora = {"kind": "lora", "rank": RANK, "alpha": ALPHA, **layers}
        return {
            "model": {"name": BASE, "dtype": self.dtype},
            "data": {"path": data, "validation": 0, "test": 0},
            "method": lora if self.method == "lora" else {"kind": "full"},
            "objective": {"kind": self.objective},
            "training": {
                "epochs": self.epochs,
                "examples_per_step": self.examples_per_step,
                "learning_rate": self.learning_rate,
                "schedule": "cosine",
                "warmup_ratio": 0,
                "max_grad_norm": 1.0,
            },
            "output": output,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Answering:
    """Greedy answers to held-out questions, worked examples in front of each."""

    key: str
    title: str
    target: Target
    questions: int = 40
    shots: int = 4
    max_new_tokens: int = 64
    answers: int = 1
    """To each question; several are sampled at temperature 1, and none stops before `max_new_tokens`."""
    seed: int = 0

    @property
    def rows(self) -> int:
        """Questions and worked examples."""
        return self.questions + self.shots

    @property
    def sampled(self) -> bool:
        """Whether answers are drawn, so that no two sides give the same."""
        return self.answers > 1

    def shortened(self) -> Answering:
        """For `--quick`."""
        return replace(self, questions=min(6, self.questions), max_new_tokens=6)


@dataclass(frozen=True)
class Candidate:
    """Settings of a peer that differ from its defaults."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    """Into which a step's rows are divided. Packing computes one packed row at a time instead."""


Workload = Training | Answering

WORKLOADS: dict[str, Workload] = {
    work.key: work
    for work in (
        Training("a", "SFT LoRA, loss on answers", Target(4.0, 2.4, 0.30)),
        Training("b", "SFT LoRA, plain text, loss on everything", Target(3.0, 2.1, 0.35), plain=True),
        Training("c", "SFT full fine-tuning", Target(2.7, 1.6, 0.60), steps=3, method="full", learning_rate=2e-5),
        Training("d", "SFT LoRA, shared system turn of 200 tokens", Target(5.0, 3.0, 0.30), system=True),
        Answering("e", "40 answers, four worked examples in front", Target(8.0, 4.0)),
        Training("f", "SFT LoRA, layers 15-29 only, 3 epochs", Target(5.0, 3.0, 0.30), 6, layers=UPPER_HALF, epochs=3),
        Training("g", "DPO LoRA on dialogues", Target(4.5, 4.5, 0.30), objective="preference", examples_per_step=4),
        Training("h", "reward model, LoRA, on dialogues", Target(3.0), objective="reward", examples_per_step=4),
        Training("j", "SFT LoRA in bfloat16, loss on answers", Target(4.0, 2.4, 0.30), dtype="bfloat16"),
        Answering("i", "rollouts: 8 prompts, 8 sampled answers each", Target(5.0, 5.0), 8, 0, 48, answers=8),
    )
}

GROUPS = {"preferences": ("g", "h"), "answers": ("e", "i"), "bfloat16": ("j",)}
"""Workloads that are also measured without the others: the whole bench takes three hours."""


def computable() -> list[str]:
    """Keys of the workloads that this processor computes: bfloat16 without units for it is many times slower."""
    return [
        key
        for key, work in WORKLOADS.items()
        if not (isinstance(work, Training) and work.dtype == "bfloat16") or multiplies_bfloat16()
    ]


_FREE = {"gradient_checkpointing": False}
TRAINING_CANDIDATES = (
    Candidate("no checkpointing", _FREE),
    Candidate("no checkpointing, 2 micro-batches", _FREE, micro_batches=2),
    Candidate("no checkpointing, 4 micro-batches", _FREE, micro_batches=4),
    Candidate(f"no checkpointing, packing {PACK_TOKENS}", {**_FREE, "packing": True, "max_length": PACK_TOKENS}),
)
PAIRS_CANDIDATES = (
    Candidate("no checkpointing", _FREE),
    Candidate("no checkpointing, 2 micro-batches", _FREE, micro_batches=2),
    Candidate("no checkpointing, 4 micro-batches", _FREE, micro_batches=4),
)
"""Pairs are not packed: TRL has no packing for them, and its `padding_free` is switched off. A reference computed
beforehand is the same work at another time where there is one epoch."""
ROLLOUT_DEFAULT = Candidate("batches of 64", {"batch": 64})
ROLLOUT_CANDIDATES = (Candidate("batches of 32", {"batch": 32}), Candidate("batches of 16", {"batch": 16}))
ANSWERING_DEFAULT = Candidate("batches of 20", {"batch": 20})
ANSWERING_CANDIDATES = (
    Candidate("batches of 10", {"batch": 10}),
    Candidate("batches of 40", {"batch": 40}),
    Candidate("prefix cached by hand, batches of 20", {"batch": 20, "prefix": True}),
    Candidate("prefix cached by hand, batches of 40", {"batch": 40, "prefix": True}),
)


def candidates(work: Workload) -> tuple[Candidate, ...]:
    """What the peer is tuned over."""
    if isinstance(work, Training):
        return TRAINING_CANDIDATES if work.objective == "sft" else PAIRS_CANDIDATES
    return (ROLLOUT_DEFAULT, *ROLLOUT_CANDIDATES) if work.sampled else ANSWERING_CANDIDATES


def default(work: Workload) -> Candidate:
    """The peer as it comes."""
    if isinstance(work, Training):
        return Candidate("as it comes")
    return ROLLOUT_DEFAULT if work.sampled else ANSWERING_DEFAULT
