"""Every method on the same examples, measured: `.venv/bin/python -m benchmarks.methods`.

Each method trains in a process of its own on the same rows of an example, answers the same held-out questions, and
reads the same unrelated text before and after (documentation of Python's standard library: it is on every machine). The
table and the figures go to --work; docs and README quote them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.runner import OURS, ROOT, RunError, Store, run

METHODS: dict[str, dict[str, Any]] = {
    "prompt": {"kind": "prompt", "virtual_tokens": 20},
    "prefix": {"kind": "prefix", "virtual_tokens": 20},
    "head": {"kind": "head"},
    "bottleneck houlsby": {"kind": "bottleneck", "width": 64},
    "bottleneck pfeiffer": {"kind": "bottleneck", "width": 64, "placement": "pfeiffer"},
    "bottleneck parallel": {"kind": "bottleneck", "width": 64, "placement": "parallel", "scale": 4.0},
    "lora": {"kind": "lora", "rank": 16},
    "lora pissa": {"kind": "lora", "rank": 16, "init": "pissa"},
    "lora lora_ga": {"kind": "lora", "rank": 16, "init": "lora_ga"},
    "lora+": {"kind": "lora", "rank": 16, "rate_ratio": 16.0},
    "lora middle third": {"kind": "lora", "rank": 16, "layers": "middle"},
    "lora lisa": {"kind": "lora", "rank": 16, "sampled_layers": 8, "resample_every": 10},
    "dora": {"kind": "lora", "rank": 16, "dora": True},
    "qlora": {"kind": "qlora", "rank": 16},
    "qlora 8 bits": {"kind": "qlora", "rank": 16, "bits": 8},
    "lottery": {"kind": "lottery", "rank": 16, "scout_steps": 15},
    "lottery at random": {"kind": "lottery", "rank": 16, "scout_steps": 15, "choose": "random"},
    "mixture": {"kind": "mixture", "experts": 4, "rank": 8},
    "mixture top 2": {"kind": "mixture", "experts": 4, "rank": 8, "top_k": 2},
    "ia3": {"kind": "peft", "config": {"peft_type": "IA3", "feedforward_modules": []}},
    "full": {"kind": "full"},
}
RATES = {"lora": 1e-3, "qlora": 1e-3, "lottery": 1e-3, "mixture": 1e-3}
"""Learning rates of the example; other methods take their own default."""
DOCUMENTED = ("argparse", "decimal", "asyncio", "pathlib", "logging", "unittest", "zipfile", "random")
"""Modules whose documentation is the unrelated text."""


def main() -> int:
    """0 when all asked for were measured, 2 when one could not run."""
    parser = argparse.ArgumentParser(prog="methods", description="Every method on the same examples, measured.")
    parser.add_argument("--only", help="names with commas between")
    parser.add_argument("--example", default="finance", help="a folder of examples/")
    parser.add_argument("--rows", type=int, default=480, help="training rows")
    parser.add_argument("--questions", type=int, default=100, help="held-out questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="keep what was measured")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks/.methods")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure is not None:
        print(json.dumps(measure(asked.measure, asked.questions)))
        return 0
    names = asked.only.split(",") if asked.only else list(METHODS)
    settings = {name: getattr(asked, name) for name in ("example", "rows", "questions", "seed")}
    try:
        store = Store.open(asked.work / "methods.jsonl", settings, resume=asked.resume)
        for name in names:
            if store.one(kind="method", name=name) is None:
                store.add({"kind": "method", "name": name, **train(name, asked)})
                print(line(store.all(name=name)[0]), flush=True)
    except (RunError, ValueError, KeyError) as error:
        print(f"methods: {error}", file=sys.stderr)
        return 2
    text = table(store.all(kind="method"))
    (asked.work / "methods.md").write_text(text)
    print(text)
    return 0


def train(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one method."""
    method = METHODS[name]
    folder = asked.work / name.replace(" ", "-")
    given = [
        f"method={json.dumps(method)}",
        f"engine.learning_rate={RATES.get(method['kind'], 'null')}",
        f"data.limit={asked.rows}",
        f"seed={asked.seed}",
        f"output={folder}",
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    config = ROOT / "examples" / asked.example / "climb.yaml"
    asked.work.mkdir(parents=True, exist_ok=True)
    log = asked.work / f"{folder.name}.log"
    run([OURS / "rung", "train", config, *given, "--overwrite"], log, env)
    measured = ["-m", "benchmarks.methods", "--measure", folder, "--questions", asked.questions]
    run([OURS / "python", *measured], log, env)
    manifest = json.loads((folder / "run.json").read_text())
    kept = ("trainable_parameters", "peak_memory_bytes", "tokens_per_second", "train_seconds", "train_loss")
    return {**{key: manifest[key] for key in kept}, **json.loads(log.read_text().splitlines()[-1])}


def measure(folder: Path, questions: int) -> dict[str, Any]:
    """Score, latency and forgetting of a finished run."""
    from rung import run as running
    from rung.model.policy import Policy

    policy, chat, spec = running.open_run(folder)
    task = spec.model_copy(update={"evaluate": spec.evaluate.model_copy(update={"limit": questions})})
    records = running.test_records(task, running.read_splits(task))
    found = running.score(policy, chat, task, records, tuned=True)
    rows = unrelated(chat)
    base = running.load(spec.model)
    artefact = folder / ("adapter" if (folder / "adapter").is_dir() else "model")
    weights = sum(file.stat().st_size for file in artefact.glob("*.safetensors"))
    return {
        "scores": {name: found.interval(name).to_json() for name in found.metrics},
        "seconds_per_query": found.seconds_per_query,
        "artefact_bytes": weights,
        "base_parameters": sum(p.numel() for p in base.model.parameters()),
        "nats_before": nats(Policy(base, running.Untouched()), rows),
        "nats_after": nats(policy, rows),
        "measured": time.strftime("%Y-%m-%d"),
    }


def unrelated(chat: Any) -> list[Any]:
    """Documentation of the standard library, as documents of 256 tokens."""
    import importlib
    import pydoc

    import numpy as np

    from rung.types import Example, Source

    rows = []
    for name in DOCUMENTED:
        text = pydoc.render_doc(importlib.import_module(name), renderer=pydoc.plaintext)
        ids = np.array(chat.encode([text[:4000]])[0][:256], dtype=np.int32)
        rows.append(Example(ids, np.arange(len(ids)) > 0, Source(name, 1)))
    return rows


def nats(policy: Any, rows: list[Any]) -> float:
    """Nats per token."""
    import torch

    from rung.engine.pack import pack
    from rung.engine.step import mean_loss
    from rung.objective.sft import Sft
    from rung.spec.objective import SftSpec

    with torch.no_grad():
        return mean_loss(policy, Sft(SftSpec()), pack(rows, 1024))


def line(entry: dict[str, Any]) -> str:
    """One row of the table."""
    name, score = next(iter(entry["scores"].items()))
    share = entry["trainable_parameters"] / entry["base_parameters"]
    forgotten, memory = entry["nats_after"] - entry["nats_before"], entry["peak_memory_bytes"] / 1e9
    return (
        f"| {entry['name']} | {entry['trainable_parameters']:,} ({share:.2%}) | {memory:.2f} GB "
        f"| {entry['tokens_per_second']:.0f} | {entry['artefact_bytes'] / 1e6:.1f} MB "
        f"| {entry['seconds_per_query'] * 1000:.0f} ms | {score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}] "
        f"| {forgotten:+.2f} |"
    )


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown."""
    metric = next(iter(entries[0]["scores"])) if entries else "score"
    head = (
        f"| method | trainable | peak memory | tokens/s | on disk | a query | {metric} [95 %] "
        "| unrelated text, nats a token |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *map(line, entries)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
