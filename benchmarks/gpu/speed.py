"""Sections that are measured: training, preferences, reinforcement and decoding, beside other code on the same card."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812
from transformers.models.llama import modeling_llama

from benchmarks.gpu.workbench import (
    Bench,
    Steps,
    attempt,
    free,
    measure,
    random_documents,
    random_model,
    random_policy,
    shape_of,
)
from rung.config.objective import GrpoConfig, PreferenceConfig
from rung.models import fused_ops, fused_rotary, logprobs, matmul, pointwise, tree_attention
from rung.models import generate as generating
from rung.models.fused_modules import original_forwards
from rung.models.fused_rotary import original_rotary
from rung.models.generate import Sampling, generate
from rung.models.packing import pack
from rung.models.policy import Policy
from rung.models.static_decoding import StaticDecoder
from rung.objectives.grpo import GrpoObjective
from rung.objectives.preference import make_preference_objective
from rung.planning.architecture import ModelShape
from rung.training.memory_use import synchronize
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


SMALL_STEP_TOKENS = 4096
"""The same where activations are not fused: more of 8B do not fit into the memory of any card."""
LORA_CASES = (
    # shape, tokens of a document, share that is learned, with Rung's own functions, tokens of a step
    ("1B", 2048, 1.0, True, STEP_TOKENS),
    ("1B", 2048, 0.3, True, STEP_TOKENS),
    ("1B", 2048, 1.0, False, STEP_TOKENS),
    ("8B", 2048, 1.0, True, STEP_TOKENS),
    ("8B", 2048, 0.3, True, STEP_TOKENS),
    ("8B", 8192, 1.0, True, STEP_TOKENS),
    ("8B", 2048, 1.0, True, SMALL_STEP_TOKENS),
    ("8B", 2048, 1.0, False, SMALL_STEP_TOKENS),
)


def lora(bench: Bench) -> dict[str, Any]:
    """Steps of LoRA at true shapes: tokens per second and the peak of memory."""
    cases = LORA_CASES[:2] if bench.quick or not bench.has_card else LORA_CASES
    rows, steps, name = [], None, ""
    for shape, length, learned, fused, tokens in cases:
        if bench.out_of_time:
            break
        if steps is None or name != bench.shape(shape):
            steps = None
            free()
            name = bench.shape(shape)
            steps = Steps(random_policy(bench, name, rank=RANK))
        row = {"shape": name, "length": bench.tokens(length), "learned": learned, "fused": fused}
        row["step_tokens"] = bench.tokens(tokens)
        rows.append(attempt(row, partial(_train, bench, steps, name, length, learned, fused=fused, tokens=tokens)))
    return {"passed": True, "rows": rows}


def _train(
    bench: Bench, steps: Steps, name: str, length: int, learned: float, *, fused: bool, tokens: int = STEP_TOKENS
) -> dict[str, Any]:
    length = bench.tokens(length)
    tokens = max(length, bench.tokens(tokens) // length * length)
    examples = random_documents(name, tokens // length, length, learned=learned)
    batches = pack(examples, tokens, share_prefixes=False, device=bench.device)
    with nullcontext() if fused else original_forwards(steps.policy.model):
        found = measure(bench, lambda: steps.take(batches), tokens)
    return {**found, "flops_per_token": flops_per_token(shape_of(name), length, learned)}


_ATTENTION, _HEAD = (tree_attention, "has_varlen_kernel"), (logprobs, "has_logprob_kernel")
_COMPILED, _ROTARY = (pointwise, "has_triton"), (fused_rotary, "on_card")
_PRODUCTS = ((matmul, "on_card"), (fused_ops, "on_card"))
REMEDIES: dict[str, tuple[tuple[Any, str], ...]] = {
    "nothing": (),
    "attention in one call": (_ATTENTION,),
    "one kernel between the head's products": (_HEAD,),
    "compiled functions": (_COMPILED,),
    "one function for rotary embeddings": (_ROTARY,),
    "sums and scales as part of products": _PRODUCTS,
    "all of them": (_ATTENTION, _HEAD, _COMPILED, _ROTARY, *_PRODUCTS),
}
"""What is switched off: functions that say whether a device has something, which say no."""


def remedies(bench: Bench) -> dict[str, Any]:
    """What each part that only a card has is worth: LoRA with short documents, with each of them switched off."""
    name, length = bench.shape("1B"), bench.tokens(256)
    tokens = max(length, bench.tokens(STEP_TOKENS) // length * length)
    steps = Steps(random_policy(bench, name, rank=RANK))
    batches = pack(random_documents(name, tokens // length, length), tokens, device=bench.device)
    rows = []
    for remedy, functions in REMEDIES.items():
        if bench.out_of_time:
            break
        with ExitStack() as stack:
            for module, function in functions:
                stack.enter_context(mock.patch.object(module, function, lambda *arguments: False))
            work = partial(measure, bench, lambda: steps.take(batches), tokens)
            rows.append(attempt({"remedy": remedy, "shape": name, "length": length}, work))
    return {"passed": True, "rows": rows}


def peers(bench: Bench) -> dict[str, Any]:
    """The same steps with transformers and peft, with Liger's kernels where they are installed."""
    # 8B keeps more than a card has without checkpointing, unless a step is small.
    cases = [("1B", STEP_TOKENS, False), ("1B", STEP_TOKENS, True)]
    if bench.has_card and not bench.quick:
        cases += [("8B", SMALL_STEP_TOKENS, False), ("8B", STEP_TOKENS, True)]
    rows = []
    for liger in (False, True):
        for shape, tokens, checkpointing in cases:
            if bench.out_of_time:
                break
            row = {"shape": bench.shape(shape), "length": bench.tokens(2048), "step_tokens": bench.tokens(tokens)}
            row |= {"checkpointing": checkpointing, "liger": liger}
            with _unchanged_llama(), original_rotary():
                rows.append(attempt(row, partial(_peer, bench, row)))
    return {"passed": True, "rows": rows}


