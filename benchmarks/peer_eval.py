"""Answers by transformers' `generate`: `.venv-peers/bin/python -m benchmarks.peer_eval JOB.json RESULT.json`."""

from __future__ import annotations

import copy
import json
import sys
import time
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from benchmarks.memory import peak, reset_peak, resident

IMPORTED = resident()


@torch.no_grad()
def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Answer all prompts, padded on the left, in the order given: greedily, or several times each."""
    torch.manual_seed(job["seed"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    prompts, settings = job["prompts"], job["settings"]
    reset_peak()
    started = time.perf_counter()
    # The recipe for reusing a prefix in transformers' own documentation; nothing does it unasked.
    shared = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1) if settings.get("prefix") else 0
    prefix = encode(model, prompts[0][:shared]) if shared else None
    answers: list[list[int]] = []
    size = max(1, settings["batch"] // job["answers"])
    for start in range(0, len(prompts), size):
        answers += batch(model, prompts[start : start + size], shared, prefix, job)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "answers": answers,
        "imported_bytes": IMPORTED,
        "peak_bytes": peak(),
        "threads": torch.get_num_threads(),
    }


def encode(model: PreTrainedModel, ids: list[int]) -> DynamicCache:
    """Keys and values of a prefix, computed once."""
    cache = DynamicCache(config=model.config)
    model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def batch(
    model: PreTrainedModel, prompts: list[list[int]], shared: int, prefix: DynamicCache | None, job: dict[str, Any]
) -> list[list[int]]:
    """Generated ids of each prompt, without its stop. Padding stands between the prefix and a row's own tokens."""
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    filler = job["pad_id"]
    ids = [p[:shared] + [filler] * pad + p[shared:] for p, pad in zip(prompts, pads, strict=True)]
    mask = [[1] * shared + [0] * pad + [1] * (len(p) - shared) for p, pad in zip(prompts, pads, strict=True)]
    reused = {}
    if prefix is not None:
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(prompts))
        reused["past_key_values"] = cache
    many = {"num_return_sequences": job["answers"], "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    whole = {"min_new_tokens": job["max_new_tokens"]}  # nothing stops early, so that both sides make as many tokens
    made = model.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=job["max_new_tokens"],
        eos_token_id=job["stop_ids"],
        pad_token_id=filler,
        **({"do_sample": True, **many, **whole} if job["answers"] > 1 else {"do_sample": False}),
        **reused,
    )
    return [until(row[longest:].tolist(), job["stop_ids"]) for row in made]


def until(ids: list[int], stops: list[int]) -> list[int]:
    """The tokens before the first stop."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answer(json.loads(Path(sys.argv[1]).read_text()))))
