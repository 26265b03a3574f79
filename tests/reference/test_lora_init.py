"""Starts of LoRA that are read off the base or the data: against peft's own, and against other algebra in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor

from builders import calibrated, documents, in_one_batch, policy_of, tuned
from models import tiny_model
from naive import distance, gradients, naive, naive_loss
from rung.config.method import CALIBRATED_INITS, SUBTRACTED_INITS, LoraConfig
from rung.config.objective import SftConfig
from rung.errors import ConfigError
from rung.methods import lora_init
from rung.methods.lora import Lora, without_peft_warnings
from rung.methods.lora_init import in_chunks
from rung.methods.registry import attach_method
from rung.models.packing import pack, pack_separately
from rung.models.policy import Policy
from rung.objectives.sft import SftObjective
from rung.training.gates import check_fused, check_identity, frozen_digest
from rung.training.step import CalibrationBatch, accumulate
from tolerances import FLOAT32

SFT = SftObjective(SftConfig())


def started(init: str, shape: str = "llama", **config: object) -> tuple[Policy, Lora]:
    model = tiny_model(shape)
    method = attach_method(model, LoraConfig(init=init, rank=4, **config), seed=0)
    return calibrated(policy_of(model, method), method), method


def pair(model: torch.nn.Module, name: str, adapter: str = "default") -> tuple[Tensor, Tensor]:
    layer = model.get_submodule(name)
    return layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()


def inputs_of(name: str) -> np.ndarray:
    """What a linear of the base gets from the sample's documents, one document at a time."""
    seen: list[Tensor] = []
    plain = tiny_model()
    plain.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].detach()))
    for batch in pack_separately(documents(8, count=24)):
        policy_of(plain).hidden_states(batch)
    return torch.cat(seen).double().numpy()


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize(("init", "alpha"), [("pissa", 4), ("olora", 16)])
def test_the_start_is_that_of_peft_and_so_is_the_model(init: str, alpha: int, shape: str) -> None:
    _, method = started(init, shape)
    plain = tiny_model(shape)
    config = PeftLoraConfig(
        r=4,
        lora_alpha=alpha,
        target_modules=method.names,
        init_lora_weights=init,
        fan_in_fan_out=shape == "gpt2",
        task_type="CAUSAL_LM",
    )
    if shape == "gpt2" and init == "olora":
        pytest.skip("peft decomposes GPT-2's transposed weight as it stands")
    without_peft_warnings(get_peft_model, plain, config)
    for name in method.names:
        for ours, theirs in zip(pair(method.model, name), pair(plain, name), strict=True):
            assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("init", ["corda", "corda_knowledge"])
def test_corda_weighs_directions_by_the_inputs(init: str) -> None:
    """In numpy and float64: the product is a part of W whose image of the inputs is largest, or smallest."""
    _, method = started(init)
    name = method.names[-1]
    inputs = inputs_of(name)
    moment = inputs.T @ inputs / len(inputs)
    moment += 0.01 * np.trace(moment) / len(moment) * np.eye(len(moment))
    weight = tiny_model().get_submodule(name).weight.double().numpy()
    u, s, vh = np.linalg.svd(weight @ moment, full_matrices=False)
    kept = slice(0, 4) if init == "corda" else slice(len(s) - 4, len(s))
    expected = (u[:, kept] * s[kept]) @ vh[kept] @ np.linalg.inv(moment)
    b, a = pair(method.model, name)
    ours = (b @ a).double().numpy()  # at scale 1
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 1e-2


def test_eva_spans_the_largest_singular_vectors_of_the_inputs() -> None:
    policy, method = started("eva")
    name = method.names[-1]
    _, _, vectors = np.linalg.svd(inputs_of(name), full_matrices=False)
    b, a = pair(method.model, name)
    overlap = np.linalg.svd(a.double().numpy() @ vectors[:4].T, compute_uv=False)
    assert b.abs().max() == 0 and overlap.min() > 1 - 1e-4


@pytest.mark.parametrize("budget", [1, 10_000])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_lora_ga_takes_disjoint_singular_vectors_of_the_whole_gradient(budget: int, shape: str) -> None:
    """However the sample is cut into micro-batches."""
    examples = documents(8, count=24)
    model = tiny_model(shape)
    method = attach_method(model, LoraConfig(init="lora_ga", rank=4), seed=0)
    policy = policy_of(model, method)
    method.calibrate(CalibrationBatch(policy, SFT, examples, budget))
    plain = tiny_model(shape)
    plain.set_attn_implementation("sdpa")
    plain.requires_grad_(True)
    naive_loss(plain, examples)
    for name in method.names:
        gradient = plain.get_submodule(name).weight.grad.double()
        gradient = gradient.T if shape == "gpt2" and len(gradient.shape) == 2 else gradient
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        b, a = (factor.double() for factor in pair(method.model, name))
        factor = len(gradient) ** 0.25 / 4.0
        assert (a.T @ a / factor**2 - vh[:4].T @ vh[:4]).abs().max() < 1e-3
        assert (b @ b.T / factor**2 - u[:, 4:8] @ u[:, 4:8].T).abs().max() < 1e-3


