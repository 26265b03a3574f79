"""Gates 2 and 3: what must hold before the first step, and what must have moved by the second.

Gate 1 stands in `data.tokenize`, gate 4 in `files.write_folder`, gate 5 in `runs.artifact`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from rung.console import print_status
from rung.errors import GateError
from rung.files import write_text
from rung.methods.protocol import Method, TrainableSet
from rung.models.bfloat16_weights import keeps_bfloat16_weights
from rung.models.fused_modules import original_forwards
from rung.models.generate import Sampling, generate
from rung.models.policy import Policy
from rung.training.distributed import SINGLE_PROCESS, World
from rung.training.fsdp import digests
from rung.training.packing import pack, pack_separately
from rung.training.run_folder import NOT_FINITE_FILE, Gate, Progress, RunFolder
from rung.types import Example

TOLERANCE: dict[torch.dtype, float] = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.5}
"""Largest difference of log-probabilities between two ways to compute the same thing, in nats. A wrong mask or position
moves them by whole nats; sums in another order move them by less than this on models of billions of parameters."""
SPREAD, OUTLIER, FURTHEST = 0.3, 15.0, 1.5
"""In bfloat16 rounding moves all of them, a few far: where nine tenths differ by at most SPREAD nats, one may differ by
OUTLIER times what those do, but by no more than FURTHEST. Of transformers' own forward two documents together and one
by one lie up to 0.67 nats apart on 280 tokens, nine tenths less than 0.1; a fault moves some by whole nats, or all."""


def check_trainable(method: Method, optimizer: torch.optim.Optimizer, heads: int = 0) -> Gate:
    """What the method declares is what the optimizer holds and may move. An empty set is a failure too.

    `heads` is how many numbers the objective owns besides.
    """
    declared = method.declared_parameters() + heads
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
    return _gate("step0.trainable", held == declared > 0, f"{held:,} in the optimizer", f"{declared:,} declared")


@torch.no_grad()
def check_identity(policy: Policy, method: Method, probe: Sequence[Example]) -> Gate | None:
    """With the method on, the model answers like the base. Methods that move the base are it.

    A start that is not zero and is subtracted again cancels only to rounding.
    """
    if method.artifact != "adapter" or not method.starts_as_base:
        return None
    batches = pack(probe, sum(map(len, probe)), device=policy.device)
    difference = max(float((policy.logprobs(b) - policy.base_logprobs(b)).abs().max()) for b in batches)
    limit = TOLERANCE[_dtype(policy)] * (1.0 if method.subtracts else 1e-2)  # the same sums plus zeros
    return _gate("step0.identity", difference <= limit, difference, limit)


@torch.no_grad()
def check_reference(policy: Policy, method: Method, probe: Sequence[Example]) -> Gate | None:
    """A second model that is said to be where the policy begins gives the same log-probabilities."""
    other = policy.reference
    if other is None or other.base.fingerprint != policy.base.fingerprint or not method.starts_as_base:
        return None
    batches = pack(probe, sum(map(len, probe)), device=policy.device)
    ours = torch.cat([policy.logprobs(batch) for batch in batches])
    theirs = torch.cat([policy.reference_logprobs(batch) for batch in batches])
    return _close("step0.reference", ours - theirs, policy)


@torch.no_grad()
def check_packing(policy: Policy, probe: Sequence[Example]) -> Gate:
    """Log-probabilities of packed documents, prefixes shared, equal those of each document alone."""
    packed = pack(probe, sum(map(len, probe)), device=policy.device)
    together = torch.cat([policy.logprobs(batch) for batch in packed])
    order = [replace(document, row=-1) for batch in packed for document in batch.documents]
    alone = torch.cat([policy.logprobs(batch) for batch in pack_separately(order, policy.device)])
    return _close("step0.packing", together - alone, policy)


@torch.no_grad()
def check_fused(policy: Policy, probe: Sequence[Example]) -> Gate | None:
    """Rung's own functions give what transformers' and peft's forward gives. A base held narrow has only ours."""
    if policy.base.compute_dtype is torch.float32 and keeps_bfloat16_weights(policy.model):
        return None
    batches = pack(probe, sum(map(len, probe)), device=policy.device)
    ours = torch.cat([policy.logprobs(batch) for batch in batches])
    with original_forwards(policy.model):
        theirs = torch.cat([policy.logprobs(batch) for batch in batches])
    return _close("step0.fused", ours - theirs, policy)


@torch.no_grad()
def check_decoding(policy: Policy, probe: Sequence[Example], tokens: int = 4) -> Gate:
    """Log-probabilities of a greedy answer, made token by token, equal those of the answer read in one go."""
    worst = 0.0
    for task in {e.task for e in probe}:
        own = [e for e in probe if e.task == task]
        prompts = [e.ids[: max(1, int(e.supervised.argmax()))].tolist() for e in own]
        answers = generate(policy, prompts, stop_ids=(), sampling=Sampling(tokens), task=task)
        for prompt, answer, example in zip(prompts, answers, own, strict=True):
            ids = np.array([*prompt, *answer.ids], dtype=np.int32)
            said = Example(ids, np.arange(len(ids)) >= len(prompt), example.source, task=task)
            read = policy.logprobs(pack_separately([said], policy.device)[0])
            worst = max(worst, float((read.cpu() - torch.tensor(answer.logprobs)).abs().max()))
    limit = TOLERANCE[_dtype(policy)]
    return _gate("step0.decoding", worst <= limit, worst, limit)


def frozen_digest(model: nn.Module) -> dict[str, int]:
    """Of every tensor that must not move."""
    return digests((name, p) for name, p in model.named_parameters() if not p.requires_grad)


