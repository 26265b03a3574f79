"""LoRA's own settings: which layers, which ranks, which rates, and what moves when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from builders import calibrated, documents, in_one_batch, policy_of, tuned
from models import tiny_model
from rung.config.layers import resolve_layers
from rung.config.method import METHOD_CONFIGS, LoraConfig
from rung.config.objective import SftConfig
from rung.config.training import OptimizerConfig
from rung.errors import CheckpointError, ConfigError
from rung.methods.registry import attach_method
from rung.models.packing import pack
from rung.models.targets import layer_number
from rung.objectives.sft import SftObjective
from rung.training.gates import MovementGate, check_identity
from rung.training.optimizer import make_optimizer, set_learning_rate, train_only
from rung.training.step import accumulate

THIRTY = range(30)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, range(30)),
        ("first", range(10)),
        ("middle", range(10, 20)),
        ("last", range(20, 30)),
        ("15-29", range(15, 30)),
        ("3-3", range(3, 4)),
        ((4, 2), (2, 4)),
    ],
)
def test_layers_by_name_range_and_number(given: object, expected: object) -> None:
    assert resolve_layers(given, THIRTY) == set(expected)  # type: ignore[arg-type, call-overload]


def test_thirds_of_any_model_are_disjoint_and_cover_it() -> None:
    for count in range(3, 40):
        first, middle, last = (resolve_layers(name, range(count)) for name in ("first", "middle", "last"))
        assert first | middle | last == set(range(count)) and len(first) + len(middle) + len(last) == count
        assert len(first) == len(last) == count // 3


@pytest.mark.parametrize("given", ["20-30", "5-2", (30,)])
def test_layers_that_are_not_there(given: object) -> None:
    with pytest.raises(ConfigError, match=r"method\.layers"):
        resolve_layers(given, THIRTY)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["upper", "1-", "-3", "1.5"])
def test_layers_that_say_nothing(given: str) -> None:
    with pytest.raises(ValidationError):
        LoraConfig(layers=given)  # type: ignore[arg-type]


def test_the_most_specific_rank_counts_and_alpha_follows() -> None:
    config = LoraConfig(rank=8, rank_pattern={"down": 4, "1": 2, "1.q": 3})
    method = attach_method(tiny_model(), config, seed=0)
    found = {name.removeprefix("model.layers."): rank for name, rank in method.ranks.items()}
    assert found["0.mlp.down_proj"] == 4 and found["1.mlp.down_proj"] == 2 and found["1.self_attn.q_proj"] == 3
    assert found["0.self_attn.q_proj"] == 8
    for name, rank in method.ranks.items():
        layer = method.model.get_submodule(name)
        assert layer.r["default"] == rank and layer.scaling["default"] == 2.0
    fixed = attach_method(tiny_model(), config.model_copy(update={"alpha": 6.0}), seed=0)
    scales = {fixed.model.get_submodule(name).scaling["default"] for name in fixed.names}
    assert scales == {6.0 / rank for rank in (8, 4, 2, 3)}


@pytest.mark.parametrize("key", ["gates", "1.x", "x.q", ""])
def test_ranks_of_nothing(key: str) -> None:
    with pytest.raises(ValidationError):
        LoraConfig(rank_pattern={key: 4})


@pytest.mark.parametrize("setting", [{"dora": True}, {"dropout": 0.1}])
def test_a_start_that_is_subtracted_needs_plain_lora(setting: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="subtracts its start"):
        LoraConfig(init="pissa", **setting)  # type: ignore[arg-type]


def test_b_moves_faster_by_the_ratio() -> None:
    _, method = tuned("lora", loraplus_lr_ratio=16.0)
    optimizer = make_optimizer(method.trainable(), OptimizerConfig(weight_decay=0.1), method.learning_rate_factor)
    set_learning_rate(optimizer, 1e-3)
    names = {id(p): n for n, p in method.trainable().items()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(method.trainable())
    assert all(rate == (16e-3 if ".lora_B." in name else 1e-3) for name, rate in rates.items())


def test_drawn_layers_alone_move_and_leave_no_moments_behind() -> None:
    policy, method = tuned("lora", lisa_n_layers=1, lisa_step_interval=2)
    optimizer = make_optimizer(method.trainable(), OptimizerConfig(), method.learning_rate_factor)
    movement = MovementGate(policy.model, method.trainable())
    drawn = []
    for step in range(12):
        start = {n: p.detach().clone() for n, p in method.trainable().items()}
        moving = method.trainable_at_step(step)
        assert moving == method.trainable_at_step(step) and moving is not None
        train_only(optimizer, method.trainable(), moving)
        optimizer.zero_grad()
        accumulate(policy, SftObjective(SftConfig()), pack(documents(), 1000))
        set_learning_rate(optimizer, 1e-3)
        optimizer.step()
        gate = movement.observe(optimizer, moving)
        assert (gate is not None) == (step == 1) and (gate is None or gate.state == "passed")
        changed = {n for n, p in method.trainable().items() if not torch.equal(p, start[n])}
        assert changed == set(moving.names)
        assert {id(p) for p in optimizer.state} == {id(method.trainable()[n]) for n in moving.names}
        drawn.append({layer_number(f".{n}") for n in moving.names})
        with method.disabled():
            pass
        assert {n for n, p in method.trainable().items() if p.requires_grad} == set(moving.names)
    assert all(drawn[i] == drawn[i + 1] for i in range(0, 12, 2)) and len({tuple(d) for d in drawn}) == 2


def test_more_layers_drawn_than_there_are() -> None:
    with pytest.raises(ConfigError, match="1 to 2"):
        attach_method(tiny_model(), LoraConfig(lisa_n_layers=3), seed=0)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_every_low_rank_method_draws_layers_where_asked(kind: str) -> None:
    method = attach_method(tiny_model(), METHOD_CONFIGS[kind](lisa_n_layers=1), seed=0)
    moving = method.trainable_at_step(0)
    assert moving is not None and 0 < len(moving.names) < len(method.trainable())
    assert attach_method(tiny_model(), METHOD_CONFIGS[kind](), seed=0).trainable_at_step(0) is None


@pytest.mark.parametrize(("init", "subtracts"), [("eva", False), ("default", False), ("pissa", True)])
def test_the_identity_gate_gives_way_only_where_a_start_is_subtracted(init: str, subtracts: bool) -> None:
    method = attach_method(tiny_model(), LoraConfig(init=init, rank=4), seed=0)  # type: ignore[arg-type]
    gate = check_identity(calibrated(policy_of(method.model, method), method), method, in_one_batch(documents()))
    assert gate is not None and gate.state == "passed"
    assert gate.limit == pytest.approx(2e-3 if subtracts else 2e-5)


@pytest.mark.parametrize(
    ("init", "scale"),
    [
        ("default", 2.0),
        ("gaussian", 2.0),
        ("orthogonal", 2.0),
        ("pissa", 1.0),  # lora_alpha is lora_r (Meng et al. 2024, section 5)
        ("corda", 1.0),
        ("corda_knowledge", 1.0),
        ("olora", 1.0),  # 16 at every rank
        ("lora_ga", 2.0),  # 16 at rank 8
        ("eva", 1.0 / 16.0),  # rows of norm 1: it was 2, 32 times as much
    ],
)
def test_eva_is_32_times_smaller_and_each_start_has_its_authors_scale(init: str, scale: float) -> None:
    """At rank 16; the scale that peft multiplies by, also in layers of other ranks."""
    config = LoraConfig(init=init, rank=16, rank_pattern={"down": 8})  # type: ignore[arg-type]
    method = attach_method(tiny_model(hidden_size=128), config, seed=0)
    assert {layer.scaling["default"] for layer in method.layers().values()} == {scale}


def test_loftq_makes_up_for_the_error_at_scale_1() -> None:
    method = attach_method(tiny_model(), METHOD_CONFIGS["qlora"](init="loftq", rank=4), seed=0)
    assert {layer.scaling["default"] for layer in method.layers().values()} == {1.0}


def test_rslora_keeps_one_alpha_so_that_its_scale_falls_with_the_root_of_the_rank() -> None:
    """alpha / sqrt(rank) with alpha = 2 rank was 2 sqrt(rank): it grew with the rank, 16 at rank 64."""
    config = LoraConfig(rank=16, rank_pattern={"down": 4}, rslora=True)
    method = attach_method(tiny_model(), config, seed=0)
    found = {method.ranks[name]: layer.scaling["default"] for name, layer in method.layers().items()}
    assert found == {16: 2.0, 4: 4.0}
    scales = {rank: LoraConfig(rank=rank, rslora=True).scale_at(rank) for rank in (4, 16, 64, 256)}
    assert scales == {4: 4.0, 16: 2.0, 64: 1.0, 256: 0.5}


@pytest.mark.parametrize("init", ["eva", "pissa", "olora", "corda"])
def test_rslora_and_a_start_of_its_own_alpha_want_it_set(init: str) -> None:
    with pytest.raises(ValidationError, match="set alpha"):
        LoraConfig(init=init, rslora=True)  # type: ignore[arg-type]
    assert LoraConfig(init=init, rslora=True, alpha=4.0).scale_at(16) == 1.0  # type: ignore[arg-type]


def test_an_adapter_of_another_scale_is_refused(tmp_path: Path) -> None:
    """A config without alpha, whose default has changed since: B A would be multiplied by 1/4 instead of 2."""
    _, method = tuned("lora", init="eva", rank=4, alpha=8.0)
    method.save(tmp_path)
    other = attach_method(tiny_model(), LoraConfig(init="eva", rank=4), seed=0)
    with pytest.raises(CheckpointError, match=r"another scale(.|\n)*alpha"):
        other.load(tmp_path)
    attach_method(tiny_model(), LoraConfig(init="eva", rank=4, alpha=8.0), seed=0).load(tmp_path)


@pytest.mark.parametrize(("placement", "scale"), [("houlsby", 1.0), ("pfeiffer", 1.0), ("parallel", 4.0)])
def test_a_parallel_adapter_has_the_scale_of_its_paper(placement: str, scale: float) -> None:
    method = attach_method(tiny_model(), METHOD_CONFIGS["bottleneck"](placement=placement, width=4), seed=0)
    assert {m.scale for m in method.model.modules() if hasattr(m, "down") and hasattr(m, "up")} == {scale}
