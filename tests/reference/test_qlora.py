"""Four and eight bits: against the levels written out, and what a quantized base must not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast

from builders import documents, in_one_batch, policy_of, tuned
from models import tiny_model
from naive import distance, gradients
from rung.config.method import LoraConfig, QloraConfig
from rung.config.model import ModelConfig
from rung.config.objective import SftConfig
from rung.config.run import RunConfig
from rung.config.training import OptimizerConfig
from rung.methods.lora import Lora
from rung.methods.qlora import dense_weight, dequantize_base, is_quantized, quantized_tensors
from rung.methods.registry import attach_method
from rung.models.fused_modules import original_forwards
from rung.models.load import load_base
from rung.models.packing import pack, pack_separately
from rung.models.policy import NoMethod, Policy
from rung.models.streaming import layer_linears, placement_of
from rung.objectives.sft import SftObjective
from rung.runs import load
from rung.training.fsdp import digests
from rung.training.gates import check_decoding, check_identity, check_packing, frozen_digest
from rung.training.optimizer import make_optimizer, set_learning_rate
from rung.training.step import accumulate
from tolerances import FLOAT32

SFT = SftObjective(SftConfig())
LEVELS = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
LEVELS += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def qlora(shape: str = "llama", **config: object) -> tuple[Policy, Lora]:
    model = tiny_model(shape, **WIDE)
    method = attach_method(model, QloraConfig(**config), seed=0)
    with torch.no_grad():
        for parameter in method.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return policy_of(model, method), method


def nf4(weight: Tensor) -> Tensor:
    """Nearest level times the largest of its block of 64 (Dettmers et al. 2023, section 3), scales not quantized."""
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(LEVELS)
    nearest = ((blocks / largest)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * largest).view_as(weight)


def quantized(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_quantized(module)]


def test_the_base_holds_the_levels_of_nf4() -> None:
    original = tiny_model(**WIDE)
    _, method = qlora(double_quant=False)
    assert len(quantized(method.model)) == 14
    for name in method.names:
        weight = original.get_submodule(name).weight
        assert (dense_weight(method.model.get_submodule(name).base_layer) - nf4(weight)).abs().max() < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", ["llama", "phi"])
def test_it_is_lora_on_the_dequantized_base(bits: int, shape: str) -> None:
    examples = documents()
    policy, method = qlora(shape, bits=bits)
    assert frozen_digest(policy.model)
    plain = tiny_model(shape, **WIDE)
    for name in method.names:
        plain.get_submodule(name).weight.data = dense_weight(method.model.get_submodule(name).base_layer)
    lora = attach_method(plain, LoraConfig(), seed=0)
    with torch.no_grad():
        for ours, theirs in zip(lora.trainable().values(), method.trainable().values(), strict=True):
            ours.copy_(theirs)
    reference = policy_of(plain, lora)
    batch = pack(examples, 10_000)[0]
    limit = 1e-4 if bits == 4 else 5e-2  # int8 products round their inputs as well
    assert (policy.logprobs(batch) - reference.logprobs(batch)).abs().max() < limit
    accumulate(policy, SFT, pack(examples, 50))
    accumulate(reference, SFT, pack(examples, 50))
    assert distance(gradients(method), gradients(lora)) < (1e-3 if bits == 4 else 0.1)


@pytest.mark.parametrize("targets", [("q", "k", "v", "o", "gate", "up", "down"), ("q", "down")])
def test_fused_products_are_those_of_bitsandbytes_and_peft(targets: tuple[str, ...]) -> None:
    """A matrix is made for each product and kept for none: what is stored is as much as with a dense base, no more."""

    def stored(policy: Policy) -> tuple[dict[str, Tensor], int]:
        policy.model.zero_grad()
        sizes = dict[int, int]()

        def pack_(tensor: Tensor) -> Tensor:
            is_parameter = tensor.untyped_storage().data_ptr() in weights
            sizes[tensor.untyped_storage().data_ptr()] = 0 if is_parameter else tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
        batch = pack(documents(), 10_000)[0]
        with torch.autograd.graph.saved_tensors_hooks(pack_, lambda tensor: tensor):
            loss = policy.logprobs(batch).sum()
        loss.backward()
        return gradients(policy.method), sum(sizes.values())  # type: ignore[arg-type]

    policy, method = qlora(targets=targets)
    ours, bytes_ = stored(policy)
    with original_forwards(policy.model):
        theirs, bytes_of_peft = stored(policy)
    dense_model = tiny_model(**WIDE)
    _, bytes_of_lora = stored(policy_of(dense_model, attach_method(dense_model, LoraConfig(targets=targets), seed=0)))
    assert distance(ours, theirs) < FLOAT32
    assert bytes_ <= 1.01 * bytes_of_lora < 0.75 * bytes_of_peft


def test_in_bfloat16_the_fused_gradient_rounds_as_that_of_peft() -> None:
    def gradient(policy: Policy, method: Lora, compute: torch.dtype) -> Tensor:
        policy.model.zero_grad()
        accumulate(policy_of(policy.model, method, compute=compute), SFT, pack(documents(), 10_000))
        return torch.cat([g.flatten() for g in gradients(method).values()])

    policy, method = qlora()
    exact, ours = gradient(policy, method, torch.float32), gradient(policy, method, torch.bfloat16)
    with original_forwards(policy.model):
        theirs = gradient(policy, method, torch.bfloat16)
    assert 0 < (ours - exact).norm() < 1.25 * (theirs - exact).norm()


def test_without_a_gradient_bitsandbytes_computes() -> None:
    """Its kernel for single rows reads 4 bits; a matrix made for each would be read in 16 or 32."""
    policy, method = qlora()
    linear = method.model.get_submodule(next(iter(method.names)))
    params = method.linear_params(linear)
    assert params is not None and params.dequantize is not None and params.a is not None
    with torch.no_grad():
        assert method.linear_params(linear) is None
    eight, method = qlora(bits=8)
    assert method.linear_params(method.model.get_submodule(next(iter(method.names)))) is None


def test_the_gates_hold() -> None:
    model = tiny_model(**WIDE)
    method = attach_method(model, QloraConfig(), seed=0)
    policy = policy_of(model, method)
    assert check_identity(policy, method, in_one_batch(documents())).state == "passed"
    assert check_packing(policy, in_one_batch(documents())).state == "passed"
    assert check_decoding(policy, documents()).state == "passed"


def test_training_after_an_evaluation_still_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes repacks weights for a kernel without a gradient where the processor multiplies bfloat16."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    policy, method = qlora()
    assert not any(module.support_avx512bf16_for_cpu for module in quantized(policy.model))
    before = []
    for _ in range(2):
        policy.model.train()
        accumulate(policy, SFT, pack(documents(), 50))
        before.append(gradients(method))
        policy.model.zero_grad()
        policy.model.eval()
        with torch.no_grad():
            policy.logprobs(pack(documents(), 10_000)[0])
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), before[1].values(), strict=True))
    lowest = [g for name, g in before[0].items() if "layers.0" in name]
    assert all(g.abs().max() > 0 for g in lowest)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no such kernel")
def test_without_the_guard_the_gradient_is_lost() -> None:
    """The mutation."""
    policy, method = qlora()
    policy.model.train()
    accumulate(policy, SFT, pack(documents(), 50))
    right = gradients(method)
    policy.model.zero_grad()
    for module in quantized(policy.model):
        module.support_avx512bf16_for_cpu = True
    policy.model.eval()
    with torch.no_grad():
        policy.logprobs(pack(documents(), 10_000)[0])
    policy.model.train()
    try:
        accumulate(policy, SFT, pack(documents(), 50))
    except (RuntimeError, UserWarning):  # torch warns that the kernel has no gradient; warnings are errors here
        return
    assert distance(gradients(method), right) > 1e-2


def test_merging_keeps_what_was_trained(tmp_path: Path) -> None:
    policy, method = qlora(modules_to_save=("lm_head",))
    batch = pack(documents(), 10_000)[0]
    before = policy.logprobs(batch).detach()
    merged = method.merge()
    assert not quantized(merged)
    assert (policy_of(merged).logprobs(batch) - before).abs().max() < 1e-4
    merged.save_pretrained(tmp_path)


def test_a_widened_base_answers_the_same() -> None:
    policy, method = qlora()
    batch = pack(documents(), 10_000)[0]
    before = policy.logprobs(batch).detach()
    dequantize_base(policy.model)
    assert not quantized(policy.model)
    assert (policy.logprobs(batch) - before).abs().max() < 1e-4


def test_loftq_begins_nearer_to_the_original() -> None:
    original = policy_of(tiny_model(**WIDE))
    batch = pack_separately(documents())[0]
    distances = []
    for init in ("default", "loftq"):
        model = tiny_model(**WIDE)
        method = attach_method(model, QloraConfig(init=init, rank=16), seed=0)
        assert method.starts_as_base == (init == "default")
        with torch.no_grad():
            difference = policy_of(model, method).logprobs(batch) - original.logprobs(batch)
        distances.append(float(difference.abs().mean()))
    assert distances[1] < 0.8 * distances[0]


def test_the_file_is_a_plain_lora(tmp_path: Path) -> None:
    policy, method = qlora()
    method.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    plain = tiny_model(**WIDE)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path))
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == 14


def test_moments_in_eight_bits_follow_those_in_float32() -> None:
    courses = []
    for moments in ("float32", "int8"):
        policy, method = tuned("full")
        optimizer = make_optimizer(method.trainable(), OptimizerConfig(state_dtype=moments))
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            losses.append(float(accumulate(policy, SFT, pack(documents(), 1000))))
            set_learning_rate(optimizer, 1e-3)
            optimizer.step()
        courses.append(torch.tensor(losses))
    assert courses[1][-1] < courses[1][0] and (courses[0] - courses[1]).abs().max() < 0.05


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["llama", "phi", "gpt2", "gemma2"])
def test_a_base_quantized_from_its_file_is_the_one_that_was_loaded_whole(
    stored: torch.dtype, compute: Any, shape: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    wide = {"n_embd": 64} if shape == "gpt2" else WIDE
    tiny_model(shape, **wide).to(stored).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), dtype=compute)
    whole, streamed = (load_base(config, stream_linears=stream) for stream in (False, True))
    assert placement_of(whole.model) is None and placement_of(streamed.model) is not None
    # Gemma's embedding scale would be rounded with the file: that base is read in float32
    read_as = torch.float32 if shape == "gemma2" and compute == "float32" else stored
    assert {linear.weight.dtype for linear in layer_linears(streamed.model).values()} == {read_as}
    assert whole.fingerprint == streamed.fingerprint and whole.compute_dtype is streamed.compute_dtype
    policies = []
    for base in (whole, streamed):
        method = attach_method(base.model, QloraConfig(rank=4, init="loftq"), seed=0)
        policies.append(Policy(base, method))
    assert placement_of(streamed.model) is None
    first, second = (dict(policy.model.named_parameters()) for policy in policies)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(first[name].dtype is second[name].dtype for name in first)
    batch = pack(documents(), 1000)[0]
    assert torch.equal(*(policy.logprobs(batch) for policy in policies))


def test_a_base_in_its_file_is_not_used_before_it_is_quantized(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_model(**WIDE).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    base = load_base(ModelConfig(name=str(tmp_path), dtype="float32"), stream_linears=True)
    with pytest.raises(RuntimeError, match="still in their file"):
        base.share_weights()
    with pytest.raises(RuntimeError, match="still in their file"):
        Policy(base, NoMethod()).logprobs(pack(documents(), 1000)[0])
    assert isinstance(Policy(base, attach_method(base.model, QloraConfig(), seed=0)), Policy)
    base.share_weights()


@pytest.mark.parametrize(
    ("objective", "streams"),
    [
        ({"kind": "sft"}, True),
        ({"kind": "preference"}, True),
        ({"kind": "grpo", "reward": {"kind": "exact"}}, True),
        ({"kind": "grpo", "reward": {"kind": "model", "run": "runs/reward"}}, False),
        ({"kind": "ppo", "reward": {"kind": "exact"}}, False),  # the value model shares the base
    ],
    ids=str,
)
def test_a_base_that_other_models_share_is_loaded_whole(
    objective: dict[str, Any], streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"data": {"path": "x"}, "output": "y", "method": {"kind": "qlora"}, "objective": objective}
    asked: list[bool] = []
    monkeypatch.setattr(load, "load_base", lambda config, stream_linears, **_: asked.append(stream_linears))
    load.load_base_to_train(RunConfig.model_validate(values))
    load.load_base_to_train(RunConfig.model_validate({**values, "method": {"kind": "lora"}}))
    assert asked == [streams, False]


def test_eight_bits_have_the_outlier_threshold_of_transformers() -> None:
    """It was 0.0, which rounds the columns of outliers to 8 bits on a card."""
    _, method = qlora(bits=8)
    expected = BitsAndBytesConfig(load_in_8bit=True).llm_int8_threshold
    assert expected == 6.0
    assert {m.state.threshold for m in quantized(method.model)} == {expected}  # type: ignore[union-attr]


@pytest.mark.parametrize(("bits", "kinds"), [(4, 3), (8, 2)])
def test_a_change_of_any_packed_weight_or_scale_is_another_base(bits: int, kinds: int) -> None:
    """What several processes compare: two that quantize one base agree, and each kind of tensor tells a difference."""
    policy, other = (qlora(bits=bits)[0] for _ in range(2))
    tensors, first = dict(quantized_tensors(policy.model)), digests(quantized_tensors(policy.model))
    assert first == digests(quantized_tensors(other.model)) and len(first) == kinds * 14
    for name in list(tensors)[:kinds]:
        with torch.no_grad():
            tensors[name].view(torch.uint8).view(-1)[0] ^= 1
        changed = digests(quantized_tensors(policy.model))
        assert changed != first, name
        first = changed
