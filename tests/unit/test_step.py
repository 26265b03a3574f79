"""One normalizer over the whole window: every way to cut a step gives the same gradient."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from builders import documents, example, policy_of, tuned
from models import tiny_model
from rung.config.model_catalog import CATALOG
from rung.config.objective import SftConfig
from rung.config.training import OptimizerConfig
from rung.errors import DataError
from rung.models.packing import pack, pack_separately
from rung.objectives.sft import SftObjective, nll
from rung.planning.architecture import shape_from_config
from rung.planning.memory import tokens_per_micro_batch
from rung.planning.method_cost import activation_bytes_per_token
from rung.planning.recomputation import DocumentLimit, RecomputeRule
from rung.training import micro_batch
from rung.training.optimizer import learning_rate_at, make_optimizer
from rung.training.step import accumulate, mean_loss
from rung.types import Counts, Example, LossTerm, PackedBatch
from tolerances import FLOAT64, RMS_NORM

SFT = SftObjective(SftConfig())


def gradients(batches: list[PackedBatch]) -> tuple[float, list[torch.Tensor]]:
    policy, method = tuned("lora", "gpt2", dtype=torch.float64)
    loss = accumulate(policy, SFT, batches)
    return float(loss), [p.grad for p in method.trainable().values()]


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all((x - y).abs().max() < FLOAT64 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("count", [8, 5])
def test_every_partition_gives_one_gradient(count: int) -> None:
    """8x1, 1x8, 2x4, a tree, and a window of unequal lengths and weights."""
    examples = documents(1, count=count, shared=17)
    loss, expected = gradients(pack_separately(examples))
    halves = [*pack(examples[::2], 10_000), *pack(examples[1::2], 10_000)]
    for batches in (pack(examples, 10_000), pack(examples, 40), halves, pack(examples, 60, share_prefixes=False)):
        other, found = gradients(batches)
        assert abs(other - loss) < FLOAT64 and close(found, expected)


def test_the_mean_of_means_is_another_gradient() -> None:
    """The mutation that transformers#34191 shipped: dividing each micro-batch by its own count."""
    examples = documents(1, count=4)
    _, expected = gradients(pack_separately(examples))
    policy, method = tuned("lora", "gpt2", dtype=torch.float64)
    for batch in pack_separately(examples):
        (SFT.loss(policy, batch)[0].total / SFT.count(batch).tokens / 4).backward()
    assert not close([p.grad for p in method.trainable().values()], expected)


def test_loss_equals_cross_entropy_of_transformers() -> None:
    policy = policy_of(tiny_model("gpt2", dtype=torch.float64))
    e = documents(2, count=1)[0]
    labels = torch.from_numpy(e.ids.astype("int64")).masked_fill(torch.from_numpy(~e.supervised), -100)
    theirs = policy.model(
        input_ids=torch.from_numpy(e.ids.astype("int64"))[None], labels=labels[None], use_cache=False
    ).loss
    assert abs(mean_loss(policy, SFT, pack([e], 100)) - float(theirs)) < 1e-6  # transformers' loss is in float32


def test_a_row_of_weight_two_counts_as_two_rows() -> None:
    light, heavy = example([5, 6, 7, 8], 2), example([9, 10, 11, 12, 13], 2, weight=2.0)
    twice = example([9, 10, 11, 12, 13], 2)
    assert close(gradients(pack([light, heavy], 100))[1], gradients(pack([light, twice, twice], 100))[1])


def test_evaluation_loss_does_not_depend_on_batches() -> None:
    policy = policy_of(tiny_model("llama", dtype=torch.float64))
    examples = documents(3, count=9)
    losses = {
        mean_loss(policy, SFT, pack(chosen, budget))
        for budget in (30, 70, 9999)
        for chosen in (examples, examples[::-1])
    }
    assert max(losses) - min(losses) < RMS_NORM


def test_nothing_supervised_is_an_error_and_moves_nothing() -> None:
    policy, method = tuned("lora")
    silent = Example(example([5, 6, 7], 1).ids, torch.zeros(3, dtype=torch.bool).numpy(), example([5], 1).source)
    with pytest.raises(DataError, match="no supervised token"):
        accumulate(policy, SFT, pack([silent], 100))
    assert all(p.grad is None for p in method.trainable().values())


