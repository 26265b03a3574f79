"""Decoding as on a card: what a step reads, what it records, and what it does when nothing can be recorded.

That its answers are those of transformers, and those of the decoder for processors, is in `test_generate.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from builders import documents, policy_of, tuned
from models import SHAPES, tiny_model
from rung.config.method import METHOD_CONFIGS
from rung.methods.registry import attach_method
from rung.models import generate as generating
from rung.models import static_decoding
from rung.models.generate import Sampling, generate
from rung.models.packing import pack
from rung.models.static_decoding import READ_EVERY, StaticDecoder, decodes_statically, merges_adapter

PROMPTS = [[5, 6, 7, 40 + i, *range(50, 50 + i % 5)] for i in range(11)]


@pytest.fixture(autouse=True)
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "decodes_statically", lambda device: True)
    monkeypatch.setattr(generating, "merges_adapter", lambda policy, slots: True)


def answers(policy: Any, sampling: Sampling, **options: Any) -> list[list[int]]:
    return [a.all_tokens for a in generate(policy, PROMPTS, stop_ids=[2, 17, 90], sampling=sampling, **options)]


class NothingIsRead(TorchDispatchMode):
    """Fails where the host would wait for a value, and where a size depends on one."""

    FORBIDDEN = frozenset({"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero", "equal"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.FORBIDDEN, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_reads_nothing_and_makes_nothing_new(
    shape: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a graph needs: every step reads and writes the same memory, and the host none of it."""
    original, addresses = StaticDecoder._step, set[tuple[int, ...]]()

    def step(decoder: StaticDecoder) -> None:
        with NothingIsRead():
            original(decoder)
        tensors = (decoder.slot_B, decoder.last_B, decoder.column_1, decoder.token_BC, decoder.logprob_BC)
        buffers = [b for layer in decoder.cache.layers for b in (layer.keys, layer.values)]
        addresses.add(tuple(t.data_ptr() for t in (*tensors, *buffers)))

    monkeypatch.setattr(StaticDecoder, "_step", step)
    answers(policy_of(tiny_model(shape)), Sampling(20, temperature), batch_size=4)
    assert len(addresses) == 1


def test_tokens_are_read_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 tokens are three reads; a batch that needs fewer takes no more steps than its longest answer."""
    steps, advances = [], []
    original_step, original_advance = StaticDecoder._step, StaticDecoder._advance
    monkeypatch.setattr(StaticDecoder, "_step", lambda decoder: (steps.append(1), original_step(decoder))[1])
    monkeypatch.setattr(
        StaticDecoder, "_advance", lambda decoder, step: (advances.append(1), original_advance(decoder, step))[1]
    )
    policy = policy_of(tiny_model())
    generate(policy, PROMPTS[:4], stop_ids=[], sampling=Sampling(40))
    assert (len(steps), len(advances)) == (40, -(-40 // READ_EVERY))
    advances.clear()
    generate(policy, PROMPTS[:1], stop_ids=[], sampling=Sampling(10), on_token=lambda tokens: False)
    assert len(advances) == 10  # a stream that somebody reads


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recording_leaves_no_trace(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm steps before a recording write to the batch; the answers are those of a batch without them."""
    policy, _ = tuned("lora")
    expected = answers(policy, Sampling(40, temperature), batch_size=4)
    recorded = []

    def record(decoder: StaticDecoder) -> Any:
        recorded.append(1)
        for _ in range(static_decoding.WARM_STEPS):
            decoder._step()
        return decoder._step

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(StaticDecoder, "_record", record)
    assert answers(policy, Sampling(40, temperature), batch_size=4) == expected
    assert recorded == [1]  # once for all prompts
    answers(policy, Sampling(31, temperature), batch_size=4)
    assert recorded == [1]  # short answers are not worth one


def test_a_model_that_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    policy = policy_of(tiny_model())
    expected = answers(policy, Sampling(40), batch_size=4)

    def record(decoder: StaticDecoder) -> Any:
        decoder._step()
        raise RuntimeError("operation not permitted when stream is capturing\nat line 5")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(StaticDecoder, "_record", record)
    assert answers(policy, Sampling(40), batch_size=4) == expected
    assert "decoded without a graph, which is slower: operation not permitted" in capsys.readouterr().err

    def no_memory(decoder: StaticDecoder) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StaticDecoder, "_record", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        answers(policy, Sampling(40), batch_size=4)


