"""Every line of the table of methods keeps the contract, on every shape it may meet."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from builders import calibrated, documents, example, in_one_batch, policy_of, tuned
from models import LAYER_NORM_SHAPES, SHAPES, tiny_model
from naive import distance, gradients, naive, naive_loss, redraw
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import DistillConfig, GrpoConfig, PpoConfig, PreferenceConfig, RewardConfig, SftConfig
from rung.config.training import OptimizerConfig
from rung.errors import CheckpointError, ConfigError, PlanError
from rung.methods.protocol import Method
from rung.methods.qlora import quantize
from rung.methods.registry import METHODS, attach_method
from rung.models.bfloat16_storage import compute_in_float32
from rung.models.fused_modules import install_fused_forwards
from rung.models.generate import Sampling, generate
from rung.models.packing import pack, pack_separately
from rung.models.policy import Policy
from rung.objectives.registry import OBJECTIVES, ObjectiveModels, make_objective
from rung.training.gates import check_decoding, check_identity, check_packing, check_trainable, frozen_digest
from rung.training.optimizer import WEIGHTS, OptimizerState, count_trained, make_optimizer, set_learning_rate
from rung.training.step import accumulate, mean_loss
from rung.types import Example
from tolerances import FLOAT32_NATS, FLOAT64

PEFT_TUNERS: list[dict[str, object]] = [
    {"peft_type": "IA3", "feedforward_modules": []},
    {"peft_type": "VERA", "r": 8},
    {"peft_type": "OFT", "oft_block_size": 8, "r": 0},
    {"peft_type": "LOHA", "r": 4},
    {"peft_type": "LOKR", "r": 4},
    {"peft_type": "HRA", "r": 4},
    {"peft_type": "MISS", "r": 4},
]
"""Tuners of peft that the whole suite runs over."""
VARIANTS: list[tuple[str, dict[str, object]]] = [
    ("full", {}),
    ("head", {}),
    ("lora", {}),
    ("lora", {"rslora": True, "rank": 4, "alpha": 5.0}),
    ("lora", {"dora": True, "targets": ("q", "v")}),
    ("lora", {"init": "gaussian", "layers": (1,)}),
    ("lora", {"init": "orthogonal", "rank": 8}),
    ("lora", {"modules_to_save": ("lm_head",), "targets": ("o", "down")}),
    ("lora", {"init": "pissa", "rank": 4}),
    ("lora", {"init": "olora", "rank": 4, "rslora": True, "alpha": 8.0}),
    ("lora", {"init": "eva", "rank": 4}),
    ("lora", {"init": "corda", "rank": 4, "alpha": 3.0}),
    ("lora", {"init": "lora_ga", "rank": 4, "modules_to_save": ("lm_head",)}),
    ("lora", {"rank_pattern": {"down": 4, "1": 2, "1.q": 3}, "rank": 8}),
    ("lora", {"dropout": 0.3, "rank": 4}),
    ("lora", {"lisa_n_layers": 1, "lisa_step_interval": 1, "rank": 4}),
    ("qlora", {}),
    ("qlora", {"bits": 8, "rank": 4, "rslora": True, "layers": (1,)}),
    ("qlora", {"init": "loftq", "rank": 4}),
    ("lottery", {"rank": 4}),
    ("mixture", {"experts": 3, "rank": 4}),
    ("mixture", {"experts": 4, "rank": 2, "top_k": 2, "targets": ("up", "down"), "balance": 0.0}),
    *(("peft", {"config": config}) for config in PEFT_TUNERS),
    ("bottleneck", {"width": 4}),
    ("bottleneck", {"width": 4, "placement": "pfeiffer", "activation": "relu", "layers": (1,)}),
    ("bottleneck", {"width": 4, "placement": "parallel", "activation": "silu", "scale": 4.0}),
    ("prompt", {"virtual_tokens": 3}),
    ("prefix", {"virtual_tokens": 3}),
    ("prefix", {"virtual_tokens": 3, "projection": 6}),
    ("p_tuning", {"virtual_tokens": 3, "hidden": 8}),
    ("p_tuning", {"virtual_tokens": 4, "hidden": 8, "positions": {"front": 2, "user": 1, "assistant": 1}}),
    ("p_tuning", {"virtual_tokens": 3, "encoder": "mlp", "layers": "all"}),
]
NOT_MERGED = {
    "bottleneck": "not linear",
    "mixture": "anew for every token",
    "prompt": "virtual tokens",
    "prefix": "virtual tokens",
    "p_tuning": "virtual tokens",
}
"""Methods that cannot be folded into the base, with a word of the reason."""


def not_for(shape: str, config: dict[str, object]) -> bool:
    """Tuners of peft that know no transposed weights."""
    peft_config: Any = config.get("config", {})
    return shape == "gpt2" and peft_config.get("peft_type") in ("OFT", "LOHA", "LOKR", "HRA", "MISS")


IDS = [
    "-".join([kind, *map(str, config.get("config", config).values() if kind == "peft" else config)])
    for kind, config in VARIANTS
]


each = pytest.mark.parametrize(("kind", "config"), VARIANTS, ids=IDS)
EVERYWHERE = ["llama", "gpt2", "phi3", "gemma2"]
"""Grouped queries and tied embeddings, transposed weights, fused projections, windows and softcaps."""
CELLS = [
    pytest.param(kind, config, shape, id=f"{shape}-{name}")
    for shape in EVERYWHERE
    for (kind, config), name in zip(VARIANTS, IDS, strict=True)
    if not not_for(shape, config)
]
everywhere = pytest.mark.parametrize(("kind", "config", "shape"), CELLS)


def base_of(kind: str, config: dict[str, object], shape: str = "llama") -> Policy:
    """What a method stands on: the model itself, or what quantizing made of it."""
    model = tiny_model(shape)
    if kind == "qlora":
        quantize(model, METHOD_CONFIGS[kind](**config))
    install_fused_forwards(model)
    return policy_of(model)


def beyond_the_window(policy: Policy) -> bool:
    """Whether virtual tokens would leave the five tokens that the tiny Gemma looks back at."""
    return policy.model.config.model_type == "gemma2" and policy.method.kind in ("prompt", "prefix", "p_tuning")


INSIDE, OUTSIDE = 2 * (6 * 32 + 48), 2 * (3 * 32 + 2 * 16 + 2 * 48)
"""Inputs and outputs of all linears of the tiny Llama, added up."""
COUNTS = {
    "IA3": OUTSIDE,  # a factor for each output (Liu et al. 2022, section 3.3)
    "VERA": 8 * 14 + OUTSIDE,  # the vectors d and b (Kopiczko et al. 2024, eq. 2)
    "OFT": INSIDE // 8 * (8 * 7 // 2),  # skew-symmetric blocks (Qiu et al. 2023, section 3.3)
    "LOHA": 2 * 4 * (INSIDE + OUTSIDE),  # two products of rank 4 (Hyeon-Woo et al. 2022, prop. 1)
    "LOKR": 2 * (2 * (16 + 64) + 2 * (16 + 32) + 3 * (24 + 64)),  # 32 = 4 x 8, 16 = 4 x 4, 48 = 6 x 8
    "HRA": 4 * INSIDE,  # a chain of Householder vectors (Yuan et al. 2024, eq. 4)
    "MISS": 4 * OUTSIDE,  # one matrix, repeated (Kang and Yin 2024)
}


@pytest.mark.parametrize("config", PEFT_TUNERS, ids=str)
def test_peft_trains_as_many_numbers_as_the_papers_say(config: dict[str, object]) -> None:
    method = attach_method(tiny_model(), METHOD_CONFIGS["peft"](config=config), seed=3)
    assert sum(p.numel() for p in method.trainable().values()) == COUNTS[str(config["peft_type"])]


def test_every_method_has_a_variant_here_and_a_spec() -> None:
    assert set(METHODS) == set(METHOD_CONFIGS) == {kind for kind, _ in VARIANTS}


@everywhere
def test_starts_as_the_base_and_declares_what_moves(kind: str, config: dict[str, object], shape: str) -> None:
    examples = documents()
    before = base_of(kind, config, shape).logprobs(pack(examples, 10_000)[0])
    model = tiny_model(shape)
    method = attach_method(model, METHOD_CONFIGS[kind](**config), seed=3)
    policy = calibrated(policy_of(model, method), method)
    difference = (policy.logprobs(pack(examples, 10_000)[0]) - before).abs().max()
    assert (difference < FLOAT32_NATS) == method.starts_as_base
    assert (
        check_trainable(method, count_trained(make_optimizer(method.trainable(), OptimizerConfig()))).state == "passed"
    )
    gate = check_identity(policy, method, in_one_batch(examples))
    assert (gate is None) == (method.artifact == "model" or not method.starts_as_base)
    assert gate is None or gate.state == "passed"


@everywhere
def test_two_steps_move_what_is_declared_and_nothing_else(kind: str, config: dict[str, object], shape: str) -> None:
    model = tiny_model(shape)
    method = attach_method(model, METHOD_CONFIGS[kind](**config), seed=3)
    policy = calibrated(policy_of(model, method), method)
    optimizer = make_optimizer(method.trainable(), OptimizerConfig())
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[-1]["lr"] = 1e-2
    frozen, start = frozen_digest(model), {n: p.detach().clone() for n, p in method.trainable().items()}
    objective = OBJECTIVES["sft"](SftConfig())
    for _ in range(2):
        optimizer.zero_grad()
        accumulate(policy, objective, pack(documents(shared=17), 10_000))
        optimizer.step()
    assert frozen_digest(model) == frozen
    still = [n for n, p in method.trainable().items() if torch.equal(p, start[n])]
    assert still == []


@everywhere
def test_saved_files_give_the_same_model_again(
    kind: str, config: dict[str, object], shape: str, tmp_path: Path
) -> None:
    batch = pack(documents(), 10_000)[0]
    policy, method = tuned(kind, shape, **config)
    method.save(tmp_path / "saved")
    model = tiny_model(shape)
    again = attach_method(model, METHOD_CONFIGS[kind](**config), seed=99)
    other = policy_of(model, again)
    assert not torch.equal(other.logprobs(batch), policy.logprobs(batch))
    again.load(tmp_path / "saved")
    assert torch.equal(other.logprobs(batch), policy.logprobs(batch))


@everywhere
def test_trained_numbers_change_reading_and_answering(kind: str, config: dict[str, object], shape: str) -> None:
    batch = pack(documents(), 10_000)[0]
    policy, method = tuned(kind, shape, **config)
    before = policy.logprobs(batch)
    if beyond_the_window(policy):
        with pytest.raises(PlanError, match="sliding window"):
            generate(policy, [[5, 6, 7]], stop_ids=[], sampling=Sampling(6))
        return
    answers = [a.logprobs for a in generate(policy, [[5, 6, 7]], stop_ids=[], sampling=Sampling(6))]
    with torch.no_grad():
        for parameter in method.trainable().values():
            parameter.copy_(parameter.flatten().flip(0).view_as(parameter))
    assert (policy.logprobs(batch) - before).abs().max() > 1e-3
    assert [a.logprobs for a in generate(policy, [[5, 6, 7]], stop_ids=[], sampling=Sampling(6))] != answers


@pytest.mark.parametrize(
    ("kind", "config"), [v for v in VARIANTS if v[0] != "full"], ids=[i for i in IDS if i != "full"]
)
def test_switching_off_gives_the_base_bit_for_bit(kind: str, config: dict[str, object]) -> None:
    batch = pack(documents(), 10_000)[0]
    base = base_of(kind, config).logprobs(batch)
    policy, _ = tuned(kind, **config)
    tuned_once = policy.logprobs(batch)
    for _ in range(50):
        assert torch.equal(policy.reference_logprobs(batch), base)
    assert torch.equal(policy.logprobs(batch), tuned_once) and not torch.equal(tuned_once, base)


@everywhere
def test_merged_equals_unmerged_after_a_reload_by_transformers(
    kind: str, config: dict[str, object], shape: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    batch = pack(documents(), 10_000, share_prefixes=False)[0]
    policy, method = tuned(kind, shape, **config)
    before = policy.logprobs(batch).detach()
    if reason := NOT_MERGED.get(kind):
        with pytest.raises(PlanError, match=reason):
            method.merge()
        return
    method.merge().save_pretrained(tmp_path)  # type: ignore[operator]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="rung").eval()
    assert type(plain).__name__ == type(policy.model).__name__
    limit = 2 * FLOAT32_NATS if shape == "gemma2" else FLOAT32_NATS  # its embeddings are sqrt(H) times as large
    assert (policy_of(plain).logprobs(batch) - before).abs().max() < limit


@pytest.mark.parametrize(
    "config",
    [
        {"rslora": True},
        {"init": "pissa"},
        {"init": "lora_ga", "rslora": True},
        {"init": "corda", "rank_pattern": {"q": 2}},
        {"init": "olora", "alpha": 3.0, "rank_pattern": {"1": 2}},
    ],
    ids=str,
)
def test_lora_loads_in_plain_peft(config: dict[str, object], tmp_path: Path) -> None:
    from peft import PeftModel

    policy, method = tuned("lora", **{"rank": 4, **config})
    method.save(tmp_path)
    plain = tiny_model()
    plain.set_attn_implementation("eager")
    theirs = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    row = torch.tensor([[5, 6, 7, 8, 9]])
    ours = policy.model(row, use_cache=False).logits
    assert (theirs(row, use_cache=False).logits - ours).abs().max() < FLOAT32_NATS


FIRST = {kind: config for kind, config in reversed(VARIANTS)}
"""One variant of each method."""


@pytest.mark.parametrize("kind", METHODS)
def test_state_round_trip_and_foreign_state(kind: str, tmp_path: Path) -> None:
    _, method = tuned(kind, **FIRST[kind])
    state = {n: v.detach().clone() for n, v in method.trainable().items()}
    held(method).save(tmp_path)
    _, other = tuned(kind, **FIRST[kind])
    with torch.no_grad():
        for parameter in other.trainable().values():
            parameter.zero_()
    into = held(other)
    into.load(tmp_path)
    assert all(torch.equal(v, state[n]) for n, v in other.trainable().items())
    name = next(iter(state))
    saved = load_file(tmp_path / WEIGHTS)
    save_file({("renamed" if n == name else n): v for n, v in saved.items()}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="1 missing, 1 left over"):
        into.load(tmp_path)
    save_file({**saved, name: saved[name][:1].contiguous()}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="another shape"):
        into.load(tmp_path)


def held(method: Method) -> OptimizerState:
    return OptimizerState(method.trainable, OptimizerConfig(), method.learning_rate_factor)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_finds_its_targets_by_structure(shape: str) -> None:
    model = tiny_model(shape)
    method = attach_method(model, METHOD_CONFIGS["lora"](targets=("q", "o", "down")), seed=0)
    layers = {n.split(".lora_")[0] for n in method.trainable()}
    assert len(layers) == 3 * 2
    assert not any("lm_head" in n or "embed" in n for n in layers)


def test_wrong_targets_layers_and_modules_are_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"allowed: .*q"):
        attach_method(tiny_model("gpt2"), METHOD_CONFIGS["lora"](targets=("gate",)), seed=0)
    with pytest.raises(ConfigError, match="0 to 1"):
        attach_method(tiny_model(), METHOD_CONFIGS["lora"](layers=(0, 7)), seed=0)
    with pytest.raises(ConfigError, match="no such module"):
        attach_method(tiny_model(), METHOD_CONFIGS["lora"](modules_to_save=("head",)), seed=0)
    with pytest.raises(ConfigError, match="method.init"):
        attach_method(tiny_model(), METHOD_CONFIGS["lora"](init="orthogonal", rank=3), seed=0)


def test_full_in_bfloat16_trains_in_float32() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    method = attach_method(model, METHOD_CONFIGS["full"](), seed=0)
    assert {p.dtype for p in method.trainable().values()} == {torch.float32}


def test_full_widens_a_base_whose_embeddings_alone_are_wide() -> None:
    """As those of Gemma 3 are: they multiply by a number of their own, which a narrow table would round."""
    model = tiny_model("gemma3_text", dtype=torch.bfloat16)
    compute_in_float32(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    method = attach_method(model, METHOD_CONFIGS["full"](), seed=0)
    assert {p.dtype for p in method.trainable().values()} == {torch.float32}


@each
def test_bfloat16_compute_gives_nearly_the_gradient_of_float32(
    kind: str, config: dict[str, object], tmp_path: Path
) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(dtype=dtype)
        method = attach_method(model, METHOD_CONFIGS[kind](**config), seed=3)
        policy = calibrated(policy_of(model, method, compute=dtype), method)
        if dtype is torch.float32:
            method.save(tmp_path)
        elif config.get("init") is not None:
            method.load(tmp_path)  # singular vectors read off rounded numbers are others
        assert all(p.dtype is torch.float32 for p in method.trainable().values())
        accumulate(policy, OBJECTIVES["sft"](SftConfig()), pack(documents(shared=17), 10_000))
        found.append(torch.cat([p.grad.flatten() for p in method.trainable().values() if p.grad is not None]))
    exact, low = found
    # bfloat16 keeps 8 bits of mantissa; what is chosen by it (a level, an expert) may be another
    limit = 0.2 if kind == "qlora" or "top_k" in config else 0.05
    assert (exact - low).norm() / exact.norm() < limit


@everywhere
def test_packed_equals_unpacked_and_said_equals_read(kind: str, config: dict[str, object], shape: str) -> None:
    policy, _ = tuned(kind, shape, **config)
    assert check_packing(policy, in_one_batch(documents(shared=18))).state == "passed"
    if beyond_the_window(policy):
        with pytest.raises(PlanError, match="sliding window"):
            check_decoding(policy, documents())
        return
    assert check_decoding(policy, documents()).state == "passed"


PLAIN = [(kind, config) for kind, config in VARIANTS if kind not in ("prompt", "prefix", "p_tuning")]
"""Methods that a model without Rung's engine can run; virtual tokens have oracles of their own."""


