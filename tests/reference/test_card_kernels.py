"""What a layer launches on a card: the path of cards on a processor, its functions compiled and as they are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code
from torch.nn import functional

from builders import documents, policy_of, tuned
from launches import LaunchCounter, VarlenKernel, stand_in_varlen
from models import SHAPES, tiny_model
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import SftConfig
from rung.methods.registry import attach_method
from rung.models import fused_ops, fused_rotary, matmul, pointwise
from rung.models.fused_modules import original_forwards
from rung.models.fused_rotary import FusedRotary
from rung.models.generate import Sampling, generate
from rung.models.packing import pack
from rung.objectives.sft import SftObjective
from rung.training.step import accumulate
from tolerances import FLOAT64


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called: tensors of the processor take the path of those on a card, without Triton."""

    def switch() -> None:
        for module in (pointwise, matmul, fused_ops, fused_rotary):
            monkeypatch.setattr(module, "on_card", lambda tensor: True)

    return switch


def gradients(kind: str, shape: str, dtype: torch.dtype, **config: Any) -> Tensor:
    policy, method = tuned(kind, shape, dtype=dtype, **config)
    accumulate(policy_of(policy.model, method, compute=dtype), SftObjective(SftConfig()), pack(documents(3), 1000))
    found = [p.grad.flatten() for p in method.trainable().values() if p.grad is not None]
    return torch.cat(found).double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradients_are_those_of_the_processor(kind: str, shape: str, as_on_a_card: Callable[[], None]) -> None:
    expected = gradients(kind, shape, torch.float64)
    as_on_a_card()
    ours = gradients(kind, shape, torch.float64)
    assert expected.abs().max() > 0 and (ours - expected).abs().max() < FLOAT64 * expected.abs().max().clamp(min=1.0)


def test_some_linears_of_an_input_may_have_no_gradient(as_on_a_card: Callable[[], None]) -> None:
    """Adapters on q alone, and on k and v: columns of others are neither read nor left undefined."""
    for targets in (("q",), ("k", "v"), ("down",)):
        with pytest.MonkeyPatch.context() as patch:
            expected = gradients("lora", "llama", torch.float64, targets=targets)
            for module in (pointwise, matmul, fused_ops, fused_rotary):
                patch.setattr(module, "on_card", lambda tensor: True)
            ours = gradients("lora", "llama", torch.float64, targets=targets)
            assert expected.abs().max() > 0 and (ours - expected).abs().max() < FLOAT64


def test_an_output_that_is_not_used(as_on_a_card: Callable[[], None]) -> None:
    as_on_a_card()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    params = [
        fused_ops.LinearParams(*(torch.randn(s, dtype=torch.float64) for s in ((5, 4),)), None, a, b, 2.0)
        for a, b in (
            (torch.randn(2, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 2, dtype=torch.float64))
            for _ in range(2)
        )
    ]
    first, _ = fused_ops.linears(x, params)
    first.sum().backward()
    p = params[0]
    assert p.a is not None and p.b is not None and params[1].a is not None
    expected = torch.ones(3, 5, dtype=torch.float64) @ (p.weight + 2.0 * p.b @ p.a)
    assert x.grad is not None and (x.grad - expected).abs().max() < FLOAT64
    assert params[1].a.grad is not None and not params[1].a.grad.any()


def test_bfloat16_rounds_no_more_than_on_a_processor(as_on_a_card: Callable[[], None]) -> None:
    def error() -> float:
        ours = gradients("lora", "llama", torch.bfloat16)
        return float((ours - exact).norm() / exact.norm())

    exact = gradients("lora", "llama", torch.float64)
    processor = error()
    as_on_a_card()
    assert 0 < error() < 1.1 * processor


