"""Micro-batch size: the measured token budget, and a trial of the longest row.

The budget changes memory and speed, never the result, because gradients are sums. `runs.train` calls this before the
first step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from rung.errors import PlanError
from rung.methods.protocol import Method
from rung.models.policy import Policy
from rung.objectives.protocol import Objective
from rung.planning.advise import CANDIDATE_BUDGETS
from rung.training.memory_use import synchronize
from rung.training.step import accumulate
from rung.types import Example, PackedBatch

PackRows = Callable[[Sequence[Example], int], Sequence[PackedBatch]]
"""Packs documents within a budget of tokens, as the run does."""
MAX_SLOWDOWN = 1.03
"""A budget may be this much slower than the fastest: a larger one costs memory, and timings vary by some percent."""


def measure_micro_batch_tokens(
    policy: Policy, objective: Objective, examples: Sequence[Example], pack_rows: PackRows, limit: int | None = None
) -> int:
    """The smallest candidate budget that is at most `MAX_SLOWDOWN` slower than the fastest, in tokens.

    Each budget is timed twice on the same documents in train mode, and the better time counts. Budgets above `limit`
    are not tried. Gradients are discarded and RNG states restored.
    """
    candidates = CANDIDATE_BUDGETS["cuda" if policy.device.type == "cuda" else "cpu"]
    # Where not even the smallest candidate fits, there is no choice.
    candidates = tuple(budget for budget in candidates if limit is None or budget <= limit) or (limit or 0,)
    sample_tokens, sample = 0, list[Example]()
    for example in examples:
        # enough to fill the largest budget once, and only whole rows: an objective compares the answers of a row
        if sample_tokens >= candidates[-1] and (example.row < 0 or example.row != sample[-1].row):
            break
        sample.append(example)
        sample_tokens += len(example)
    seconds = {}
    policy.model.train()
    for budget in candidates:
        window = pack_rows(sample, budget)
        seconds[budget] = min(_time_accumulation(policy, objective, window) for _ in range(2))
        if budget >= sample_tokens:  # larger budgets would pack the same single batch
            break
    policy.model.eval()
    policy.model.zero_grad(set_to_none=True)
    fastest = min(seconds.values())
    return next(budget for budget, duration in seconds.items() if duration <= MAX_SLOWDOWN * fastest)


def try_longest(
    policy: Policy, method: Method, objective: Objective, row: Sequence[Example], pack_rows: PackRows, budget: int
) -> float:
    """Seconds for a forward and backward pass over the longest row, so that a lack of memory shows before step one.

    Gradients, RNG states, method state and metrics are as before afterwards. Raises `PlanError` when out of memory.
    """
    longest_tokens, method_state = max(map(len, row)), method.state()
    policy.model.train()
    try:
        return _time_accumulation(policy, objective, pack_rows(row, budget))
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise  # torch has no exception class for a failed allocation on a CPU, hence the text
        summary = "the longest row of the data does not fit into memory"
        given = f"{longest_tokens:,} tokens: {str(error).splitlines()[0]}"
        hint = "set data.max_length with data.overflow, or take a method that moves less"
        raise PlanError(summary, where=str(row[0].source), given=given, hint=hint) from error
    finally:
        policy.model.eval()
        policy.model.zero_grad(set_to_none=True)
        method.load_state(method_state)
        objective.take_metrics()


def _time_accumulation(policy: Policy, objective: Objective, window: Sequence[PackedBatch]) -> float:
    synchronize(policy.device)
    start = time.perf_counter()
    # dropout draws numbers here: the run must draw the same ones with and without a measurement
    with torch.random.fork_rng(device_type=policy.device.type if policy.device.type == "mps" else "cuda"):
        accumulate(policy, objective, window)
    synchronize(policy.device)
    return time.perf_counter() - start
