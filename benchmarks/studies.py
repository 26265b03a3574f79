"""What the studies of methods compare: entries that differ in a few settings, on one example, with one budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FINANCE, BOTH = "examples/finance/climb.yaml", "examples/support/both.yaml"
ZERO_SHOT = "zero-shot"
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One thing to train and to measure."""

    settings: Settings = field(default_factory=dict)
    """Over those of the study's config."""
    fuse: tuple[str, ...] = ()
    """Instead of training: entries to combine, by `rung fuse`."""
    how: str = "sum"
    """The way of it."""
    weights: str = "1,1"
    """One for each."""
    learn: str | None = None
    """Instead of weights: the config on whose rows they are searched."""


@dataclass(frozen=True)
class Rule:
    """A rule of thumb: what it says of two entries, the one that should win first."""

    says: str
    better: str
    than: str


@dataclass(frozen=True)
class Study:
    """Entries on the held-out questions of one config, a zero-shot base before them."""

    config: str
    entries: Mapping[str, Entry]
    questions: int
    common: Settings = field(default_factory=dict)
    seeds: int = 1
    rules: tuple[Rule, ...] = ()


def _method(kind: str, rate: float | None = None, **settings: Any) -> Entry:
    return Entry({"method": {"kind": kind, **settings}, "training.learning_rate": rate})


def _lora(rate: float = 1e-3, **settings: Any) -> Entry:
    return _method("lora", rate, **{"rank": 16, **settings})


METHODS = Study(
    FINANCE,
    {
        "lora": _lora(),
        "full": _method("full"),
        "qlora": _method("qlora", 1e-3, rank=16),
        "head": _method("head"),
        "prompt": _method("prompt", virtual_tokens=20),
        "prefix": _method("prefix", virtual_tokens=20),
        "p_tuning": _method("p_tuning", virtual_tokens=20),
        "p_tuning lstm": _method("p_tuning", virtual_tokens=20, encoder="lstm"),
        "p_tuning inside": _method(
            "p_tuning", virtual_tokens=20, encoder="lstm", positions={"front": 10, "user": 5, "assistant": 5}
        ),
        "bottleneck": _method("bottleneck", width=64),
        "mixture": _method("mixture", 1e-3, experts=4, rank=8),
        "lottery": _method("lottery", 1e-3, rank=16, lottery={"scout_steps": 15}),
        "ia3": _method("peft", 1e-2, config={"peft_type": "IA3", "feedforward_modules": []}),
        "lora pissa": _lora(1e-4, init="pissa", alpha=32),
        "lora pissa 1e-3": _lora(init="pissa", alpha=32),
        "lora lora_ga": _lora(1e-4, init="lora_ga"),
        "lora+": _lora(2e-4, loraplus_lr_ratio=16.0),
        "lora dora": _lora(dora=True),
        "lora lisa": _lora(lisa_n_layers=8, lisa_step_interval=10),
        "lottery at random": _method("lottery", 1e-3, rank=16, lottery={"scout_steps": 15, "choose": "random"}),
        "lottery middle": _method("lottery", 1e-3, rank=16, lottery={"scout_steps": 15, "choose": "middle"}),
        "qlora 8 bits": _method("qlora", 1e-3, rank=16, bits=8),
        "qlora loftq": _method("qlora", 1e-3, rank=16, init="loftq", alpha=32),
        "p_tuning v2": _method("p_tuning", virtual_tokens=20, layers="all", encoder="mlp"),
        "bottleneck pfeiffer": _method("bottleneck", width=64, placement="pfeiffer"),
        "bottleneck parallel": _method("bottleneck", width=64, placement="parallel", scale=4.0),
        "mixture top 2": _method("mixture", 1e-3, experts=4, rank=8, top_k=2),
        "lora olora": _lora(1e-4, init="olora", alpha=32),
        "lora eva": _lora(init="eva"),
        "lora corda": _lora(1e-4, init="corda", alpha=32),
        "lora r 64": _lora(rank=64),
        "lora rslora r 64": _lora(rank=64, rslora=True),
        "lora rslora r 64 alpha 2r": _lora(rank=64, rslora=True, alpha=128),
    },
    questions=184,
)
"""Every method, the principal ones first."""

