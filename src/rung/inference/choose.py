"""One way to choose among given options: the log-probability of each option as the answer to each prompt.

Options are children of one prompt in the tree, so a prompt is computed once for all of them. Nothing is generated, so a
choice is never unreadable; the price is that the model gives no reasons. `evaluation.judge` and `synth` choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rung.models.document_values import values_by_document
from rung.models.policy import Policy, sum_by_document
from rung.planning.memory import tokens_per_micro_batch
from rung.types import Example, PackedBatch, Source

PROMPTS_PER_UPDATE = 64
"""Prompts between two updates of the progress bar."""


def max_prompt_tokens(policy: Policy, options: Sequence[Sequence[int]]) -> int:
    """Tokens of the longest prompt that leaves room for every option: all options of a prompt must be comparable."""
    return policy.base.context - policy.method.virtual_tokens - max(map(len, options))


def choose(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[int]],
    on_prompts: Callable[[int], None] | None = None,
    tasks: Sequence[str | None] | None = None,
) -> NDArray[np.float64]:
    """Log p(option | prompt) in nats, summed over the option's tokens, [P, C] for P prompts and C options.

    `prompts` and `options` are token ids. `on_prompts` receives the number of prompts just computed. `tasks` has the
    task of each prompt, for methods with parameters per task. A row is NaN where
    the prompt has more than `max_prompt_tokens`.
    """
    limit = max_prompt_tokens(policy, options)
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= limit]
    budget = tokens_per_micro_batch(policy.base.shape, policy.device.type)
    logprobs_PC = np.full((len(prompts), len(options)), np.nan)

    def sums(batch: PackedBatch) -> list[float]:
        return sum_by_document(batch, policy.logprobs(batch)).tolist()

    for start in range(0, len(fitting), PROMPTS_PER_UPDATE):
        part = fitting[start : start + PROMPTS_PER_UPDATE]
        documents = [_document(prompts[i], option, i, tasks[i] if tasks else None) for i in part for option in options]
        logprobs_PC[part] = np.reshape(values_by_document([policy], documents, budget, sums), (len(part), -1))
        if on_prompts is not None:
            on_prompts(len(part))
    return logprobs_PC


def _document(prompt: Sequence[int], option: Sequence[int], row: int, task: str | None) -> Example:
    ids = np.array([*prompt, *option], dtype=np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt), Source("choice", row), row=row, task=task)
