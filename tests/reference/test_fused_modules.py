"""Rung's own functions against autograd in float64, and whole models against transformers and peft as they come."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from builders import documents, policy_of, tuned
from models import SHAPES, tiny_model
from naive import distance, gradients, naive, naive_loss
from rung.config.objective import SftConfig
from rung.config.training import OptimizerConfig
from rung.models import fused_ops
from rung.models.fused_modules import _fuse_norm, install_fused_forwards, plain_linear_params, remove_fused_forwards
from rung.models.fused_ops import ACTIVATIONS, LinearParams, gated, gated_linear, linears, rms_norm
from rung.models.packing import pack
from rung.objectives.sft import SftObjective
from rung.training.optimizer import make_optimizer
from rung.training.step import accumulate
from tolerances import FLOAT32, FLOAT64, LLAMA_GRADIENT

SPECS: list[tuple[str, dict[str, object]]] = [
    ("lora", {}),
    ("lora", {"layers": (1,), "targets": ("q", "o", "down")}),
    ("lora", {"modules_to_save": ("lm_head",), "targets": ("v", "gate")}),
    ("full", {}),
    ("head", {}),
]
IDS = ["-".join([kind, *map(str, config)]) for kind, config in SPECS]


def random(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def part(inputs: int, outputs: int, rank: int | None, *, bias: bool, moves: bool) -> LinearParams:
    low = (None, None) if rank is None else (random(rank, inputs), random(outputs, rank))
    bias_O = random(outputs, grad=moves) if bias else None
    return LinearParams(random(outputs, inputs, grad=moves), bias_O, *low, 0.7)


def explicit(x: torch.Tensor, p: LinearParams) -> torch.Tensor:
    y = F.linear(x, p.weight, p.bias)
    return y if p.a is None or p.b is None else y + p.scale * (x @ p.a.T) @ p.b.T


def same_gradients(ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    weight = torch.randn(ours.shape, dtype=torch.float64)
    assert (ours - theirs).abs().max() < FLOAT64
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        assert (a - b).abs().max() < FLOAT64


def moving(parts: list[LinearParams]) -> list[torch.Tensor]:
    return [t for p in parts for t in p[:4] if t is not None and t.requires_grad]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("ranks", [(2,), (2, None, 3), (None, None)])
def test_linears(ranks: tuple[int | None, ...], bias: bool, moves: bool) -> None:
    torch.manual_seed(0)
    x = random(2, 5, 4)
    parts = [part(4, 3 + i, rank, bias=bias, moves=moves) for i, rank in enumerate(ranks)]
    ours = torch.cat(linears(x, parts), dim=-1)
    theirs = torch.cat([explicit(x, p) for p in parts], dim=-1)
    same_gradients(ours, theirs, [x, *moving(parts)])


def test_linears_where_only_one_output_is_used() -> None:
    x = random(5, 4)
    parts = [part(4, 3, 2, bias=False, moves=False), part(4, 3, 2, bias=False, moves=False)]
    same_gradients(linears(x, parts)[1], explicit(x, parts[1]), [x, *moving(parts[1:])])


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("moves", [False, True])
def test_gated_linear(name: str, rank: int | None, moves: bool) -> None:
    torch.manual_seed(1)
    gate, up = random(3, 4, 6), random(3, 4, 6)
    p = part(6, 5, rank, bias=True, moves=moves)
    act = {"silu": F.silu, "gelu": F.gelu}.get(name, lambda x: F.gelu(x, approximate="tanh"))
    ours = gated_linear(gate, up, ACTIVATIONS[name], p)
    same_gradients(ours, explicit(act(gate) * up, p), [gate, up, *moving([p])])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated(name: str) -> None:
    torch.manual_seed(1)
    gate, up = random(3, 4, 6), random(3, 4, 6)
    act = {"silu": F.silu, "gelu": F.gelu}.get(name, lambda x: F.gelu(x, approximate="tanh"))
    same_gradients(gated(gate, up, ACTIVATIONS[name]), act(gate) * up, [gate, up])


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("moves", [False, True])
def test_rms_norm(offset: float, moves: bool) -> None:
    torch.manual_seed(2)
    x, weight = random(3, 4, 6), random(6, grad=moves)
    explicit_norm = (offset + weight) * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-3)
    same_gradients(rms_norm(x, weight, 1e-3, offset), explicit_norm, [x, weight] if moves else [x])


def test_second_use_of_one_input() -> None:
    x = random(5, 4)
    p = part(4, 4, 2, bias=False, moves=True)
    same_gradients(linears(x, [p])[0] + linears(x, [p])[0] * x, explicit(x, p) * (1 + x), [x, *moving([p])])


def test_bfloat16_storage_are_widened_exactly() -> None:
    torch.manual_seed(3)
    weight = torch.randn(6, 4).bfloat16()
    x = torch.randn(5, 4, requires_grad=True)
    low = torch.randn(2, 4), torch.randn(6, 2)
    narrow = linears(x, [LinearParams(weight, None, *low)])[0]
    wide = linears(x, [LinearParams(weight.float(), None, *low)])[0]
    assert torch.equal(narrow, wide)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (narrow, wide)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "config"), SPECS, ids=IDS)
def test_gradients_equal_naive_transformers_and_peft(shape: str, kind: str, config: dict[str, object]) -> None:
    """Everything at once: packing, shared prefixes, several micro-batches, the head, the fused functions."""
    if shape in ("gpt2", "phi", "phi3") and "gate" in str(config.get("targets")):
        config = {**config, "targets": ("v", "up")}
    examples = documents(4, shared=18)
    cases = [(torch.float64, True, FLOAT64), (torch.float32, False, FLOAT32)]
    if shape in ("llama", "qwen2", "mistral"):
        cases.append((torch.float64, False, LLAMA_GRADIENT))
    for dtype, wide_norms, limit in cases:
        model, plain = naive(kind, shape, dtype=dtype, wide_norms=wide_norms, **config)
        expected = naive_loss(model, examples)
        policy, method = tuned(kind, shape, dtype=dtype, **config)
        loss = accumulate(policy, SftObjective(SftConfig()), pack(examples, 64))
        assert float(loss) == pytest.approx(float(expected), rel=limit)
        assert distance(gradients(method), gradients(plain)) < limit


@pytest.mark.parametrize(("kind", "config"), SPECS[:1] + SPECS[3:4], ids=["lora", "full"])
def test_twenty_steps_follow_the_naive_trajectory(kind: str, config: dict[str, object]) -> None:
    model, plain = naive(kind, "phi", dtype=torch.float64, **config)
    policy, method = tuned(kind, "phi", dtype=torch.float64, **config)
    theirs, ours = (make_optimizer(m.trainable(), OptimizerConfig()) for m in (plain, method))
    for step in range(20):
        examples = documents(step, count=4, shared=17 * (step % 2))
        for optimizer in (theirs, ours):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
        expected = naive_loss(model, examples)
        loss = accumulate(policy, SftObjective(SftConfig()), pack(examples, 40))
        assert float(loss) == pytest.approx(float(expected), rel=1e-8)  # Adam divides by roots of tiny moments
        theirs.step()
        ours.step()
    drift = max((p - plain.trainable()[n]).detach().abs().max().item() for n, p in method.trainable().items())
    assert drift < 1e-7


@pytest.mark.parametrize("broken", ["scale", "activation", "norm", "shared"])
def test_a_broken_function_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutations: each fault moves the gradient by far more than the tolerance."""
    model, plain = naive("lora", dtype=torch.float64)
    examples = documents(4, shared=18)
    naive_loss(model, examples)
    if broken == "scale":
        whole = fused_ops._backward
        monkeypatch.setattr(
            fused_ops,
            "_backward",
            lambda g, x, low, parts, *n: whole(g, x, low, [p._replace(scale=1.0) for p in parts], *n),
        )
    policy, method = tuned("lora", dtype=torch.float64)
    if broken == "activation":
        for module in policy.model.modules():
            if hasattr(module, "gate_proj"):
                module.forward.activation = ACTIVATIONS["gelu"]
    if broken == "norm":
        policy.model.model.norm.forward.eps = 0.1
    if broken == "shared":
        attention = policy.model.model.layers[0].self_attn
        mixed_up = {attention.k_proj: attention.v_proj}
        attention.q_proj.forward.group.params_of = lambda m: method.linear_params(mixed_up.get(m, m))
    accumulate(policy, SftObjective(SftConfig()), pack(examples, 64))
    assert distance(gradients(method), gradients(plain)) > 1e-3