def test_nll_of_a_uniform_guess() -> None:
    assert math.isclose(float(nll(torch.full((3,), -math.log(8.0)), torch.ones(3))), 3 * math.log(8.0), rel_tol=1e-6)


def test_counts_add_and_name_their_units() -> None:
    total = Counts(tokens=3, sequences=1) + Counts(tokens=4, pairs=2)
    assert (total["tokens"], total["sequences"], total["pairs"]) == (7, 1, 2)
    assert LossTerm(torch.zeros(()), unit="pairs").name == "loss"


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rates_against_closed_forms(schedule: str) -> None:
    rates = [learning_rate_at(s, total=100, peak=2.0, schedule=schedule, warmup=0.1) for s in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    halfway = {"cosine": 1.0, "linear": 1.0, "constant": 2.0}[schedule]
    assert rates[55] == pytest.approx(halfway)
    assert all(r > 0 for r in rates)
    assert rates[10] == 2.0 and (
        schedule == "constant" or all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    )


def test_decay_spares_vectors() -> None:
    named = {"matrix": torch.nn.Parameter(torch.ones(2, 2)), "bias": torch.nn.Parameter(torch.ones(2))}
    optimizer = make_optimizer(named, OptimizerConfig(weight_decay=0.1))
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(named["matrix"].data, torch.full((2, 2), 0.9)) and torch.equal(
        named["bias"].data, torch.ones(2)
    )


def test_budget_follows_from_the_shape() -> None:
    shape = shape_from_config(tiny_model().config.to_dict())
    assert activation_bytes_per_token(shape) == 4 * 2 * (4 * 32 + 2 * 16 + 2 * 48)
    assert tokens_per_micro_batch(shape, "cpu") == 4096
    large = {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672}
    shape = shape_from_config({**tiny_model().config.to_dict(), **large})
    assert tokens_per_micro_batch(shape, "cpu") == 256
    assert tokens_per_micro_batch(shape, "cuda") == 16_384


def test_the_auto_budget_follows_from_the_shape_alone() -> None:
    shape = shape_from_config(CATALOG["smollm2-135m"].config)
    assert activation_bytes_per_token(shape) == 4 * 30 * (4 * 576 + 2 * 192 + 2 * 1536)
    assert tokens_per_micro_batch(shape, "cpu") == 776
    assert tokens_per_micro_batch(shape, "cuda") == 16_384


def test_only_a_document_that_does_not_fit_is_computed_again_and_only_as_much_as_needed() -> None:
    numbers = {"hidden_size": 8, "num_hidden_layers": 10, "num_attention_heads": 2, "intermediate_size": 16}
    shape = shape_from_config({"model_type": "llama", "vocab_size": 10, **numbers})
    a_layer = 4 * (4 * 8 + 2 * 8 + 2 * 16)
    assert RecomputeRule(shape, DocumentLimit(100 * 10 * a_layer)).layers_to_recompute(100) == range(0)
    assert RecomputeRule(shape, DocumentLimit(100 * 10 * a_layer - 1)).layers_to_recompute(100) == range(0, 1)
    assert RecomputeRule(shape, DocumentLimit(100 * 4 * a_layer - 1), lowest=6).layers_to_recompute(100) == range(6, 7)
    assert RecomputeRule(shape, DocumentLimit(1)).layers_to_recompute(100) == range(0, 10)
    kept = sum(a_layer if i >= 4 else 4 * 8 for i in range(10))
    assert RecomputeRule(shape, DocumentLimit(100 * kept)).layers_to_recompute(100) == range(0, 4)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("lora", {}),
        ("lora", {"dropout": 0.5}),
        ("lora", {"layers": (1,)}),
        ("prompt", {"virtual_tokens": 3}),
        ("prefix", {"virtual_tokens": 3}),
        ("bottleneck", {"width": 4}),
    ],
    ids=str,
)
def test_layers_computed_again_give_the_same_gradients_bit_for_bit(kind: str, config: dict[str, object]) -> None:
    """Of virtual tokens too, which stand before the layers and outside of them."""
    gradients = []
    for again in (range(0), range(0, 1), range(0, 2)):
        policy, method = tuned(kind, **config)
        policy.model.train()
        policy.layers_to_recompute = lambda tokens, again=again: again
        torch.manual_seed(3)
        accumulate(policy, SftObjective(SftConfig()), pack_separately(documents(2)))
        gradients.append([p.grad for p in method.trainable().values()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))
    assert all(g is not None and bool(g.any()) for g in gradients[0])


