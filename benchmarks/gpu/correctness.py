"""Sections that are right or wrong: the same numbers as the processor, and nothing that waits for the card."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.workbench import Bench, random_documents, random_policy
from rung.config.objective import GrpoConfig, PreferenceConfig, SftConfig
from rung.models.generate import Sampling, generate
from rung.models.packing import pack, pack_separately
from rung.models.policy import Policy
from rung.models.tree_attention import AttentionParams, attend_tree
from rung.objectives.grpo import GrpoObjective
from rung.objectives.preference import make_preference_objective
from rung.objectives.protocol import Objective
from rung.objectives.sft import SftObjective
from rung.training.gates import compare_logprobs
from rung.training.step import accumulate
from rung.types import Example, PackedBatch, Segment

ROOT = Path(__file__).parents[2]
FLOAT32_LIMIT, BFLOAT16_LIMIT = 1e-4, 1e-2
"""Largest relative difference of log-probabilities from the processor's float64, as a share of their norm."""
BFLOAT16_GRADIENT_FACTOR = 1.5
"""Gradients in bfloat16 may be this much farther from float64 than those of the processor in bfloat16."""


def parity(bench: Bench) -> dict[str, Any]:
    """Log-probabilities and gradients of tiny models of every proved shape, against float64 on the processor."""
    sys.path.insert(0, str(ROOT / "tests"))
    from builders import documents  # the shapes and documents of the tests
    from models import SHAPES

    examples = documents(3, count=5, shared=18)
    results = {}
    for shape in list(SHAPES)[:3] if bench.quick else SHAPES:
        exact = _values(shape, torch.float64, torch.device("cpu"), examples)
        for dtype, limit in ((torch.float32, FLOAT32_LIMIT), (torch.bfloat16, BFLOAT16_LIMIT)):
            found = _values(shape, dtype, bench.device, examples)
            logprob, gradient = (_distance(a, b) for a, b in zip(found, exact, strict=True))
            gradient_limit = FLOAT32_LIMIT
            if dtype is torch.bfloat16:
                own = _values(shape, dtype, torch.device("cpu"), examples)
                gradient_limit = BFLOAT16_GRADIENT_FACTOR * max(_distance(own[1], exact[1]), BFLOAT16_LIMIT)
            passed = logprob < limit and gradient < gradient_limit
            name = f"{shape} {str(dtype).removeprefix('torch.')}"
            results[name] = {"logprobs": logprob, "gradients": gradient, "passed": passed}
        if bench.out_of_time:
            break
    return {"passed": all(r["passed"] for r in results.values()), "shapes": results}


