"""Examples, batches and policies for tests of everything above the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from models import tiny_model
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import SftConfig
from rung.data.read import ParsedRow, RejectedRow, stream_rows
from rung.methods.protocol import Method
from rung.methods.registry import attach_method
from rung.models.base_model import BaseModel
from rung.models.packing import pack
from rung.models.policy import NoMethod, Policy
from rung.objectives.sft import SftObjective
from rung.training.step import CalibrationBatch
from rung.types import Example, PackedBatch, Source


def read_rows(path: str) -> tuple[list[ParsedRow], list[RejectedRow]]:
    """All readable and all rejected rows of a source."""
    items = list(stream_rows(path))
    return [i for i in items if isinstance(i, ParsedRow)], [i for i in items if isinstance(i, RejectedRow)]


def policy_of(model: PreTrainedModel, method: object | None = None, *, compute: torch.dtype = torch.float32) -> Policy:
    return Policy(BaseModel(model, None, "tiny", "tiny", compute), method or NoMethod())  # type: ignore[arg-type]


def logits_of(policy: Policy, batch: PackedBatch) -> torch.Tensor:
    """All logits [T, V] of a short batch."""
    hidden = policy.hidden_states(batch)
    with policy.autocast():
        return policy.logit_map.apply_(policy.head(hidden).clone())


def tuned(
    kind: str, shape: str = "llama", *, dtype: torch.dtype = torch.float32, **config: object
) -> tuple[Policy, Method]:
    """A tiny model with a method attached and its trained numbers drawn anew, so that they matter."""
    model = tiny_model(shape, dtype=dtype)
    method = attach_method(model, METHOD_CONFIGS[kind](**config), seed=0)  # type: ignore[arg-type]
    policy = calibrated(policy_of(model, method), method)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in method.trainable().values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.05 * noise.to(parameter.dtype))
    return policy, method


def calibrated(policy: Policy, method: Method) -> Policy:
    """The same policy, its method's start read off a few documents where it has one.

    A sample of one is for the tokenizer, which these models have not: such starts have tests of their own.
    """
    if method.sample_size > 1:
        method.calibrate(CalibrationBatch(policy, SftObjective(SftConfig()), documents(8, count=24), 100))
    return policy


def example(ids: Sequence[int], prompt: int, *, weight: float = 1.0, line: int = 1) -> Example:
    """A document whose first `prompt` tokens are read and whose others are learned."""
    whole = np.array(ids, dtype=np.int32)
    return Example(whole, np.arange(len(whole)) >= max(1, prompt), Source("test", line), weight)


def in_one_batch(examples: Sequence[Example]) -> list[PackedBatch]:
    """All documents in as few batches as their tasks allow, as the step-0 gates get them."""
    return pack(examples, sum(map(len, examples)))


def documents(seed: int = 0, count: int = 6, *, shared: int = 0, longest: int = 30) -> list[Example]:
    """Random documents, all beginning with the same `shared` tokens."""
    rng = np.random.default_rng(seed)
    head = rng.integers(3, 320, size=shared).tolist()
    made = []
    for line in range(count):
        own = rng.integers(3, 320, size=int(rng.integers(4, longest))).tolist()
        made.append(example([*head, *own], shared + int(rng.integers(1, 4)), weight=1.0 + line % 2, line=line + 1))
    return made


def rows(seed: int = 0, count: int = 5, *, answers: int = 2, shared: int = 0) -> list[Example]:
    """Rows of answers to a prompt each, the first the best."""
    rng = np.random.default_rng(seed)
    head = rng.integers(3, 320, size=shared).tolist()
    made = []
    for row in range(count):
        prompt = [*head, *rng.integers(3, 320, size=int(rng.integers(4, 25))).tolist()]
        for place in range(answers):
            own = rng.integers(3, 320, size=int(rng.integers(2, 9))).tolist()
            one = example([*prompt, *own], len(prompt), weight=1.0 + row % 2, line=row + 1)
            made.append(replace(one, row=row, score=float(answers - place)))
    return made


def greedy_by_transformers(
    model: PreTrainedModel, prompt: Sequence[int], tokens: int, stops: Sequence[int]
) -> list[int]:
    """The greedy answer of transformers' own generate, with the stop that ended it."""
    row = torch.tensor([list(prompt)])
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": list(stops), "pad_token_id": 0}
    answer: list[int] = model.generate(row, attention_mask=torch.ones_like(row), **options)[0, len(prompt) :].tolist()  # type: ignore[operator]
    return answer
