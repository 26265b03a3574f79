"""Sections that are measured: training, preferences, reinforcement and decoding, beside other code on the same card."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.workbench import (
    Bench,
    Steps,
    free,
    measure,
    random_documents,
    random_model,
    random_policy,
    shape_of,
)
from rung.config.objective import GrpoConfig, PreferenceConfig
from rung.models.fused_modules import original_forwards
from rung.models.generate import Sampling, generate
from rung.objectives.grpo import GrpoObjective
from rung.objectives.preference import make_preference_objective
from rung.planning.architecture import ModelShape
from rung.training.memory_use import synchronize
from rung.training.packing import pack
from rung.types import Example

RANK = 16
STEP_TOKENS = 16_384
"""Tokens of a step: one micro-batch of the `auto` budget of a large card."""


def flops_per_token(shape: ModelShape, length: int, learned: float = 1.0, rank: int = RANK) -> float:
    """Operations that a token of LoRA cannot do without: 4 P + 6 P_lora + 6 H_q s L + 4 V H f."""
    adapter = rank * shape.layers * sum(m.inputs + m.outputs for m in shape.matrices)
    linears = shape.layers * shape.linear_parameters
    attention = 6.0 * shape.query * length * shape.layers
    return 4.0 * linears + 6.0 * adapter + attention + 4.0 * shape.embedding_parameters * learned


def ceilings(bench: Bench) -> dict[str, Any]:
    """What the device does at best: products in bfloat16 and copies. The limits of all other sections follow."""
    size = 8192 if bench.has_card else 512
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    product = measure(bench, lambda: a @ b, size)
    source = torch.empty(2**30 if bench.has_card else 2**22, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copy = measure(bench, lambda: target.copy_(source), size)
    flops = 2.0 * size**3 / product["milliseconds"] * 1e3
    return {"flops": flops, "bytes_per_second": 2.0 * source.numel() / copy["milliseconds"] * 1e3}


LORA_CASES = (
    # shape, tokens of a document, share that is learned, with Rung's own functions
    ("1B", 2048, 1.0, True),
    ("1B", 2048, 0.3, True),
    ("1B", 2048, 1.0, False),
    ("8B", 2048, 1.0, True),
    ("8B", 2048, 0.3, True),
    ("8B", 8192, 1.0, True),
    ("8B", 2048, 1.0, False),
)


def lora(bench: Bench) -> dict[str, Any]:
    """Steps of LoRA at true shapes: tokens per second and the peak of memory."""
    cases = LORA_CASES[:2] if bench.quick or not bench.has_card else LORA_CASES
    rows, steps, name = [], None, ""
    for shape, length, learned, fused in cases:
        if bench.out_of_time:
            break
        if name != bench.shape(shape):
            steps = None
            free()
            name = bench.shape(shape)
            steps = Steps(random_policy(bench, name, rank=RANK))
        assert steps is not None  # noqa: S101 - for readers: the first case makes it
        found = _train(bench, steps, name, length, learned, fused=fused)
        rows.append({"shape": name, "length": bench.tokens(length), "learned": learned, "fused": fused, **found})
    return {"passed": True, "rows": rows}


def _train(bench: Bench, steps: Steps, name: str, length: int, learned: float, *, fused: bool = True) -> dict[str, Any]:
    length = bench.tokens(length)
    tokens = max(length, bench.tokens(STEP_TOKENS) // length * length)
    examples = random_documents(name, tokens // length, length, learned=learned)
    batches = pack(examples, tokens, share_prefixes=False, device=bench.device)
    with nullcontext() if fused else original_forwards(steps.policy.model):
        found = measure(bench, lambda: steps.take(batches), tokens)
    return {**found, "flops_per_token": flops_per_token(shape_of(name), length, learned)}


def peers(bench: Bench) -> dict[str, Any]:
    """The same steps with transformers and peft, with Liger's kernels where they are installed."""
    cases = [("1B", 2048)] if bench.quick or not bench.has_card else [("1B", 2048), ("8B", 2048)]
    rows = []
    for shape, length in cases:
        for checkpointing in (False, True):
            for liger in (False, True):
                if bench.out_of_time:
                    break
                rows.append(_peer(bench, bench.shape(shape), bench.tokens(length), checkpointing, liger))
                free()
    return {"passed": True, "rows": rows}