@pytest.mark.parametrize("shape", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("init", sorted(CALIBRATED_INITS))
def test_the_model_is_still_the_base_and_the_base_untouched(init: str, shape: str) -> None:
    model = tiny_model(shape)
    method = attach_method(model, LoraConfig(init=init, rank=4), seed=0)
    before = frozen_digest(model)
    policy = policy_of(model, method)
    base = policy.reference_logprobs(pack(documents(), 10_000)[0])
    calibrated(policy, method)
    after = frozen_digest(model)
    assert {n: v for n, v in after.items() if ".offset." not in n} == {
        n: v for n, v in before.items() if ".offset." not in n
    }
    assert torch.equal(policy.reference_logprobs(pack(documents(), 10_000)[0]), base)
    assert check_identity(policy, method, in_one_batch(documents())).state == "passed"
    assert check_fused(policy, in_one_batch(documents())).state == "passed"
    product = [b @ a for b, a in (pair(model, name) for name in method.names)]
    assert all((p.abs().max() > 0) == (init in SUBTRACTED_INITS) for p in product)
    assert all(p.grad is None and p.requires_grad for p in method.trainable().values())


@pytest.mark.parametrize("init", sorted(SUBTRACTED_INITS))
def test_gradients_equal_the_naive_ones(init: str, tmp_path: Path) -> None:
    examples = documents(6, count=7)
    policy, method = tuned("lora", init=init, rank=4)
    method.save(tmp_path)
    model, plain = naive("lora", init=init, rank=4)
    plain.load(tmp_path)
    accumulate(policy, SFT, pack(examples, 50))
    naive_loss(model, examples)
    assert distance(gradients(method), gradients(plain)) < FLOAT32


def test_without_the_frozen_half_the_model_is_another() -> None:
    """The mutation."""
    policy, method = started("pissa")
    for layer in method.layers().values():
        layer.lora_B["offset"].weight.data.zero_()
    assert check_identity(policy, method, in_one_batch(documents())).state == "failed"


def test_pissa_is_the_best_approximation() -> None:
    weight = torch.randn(12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b, a = lora_init.pissa(weight, 3, 0.7)
    left = np.linalg.svd(weight.numpy(), compute_uv=False)[3:]
    assert float((weight - 0.7 * b @ a).norm()) == pytest.approx(float(np.linalg.norm(left)), rel=1e-12)


def test_a_rank_that_a_start_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 to 8"):  # the keys of a grouped model are 16 wide
        attach_method(tiny_model(), LoraConfig(init="lora_ga", rank=9), seed=0)


def test_chunks_hold_what_fits() -> None:
    assert list(in_chunks({"a": 2, "b": 2, "c": 1, "d": 9}, limit=16)) == [["a", "b"], ["c"], ["d"]]


SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "hardly falling": lambda i: 1.0 - 0.5 * i / len(i),
    "power law": lambda i: (i + 1.0) ** -0.5,
    "exponential": lambda i: torch.exp(-i / 30.0),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_randomized_svd_spans_what_the_full_one_spans(spectrum: str, dtype: torch.dtype) -> None:
    """Of a matrix with known singular values: as much of it captured to 2e-4, and the same subspace where values fall.

    With the oracle's vectors in hand, the largest angle between both subspaces is that of the smallest singular value
    of their product. A mutation with fewer power iterations misses the tolerance.
    """
    generator, rank = torch.Generator().manual_seed(0), 16
    left, _ = torch.linalg.qr(torch.randn(384, 256, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(256, 256, generator=generator, dtype=torch.float64))
    values = SPECTRA[spectrum](torch.arange(256, dtype=torch.float64))
    matrix = left * values @ right.T
    best = values[:rank].square().sum()

    def missed() -> tuple[float, float, float]:
        torch.manual_seed(1)
        u, s, vh = (t.double() for t in lora_init._randomized_svd(matrix.to(dtype), rank))
        captured = (u.T @ matrix @ vh.T).diagonal().square().sum()
        cosines = [torch.linalg.svdvals(a[:, :rank].T @ b).min() for a, b in ((left, u), (right, vh.T))]
        sine = max(0.0, 1.0 - float(min(cosines)) ** 2) ** 0.5
        return float(1.0 - captured / best), sine, float((s - values[:rank]).abs().max())

    energy, sine, difference = missed()
    assert abs(energy) < 2e-4 and difference < 1e-3  # the largest value is 1
    if spectrum != "hardly falling":  # there neighbors differ by 2e-3, and any of them is as good
        assert sine < (1e-6 if dtype is torch.float64 else 3e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_init, "_ITERATIONS", 0)
        assert abs(missed()[0]) > 2e-4


def test_only_large_matrices_on_a_card_are_decomposed_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor decomposes in full, bit for bit as before."""
    weight = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    full = torch.linalg.svd(weight, full_matrices=False)
    u, s, vh = lora_init.leading_singular_vectors(weight, 4)
    assert torch.equal(u, full.U[:, :4]) and torch.equal(s, full.S[:4]) and torch.equal(vh, full.Vh[:4])
    asked: list[tuple[int, ...]] = []

    class OnCard(Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

    monkeypatch.setattr(lora_init, "_randomized_svd", lambda matrix, rank: asked.append(tuple(matrix.shape)))
    lora_init.leading_singular_vectors(torch.empty(2048, 1024).as_subclass(OnCard), 4)
    lora_init.leading_singular_vectors(weight.as_subclass(OnCard), 4)
    assert asked == [(2048, 1024)]