@pytest.mark.parametrize("shape", ["phi", "llama", "gpt2", "phi3"])
@pytest.mark.parametrize(("kind", "config"), PLAIN, ids=[i for i, v in zip(IDS, VARIANTS, strict=True) if v in PLAIN])
def test_gradients_are_those_of_one_document_at_a_time(
    kind: str, config: dict[str, object], shape: str, tmp_path: Path
) -> None:
    """Packed, shared and fused against transformers' and peft's own forward, from one start where it is read off."""
    if not_for(shape, config):
        return  # refused, as another test asks for
    exact = kind not in ("qlora", "peft")  # which compute in float32 whatever they are given
    dtype, examples = torch.float64 if exact else torch.float32, documents(3, count=5, shared=20)
    start = None
    if config.get("init") in ("eva", "corda", "lora_ga", "pissa", "olora"):
        first = tiny_model(shape, dtype=dtype)
        begun = attach_method(first, METHOD_CONFIGS[kind](**config), seed=0)
        calibrated(policy_of(first, begun), begun)
        begun.save(tmp_path)
        start = tmp_path
    wide = exact and shape not in LAYER_NORM_SHAPES
    theirs, their_method = naive(kind, shape, dtype=dtype, wide_norms=wide, start=start, **config)
    naive_loss(theirs, examples)
    model = tiny_model(shape, dtype=dtype)
    method = attach_method(model, METHOD_CONFIGS[kind](**config), seed=0)
    if start is not None:
        method.load(start)
    redraw(method)
    share = method.prefix_sharing_blocker() is None
    accumulate(policy_of(model, method), OBJECTIVES["sft"](SftConfig()), pack(examples, 60, share_prefixes=share))
    assert distance(gradients(method), gradients(their_method)) < (FLOAT64 if exact else 1e-4)


