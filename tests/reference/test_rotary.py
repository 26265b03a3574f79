"""Rotary frequencies that depend on a document's length, against transformers' own forward and generation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from builders import example, greedy_by_transformers, policy_of
from models import tiny_model
from rung.config.method import LoraConfig
from rung.config.objective import SftConfig
from rung.errors import GateError, PlanError
from rung.methods.registry import attach_method
from rung.models import generate as generating
from rung.models.generate import Sampling, generate
from rung.models.packing import pack, pack_separately, pack_together
from rung.models.policy import Policy
from rung.models.rotary import rope_boundary
from rung.objectives.sft import SftObjective
from rung.training import gates
from rung.training.frozen_layer_cache import FrozenLayerCache
from rung.training.step import accumulate
from rung.types import Example, PackedBatch

BOUNDARY = 24
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": BOUNDARY,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [3.0, 5.0, 9.0, 17.0],
}  # fmt: skip


def phi3(**changes: Any) -> PreTrainedModel:
    """A tiny Phi-3 whose frequencies change beyond 24 tokens."""
    settings = {"original_max_position_embeddings": BOUNDARY, "rope_parameters": LONGROPE, "sliding_window": None}
    return tiny_model("phi3", dtype=torch.float64, **{**settings, **changes})


def documents(lengths: Sequence[int], shared: int = 0, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    prefix = rng.integers(3, 320, shared)
    return [
        example([*prefix, *rng.integers(3, 320, length - shared)], max(1, shared), line=i)
        for i, length in enumerate(lengths)
    ]


def by_transformers(model: PreTrainedModel, document: Example) -> torch.Tensor:
    """Log-probabilities of the learned tokens of one document, from the model's own forward."""
    ids = torch.tensor(document.ids[None].astype(np.int64))
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logprobs[torch.tensor(document.supervised[1:])]


def by_document(policy: Policy, batches: Sequence[PackedBatch]) -> dict[int, torch.Tensor]:
    values = {}
    with torch.no_grad():
        for batch in policy.iterate_batches(batches):
            logprobs = policy.logprobs(batch)
            for i, document in enumerate(batch.documents):
                values[document.source.line] = logprobs[batch.loss.owner == i]
    return values


