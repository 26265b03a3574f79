"""Several processes on one run: torchrun starts them, torch.distributed carries the sums.

Every process holds the model, whole or in parts (`training/fsdp.py`), and takes its share of each step's rows. Losses
and gradients are sums over the count of the whole step, so adding them up over the processes gives those of one
process: nothing is averaged.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

from rung.console import console
from rung.errors import CheckpointError, GateError, PlanError, RungError
from rung.types import Example

BUCKET = 2**25
"""Numbers that are added up over the processes in one message."""
PEER_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others."""
T = TypeVar("T")


class PeerProcessError(RungError):
    """Another process of the run ended, and said why."""

    exit_code = CheckpointError.exit_code


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them. Alone, everything here is the identity."""

    rank: int = 0
    size: int = 1
    sharded: bool = False
    """Whether every process must run as many forwards as the others."""
    device: torch.device = torch.device("cpu")

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def split_examples(self, examples: Sequence[Example]) -> Sequence[Example]:
        """What of a step is for this process: about as many tokens as the others', rows of several documents whole."""
        if self.size == 1:
            return examples
        numbers = [e.row if e.row >= 0 else -1 - i for i, e in enumerate(examples)]
        rows = [[examples[i] for i in own] for _, own in groupby(range(len(numbers)), key=numbers.__getitem__)]
        lengths = [sum(map(len, row)) for row in rows]
        loads = [(0, rank) for rank in range(self.size)]
        mine: list[int] = []
        for i in sorted(range(len(rows)), key=lambda i: (-lengths[i], i)):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + lengths[i], rank))
            if rank == self.rank:
                mine.append(i)
        return [e for i in sorted(mine) for e in rows[i]]

    def every_nth(self, rows: Sequence[T]) -> Sequence[T]:
        """Every size-th of some rows."""
        return rows if self.size == 1 else [rows[i] for i in range(self.rank, len(rows), self.size)]

    def seed_dropout(self, seed: int, step: int) -> None:
        """Of several processes each drops something else, and a resume the same again; one alone goes on drawing."""
        if self.size > 1:
            torch.manual_seed(int(np.random.SeedSequence([seed, 8, step, self.rank]).generate_state(1)[0]))

    def missing_batches(self, batches: int) -> int:
        """How many batches a process computes more than it has, so that all compute as many."""
        return max(self.gather(batches)) - batches if self.sharded else 0

    def gather(self, value: Any) -> list[Any]:
        """What each process has to say, by rank: anything that JSON can hold. Numbers arrive as they were."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        with _translating_peer_errors():
            distributed.all_gather(lengths, torch.tensor([len(own)], device=self.device))
        longest = max(int(n) for n in lengths)
        padded = torch.nn.functional.pad(own, (0, longest - len(own)))
        found = [torch.empty(longest, dtype=torch.uint8, device=self.device) for _ in range(self.size)]
        with _translating_peer_errors():
            distributed.all_gather(found, padded)
        return [json.loads(bytes(f[: int(n)].tolist())) for f, n in zip(found, lengths, strict=True)]

    def sum_values(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes, in the order of their ranks."""
        return [sum(own) for own in zip(*self.gather(list(values)), strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return any(self.gather(flag))

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type by their sums over all processes."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            with _translating_peer_errors():
                distributed.all_reduce(flat)
            for t, own in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                t.copy_(own.view_as(t))

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """The gradient of the whole step; what no process has one for keeps none, and so does not decay."""
        if self.size == 1:
            return
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=self.device)
        self.sum_tensors([has])
        reached = [p for p, count in zip(parameters, has.tolist(), strict=True) if count]
        for p in reached:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for dtype in {p.dtype: None for p in reached}:
            self.sum_tensors([p.grad for p in reached if p.dtype == dtype and p.grad is not None])

    def gather_metrics(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """What all processes saw of a step, for its report."""
        if self.size == 1:
            return batches
        named: dict[str, list[float]] = {}
        for batch in batches:
            for name, values in batch.items():
                named.setdefault(name, []).extend(values.double().tolist())
        found: dict[str, list[float]] = {}
        for own in self.gather(named):
            for name, values in own.items():
                found.setdefault(name, []).extend(values)
        return [{name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}] if found else []

    def barrier(self) -> None:
        """For all others."""
        self.gather(None)

    def on_rank0(self, work: Callable[[], Any]) -> Any:
        """Let the first process do something, whose result, which JSON can hold, all want; it may refuse."""
        if self.size == 1:
            return work()
        told: Any = None
        try:
            told = {"value": work()} if self.is_rank0 else None
        except RungError as error:
            self.gather({"error": error.summary})
            raise
        told = self.gather(told)[0]
        if "error" in told:
            raise PeerProcessError(f"the first process refused: {told['error']}")
        return told["value"]

    def rank0_first(self, work: Callable[[], T]) -> T:
        """Let the first process do something before the others: they find it done."""
        if not self.is_rank0:
            self.barrier()
        found = work()
        if self.is_rank0:
            self.barrier()
        return found

    def assert_equal(self, said: Mapping[str, Any]) -> None:
        """Raise `GateError` where the processes do not hold the same."""
        everyone = self.gather(dict(said))
        for rank, other in enumerate(everyone):
            if differing := [name for name, value in everyone[0].items() if other.get(name) != value]:
                what = f"processes 0 and {rank} do not hold the same: {', '.join(differing[:3])}"
                raise GateError(what, where="WORLD_SIZE", given=other.get(differing[0]))


SINGLE_PROCESS = World()


@contextmanager
def join_process_group() -> Iterator[World]:
    """The processes that a launcher started, by its environment; alone where there was none.

    Raises `PlanError` where they are not as many as the launcher said.
    """
    said = os.environ.get("WORLD_SIZE") or "1"
    if said == "1":
        yield SINGLE_PROCESS
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        what = "several processes are announced, but not where they find one another"
        hint = "start them with: torchrun --nproc-per-node N -m rung train CONFIG"
        raise PlanError(what, where="WORLD_SIZE", given=f"{said}, no {', '.join(missing)}", hint=hint)
    rank, size, local = (int(os.environ.get(name, "0") or 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    console.quiet = rank > 0
    with _translating_peer_errors():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PEER_TIMEOUT)
    try:
        world = World(rank, distributed.get_world_size(), device=device)
        ranks = [own["rank"] for own in world.gather({"rank": rank})]
        if world.size != size or ranks != list(range(size)):
            what = "the processes are not those that the launcher announced"
            raise PlanError(what, where="WORLD_SIZE", given=f"{world.size}: {ranks}", allowed=said)
        yield world
    except RuntimeError as error:  # of layers in parts, which are gathered by torch itself
        if isinstance(error, RungError) or not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            raise
        raise _peer_error(error) from error
    finally:
        console.quiet = False
        distributed.destroy_process_group()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    count = 0
    for tensor in tensors:
        if bucket and count + tensor.numel() > BUCKET:
            yield bucket
            bucket, count = [], 0
        bucket.append(tensor)
        count += tensor.numel()
    if bucket:
        yield bucket


@contextmanager
def _translating_peer_errors() -> Iterator[None]:
    """What torch says of a process that is gone, in our words."""
    try:
        yield
    except RuntimeError as error:
        raise _peer_error(error) from error


def _peer_error(error: RuntimeError) -> PeerProcessError:
    what = f"another process of this run has ended: {str(error).splitlines()[0]}"
    return PeerProcessError(what, hint="look for its own message; start all again with --resume")