def inputs_alive(offloaded: range, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor | None], list[bool], int]:
    """Gradients of a document, whether each layer's input outlived the forward pass there, and bytes on the host."""
    policy, method = tuned("lora")
    policy.layers_to_recompute, policy.layers_to_offload = lambda tokens: range(2), lambda tokens: offloaded
    storages: list[weakref.ref[Any]] = []
    for layer in policy.model.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: storages.append(weakref.ref(inputs[0].untyped_storage())))
    empty, host_bytes = torch.empty, 0

    def counted(*shape: Any, **options: Any) -> Tensor:
        nonlocal host_bytes
        made = empty(*shape, **options)
        host_bytes += made.nbytes if "pin_memory" in options else 0
        return made

    monkeypatch.setattr(torch, "empty", counted)
    logprobs = policy.logprobs(pack_separately(documents(1))[0])
    gc.collect()
    alive = [storage() is not None for storage in storages]
    logprobs.sum().backward()
    return [p.grad for p in method.trainable().values()], alive, host_bytes


def test_inputs_on_the_host_leave_the_device_and_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; the input of an offloaded layer is freed there until the layer is computed again."""
    document = documents(1)[0]
    kept, alive, host_bytes = inputs_alive(range(0), monkeypatch)
    assert alive == [True, True] and host_bytes == 0
    for count in (1, 2):
        gradients, alive, host_bytes = inputs_alive(range(count), monkeypatch)
        assert alive == [number >= count for number in range(2)]
        assert host_bytes == count * len(document) * 32 * 4
        assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))


def test_mutation_that_keeps_what_it_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy beside the input saves nothing, and the test above sees it."""
    hooks, held = torch.autograd.graph.saved_tensors_hooks, list[Tensor]()

    def keeping(pack: Any, unpack: Any) -> Any:
        return hooks(lambda tensor: (held.append(tensor), pack(tensor))[1], unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", keeping)
    _, alive, _ = inputs_alive(range(2), monkeypatch)
    assert alive == [True, True]


@pytest.mark.parametrize("count", [1, 6])
def test_layers_of_a_single_document_computed_again_keep_less(count: int) -> None:
    """A row of several documents is what the budget asks for: it keeps everything."""
    kept = []
    for again in (range(0), range(0, 2)):
        policy, _ = tuned("lora")
        policy.layers_to_recompute = lambda tokens, again=again: again
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            policy.logprobs(pack(documents(2, count=count, longest=60), 1000)[0])
        kept.append(sum(size for at, size in storages.items() if at not in parameters))
    assert (kept[1] < 0.4 * kept[0]) == (count == 1)


def test_the_probe_takes_the_smallest_budget_that_is_nearly_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 9.0, 4.1, 4.5, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    monkeypatch.setattr(micro_batch, "_time_accumulation", lambda *_: next(seconds))
    policy, method = tuned("lora")
    assert (
        micro_batch.measure_micro_batch_tokens(policy, SftObjective(SftConfig()), documents(1, count=200), pack) == 512
    )


def test_the_probe_leaves_nothing_behind() -> None:
    policy, method = tuned("lora", dropout=0.1)
    before = {n: p.detach().clone() for n, p in method.trainable().items()}
    state = torch.get_rng_state()
    seen = []

    def rows(examples: Sequence[Example], tokens: int) -> list[PackedBatch]:
        seen.append((len(examples), tokens))
        return pack(examples, tokens, share_prefixes=False)

    assert micro_batch.measure_micro_batch_tokens(policy, SftObjective(SftConfig()), documents(1, count=3), rows) == 256
    assert seen == [(3, 256)] and not policy.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in method.trainable().items())
