"""Nothing in a step waits for the device, and a layer launches no more kernels than it does today.

Torch's fake tensors have shapes and no values: whatever reads one, in Python or inside C++, raises. So a step that runs
on them reads nothing back, for which a graphics card would have to finish first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from builders import documents, policy_of, rows, tuned
from launches import LaunchCounter
from models import tiny_model
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import DistillConfig, GrpoConfig, PpoConfig, PreferenceConfig, RewardConfig, SftConfig
from rung.methods.registry import attach_method
from rung.models.packing import MIN_PREFIX_AHEAD, pack
from rung.models.policy import Policy
from rung.objectives.distill import DistillObjective
from rung.objectives.grpo import GrpoObjective
from rung.objectives.ppo import PpoObjective
from rung.objectives.preference import LOSSES, make_preference_objective
from rung.objectives.protocol import Objective
from rung.objectives.reward import RewardObjective
from rung.objectives.sft import SftObjective
from rung.training.step import accumulate
from rung.types import ON_POLICY, Example

REWARD = {"kind": "exact"}
METHODS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in METHOD_CONFIGS if kind != "qlora"},
    "peft": {"config": {"peft_type": "IA3", "feedforward_modules": []}},
    **{kind: {"virtual_tokens": 3} for kind in ("prompt", "prefix", "p_tuning")},
}


def with_columns(examples: Sequence[Example], *names: str) -> list[Example]:
    rng = np.random.default_rng(0)
    drawn = ({name: rng.normal(size=e.predictions) for name in names} for e in examples)
    return [replace(e, columns=columns) for e, columns in zip(examples, drawn, strict=True)]


def distill(**config: Any) -> Objective:
    settings = DistillConfig(teacher="another", cache_teacher_states=False, **config)
    objective = DistillObjective(settings, policy_of(tiny_model(seed=5)))
    objective.begin(objective.teacher, 0)
    return objective


def ppo(**config: Any) -> Objective:
    critic, _ = tuned("lora")
    objective = PpoObjective(PpoConfig(reward=REWARD, entropy=0.01, **config), critic)  # type: ignore[arg-type]
    objective.begin(critic, 3)
    return objective


def reward() -> Objective:
    objective = RewardObjective(RewardConfig())
    objective.begin(policy_of(tiny_model()), 3)
    return objective


def preference(loss: str) -> Objective:
    smoothing = {"label_smoothing": 0.1} if loss == "robust" else {}
    return make_preference_objective(PreferenceConfig(loss=loss, sft=0.5, **smoothing))  # type: ignore[arg-type]


def grpo(loss: str) -> Objective:
    return GrpoObjective(GrpoConfig(loss=loss, reward=REWARD, beta=0.1))  # type: ignore[arg-type]


ANSWERS = rows(3, count=4, answers=3, shared=MIN_PREFIX_AHEAD + 5)
SCORED_ANSWERS = with_columns(ANSWERS, "advantage", "old", "reference")
OBJECTIVES: dict[str, tuple[Callable[[], Objective], Sequence[Example]]] = {
    "sft": (lambda: SftObjective(SftConfig()), documents(3, count=9, shared=MIN_PREFIX_AHEAD + 9)),
    **{loss: (partial(preference, loss), ANSWERS) for loss in (*LOSSES, "kto")},
    "reward": (reward, ANSWERS),
    "distill": (lambda: distill(cross_entropy=0.5, cosine=0.1), documents(shared=20)),
    "distill on_policy": (lambda: distill(cross_entropy=0.5), with_columns(documents(shared=20), ON_POLICY)),
    **{loss: (partial(grpo, loss), SCORED_ANSWERS) for loss in ("grpo", "dr_grpo", "rloo")},
    "ppo": (ppo, with_columns(ANSWERS, "old", "values", "advantage", "returns")),
}


def step(policy: Policy, objective: Objective, examples: Sequence[Example], compute: torch.dtype) -> Any:
    """A step on fake tensors: its loss."""
    policy = policy_of(policy.model, policy.method, compute=compute)
    policy.model.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        batches = pack(examples, 100, device=policy.device)
        if mismatched := objective.kl_examples(examples):
            with torch.no_grad():
                objective.prepare(policy, policy.iterate_batches(pack(mismatched, 100, device=policy.device)))
        return accumulate(policy, objective, batches)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_reads_a_value(name: str, compute: torch.dtype) -> None:
    make, examples = OBJECTIVES[name]
    policy, method = tuned("lora")
    loss = step(policy, make(), examples, compute)
    assert isinstance(loss, FakeTensor) and loss.shape == ()
    assert all(isinstance(p.grad, FakeTensor) for p in method.trainable().values())


@pytest.mark.parametrize("kind", [*METHODS, "qlora"])
def test_no_method_reads_a_value(kind: str) -> None:
    examples = documents(3, count=9, shared=MIN_PREFIX_AHEAD + 9)
    if kind == "qlora":
        if Version(torch.__version__) < Version("2.13"):
            pytest.skip("fake tensors of this torch do not know bitsandbytes' parameters")
        model = tiny_model(hidden_size=64, intermediate_size=128)
        method = attach_method(model, METHOD_CONFIGS[kind](), seed=0)  # type: ignore[arg-type]
        policy = policy_of(model, method)
    else:
        policy, method = tuned(kind, **METHODS[kind])
    loss = step(policy, SftObjective(SftConfig()), examples, torch.float32)
    assert isinstance(loss, FakeTensor)
    assert all(isinstance(p.grad, FakeTensor) for p in method.trainable().values())


@pytest.mark.parametrize("read", [lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: bool(t.any())])
def test_a_value_that_is_read_is_seen(read: Callable[[torch.Tensor], Any]) -> None:
    """The mutation: an objective that looks at its log-probabilities."""

    class Peeking(SftObjective):
        def loss(self, policy: Policy, batch: Any) -> Any:
            read(policy.logprobs(batch))
            return super().loss(policy, batch)

    policy, _ = tuned("lora")
    with pytest.raises((DataDependentOutputException, RuntimeError), match="aten|data-dependent|Dynamic|nonzero"):
        step(policy, Peeking(SftConfig()), documents(), torch.float32)


CEILING = {"forward": (70, 18_214), "backward": (158, 39_340)}
"""Launches and bytes a token of one more layer of LoRA in bfloat16, of a row of one document, as they were counted on a
processor, where attention converts its operands to float32."""


def counted(layers: int) -> dict[str, tuple[int, int]]:
    """Launches and bytes of a forward and a backward pass through a model of so many layers."""
    model = tiny_model(num_hidden_layers=layers, hidden_size=64, intermediate_size=192, dtype=torch.bfloat16)
    method = attach_method(model, METHOD_CONFIGS["lora"](rank=8), seed=0)  # type: ignore[arg-type]
    policy = policy_of(model, method, compute=torch.bfloat16)
    batch = pack(documents(count=1, longest=200), 1000)[0]
    found = {}
    with LaunchCounter() as forward:
        loss = policy.logprobs(batch).sum()
    with LaunchCounter() as backward:
        loss.backward()  # type: ignore[no-untyped-call]
    for name, counter in (("forward", forward), ("backward", backward)):
        found[name] = sum(counter.launches.values()), counter.bytes // len(batch.ids)
    return found


def test_a_layer_launches_no_more_kernels_than_today(capsys: pytest.CaptureFixture[str]) -> None:
    few, many = counted(2), counted(4)
    for name, (launches, bytes_per_token) in CEILING.items():
        layer = [(b - a) // 2 for a, b in zip(few[name], many[name], strict=True)]
        with capsys.disabled():
            print(f"\n{name}: {layer[0]} kernels and {layer[1]:,} bytes a token in a layer of width 64")
        assert layer[0] <= launches and layer[1] <= bytes_per_token