ROWS = {
    "apart": ([8, 20, 24, 25, 40, 60], 0, 0, 1_000),
    "one prefix": ([20, 24, 25, 40, 60, 22], 18, 0, 1_000),
    "prefix ahead": ([90, 91, 92, 93, 94, 95], 70, 0, 130),
    "pairs across the boundary": ([20, 40, 23, 30, 10, 12], 8, 2, 1_000),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_short_document_in_a_row_with_a_long_one(name: str) -> None:
    """It was 4.4 nats off: the longest position of the row decided for all of its documents."""
    lengths, shared, per_row, budget = ROWS[name]
    examples = documents(lengths, shared)
    if per_row:
        examples = [replace(e, row=i // per_row) for i, e in enumerate(examples)]
    model = phi3()
    expected = {e.source.line: by_transformers(model, e) for e in examples}
    policy = policy_of(model)
    assert policy.rope_boundary == BOUNDARY
    for share in (True, False):
        batches = pack(examples, budget, share_prefixes=share, boundary=policy.rope_boundary)
        values = by_document(policy, batches)
        for line, wanted in expected.items():
            torch.testing.assert_close(values[line], wanted, rtol=0, atol=1e-9)
    if per_row:
        assert all(len({d.row for d in b.documents}) == len(b.documents) / per_row for b in batches)
    together = by_document(policy, pack_together(examples, 1_000, boundary=policy.rope_boundary))
    assert max(float((together[line] - wanted).abs().max()) for line, wanted in expected.items()) < 1e-9


def test_the_mutation_that_packs_without_the_boundary() -> None:
    """Sharing prefixes across the boundary, or letting the row decide, moves log-probabilities by whole nats."""
    examples, model = documents([20, 22, 40, 60], 18), phi3()
    expected = {e.source.line: by_transformers(model, e) for e in examples}
    policy = policy_of(model)
    shared = by_document(policy, pack(examples, 1_000))
    assert max(float((shared[line] - wanted).abs().max()) for line, wanted in expected.items()) > 0.1
    unaware = policy_of(phi3())
    for module in unaware.model.modules():
        if hasattr(module, "long_tokens"):
            module.__class__ = type(module).__mro__[1]
    unshared = by_document(unaware, pack(examples, 1_000, share_prefixes=False))
    assert max(float((unshared[line] - wanted).abs().max()) for line, wanted in expected.items()) > 0.1


def test_gradients_are_those_of_documents_apart() -> None:
    examples = documents([20, 24, 25, 40, 60, 22], 18)
    model, gradients = phi3(), []
    method = attach_method(model, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for parameter in method.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    policy, objective = policy_of(model, method), SftObjective(SftConfig())
    for batches in (pack(examples, 1_000, boundary=BOUNDARY), pack_separately(examples)):
        policy.model.zero_grad()
        accumulate(policy, objective, batches)
        gradients.append({name: p.grad.clone() for name, p in method.trainable().items() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-8)


def test_cached_states_of_frozen_layers_know_their_document() -> None:
    policy = policy_of(phi3())
    examples = documents([20, 22, 40, 60], 18)
    expected = {e.source.line: by_transformers(policy.model, e) for e in examples}
    cache = FrozenLayerCache(policy, 1, 1_000)
    batches = cache.feed(pack(examples, 1_000, boundary=BOUNDARY))
    values = by_document(policy, batches)
    assert max(float((values[line] - wanted).abs().max()) for line, wanted in expected.items()) < 1e-9


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("is_static", [False, True], ids=["as on a processor", "as on a card"])
def test_an_answer_that_crosses_the_boundary(is_static: bool, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was 5.4 nats off: its first keys kept the frequencies of a short document.

    On a card the position of a place without a row must not reach the boundary: it would decide for all rows.
    """
    monkeypatch.setattr(generating, "decodes_statically", lambda device: is_static)
    monkeypatch.setattr(generating, "merges_adapter", lambda policy, slots: False)
    model = phi3()
    lengths = [8, 18, 21, 23, 24, 25, 30]
    rng = np.random.default_rng(2)
    prefix = rng.integers(3, 320, shared).tolist()
    prompts = [[*prefix, *rng.integers(3, 320, n - shared).tolist()] for n in lengths]
    answers = generate(policy_of(model), prompts, stop_ids=[2, 17], sampling=Sampling(12), batch_size=3)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = greedy_by_transformers(phi3(), prompt, 12, [2, 17])
        assert answer.all_tokens == expected, (len(prompt), answer.all_tokens, expected)
        assert len(answer.logprobs) == len(expected)
    # the caller that ends an answer sees its tokens from both sides of the boundary
    ends: Any = {"on_token": lambda tokens: len(tokens) == 7}
    ended = generate(policy_of(model), prompts, stop_ids=[2, 17], sampling=Sampling(12), **ends)
    assert [a.ids for a in ended] == [a.ids[:7] for a in answers]
    assert [a.ended_by_caller for a in ended] == [len(a.ids) >= 7 for a in answers]
    sampled = generate(policy_of(model), prompts, stop_ids=[2], sampling=Sampling(12, 1.0, 3, answers_per_prompt=2))
    assert len(sampled) == 2 * len(prompts) and all(a.stopped or len(a.ids) == 12 for a in sampled)
    assert sampled == generate(
        policy_of(model), prompts, stop_ids=[2], sampling=Sampling(12, 1.0, 3, answers_per_prompt=2)
    )


def test_gates_look_at_both_sides_of_the_boundary() -> None:
    """The four shortest documents passed, whatever happened to longer ones."""
    policy, probe = policy_of(phi3()), documents([8, 9, 10, 40])
    batches = pack(probe, 1_000, boundary=BOUNDARY)
    assert gates.check_packing(policy, batches).state == "passed"
    assert gates.check_decoding(policy, [*probe, *documents([23, 24])]).state == "passed"
    with pytest.raises(GateError, match="packing"):
        for module in policy.model.modules():
            if hasattr(module, "long_tokens"):
                module.__class__ = type(module).__mro__[1]
        gates.enforce(gates.check_packing(policy, pack(probe, 1_000)))


def test_copies_of_a_model_follow_their_own_documents() -> None:
    """A copy over the same weights reads its own mark, not that of the model it was copied from."""
    policy = policy_of(phi3())
    copied = policy_of(copy.deepcopy(policy.model))
    examples = documents([20, 40])
    expected = {e.source.line: by_transformers(phi3(), e) for e in examples}
    for one in (policy, copied, policy):
        values = by_document(one, pack(examples, 1_000, boundary=BOUNDARY))
        assert max(float((values[line] - wanted).abs().max()) for line, wanted in expected.items()) < 1e-9


def test_virtual_tokens_stay_on_one_side() -> None:
    from rung.config.method import PromptConfig

    model = phi3()
    policy = policy_of(model, attach_method(model, PromptConfig(virtual_tokens=4), seed=0))
    with pytest.raises(PlanError, match="frequencies of virtual tokens"):
        generate(policy, [[5] * 18], stop_ids=[2], sampling=Sampling(8))


def test_dynamic_scaling_never_changes_within_the_context() -> None:
    """It begins beyond `max_position_embeddings`, and no longer document is taken."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    model = tiny_model("llama", dtype=torch.float64, max_position_embeddings=48, rope_parameters=dynamic)
    policy = policy_of(model)
    assert policy.base.context == 48 and rope_boundary(model.config) is None
    examples = documents([8, 20, 48])
    expected = {e.source.line: by_transformers(model, e) for e in examples}
    values = by_document(policy, pack(examples, 1_000))
    assert max(float((values[line] - wanted).abs().max()) for line, wanted in expected.items()) < 1e-9
