"""The decoder against transformers' own generate, and against reading the answer in one go."""

from __future__ import annotations

import pytest
import torch

from builders import greedy_by_transformers, policy_of, tuned
from models import SHAPES, tiny_model
from rung.models.generate import Sampling, _batches, _common_prefix_length, generate

PROMPTS = [[5, 6, 7, 40, 41], [5, 6, 7, 90], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [5, 6, 7, 300, 200, 100, 50]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompts", [PROMPTS, [p[3:] for p in PROMPTS]], ids=["shared prefix", "nothing shared"])
def test_greedy_answers_equal_those_of_transformers(shape: str, prompts: list[list[int]]) -> None:
    model = tiny_model(shape, dtype=torch.float64)
    answers = generate(policy_of(model), prompts, stop_ids=[2, 17], sampling=Sampling(9), batch_size=3)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = greedy_by_transformers(model, prompt, 9, [2, 17])
        assert answer.stopped == (expected[-1] in (2, 17))
        assert answer.ids == (expected[:-1] if answer.stopped else expected)
        assert len(answer.logprobs) == len(expected)


def test_an_adapter_answers_otherwise_than_its_base() -> None:
    policy, method = tuned("lora")
    with_adapter = generate(policy, PROMPTS, stop_ids=[2], sampling=Sampling(8))
    with method.disabled():
        without = generate(policy, PROMPTS, stop_ids=[2], sampling=Sampling(8))
    assert [a.ids for a in with_adapter] != [a.ids for a in without]


def test_sampling_follows_the_seed_and_the_distribution() -> None:
    policy = policy_of(tiny_model(vocab_size=12))
    again = [
        [a.ids for a in generate(policy, [[5, 6]] * 3, stop_ids=[], sampling=Sampling(5, 1.0, seed))]
        for seed in (1, 1, 2)
    ]
    assert again[0] == again[1] != again[2]
    first = [
        a.ids[0] for a in generate(policy, [[5, 6]] * 4000, stop_ids=[], sampling=Sampling(1, 0.7, 3), batch_size=4000)
    ]
    logits = policy.model(torch.tensor([[5, 6]])).logits[0, -1]
    share = torch.bincount(torch.tensor(first), minlength=12) / 4000
    assert (share - torch.softmax(logits / 0.7, -1)).abs().max() < 0.03  # four standard errors at most


def test_one_prompt_streams_its_tokens() -> None:
    seen: list[int] = []
    answer = generate(policy_of(tiny_model()), [[5, 6, 7]], stop_ids=[], sampling=Sampling(4), on_token=seen.append)[0]
    assert seen == answer.ids and len(seen) == 4


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(policy_of(tiny_model()), [[]], stop_ids=[], sampling=Sampling(1))


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2]], 1), ([[1, 2], [1, 2, 3]], 1), ([[1]], 0), ([[1], [2]], 0)],
)
def test_common_prefix_leaves_a_token_to_everyone(prompts: list[list[int]], shared: int) -> None:
    assert _common_prefix_length(prompts) == shared


def test_long_prompts_come_in_smaller_batches() -> None:
    lengths = [10, 20, 30, 9_000, 9_000, 20_000]
    assert list(_batches(range(6), lengths, 2)) == [[0, 1], [2], [3], [4], [5]]
    assert list(_batches(range(3), lengths, 32)) == [[0, 1, 2]]
