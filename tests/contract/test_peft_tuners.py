"""What holds of every tuner that peft has: the table of docs/methods/peft.md is the one below."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType

from builders import documents, in_one_batch, policy_of, tuned
from models import tiny_model
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import SftConfig
from rung.errors import ConfigError, PlanError
from rung.methods.peft_tuner import OWN_METHODS, REFUSED
from rung.methods.registry import attach_method
from rung.models.fused_modules import install_fused_forwards
from rung.models.packing import pack
from rung.objectives.sft import SftObjective
from rung.training.gates import check_decoding, check_packing, frozen_digest
from rung.training.step import accumulate
from tolerances import FLOAT32_NATS

PAGE = Path(__file__).parents[2] / "docs/methods/peft.md"


@dataclass(frozen=True)
class Tuner:
    """What is said of one."""

    settings: dict[str, Any]
    """Beside its name, such that it fits a model of width 32."""
    starts: bool = True
    """As its base."""
    folds: bool = True
    """Into it."""
    transposed: bool = True
    """Takes GPT-2's weights."""


TUNERS = {
    "ADAPTION_PROMPT": Tuner({"adapter_len": 3, "adapter_layers": 2}, folds=False),
    "BEFT": Tuner({}, folds=False, transposed=False),
    "BOFT": Tuner({"boft_block_size": 4}, transposed=False),
    "C3A": Tuner({"block_size": 8}, starts=False, transposed=False),
    "DEFT": Tuner({}),
    "DELORA": Tuner({}, transposed=False),
    "FOURIERFT": Tuner({"n_frequency": 10}, starts=False),
    "FROD": Tuner({}),
    "GLORA": Tuner({}, transposed=False),
    "GRALORA": Tuner({"r": 4, "gralora_k": 2}),
    "HIRA": Tuner({}),
    "HRA": Tuner({"r": 4}, transposed=False),
    "IA3": Tuner({"feedforward_modules": []}),
    "LN_TUNING": Tuner({}),
    "LOHA": Tuner({"r": 4}, transposed=False),
    "LOKR": Tuner({"r": 4}, transposed=False),
    "MISS": Tuner({"r": 4}, transposed=False),
    "OFT": Tuner({"oft_block_size": 8, "r": 0}, transposed=False),
    "OSF": Tuner({}, transposed=False),
    "PEANUT": Tuner({}, transposed=False),
    "PSOFT": Tuner({"r": 4}, transposed=False),
    "PVERA": Tuner({}),
    "RANDLORA": Tuner({"r": 4}),
    "ROAD": Tuner({"group_size": 8}, transposed=False),
    "SHIRA": Tuner({"r": 4}, transposed=False),
    "SUPERTUNING": Tuner({}, transposed=False),
    "TINYLORA": Tuner({}),
    "UNILORA": Tuner({}, starts=False),
    "VBLORA": Tuner({"num_vectors": 16, "vector_length": 8}, starts=False),
    "VERA": Tuner({"r": 8}),
    "WAVEFT": Tuner({"n_frequency": 10}),
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
"""Which some tuners raise about themselves: norms are no linears, there is no CUDA extension."""
each = pytest.mark.parametrize("kind", TUNERS)


def config_of(kind: str) -> dict[str, Any]:
    return {"peft_type": kind, **TUNERS[kind].settings}


def test_every_tuner_of_peft_is_in_one_place() -> None:
    """Trained tokens depend on the base's head, and have a test of their own."""
    places = [*TUNERS, *OWN_METHODS, *REFUSED, "TRAINABLE_TOKENS"]
    assert sorted(places) == sorted(PeftType.__members__)


@each
def test_a_tuner_keeps_the_contract(kind: str, tmp_path: Path) -> None:
    said, config, batch = TUNERS[kind], config_of(kind), pack(documents(), 10_000)[0]
    model = tiny_model()
    install_fused_forwards(model)
    base = policy_of(model).logprobs(batch)
    plain = attach_method(tiny_model(), METHOD_CONFIGS["peft"](config=config), seed=3)
    started = policy_of(plain.model, plain)
    assert bool((started.logprobs(batch) - base).abs().max() < FLOAT32_NATS) == said.starts
    frozen = frozen_digest(plain.model)
    accumulate(started, SftObjective(SftConfig()), pack(documents(shared=17), 10_000))
    assert frozen_digest(plain.model) == frozen
    assert all(p.grad is not None for p in plain.trainable().values())
    assert any(bool(p.grad.any()) for p in plain.trainable().values() if p.grad is not None)

    policy, method = tuned("peft", config=config)
    tuned_once = policy.logprobs(batch).detach()
    assert (tuned_once - base).abs().max() > 1e-3
    assert torch.equal(policy.reference_logprobs(batch), base)
    assert check_packing(policy, in_one_batch(documents(shared=17))).state == "passed"
    assert check_decoding(policy, documents()).state == "passed"
    method.save(tmp_path / "saved")
    again = attach_method(tiny_model(), METHOD_CONFIGS["peft"](config=config), seed=99)
    again.load(tmp_path / "saved")
    assert torch.equal(policy_of(again.model, again).logprobs(batch), tuned_once)
    if not said.folds:
        with pytest.raises(PlanError, match="cannot fold"):
            method.merge()
        return
    limit = 5 * FLOAT32_NATS  # RandLoRA and FourierFT add up hundreds of terms in another order when they fold
    assert (policy_of(method.merge()).logprobs(batch) - tuned_once).abs().max() < limit


@each
def test_transposed_weights_are_taken_or_refused(kind: str) -> None:
    if not TUNERS[kind].transposed:
        with pytest.raises(ConfigError, match="Conv1D|could train"):
            attach_method(tiny_model("gpt2"), METHOD_CONFIGS["peft"](config=config_of(kind)), seed=3)
        return
    model, batch = tiny_model("gpt2"), pack(documents(), 10_000)[0]
    install_fused_forwards(model)
    policy, _ = tuned("peft", "gpt2", config=config_of(kind))
    assert not torch.equal(policy.logprobs(batch), policy_of(model).logprobs(batch))
    assert check_packing(policy, in_one_batch(documents(shared=17))).state == "passed"


@pytest.mark.parametrize("kind", REFUSED)
def test_tuners_that_would_train_as_something_else_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError) as refused:
        attach_method(tiny_model(), METHOD_CONFIGS["peft"](config={"peft_type": kind}), seed=0)
    assert REFUSED[kind] in str(refused.value)


def test_the_page_says_what_was_tested() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \| (yes|no) \| (yes|no) \|$", PAGE.read_text(), re.MULTILINE)
    said = {kind: tuple(word == "yes" for word in words) for kind, *words in rows}
    assert said == {kind: (t.starts, t.folds, t.transposed) for kind, t in TUNERS.items()}
