"""The gradient of one optimizer step: count the whole window first, then accumulate sums divided by that count.

Averaging the means of micro-batches would weight the tokens of sparse micro-batches more (transformers#34191). The
price is a pass over the window for counting, before the first forward pass. `Trainer` calls `accumulate` and
`mean_loss`; methods calibrate and gates score with the other functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from rung.errors import DataError
from rung.models.packing import pack
from rung.models.policy import Policy
from rung.objectives.protocol import Objective
from rung.training.distributed import SINGLE_PROCESS, World
from rung.types import Counts, Example, PackedBatch, Unit

MakeBatch = Callable[[], PackedBatch]


def count_window(objective: Objective, window: Iterable[PackedBatch]) -> Counts:
    """The counts that the losses of a window are divided by."""
    return reduce(Counts.__add__, (objective.count(batch) for batch in window), Counts())


def accumulate(
    policy: Policy,
    objective: Objective,
    window: Sequence[PackedBatch],
    world: World = SINGLE_PROCESS,
    make_filler: MakeBatch | None = None,
) -> Tensor:
    """Add the gradient of (sum / count of the window) to .grad; return the loss in nats per unit, a scalar.

    With several ranks, count and loss are those of all ranks, and the gradient is this rank's addend of the sum.
    `make_filler` returns a batch to compute while other ranks have more batches. Raises `DataError` where nothing in
    the window is supervised.
    """
    totals = count_window(objective, window)
    if world.size > 1:
        totals = Counts(*world.sum_values([totals.tokens, totals.sequences, totals.pairs]))
    if totals.tokens <= 0 and totals.pairs <= 0:
        first_source = window[0].documents[0].source if window and window[0].documents else None
        raise DataError("no supervised token in this step", where=str(first_source), hint="run: rung data check")
    shares, filler_count = [], world.missing_batches(len(window))
    # nested, so that every policy holds keys and values of the shared prefix while a batch is computed
    batches: Iterable[PackedBatch] = policy.iterate_batches(window)
    for partner in objective.partner_policies():
        batches = partner.iterate_batches(batches)
    for batch in batches:
        terms = [*objective.loss(policy, batch), *policy.method.penalty(batch)]
        loss = torch.stack([term.total / totals[term.unit] for term in terms]).sum()
        # one backward pass per batch: the activations of one batch are in memory at a time
        loss.backward()  # type: ignore[no-untyped-call]
        shares.append(loss.detach())  # no .item(): it would wait for the device
    _compute_filler_batches(policy, objective, filler_count, make_filler)
    loss = torch.stack(shares).sum() if shares else torch.zeros((), device=policy.device)
    if world.size > 1:
        loss = torch.tensor(world.sum_values([float(loss)])[0], device=policy.device)
    return loss


def _compute_filler_batches(policy: Policy, objective: Objective, count: int, make_filler: MakeBatch | None) -> None:
    """Compute batches without effect: sharded layers are gathered by all ranks at once, so all run equally many."""
    if not count or make_filler is None:
        return
    metrics = list(objective.batch_metrics)
    for _ in range(count):
        for batch in policy.iterate_batches([make_filler()]):
            # times 0: a backward pass with its collectives, but no gradient
            loss = torch.stack([term.total for term in objective.loss(policy, batch)]).sum() * 0.0
            if torch.is_grad_enabled():
                loss.backward()  # type: ignore[no-untyped-call]
    objective.batch_metrics = metrics


@torch.no_grad()
def mean_loss(
    policy: Policy,
    objective: Objective,
    batches: Iterable[PackedBatch],
    world: World = SINGLE_PROCESS,
    make_filler: MakeBatch | None = None,
) -> float:
    """Mean loss over a data set in nats per unit; with several ranks over the sets of all.

    Sums and counts are added and divided once, so the result does not depend on the batches.
    """
    totals: dict[Unit, float] = {}
    counts, filler_count = Counts(), 0
    if world.sharded:  # the number of batches must be known to compute the missing ones
        batches = list(batches)
        filler_count = world.missing_batches(len(batches))
    for batch in policy.iterate_batches(batches):
        counts = counts + objective.count(batch)
        for term in objective.loss(policy, batch):
            totals[term.unit] = totals.get(term.unit, 0.0) + float(term.total)
    _compute_filler_batches(policy, objective, filler_count, make_filler)
    if world.size > 1:
        by_rank = world.gather([totals, [counts.tokens, counts.sequences, counts.pairs]])
        units = {unit for rank_values, _ in by_rank for unit in rank_values}
        # sorted: every rank adds in the same order
        totals = {unit: sum(rank_values.get(unit, 0.0) for rank_values, _ in by_rank) for unit in sorted(units)}
        counts = reduce(Counts.__add__, (Counts(*rank_values) for _, rank_values in by_rank))
    return sum(total / counts[unit] if counts[unit] else float("nan") for unit, total in totals.items())


class CalibrationBatch:
    """Documents for calibrating a method, packed within the micro-batch budget, so that memory stays bounded."""

    def __init__(self, policy: Policy, objective: Objective, examples: Sequence[Example], budget: int) -> None:
        self.policy, self.objective = policy, objective
        # prefixes are not shared: activation statistics must count every token of every document
        self.batches = pack(examples, budget, share_prefixes=False, device=policy.device, boundary=policy.rope_boundary)
        self.tokenizer = policy.base.tokenizer
        self.tokens = sum(len(batch.ids) for batch in self.batches)

    def run_forward(self) -> None:
        """Run all documents through the layers once, without gradient, for hooks that collect statistics."""
        with torch.no_grad():
            for batch in self.policy.iterate_batches(self.batches):
                self.policy.hidden_states(batch)  # without the head: no method calibrates it

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The gradient of one step over all documents. Gradients of the run itself are zeroed before and after."""
        self.policy.model.zero_grad(set_to_none=True)
        accumulate(self.policy, self.objective, self.batches)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.policy.model.zero_grad(set_to_none=True)
        return gradients

    def keys_values(self, ids: Sequence[int]) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Keys and values of these tokens by layer, from the base with the method disabled."""
        row = torch.tensor(list(ids), dtype=torch.long, device=self.policy.device)
        with torch.no_grad(), self.policy.method.disabled():
            return self.policy.prefix_kv(row)
