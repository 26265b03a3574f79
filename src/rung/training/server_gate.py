"""The gate of answers that a server drew: they were drawn from this policy, up to rounding.

A server computes otherwise than this process, so its log-probabilities differ by rounding, which importance weights
correct. A server with another base, without the adapter, with older weights or another temperature differs by more, and
would be learned from, or scored, without an error. `training/rollout.py` and `evaluation/server_answers.py` ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rung.errors import PlanError
from rung.models.policy import Policy
from rung.training.gates import BFLOAT16_P90_LIMIT, compare_logprobs, tolerance
from rung.training.run_folder import Gate
from rung.types import Example, PackedBatch

PROBED_DOCUMENTS = 16
"""Answers whose log-probabilities are compared with those of other models than the policy."""
NEARER_SHARE = 0.25
"""Another model counts as the one that answered where the server's mean distance to it is at most this share of that to
the policy: a model that merely lies in the same direction is no explanation."""

DocumentValues = Callable[[Sequence[Example], Callable[[PackedBatch], Tensor]], list[np.ndarray]]
"""Values [predictions] of each document."""


class DrawnAnswers(NamedTuple):
    """Answers of a server, and what policy and server make of them."""

    documents: Sequence[Example]
    policy_logprobs: Sequence[np.ndarray]
    """In nats, [predictions] per document, under the sampling temperature."""
    sampler_logprobs: Sequence[np.ndarray]
    """As the server reports them."""

    @property
    def logratios(self) -> list[np.ndarray]:
        """Log p_policy - log p_sampler."""
        both = zip(self.policy_logprobs, self.sampler_logprobs, strict=True)
        return [policy.astype(np.float64) - sampler for policy, sampler in both]


def check_sampler(name: str, policy: Policy, drawn: DrawnAnswers, dtype: str, evaluate: DocumentValues) -> Gate:
    """Gate: what the server reports for its tokens are the policy's log-probabilities, up to rounding.

    In float32 the largest difference decides, as in the gate of this process's own decoder; in bfloat16 the 90th
    percentile, since rounding moves single tokens far. Smaller faults are found by comparing with the models that such
    a fault would make answer: the base without the adapter, and the policy at temperature 1.
    """
    spread = np.abs(np.concatenate(drawn.logratios))
    p90, largest, mean = (float(value) for value in (np.quantile(spread, 0.9), spread.max(), spread.mean()))
    if dtype == "float32" and policy.base.compute_dtype is not torch.bfloat16:
        is_same, limit = largest <= tolerance(policy), f"largest {tolerance(policy):g}"
    else:
        is_same, limit = p90 <= BFLOAT16_P90_LIMIT, f"90th percentile {BFLOAT16_P90_LIMIT:g}"
    measured = f"mean {mean:.2g}, 90th percentile {p90:.2g}, largest {largest:.2g} nats"
    other = _nearer_model(policy, drawn, evaluate)
    if is_same and other is None:
        return Gate(name, "passed", measured, limit)
    reason = other or "the server has another base or older weights, or draws otherwise than it reports"
    return Gate(name, "failed", f"{measured}: {reason}", limit)


def differs_by_rounding(policy: Policy, drawn: DrawnAnswers) -> bool:
    """Whether a server differs from this process by more than this process's own decoder may."""
    differences = torch.from_numpy(np.concatenate(drawn.logratios))
    return compare_logprobs("rollout.distribution", differences, policy).state == "failed"


def _nearer_model(policy: Policy, drawn: DrawnAnswers, evaluate: DocumentValues) -> str | None:
    """The fault whose model is nearer to the server's log-probabilities than the policy is; None without one."""
    chosen = np.linspace(0, len(drawn.documents) - 1, min(PROBED_DOCUMENTS, len(drawn.documents))).astype(int)
    documents = [drawn.documents[i] for i in chosen]
    own, sampler = (np.concatenate([values[i] for i in chosen]) for values in drawn[1:])

    def is_nearer(other: np.ndarray) -> bool:
        return float(np.abs(sampler - other).mean()) < NEARER_SHARE * float(np.abs(sampler - own).mean())

    if is_nearer(np.concatenate(evaluate(documents, policy.base_logprobs))):
        return "they are those of the base: the server does not apply the adapter"
    logit_map = policy.logit_map
    if logit_map.temperature == 1.0:
        return None
    policy.logit_map = replace(logit_map, temperature=1.0)
    try:
        plain = np.concatenate(evaluate(documents, policy.logprobs))
    finally:
        policy.logit_map = logit_map
    if is_nearer(plain):
        return "they are those of temperature 1: start vLLM with --logprobs-mode processed_logprobs"
    return None


def refuse_changing_frequencies(policy: Policy, where: str) -> None:
    """Raise `PlanError` for a base whose rotary frequencies change with the length of a document."""
    if policy.rope_boundary is not None:
        summary = "the rotary frequencies of this base change with the length of a document; on a server they follow "
        summary += "from its --max-model-len"
        raise PlanError(summary, where=where, given=policy.base.name, hint="answer in this process: leave it out")