def test_a_rotation_back_with_the_wrong_sign_is_noticed(
    as_on_a_card: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation: `rotate` in place of its transpose."""
    expected = gradients("lora", "llama", torch.float64)
    as_on_a_card()
    monkeypatch.setattr(fused_rotary, "rotate_backward", pointwise.rotate)
    assert (gradients("lora", "llama", torch.float64) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_where_the_rotary_function_is_replaced(shape: str) -> None:
    """All shapes with rotary embeddings but none without; the gate's oracle calls the original."""
    model = tiny_model(shape)
    policy_of(model, attach_method(model, METHOD_CONFIGS["lora"](), seed=0))  # type: ignore[arg-type]
    import sys

    functions = [getattr(sys.modules[type(m).__module__], fused_rotary.NAME, None) for m in model.modules()]
    assert any(isinstance(f, FusedRotary) for f in functions) is (shape not in ("gpt2", "opt"))
    with original_forwards(model):
        assert FusedRotary.disabled
    assert not FusedRotary.disabled


def test_a_norm_returns_no_view(as_on_a_card: Callable[[], None]) -> None:
    """FSDP warns of outputs that are views: an operation in place would lose its hooks."""
    for _ in range(2):
        y = fused_ops.rms_norm(torch.randn(1, 5, 8, requires_grad=True), torch.ones(8), 1e-6)
        assert y.shape == (1, 5, 8) and not y._is_view()
        as_on_a_card()


def test_another_rotation_keeps_its_function() -> None:
    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned = [torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) for x in (q, k)]
        return tuple(x * cos[:, None] + y * sin[:, None] for x, y in zip((q, k), turned, strict=True))  # type: ignore[return-value]

    assert not fused_rotary._is_standard(interleaved)
    assert not fused_rotary._is_standard(lambda q, k: (q, k))
    assert not fused_rotary._is_standard(lambda q, k, cos, sin: q)


