"""Packed rows and trees against transformers' own eager attention, one document at a time."""

from __future__ import annotations

import pytest
import torch

from builders import documents, logits_of, policy_of
from models import LAYER_NORM_SHAPES, SHAPES, tiny_model
from rung.config.objective import SftConfig
from rung.errors import PlanError
from rung.models import attention
from rung.models.packing import pack, pack_separately
from rung.models.tree_attention import AttentionParams, attend_tree
from rung.objectives.sft import SftObjective
from rung.training.step import accumulate
from rung.types import Example, PackedBatch, Segment
from tolerances import FLOAT64, RMS_NORM


def tolerance(shape: str) -> float:
    return FLOAT64 if shape in LAYER_NORM_SHAPES else RMS_NORM


def eager_logprobs(shape: str, examples: list[Example]) -> torch.Tensor:
    """The oracle: transformers' eager attention and a full log-softmax, no line of Rung's model package."""
    model = tiny_model(shape, dtype=torch.float64)
    model.set_attn_implementation("eager")
    found = []
    for e in sorted(examples, key=lambda e: e.ids.tolist()):
        ids = torch.from_numpy(e.ids.astype("int64"))
        logprobs = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        at = torch.from_numpy(e.supervised.nonzero()[0])
        found.append(logprobs[at - 1, ids[at]])
    return torch.cat(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [0, 20])
def test_packed_equals_unpacked(shape: str, shared: int) -> None:
    examples = documents(1, shared=shared)
    policy = policy_of(tiny_model(shape, dtype=torch.float64))
    batches = pack(examples, 10_000)
    assert len(batches) == 1
    assert any(s.parent is not None for s in batches[0].segments) == (shared > 0)
    packed = policy.logprobs(batches[0])
    alone = torch.cat([policy.logprobs(b) for b in pack_separately(sorted(examples, key=lambda e: e.ids.tolist()))])
    assert (packed - alone).abs().max() < FLOAT64
    # transformers' eager softmax computes in float32 whatever the dtype
    assert (packed - eager_logprobs(shape, examples)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_a_tree_equal_those_of_separate_rows(shape: str) -> None:
    examples = documents(2, shared=18)
    gradients = []
    for batches in (pack(examples, 10_000), pack_separately(examples)):
        model = tiny_model(shape, dtype=torch.float64).requires_grad_(True)
        loss = accumulate(policy_of(model), SftObjective(SftConfig()), batches)
        gradients.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (loss, tree), (other_loss, rows) = gradients
    assert abs(loss - other_loss) < tolerance(shape)
    assert {n for n, g in tree.items() if g is None} == {n for n, g in rows.items() if g is None}
    ours, theirs = (torch.cat([g.flatten() for g in found.values() if g is not None]) for found in (tree, rows))
    assert (ours - theirs).norm() / theirs.norm() < tolerance(shape)


def test_changing_one_document_leaves_the_others_bit_identical() -> None:
    policy = policy_of(tiny_model("mistral"))
    examples = documents(3, count=3)
    batch = pack(examples, 10_000)[0]
    before = logits_of(policy, batch)
    first = batch.segments[0]
    ids = batch.ids.clone()
    ids[first.start : first.end] = (ids[first.start : first.end] + 17) % 300 + 3
    changed = PackedBatch(ids, batch.positions, batch.segments, batch.loss, batch.sequences, batch.document_tokens)
    after = logits_of(policy, changed)
    assert torch.equal(before[first.end :], after[first.end :])
    assert not torch.equal(before[: first.end], after[: first.end])


def test_values_may_be_of_another_width() -> None:
    """DeepSeek's are; the processor's own kernel knows one width."""
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 9, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    value = torch.randn(1, 2, 9, 6, generator=draw, dtype=torch.float64)
    segments = (Segment(0, 4, None), Segment(4, 9, None))
    found = attend_tree(query, key, value, segments, None, AttentionParams(None, None, None))
    for s in segments:
        own = (t[:, :, s.start : s.end] for t in (query, key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(*own, is_causal=True)
        assert (found[:, s.start : s.end] - expected.transpose(1, 2)).abs().max() < FLOAT64


def test_a_wrong_parent_is_noticed() -> None:
    """The mutation: a tree whose children lost their parent gives other log-probabilities."""
    policy = policy_of(tiny_model("llama", dtype=torch.float64))
    batch = pack(documents(4, shared=20), 10_000)[0]
    orphans = tuple(Segment(s.start, s.end, None) for s in batch.segments)
    broken = PackedBatch(batch.ids, batch.positions, orphans, batch.loss, batch.sequences, batch.document_tokens)
    assert (policy.logprobs(batch) - policy.logprobs(broken)).abs().max() > 1e-2


@pytest.mark.parametrize("shape", ["llama", "gemma2", "gpt2"])
def test_recomputation_sees_the_same_segments(shape: str) -> None:
    examples = documents(5, shared=18)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(shape, dtype=torch.float64).requires_grad_(True)
        if checkpointing:
            # the second is its name in earlier versions of transformers
            former = "gradient_checkpointing_enable"
            name = "activation_checkpointing_enable"
            getattr(model, name if hasattr(model, name) else former)({"use_reentrant": False})
        model.train()
        accumulate(policy_of(model), SftObjective(SftConfig()), pack(examples, 10_000))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_unknown_attention_arguments_are_refused() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(PlanError, match="s_aux"):
        attention.tree_attention(torch.nn.Identity(), q, q, q, None, s_aux=torch.zeros(1))


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_gradients_of_a_part_shared_by_many_documents_add_up_in_float32(softcap: float | None) -> None:
    """256 documents behind one prompt in bfloat16, on both paths, against float64; the bound is one rounding, 2^-8."""
    draw = torch.Generator().manual_seed(0)
    segments = (Segment(0, 4, None), *(Segment(4 + i, 5 + i, 0) for i in range(256)))
    tensors = [torch.randn(1, 2, 260, 8, generator=draw).bfloat16() for _ in range(3)]
    upstream = 0.1 + torch.rand(1, 260, 2, 8, generator=draw).bfloat16()
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        query, key, value = (t.to(dtype).requires_grad_() for t in tensors)
        out = attend_tree(query, key, value, segments, None, AttentionParams(None, softcap, None))
        (out * upstream.to(dtype)).sum().backward()
        gradients.append(value.grad[:, :, :4].double())
    exact, ours = gradients
    assert float((ours - exact).norm() / exact.norm()) < 2.0**-8


def test_bfloat16_is_attended_in_float32() -> None:
    """torch's own bfloat16 kernel loses twice as much: 0.4 % of the gradients of keys and values."""
    torch.manual_seed(0)
    shapes, gradient = ((9, 200), (3, 200), (3, 200)), torch.randn(1, 200, 9, 64).bfloat16()
    stored = [
        torch.randn(1, heads, tokens, 64).mul(1 + (i == 0)).bfloat16() for i, (heads, tokens) in enumerate(shapes)
    ]

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        operands = [tensor.clone().to(dtype).requires_grad_() for tensor in stored]
        segments = [Segment(0, 90, None), Segment(90, 200, 0)]
        out = attend_tree(*operands, segments, None, AttentionParams(None, None, None))  # type: ignore[call-arg, arg-type]
        out.backward(gradient.to(dtype))
        return [out.detach(), *(operand.grad for operand in operands)]  # type: ignore[list-item]

    for narrow, exact in zip(results(torch.bfloat16), results(torch.float64), strict=True):
        assert narrow.dtype is torch.bfloat16
        assert float((narrow.double() - exact).norm() / exact.norm()) < 0.003
