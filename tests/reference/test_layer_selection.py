"""The lottery: scores written out, winners alone move, losers leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file

from builders import documents, policy_of, tuned
from models import tiny_model
from rung.config.method import LotteryConfig
from rung.config.objective import SftConfig
from rung.config.training import OptimizerConfig
from rung.errors import CheckpointError, ConfigError
from rung.methods.layer_selection import choose_winners
from rung.methods.registry import attach_method
from rung.models.packing import pack, pack_separately
from rung.models.targets import layer_number
from rung.objectives.sft import SftObjective
from rung.training.optimizer import make_optimizer, set_learning_rate, train_only
from rung.training.step import CalibrationBatch, accumulate

SFT = SftObjective(SftConfig())
SCORES = {0: 0.1, 1: 0.4, 2: 0.3, 3: 0.05, 4: 0.05, 5: 0.1}


@pytest.mark.parametrize(
    ("choose", "keep", "expected"),
    [
        ("best", 0.5, (0, 1, 2)),
        ("best", 0.01, (1,)),
        ("first", 0.5, (0, 1, 2)),
        ("middle", 0.34, (2, 3)),
        ("last", 0.5, (3, 4, 5)),
    ],
)
def test_who_goes_on(choose: str, keep: float, expected: tuple[int, ...]) -> None:
    assert choose_winners(SCORES, LotteryConfig(lottery={"choose": choose, "keep": keep}), 0) == expected  # type: ignore[arg-type]


def test_a_random_choice_follows_the_seed() -> None:
    config = LotteryConfig(lottery={"choose": "random"})
    drawn = [choose_winners(SCORES, config, seed) for seed in range(20)]
    assert choose_winners(SCORES, config, 3) == drawn[3] and len(set(drawn)) > 5 and {len(d) for d in drawn} == {3}


def test_scores_are_norms_and_energies_of_the_true_updates() -> None:
    examples = documents(8, count=9)
    policy, method = tuned("lottery", lottery={"scout_steps": 1})
    method.calibrate(CalibrationBatch(policy, SFT, examples, 60))
    norms = dict.fromkeys((0, 1), 0.0)
    energies = dict.fromkeys((0, 1), 0.0)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in method.names}
    for name in method.names:
        layer = method.model.get_submodule(name)
        layer.register_forward_pre_hook(lambda m, inputs, name=name: seen[name].append(inputs[0][0].detach()))
    with torch.no_grad():
        for batch in pack_separately(examples):
            policy.hidden_states(batch)
    for name in method.names:
        layer = method.model.get_submodule(name)
        delta = layer.get_delta_weight("default").detach()
        norms[layer_number(f"{name}.")] += float(delta.square().sum())
        energies[layer_number(f"{name}.")] += float((torch.cat(seen[name]) @ delta.T).square().sum())
    assert method.layer_schedule.update_norms() == pytest.approx(norms, rel=1e-5)
    assert method.layer_schedule.energies() == pytest.approx(energies, rel=1e-4)


@pytest.mark.parametrize("rewind", [True, False])
def test_winners_alone_move_and_losers_add_nothing(rewind: bool, tmp_path: Path) -> None:
    model = tiny_model()
    method = attach_method(model, LotteryConfig(lottery={"scout_steps": 2, "rewind": rewind}), seed=0)
    policy = policy_of(model, method)
    optimizer = make_optimizer(method.trainable(), OptimizerConfig(), method.learning_rate_factor)
    start = {n: p.detach().clone() for n, p in method.trainable().items()}
    for step in range(4):
        before = {n: p.detach().clone() for n, p in method.trainable().items()}
        moving = method.trainable_at_step(step)
        assert (moving is None) == (step < 2)
        assert moving is None or (moving.changes_permanently, moving.restart_moments) == (
            step == 2,
            step == 2 and rewind,
        )
        if moving is not None:
            train_only(optimizer, method.trainable(), moving)
        if step == 2:
            (winner,) = method.layer_schedule.winners
            for name, parameter in method.trainable().items():
                if layer_number(f".{name}") == winner:
                    assert torch.equal(parameter, start[name] if rewind else before[name])
                elif ".lora_B." in name:
                    assert not parameter.any()
            still = {n for n, p in method.trainable().items() if p in optimizer.state}
            assert {layer_number(f".{n}") for n in still} == (set() if rewind else {winner})
        optimizer.zero_grad()
        accumulate(policy, SFT, pack(documents(), 1000))
        set_learning_rate(optimizer, 1e-2)
        optimizer.step()
    kept = {id(p) for n, p in method.trainable().items() if layer_number(f".{n}") == winner}
    assert {id(p) for p in optimizer.state} == kept
    found = method.statistics()["lottery"]
    assert found["winners"] == [winner] and sum(found["scores"].values()) == pytest.approx(1.0, abs=1e-3)
    method.save(tmp_path)
    names = {layer_number(f".{key}") for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {winner}
    batch = pack_separately(documents())[0]
    theirs = PeftModel.from_pretrained(tiny_model(), str(tmp_path)).base_model.model
    assert (policy_of(theirs).logprobs(batch) - policy.logprobs(batch)).abs().max() < 1e-5
    other = attach_method(tiny_model(), LotteryConfig(lottery={"scout_steps": 2}), seed=5)
    other.load(tmp_path)
    assert torch.equal(policy_of(other.model, other).logprobs(batch), policy.logprobs(batch))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_resumed_lottery_knows_its_winners() -> None:
    _, method = tuned("lottery", lottery={"scout_steps": 2})
    method.trainable_at_step(2)
    kept = json.loads(json.dumps(method.state()))
    _, other = tuned("lottery", lottery={"scout_steps": 2})
    other.load_state(kept)
    moving = other.trainable_at_step(7)
    assert other.layer_schedule.winners == method.layer_schedule.winners and not moving.restart_moments
    assert other.statistics() == method.statistics() and set(other.trainable()) == set(method.trainable())
    other.layer_schedule.winners = None
    with pytest.raises(CheckpointError, match="who won"):
        other.trainable_at_step(7)


@pytest.mark.parametrize(
    "setting", [{"dora": True}, {"init": "pissa"}, {"init": "loftq"}, {"lisa_n_layers": 1}, {"lottery": {"keep": 1.0}}]
)
def test_what_a_lottery_cannot_score(setting: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LotteryConfig(**setting)  # type: ignore[arg-type]


def test_a_lottery_that_would_keep_all_layers() -> None:
    with pytest.raises(ConfigError, match="that is lora"):
        attach_method(tiny_model(), LotteryConfig(lottery={"keep": 0.9}), seed=0)