def test_prompts_in_the_batch_fit_into_the_planned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_decoding, "PREFILL_TOKENS", 16)
    rows: list[int] = []
    policy = policy_of(tiny_model())
    policy.model.register_forward_hook(
        lambda module, args, kwargs, out: "past_key_values" in kwargs and rows.append(len(kwargs["input_ids"])),
        with_kwargs=True,
    )
    longest = max(map(len, PROMPTS)) - 3  # the first three tokens are shared
    expected = answers(policy, Sampling(5), batch_size=64)
    assert set(rows) == {16 // longest}
    monkeypatch.setattr(static_decoding, "PREFILL_TOKENS", 16_384)
    assert answers(policy, Sampling(5), batch_size=64) == expected and max(rows) == len(PROMPTS)


def test_slots_that_windows_leave_behind_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: windows counted from the end of the buffers and not from the row's own slot."""
    policy = policy_of(tiny_model("gemma2", sliding_window=6))
    prompts = [p[3:] + p for p in PROMPTS]
    expected = [a.ids for a in generate(policy, prompts, stop_ids=[], sampling=Sampling(12))]
    original = StaticDecoder._step

    def step(decoder: StaticDecoder) -> None:
        forward = policy.model.forward
        options = {"row_slots": torch.full_like(decoder.slot_B, decoder.slots - 1)}
        policy.model.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, **options})
        original(decoder)
        policy.model.forward = forward

    monkeypatch.setattr(StaticDecoder, "_step", step)
    assert [a.ids for a in generate(policy, prompts, stop_ids=[], sampling=Sampling(12))] != expected


@pytest.mark.parametrize("shape", SHAPES)
def test_a_merged_adapter_answers_as_the_adapter_does(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64; afterwards the base is the one from before, bit for bit, and the adapter trains on."""
    policy, method = tuned("lora", shape, dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    batch = pack(documents(), 1000)[0]
    gradient_before = torch.autograd.grad(policy.logprobs(batch).sum(), list(method.trainable().values()))
    merged = generate(policy, PROMPTS, stop_ids=[2], sampling=Sampling(12))
    monkeypatch.setattr(generating, "merges_adapter", lambda policy, slots: False)
    apart = generate(policy, PROMPTS, stop_ids=[2], sampling=Sampling(12))
    assert [a.all_tokens for a in merged] == [a.all_tokens for a in apart]
    for a, b in zip(merged, apart, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-6)  # of float32 logits
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
    gradient = torch.autograd.grad(policy.logprobs(batch).sum(), list(method.trainable().values()))
    assert all(torch.equal(a, b) for a, b in zip(gradient, gradient_before, strict=True))


def test_no_adapter_is_multiplied_within_a_merged_model() -> None:
    policy, method = tuned("lora", dtype=torch.float64)
    batch = pack(documents(), 1000)[0]
    with torch.no_grad(), method.merged():
        merged = policy.logprobs(batch)
        for p in method.trainable().values():
            p.mul_(3.0)  # the mutation: an adapter that still computes would show it
        assert torch.equal(policy.logprobs(batch), merged)
    with torch.no_grad():
        assert (policy.logprobs(batch) - merged).abs().max() > 1e-3


@pytest.mark.parametrize("config", [{"dora": True}, {"dropout": 0.5}, {"init": "pissa"}])
def test_what_can_be_merged(config: dict[str, Any]) -> None:
    """DoRA and dropout compute in peft; a start that is subtracted again is part of the sum."""
    policy, method = tuned("lora", dtype=torch.float64, **config)
    batch = pack(documents(), 1000)[0]
    policy.model.eval()
    with torch.no_grad():
        expected = policy.logprobs(batch)
        weight = next(iter(method.layers().values())).base_layer.weight
        original = weight.data_ptr()
        with method.merged():
            assert (weight.data_ptr() == original) is ("init" not in config)
            assert (policy.logprobs(batch) - expected).abs().max() < 1e-9
        assert weight.data_ptr() == original
        with method.disabled(), method.merged():
            assert weight.data_ptr() == original


def test_a_rollout_that_fails_leaves_the_base_as_it_was() -> None:
    _, method = tuned("lora")
    weight = next(iter(method.layers().values())).base_layer.weight
    original = weight.data_ptr()
    with pytest.raises(RuntimeError), method.merged():
        raise RuntimeError
    assert weight.data_ptr() == original
    with torch.no_grad():
        assert not any(layer.merged for layer in method.layers().values())


@pytest.mark.parametrize(
    ("compute", "free", "merges"),
    [(torch.float32, 10**9, True), (torch.float32, 10**5, False), (torch.bfloat16, 10**9, False)],
)
def test_when_an_adapter_is_merged(
    compute: torch.dtype, free: int, merges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits a small update would be rounded away; in 32 there must be room for the copy and the cache."""
    policy, method = tuned("lora")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**10))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    policy = policy_of(policy.model, method, compute=compute)
    assert merges_adapter(policy, 100) is merges
    assert not merges_adapter(policy, 10**7)


def test_an_update_in_sixteen_bits_is_lost() -> None:
    """Why it is not merged there: of an update as small as after the first steps little is left."""
    model = tiny_model(dtype=torch.bfloat16)
    method: Any = attach_method(model, METHOD_CONFIGS["lora"](), seed=0)  # type: ignore[arg-type]
    layer = next(iter(method.layers().values()))
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(0.0, 1e-4, generator=torch.Generator().manual_seed(0))
        weight = layer.base_layer.weight
        exact, before = layer.get_delta_weight("default").float(), weight.float()
        with method.merged():
            kept = weight.float() - before
    assert ((kept * exact).sum() / exact.square().sum()) < 0.5


def test_which_devices_decode_so() -> None:
    assert decodes_statically(torch.device("cuda", 1)) and not decodes_statically(torch.device("cpu"))
    assert not decodes_statically(torch.device("mps"))