def _values(shape: str, dtype: torch.dtype, device: torch.device, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and gradients of LoRA on a tiny model, in float64 on the processor."""
    from builders import policy_of, tuned

    wide = torch.float32 if dtype is torch.bfloat16 else dtype
    tuned_policy, method = tuned("lora", shape, dtype=wide)
    policy = policy_of(tuned_policy.model.to(device), method, compute=dtype)
    batches = pack(examples, 60, device=device)
    with torch.no_grad():
        logprobs = torch.cat([policy.logprobs(batch) for batch in policy.iterate_batches(batches)])
    accumulate(policy, SftObjective(SftConfig()), batches)
    gradients = [p.grad.flatten() for p in method.trainable().values() if p.grad is not None]
    return logprobs.double().cpu(), torch.cat(gradients).double().cpu()


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def trees(bench: Bench) -> dict[str, Any]:
    """Attention over segment trees, with gradients, against masks written out in float64."""
    segments = (Segment(0, 9, None), Segment(9, 14, 0), Segment(14, 21, 0), Segment(21, 24, 2), Segment(24, 30, None))
    results = {}
    for softcap, window, prefix, (heads, kv_heads) in product((None, 1.5), (None, 7), (0, 5), ((4, 4), (4, 2))):
        for dtype, limit in ((torch.float32, FLOAT32_LIMIT), (torch.bfloat16, 2 * BFLOAT16_LIMIT)):
            case = _TreeCase(segments, window, prefix, heads, kv_heads)
            distance = case.distance(bench.device, dtype, softcap)
            kind = f"softcap {softcap}, {str(dtype).removeprefix('torch.')}"
            name = f"window {window}, prefix {prefix}, heads {heads}/{kv_heads}, {kind}"
            results[name] = {"distance": distance, "passed": distance < limit}
    found: dict[str, Any] = {"cases": len(results), "largest": max(r["distance"] for r in results.values())}
    found["passed"] = all(r["passed"] for r in results.values())
    if bench.has_card:
        found["bottom_right"] = _bottom_right(bench.device)
        found["passed"] &= found["bottom_right"] < BFLOAT16_LIMIT
    return found


class _TreeCase:
    def __init__(
        self, segments: tuple[Segment, ...], window: int | None, prefix: int, heads: int, kv_heads: int
    ) -> None:
        self.segments, self.window, self.prefix = segments, window, prefix
        generator, tokens = torch.Generator().manual_seed(prefix + heads + kv_heads), segments[-1].end
        sizes = ((heads, tokens), (kv_heads, tokens), (kv_heads, tokens), (kv_heads, prefix), (kv_heads, prefix))
        self.tensors = [torch.randn(1, h, n, 16, generator=generator, dtype=torch.float64) for h, n in sizes]
        self.gradient = torch.randn(1, tokens, heads, 16, generator=generator, dtype=torch.float64)

    def distance(self, device: torch.device, dtype: torch.dtype, softcap: float | None = None) -> float:
        """Of output and gradients together, relative to float64."""
        self.softcap = softcap
        exact = self._run(torch.device("cpu"), torch.float64, self._written_out)
        found = self._run(device, dtype, self._by_segments)
        return _distance(found, exact)

    def _run(self, device: torch.device, dtype: torch.dtype, attend: Callable[..., Tensor]) -> Tensor:
        tensors = [t.to(device, dtype, copy=True).requires_grad_(True) for t in self.tensors]
        out = attend(*tensors)
        out.backward(self.gradient.to(device, dtype))
        gradients = [t.grad for t in tensors if t.grad is not None]
        return torch.cat([t.detach().double().cpu().flatten() for t in (out, *gradients)])

    def _by_segments(self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        params = AttentionParams(scaling=0.3, softcap=self.softcap, window=self.window)
        prefix = (prefix_k, prefix_v) if self.prefix else None
        return attend_tree(q, k, v, self.segments, prefix, params)

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        keys, values = (torch.cat(pair, dim=2) for pair in ((prefix_k, k), (prefix_v, v)))
        groups = q.shape[1] // k.shape[1]
        scores = 0.3 * q @ keys.repeat_interleave(groups, 1).transpose(-1, -2)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        weights = scores.masked_fill(~self._mask(), -torch.inf).softmax(-1)
        return (weights @ values.repeat_interleave(groups, 1)).transpose(1, 2)

    def _mask(self) -> Tensor:
        """Which keys [P + T] each token [T] sees: the prefix, its ancestors and itself, within the window."""
        tokens = self.segments[-1].end
        visible = torch.zeros(tokens, self.prefix + tokens, dtype=torch.bool)
        for segment in self.segments:
            path, parent = list(range(segment.start, segment.end)), segment.parent
            while parent is not None:
                path = [*range(self.segments[parent].start, self.segments[parent].end), *path]
                parent = self.segments[parent].parent
            keys = [*range(self.prefix), *(self.prefix + place for place in path)]
            for row in range(segment.start, segment.end):
                seen = keys[: keys.index(self.prefix + row) + 1]
                visible[row, seen if self.window is None else seen[-self.window :]] = True
        return visible


def _bottom_right(device: torch.device) -> float:
    """Whether the variable-length kernel aligns causal queries with the last key, where there are more keys."""
    torch.manual_seed(0)
    lengths_q, lengths_k = (5, 7), (11, 7)
    counts = [sum(lengths) for lengths in (lengths_q, lengths_k, lengths_k)]
    query, key, value = (torch.randn(count, 4, 64, device=device).bfloat16() for count in counts)
    borders = [torch.tensor([0, *np.cumsum(n)], dtype=torch.int32, device=device) for n in (lengths_q, lengths_k)]
    out = torch.ops.aten._flash_attention_forward(query, key, value, *borders, 7, 11, 0.0, True, False)[0]
    expected = []
    for (a, b), (c, d) in zip(pairwise(borders[0].tolist()), pairwise(borders[1].tolist()), strict=True):
        scores = torch.einsum("qhd,khd->hqk", query[a:b].double(), key[c:d].double()) / 8.0
        visible = torch.ones(b - a, d - c, dtype=torch.bool, device=device).tril(d - c - (b - a))
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, value[c:d].double()))
    return _distance(out.double(), torch.cat(expected))


def syncs(bench: Bench) -> dict[str, Any]:
    """How often a step makes the host wait for the card; on a processor fake tensors stand in for it."""
    policy, examples = random_policy(bench, "tiny"), random_documents("tiny", 8, 24, learned=0.5)
    answers = [replace(e, row=i // 4, score=float(i % 4)) for i, e in enumerate(examples)]
    rng = np.random.default_rng(0)
    scored = [replace(e, columns={"advantage": rng.normal(size=e.predictions)}) for e in examples]
    work: dict[str, tuple[Objective, Sequence[Example]]] = {
        "sft": (SftObjective(SftConfig()), examples),
        "dpo": (make_preference_objective(PreferenceConfig()), answers),
        "grpo": (GrpoObjective(GrpoConfig(reward={"kind": "exact"}, beta=0.0)), scored),  # type: ignore[arg-type]
    }
    count = _waits_on_card if bench.has_card else _reads_of_fakes
    found = {name: count(policy, objective, rows, bench) for name, (objective, rows) in work.items()}
    # Supervised fine-tuning must not wait at all; what the others copy from lists is counted.
    return {"passed": not found["sft"] if bench.has_card else not any(found.values()), "waits": found}


def _waits_on_card(policy: Policy, objective: Objective, examples: Sequence[Example], bench: Bench) -> list[str]:
    batches = pack(examples, 200, device=bench.device)
    accumulate(policy, objective, batches)  # caches of constants are filled once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            accumulate(policy, objective, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]


def _reads_of_fakes(policy: Policy, objective: Objective, examples: Sequence[Example], bench: Bench) -> list[str]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            accumulate(policy, objective, pack(examples, 200))
    except RuntimeError as error:
        return [str(error).splitlines()[0]]
    finally:
        policy.model.zero_grad()  # gradients that are fakes
    return []


def exactness(bench: Bench) -> dict[str, Any]:
    """In bfloat16: packed or alone, tree or flat, decoded or read; the spread of the differences."""
    name = bench.shape("1B")
    policy = random_policy(bench, name, None)
    head = random_documents(name, 1, bench.tokens(512), seed=7)[0].ids
    tails = random_documents(name, 6, bench.tokens(256), learned=0.8)
    examples = [replace(e, ids=np.concatenate([head, e.ids]), supervised=_shifted(head, e)) for e in tails]
    budget = sum(map(len, examples))
    trees_of = pack(examples, budget, device=bench.device)
    ordered = [replace(d, row=-1) for batch in trees_of for d in batch.documents]
    flat = pack(ordered, budget, share_prefixes=False, device=bench.device)
    found = {
        "tree against alone": _difference(policy, trees_of, pack_separately(ordered, bench.device)),
        "tree against flat": _difference(policy, trees_of, flat),
        "decoded against read": _decoded(policy, examples[:2], bench),
    }
    gates = {label: compare_logprobs(label, difference, policy) for label, difference in found.items()}
    spread = {label: _quantiles(difference) for label, difference in found.items()}
    return {"passed": all(gate.state == "passed" for gate in gates.values()), "nats": spread}


def _shifted(head: np.ndarray, example: Example) -> np.ndarray:
    return np.concatenate([np.zeros(len(head), dtype=bool), example.supervised])


@torch.no_grad()
def _difference(policy: Policy, first: Sequence[PackedBatch], second: Sequence[PackedBatch]) -> Tensor:
    values = []
    for batches in (first, second):
        by_document: dict[int, Tensor] = {}
        for batch in policy.iterate_batches(batches):
            logprobs = policy.logprobs(batch).float().cpu()
            sizes = [d.predictions for d in batch.documents]
            by_document |= {d.source.line: own for d, own in zip(batch.documents, logprobs.split(sizes), strict=True)}
        values.append(torch.cat([by_document[line] for line in sorted(by_document)]))
    return values[0] - values[1]


@torch.no_grad()
def _decoded(policy: Policy, examples: Sequence[Example], bench: Bench) -> Tensor:
    prompts = [e.ids.tolist() for e in examples]
    answers = generate(policy, prompts, stop_ids=(), sampling=Sampling(bench.tokens(64)))
    differences = []
    for prompt, answer, example in zip(prompts, answers, examples, strict=True):
        ids = np.array([*prompt, *answer.ids], dtype=np.int32)
        document = Example(ids, np.arange(len(ids)) >= len(prompt), example.source, 1.0)
        read = policy.logprobs(pack_separately([document], bench.device)[0]).float().cpu()
        differences.append(read - torch.tensor(answer.logprobs))
    return torch.cat(differences)


def _quantiles(difference: Tensor) -> dict[str, float]:
    distances = difference.abs().double().numpy()
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(float(np.quantile(distances, share)), 5) for name, share in shares.items()}
