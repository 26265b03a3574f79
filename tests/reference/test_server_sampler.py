"""Answers that another engine draws from the same weights: what the gate finds, and what the weights correct."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builders import documents
from rung.config.method import METHOD_CONFIGS
from rung.config.model import ModelConfig
from rung.config.objective import GrpoConfig, RolloutConfig, SftConfig
from rung.config.server import RolloutServerConfig
from rung.errors import CheckpointError
from rung.inference.vllm_client import AdapterServer
from rung.methods.registry import attach_method
from rung.models.generate import GeneratedAnswer
from rung.models.load import load_base
from rung.models.policy import Policy
from rung.objectives.grpo import GrpoObjective
from rung.objectives.sft import SftObjective
from rung.training.rollout import RolloutSource
from rung.training.run_folder import Gate
from rung.training.server_sampler import ServerSampler
from rung.training.step import CalibrationBatch
from rung.types import SAMPLER_LOGRATIO, Example
from vllm_server import Engine


@pytest.fixture
def source(vllm: Engine, tiny_base: Path, tmp_path: Path) -> RolloutSource:
    return source_of(vllm, tiny_base, tmp_path)


LORA = METHOD_CONFIGS["lora"](rank=4)


def source_of(
    vllm: Engine, base: Path, folder: Path, *, dtype: str = "float32", method: Any = LORA, **rollout: Any
) -> RolloutSource:
    """Rollouts of an adapter whose numbers matter."""
    loaded = load_base(ModelConfig(name=str(base), dtype="float32", matmul="onednn"))
    policy = calibrated(Policy(loaded, attach_method(loaded.model, method, seed=0)))
    move(policy, 0.1)
    server = RolloutServerConfig(url=vllm.url, model="base", dtype=dtype)  # type: ignore[arg-type]
    config = RolloutConfig(num_generations=3, max_new_tokens=6, server=server, **rollout)
    objective = GrpoObjective(GrpoConfig(reward={"kind": "exact"}, rollout=config))

    def judge(documents: object, answers: list[GeneratedAnswer]) -> list[float]:
        return [float(len(a.ids)) for a in answers]

    client = AdapterServer(server, "objective.rollout.server", "go on with: rung train --resume")
    sampler = ServerSampler(client, policy, folder / "sampler")
    return RolloutSource(policy, objective, config, (2,), judge, judge, 0, 200, sampler)  # type: ignore[arg-type]


def calibrated(policy: Policy) -> Policy:
    if policy.method.sample_size or policy.method.subtracts:  # type: ignore[attr-defined]
        examples = documents(8, count=8)
        policy.method.calibrate(CalibrationBatch(policy, SftObjective(SftConfig()), examples, 100))  # type: ignore[attr-defined]
    return policy


def move(policy: Policy, width: float, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.method.trainable().values():  # type: ignore[attr-defined]
            parameter.add_(width * torch.randn(parameter.shape, generator=generator))


def prompts(count: int = 4) -> list[Example]:
    return [replace(e, row=i, supervised=np.arange(len(e)) > 0) for i, e in enumerate(documents(3, count=count))]


def rolled(source: RolloutSource, step: int = 0) -> tuple[list[Example], Gate | None]:
    source.gate = None
    with source.sampling():
        return source.documents_for_step(prompts(), step)[0], source.gate


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_same_weights_give_the_same_probabilities(
    temperature: float, vllm: Engine, tiny_base: Path, tmp_path: Path
) -> None:
    source = source_of(vllm, tiny_base, tmp_path, temperature=temperature)
    examples, gate = rolled(source)
    assert gate is not None and gate.state == "passed" and "largest" in gate.measured
    assert len(examples) == 12 and max(float(np.abs(e.columns[SAMPLER_LOGRATIO]).max()) for e in examples) < 1e-4
    assert "old" not in examples[0].columns  # one step a rollout: the ratio is 1
    # a rollout later the first gate stands; other weights have another name, and nothing of either stays
    move(source.policy, 0.1, seed=8)
    assert rolled(source, 1)[1] is None
    loaded = [asked["lora_name"] for path, asked in vllm.requests if path == "/load_lora_adapter"]
    assert len(set(loaded)) == 2 and not vllm.adapters and not (tmp_path / "sampler").exists()
    assert source.policy.logit_map.temperature == 1.0


@pytest.mark.parametrize("settings", [{"rank_pattern": {"down": 8}}, {"init": "pissa"}, {"rslora": True}])
def test_other_ranks_and_starts_are_served(
    settings: dict[str, Any], vllm: Engine, tiny_base: Path, tmp_path: Path
) -> None:
    """Layers of another rank with one scale, and an adapter of twice the rank that subtracts its start."""
    source = source_of(vllm, tiny_base, tmp_path, method=METHOD_CONFIGS["lora"](rank=4, **settings))
    assert METHOD_CONFIGS["lora"](rank=4, **settings).server_blocker is None
    assert rolled(source)[1].state == "passed"  # type: ignore[union-attr]


def test_greedy_answers_are_those_of_this_process(source: RolloutSource) -> None:
    by_server = source.validate(prompts())
    source.sampler = None
    assert source.validate(prompts()) == by_server


MUTATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"missing": True}, "those of the base: the server does not apply the adapter"),
    "other base": ({"other_base": True}, "another base or older weights"),
    "other temperature": ({"temperature": 1.0}, "those of temperature 1"),
    "third temperature": ({"temperature": 2.0}, "another base or older weights"),
    "raw log-probabilities": ({"report": 1.0}, "start vLLM with --logprobs-mode processed_logprobs"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", MUTATIONS)
def test_another_model_fails_the_gate(fault: str, dtype: str, vllm: Engine, tiny_base: Path, tmp_path: Path) -> None:
    """By the rule of float32 and, with bfloat16, where rounding hides more: every fault in the first rollout."""
    vllm.rules, reason = MUTATIONS[fault]
    source = source_of(vllm, tiny_base, tmp_path, dtype=dtype, temperature=0.6)
    move(source.policy, 0.3)
    _, gate = rolled(source)
    assert gate is not None and gate.state == "failed" and reason in gate.measured, gate


def test_older_weights_are_found_at_any_rollout(source: RolloutSource, vllm: Engine) -> None:
    """A server that goes on with the first adapter under every name; under a name of its own it never is asked to."""
    vllm.rules["stale"] = True
    assert rolled(source)[1].state == "passed"  # type: ignore[union-attr]
    move(source.policy, 0.02, seed=8)
    _, gate = rolled(source, 1)
    assert gate is not None and gate.state == "failed" and "older weights" in gate.measured


def test_rounding_is_said_and_corrected(
    vllm: Engine, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With bfloat16 a server that differs by hundredths of a nat passes; in float32 it would be another model."""

    def rounded(reply: dict[str, Any]) -> None:
        for i, choice in enumerate(reply["choices"]):
            values = choice["logprobs"]["token_logprobs"]
            choice["logprobs"]["token_logprobs"] = [v - 0.02 * (-1) ** (i + k) for k, v in enumerate(values)]

    vllm.rules["reply"] = rounded
    source = source_of(vllm, tiny_base, tmp_path, dtype="bfloat16")
    examples, gate = rolled(source)
    assert gate is not None and gate.state == "passed" and "the server rounds otherwise" in capsys.readouterr().err
    for number, e in enumerate(examples):
        expected = [0.02 * (-1) ** (number % 3 + k) for k in range(e.predictions)]
        assert e.columns[SAMPLER_LOGRATIO] == pytest.approx(expected, abs=1e-3)  # log p_policy - log p_sampler
    strict = source_of(vllm, tiny_base, tmp_path)
    assert rolled(strict)[1].state == "failed"  # type: ignore[union-attr]


