"""Rows that join and leave between tokens: each answer is the one that its prompt gets alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from builders import greedy_by_transformers, policy_of, tuned
from models import SHAPES, tiny_model
from rung.models.policy import Policy
from rung.models.prompt_cache import BeginningCache, PromptEncoder
from rung.models.slot_batch import RowSampling, SlotBatch, SlotPrompt, SlotRow, draw, nucleus

PROMPTS = [[5, 6, 7, *range(40 + i, 40 + i + 3 * i)] for i in range(7)]
BEGINNING = list(range(100, 140))


def finish(batch: SlotBatch, rows: list[SlotRow], answers: dict[SlotRow, list[int]], steps: int | None = None) -> None:
    """Steps until these rows are full, or so many of them."""
    while any(row in batch.rows for row in rows) and steps != 0:
        for row, token in batch.step():
            answers.setdefault(row, []).append(token.token)
            if row.is_full:
                batch.leave(row)
        steps = None if steps is None else steps - 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beginning", [[], BEGINNING], ids=["nothing shared", "a beginning kept"])
def test_answers_are_those_of_each_prompt_alone(shape: str, beginning: list[int]) -> None:
    """Rows of all lengths join while others are under way; greedy answers in float64 equal those of transformers."""
    model = tiny_model(shape, dtype=torch.float64)
    batch, answers = SlotBatch(policy_of(model), beginnings_bytes=10**7), dict[SlotRow, list[int]]()
    prompts, rows = [[*beginning, *prompt] for prompt in PROMPTS], list[SlotRow]()
    for i, prompt in enumerate(prompts):
        rows += batch.join(prompt, [RowSampling(3 + 2 * i)])
        finish(batch, rows, answers, steps=1 + i % 3)
    finish(batch, rows, answers)
    assert not batch.rows
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert answers[row] == greedy_by_transformers(model, prompt, 3 + 2 * i, [])
    assert (batch.encoder.shared_tokens > 0) is bool(beginning)
    assert batch.encoder.encoded_tokens + batch.encoder.shared_tokens == sum(len(prompt) - 1 for prompt in prompts)


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_that_come_together_are_encoded_together(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are those of each prompt alone; what all begin with is encoded once, the rest in one pass."""
    model = tiny_model(shape, dtype=torch.float64)
    passes = list[int]()
    packed = PromptEncoder._packed

    def counted(self: PromptEncoder, texts: Any, start: int, beginning: Any) -> Any:
        passes.append(len(texts))
        return packed(self, texts, start, beginning)

    monkeypatch.setattr(PromptEncoder, "_packed", counted)
    batch, answers = SlotBatch(policy_of(model), beginnings_bytes=10**7), dict[SlotRow, list[int]]()
    prompts = [[*BEGINNING, *prompt] for prompt in PROMPTS] + [[9], [8, 7], PROMPTS[5], [*BEGINNING, *PROMPTS[6]]]
    first = batch.join_all([SlotPrompt(prompts[0], [RowSampling(6)] * 2)])
    finish(batch, [first[0][0]], answers, steps=2)
    joined = batch.join_all([SlotPrompt(prompt, [RowSampling(6)]) for prompt in prompts])
    finish(batch, [row for rows in joined for row in rows], answers)
    for prompt, rows in zip(prompts, joined, strict=True):
        assert answers[rows[0]] == greedy_by_transformers(model, prompt, 6, [])
    assert answers[first[0][1]] == answers[joined[0][0]]
    # the first answer, those that begin alike, and those that begin with nothing of theirs; one token is no pass
    assert passes == [1, 8, 2]
    tokens = sum(len(prompt) - 1 for prompt in [prompts[0], *prompts])
    assert batch.encoder.encoded_tokens + batch.encoder.shared_tokens == tokens
    assert batch.encoder.shared_tokens >= 7 * len(BEGINNING)