@contextmanager
def _unchanged_llama() -> Iterator[None]:
    """Restore transformers' module afterwards: Liger replaces its classes and functions for the whole process."""
    names = vars(modeling_llama)
    original = dict(names)
    try:
        yield
    finally:
        names.clear()
        names.update(original)


def _peer(bench: Bench, row: dict[str, Any]) -> dict[str, Any]:
    model, optimizer = _peft_model(bench, row["shape"], liger=row["liger"], checkpointing=row["checkpointing"])
    parameters, length = [p for p in model.parameters() if p.requires_grad], row["length"]
    tokens = max(length, row["step_tokens"] // length * length)
    ids = torch.randint(3, model.config.vocab_size, (tokens // length, length), device=bench.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return measure(bench, step, tokens)


def qlora(bench: Bench) -> dict[str, Any]:
    """Steps on a base in 4 bits: with Rung's functions, and with the forward of transformers and peft."""
    name, rows = bench.shape("1B" if bench.quick else "8B"), []
    steps = Steps(random_policy(bench, name, "qlora", rank=RANK))
    for fused, tokens in ((True, STEP_TOKENS), (True, SMALL_STEP_TOKENS), (False, SMALL_STEP_TOKENS)):
        if not bench.out_of_time:
            row = {"shape": name, "fused": fused, "step_tokens": bench.tokens(tokens)}
            rows.append(attempt(row, partial(_train, bench, steps, name, 2048, 1.0, fused=fused, tokens=tokens)))
    return {"passed": True, "rows": rows}


def phi2(bench: Bench) -> dict[str, Any]:
    """LoRA, QLoRA and full fine-tuning of Phi-2's true shape for a few steps on one document: the loss must fall."""
    name, rows = bench.shape("phi-2"), []
    for kind in ("lora", "qlora", "full"):
        if not bench.out_of_time:
            rows.append(attempt({"method": kind}, partial(_phi2_run, bench, name, kind)))
    measured = [row for row in rows if "not_measured" not in row]
    return {"passed": all(row["last_loss"] < row["first_loss"] for row in measured), "rows": rows}


def _phi2_run(bench: Bench, name: str, kind: str) -> dict[str, Any]:
    steps = Steps(random_policy(bench, name, kind))
    batches = pack(random_documents(name, 1, bench.tokens(1024)), STEP_TOKENS, device=bench.device)
    losses = [float(steps.take(batches)) for _ in range(6)]
    found = measure(bench, lambda: steps.take(batches), bench.tokens(1024))
    return {"first_loss": losses[0], "last_loss": losses[-1], **found}


def alignment(bench: Bench) -> dict[str, Any]:
    """A preference and a reinforcement step: prompts shared, unrolled, and in a padded batch as TRL computes them."""
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
            batches = pack(examples, tokens, share_prefixes=packing == "tree", device=bench.device)
            row = {"objective": label, "packing": packing, "computed_tokens": sum(len(b.ids) for b in batches)}
            step = partial(Steps(policy, objective).take, batches)
            rows.append(attempt(row, partial(measure, bench, step, tokens)))
    del policy
    for label, answers in (("dpo", 2), ("grpo", 8)):
        if not bench.out_of_time:
            free()
            row = {"objective": label, "packing": "transformers + peft, a batch of all answers"}
            examples = _answers(name, bench.tokens(1024), bench.tokens(256), answers)
            row["computed_tokens"] = sum(map(len, examples))
            rows.append(attempt(row, partial(_batched, bench, name, label, examples)))
    return {"passed": True, "rows": rows}


def _batched(bench: Bench, name: str, objective: str, examples: Sequence[Example]) -> dict[str, Any]:
    """A step on all answers in one batch, logits of the answers alone: what TRL's trainers compute, without them."""
    model, optimizer = _peft_model(bench, name)
    ids = torch.tensor(np.stack([e.ids for e in examples]), dtype=torch.long, device=bench.device)
    answer = examples[0].predictions
    advantage = torch.tensor([e.columns["advantage"][0] for e in examples], dtype=torch.float32, device=bench.device)

    def logprobs() -> torch.Tensor:
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=answer + 1).logits[:, :-1]
        return -F.cross_entropy(logits.float().transpose(1, 2), ids[:, -answer:], reduction="none")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if objective == "grpo":
            own = logprobs()
            loss = -(torch.exp(own - own.detach()) * advantage[:, None]).mean()
        else:
            with torch.no_grad(), model.disable_adapter():
                reference = logprobs().sum(1)
            margin = logprobs().sum(1) - reference
            loss = -F.logsigmoid(0.1 * (margin[::2] - margin[1::2])).mean()
        loss.backward()
        optimizer.step()

    return measure(bench, step, ids.numel())


def _peft_model(bench: Bench, name: str, *, liger: bool = False, checkpointing: bool = False) -> tuple[Any, Any]:
    """A random model of transformers with peft's LoRA, in training mode, and its optimizer."""
    from peft import LoraConfig, get_peft_model

    model = random_model(bench, name, implementation="sdpa")
    if liger:
        import_module("liger_kernel.transformers").apply_liger_kernel_to_llama(model=model)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    return model, torch.optim.AdamW(parameters, lr=1e-4, fused=bench.has_card)


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
    """New tokens per second of sampled answers to one prompt of a thousand tokens, without the time of the prompt."""
    name, rows = bench.shape("1B" if bench.quick else "8B"), []
    policy = random_policy(bench, name, None)
    counts = (1, 32) if bench.quick or not bench.has_card else (1, 32, 256)
    # at 32 rows also without the graph, and with the buffers of processors
    for how, count in (*(("graph", count) for count in counts), ("no graph", 32), ("growing buffers", 32)):
        if bench.out_of_time:
            break
        with ExitStack() as stack:
            if how == "no graph":
                stack.enter_context(mock.patch.object(StaticDecoder, "_recorded", lambda decoder: decoder._step))
            if how == "growing buffers":
                stack.enter_context(mock.patch.object(generating, "decodes_statically", lambda device: False))
            row = {"shape": name, "rows": count, "how": how}
            rows.append(attempt(row, partial(_decode, bench, policy, name, count)))
    return {"passed": True, "rows": rows}


def _decode(bench: Bench, policy: Policy, name: str, count: int) -> dict[str, Any]:
    prompt, new = (
        random_documents(name, 1, bench.tokens(1024))[0].ids.tolist(),
        bench.tokens(64 if bench.quick else 128),
    )

    def seconds(tokens: int) -> float:
        sampling = Sampling(tokens, temperature=1.0, seed=0, answers_per_prompt=count)
        synchronize(bench.device)
        started = time.perf_counter()
        answers = generate(policy, [prompt], stop_ids=(), sampling=sampling, batch_size=count)
        synchronize(bench.device)
        if [len(answer.ids) for answer in answers] != [tokens] * count:
            raise RuntimeError("some answers ended early")
        return time.perf_counter() - started

    seconds(2)  # what is set up once
    first = seconds(1)
    return {"tokens_per_second": round(count * (new - 1) / max(1e-9, seconds(new) - first), 1)}


KERNEL_CLASSES = (
    # the first class with a matching part of the name
    # attention first: its kernels are written with CUTLASS too
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("product", ("gemm", "cutlass", "nvjet", "xmma", "addmm", "::mm", "bmm", "mkldnn")),
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