def test_what_is_fused_and_what_is_left() -> None:
    assert install_fused_forwards(tiny_model()) == {"norms": 5, "gated": 2, "linears": 15}
    assert install_fused_forwards(tiny_model("gemma2"))["norms"] == 9
    assert install_fused_forwards(tiny_model("gpt2")) == {"norms": 0, "gated": 0, "linears": 9}
    for config in ({"dropout": 0.1}, {"dora": True}):
        policy, method = tuned("lora", **config)
        layer = policy.model.get_submodule(method.names[0])
        assert method.linear_params(layer) is None and "forward" not in vars(layer)
        assert "forward" in vars(policy.model.model.layers[0].mlp), "what lies between its linears is computed again"
    for kind in ("qlora", "mixture", "bottleneck"):
        block = tuned(kind)[0].model.model.layers[0].mlp
        assert "forward" in vars(block)
    assert not block.down_proj._forward_hooks, "a bottleneck behind a block leaves its linears alone"
    own = tiny_model()
    before = {n: type(m).forward for n, m in own.named_modules()}
    install_fused_forwards(own)
    remove_fused_forwards(own)
    assert all("forward" not in vars(m) and type(m).forward is before[n] for n, m in own.named_modules())


def test_a_norm_of_another_formula_keeps_its_own_forward() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * rms_norm(x, self.weight, self.eps)

    assert install_fused_forwards(nn.Sequential(OddRMSNorm()))["norms"] == 0


