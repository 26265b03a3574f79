"""Layers that do not move, run once: against every layer run every time."""

from __future__ import annotations

import os

import pytest
import torch

from builders import documents, example, tuned
from models import SHAPES, tiny_model
from naive import distance, gradients, naive, naive_loss
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import SftConfig
from rung.errors import CheckpointError
from rung.methods.registry import attach_method
from rung.models.layers import lowest_trainable_layer
from rung.models.packing import MIN_PREFIX_AHEAD, pack, pack_separately
from rung.objectives.sft import SftObjective
from rung.training.frozen_layer_cache import DeviceStore, FileStore, FrozenLayerCache, has_device_space
from rung.training.step import accumulate
from tolerances import FLOAT32, FLOAT64

UPPER = [("lora", {"layers": (1,)}, 1), ("head", {}, 2)]


def lowest(kind: str, config: dict[str, object], shape: str = "llama") -> int:
    model = tiny_model(shape)
    return lowest_trainable_layer(model, attach_method(model, METHOD_CONFIGS[kind](**config), seed=0).trainable())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "config", "layer"), UPPER, ids=["lora", "head"])
@pytest.mark.parametrize("shared", [0, MIN_PREFIX_AHEAD + 9])
@pytest.mark.parametrize("store", [FileStore, DeviceStore])
def test_gradients_equal_the_naive_ones(
    store: type[FileStore | DeviceStore], shape: str, kind: str, config: dict[str, object], layer: int, shared: int
) -> None:
    assert lowest(kind, config, shape) == layer
    examples = documents(6, count=7, shared=shared)
    for dtype, limit in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
        model, plain = naive(kind, shape, dtype=dtype, wide_norms=dtype is torch.float64, **config)
        expected = naive_loss(model, examples)
        policy, method = tuned(kind, shape, dtype=dtype, **config)
        cache = FrozenLayerCache(policy, layer, 50, store=store())
        for _ in range(2):  # written, then read
            policy.model.zero_grad()
            loss = accumulate(policy, SftObjective(SftConfig()), cache.feed(pack(examples, 50)))
            assert float(loss) == pytest.approx(float(expected), rel=limit)
            assert distance(gradients(method), gradients(plain)) < limit
        numbers = sum(map(len, examples)) * policy.model.config.hidden_size
        assert cache.summary() == {"layer": layer, "documents": 7, "bytes": numbers * dtype.itemsize}


def test_states_on_a_card_do_not_hold_those_of_the_batch() -> None:
    """A view would keep the states of every batch alive, also those of prefixes that other documents have too."""
    policy, _ = tuned("lora", layers=(1,))
    store, examples = DeviceStore(), documents(6)
    FrozenLayerCache(policy, 1, 500, store=store).feed(pack(examples, 500))
    assert all(states.untyped_storage().nbytes() == states.nbytes for states in store.states.values())


def test_where_states_are_kept() -> None:
    """On the card where they take half of what the plan leaves free; 100 documents of 20 tokens and width 64."""
    rows = [[example(range(20), 3)] for _ in range(100)]
    needed = 100 * 20 * 64 * 4
    assert has_device_space(rows, 64, 2 * needed) and not has_device_space(rows, 64, 2 * needed - 2)
    assert not has_device_space(rows, 64, 0)  # a processor, or a run without a plan


def test_the_layers_below_do_not_run_again() -> None:
    policy, _ = tuned("lora", layers=(1,))
    cache = FrozenLayerCache(policy, 1, 50)
    examples = documents(6)
    cache.feed(pack(examples, 50))
    calls: list[int] = []
    for number, layer in enumerate(policy.model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    accumulate(
        policy, SftObjective(SftConfig()), cache.feed(pack_separately(examples))
    )  # packed otherwise: the states are found
    assert set(calls) == {1}


@pytest.mark.parametrize(("broken", "said"), [("poisoned", "not what was written"), ("cut off", "cut short")])
def test_a_damaged_file_is_detected(broken: str, said: str) -> None:
    policy, _ = tuned("lora", layers=(1,))
    cache = FrozenLayerCache(policy, 1, 50)
    batches = pack(documents(6), 50)
    cache.feed(batches)
    byte, file = cache.store.file.read(1000, 1), cache.store.file._descriptor
    if broken == "poisoned":
        os.pwrite(file, bytes([byte[0] ^ 1]), 1000)
    else:
        os.truncate(file, 1000)
    with pytest.raises(CheckpointError, match=said):
        cache.feed(batches)


def test_states_of_another_document_are_noticed() -> None:
    """The mutation: entries mixed up move the gradient by far more than the tolerance."""
    examples = documents(6)
    model, plain = naive("lora", dtype=torch.float64, layers=(1,))
    naive_loss(model, examples)
    policy, method = tuned("lora", dtype=torch.float64, layers=(1,))
    batches = FrozenLayerCache(policy, 1, 50).feed(pack(examples, 500))
    batches[0].cached_hidden.states.copy_(batches[0].cached_hidden.states.roll(1, dims=0))
    accumulate(policy, SftObjective(SftConfig()), batches)
    assert distance(gradients(method), gradients(plain)) > 1e-3


@pytest.mark.parametrize(
    ("kind", "config", "layer"),
    [
        ("full", {}, 0),
        ("lora", {}, 0),
        ("lora", {"layers": (0,)}, 0),
        ("lora", {"layers": (1,), "modules_to_save": ("embed_tokens",)}, 0),
        ("lora", {"layers": (1,), "modules_to_save": ("norm",)}, 0),
        ("lora", {"layers": (1,), "modules_to_save": ("lm_head",)}, 1),
        *UPPER,
    ],
)
def test_the_lowest_layer_that_moves(kind: str, config: dict[str, object], layer: int) -> None:
    assert lowest(kind, config) == layer