_ON_FINANCE = {"data.path": "examples/finance/data.jsonl", "data.group": "filing", "data.limit": 480}
_ON_SUPPORT = {"data.path": "examples/support/data.jsonl", "data.group": "order", "data.limit": 480}
TASKS = Study(
    BOTH,
    {
        "lora on finance": Entry(_ON_FINANCE),
        "lora on support": Entry(_ON_SUPPORT),
        "their sum": Entry(fuse=("lora on finance", "lora on support")),
        "their mean": Entry(fuse=("lora on finance", "lora on support"), weights="0.5,0.5"),
        "their TIES": Entry(fuse=("lora on finance", "lora on support"), how="ties:0.5"),
        "their search": Entry(fuse=("lora on finance", "lora on support"), learn="examples/support/few.yaml"),
        "one lora on both": _lora(),
        "prompt on finance": Entry({**_ON_FINANCE, **_method("prompt", virtual_tokens=20).settings}),
        "prompt on support": Entry({**_ON_SUPPORT, **_method("prompt", virtual_tokens=20).settings}),
        "a prompt for each": _method("prompt", virtual_tokens=20, tasks=["finance", "support"]),
        "p_tuning on finance": Entry({**_ON_FINANCE, **_method("p_tuning", virtual_tokens=20).settings}),
        "p_tuning on support": Entry({**_ON_SUPPORT, **_method("p_tuning", virtual_tokens=20).settings}),
        "p_tuning with one encoder": _method("p_tuning", virtual_tokens=20, tasks=["finance", "support"]),
        "mixture on both": _method("mixture", 1e-3, experts=4, rank=8),
    },
    questions=200,
    common={"method": {"kind": "lora", "rank": 16}, "training.learning_rate": 1e-3},
)
"""Two tasks at once beside an adapter for each."""

_SHORT = {"data.limit": 240}
RULES = Study(
    FINANCE,
    {
        "r 16": _lora(),
        "r 4": _lora(rank=4),
        "r 8": _lora(rank=8),
        "r 32": _lora(rank=32),
        "r 64": _lora(rank=64),
        "alpha r": _lora(alpha=16),
        "alpha 4r": _lora(alpha=64),
        "attention": _lora(targets=["q", "k", "v", "o"]),
        "rate 1e-4": _lora(1e-4),
        "rate 3e-4": _lora(3e-4),
        "rate 3e-3": _lora(3e-3),
        "three epochs": Entry({**_lora().settings, "training.epochs": 3}),
        "full": _method("full"),
    },
    questions=120,
    common=_SHORT,
    seeds=2,
    rules=(
        Rule("r = 8 beats r = 4", "r 8", "r 4"),
        Rule("r = 16 beats r = 4", "r 16", "r 4"),
        Rule("r = 16 beats r = 8", "r 16", "r 8"),
        Rule("r = 32 beats r = 16", "r 32", "r 16"),
        Rule("r = 64 beats r = 16", "r 64", "r 16"),
        Rule("alpha = 2r beats alpha = r", "r 16", "alpha r"),
        Rule("alpha = 2r beats alpha = 4r", "r 16", "alpha 4r"),
        Rule("all linear layers beat attention alone", "r 16", "attention"),
        Rule("a rate of 3e-4 beats 1e-4", "rate 3e-4", "rate 1e-4"),
        Rule("a rate of 3e-4 beats 1e-3", "rate 3e-4", "r 16"),
        Rule("a rate of 3e-4 beats 3e-3", "rate 3e-4", "rate 3e-3"),
        Rule("three epochs beat one", "three epochs", "r 16"),
        Rule("full fine-tuning beats LoRA", "full", "r 16"),
    ),
)
"""The heuristics that circulate, with two training seeds."""

STUDIES = {"methods": METHODS, "tasks": TASKS, "rules": RULES}
