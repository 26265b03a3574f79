"""Gates 2 and 3: checks before the first step, and the check that every trained tensor moves in the first steps.

Each gate compares two independent computations of the same numbers on a few short documents and ends the run where they
differ by more than rounding. The cost is some forward passes per run; a silent fault would cost the whole run. The
functions return a `Gate`; `runs.train` and `Trainer` record it in run.json and then `enforce` it. Gate 1 is in
`data.tokenize`, gate 4 in `files.write_folder`, gate 5 in `runs.artifact`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rung.console import print_status
from rung.errors import GateError
from rung.files import write_text
from rung.methods.protocol import Method, TrainableSet
from rung.models.bfloat16_storage import keeps_bfloat16_weights
from rung.models.fused_modules import original_forwards
from rung.models.generate import Sampling, generate
from rung.models.packing import pack_separately
from rung.models.policy import Policy
from rung.training.distributed import SINGLE_PROCESS, World
from rung.training.fsdp import digests
from rung.training.run_folder import NOT_FINITE_FILE, Gate, Progress, RunFolder, State
from rung.types import Example, PackedBatch

TOLERANCE: dict[torch.dtype, float] = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.5}
"""Largest difference in nats between two computations of the same log-probabilities. A wrong mask or position moves
them by whole nats; another order of sums moves them by less than this on models of billions of parameters."""
BFLOAT16_P90_LIMIT, BFLOAT16_OUTLIER_FACTOR, BFLOAT16_MAX_LIMIT = 0.3, 15.0, 1.5
"""The rule in bfloat16, in nats: where the 90th percentile (p90) of the differences is at most P90_LIMIT, the largest
may be up to min(OUTLIER_FACTOR * p90, MAX_LIMIT). Rounding moves a few tokens far: with transformers' own forward,
packed and separate documents differ by up to 0.67 nats on 280 tokens, p90 below 0.1. A fault moves some tokens by whole
nats, or all of them. Measurements are in docs/log.md."""


def check_trainable(method: Method, optimizer_count: int, head_parameters: int = 0) -> Gate:
    """The optimizer holds exactly the declared number of trainable parameters, and at least one.

    `optimizer_count` is `OptimizerState.trained_count`, `head_parameters` that of heads that the objective owns.
    """
    declared_count = method.declared_parameters() + head_parameters
    measured, declared = f"{optimizer_count:,} in the optimizer", f"{declared_count:,} declared"
    state: State = "passed" if optimizer_count == declared_count > 0 else "failed"
    return Gate("step0.trainable", state, measured, declared)


@torch.no_grad()
def check_identity(policy: Policy, method: Method, batches: Sequence[PackedBatch]) -> Gate | None:
    """With a fresh adapter the model gives the log-probabilities of the base.

    None for methods that train the base itself or do not start as the base.
    """
    if method.artifact != "adapter" or not method.starts_as_base:
        return None
    with_method, base = _logprobs(policy, batches, lambda b: (policy.logprobs(b), policy.base_logprobs(b)))
    difference = float((with_method - base).abs().max())
    limit = tolerance(policy) * (1.0 if method.subtracts else 1e-2)  # the same sums plus zeros
    return Gate.at_most("step0.identity", difference, limit)


@torch.no_grad()
def check_reference(policy: Policy, method: Method, batches: Sequence[PackedBatch]) -> Gate | None:
    """A separate reference model with the base's fingerprint gives the log-probabilities of the policy at its start."""
    reference = policy.reference
    if reference is None or reference.base.fingerprint != policy.base.fingerprint or not method.starts_as_base:
        return None
    own_N, reference_N = _logprobs(policy, batches, lambda b: (policy.logprobs(b), policy.reference_logprobs(b)))
    return compare_logprobs("step0.reference", own_N - reference_N, policy)


@torch.no_grad()
def check_packing(policy: Policy, batches: Sequence[PackedBatch]) -> Gate:
    """Log-probabilities of documents packed as in training equal those of one document per batch."""
    (packed_logprobs_N,) = _logprobs(policy, batches, lambda b: (policy.logprobs(b),))
    # in the order of the packed batches, which sort their documents; row -1: one batch per document
    documents = [replace(document, row=-1) for batch in batches for document in batch.documents]
    separate_logprobs_N = torch.cat([policy.logprobs(batch) for batch in pack_separately(documents, policy.device)])
    return compare_logprobs("step0.packing", packed_logprobs_N - separate_logprobs_N, policy)


