"""Tokens a second of `rung generate` in batches of eight: questions as JSON on stdin, a number on stdout."""

from __future__ import annotations

import json
import sys
import time

from rung.config.model import ModelConfig
from rung.models.generate import Sampling, generate
from rung.runs.load import open_base
from rung.types import Message

BATCH = 8


def main() -> int:
    """Answer all questions greedily; the first batch warms up."""
    name, tokens = sys.argv[1], int(sys.argv[2])
    model = open_base(ModelConfig(name=name, dtype="float32"))
    prompts = [model.chat.prompt_ids([Message("user", question)]) for question in json.load(sys.stdin)]
    sampling, stop_ids = Sampling(tokens, 0.0, 0), model.chat.generation_stop_ids
    found, start_time = 0, 0.0
    for start in range(0, len(prompts), BATCH):
        answers = generate(model.policy, prompts[start : start + BATCH], stop_ids=stop_ids, sampling=sampling)
        if start:
            found += sum(len(answer.ids) for answer in answers)
        else:
            start_time = time.perf_counter()
    print(found / (time.perf_counter() - start_time))
    return 0


if __name__ == "__main__":
    sys.exit(main())
