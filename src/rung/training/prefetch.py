"""Packs the batches of the next step in a thread while a card computes the current one.

Packing takes the host some milliseconds a step, in which a card would wait. The batches of a step are a function of its
number alone, so the thread changes nothing but time: each step gets the batches that it would have packed itself. Two
steps of batches are in memory at once, which are ids and positions. A processor packs in the thread that computes,
where a second one would take time from the first. `Trainer` uses it for documents of the data; those of a rollout do
not exist before their step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from rung.types import PackedBatch


class BatchPrefetcher:
    """Serves the batches of steps in order; `pack_step` makes those of a step and runs in one other thread."""

    def __init__(self, pack_step: Callable[[int], Sequence[PackedBatch]], final_step: int) -> None:
        self.pack_step, self.final_step = pack_step, final_step
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="packing")
        self.pending: tuple[int, Future[Sequence[PackedBatch]]] | None = None

    def take(self, step: int) -> list[PackedBatch]:
        """The batches of a step; those of the next one are packed from now on. Raises what packing them raised."""
        if self.pending is None or self.pending[0] != step:
            self.pending = self._submit(step)
        batches = self.pending[1].result()
        self.pending = self._submit(step + 1) if step + 1 < self.final_step else None
        return list(batches)

    def close(self) -> None:
        """End the thread; batches that nobody took are dropped."""
        self.executor.shutdown(cancel_futures=True)

    def _submit(self, step: int) -> tuple[int, Future[Sequence[PackedBatch]]]:
        return step, self.executor.submit(self.pack_step, step)
