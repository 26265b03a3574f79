"""Data-parallel training: torchrun starts the processes, torch.distributed adds their gradients.

Every rank holds the model, replicated or sharded (`training/fsdp.py`), and takes its share of the rows of each step.
Losses and gradients are sums divided by the count of the whole step, so the sum over ranks equals the value of a single
process; nothing is averaged. Metrics travel as JSON, which is slower than tensors and needs no layout to agree on.
`World` is the only access to collectives; a world of one process makes each of them the identity.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, groupby
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

from rung.console import console
from rung.errors import CheckpointError, GateError, PlanError, RungError
from rung.types import Example

BUCKET_ELEMENTS = 2**25
"""Tensor elements added up in one all-reduce: few messages, and a copy of at most this many elements."""
PEER_TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for the other ranks, for example while rank 0 prepares the data (`rank0_first`)."""
T = TypeVar("T")


class PeerProcessError(RungError):
    """Another process of the run failed; its own message gives the cause."""

    # the user has to act on another message and rerun, as after a checkpoint error
    exit_code = CheckpointError.exit_code


@dataclass(frozen=True)
class World:
    """The ranks of a run as seen by one of them. With one process every method is the identity."""

    rank: int = 0
    size: int = 1
    sharded: bool = False
    """Whether layers are sharded, so that all ranks must run the same number of forward and backward passes."""
    device: torch.device = torch.device("cpu")

    @property
    def is_rank0(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    def split_examples(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The share of this rank in a step: token counts are about equal, and rows of several documents stay whole."""
        if self.size == 1:
            return examples
        # a document without a row (-1) gets a key of its own, so that `groupby` does not join it with its neighbour
        row_keys = [e.row if e.row >= 0 else -1 - i for i, e in enumerate(examples)]
        indices = range(len(examples))
        rows = [[examples[i] for i in group] for _, group in groupby(indices, key=row_keys.__getitem__)]
        lengths = [sum(map(len, row)) for row in rows]
        loads = [(0, rank) for rank in range(self.size)]
        assigned_rows: list[int] = []
        # longest first, each to the least loaded rank; ties by index, so that all ranks compute the same assignment
        for i in sorted(range(len(rows)), key=lambda i: (-lengths[i], i)):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + lengths[i], rank))
            if rank == self.rank:
                assigned_rows.append(i)
        return [e for i in sorted(assigned_rows) for e in rows[i]]

    def share_of_rank(self, rows: Sequence[T]) -> Sequence[T]:
        """The rows of this rank when they are dealt out in turn; used for validation rows."""
        return rows if self.size == 1 else [rows[i] for i in range(self.rank, len(rows), self.size)]

    def seed_dropout(self, seed: int, step: int) -> None:
        """Give each rank its own dropout stream, a function of seed, step and rank.

        A single process keeps its running generator, whose state a checkpoint holds.
        """
        if self.size > 1:
            # 8 is the number of this random stream; rollouts use 4 to 6 with the same seed
            torch.manual_seed(int(np.random.SeedSequence([seed, 8, step, self.rank]).generate_state(1)[0]))

    def missing_batches(self, batches: int) -> int:
        """Filler batches that this rank computes so that all ranks run equally many; 0 unless the model is sharded."""
        return max(self.gather(batches)) - batches if self.sharded else 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, for any JSON value. Floats arrive exactly."""
        if self.size == 1:
            return [value]
        # JSON, not all_gather_object: nothing is pickled (a test forbids it), and repr of a float is exact
        # in the host's memory, so that gloo carries it: NCCL would wait for the card twice, and a peer that is lost
        # raises nothing there
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _translating_peer_errors():
            distributed.all_gather(lengths, torch.tensor([len(payload)]))
        # all_gather takes tensors of one size: pad to the longest message
        longest = max(int(length) for length in lengths)
        padded = torch.nn.functional.pad(payload, (0, longest - len(payload)))
        buffers = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        with _translating_peer_errors():
            distributed.all_gather(buffers, padded)
        messages = (buffer[: int(length)] for buffer, length in zip(buffers, lengths, strict=True))
        return [json.loads(bytes(message.tolist())) for message in messages]

    def sum_values(self, values: Sequence[float]) -> list[float]:
        """Elementwise sums over all ranks, added in rank order: every rank gets the same bits."""
        return [sum(by_rank) for by_rank in zip(*self.gather(list(values)), strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.any_each(flag)[0]

    def any_each(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank: one exchange for all of them."""
        return [any(by_rank) for by_rank in zip(*self.gather(list(flags)), strict=True)]

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all ranks, in place."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            with _translating_peer_errors():
                distributed.all_reduce(flat)
            for t, total in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                t.copy_(total.view_as(t))

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over ranks. A parameter without a gradient on all ranks keeps None, so it does not decay."""
        if self.size == 1:
            return
        # in the host's memory: the counts are read at once
        gradient_counts = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        self.sum_tensors([gradient_counts])
        with_gradient = [p for p, count in zip(parameters, gradient_counts.tolist(), strict=True) if count]
        for p in with_gradient:
            if p.grad is None:  # all ranks must send the same tensors
                p.grad = torch.zeros_like(p)
        # a dict keeps the order of first occurrence; a set could order the messages differently on each rank
        for dtype in {p.dtype: None for p in with_gradient}:
            self.sum_tensors([p.grad for p in with_gradient if p.dtype == dtype and p.grad is not None])

    def gather_metrics(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Batch metrics of all ranks, concatenated, for the log entry of the step."""
        if self.size == 1:
            return batches
        local_metrics = [{name: values.cpu().double().tolist() for name, values in batch.items()} for batch in batches]
        metrics: dict[str, list[float]] = {}
        for batch in chain.from_iterable(self.gather(local_metrics)):
            for name, values in batch.items():
                metrics.setdefault(name, []).extend(values)
        return [{name: torch.tensor(v, dtype=torch.float64) for name, v in metrics.items()}] if metrics else []

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)

    def on_rank0(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and return its JSON result on all ranks. A `RungError` of rank 0 ends the others too."""
        if self.size == 1:
            return work()
        try:
            message: Any = {"value": work()} if self.is_rank0 else None
        except RungError as error:
            # the other ranks wait in the gather below: without this message they would wait until the timeout
            self.gather({"error": error.summary})
            raise
        message = self.gather(message)[0]
        if "error" in message:
            raise PeerProcessError(f"the first process refused: {message['error']}")
        return message["value"]

    def rank0_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 first and then on the others, for example to fill a cache that they read."""
        if not self.is_rank0:
            self.barrier()
        result = work()
        if self.is_rank0:
            self.barrier()
        return result

    def assert_equal(self, values: Mapping[str, Any]) -> None:
        """Raise `GateError` where a named value differs between rank 0 and another rank."""
        values_by_rank = self.gather(dict(values))
        for rank, rank_values in enumerate(values_by_rank):
            if names := [name for name, value in values_by_rank[0].items() if rank_values.get(name) != value]:
                summary = f"processes 0 and {rank} do not hold the same: {', '.join(names[:3])}"
                raise GateError(summary, where="WORLD_SIZE", given=rank_values.get(names[0]))


SINGLE_PROCESS = World()


@contextmanager
def join_process_group() -> Iterator[World]:
    """The world that the launcher's environment variables describe; one process without a launcher.

    Raises `PlanError` where the process group does not have the announced size.
    """
    announced_size = os.environ.get("WORLD_SIZE") or "1"
    if announced_size == "1":
        yield SINGLE_PROCESS
        return
    if missing_names := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        what = "several processes are announced, but not where they find one another"
        hint = "start them with: torchrun --nproc-per-node N -m rung train CONFIG"
        raise PlanError(what, where="WORLD_SIZE", given=f"{announced_size}, no {', '.join(missing_names)}", hint=hint)
    rank, size, local_rank = (int(os.environ.get(name, "0") or 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    console.quiet = rank > 0  # one rank prints
    with _translating_peer_errors():
        distributed.init_process_group(**_backends(device), timeout=PEER_TIMEOUT)
    try:
        world = World(rank, distributed.get_world_size(), device=device)
        # a wrong group would train on the wrong share of the rows and still look healthy
        ranks = [entry["rank"] for entry in world.gather({"rank": rank})]
        if world.size != size or ranks != list(range(size)):
            what = "the processes are not those that the launcher announced"
            raise PlanError(what, where="WORLD_SIZE", given=f"{world.size}: {ranks}", allowed=announced_size)
        yield world
    except RuntimeError as error:  # FSDP gathers layers itself, outside `_translating_peer_errors`
        if isinstance(error, RungError) or not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            raise  # not of the process group: a bug or an out-of-memory error keeps its traceback
        raise _peer_error(error) from error
    finally:
        console.quiet = False
        distributed.destroy_process_group()


def _backends(device: torch.device) -> dict[str, Any]:
    """Gloo carries what is in the host's memory, NCCL what is on cards."""
    return {"backend": "cpu:gloo,cuda:nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    element_count = 0
    for tensor in tensors:
        if bucket and element_count + tensor.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, element_count = [], 0
        bucket.append(tensor)
        element_count += tensor.numel()
    if bucket:
        yield bucket


@contextmanager
def _translating_peer_errors() -> Iterator[None]:
    """Turn a `RuntimeError` of a collective into a `PeerProcessError`."""
    try:
        yield
    except RuntimeError as error:
        raise _peer_error(error) from error


def _peer_error(error: RuntimeError) -> PeerProcessError:
    what = f"another process of this run has ended: {str(error).splitlines()[0]}"
    return PeerProcessError(what, hint="look for its own message; start all again with --resume")
