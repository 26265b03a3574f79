"""The one thread that computes: requests join the batch of their model, and every step gives each of them a token.

It should be the thread that loaded the models: OpenMP keeps a team of threads for every thread that computes, and with
two teams on one processor's cores they sleep at every wait (54 ms a step in place of 40; `models/threads.py`).

Requests wait in a queue of bounded length, since a client that waits for minutes has given up; a full queue refuses.
Models take turns, a step each. A client that leaves frees its rows at the next step. Results go to callbacks, which the
engine calls in its own thread: they must not block. `serving/app.py` submits requests.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from rung.console import print_status
from rung.models.slot_batch import DrawnToken, RowSampling, SlotBatch, SlotPrompt, SlotRow
from rung.serving.answers import AnswerText, FinishReason
from rung.serving.catalog import ServedModel

T = TypeVar("T")


class QueueFullError(Exception):
    """As many requests wait as may wait."""


class StoppedError(Exception):
    """The server is shutting down."""


@dataclass(frozen=True)
class Chunk:
    """What an answer of a request has grown by; `error` ends the request."""

    index: int
    text: str = ""
    drawn: DrawnToken | None = None
    finish_reason: FinishReason | None = None
    """Of the last chunk of an answer."""
    is_last: bool = False
    """Whether nothing of the request follows."""
    error: str | None = None


@dataclass(eq=False)
class Job:
    """A request: answers to one prompt, something to compute before them, or that alone."""

    model: str
    prompt: Sequence[int]
    samplings: Sequence[RowSampling]
    answers: Sequence[AnswerText]
    on_chunk: Callable[[Chunk], None]
    compute: Callable[[], None] | None = None
    """Called in the engine's thread before the answers begin, for what needs the model."""
    submitted: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False
    running: int = 0
    """Answers that are being generated."""

    @property
    def slot_prompt(self) -> SlotPrompt:
        """The prompt as a batch takes it."""
        return SlotPrompt(self.prompt, self.samplings)


@dataclass
class Counters:
    """What the server has done, for /metrics."""

    requests: int = 0
    refused: int = 0
    cancelled: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    wait_seconds: float = 0.0
    """Time of all requests in the queue."""


