"""What a shared prompt saves in the training part of reinforcement: `python -m benchmarks.groups`.

Groups of answers to a prompt are learned from as a tree, the prompt computed once, and as documents of their own, in
alternation in one process, on the same weights and the same answers. The ratio of times stands beside that of the
tokens computed, G (p + m) / (p + G m), which is the most that sharing can give where everything costs by the token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from benchmarks.rows import make_rows
from rung.config.method import LoraConfig
from rung.config.model import ModelConfig
from rung.config.objective import GrpoConfig
from rung.methods.registry import attach_method
from rung.models.packing import PackedBatch, pack, pack_separately
from rung.models.policy import Policy
from rung.objectives.registry import OBJECTIVES
from rung.runs.load import load
from rung.training.step import accumulate
from rung.types import Example, Source

BUDGET = 2048
"""Tokens of a micro-batch, for both."""


def documents(policy: Policy, prompts: int, answers: int, prompt_tokens: int, answer_tokens: int) -> list[Example]:
    """Groups of answers, with the columns that a rollout leaves."""
    random = np.random.default_rng(0)
    text = " ".join(row.question for row in make_rows(200, 1))
    ids = np.array(policy.base.tokenizer(text)["input_ids"], dtype=np.int32)
    made = []
    for row in range(prompts):
        start = int(random.integers(0, len(ids) - prompt_tokens))
        prompt = ids[start : start + prompt_tokens]
        for place in range(answers):
            whole = np.concatenate([prompt, random.choice(ids, size=answer_tokens)])
            supervised = np.arange(len(whole)) >= prompt_tokens
            one = Example(whole, supervised, Source("made", row + 1), row=row)
            with torch.no_grad():
                own = policy.logprobs(pack_separately([one])[0]).numpy()
            flat = np.full(answer_tokens, (-1.0) ** place)
            made.append(replace(one, columns={"old": own, "reference": own - 0.1, "advantage": flat}))
    return made


def seconds(policy: Policy, batches: Sequence[PackedBatch]) -> tuple[float, float]:
    """Of forward and backward, and the loss."""
    objective = OBJECTIVES["grpo"](GrpoConfig(reward={"kind": "exact"}))
    for parameter in policy.method.trainable().values():
        parameter.grad = None
    started = time.perf_counter()
    loss = float(accumulate(policy, objective, batches).detach())
    return time.perf_counter() - started, loss


def measure(prompts: int, answers: int, prompt_tokens: int, answer_tokens: int, rounds: int) -> dict[str, float]:
    """Medians over the rounds; the first, which is cold, does not count."""
    base = load(ModelConfig(name="smollm2-135m", dtype="float32"))
    policy = Policy(base, attach_method(base.model, LoraConfig(rank=16), seed=0))
    examples = documents(policy, prompts, answers, prompt_tokens, answer_tokens)
    ways = {
        name: pack(examples, BUDGET, share_prefixes=share, device=policy.device)
        for name, share in (("shared", True), ("apart", False))
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    for _ in range(rounds + 1):
        for name, batches in ways.items():
            found, losses[name] = seconds(policy, batches)
            taken[name].append(found)
    computed = {name: sum(len(batch.ids) for batch in batches) for name, batches in ways.items()}
    ratios = [a / s for a, s in zip(taken["apart"][1:], taken["shared"][1:], strict=True)]
    tokens = answers * (prompt_tokens + answer_tokens) / (prompt_tokens + answers * answer_tokens)
    return {
        "prompt": prompt_tokens,
        "answer": answer_tokens,
        "faster": round(statistics.median(ratios), 3),
        "fastest": round(max(ratios), 3),
        "slowest": round(min(ratios), 3),
        "tokens": round(tokens, 3),
        "computed": round(computed["apart"] / computed["shared"], 3),
        "share": round(statistics.median(ratios) / tokens, 3),
        "losses_differ": abs(losses["shared"] - losses["apart"]),
    }


def main() -> None:
    """Print one JSON object for each length."""
    parser = argparse.ArgumentParser(
        prog="groups", description="Groups of answers with their prompt shared, and apart."
    )
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", default="64:32,200:50,200:100", help="tokens of prompt and answer")
    asked = parser.parse_args()
    for lengths in asked.lengths.split(","):
        prompt, answer = map(int, lengths.split(":"))
        found = measure(asked.prompts, asked.answers, prompt, answer, asked.rounds)
        print(json.dumps({"threads": torch.get_num_threads(), **found}), flush=True)


if __name__ == "__main__":
    main()