def _peer(bench: Bench, name: str, length: int, checkpointing: bool, liger: bool) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    row: dict[str, Any] = {"shape": name, "length": length, "checkpointing": checkpointing, "liger": liger}
    model = random_model(bench, name, implementation="sdpa")
    try:
        if liger:
            import_module("liger_kernel.transformers").apply_liger_kernel_to_llama(model=model)
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=bench.has_card)
        tokens = max(length, bench.tokens(STEP_TOKENS) // length * length)
        ids = torch.randint(3, model.config.vocab_size, (tokens // length, length), device=bench.device)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(bench.device.type, dtype=torch.bfloat16):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        return {**row, **measure(bench, step, tokens)}
    except (ImportError, torch.OutOfMemoryError) as error:
        return {**row, "not_measured": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def qlora(bench: Bench) -> dict[str, Any]:
    """Steps on a base in 4 bits: with Rung's functions, and with the forward of transformers and peft."""
    name, rows = bench.shape("1B" if bench.quick else "8B"), []
    steps = Steps(random_policy(bench, name, "qlora", rank=RANK))
    for fused in (True, False):
        if not bench.out_of_time:
            rows.append({"shape": name, "fused": fused, **_train(bench, steps, name, 2048, 1.0, fused=fused)})
    return {"passed": True, "rows": rows}


def phi2(bench: Bench) -> dict[str, Any]:
    """LoRA, QLoRA and full fine-tuning of Phi-2's true shape for a few steps on one document: the loss must fall."""
    name, rows = bench.shape("phi-2"), []
    for kind in ("lora", "qlora", "full"):
        if bench.out_of_time:
            break
        free()
        steps = Steps(random_policy(bench, name, kind))
        batches = pack(random_documents(name, 1, bench.tokens(1024)), STEP_TOKENS, device=bench.device)
        losses = [float(steps.take(batches)) for _ in range(6)]
        found = measure(bench, lambda steps=steps, batches=batches: steps.take(batches), bench.tokens(1024))  # type: ignore[misc]
        rows.append({"method": kind, "first_loss": losses[0], "last_loss": losses[-1], **found})
        del steps
    return {"passed": all(row["last_loss"] < row["first_loss"] for row in rows), "rows": rows}


def alignment(bench: Bench) -> dict[str, Any]:
    """A preference step and a reinforcement step, their prompts shared or unrolled."""
    name = bench.shape("1B")
    policy = random_policy(bench, name, rank=RANK)
    rows = []
    for label, answers, objective in (
        ("dpo", 2, make_preference_objective(PreferenceConfig())),
        ("grpo", 8, GrpoObjective(GrpoConfig(reward={"kind": "exact"}, beta=0.0))),  # type: ignore[arg-type]
    ):
        examples = _answers(name, bench.tokens(1024), bench.tokens(256), answers)
        tokens = sum(map(len, examples))
        for packing in ("tree", "flat"):
            if bench.out_of_time:
                break
            steps = Steps(policy, objective)
            shared = packing == "tree"
            batches = pack(examples, tokens, share_prefixes=shared, device=bench.device)
            found = measure(bench, lambda steps=steps, batches=batches: steps.take(batches), tokens)  # type: ignore[misc]
            computed = sum(len(batch.ids) for batch in batches)
            rows.append({"objective": label, "packing": packing, "computed_tokens": computed, **found})
    return {"passed": True, "rows": rows}


def _answers(name: str, prompt: int, answer: int, count: int) -> list[Example]:
    """Four prompts with several answers each, and the columns that reinforcement reads."""
    rng, made = np.random.default_rng(0), []
    for row, head in enumerate(random_documents(name, 4, prompt)):
        for place, tail in enumerate(random_documents(name, count, answer, seed=row + 1)):
            ids = np.concatenate([head.ids, tail.ids])
            supervised = np.arange(len(ids)) >= prompt
            columns = {"advantage": np.full(answer, rng.normal())}
            made.append(replace(tail, ids=ids, supervised=supervised, row=row, score=-float(place), columns=columns))
    return made


def decoding(bench: Bench) -> dict[str, Any]:
    """New tokens per second of greedy decoding after prompts of a thousand tokens."""
    name, rows = bench.shape("1B" if bench.quick else "8B"), []
    policy, answer = random_policy(bench, name, None), bench.tokens(64 if bench.quick else 128)
    for count in (1, 32) if bench.quick or not bench.has_card else (1, 32, 256):
        if bench.out_of_time:
            break
        prompts = [e.ids.tolist() for e in random_documents(name, count, bench.tokens(1024))]
        generate(policy, prompts[:1], stop_ids=(), sampling=Sampling(4))
        synchronize(bench.device)
        started = time.perf_counter()
        generate(policy, prompts, stop_ids=(), sampling=Sampling(answer), batch_size=count)
        synchronize(bench.device)
        seconds = time.perf_counter() - started
        rows.append({"shape": name, "rows": count, "tokens_per_second": round(count * answer / seconds, 1)})
    return {"passed": True, "rows": rows}


KERNEL_CLASSES = (
    # the first class with a matching part of the name
    ("product", ("gemm", "cutlass", "nvjet", "xmma", "addmm", "::mm", "bmm", "mkldnn")),
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("softmax and loss", ("softmax", "logsumexp", "nll")),
    ("copy and cast", ("copy", "cat", "memcpy", "memset", "fill", "zero")),
    ("reduction", ("reduce", "sum", "norm", "mean")),
    ("optimizer", ("adam", "multi_tensor")),
    ("elementwise", ("elementwise", "vectorized", "mul", "add", "silu", "exp", "div")),
)


def profile(bench: Bench) -> dict[str, Any]:
    """Share of a LoRA step by class of kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    name = bench.shape("1B")
    steps = Steps(random_policy(bench, name, rank=RANK))
    length = bench.tokens(2048)
    batches = pack(random_documents(name, 8, length), 8 * length, share_prefixes=False, device=bench.device)
    for _ in range(3):
        steps.take(batches)
    synchronize(bench.device)
    activity = ProfilerActivity.CUDA if bench.has_card else ProfilerActivity.CPU
    with profiled(activities=[activity], acc_events=True) as seen:
        for _ in range(3):
            steps.take(batches)
        synchronize(bench.device)
    microseconds, launches = Counter[str](), Counter[str]()
    for event in seen.key_averages():
        time_of = event.self_device_time_total if bench.has_card else event.self_cpu_time_total
        label = _kernel_class(event.key)
        microseconds[label] += time_of
        launches[label] += event.count
    total = sum(microseconds.values()) or 1.0
    rows = [
        {"class": label, "share": round(spent / total, 3), "launches_per_step": launches[label] // 3}
        for label, spent in microseconds.most_common()
    ]
    return {"passed": True, "milliseconds_per_step": round(total / 3e3, 2), "rows": rows}


def _kernel_class(name: str) -> str:
    lower = name.lower()
    return next((label for label, parts in KERNEL_CLASSES if any(part in lower for part in parts)), "other")