def test_a_fresh_process_gives_the_same_model(tmp_path: Path) -> None:
    """Every variant saved here and loaded there, in one process for all of them."""
    batch, expected = pack(documents(), 10_000)[0], {}
    for number, (kind, config) in enumerate(VARIANTS):
        policy, method = tuned(kind, **config)
        method.save(tmp_path / str(number))
        expected[str(number)] = policy.logprobs(batch).detach()
    script = (
        "import sys; from pathlib import Path\n"
        "from safetensors.torch import save_file\n"
        "from test_methods import *\n"
        "folder, found, batch = Path(sys.argv[1]), {}, pack(documents(), 10_000)[0]\n"
        "for number, (kind, config) in enumerate(VARIANTS):\n"
        "    method = attach_method(tiny_model(), METHOD_CONFIGS[kind](**config), seed=5)\n"
        "    method.load(folder / str(number))\n"
        "    found[str(number)] = policy_of(method.model, method).logprobs(batch).detach()\n"
        "save_file(found, folder / 'found.safetensors')\n"
    )
    path = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, env={**os.environ, "PYTHONPATH": path})
    found = load_file(tmp_path / "found.safetensors")
    assert [IDS[int(n)] for n, value in expected.items() if not torch.equal(found[n], value)] == []


def test_a_method_is_ready_to_answer_once_it_is_attached() -> None:
    """Modules that peft makes begin in training mode, with their dropout on."""
    _, method = tuned("lora", dropout=0.5)
    dropouts = [m for m in method.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts and not any(m.training for m in dropouts)


@pytest.mark.parametrize("kind", METHODS)
def test_tensors_of_another_shape_are_refused(kind: str, tmp_path: Path) -> None:
    """Copying would stretch one row over all."""
    _, method = tuned(kind, **FIRST[kind])
    method.save(tmp_path)
    file = max(tmp_path.rglob("*.safetensors"))
    state = load_file(file)
    name = next(name for name in sorted(state) if state[name].shape[0] > 1)
    save_file({**state, name: state[name][:1].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="another shape"):
        method.load(tmp_path)


def test_trained_tokens_where_the_head_is_its_own() -> None:
    """Under a tied head they are refused; elsewhere the loss is that of peft's forward."""
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": list(range(3, 60))}
    with pytest.raises(ConfigError, match="past the tuner"):
        attach_method(tiny_model("llama"), METHOD_CONFIGS["peft"](config=config), seed=0)
    policy, _ = tuned("peft", "qwen2", config=config)
    ids = [5, 6, 7, 100, 20, 44]
    ours = policy.logprobs(pack_separately([example(ids, 2)])[0]).detach()
    policy.model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = policy.model(torch.tensor([ids]), use_cache=False).logits[0]
    theirs = logits.log_softmax(-1)[1:5].gather(1, torch.tensor(ids[2:])[:, None])[:, 0]
    assert (ours - theirs).abs().max() < FLOAT32_NATS


def test_tuners_that_find_nothing_or_lack_a_setting_are_refused() -> None:
    with pytest.raises(ConfigError, match="could train"):
        attach_method(tiny_model("gpt2"), METHOD_CONFIGS["peft"](config={"peft_type": "OSF"}), seed=0)
    with pytest.raises(ConfigError, match="does not take this config"):
        attach_method(tiny_model(), METHOD_CONFIGS["peft"](config={"peft_type": "ADAPTION_PROMPT"}), seed=0)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("lora", {"lisa_step_interval": 5}),
        ("lora", {"init_examples": 5}),
        ("lora", {"init": "pissa", "init_examples": 5}),
        ("lottery", {"init_examples": 5}),
        ("qlora", {"bits": 8, "double_quant": False}),
        ("peft", {"config": {"peft_type": "LN_TUNING"}, "layers": (1,)}),
        ("peft", {"config": {"peft_type": "IA3", "target_modules": ["q_proj"]}, "targets": ("q",)}),
    ],
    ids=str,
)
def test_settings_that_nothing_would_read_are_refused(kind: str, config: dict[str, object]) -> None:
    with pytest.raises((ValidationError, ConfigError), match="nothing"):
        attach_method(tiny_model(), METHOD_CONFIGS[kind](**config), seed=0)


