"""LoRA's own settings: which layers, which ranks, which rates, and what moves when."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from builders import calibrated, documents, policy_of, tuned
from models import tiny_model
from rung.config.layers import layers_named
from rung.config.method import METHOD_SPECS, LoraSpec
from rung.config.objective import SftSpec
from rung.config.training import OptimiserSpec
from rung.errors import ConfigError
from rung.methods.registry import attach
from rung.models.targets import layer_number
from rung.objectives.sft import Sft
from rung.training.gates import Movement, check_identity
from rung.training.optimizer import make_optimiser, move_only, set_rate
from rung.training.packing import pack
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
    assert layers_named(given, THIRTY) == set(expected)  # type: ignore[arg-type, call-overload]


def test_thirds_of_any_model_are_disjoint_and_cover_it() -> None:
    for count in range(3, 40):
        first, middle, last = (layers_named(name, range(count)) for name in ("first", "middle", "last"))
        assert first | middle | last == set(range(count)) and len(first) + len(middle) + len(last) == count
        assert len(first) == len(last) == count // 3


@pytest.mark.parametrize("given", ["20-30", "5-2", (30,)])
def test_layers_that_are_not_there(given: object) -> None:
    with pytest.raises(ConfigError, match=r"method\.layers"):
        layers_named(given, THIRTY)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["upper", "1-", "-3", "1.5"])
def test_layers_that_say_nothing(given: str) -> None:
    with pytest.raises(ValidationError):
        LoraSpec(layers=given)  # type: ignore[arg-type]


def test_the_most_specific_rank_counts_and_alpha_follows() -> None:
    spec = LoraSpec(rank=8, ranks={"down": 4, "1": 2, "1.q": 3})
    method = attach(tiny_model(), spec, seed=0)
    found = {name.removeprefix("model.layers."): rank for name, rank in method.ranks.items()}
    assert found["0.mlp.down_proj"] == 4 and found["1.mlp.down_proj"] == 2 and found["1.self_attn.q_proj"] == 3
    assert found["0.self_attn.q_proj"] == 8
    for name, rank in method.ranks.items():
        layer = method.model.get_submodule(name)
        assert layer.r["default"] == rank and layer.scaling["default"] == 2.0
    fixed = attach(tiny_model(), spec.model_copy(update={"alpha": 6.0}), seed=0)
    scales = {fixed.model.get_submodule(name).scaling["default"] for name in fixed.names}
    assert scales == {6.0 / rank for rank in (8, 4, 2, 3)}


@pytest.mark.parametrize("key", ["gates", "1.x", "x.q", ""])
def test_ranks_of_nothing(key: str) -> None:
    with pytest.raises(ValidationError):
        LoraSpec(ranks={key: 4})


@pytest.mark.parametrize("setting", [{"dora": True}, {"dropout": 0.1}])
def test_a_start_that_is_subtracted_needs_plain_lora(setting: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="subtracts its start"):
        LoraSpec(init="pissa", **setting)  # type: ignore[arg-type]


def test_b_moves_faster_by_the_ratio() -> None:
    _, method = tuned("lora", rate_ratio=16.0)
    optimiser = make_optimiser(method.trainable(), OptimiserSpec(weight_decay=0.1), method.rate_factor)
    set_rate(optimiser, 1e-3)
    names = {id(p): n for n, p in method.trainable().items()}
    rates = {names[id(p)]: group["lr"] for group in optimiser.param_groups for p in group["params"]}
    assert len(rates) == len(method.trainable())
    assert all(rate == (16e-3 if ".lora_B." in name else 1e-3) for name, rate in rates.items())


def test_drawn_layers_alone_move_and_leave_no_moments_behind() -> None:
    policy, method = tuned("lora", sampled_layers=1, resample_every=2)
    optimiser = make_optimiser(method.trainable(), OptimiserSpec(), method.rate_factor)
    movement = Movement(policy.model, method.trainable())
    drawn = []
    for step in range(12):
        start = {n: p.detach().clone() for n, p in method.trainable().items()}
        moving = method.at_step(step)
        assert moving == method.at_step(step) and moving is not None
        move_only(optimiser, method.trainable(), moving)
        optimiser.zero_grad()
        accumulate(policy, Sft(SftSpec()), pack(documents(), 1000))
        set_rate(optimiser, 1e-3)
        optimiser.step()
        gate = movement.see(optimiser, moving)
        assert (gate is not None) == (step == 1) and (gate is None or gate.state == "passed")
        changed = {n for n, p in method.trainable().items() if not torch.equal(p, start[n])}
        assert changed == set(moving.names)
        assert {id(p) for p in optimiser.state} == {id(method.trainable()[n]) for n in moving.names}
        drawn.append({layer_number(f".{n}") for n in moving.names})
        with method.disabled():
            pass
        assert {n for n, p in method.trainable().items() if p.requires_grad} == set(moving.names)
    assert all(drawn[i] == drawn[i + 1] for i in range(0, 12, 2)) and len({tuple(d) for d in drawn}) == 2


def test_more_layers_drawn_than_there_are() -> None:
    with pytest.raises(ConfigError, match="1 to 2"):
        attach(tiny_model(), LoraSpec(sampled_layers=3), seed=0)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_every_low_rank_method_draws_layers_where_asked(kind: str) -> None:
    method = attach(tiny_model(), METHOD_SPECS[kind](sampled_layers=1), seed=0)
    moving = method.at_step(0)
    assert moving is not None and 0 < len(moving.names) < len(method.trainable())
    assert attach(tiny_model(), METHOD_SPECS[kind](), seed=0).at_step(0) is None


@pytest.mark.parametrize(("init", "subtracts"), [("eva", False), ("default", False), ("pissa", True)])
def test_the_identity_gate_gives_way_only_where_a_start_is_subtracted(init: str, subtracts: bool) -> None:
    method = attach(tiny_model(), LoraSpec(init=init, rank=4), seed=0)  # type: ignore[arg-type]
    gate = check_identity(calibrated(policy_of(method.model, method), method), method, documents())
    assert gate is not None and gate.state == "passed"
    assert gate.limit == pytest.approx(2e-3 if subtracts else 2e-5)