def test_what_a_killed_process_left_is_unloaded(source: RolloutSource, vllm: Engine, tmp_path: Path) -> None:
    """Its own adapters alone: those of other runs, and of people, stay."""
    sampler = source.sampler
    assert sampler is not None
    folder = tmp_path / "adapter"
    source.policy.method.save(folder)  # type: ignore[attr-defined]
    own = sampler.server.adapter_prefix(sampler.folder) + "3-00ff"
    for name in (own, "rung-0123456789ab-3-00ff", "somebody"):
        assert vllm.load(name, str(folder))[0] == 200
    (tmp_path / "sampler" / own).mkdir(parents=True)
    sampler.begin()
    assert set(vllm.adapters) == {"rung-0123456789ab-3-00ff", "somebody"} and not (tmp_path / "sampler").exists()
    for name in list(vllm.adapters):
        vllm.unload(name)


def test_a_load_that_was_carried_out_before_its_connection_failed(source: RolloutSource, vllm: Engine) -> None:
    """The second try gets 400 for a name that is loaded from this very folder; from another one it is refused."""
    load = vllm.load

    def twice(name: str, path: str) -> tuple[int, str]:
        load(name, path)
        return load(name, path)

    vllm.load = twice  # type: ignore[method-assign]
    try:
        assert rolled(source)[1].state == "passed"  # type: ignore[union-attr]
        vllm.load = lambda name, path: (vllm.adapters.update({name: "/elsewhere"}), load(name, path))[1]  # type: ignore[method-assign]
        with pytest.raises(CheckpointError, match="has already been loaded"):
            rolled(source, 1)
    finally:
        vllm.load = load  # type: ignore[method-assign]
        vllm.adapters.clear()


@pytest.mark.parametrize("rules", [{"die_after": 2}, {"status": {"/completions": 400}}])
def test_a_server_that_dies_leaves_nothing_behind(rules: dict[str, Any], source: RolloutSource, vllm: Engine) -> None:
    vllm.rules = rules
    with pytest.raises(CheckpointError):
        rolled(source)
    assert not vllm.adapters and not source.documents and source.sampler is not None
    assert not source.sampler.folder.exists() and source.policy.logit_map.temperature == 1.0
    vllm.rules, vllm.completed = {}, 0
    assert rolled(source)[1].state == "passed"  # type: ignore[union-attr]