def test_a_norm_that_needs_a_gate_keeps_its_own_forward() -> None:
    """Qwen 3.5's: fusing called it with one argument."""

    class GatedRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return self.weight * x * gate

    module = GatedRMSNorm()
    assert not _fuse_norm(module) and "forward" not in vars(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_block_of_another_formula_keeps_its_own_forward(dtype: torch.dtype) -> None:
    """A norm in the middle, as BitNet has it, or a factor at the end."""

    class Gated(nn.Module):
        def __init__(self, odd: bool) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.act_fn, self.odd = nn.SiLU(), odd

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            middle = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(middle / middle.norm(dim=-1, keepdim=True) if self.odd else middle)

    class OddGated(Gated):
        pass

    assert install_fused_forwards(nn.Sequential(Gated(False)).to(dtype))["gated"] == 1
    assert install_fused_forwards(nn.Sequential(OddGated(True)).to(dtype))["gated"] == 0


def test_outputs_may_be_changed_in_place() -> None:
    """OLMo clamps its queries."""
    layer, x = nn.Linear(6, 4), torch.randn(1, 3, 6)
    (ours,) = linears(x, [plain_linear_params(layer)])
    ours.clamp_(-0.1, 0.1).sum().backward()
    mine, layer.weight.grad = layer.weight.grad, None
    layer(x).clamp(-0.1, 0.1).sum().backward()
    assert (mine - layer.weight.grad).abs().max() < 1e-6


def test_members_with_different_inputs_compute_apart() -> None:
    """Cross-attention reads queries and keys from different tensors: the stash must never mix them up."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.q_proj(x) + self.k_proj(y) * self.v_proj(x)

    torch.manual_seed(5)
    module = Cross()
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    expected = module(x, y)
    install_fused_forwards(module, plain_linear_params)
    for _ in range(3):
        assert torch.allclose(module(x, y), expected, atol=1e-6)


def test_uniform_norm_has_a_known_value() -> None:
    assert float(rms_norm(torch.full((1, 4), 3.0), torch.ones(4), 0.0)[0, 0]) == pytest.approx(1.0)
    assert math.isfinite(float(rms_norm(torch.zeros(1, 4), torch.ones(4), 1e-6)[0, 0]))


def test_switched_off_by_name() -> None:
    policy = policy_of(naive("lora")[0])
    assert not any("forward" in vars(m) for m in policy.model.modules())
