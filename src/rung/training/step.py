"""One optimizer step's gradient: count first, then accumulate sums divided by the count of the whole window.

Averaging the means of micro-batches would weight the tokens of sparse micro-batches more (transformers#34191).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor, nn

from rung.errors import DataError
from rung.models.policy import Policy
from rung.models.tree_attention import has_flat_kernel
from rung.objectives.protocol import Objective
from rung.training.distributed import SINGLE_PROCESS, World
from rung.training.packing import pack
from rung.types import Counts, Example, PackedBatch, Unit

T = TypeVar("T")


def count_window(objective: Objective, window: Iterable[PackedBatch]) -> Counts:
    """The divisor of a window."""
    return reduce(Counts.__add__, (objective.count(batch) for batch in window), Counts())


def accumulate(
    policy: Policy,
    objective: Objective,
    window: Sequence[PackedBatch],
    world: World = SINGLE_PROCESS,
    pace: Callable[[], PackedBatch] | None = None,
) -> Tensor:
    """Fill .grad with the gradient of (sum / count of the window); return the loss in nats per unit, a scalar.

    Of several processes each has rows of its own in the window: the count and the loss are those of all, the gradient
    is this one's share of the sum. `pace` gives something to compute where the others have more batches and wait.
    Raises `DataError` when nothing in the window is supervised.
    """
    own = count_window(objective, window)
    totals = own if world.size == 1 else Counts(*world.sum_values([own.tokens, own.sequences, own.pairs]))
    if totals.tokens <= 0 and totals.pairs <= 0:
        where = window[0].documents[0].source if window and window[0].documents else None
        raise DataError("no supervised token in this step", where=str(where), hint="run: rung data check")
    shares, behind = [], world.missing_batches(len(window))
    batches: Iterable[PackedBatch] = policy.iterate_batches(window)
    for partner in objective.partner_policies():
        batches = partner.iterate_batches(batches)
    for batch in batches:
        terms = [*objective.loss(policy, batch), *policy.method.penalty(batch)]
        loss = torch.stack([term.total / totals[term.unit] for term in terms]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        shares.append(loss.detach())  # no .item(): it would wait for the device
    _compute_filler_batches(policy, objective, behind, pace)
    loss = torch.stack(shares).sum() if shares else torch.zeros((), device=policy.device)
    if world.size > 1:
        loss = torch.tensor(world.sum_values([float(loss)])[0], device=policy.device)
    return loss


def _compute_filler_batches(
    policy: Policy, objective: Objective, behind: int, pace: Callable[[], PackedBatch] | None
) -> None:
    """Layers in parts are gathered by all processes at once: one that has fewer batches computes some for nothing."""
    if not behind or pace is None:
        return
    seen = list(objective.batch_metrics)
    for _ in range(behind):
        for batch in policy.iterate_batches([pace()]):
            loss = torch.stack([term.total for term in objective.loss(policy, batch)]).sum() * 0.0
            if torch.is_grad_enabled():
                loss.backward()  # type: ignore[no-untyped-call]
    objective.batch_metrics = seen


@torch.no_grad()
def mean_loss(
    policy: Policy,
    objective: Objective,
    batches: Iterable[PackedBatch],
    world: World = SINGLE_PROCESS,
    pace: Callable[[], PackedBatch] | None = None,
) -> float:
    """Loss over a whole set, of several processes over the sets of all.

    Sums and counts are added and divided once, so the batches do not matter.
    """
    totals: dict[Unit, float] = {}
    counts, behind = Counts(), 0
    if world.sharded:
        batches = list(batches)
        behind = world.missing_batches(len(batches))
    for batch in policy.iterate_batches(batches):
        counts = counts + objective.count(batch)
        for term in objective.loss(policy, batch):
            totals[term.unit] = totals.get(term.unit, 0.0) + float(term.total)
    _compute_filler_batches(policy, objective, behind, pace)
    if world.size > 1:
        everyone = world.gather([totals, [counts.tokens, counts.sequences, counts.pairs]])
        units = {unit for own, _ in everyone for unit in own}
        totals = {unit: sum(own.get(unit, 0.0) for own, _ in everyone) for unit in sorted(units)}
        counts = reduce(Counts.__add__, (Counts(*own) for _, own in everyone))
    return sum(total / counts[unit] if counts[unit] else float("nan") for unit, total in totals.items())


@torch.no_grad()
def values_by_document(
    readers: Sequence[Policy],
    documents: Sequence[Example],
    budget: int,
    value: Callable[[PackedBatch], Iterable[T]],
) -> list[T]:
    """What `value` finds for each document of a batch, in the order of `documents`; nothing is learned from it.

    `readers` are the policies that `value` asks; `budget` is in tokens a batch, raised to the longest document.
    """
    if not documents:
        return []
    place = {id(document): i for i, document in enumerate(documents)}
    found: dict[int, T] = {}
    device = readers[0].device
    trees = not has_flat_kernel(device)  # no gradient is here that would keep copies of a prefix apart
    longest = max(budget, *map(len, documents))
    batches: Iterable[PackedBatch] = pack(documents, longest, share_prefixes=trees, device=device)
    for reader in readers:
        batches = reader.iterate_batches(batches)
    for batch in batches:
        found |= {place[id(d)]: own for d, own in zip(batch.documents, value(batch), strict=True)}
    return [found[i] for i in range(len(documents))]


class CalibrationBatch:
    """The documents, packed within the run's micro-batch budget: memory does not follow their number."""

    def __init__(self, policy: Policy, objective: Objective, examples: Sequence[Example], budget: int) -> None:
        self.policy, self.objective = policy, objective
        self.batches = pack(examples, budget, share_prefixes=False, device=policy.device)
        self.tokenizer = policy.base.tokenizer
        self.tokens = sum(len(batch.ids) for batch in self.batches)

    def run_forward(self) -> None:
        """Run them once, without gradient."""
        with torch.no_grad():
            for batch in self.policy.iterate_batches(self.batches):
                self.policy.hidden_states(batch)  # the head is no target

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The gradient of one step over all of them; parameters that a run moves are left without one."""
        self.policy.model.zero_grad(set_to_none=True)
        accumulate(self.policy, self.objective, self.batches)
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.policy.model.zero_grad(set_to_none=True)
        return found

    def keys_values(self, ids: Sequence[int]) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Keys and values of these tokens in the base, by layer."""
        row = torch.tensor(list(ids), dtype=torch.long, device=self.policy.device)
        with torch.no_grad(), self.policy.method.disabled():
            return self.policy.prefix_kv(row)