def test_modules_trained_whole_are_those_named_and_no_others() -> None:
    """peft takes a bare name for every module whose name ends with it."""
    model = tiny_model()
    method = attach_method(model, METHOD_CONFIGS["lora"](modules_to_save=("norm",), rank=2), seed=0)
    assert method.declared_parameters() == sum(p.numel() for p in method.trainable().values())
    assert [n for n in method.trainable() if "lora_" not in n] == ["model.norm.modules_to_save.default.weight"]


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p_tuning"])
def test_as_many_virtual_tokens_as_there_may_be(kind: str, tmp_path: Path) -> None:
    policy, method = tuned(kind, virtual_tokens=500)
    assert method.virtual_tokens == 500
    assert check_packing(policy, in_one_batch(documents(shared=17))).state == "passed"
    assert check_decoding(policy, documents()).state == "passed"
    method.save(tmp_path)
    again = attach_method(tiny_model(), METHOD_CONFIGS[kind](virtual_tokens=500), seed=99)
    again.load(tmp_path)
    batch = pack(documents(), 10_000)[0]
    assert torch.equal(policy_of(again.model, again).logprobs(batch), policy.logprobs(batch))
    with pytest.raises(ValidationError, match="500"):
        METHOD_CONFIGS[kind](virtual_tokens=501)


