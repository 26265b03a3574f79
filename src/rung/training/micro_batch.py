"""How many tokens to compute at once, measured once, and what a document too long for memory has computed again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from rung.errors import PlanError
from rung.methods.protocol import Method
from rung.models.policy import Policy
from rung.objectives.protocol import Objective
from rung.planning.architecture import ModelShape
from rung.planning.method_cost import layer_bytes_per_token
from rung.training.step import accumulate
from rung.types import Example, PackedBatch

LONGEST_BYTES = 4 * 2**30
"""What a single document may hold on a processor; one that needs more has its first layers computed again."""
CANDIDATES = (256, 512, 768, 1024, 1536, 2048)
NEARLY_AS_FAST = 1.03
"""A larger micro-batch holds more memory: it must be this much faster to be taken."""


def longest_document_bytes(device: torch.device) -> int:
    """What the activations of one document may hold: half of a graphics card's memory (not measured)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 2
    return LONGEST_BYTES


def layers_to_recompute(shape: ModelShape, tokens: int, *, lowest: int = 0, limit: int = LONGEST_BYTES) -> range:
    """Which layers a document of this many tokens must compute again so that what it keeps fits into `limit` bytes.

    Layers below `lowest` do not move and keep nothing. A layer computed again keeps its input: 4 H bytes a token.
    """
    moving, kept, each = shape.layers - lowest, 4 * shape.width, layer_bytes_per_token(shape)
    over = tokens * moving * each - limit
    count = 0 if over <= 0 else min(moving, -(-over // (tokens * (each - kept))))
    return range(lowest, lowest + count)


def measure_micro_batch_tokens(
    policy: Policy,
    objective: Objective,
    examples: Sequence[Example],
    rows: Callable[[Sequence[Example], int], Sequence[PackedBatch]],
) -> int:
    """The smallest of the candidate budgets that is nearly as fast as the fastest, measured on these documents.

    `rows` packs documents within a budget as the run will. Each budget is timed twice on the same documents, in train
    mode, and the better time counts. Gradients are thrown away; generators are left as they were.
    """
    total, chosen = 0, list[Example]()
    for example in examples:
        if total >= CANDIDATES[-1] and (example.row < 0 or example.row != chosen[-1].row):
            break
        chosen.append(example)
        total += len(example)
    seconds = {}
    policy.model.train()
    for budget in CANDIDATES:
        window = rows(chosen, budget)
        seconds[budget] = min(_timed(policy, objective, window) for _ in range(2))
        if budget >= total:  # more would be the same
            break
    policy.model.eval()
    policy.model.zero_grad(set_to_none=True)
    fastest = min(seconds.values())
    return next(budget for budget, taken in seconds.items() if taken <= NEARLY_AS_FAST * fastest)


def try_longest(
    policy: Policy,
    method: Method,
    objective: Objective,
    row: Sequence[Example],
    rows: Callable[[Sequence[Example], int], Sequence[PackedBatch]],
    budget: int,
) -> float:
    """Seconds that the longest row of a run takes, there and back: what does not fit is known before the first step.

    Nothing is left of it: no gradient, no number drawn, nothing seen or counted. Raises `PlanError` where memory ends.
    """
    tokens, kept = max(map(len, row)), method.state()
    policy.model.train()
    try:
        return _timed(policy, objective, rows(row, budget))
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise PlanError(
            "the longest row of the data does not fit into memory",
            where=str(row[0].source),
            given=f"{tokens:,} tokens: {str(error).splitlines()[0]}",
            hint="set data.max_length with data.overflow, or take a method that moves less",
        ) from error
    finally:
        policy.model.eval()
        policy.model.zero_grad(set_to_none=True)
        method.load_state(kept)
        objective.take_metrics()


def _timed(policy: Policy, objective: Objective, window: Sequence[PackedBatch]) -> float:
    started = time.perf_counter()
    with torch.random.fork_rng():
        accumulate(policy, objective, window)
    return time.perf_counter() - started