class MovementGate:
    """Gate 3: every declared tensor received a gradient and moved its optimizer state; nothing else changed a bit."""

    def __init__(self, model: nn.Module, trainable: Mapping[str, nn.Parameter], world: World = SINGLE_PROCESS) -> None:
        self.model, self.trainable, self.world = model, trainable, world
        self.before = frozen_digest(model)
        self.chances: Counter[str] = Counter()
        """Steps in which a tensor could have moved; the first may be in vain: A stands still while B is zero."""
        self.moved: set[str] = set()
        self.gate: Gate | None = None

    def observe(
        self,
        optimizer: torch.optim.Optimizer,
        moving: TrainableSet | None = None,
        reached: Collection[str] | None = None,
    ) -> Gate | None:
        """Look at the gradients right after an optimizer step; the verdict comes once a tensor has had two chances.

        `moving` says what may move in this step, `reached` what its documents can move; None is everything.
        """
        if self.gate is not None:
            return None
        names = set(self.trainable) if moving is None else set(moving.names)
        names &= names if reached is None else set(reached)
        if moving is not None and moving.restart_moments:
            self.chances.clear()
        self.chances.update(names)
        for name in names - self.moved:
            parameter = self.trainable[name]
            gradient = parameter.grad
            state: Mapping[str, Tensor] = optimizer.state.get(parameter, {})
            moment = state.get("exp_avg", state.get("state1"))  # torch's name, and that of moments in 8 bits
            if gradient is not None and moment is not None and bool(gradient.any()) and bool(moment.any()):
                self.moved.add(name)
        if self.world.sharded:  # rows that stand still here may have moved elsewhere
            self.moved.update(*self.world.gather(sorted(self.moved)))
        judged = {name for name, chances in self.chances.items() if chances >= 2}
        if judged:
            self.gate = self._verdict(judged)
        return self.gate

    def _verdict(self, judged: set[str]) -> Gate:
        still = sorted(judged - self.moved)
        after = frozen_digest(self.model)
        here = sorted(name for name, value in self.before.items() if after.get(name) != value)
        changed = sorted({name for own in self.world.gather(here) for name in own}) if self.world.sharded else here
        moved = f"{len(judged & self.moved)} of {len(judged)}"
        measured = f"{moved} tensors moved, {len(changed)} frozen ones changed"
        if still or changed:
            named = f"; not moved: {still[:2]}" if still else f"; changed: {changed[:2]}"
            return Gate("movement", "failed", measured + named, "all, 0")
        return Gate("movement", "passed", measured, "all, 0")


def movement_not_reached() -> Gate:
    """What a run of fewer than two steps says."""
    return Gate("movement", "not_reached", "fewer than two steps", "all, 0")


def enforce(gate: Gate) -> Gate:
    """Raise `GateError` for a failed gate."""
    if gate.state == "failed":
        raise GateError(f"gate {gate.name} failed", given=gate.measured, allowed=str(gate.limit))
    return gate


def tolerance(policy: Policy) -> float:
    """Nats by which two ways to compute the same thing may differ."""
    return TOLERANCE[_dtype(policy)]


def _dtype(policy: Policy) -> torch.dtype:
    compute = policy.base.compute_dtype
    held = next(policy.model.parameters()).dtype  # a base held in bfloat16 may compute in float32
    return compute if compute is torch.bfloat16 else torch.promote_types(compute, held)


def _close(name: str, difference_N: Tensor, policy: Policy) -> Gate:
    """Whether two ways to compute the same log-probabilities differ by rounding alone."""
    worst, limit = float(difference_N.abs().max()), TOLERANCE[_dtype(policy)]
    spread = float(difference_N.abs().float().quantile(0.9))
    if _dtype(policy) is torch.bfloat16 and spread <= SPREAD:
        limit = max(limit, min(OUTLIER * spread, FURTHEST))
    return _gate(name, worst <= limit, worst, limit)


def _gate(name: str, held: bool, measured: object, limit: object) -> Gate:
    return Gate(name, "passed" if held else "failed", measured, limit)


SKIPS_BEFORE_STOP = 3
"""Steps in a row that may be skipped because their loss or gradient was not finite."""


def skip_step(folder: RunFolder, progress: Progress, examples: Sequence[Example], loss: float, norm: float) -> None:
    """Count a step that was skipped. Raises `GateError` after the last that may be, with its documents on disk."""
    progress.skipped += 1
    print_status(f"step {progress.step} skipped: loss {loss}, gradient norm {norm}")
    if progress.skipped < SKIPS_BEFORE_STOP:
        return
    if folder.writes:
        write_text(
            folder.path / NOT_FINITE_FILE,
            "".join(json.dumps(_describe_document(example)) + "\n" for example in examples),
        )
    folder.update(not_finite={"step": progress.step, "rows": [str(example.source) for example in examples]})
    raise GateError(
        f"loss or gradient was not finite in {SKIPS_BEFORE_STOP} steps running",
        where=str(folder.path),
        given=f"loss {loss}, gradient norm {norm}; the last step's documents stand in {NOT_FINITE_FILE}",
        hint="lower training.learning_rate, or look at those rows",
    )


def _describe_document(example: Example) -> dict[str, object]:
    """A document as the step saw it."""
    return {
        "source": str(example.source),
        "ids": example.ids.tolist(),
        "supervised": np.flatnonzero(example.supervised).tolist(),
        "row": example.row,
        "task": example.task,
        "weight": example.weight,
        "score": example.score,
        "columns": {name: values.tolist() for name, values in example.columns.items()},
    }