@torch.no_grad()
def check_fused(policy: Policy, batches: Sequence[PackedBatch]) -> Gate | None:
    """Rung's fused functions give the log-probabilities of the original forward of transformers and peft.

    None for bfloat16 weights computed in float32: the original forward cannot run on them.
    """
    if policy.base.compute_dtype is torch.float32 and keeps_bfloat16_weights(policy.model):
        return None
    (fused_logprobs_N,) = _logprobs(policy, batches, lambda b: (policy.logprobs(b),))
    with original_forwards(policy.model):
        (original_logprobs_N,) = _logprobs(policy, batches, lambda b: (policy.logprobs(b),))
    return compare_logprobs("step0.fused", fused_logprobs_N - original_logprobs_N, policy)


@torch.no_grad()
def check_decoding(policy: Policy, probe: Sequence[Example], tokens: int = 4) -> Gate:
    """Log-probabilities of a greedy answer decoded with the KV cache equal those of one forward pass over it."""
    differences = list[Tensor]()
    for task in {example.task for example in probe}:
        examples = [example for example in probe if example.task == task]
        prompts = [_decodable_prompt(policy, example, tokens) for example in examples]
        # no stop ids: an answer that stops early would leave fewer tokens to compare
        answers = generate(policy, prompts, stop_ids=(), sampling=Sampling(tokens), task=task)
        for prompt, answer, example in zip(prompts, answers, examples, strict=True):
            ids = np.array([*prompt, *answer.ids], dtype=np.int32)
            full_document = Example(ids, np.arange(len(ids)) >= len(prompt), example.source, task=task)
            read_logprobs_N = policy.logprobs(pack_separately([full_document], policy.device)[0])
            differences.append(read_logprobs_N.cpu() - torch.tensor(answer.logprobs))
    return compare_logprobs("step0.decoding", torch.cat(differences), policy)


def _decodable_prompt(policy: Policy, example: Example, tokens: int) -> list[int]:
    """The prompt of a document, without its end where the answer would leave the context or change the frequencies."""
    prompt: list[int] = example.ids[: max(1, int(example.supervised.argmax()))].tolist()
    virtual_count = policy.method.virtual_tokens
    limits = [policy.base.context - virtual_count]
    # decoded, the first tokens of an answer across the boundary have other frequencies than the document has
    if (boundary := policy.rope_boundary) is not None and len(prompt) + virtual_count <= boundary:
        limits.append(boundary - virtual_count)
    return prompt[: max(1, min(limits) - tokens)]


def frozen_digest(model: nn.Module) -> dict[str, int]:
    """64-bit hash of every frozen tensor, by name."""
    return digests((name, p) for name, p in model.named_parameters() if not p.requires_grad)


class MovementGate:
    """Gate 3: every trained tensor received a gradient and updated its optimizer state; no frozen bit changed."""

    def __init__(self, model: nn.Module, trainable: Mapping[str, nn.Parameter], world: World = SINGLE_PROCESS) -> None:
        self.model, self.trainable, self.world = model, trainable, world
        self.initial_digests = frozen_digest(model)
        self.opportunities: Counter[str] = Counter()
        """Steps in which a tensor could have moved. One is not enough: LoRA's A has no gradient while B is zero."""
        self.moved_names: set[str] = set()
        self.gate: Gate | None = None

    def observe(
        self,
        optimizer: Optimizer,
        selection: TrainableSet | None = None,
        reachable_names: Collection[str] | None = None,
    ) -> Gate | None:
        """Inspect gradients and moments right after an optimizer step.

        `selection` limits the tensors trained in this step, `reachable_names` those that its documents can reach; None
        means all. Returns the verdict once a tensor has had two opportunities, else None; at most one per run.
        """
        if self.gate is not None:
            return None
        candidate_names = set(self.trainable) if selection is None else set(selection.names)
        candidate_names &= candidate_names if reachable_names is None else set(reachable_names)
        if selection is not None and selection.restart_moments:
            # a rewind sets B to zero again, so the next step moves B alone
            self.opportunities.clear()
        self.opportunities.update(candidate_names)
        for name in candidate_names - self.moved_names:
            parameter = self.trainable[name]
            gradient = parameter.grad
            state: Mapping[str, Tensor] = optimizer.state.get(parameter, {})
            moment = state.get("exp_avg", state.get("state1"))  # torch's name; bitsandbytes' name
            if gradient is not None and moment is not None and bool(gradient.any()) and bool(moment.any()):
                self.moved_names.add(name)
        if self.world.sharded:  # each rank sees the gradients of its own rows only
            self.moved_names.update(*self.world.gather(sorted(self.moved_names)))
        judged_names = {name for name, opportunities in self.opportunities.items() if opportunities >= 2}
        if judged_names:
            self.gate = self._verdict(judged_names)
        return self.gate

    def _verdict(self, judged_names: set[str]) -> Gate:
        unmoved_names = sorted(judged_names - self.moved_names)
        digests_now = frozen_digest(self.model)
        locally_changed = sorted(name for name, value in self.initial_digests.items() if digests_now.get(name) != value)
        # each rank hashes its own rows of a sharded tensor; replicated tensors are hashed in full
        ranks = self.world.gather(locally_changed) if self.world.sharded else [locally_changed]
        changed_names = sorted(set().union(*ranks))
        moved_ratio = f"{len(judged_names & self.moved_names)} of {len(judged_names)}"
        measured = f"{moved_ratio} tensors moved, {len(changed_names)} frozen ones changed"
        if unmoved_names or changed_names:
            detail = f"; not moved: {unmoved_names[:2]}" if unmoved_names else f"; changed: {changed_names[:2]}"
            return Gate("movement", "failed", measured + detail, "all, 0")
        return Gate("movement", "passed", measured, "all, 0")


