"""The decoder against transformers' own generate, and against reading the answer in one go."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from builders import greedy_by_transformers, policy_of, tuned
from models import SHAPES, tiny_model
from rung.models import decoding
from rung.models import generate as generating
from rung.models.generate import Sampling, _common_prefix_length, generate

PROMPTS = [[5, 6, 7, 40, 41], [5, 6, 7, 90], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [5, 6, 7, 300, 200, 100, 50]]


@pytest.fixture(params=["as on a processor", "as on a card"])
def on_both_devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows end together and places are dropped; or each row has slots of its own and steps are read in groups."""
    is_static = request.param == "as on a card"
    monkeypatch.setattr(generating, "decodes_statically", lambda device: is_static)
    monkeypatch.setattr(generating, "merges_adapter", lambda policy, slots: False)


@pytest.mark.usefixtures("on_both_devices")
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


@pytest.mark.usefixtures("on_both_devices")
def test_an_adapter_answers_otherwise_than_its_base() -> None:
    policy, method = tuned("lora")
    with_adapter = generate(policy, PROMPTS, stop_ids=[2], sampling=Sampling(8))
    with method.disabled():
        without = generate(policy, PROMPTS, stop_ids=[2], sampling=Sampling(8))
    assert [a.ids for a in with_adapter] != [a.ids for a in without]


@pytest.mark.usefixtures("on_both_devices")
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


@pytest.mark.usefixtures("on_both_devices")
def test_one_prompt_streams_its_tokens() -> None:
    seen: list[list[int]] = []
    on_token = lambda tokens: bool(seen.append(list(tokens)))  # noqa: E731
    answer = generate(policy_of(tiny_model()), [[5, 6, 7]], stop_ids=[], sampling=Sampling(4), on_token=on_token)[0]
    assert seen == [answer.ids[: n + 1] for n in range(4)]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(policy_of(tiny_model()), [[]], stop_ids=[], sampling=Sampling(1))


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2]], 1), ([[1, 2], [1, 2, 3]], 1), ([[1]], 0), ([[1], [2]], 0)],
)
def test_common_prefix_leaves_a_token_to_everyone(prompts: list[list[int]], shared: int) -> None:
    assert _common_prefix_length(prompts) == shared


MANY = [
    [5, 6, 7, *range(20 + 3 * i, 20 + 3 * i + length)] for i, length in enumerate((1, 9, 2, 30, 4, 1, 17, 3, 6, 12))
]


