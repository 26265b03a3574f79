"""What a finished run is like, measured in a process of its own: scores, seconds, bytes, and what it has forgotten.

The text that has nothing to do with the task is documentation of Python's standard library, which every machine has.
"""

from __future__ import annotations

import importlib
import json
import pydoc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rung.config.io import load_config
from rung.config.objective import SftConfig
from rung.config.run import RunConfig
from rung.data.chat import ChatTemplate
from rung.data.tokenize import tokenize_prompts
from rung.evaluation.evaluate import Evaluation
from rung.methods.lora import Lora
from rung.methods.mixture import Mixture
from rung.models.fused_modules import install_fused_forwards
from rung.models.packing import pack
from rung.models.policy import NoMethod, Policy
from rung.objectives.sft import SftObjective
from rung.runs.dataset import read_splits
from rung.runs.load import LoadedRun, open_base, open_run, score, test_records
from rung.training.step import mean_loss
from rung.types import Example, Record, Source

DOCUMENTED = ("argparse", "decimal", "asyncio", "pathlib", "logging", "unittest", "zipfile", "random")
"""Modules whose documentation is the unrelated text, 256 tokens of each."""
ROUTED = 32
"""Questions of each task whose way through a router is looked at."""


def measure(config: Path, run: Path | None, items: Path, questions: int) -> dict[str, Any]:
    """Answer the held-out questions of a config with a run, or with its untuned base; the answers go to `items`."""
    run_config = load_config(config).config
    run_config = run_config.model_copy(
        update={"evaluation": run_config.evaluation.model_copy(update={"limit": questions})}
    )
    model = open_base(run_config.model) if run is None else open_run(run)
    policy, chat = model.policy, model.chat
    records = test_records(run_config, read_splits(run_config))
    rows = unrelated(chat)
    held = bytes_held(policy.model)  # before the first product, which may keep more
    found = score(model, run_config, records)
    found.write(items)
    return {
        **_scores(found, records),
        "prompt_tokens": found.prompt_tokens,
        "artifact_bytes": _weights(run),
        "held_bytes": held,
        "unrelated_nats": nats(policy, rows),
        **(_in_full_width(policy, chat, run_config, records) if run is not None else {}),
        **_routing(policy, chat, records),
    }


def _scores(found: Evaluation, records: list[Record]) -> dict[str, Any]:
    """By metric, and by task where the records name some."""
    metric = found.metrics[0]
    tasks = {
        str(task): float(np.mean([s for s, r in zip(found.scores(metric), records, strict=True) if r.task == task]))
        for task in {r.task for r in records} - {None}
    }
    scores = {name: found.interval(name).to_json() for name in found.metrics}
    return {"scores": scores, "tasks": tasks, "seconds_per_query": found.seconds_per_query}


def _in_full_width(policy: Policy, chat: ChatTemplate, config: RunConfig, records: list[Record]) -> dict[str, Any]:
    """The same questions once more from a LoRA folded into its base, which for a quantized one is widened first."""
    if not isinstance(policy.method, Lora):
        return {}
    model: Any = policy.method.merge()
    install_fused_forwards(model)
    merged = Policy(replace(policy.base, model=model), NoMethod())
    found = score(LoadedRun(merged, chat, config, "run"), config, records)
    return {"merged": {**_scores(found, records), "held_bytes": bytes_held(merged.model)}}


def _routing(policy: Policy, chat: ChatTemplate, records: list[Record]) -> dict[str, Any]:
    """Of a mixture: what each expert gets of each task's questions over all linears, and how far two tasks are apart.

    Apart is the total variation distance of their loads, the mean over linears: 0 for a router that does not care.
    """
    method, tasks = policy.method, sorted({r.task for r in records} - {None}, key=str)
    if not isinstance(method, Mixture) or not tasks:
        return {}
    loads = []
    for task in tasks:
        method.load_state({name: [0.0] * method.config.experts for name in method.hosts})
        asked = [r for r in records if r.task == task][:ROUTED]
        found = tokenize_prompts(chat, asked, max_length=policy.base.context, overflow="error").examples
        rows = [replace(e, supervised=np.arange(len(e.ids)) > 0) for e in found]
        for batch in pack(rows, 1024, share_prefixes=False):
            policy.logprobs(batch)
        sums = np.array(list(method.state().values()))
        loads.append(sums / sums.sum(1, keepdims=True))
    apart = 0.5 * np.abs(loads[0] - loads[-1]).sum(1)
    shares = {str(task): load.mean(0).round(4).tolist() for task, load in zip(tasks, loads, strict=True)}
    return {"router": {"shares": shares, "apart": float(apart.mean()), "furthest": float(apart.max())}}


def _weights(run: Path | None) -> int:
    if run is None:
        return 0
    artifact = run / ("adapter" if (run / "adapter").is_dir() else "model")
    return sum(file.stat().st_size for file in artifact.rglob("*.safetensors"))


def bytes_held(model: torch.nn.Module) -> int:
    """Bytes of weights and buffers, a quantized matrix with its scales, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            tensors += [t for t in vars(part).values() if isinstance(t, torch.Tensor)] if part is not None else []
        tensors += [t for t in (getattr(weight, "SCB", None),) if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def unrelated(chat: ChatTemplate) -> list[Example]:
    """Documentation of the standard library, as documents of 256 tokens."""
    rows = []
    for name in DOCUMENTED:
        text = pydoc.render_doc(importlib.import_module(name), renderer=pydoc.plaintext)
        ids = np.array(chat.encode([text[:4000]])[0][:256], dtype=np.int32)
        rows.append(Example(ids, np.arange(len(ids)) > 0, Source(name, 1)))
    return rows


@torch.no_grad()
def nats(policy: Policy, rows: list[Example]) -> float:
    """Per token. A policy with something for each task reads it as of the first."""
    tasks = getattr(policy.method, "tasks", ("",))
    own = [Example(r.ids, r.supervised, r.source, task=tasks[0] or None) for r in rows]
    return mean_loss(policy, SftObjective(SftConfig()), pack(own, 1024))


if __name__ == "__main__":
    config, run, items, questions = sys.argv[1:]
    print(json.dumps(measure(Path(config), Path(run) if run != "-" else None, Path(items), int(questions))))