def test_a_beginning_that_nobody_has_encoded_is_encoded_once() -> None:
    batch = SlotBatch(policy_of(tiny_model()), beginnings_bytes=10**7)
    batch.join_all([SlotPrompt([*BEGINNING, *prompt], [RowSampling(2)]) for prompt in PROMPTS])
    # the first is read whole but for its last token, of the others what follows that
    assert batch.encoder.encoded_tokens == len(BEGINNING) + 2 + sum(3 * i for i in range(7))
    # without room to keep anything each reads its own
    batch = SlotBatch(policy_of(tiny_model()))
    batch.join_all([SlotPrompt([*BEGINNING, *prompt], [RowSampling(2)]) for prompt in PROMPTS])
    assert batch.encoder.shared_tokens == 0


def test_a_prompt_that_does_not_fit_lets_none_of_its_company_join() -> None:
    batch = SlotBatch(policy_of(tiny_model()))
    with pytest.raises(ValueError, match="a prompt of"):
        batch.join_all([SlotPrompt(PROMPTS[2], [RowSampling(3)]), SlotPrompt([5], [RowSampling(10**6)])])
    assert not batch.rows and batch.encoder.encoded_tokens == 0


METHODS: dict[str, dict[str, Any]] = {
    **{"lora": {}, "prefix": {"virtual_tokens": 3}, "prompt": {"virtual_tokens": 3}},
    **{"mixture": {"experts": 2}, "bottleneck": {"width": 4}},
}


@pytest.mark.parametrize("kind", METHODS)
def test_methods_answer_as_the_decoder_does(kind: str) -> None:
    from rung.models.generate import Sampling, generate

    policy, _ = tuned(kind, dtype=torch.float64, **METHODS[kind])
    expected = [a.ids for a in generate(policy, PROMPTS, stop_ids=[], sampling=Sampling(9))]
    batch, answers = SlotBatch(policy, beginnings_bytes=10**7), dict[SlotRow, list[int]]()
    rows = [batch.join(prompt, [RowSampling(9)])[0] for prompt in PROMPTS]
    finish(batch, rows, answers)
    assert [answers[row] for row in rows] == expected


def test_a_seed_gives_the_same_answer_beside_any_neighbors() -> None:
    policy = policy_of(tiny_model(dtype=torch.float64))

    def sampled(neighbors: int) -> list[int]:
        batch, answers = SlotBatch(policy), dict[SlotRow, list[int]]()
        for i in range(neighbors):
            batch.join(PROMPTS[i], [RowSampling(30, 1.0, seed=99 + i)])
        (row,) = batch.join(PROMPTS[3], [RowSampling(12, 0.9, seed=4)])
        finish(batch, [row], answers)
        return answers[row]

    alone = sampled(0)
    assert sampled(3) == alone and sampled(5) == alone


def test_answers_of_one_prompt_read_it_once() -> None:
    policy = policy_of(tiny_model())
    batch = SlotBatch(policy)
    rows = batch.join(PROMPTS[4], [RowSampling(5, 1.0, seed=i) for i in range(6)])
    assert len(rows) == 6 and batch.encoder.encoded_tokens == len(PROMPTS[4]) - 1
    answers: dict[SlotRow, list[int]] = {}
    finish(batch, rows, answers)
    assert len({tuple(ids) for ids in answers.values()}) > 3


def test_a_row_that_leaves_early_changes_nothing() -> None:
    policy = policy_of(tiny_model(dtype=torch.float64))
    batch, answers = SlotBatch(policy), dict[SlotRow, list[int]]()
    rows = [batch.join(prompt, [RowSampling(10)])[0] for prompt in PROMPTS]
    finish(batch, rows, answers, steps=2)
    batch.leave(rows[0])
    batch.leave(rows[5])
    finish(batch, [row for i, row in enumerate(rows) if i not in (0, 5)], answers)
    for i in (1, 2, 3, 4, 6):
        assert answers[rows[i]] == greedy_by_transformers(policy.model, PROMPTS[i], 10, [])


def test_what_the_buffers_held_before_is_not_seen() -> None:
    """The mutation: a row that reads one slot more sees the keys of a former row there."""
    policy = policy_of(tiny_model(dtype=torch.float64))
    batch, answers = SlotBatch(policy), dict[SlotRow, list[int]]()
    (long,) = batch.join(PROMPTS[6], [RowSampling(20)])
    finish(batch, [long], answers)
    (short,) = batch.join(PROMPTS[1], [RowSampling(1)])
    logits: list[torch.Tensor] = []
    policy.model.register_forward_hook(lambda module, args, out: logits.append(out.logits))
    short.slot += 3
    _ = batch.step()
    batch.leave(short)
    (again,) = batch.join(PROMPTS[1], [RowSampling(1)])
    batch.step()
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert answers[long] == greedy_by_transformers(policy.model, PROMPTS[6], 20, []) and again.is_full