@pytest.mark.usefixtures("on_both_devices")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompts", [MANY, [p[3:] for p in MANY]], ids=["shared prefix", "nothing shared"])
def test_a_place_that_is_filled_again_sees_nothing_of_its_former_row(shape: str, prompts: list[list[int]]) -> None:
    """Answers end at different tokens, so that prompts join a batch that is under way."""
    model = tiny_model(shape, dtype=torch.float64)
    stops = [int(token) for token in range(0, model.config.vocab_size, 7)]
    answers = generate(policy_of(model), prompts, stop_ids=stops, sampling=Sampling(12), batch_size=3)
    expected = [greedy_by_transformers(model, prompt, 12, stops) for prompt in prompts]
    assert [a.all_tokens for a in answers] == expected
    for prompt, answer in zip(prompts, answers, strict=True):
        (alone,) = generate(policy_of(model), [prompt], stop_ids=stops, sampling=Sampling(12))
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=2e-6)  # of float32 logits
    assert shape == "gpt2" or len({len(ids) for ids in expected}) > 1  # the random GPT-2 repeats one token


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1000, 32_001])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_drawn_token_inverts_the_distribution(vocabulary: int, dtype: torch.dtype) -> None:
    """Against one running sum over the vocabulary in float64; a token without weight is never drawn."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(400, vocabulary, generator=generator).mul(3).softmax(-1)
    weights[:, ::3] = 0.0
    weights[:, -1] += weights.sum(-1).eq(0)  # some weight in every row
    uniform = torch.rand(400, 1, generator=generator, dtype=dtype)
    uniform[:3] = torch.tensor([0.0, 1.0 - torch.finfo(dtype).eps / 2, 0.5], dtype=dtype)[:, None]
    drawn = decoding.invert_distribution(weights, uniform)[:, None]
    assert (weights.gather(1, drawn) > 0).all()
    ends, threshold = weights.double().cumsum(-1), uniform.double() * weights.double().sum(-1, keepdim=True)
    end, start = ends.gather(1, drawn), (ends - weights.double()).gather(1, drawn)
    slack = 256 * torch.finfo(dtype).eps
    assert (start <= threshold + slack).all() and (threshold <= end + slack).all()
    assert len(decoding.invert_distribution(weights[:0], uniform[:0])) == 0


@pytest.mark.usefixtures("on_both_devices")
@pytest.mark.parametrize("prompts", [MANY, [p[3:] for p in MANY]], ids=["shared prefix", "nothing shared"])
def test_the_caller_may_end_an_answer(prompts: list[list[int]]) -> None:
    """Each answer is the beginning of the one that nothing ended, up to the token that ends it."""
    policy = policy_of(tiny_model(dtype=torch.float64))
    whole = generate(policy, prompts, stop_ids=[2], sampling=Sampling(12), batch_size=3)

    def is_complete(ids: Sequence[int]) -> bool:
        return len(ids) >= 3 and sum(ids) % 5 == 0

    answers = generate(policy, prompts, stop_ids=[2], sampling=Sampling(12), batch_size=3, on_token=is_complete)
    ends = [next((n for n in range(1, len(a.ids) + 1) if is_complete(a.ids[:n])), None) for a in whole]
    assert [a.ids for a in answers] == [a.ids[:end] for a, end in zip(whole, ends, strict=True)]
    assert [a.ended_by_caller for a in answers] == [end is not None for end in ends]
    assert [a.stopped for a in answers] == [w.stopped or end is not None for w, end in zip(whole, ends, strict=True)]
    assert len({len(a.ids) for a in answers}) > 2 and all(len(a.logprobs) == len(a.all_tokens) for a in answers)


def rows_of_calls(policy: object, **options: object) -> list[int]:
    """Rows of each call of the model while it answers."""
    rows: list[int] = []

    def note(module: object, args: object, kwargs: dict[str, torch.Tensor], out: object) -> None:
        if "past_key_values" in kwargs:
            rows.append(len(kwargs["input_ids"]))

    hook = policy.model.register_forward_hook(note, with_kwargs=True)  # type: ignore[attr-defined]
    generate(policy, **options)  # type: ignore[arg-type]
    hook.remove()
    return rows


def test_a_prompt_that_waits_takes_the_place_of_an_answer_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer of 40 tokens and 39 of one: without refilling a batch of 4 takes 40 + 9 calls."""
    policy = policy_of(tiny_model(vocab_size=512))
    prompts = [[5, 6, 7 + i] for i in range(40)]
    first = [a.ids[0] for a in generate(policy, prompts, stop_ids=[], sampling=Sampling(1))]
    stops = sorted(set(first) - {first[39]})  # all answers end at once but those that begin as the last one does
    ended = sum(token in stops for token in first)
    assert 30 < ended < 40
    rows = rows_of_calls(policy, prompts=prompts, stop_ids=stops, sampling=Sampling(40), batch_size=4)
    lengths = [len(a.all_tokens) for a in generate(policy, prompts, stop_ids=stops, sampling=Sampling(40))]
    assert max(rows) == 4
    # the calls in which every place is taken, and at most one longest answer beside them
    assert len(rows) <= sum(lengths) / 4 + max(lengths)
    # without refilling: each batch as long as its longest answer
    assert len(rows) < sum(max(lengths[i : i + 4]) for i in range(0, 40, 4))


def test_the_cache_forgets_what_no_row_sees() -> None:
    """Answers of 25 and 15 tokens in turn, so that the batch never runs empty."""
    policy, slots = policy_of(tiny_model(dtype=torch.float64)), []
    generator = torch.Generator().manual_seed(0)
    decoder = decoding.Decoder(policy, None, 0, frozenset(), Sampling(25), generator, batch_size=2)
    policy.model.register_forward_hook(
        lambda m, args, kwargs, out: slots.append(kwargs["attention_mask"].shape[1]), with_kwargs=True
    )
    prompts = [[5 + i, 6] for i in range(30)]
    with torch.no_grad():
        answers = decoder.run([decoding.Request(i, p, 25 if i % 2 else 15) for i, p in enumerate(prompts)])
    assert len(slots) > 200 and max(slots) <= 2 + 25 + decoding.TRIM_SLOTS
    for i, prompt in enumerate(prompts):
        (answer,), alone = (
            answers[i],
            generate(policy, [prompt], stop_ids=[], sampling=Sampling(25 if i % 2 else 15))[0],
        )
        assert answer.ids == alone.ids and answer.logprobs == pytest.approx(
            alone.logprobs, abs=2e-6
        )  # of float32 logits


