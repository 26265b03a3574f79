"""A random bfloat16 base of 360M parameters, held as it is and widened at loading: memory, speed, the same bits.

    .venv/bin/python -m benchmarks.resident

Each form trains a few LoRA steps in a process of its own, in alternation. The base has SmolLM2-360M's shape and the
embedded base's tokenizer, and is written to a temporary folder (0.7 GB).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.memory import peak, reset_peak

SHAPE = {
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
STEPS = 3


def make_base(folder: Path) -> None:
    """Random weights in bfloat16, and a tokenizer beside them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rung.config.model import ModelConfig
    from rung.models.load import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig())
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=49152, pad_token_id=tokenizer.pad_token_id, **SHAPE)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    print(f"{model.num_parameters() / 1e6:.0f}M parameters", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(folder: Path, form: str) -> None:
    """Train in this process; print losses, seconds a token and bytes as JSON."""
    import time

    import numpy as np
    import torch

    from rung.config.method import LoraConfig
    from rung.config.model import ModelConfig
    from rung.config.objective import SftConfig
    from rung.config.training import OptimizerConfig
    from rung.methods.registry import attach_method
    from rung.models import load
    from rung.models.packing import pack
    from rung.models.policy import Policy
    from rung.objectives.sft import SftObjective
    from rung.training.optimizer import make_optimizer
    from rung.training.step import accumulate
    from rung.types import Example, Source

    if form == "widened":
        load.stored_in_bfloat16 = lambda folder: False
    base = load.load_base(ModelConfig(name=str(folder), dtype="float32"))
    method = attach_method(base.model, LoraConfig(), seed=0)
    policy, objective = Policy(base, method), SftObjective(SftConfig())
    optimizer = make_optimizer(method.trainable(), OptimizerConfig())
    draw = np.random.default_rng(0)
    losses, started, tokens = [], 0.0, 0
    reset_peak()
    for step in range(STEPS + 1):
        if step == 1:  # the first is cold
            started = time.perf_counter()
        ids = [draw.integers(3, 49152, size=200).astype(np.int32) for _ in range(4)]
        rows = [Example(row, np.arange(200) >= 80, Source("random", i)) for i, row in enumerate(ids)]
        optimizer.zero_grad()
        losses.append(float(accumulate(policy, objective, pack(rows, 400))))
        optimizer.step()
        tokens += 800 if step else 0
    with torch.no_grad():
        held = sum(p.nbytes for p in base.model.parameters() if not p.requires_grad)
    seconds = time.perf_counter() - started
    found = {"losses": losses, "tokens_per_second": tokens / seconds, "peak": peak(), "weights": held}
    print(json.dumps(found), flush=True)


def main() -> int:
    """0 when the losses are equal bit for bit."""
    parser = argparse.ArgumentParser(description="A bfloat16 base held as it is against one widened at loading.")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "FORM"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(Path(asked.measure[0]), asked.measure[1])
        return 0
    folder = Path(tempfile.mkdtemp(prefix="rung-resident-"))
    found: dict[str, list[dict[str, object]]] = {"held": [], "widened": []}
    try:
        make_base(folder)
        for _ in range(asked.pairs):
            for form, runs in found.items():
                command = [sys.executable, "-m", "benchmarks.resident", "--measure", str(folder), form]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                print(form, {k: v for k, v in runs[-1].items() if k != "losses"}, flush=True)
    finally:
        shutil.rmtree(folder)
    same = all(run["losses"] == found["widened"][0]["losses"] for runs in found.values() for run in runs)
    middle = {
        form: {k: median(float(r[k]) for r in runs) for k in ("tokens_per_second", "peak", "weights")}
        for form, runs in found.items()
    }  # type: ignore[arg-type]
    for what in ("tokens_per_second", "peak", "weights"):
        held, widened = middle["held"][what], middle["widened"][what]
        print(f"{what:18s} held {held:.4g}  widened {widened:.4g}  ratio {held / widened:.2f}")
    print("losses equal bit for bit" if same else "LOSSES DIFFER")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