def test_a_loftq_rank_that_a_matrix_has_not() -> None:
    with pytest.raises(ConfigError, match=r"method\.rank"):
        attach_method(tiny_model(), METHOD_CONFIGS["qlora"](init="loftq", rank=64), seed=0)


OBJECTIVE_CONFIGS: dict[str, Any] = {
    "sft": SftConfig(),
    "preference": PreferenceConfig(loss="dpo", sft=0.1),
    "reward": RewardConfig(margin=0.1, center_rewards_coefficient=0.01),
    "grpo": GrpoConfig(reward={"kind": "exact"}),
    "ppo": PpoConfig(reward={"kind": "exact"}),
    "distill": DistillConfig(teacher="another", divergence="jsd", temperature=2.0, cross_entropy=0.1, cosine=0.1),
}


def test_every_objective_has_a_spec_here() -> None:
    assert set(OBJECTIVE_CONFIGS) == set(OBJECTIVES)


@torch.no_grad()
def _columns(policy: Policy, e: Example, place: int) -> dict[str, np.ndarray]:
    """Of an answer that the policy made itself: every other one was better than the rest."""
    own = policy.logprobs(pack_separately([e])[0]).numpy()
    flat = np.full(e.predictions, (-1.0) ** place)
    return {"old": own, "reference": own - 0.1, "advantage": flat, "values": 0.0 * flat, "returns": flat}