def test_a_short_row_goes_on_after_the_slots_of_a_long_one_were_cut_off() -> None:
    policy, slots = policy_of(tiny_model(dtype=torch.float64)), []
    decoder = decoding.Decoder(policy, None, 0, frozenset(), Sampling(25), torch.Generator(), batch_size=2)
    policy.model.register_forward_hook(
        lambda m, args, kwargs, out: slots.append(kwargs["attention_mask"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        answers = decoder.run([decoding.Request(0, list(range(5, 95)), 3), decoding.Request(1, [7, 8, 9], 25)])
    assert slots[2] == 92 and slots[3] < 10
    (alone,) = generate(policy, [[7, 8, 9]], stop_ids=[], sampling=Sampling(25))
    assert answers[1][0].logprobs == pytest.approx(alone.logprobs, abs=2e-6)  # of float32 logits


def test_prompts_in_the_batch_fit_into_the_planned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 40)
    policy = policy_of(tiny_model())
    prompts = [list(range(5 + i, 5 + i + length)) for i, length in enumerate((3, 4, 5, 10, 19, 20))]
    rows = rows_of_calls(policy, prompts=prompts, stop_ids=[], sampling=Sampling(3), batch_size=8)
    # two of 20 tokens; later four of at most ten
    assert rows[0] == 2 and max(rows) == 4
    alone = [generate(policy, [p], stop_ids=[], sampling=Sampling(3))[0].ids for p in prompts]
    together = generate(policy, prompts, stop_ids=[], sampling=Sampling(3), batch_size=8)
    assert [a.ids for a in together] == alone


def test_places_are_added_to_rows_that_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three places beside a prompt of 20 tokens; when its answer has ended, five of at most 12 fit."""
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 64)
    policy, rows = policy_of(tiny_model(dtype=torch.float64)), []
    decoder = decoding.Decoder(policy, None, 0, frozenset(), Sampling(20), torch.Generator(), batch_size=8)
    policy.model.register_forward_hook(
        lambda m, args, kwargs, out: rows.append(len(kwargs["attention_mask"])), with_kwargs=True
    )
    prompts = [list(range(5 + 9 * i, 5 + 9 * i + length)) for i, length in enumerate((20, 10, 9, 8, 7))]
    with torch.no_grad():
        answers = decoder.run([decoding.Request(i, p, 20 if i else 2) for i, p in enumerate(prompts)])
    assert rows[:3] == [3, 3, 4]
    for i, prompt in enumerate(prompts):
        (alone,) = generate(policy, [prompt], stop_ids=[], sampling=Sampling(20 if i else 2))
        assert answers[i][0].logprobs == pytest.approx(alone.logprobs, abs=2e-6)  # of float32 logits


def test_few_free_places_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while prompts wait that find no room: `PREFILL_TOKENS` allows five prompts of ten tokens."""
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 50)
    policy, rows = policy_of(tiny_model()), []
    decoder = decoding.Decoder(policy, None, 0, frozenset(), Sampling(40), torch.Generator(), batch_size=16)
    policy.model.register_forward_hook(
        lambda m, args, kwargs, out: rows.append(len(kwargs["attention_mask"])), with_kwargs=True
    )
    limits = [1 + 37 * i % 40 for i in range(50)]
    with torch.no_grad():
        decoder.run([decoding.Request(i, [5] * 10, limit) for i, limit in enumerate(limits)])
    assert max(rows) == 5 and sum(limits) > 0.9 * sum(rows)


def test_prompts_are_encoded_in_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, encoded = policy_of(tiny_model()), []
    prompts = [list(range(5 + 9 * i, 5 + 9 * i + length)) for i, length in enumerate((8, 1, 9, 13, 30, 2, 5))]
    at_once = generate(policy, prompts, stop_ids=[], sampling=Sampling(4, 1.0, 0, 2))
    monkeypatch.setattr(decoding, "ENCODE_TOKENS", 14)
    packed_kv = policy.packed_kv
    monkeypatch.setattr(policy, "packed_kv", lambda ids, *rest: encoded.append(len(ids)) or packed_kv(ids, *rest))
    in_parts = generate(policy, prompts, stop_ids=[], sampling=Sampling(4, 1.0, 0, 2))
    assert encoded == [0 + 1 + 4 + 7, 8, 12, 29]  # without last tokens; one text is never divided
    for a, b in zip(at_once, in_parts, strict=True):
        assert a.ids == b.ids and a.logprobs == pytest.approx(b.logprobs, abs=2e-6)  # of float32 logits


def test_answered_prompts_are_counted_once() -> None:
    counted: list[int] = []
    options = {"stop_ids": [], "sampling": Sampling(3, 1.0, 0, 2), "batch_size": 4, "on_batch": counted.append}
    generate(policy_of(tiny_model()), [[5, 6], [7], [8, 9, 10], [11], [12]], **options)  # type: ignore[arg-type]
    assert sum(counted) == 5 and len(counted) > 1
