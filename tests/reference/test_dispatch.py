"""What runs where: the graphics card's path is dispatched and fed as it should be, with a stand-in for its kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from builders import documents, policy_of, tuned
from models import tiny_model
from rung.config.objective import SftConfig
from rung.models import tree_attention
from rung.models.packing import MIN_PREFIX_AHEAD, pack
from rung.objectives.sft import SftObjective
from rung.training.step import accumulate


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A kernel that says it is there, reads borders as flash attention does and computes with torch."""
    calls: list[dict[str, Any]] = []

    def fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **given: Any) -> torch.Tensor:
        calls.append(given)
        assert mask is None and given["is_causal"] and given["query_length"] == query.shape[1]
        assert (
            torch.equal(given["cu_seq_lens_q"], given["cu_seq_lens_k"]) and given["cu_seq_lens_q"].dtype is torch.int32
        )
        borders = given["cu_seq_lens_q"].tolist()
        assert given["max_length_q"] == max(b - a for a, b in zip(borders, borders[1:], strict=False))
        pieces = [
            F.scaled_dot_product_attention(
                *(t[:, a:b].transpose(1, 2) for t in (query, key, value)),
                is_causal=True,
                scale=given["softmax_scale"],
                enable_gqa=True,
            )
            for a, b in zip(borders, borders[1:], strict=False)
        ]
        return torch.cat(pieces, dim=2).transpose(1, 2)

    monkeypatch.setattr(tree_attention, "has_flat_kernel", lambda device: True)
    monkeypatch.setattr(tree_attention.flash_utils, "_flash_attention_forward", fake)
    return calls


def test_flat_rows_go_to_the_kernel_with_their_borders(kernel: list[dict[str, Any]]) -> None:
    policy = policy_of(tiny_model(dtype=torch.bfloat16), compute=torch.bfloat16)
    batch = pack(documents(), 1000)[0]
    through = policy.logprobs(batch)
    assert len(kernel) == 2  # one launch a layer
    assert kernel[0]["cu_seq_lens_q"] is kernel[1]["cu_seq_lens_q"]  # no copy to the device at every layer
    kernel.clear()
    tree_attention.has_flat_kernel = lambda device: False  # type: ignore[assignment]
    assert (through - policy.logprobs(batch)).abs().max() < 0.1 and kernel == []


def test_trees_and_float32_do_not(kernel: list[dict[str, Any]]) -> None:
    policy_of(tiny_model()).logprobs(pack(documents(), 1000)[0])
    low = policy_of(tiny_model(dtype=torch.bfloat16), compute=torch.bfloat16)
    for batch in low.iterate_batches(
        pack(documents(shared=20), 1000) + pack(documents(count=9, shared=MIN_PREFIX_AHEAD + 9), 60)
    ):
        assert batch.prefix is not None or any(s.parent is not None for s in batch.segments)
        low.logprobs(batch)
    assert {len(call["cu_seq_lens_q"]) for call in kernel} <= {2}  # the prefix itself is one flat document


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_our_functions_under_autocast_stay_near_float32(kind: str) -> None:
    """bfloat16 has 8 bits of mantissa; a wrong transpose or a lost factor is off by far more than 6 %."""
    gradients = []
    for compute in (torch.float32, torch.bfloat16):
        policy, method = tuned(kind)
        policy = policy_of(policy.model, method, compute=compute)
        accumulate(policy, SftObjective(SftConfig()), pack(documents(3, shared=18), 60))
        gradients.append(torch.cat([p.grad.flatten() for p in method.trainable().values() if p.grad is not None]))
    wide, low = gradients
    assert low.dtype is torch.float32
    assert 0 < (wide - low).norm() / wide.norm() < 6e-2
