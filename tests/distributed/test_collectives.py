"""What eight ranks hold and send, counted with torch's fake process group: shards, dtypes, collectives of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from builders import documents, policy_of
from models import tiny_model
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import SftConfig
from rung.methods.registry import attach_method
from rung.models import generate as generation
from rung.models.packing import pack_separately
from rung.models.policy import Policy
from rung.objectives.registry import OBJECTIVES
from rung.training import fsdp
from rung.training.step import accumulate

RANKS, LAYERS, WIDTH, MLP, VOCABULARY = 8, 3, 32, 48, 320
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
"""Parameters of a layer: q, k and v of half the width, o, the three of the block, two norms."""


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    distributed.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    distributed.destroy_process_group()


class Sent(TorchDispatchMode):
    """Collectives by kind, dtype and elements of the whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, torch.dtype, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if "allgather_base" in name:
            self.counts["gather", tensors[0].dtype, tensors[0].numel()] += 1
        elif "all_gather_into_tensor" in name and "wait" not in name:
            self.counts["gather", tensors[0].dtype, RANKS * tensors[0].numel()] += 1
        elif "reduce_scatter" in name and "wait" not in name:
            self.counts["sum", max(tensors, key=torch.Tensor.numel).dtype, max(t.numel() for t in tensors)] += 1
        return func(*args, **(kwargs or {}))


def sharded(kind: str, compute: torch.dtype, shape: str = "qwen2") -> Policy:
    stored = torch.bfloat16 if compute is torch.bfloat16 and kind == "lora" else torch.float32
    model = tiny_model(shape, num_hidden_layers=LAYERS, attention_bias=False, dtype=stored)
    for layer in model.model.layers:  # qwen2 has biases here, which would blur the counts
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).bias = None
    method = attach_method(model, METHOD_CONFIGS[kind](), seed=0)
    policy = Policy(policy_of(model, compute=compute).base, method)
    fsdp.shard_policy(policy, method, fused=True)
    return policy


def sent(policy: Policy, again: range = range(0)) -> Counter[tuple[str, torch.dtype, int]]:
    """What one micro-batch sends, forwards and backwards."""
    objective = OBJECTIVES["sft"](SftConfig())
    policy.layers_to_recompute = lambda tokens: again
    batches = pack_separately(documents(count=1), policy.device)
    for _ in range(2):  # the first step also sets FSDP up
        policy.model.zero_grad()
        with Sent() as mode:
            accumulate(policy, objective, batches)
    return mode.counts


@pytest.mark.parametrize("again", [range(0), range(1), range(LAYERS)])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_collectives_of_a_step_are_those_of_the_table(compute: torch.dtype, again: range) -> None:
    """A layer is gathered twice, forwards and backwards, whether or not it is computed again, and summed once in
    float32; embeddings and head are gathered once each, where they are read."""
    matrix = VOCABULARY * WIDTH
    table = {
        ("gather", compute, LAYER): 2 * LAYERS,
        ("sum", torch.float32, LAYER): LAYERS,
        ("gather", compute, matrix): 2,
        ("sum", torch.float32, matrix): 2,
    }
    assert sent(sharded("full", compute), again) == table
    assert sent(sharded("lora", compute), again) == {("gather", compute, LAYER): 2 * LAYERS}


def test_each_rank_holds_an_eighth_of_each_kind_of_weight() -> None:
    """Bytes of rank 0, by kind: under full everything but the last norm, under lora the layers' base alone."""
    for kind, width in (("full", 4), ("lora", 2)):
        policy = sharded(kind, torch.bfloat16)
        held: Counter[str] = Counter()
        for name, parameter in policy.model.named_parameters():
            part = "adapter" if "lora_" in name else "layers" if ".layers." in name else name.split(".")[-2]
            held[part] += (parameter.to_local() if isinstance(parameter, DTensor) else parameter).nbytes
        share = RANKS if kind == "full" else 1
        expected = {
            "layers": LAYERS * width * LAYER // RANKS,
            "norm": width * WIDTH,
            "embed_tokens": width * VOCABULARY * WIDTH // share,
            "lm_head": width * VOCABULARY * WIDTH // share,
        }
        adapter = 4 * 16 * LAYERS * (2 * 64 + 2 * 48 + 3 * 80)
        assert held == (expected if kind == "full" else {**expected, "adapter": adapter})


def test_mutation_without_the_policy_of_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered in four bytes where two are enough."""
    monkeypatch.setattr(fsdp, "_precision", lambda compute: fsdp.MixedPrecisionPolicy())
    counts = sent(sharded("full", torch.bfloat16))
    assert ("gather", torch.bfloat16, LAYER) not in counts and counts["gather", torch.float32, LAYER] == 2 * LAYERS


def test_float32_has_no_policy_of_dtypes() -> None:
    assert fsdp._precision(torch.float32) == fsdp._precision(torch.float64) == fsdp.MixedPrecisionPolicy()


def test_a_model_in_parts_is_not_decoded_by_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card replays the calls of a token, but a layer in parts is gathered by hooks and messages."""
    asked: list[int] = []
    monkeypatch.setattr(generation, "decodes_statically", lambda device: asked.append(1) or True)
    monkeypatch.setattr(generation, "StaticDecoder", lambda decoder: pytest.fail("a graph"))
    policy = sharded("lora", torch.float32)
    (answer,) = generation.generate(policy, [[5, 6, 7]], stop_ids=(), sampling=generation.Sampling(3))
    assert asked and len(answer.ids) == 3