class Engine:
    """Runs the models of a server in one thread of its own."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        max_rows: int,
        max_waiting: int,
        cache_bytes: int,
        beginnings_bytes: int,
    ) -> None:
        self.models, self.max_rows, self.max_waiting, self.cache_bytes = models, max_rows, max_waiting, cache_bytes
        self.batches = {
            name: SlotBatch(m.model.policy, beginnings_bytes=beginnings_bytes // max(1, len(models)))
            for name, m in models.items()
        }
        self.counters = Counters()
        self.waiting: deque[Job] = deque()
        self._running: dict[SlotRow, tuple[Job, int]] = {}
        self._wake = threading.Condition()
        self._is_stopping, self._is_running = False, False

    def compute_during(self, work: Callable[[], T]) -> T:
        """Compute in this thread while `work` runs in another, and until what was submitted is finished.

        Returns the result of `work`. Requests may be submitted from its start on; at its end new ones are refused.
        """
        done = Future[T]()

        def call() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
            finally:
                self._refuse_more()

        self._is_running = True
        threading.Thread(target=call, name="requests", daemon=True).start()
        self._run()
        return done.result()

    def _refuse_more(self) -> None:
        with self._wake:
            self._is_stopping = True
            self._wake.notify()

    @property
    def active_rows(self) -> int:
        """Answers that are being generated."""
        return len(self._running)

    @property
    def is_alive(self) -> bool:
        """Whether a thread computes."""
        return self._is_running

    def submit(self, job: Job) -> None:
        """Queue a request. Raises `QueueFullError` or `StoppedError`."""
        with self._wake:
            if self._is_stopping or not self._is_running:
                raise StoppedError
            if len(self.waiting) >= self.max_waiting:
                self.counters.refused += 1
                raise QueueFullError
            self.counters.requests += 1
            self.waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Drop a request whose client has left; of one that has ended nothing changes."""
        with self._wake:
            job.is_cancelled = True
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_cancelled()
                self._admit()
                for name, batch in self.batches.items():
                    if batch.rows:
                        self._step(name, batch)
        except BaseException as error:
            # nobody else would wake the handlers that wait
            with self._wake:
                jobs = [*self.waiting, *(job for job, _ in self._running.values())]
                self.waiting.clear()
                self._running.clear()
                self._is_running = False
            for job in dict.fromkeys(jobs):
                self._fail(job, error)
            raise
        self._is_running = False

    def _wait_for_work(self) -> bool:
        """Wait for requests; False once the server stops and nothing is left."""
        with self._wake:
            while not (self.waiting or self._running or self._is_stopping):
                self._wake.wait()
            return bool(self.waiting or self._running)

    def _drop_cancelled(self) -> None:
        with self._wake:
            waiting = [job for job in self.waiting if job.is_cancelled]
            for job in waiting:
                self.waiting.remove(job)
        rows = [(row, job) for row, (job, _) in self._running.items() if job.is_cancelled]
        for row, job in rows:
            del self._running[row]
            self.batches[job.model].leave(row)
        self.counters.cancelled += len({id(job) for job in (*waiting, *(job for _, job in rows))})

    def _admit(self) -> None:
        """Let requests join in their order while there are rows and memory for them."""
        while jobs := self._next_jobs():
            for job in jobs:
                self.counters.wait_seconds += time.monotonic() - job.submitted
                self.counters.prompt_tokens += len(job.prompt)
            answering = [job for job in jobs if job.compute is None]
            for name in dict.fromkeys(job.model for job in answering):
                self._join([job for job in answering if job.model == name])
            if len(answering) < len(jobs):  # a long one stops everybody: the others go on between two of them
                self._join(jobs[-1:])
                return

    def _next_jobs(self) -> list[Job]:
        """The requests that join now: their prompts are encoded together. One with something to compute is the last."""
        jobs: list[Job] = []
        with self._wake:
            while self.waiting and self._has_room(self.waiting[0], jobs):
                job = self.waiting.popleft()
                if job.is_cancelled:
                    self.counters.cancelled += 1
                    continue
                jobs.append(job)
                if job.compute is not None:
                    break
        return jobs

    def _has_room(self, job: Job, others: Sequence[Job]) -> bool:
        if not (self._running or others) or not job.samplings:
            return True
        answering = [other for other in (*others, job) if other.samplings]
        rows = len(self._running) + sum(len(other.samplings) for other in answering)
        states = sum(
            batch.cache_bytes([other.slot_prompt for other in answering if other.model == name])
            for name, batch in self.batches.items()
        )
        return rows <= self.max_rows and states <= self.cache_bytes

    def _join(self, jobs: Sequence[Job]) -> None:
        """Let requests to one model join; where one of them fails, the others join without it."""
        try:
            for job in jobs:
                if job.compute is not None:
                    job.compute()
            writing = [job for job in jobs if job.samplings]
            joined = self.batches[jobs[0].model].join_all([job.slot_prompt for job in writing]) if writing else []
        except Exception as error:  # one request must not end the others
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            for job in jobs:
                self._join([job])
            return
        for job in jobs:
            if not job.samplings:
                job.on_chunk(Chunk(0, is_last=True))
        for job, rows in zip(writing, joined, strict=True):
            job.running = len(rows)
            self._running |= {row: (job, index) for index, row in enumerate(rows)}

    def _step(self, name: str, batch: SlotBatch) -> None:
        try:
            for row, token in batch.step():
                self._deliver(batch, row, token)
        except Exception as error:
            failed = {row: job for row, (job, _) in self._running.items() if job.model == name}
            for row in failed:
                del self._running[row]
            batch.clear()
            for job in dict.fromkeys(failed.values()):
                self._fail(job, error)

    def _deliver(self, batch: SlotBatch, row: SlotRow, token: DrawnToken) -> None:
        job, index = self._running[row]
        answer = job.answers[index]
        text, reason = answer.add(token), answer.finish_reason
        self.counters.generated_tokens += 1
        if reason is not None:
            batch.leave(row)
            del self._running[row]
            job.running -= 1
            self.counters.answers += 1
        job.on_chunk(Chunk(index, text, token, reason, is_last=not job.running))

    def _fail(self, job: Job, error: BaseException) -> None:
        # the message may hold the prompt: the log gets the kind of the error alone
        print_status(f"a request failed: {type(error).__name__}")
        job.is_cancelled = True
        job.on_chunk(Chunk(0, error=f"the model failed: {type(error).__name__}", is_last=True))