@pytest.mark.parametrize("objective", OBJECTIVES)
@each
def test_one_step_with_every_objective(kind: str, config: dict[str, object], objective: str) -> None:
    """Whatever moves and whatever is minimized: a step lowers the loss of its own documents."""
    policy, method = tuned(kind, **config)
    minimized = make_objective(OBJECTIVE_CONFIGS[objective], ObjectiveModels(teacher=policy_of(tiny_model(seed=5))))
    minimized.begin(policy, 0)
    if kind == "head" and not minimized.reads_head:
        with pytest.raises(PlanError, match="does not read it"):
            method.freeze_output_head()
        return
    examples = documents(5, count=6, shared=17)
    if minimized.compares_answers:
        examples = [replace(e, row=i // 2, score=float(i % 2)) for i, e in enumerate(examples)]
        policy.reference = policy_of(tiny_model()) if method.artifact == "model" else None
    if minimized.rollout is not None:
        examples = [replace(e, columns=_columns(policy, e, i)) for i, e in enumerate(examples)]
    batches = pack(examples, 80)
    optimizer = make_optimizer({**method.trainable(), **minimized.trainable()}, OptimizerConfig())
    set_learning_rate(optimizer, 1e-4)
    before = accumulate(policy, minimized, batches)
    optimizer.step()
    assert mean_loss(policy, minimized, batches) < float(before.detach())
