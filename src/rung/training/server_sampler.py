"""Rollouts drawn by a vLLM server: the adapter goes there as a peft folder, token ids and log-probabilities come back.

For each rollout the current adapter is written completely, loaded under a name that no other rollout has, asked, and
unloaded. The server computes otherwise than the policy, so its log-probabilities are compared with the policy's at
every rollout: rounding is corrected by importance weights, another model is refused. What a resumed run asks again is
drawn again, so it is no longer the same run bit for bit (decision 0034). `training/rollout.py` calls `answer`.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rung.errors import PlanError
from rung.files import write_folder
from rung.inference.vllm_client import AdapterServer
from rung.models.generate import GeneratedAnswer, Sampling
from rung.models.policy import Policy
from rung.training.gates import BFLOAT16_P90_LIMIT, compare_logprobs, tolerance
from rung.training.run_folder import Gate
from rung.types import Example, PackedBatch

FOLDER = "sampler"
"""Folder of a run with the adapter that a server is asked for."""
PROBED_DOCUMENTS = 16
"""Answers whose log-probabilities are compared with those of other models than the policy."""
NEARER = 0.25
"""Another model counts as the one that answered where the server is this many times as far from it as from the policy,
or less: a model that merely lies in the same direction is no explanation."""

DocumentValues = Callable[[Sequence[Example], Callable[[PackedBatch], Tensor]], list[np.ndarray]]
"""Values [predictions] of each document."""


@dataclass
class ServerSampler:
    """Draws answers of the policy on a server."""

    server: AdapterServer
    policy: Policy
    folder: Path
    """Where adapters are written, one folder for each; nothing of it stays."""
    drawn: int = field(default=0, init=False)

    def begin(self) -> None:
        """Unload and remove what a killed process left. Raises `ConfigError` where the server lacks the base."""
        self.server.unload_all(self.server.adapter_prefix(self.folder))
        shutil.rmtree(self.folder, ignore_errors=True)

    def answer(
        self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling
    ) -> list[GeneratedAnswer]:
        """Answers of the current weights in the order of the prompts; all answers to one prompt are adjacent.

        Raises `CheckpointError` where one of them is missing or not what was asked for; no adapter stays loaded.
        """
        # random digits too: a resumed run repeats the numbers with other weights
        name = f"{self.server.adapter_prefix(self.folder)}{self.drawn}-{secrets.token_hex(4)}"
        self.drawn += 1
        folder, method = self.folder / name, self.policy.method
        write_folder(folder, method.save)  # type: ignore[attr-defined]
        vocab_size = self.policy.base.vocab_size
        try:
            with self.server.adapter(name, folder):
                return self.server.complete(name, prompts, stop_ids, sampling, vocab_size)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


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


def check_sampler(policy: Policy, drawn: DrawnAnswers, dtype: str, evaluate: DocumentValues) -> Gate:
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
        return Gate("rollout.distribution", "passed", measured, limit)
    reason = other or "the server has another base or older weights, or draws otherwise than it reports"
    return Gate("rollout.distribution", "failed", f"{measured}: {reason}", limit)


def rounds_otherwise(policy: Policy, drawn: DrawnAnswers) -> bool:
    """Whether a server differs from this process by more than this process's own decoder may."""
    differences = torch.from_numpy(np.concatenate(drawn.logratios))
    return compare_logprobs("rollout.distribution", differences, policy).state == "failed"


def _nearer_model(policy: Policy, drawn: DrawnAnswers, evaluate: DocumentValues) -> str | None:
    """The fault whose model is nearer to the server's log-probabilities than the policy is; None without one."""
    chosen = np.linspace(0, len(drawn.documents) - 1, min(PROBED_DOCUMENTS, len(drawn.documents))).astype(int)
    documents = [drawn.documents[i] for i in chosen]
    own, sampler = (np.concatenate([values[i] for i in chosen]) for values in drawn[1:])

    def is_nearer(other: np.ndarray) -> bool:
        return float(np.abs(sampler - other).mean()) < NEARER * float(np.abs(sampler - own).mean())

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