def test_beginnings_are_bounded_and_the_oldest_goes_first() -> None:
    def states(tokens: int) -> dict[int, Any]:
        return {0: (torch.zeros(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 4))}  # 32 bytes a token

    cache = BeginningCache(3 * 40 * 32)
    prompts = [np.arange(i * 1000, i * 1000 + 40) for i in range(4)]
    for prompt in prompts[:3]:
        cache.add(prompt, states(40))
    assert cache.longest(np.concatenate([prompts[0], [1, 2]]))[0] == 40  # used: now the newest
    cache.add(prompts[3], states(40))
    assert cache.bytes_held == 3 * 40 * 32 and len(cache.entries) == 3
    assert [cache.longest(prompt)[0] for prompt in prompts] == [40, 0, 40, 40]
    cache.add(np.arange(9000, 9200), states(200))
    assert len(cache.entries) == 3  # larger than all of it
    cache.add(np.arange(7), states(7))
    assert len(cache.entries) == 3  # too short to be worth it
    half = np.concatenate([prompts[2][:35], [7, 8, 9]])
    length, kept = cache.longest(half)
    assert length == 35 and kept is not None and kept[0][0].shape[2] == 40
    assert cache.longest(np.concatenate([prompts[2][:7], [7, 8, 9]])) == (0, None)


def test_room() -> None:
    batch = SlotBatch(policy_of(tiny_model()))
    for ids, tokens in (([], 1), ([5] * batch.max_tokens, 1), ([5], batch.max_tokens)):
        with pytest.raises(ValueError, match="a prompt of"):
            batch.join(ids, [RowSampling(tokens)])
    assert batch.join([5], [RowSampling(batch.max_tokens - 1)]) and batch.rows


def test_nucleus_against_its_definition() -> None:
    """The smallest set of most probable tokens with at least the share, by enumeration."""
    generator = torch.Generator().manual_seed(0)
    for top_p in (0.01, 0.3, 0.7, 0.95, 0.999):
        weights = torch.softmax(3 * torch.randn(50, generator=generator), 0)
        kept = nucleus(weights, top_p)
        order = sorted(range(50), key=lambda i: -float(weights[i]))
        size = next(n for n in range(1, 51) if float(weights[order[:n]].double().sum()) >= top_p)
        assert set(kept.nonzero()[:, 0].tolist()) == set(order[:size])
        assert torch.equal(kept[order[:size]], weights[order[:size]])


def test_sampling_follows_the_distribution_of_each_row() -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)).expand(6000, -1)
    kinds = [RowSampling(1, 0.7), RowSampling(1, 1.0, top_p=0.6), RowSampling(1)]
    rows = [SlotRow(kinds[i % 3], 0, 0, torch.Generator().manual_seed(i)) for i in range(6000)]
    tokens = torch.tensor([drawn.token for drawn in draw(logits, rows)]).view(-1, 3)
    probabilities = torch.softmax(logits[0], 0)
    expected = (torch.softmax(logits[0] / 0.7, 0), nucleus(probabilities, 0.6), None)
    for column, weights in enumerate(expected):
        share = torch.bincount(tokens[:, column], minlength=12) / 2000
        if weights is None:
            assert share[logits[0].argmax()] == 1.0
        else:
            assert (share - weights / weights.sum()).abs().max() < 0.04  # four standard errors at most
    top = draw(logits[:1], [SlotRow(RowSampling(1, 1.0, top_logprobs=3), 0, 0, torch.Generator().manual_seed(0))])[0]
    assert [token for token, _ in top.top] == logits[0].topk(3).indices.tolist()
    assert top.logprob == pytest.approx(float(torch.log(probabilities[top.token])), abs=1e-5)


def test_policy_is_left_as_it_was() -> None:
    policy: Policy = policy_of(tiny_model())
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    batch = SlotBatch(policy)
    finish(batch, batch.join(PROMPTS[2], [RowSampling(4)]), {})
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
