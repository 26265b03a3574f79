"""A row in one kernel call: the layout of its trees, with a stand-in for the kernel that computes in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from builders import documents, policy_of, tuned
from launches import VarlenKernel as Kernel
from launches import stand_in_varlen as stand_in
from models import tiny_model
from rung.config.objective import SftConfig
from rung.models import varlen_attention
from rung.models.packing import MIN_PREFIX_AHEAD, pack
from rung.models.tree_attention import AttentionParams, attend_tree
from rung.models.varlen_attention import has_varlen_kernel, varlen_layout
from rung.objectives.sft import SftObjective
from rung.training.step import accumulate
from rung.types import Segment
from tolerances import FLOAT64

FLAT = (Segment(0, 5, None), Segment(5, 6, None), Segment(6, 14, None))
TREE = (Segment(0, 4, None), Segment(4, 9, 0), Segment(9, 11, 0), Segment(11, 12, 2), Segment(12, 17, None))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    yield stand_in(monkeypatch, Kernel())


def results(segments: tuple[Segment, ...], window: int | None, prefix: int, kv_heads: int) -> list[Tensor]:
    """Output and gradients of queries, keys, values and the prefix, in float64."""
    draw, tokens = torch.Generator().manual_seed(prefix), segments[-1].end
    sizes = ((4, tokens), (kv_heads, tokens), (kv_heads, tokens), (kv_heads, prefix), (kv_heads, prefix))
    tensors = [torch.randn(1, h, n, 8, generator=draw, dtype=torch.float64).requires_grad_(True) for h, n in sizes]
    query, key, value, *before = tensors
    params = AttentionParams(0.3, None, window)
    out = attend_tree(query, key, value, segments, tuple(before) if prefix else None, params)
    out.backward(torch.randn(out.shape, generator=draw, dtype=torch.float64))
    return [out, *(t.grad for t in tensors if t.grad is not None)]


CASES = [
    (segments, window, prefix, kv_heads)
    for segments in (FLAT, TREE)
    for window in (None, 1, 3, 100)
    for prefix in (0, 6)
    for kv_heads in (4, 2, 1)
]


@pytest.mark.parametrize(("segments", "window", "prefix", "kv_heads"), CASES)
def test_one_call_is_the_attention_of_all_segments(
    segments: tuple[Segment, ...], window: int | None, prefix: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the path of processors, itself tested against transformers: windows, prefixes, grouped heads."""
    expected = results(segments, window, prefix, kv_heads)
    kernel = stand_in(monkeypatch, Kernel())
    found = results(segments, window, prefix, kv_heads)
    assert len(kernel.calls) == 1 and len(found) == len(expected) == (6 if prefix else 4)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() < FLOAT64


def test_a_kernel_that_aligns_with_the_first_key_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: FlashAttention before 2.1; flat rows would not show it."""
    flat, tree = results(FLAT, None, 0, 2), results(TREE, None, 0, 2)
    stand_in(monkeypatch, Kernel(from_the_last_key=False))
    assert (results(FLAT, None, 0, 2)[0] - flat[0]).abs().max() < FLOAT64
    assert (results(TREE, None, 0, 2)[0] - tree[0]).abs().max() > 1e-2


def test_the_layout_of_a_tree() -> None:
    """Paths by hand: every segment reads the prefix, its ancestors from the root down, and itself."""
    layout = varlen_layout(TREE, 2, torch.device("cpu"))
    assert layout.index_S is not None
    root, first, second = [2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12]
    paths = [[0, 1, *root], [0, 1, *root, *first], [0, 1, *root, *second], [0, 1, *root, *second, 13]]
    paths.append([0, 1, 14, 15, 16, 17, 18])
    assert layout.index_S.tolist() == [row for path in paths for row in path]
    assert layout.ends_of_queries.tolist() == [0, 4, 9, 11, 12, 17]
    assert layout.ends_of_keys.diff().tolist() == [len(path) for path in paths]
    assert (layout.max_queries, layout.max_keys) == (5, 11)
    flat = varlen_layout(FLAT, 0, torch.device("cpu"))
    assert flat.index_S is None and flat.ends_of_queries.tolist() == flat.ends_of_keys.tolist()


def test_a_shared_part_gets_the_sum_of_its_gradients_in_float32(kernel: Kernel) -> None:
    """256 segments behind one prompt in bfloat16: added up in 16 bits, most of them would be lost."""
    children = tuple(Segment(4 + 2 * i, 6 + 2 * i, 0) for i in range(256))
    segments, draw = (Segment(0, 4, None), *children), torch.Generator().manual_seed(1)
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        draw.manual_seed(1)
        tensors = [torch.randn(1, 1, 516, 8, generator=draw).to(torch.bfloat16).to(dtype) for _ in range(3)]
        leaves = [t.requires_grad_(True) for t in tensors]
        out = attend_tree(*leaves, segments, None, AttentionParams(None, None, None))
        out.sum().backward()
        assert leaves[2].grad is not None
        gradients.append(leaves[2].grad[0, 0, :4].double())
    exact, low = gradients
    assert ((low - exact).norm() / exact.norm()) < 2**-8


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_through_the_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees, prefixes ahead and flat rows in bfloat16: the gradients are those of the path of processors."""
    batches = [documents(3, shared=18), documents(count=9, shared=MIN_PREFIX_AHEAD + 9), documents(4)]
    gradients = []
    for kernel in (None, Kernel()):
        if kernel is not None:
            stand_in(monkeypatch, kernel)
        policy, method = tuned(kind)
        policy = policy_of(policy.model, method, compute=torch.bfloat16)
        for examples in batches:
            accumulate(policy, SftObjective(SftConfig()), pack(examples, 1000))
        gradients.append(torch.cat([p.grad.flatten() for p in method.trainable().values() if p.grad is not None]))
    ours, theirs = gradients
    assert 0 < (ours - theirs).norm() / theirs.norm() < 3e-2


def test_one_call_a_layer_and_one_copy_of_the_layout(kernel: Kernel) -> None:
    policy = policy_of(tiny_model(dtype=torch.bfloat16), compute=torch.bfloat16)
    for examples in (documents(), documents(shared=20)):
        kernel.calls.clear()
        policy.logprobs(pack(examples, 1000)[0])
        assert len(kernel.calls) == 2
        assert all(a is b for a, b in zip(*kernel.calls, strict=True))


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "width", "value_width", "runs"),
    [
        ("cuda", (9, 0), torch.bfloat16, 64, 64, True),
        ("cuda", (8, 0), torch.float16, 256, 256, True),
        ("cuda", (7, 5), torch.float16, 64, 64, False),
        ("cuda", (9, 0), torch.float32, 64, 64, False),
        ("cuda", (9, 0), torch.bfloat16, 264, 264, False),
        ("cuda", (9, 0), torch.bfloat16, 60, 60, False),
        ("cuda", (9, 0), torch.bfloat16, 128, 64, False),
        ("cpu", (9, 0), torch.bfloat16, 64, 64, False),
    ],
)
def test_which_tensors_the_kernel_takes(
    device: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    value_width: int,
    runs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnDevice:
        def __init__(self, width: int) -> None:
            self.device, self.dtype, self.shape = torch.device(device), dtype, (1, 2, 3, width)

    monkeypatch.setattr(varlen_attention.torch.cuda, "get_device_capability", lambda device: capability)
    assert has_varlen_kernel(OnDevice(width), OnDevice(value_width)) is runs  # type: ignore[arg-type]
