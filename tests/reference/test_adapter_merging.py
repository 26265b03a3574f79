"""Fusing adapters, against the sum written out in numpy and against models that hold it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from builders import documents, policy_of, tuned
from models import tiny_model
from rung.errors import CheckpointError
from rung.exporting.weights import read_updates
from rung.methods.adapter_merging import (
    LowRankFactors,
    combine,
    concatenate,
    drop_and_rescale,
    lora_factors,
    ties,
    trim,
    truncate,
    truncate_product,
)
from rung.methods.lora import without_peft_warnings
from rung.models.packing import pack_separately

KINDS = [
    {"rank": 4},
    {"rank": 8, "alpha": 5.0, "rslora": True},
    {"rank": 4, "rank_pattern": {"down": 2}, "layers": (1,)},
    {"rank": 4, "init": "pissa"},
]


def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def saved(folder: Path, config: dict[str, object]) -> dict[str, LowRankFactors]:
    _, method = tuned("lora", **config)
    method.save(folder)
    peft_config = json.loads((folder / "adapter_config.json").read_text())
    return lora_factors(load_file(folder / "adapter_model.safetensors"), peft_config, str(folder))


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_the_updates_of_a_file_are_those_of_the_model(config: dict[str, object], tmp_path: Path) -> None:
    """The base plus every update is the tuned model: scales, patterns and frozen halves are in them."""
    policy, _ = tuned("lora", **config)
    updates = saved(tmp_path, config)
    plain = tiny_model()
    for name, factors in updates.items():
        plain.get_submodule(name).weight.data += factors.dense
    batch = pack_separately(documents(1, count=1))[0]
    assert (policy_of(plain).logprobs(batch) - policy.logprobs(batch)).abs().max() < 2e-5


def with_patterns(folder: Path, *, rslora: bool = False, **patterns: dict[str, int]) -> PeftModel:
    """A LoRA that peft made and saved, B not zero."""
    targets = ["q_proj", "v_proj", "down_proj"]
    settings = PeftLoraConfig(r=4, lora_alpha=16, target_modules=targets, use_rslora=rslora, **patterns)
    model = without_peft_warnings(get_peft_model, tiny_model(), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random()))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_with_overlapping_names_are_read_as_peft_reads_them(rslora: bool, tmp_path: Path) -> None:
    """A key is a regular expression for the end of a name, and the first that matches counts, for whoever reads it."""
    model = with_patterns(
        tmp_path,
        rslora=rslora,
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 8, r"layers\.[01]\.mlp\.down_proj": 6, "q_proj": 2},
        alpha_pattern={r"layers\.0.*\.q_proj": 5, r"layers\.[01]\.mlp\.down_proj": 3, "q_proj": 40},
    )
    state = load_file(tmp_path / "adapter_model.safetensors")
    factors = lora_factors(state, json.loads((tmp_path / "adapter_config.json").read_text()), str(tmp_path))
    updates = read_updates(tmp_path)
    assert factors.keys() == updates.keys() and len(updates) == 6
    for module, update in updates.items():
        expected = model.base_model.model.get_submodule(module).get_delta_weight("default").detach()
        assert (factors[module].dense - expected).abs().max() < 1e-5, module
        assert (update.scale * update.first @ update.second - expected).abs().max() < 1e-5, module
    ranks = {module: len(update.second) for module, update in updates.items()}
    assert ranks["model.layers.1.self_attn.q_proj"] == 8 and ranks["model.layers.0.self_attn.q_proj"] == 2


def test_patterns_that_lost_their_order_are_refused_as_peft_refuses_them(tmp_path: Path) -> None:
    """peft sorts the keys when it saves: what was the second key is the first, and names another rank than was used."""
    with_patterns(tmp_path, rank_pattern={"q_proj": 2, r"layers\.1\.self_attn\.q_proj": 8})
    state = load_file(tmp_path / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(settings["rank_pattern"])[0].startswith("layers")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    with pytest.raises(CheckpointError, match="of another rank"):
        lora_factors(state, settings, str(tmp_path))
    with pytest.raises(CheckpointError, match="of another rank"):
        read_updates(tmp_path)


def test_concatenation_is_the_exact_sum_where_peft_is_not(tmp_path: Path) -> None:
    """Different ranks, rsLoRA on one side: peft keeps use_rslora and scales the sum again."""
    weights = [0.7, -0.4]
    updates = [saved(tmp_path / str(i), config) for i, config in enumerate(KINDS[:2])]
    for name in updates[0]:
        fused = concatenate([u[name] for u in updates], weights)
        expected = 0.7 * updates[0][name].dense - 0.4 * updates[1][name].dense
        assert len(fused.a_RI) == 12 and (fused.dense - expected).abs().max() < 1e-6
    model = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "1"), adapter_name="second")
    model.load_adapter(str(tmp_path / "0"), adapter_name="first")
    model.add_weighted_adapter(["second", "first"], weights[::-1], "both", combination_type="cat")
    layer = model.get_submodule(f"base_model.model.{name}")
    assert (layer.get_delta_weight("both") - expected).abs().max() > 1e-3


def test_trimming_keeps_the_largest() -> None:
    update = draw(7, 11)
    kept = trim(update, 0.3)
    order = np.sort(np.abs(update.numpy()).ravel())[::-1]
    assert int((kept != 0).sum()) == round(0.3 * 77)
    assert np.array_equal(np.sort(np.abs(kept.numpy()[kept.numpy() != 0]))[::-1], order[: round(0.3 * 77)])
    assert torch.equal(trim(update, 1.0), update)


def test_ties_against_the_algorithm_entry_by_entry() -> None:
    updates = [trim(draw(5, 6) * (i + 1) * (-1) ** i + draw(6, 5).T, 0.6) for i in range(3)]
    found = ties(updates)
    for r in range(5):
        for c in range(6):
            values = [float(u[r, c]) for u in updates]
            sign = np.sign(sum(values))
            agreeing = [v for v in values if sign and np.sign(v) == sign]
            assert float(found[r, c]) == pytest.approx(np.mean(agreeing) if agreeing else 0.0, abs=1e-12)


def test_dropping_keeps_the_expectation_and_the_seed() -> None:
    update = torch.ones(400, 400, dtype=torch.float64)
    found = drop_and_rescale(update, 0.2, random())
    assert set(found.unique().tolist()) == {0.0, 5.0} and float(found.mean()) == pytest.approx(1.0, abs=0.03)
    assert torch.equal(found, drop_and_rescale(update, 0.2, random()))


@pytest.mark.parametrize("how", ["sum", "ties", "dare", "magnitude"])
def test_everything_kept_of_one_is_that_one(how: str) -> None:
    update = draw(6, 9)
    assert (combine([update], [1.0], how, density=1.0, generator=random()) - update).abs().max() < 1e-12  # type: ignore[arg-type]


def test_a_stated_rank_loses_what_it_says() -> None:
    factors = LowRankFactors(draw(20, 8), draw(8, 30))
    singular = np.linalg.svd(factors.dense.numpy(), compute_uv=False)
    for rank in (1, 3, 8):
        expected = np.linalg.norm(singular[rank:]) / np.linalg.norm(singular)
        for found in (truncate(factors.dense, rank), truncate_product(factors, rank)):
            assert found.lost == pytest.approx(expected, abs=1e-7)
            error = (found.factors.dense - factors.dense).norm() / factors.dense.norm()
            assert float(error) == pytest.approx(expected, abs=1e-7) and len(found.factors.a_RI) == rank
    assert truncate(torch.zeros(3, 4), 2).lost == 0.0


@pytest.mark.parametrize("config", [{"dora": True}, {"modules_to_save": ("lm_head",)}], ids=str)
def test_what_cannot_be_fused_is_refused(config: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="fused"):
        saved(tmp_path, config)