def enforce(gate: Gate, hint: str | None = None) -> Gate:
    """Raise `GateError` for a failed gate, with a hint where the cause may be a setting."""
    if gate.state == "failed":
        raise GateError(f"gate {gate.name} failed", given=gate.measured, allowed=str(gate.limit), hint=hint)
    return gate


def tolerance(policy: Policy) -> float:
    """Tolerance in nats for two computations of the same log-probabilities of this policy."""
    return TOLERANCE[_dtype(policy)]


def _dtype(policy: Policy) -> torch.dtype:
    compute_dtype = policy.base.compute_dtype
    storage_dtype = next(policy.model.parameters()).dtype  # bfloat16 weights may be computed in float32
    return compute_dtype if compute_dtype is torch.bfloat16 else torch.promote_types(compute_dtype, storage_dtype)


def _logprobs(
    policy: Policy, batches: Sequence[PackedBatch], values: Callable[[PackedBatch], tuple[Tensor, ...]]
) -> list[Tensor]:
    """Values [N] of all batches, for each member of the tuple that `values` returns for a batch."""
    by_batch = [values(batch) for batch in policy.iterate_batches(batches)]
    return [torch.cat(column) for column in zip(*by_batch, strict=True)]


def compare_logprobs(name: str, difference_N: Tensor, policy: Policy) -> Gate:
    """Passes where the differences [N] of two computations of the same log-probabilities are rounding."""
    largest, limit = float(difference_N.abs().max()), tolerance(policy)
    p90 = float(difference_N.abs().float().quantile(0.9))
    # the largest of many grows with the number of tokens, so bfloat16 is judged by the p90 (docs/log.md)
    if _dtype(policy) is torch.bfloat16 and p90 <= BFLOAT16_P90_LIMIT:
        limit = max(limit, min(BFLOAT16_OUTLIER_FACTOR * p90, BFLOAT16_MAX_LIMIT))
    return Gate.at_most(name, largest, limit)


SKIPS_BEFORE_STOP = 3
"""The run ends at this many steps in a row whose loss or gradient was not finite; fewer are skipped."""


def skip_step(
    folder: RunFolder, progress: Progress, examples: Sequence[Example], loss: float, norm: float, rate: float
) -> None:
    """Count a skipped step at this learning rate.

    Raises `GateError` at the third in a row, and writes its documents to `NOT_FINITE_FILE`.
    """
    progress.skipped += 1
    print_status(f"step {progress.step} skipped: loss {loss}, gradient norm {norm}")
    if progress.skipped < SKIPS_BEFORE_STOP:
        return
    if folder.writes:
        lines = (json.dumps(_describe_document(example)) + "\n" for example in examples)
        write_text(folder.path / NOT_FINITE_FILE, "".join(lines))
    folder.update(not_finite={"step": progress.step, "rows": [str(example.source) for example in examples]})
    summary = f"loss or gradient was not finite in {SKIPS_BEFORE_STOP} steps running"
    given = f"loss {loss}, gradient norm {norm}; the last step's documents stand in {NOT_FINITE_FILE}"
    hint = f"the learning rate is {rate:g}: lower training.learning_rate, or look at those rows"
    raise GateError(summary, where=str(folder.path), given=given, hint=hint)


def _describe_document(example: Example) -> dict[str, object]:
    """A document as the step used it, as JSON."""
    tokens = {"ids": example.ids.tolist(), "supervised": np.flatnonzero(example.supervised).tolist()}
    settings = {name: getattr(example, name) for name in ("row", "task", "weight", "score")}
    columns = {name: values.tolist() for name, values in example.columns.items()}
    return {"source": str(example.source), **tokens, **settings, "columns": columns}