class CardCounter(LaunchCounter):
    """Counts a compiled function by its kernels, and the operations in it not at all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.inside = 0

        def run(function: Callable[..., Any], *args: Any) -> Any:
            self.inside += 1
            try:
                result = function(*args)
            finally:
                self.inside -= 1
            self.launches[function.__name__] += KERNELS[function.__name__]
            self.add_bytes((args, result))
            return result

        monkeypatch.setattr(pointwise, "_run", run)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


KERNELS = {
    **{"_scaled_rows": 1, "_normalized_rows": 1, "_rows_backward": 1},
    **{"gate": 1, "gate_backward": 1, "rotate": 1, "rotate_backward": 1},
}
"""Kernels that the compiler makes of each function."""
GOAL = 90
"""Launches of a layer of LoRA, forward and backward; 228 as they are on a processor."""
TRAFFIC = 160
"""Bytes that operations beside products and attention read and write, for each token, layer and unit of width."""
WIDTH_OF_MODEL = 64


def launches(layers: int) -> tuple[dict[str, int], float]:
    """Launches by name, and bytes a token and unit of width outside of products."""
    model = tiny_model(
        num_hidden_layers=layers, hidden_size=WIDTH_OF_MODEL, intermediate_size=192, dtype=torch.bfloat16
    )
    method = attach_method(model, METHOD_CONFIGS["lora"](rank=8), seed=0)  # type: ignore[arg-type]
    policy = policy_of(model, method, compute=torch.bfloat16)
    batch = pack(documents(count=1, longest=200), 1000)[0]
    with pytest.MonkeyPatch.context() as patch:
        stand_in_varlen(patch, OneLaunch())
        with CardCounter(patch) as counter:
            policy.logprobs(batch).sum().backward()  # type: ignore[no-untyped-call]
    return dict(counter.launches), (counter.bytes - counter.product_bytes) / len(batch.ids) / WIDTH_OF_MODEL


class OneLaunch(VarlenKernel):
    """The attention kernel as one launch: what the stand-in computes is not counted."""

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        with torch.utils._python_dispatch._disable_current_modes():
            return super().forward(*args, **options)

    def backward(self, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        with torch.utils._python_dispatch._disable_current_modes():
            return super().backward(*args, **options)


def test_a_layer_has_a_budget_of_launches(as_on_a_card: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    as_on_a_card()
    (few, few_bytes), (many, many_bytes) = launches(2), launches(4)
    traffic = (many_bytes - few_bytes) / 2
    layer = {name: (count - few.get(name, 0)) // 2 for name, count in many.items() if count != few.get(name, 0)}
    attention = 2
    with capsys.disabled():
        print(f"\na layer of LoRA on a card: {sum(layer.values()) + attention} launches: {layer}")
        print(f"beside products: {traffic:.0f} bytes a token and unit of width")
    assert traffic <= TRAFFIC
    assert sum(layer.values()) + attention <= GOAL


ROWS, WIDTH = 37, 48
Arguments = Callable[[torch.dtype], tuple[Any, ...]]


def heads(dtype: torch.dtype) -> Tensor:
    """Queries as attention makes them: a view of rows, [1, H, T, D]."""
    return draw(1, ROWS, 4, 8, dtype=dtype).transpose(1, 2)


CASES: dict[str, tuple[str, Arguments, int]] = {
    "norm again": (
        "_scaled_rows",
        lambda d: (draw(ROWS, WIDTH, dtype=d), draw(ROWS, 1), draw(WIDTH, dtype=d), 0.0),
        1,
    ),
    "norm": ("_normalized_rows", lambda d: (draw(ROWS, WIDTH, dtype=d), draw(WIDTH, dtype=d), 1e-6, 1.0), 1),
    "norm, float32 weight": ("_normalized_rows", lambda d: (draw(ROWS, WIDTH, dtype=d), draw(WIDTH), 1e-6, 0.0), 1),
    "norm backward": ("_rows_backward", lambda d: (*backward_of_norm(d), True, False), 1),
    # the gradient of the weight is a sum over rows, beside sums over the width
    "norm backward, trained": ("_rows_backward", lambda d: (*backward_of_norm(d), True, True), 2),
    "gate": ("gate", lambda d: (draw(ROWS, WIDTH, dtype=d), draw(ROWS, WIDTH, dtype=d), functional.silu), 1),
    "gate backward": (
        "gate_backward",
        lambda d: (*(draw(ROWS, WIDTH, dtype=d) for _ in range(3)), functional.silu, torch.ops.aten.silu_backward),
        1,
    ),
    "rotate": ("rotate", lambda d: (heads(d), draw(1, ROWS, 8, dtype=d), draw(1, ROWS, 8, dtype=d)), 1),
    "rotate, float32 angles": ("rotate", lambda d: (heads(d), draw(1, ROWS, 8), draw(1, ROWS, 8)), 1),
    "rotate backward": (
        "rotate_backward",
        lambda d: (heads(d), draw(1, ROWS, 8, dtype=d), draw(1, ROWS, 8, dtype=d)),
        1,
    ),
}
"""A function, its arguments by dtype, and the most kernels that it may become."""


def backward_of_norm(dtype: torch.dtype) -> tuple[Any, ...]:
    grad, x = (draw(ROWS, WIDTH, dtype=dtype) for _ in range(2))
    return grad, x, draw(WIDTH, dtype=dtype), draw(ROWS, 1), 0.0


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.fixture(scope="module")
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with fresh_inductor_cache():
        yield
    torch._dynamo.reset()


def test_every_function_is_compiled_here() -> None:
    assert {name for name, _, _ in CASES.values()} == set(KERNELS) == set(pointwise.FUNCTIONS)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("case", CASES)
def test_a_function_is_one_kernel_with_the_same_values(case: str, fresh_compiler: None) -> None:
    """torch's compiler for processors, which fuses as that for cards does, in bfloat16."""
    name, make, kernels = CASES[case]
    function, arguments = pointwise.FUNCTIONS[name], make(torch.bfloat16)
    ours, code = run_and_get_code(pointwise.compiled(function), *arguments)
    found = "".join(code).count("async_compile.cpp_pybinding")
    assert 1 <= found <= kernels and KERNELS[name] == 1
    expected = function(*(a.double() if isinstance(a, Tensor) else a for a in arguments))
    pairs = zip(ours, expected, strict=True) if isinstance(ours, tuple) else [(ours, expected)]
    for a, b in pairs:
        if b is not None:
            assert (a.double() - b).norm() / b.norm() < (2.0**-8 if a.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("shape", ["llama", "qwen3", "gemma2"])
def test_the_number_of_compilations_is_bounded(
    shape: str, as_on_a_card: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, evaluation and decoding of rows of many lengths; torch stops compiling at 8 variants of a function."""
    as_on_a_card()
    torch._dynamo.reset()
    pointwise.compiled.cache_clear()
    graphs = Counter[str]()

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        def count(graph: Any, inputs: Any) -> Any:
            graphs[function.__name__] += 1
            return graph.forward

        return torch.compile(function, backend=count)

    monkeypatch.setattr(pointwise, "has_triton", lambda: True)
    monkeypatch.setattr(pointwise, "compiled", cache(compiled))
    policy, method = tuned("lora", shape)
    policy = policy_of(policy.model, method, compute=torch.bfloat16)
    for seed in range(6):
        batches = pack(documents(seed, shared=20 * (seed % 2)), 1000)
        accumulate(policy, SftObjective(SftConfig()), batches)
        with torch.no_grad():
            policy.logprobs(batches[0])
    generate(policy, [[5, 6, 7], [5, 6]], stop_ids=[], sampling=Sampling(6))
    torch._dynamo.reset()
    assert set(graphs) == set(KERNELS) and max(graphs.values()) <= 8, graphs
