"""What a run takes on a graphics card, and what it asks of the card: by formulas and stand-ins, none is needed."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from builders import documents, policy_of, rows, tuned
from models import tiny_model
from rung.config.method import LoraConfig
from rung.config.objective import SftConfig
from rung.config.run import RunConfig
from rung.config.training import OptimizerConfig
from rung.errors import PlanError
from rung.methods.registry import attach_method
from rung.models import base_model, varlen_attention
from rung.models.packing import pack
from rung.objectives.sft import SftObjective
from rung.planning.advise import CANDIDATE_BUDGETS, Advice, advise, assumed_micro_batch, auto_budget
from rung.planning.architecture import read_shape
from rung.planning.devices import DEVICES, Device, describe_device, find_local_device
from rung.planning.memory import CUDA_CONTEXT_BYTES, CUDA_TOKENS, MIN_TOKENS, MicroBatch, estimate_memory
from rung.planning.method_cost import has_row_kernel, layer_bytes_per_token, method_cost
from rung.planning.recomputation import DocumentLimit, RecomputeRule, document_limit
from rung.planning.throughput import throughput_for
from rung.runs import train
from rung.training import memory_use, micro_batch, optimizer
from rung.training.distributed import SINGLE_PROCESS
from rung.training.optimizer import OptimizerState

CUDA = torch.device("cuda")
_LLAMA = {"model_type": "llama", "vocab_size": 128_256, "dtype": "bfloat16", "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14_336},
    "70b": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28_672},
}
"""Llama 3 8B and 70B."""


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """Writes the config of one of `SHAPES`; nothing else of the model exists."""

    def write(name: str) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        config = {**_LLAMA, **SHAPES[name], "num_key_value_heads": 8, "max_position_embeddings": 131_072}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return str(tmp_path / name)

    return write


def config_of(name: str, kind: str, *, sharded: bool = False, **settings: Any) -> RunConfig:
    values = {"model": {"name": name, "sharded": sharded}, "data": {"path": "rows.jsonl"}, "output": "run"}
    return RunConfig.model_validate({**values, "method": {"kind": kind}, **settings})


def plan(config: RunConfig, device: str, processes: int = 1) -> Advice:
    return advise(config, device=DEVICES[device], processes=processes)


@pytest.mark.parametrize(
    ("name", "kind", "device", "processes"),
    [
        ("8b", "lora", "h100", 1),
        ("8b", "lora", "a100", 1),
        ("8b", "qlora", "rtx4090", 1),
        ("8b", "qlora", "rtx3090", 1),
        ("70b", "qlora", "h100", 1),
        ("70b", "qlora", "a100", 1),
        ("8b", "full", "h100", 8),
        ("8b", "full", "a100", 8),
    ],
)
def test_auto_finds_a_budget_that_fits(model: Any, name: str, kind: str, device: str, processes: int) -> None:
    config = config_of(model(name), kind, sharded=processes > 1)
    advice = plan(config, device, processes)
    assert advice.plan.fits and advice.plan.limit == DEVICES[device].memory
    tokens = advice.micro_batch.tokens
    assert MIN_TOKENS <= tokens <= CUDA_TOKENS and tokens % 256 == 0
    stage = advice.plan.memory.largest_stage
    assert sum(t.bytes for t in stage.terms) + CUDA_CONTEXT_BYTES == advice.plan.memory.required_bytes
    assert not any(t.mapped or t.name in ("products", "bitsandbytes", "temporaries") for t in stage.terms)
    if tokens < CUDA_TOKENS:  # the next budget would take the reserve
        training = config.training.model_copy(update={"tokens_per_micro_batch": tokens + 256})
        longer = plan(config.model_copy(update={"training": training}), device, processes)
        assert longer.plan.memory.required_bytes > 0.95 * DEVICES[device].memory
        assert advice.plan.memory.required_bytes <= 0.95 * DEVICES[device].memory


def test_8b_lora_takes_what_was_computed_by_hand(model: Any) -> None:
    """Weights 2 bytes, 16 an adapter's parameter, 3.0 MB a token of activations, a tenth of holes."""
    memory = plan(config_of(model("8b"), "lora"), "h100").plan.memory
    terms = {t.name: t.bytes for t in memory.largest_stage.terms}
    assert terms["weights"] == 2 * 8_030_261_248
    assert terms["adapter"] + terms["moments"] + terms["gradients"] == 16 * 41_943_040
    # Inputs of norms, queries, keys, values, output, gate and up.
    layer = 2 * (4096 + 4096 + 1024 + 14_336) * 2
    low_rank = 7 * 16 * 2  # what A makes of the input, for each of seven linears
    assert terms["activations"] == 16_384 * 32 * (layer + low_rank)
    assert terms["holes"] == int(0.10 * (terms["activations"] + terms["scratch"]))


def test_what_does_not_fit_names_the_cheapest_change(model: Any) -> None:
    on_a_t4 = plan(config_of(model("8b"), "lora"), "t4")
    assert on_a_t4.plan.fits is False and on_a_t4.micro_batch.compute_dtype == "float32"
    # One setting: the micro-batch follows by itself.
    assert on_a_t4.change is not None and on_a_t4.change.overrides == ("method={kind: qlora, bits: 8}",)
    assert on_a_t4.change.plan.fits
    replicas = plan(config_of(model("8b"), "full"), "h100", 8)
    assert replicas.plan.fits is False
    assert replicas.change is not None and replicas.change.overrides == ("model.sharded=true",)
    # Every process reads its rows alone: 70 billion parameters in 16 bits, over eight cards of 80 GB.
    in_parts = plan(config_of(model("70b"), "lora", sharded=True), "h100", 8)
    assert in_parts.plan.fits and in_parts.plan.memory.stages[0].name == "loading"
    outside = 2 * 2 * 128_256 * 8192
    rows = pytest.approx(2 * 80 * 855_638_016 / 8 + outside, rel=1e-3)
    assert in_parts.plan.memory.stages[0].bytes == rows


def test_processes_divide_what_they_share(model: Any) -> None:
    config = config_of(model("8b"), "full", sharded=True, training={"tokens_per_micro_batch": 1024})
    one, eight = (plan(config, "h200", n).plan.memory.stages[1] for n in (1, 8))
    terms = [{t.name: t.bytes for t in stage.terms} for stage in (one, eight)]
    for name in ("weights", "moments", "gradients"):
        assert terms[1][name] == pytest.approx(terms[0][name] / 8, abs=1)
    assert terms[0]["activations"] == terms[1]["activations"] and "gathered" not in terms[0]
    layers, embeddings = 218_103_808, 128_256 * 4096
    # Two layers and the gradient of one in bfloat16, its copy in float32; the embeddings are widened as they arrive.
    assert terms[1]["gathered"] == 10 * layers + 8 * embeddings
    adapter = config_of(model("8b"), "lora", sharded=True, training={"tokens_per_micro_batch": 1024})
    alone, shared = ({t.name: t.bytes for t in plan(adapter, "h200", n).plan.memory.stages[1].terms} for n in (1, 8))
    assert shared["moments"] == alone["moments"] and shared["adapter"] == alone["adapter"]
    assert shared["weights"] == pytest.approx(2 * (32 * layers / 8 + 2 * embeddings), rel=1e-3)
    single, four = (throughput_for(DEVICES["h100"], "bfloat16", n) for n in (1, 4))
    assert single is not None and four is not None and four.flops == 4 * single.flops


def test_a_run_that_processes_cannot_share_has_no_plan(model: Any) -> None:
    with pytest.raises(PlanError, match="a router's load is counted in each process alone"):
        plan(config_of(model("8b"), "mixture"), "h100", 2)
    with pytest.raises(PlanError, match="under lora and full alone, not under qlora"):
        plan(config_of(model("8b"), "qlora", sharded=True), "h100", 2)
    assert plan(config_of(model("8b"), "qlora"), "h100", 2).plan.fits
    shared = plan(config_of(model("8b"), "lora", sharded=True), "h100", 2)
    assert {other.method for other in shared.alternatives} == {"lora", "full"}


@pytest.mark.parametrize("shape", ["8b", "70b"])
@pytest.mark.parametrize("memory", [24, 45, 80, 141])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers": "last"},
        {"layers": "middle"},
        {"kind": "lora", "dora": True},
        {"dropout": 0.1, "layers": "last"},
        {"bits": 8},
        {"fused": False},
    ],
    ids=str,
)
def test_the_longer_a_document_the_more_of_it_leaves_the_card(
    shape: str, memory: int, settings: dict[str, Any], model: Any
) -> None:
    """First layers are computed again, then their inputs wait on the host; what is planned fits, or nothing is left."""
    method = {key: value for key, value in settings.items() if key != "fused"}
    config = config_of(model(shape), "qlora", method={"kind": "qlora", **method})
    config = config.model_copy(update={"model": config.model.model_copy(update={"fused": settings.get("fused", True)})})
    device = replace(DEVICES["h100"], memory=memory * 10**9)
    size, before = read_shape(config.model), (0, 0)
    lowest = method_cost(config.method, size).lowest_layer
    budget, limit = auto_budget(config, size, device)
    if budget <= MIN_TOKENS:
        return
    for tokens in (2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072):
        documents = document_limit(config, size, "bfloat16", limit, "cuda")
        rule = RecomputeRule(size, documents, "bfloat16", "cuda", lowest)
        counts = (len(rule.layers_to_recompute(tokens)), len(rule.layers_to_offload(tokens)))
        assert counts >= before and (counts[1] == 0 or counts[0] == size.layers - lowest)
        before = counts
        batch = MicroBatch("bfloat16", tokens, tokens // 2, documents=1, device="cuda", document_bytes=limit)
        memory_needed = estimate_memory(config, size, batch).required_bytes
        assert memory_needed <= device.memory or counts == (size.layers - lowest, size.layers - lowest)
        if 0 < counts[0] < size.layers - lowest:  # and no more than it must
            assert memory_needed > 0.7 * device.memory


@pytest.mark.parametrize(
    ("method", "fused", "tokens", "recomputed"),
    [
        ({"layers": "last"}, True, 65_536, range(1, 10)),
        ({"layers": (31,)}, True, 1_048_576, range(1)),  # it would store everything while it is computed again
        ({"dora": True}, True, 32_768, range(20, 32)),
        ({"dropout": 0.1}, True, 32_768, range(20, 32)),
        ({}, False, 32_768, range(25, 33)),
        ({"layers": (31,), "modules_to_save": ("embed_tokens",)}, True, 65_536, range(20, 33)),
    ],
    ids=str,
)
def test_what_the_method_stores_decides_how_much_is_computed_again(
    method: dict[str, Any], fused: bool, tokens: int, recomputed: range, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run computes with the limit of its plan; a mutation that counts the layers of the base alone does not."""
    config = config_of(model("8b"), "lora", method={"kind": "lora", **method})
    config = config.model_copy(update={"model": config.model.model_copy(update={"fused": fused})})
    shape = read_shape(config.model)

    def count(limit: DocumentLimit) -> int:
        lowest = method_cost(config.method, shape).lowest_layer
        return len(RecomputeRule(shape, limit, "bfloat16", "cuda", lowest).layers_to_recompute(tokens))

    monkeypatch.setattr(train.checks, "local_card", lambda _: DEVICES["a100"])
    monkeypatch.setattr(train, "device", lambda: CUDA)
    base: Any = SimpleNamespace(shape=shape, dtype_name="bfloat16")
    _, limit = train._token_budget(config, base, SINGLE_PROCESS)
    planned = auto_budget(config, shape, DEVICES["a100"])[1]
    assert limit == document_limit(config, shape, "bfloat16", planned, "cuda")
    assert count(limit) in recomputed
    batch = MicroBatch("bfloat16", tokens, tokens // 2, documents=1, device="cuda", document_bytes=planned)
    term = next(t for t in estimate_memory(config, shape, batch).stages[1].terms if t.name == "activations")
    assert count(limit) == int((re.findall(r"(\d+) layers recomputed", term.source) or ["0"])[0])
    if not fused or {"dora", "dropout"} & method.keys():
        assert count(limit) != count(DocumentLimit(limit.bytes))


def test_the_table_of_documents_is_that_of_the_plan(model: Any) -> None:
    """Among them the goal: a document of 32,768 tokens and LoRA on 8B within 80 GB."""
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    lengths = (16_384, 32_768, 65_536, 131_072)
    for name, shape, kind in (
        *(("rtx4090", "8b", "lora"), ("rtx4090", "8b", "qlora"), ("l40s", "8b", "lora"), ("a100", "8b", "lora")),
        *(("h200", "8b", "lora"), ("a100", "70b", "qlora")),
    ):
        cells = [f"{name}, {shape.upper()}, `{kind}`"]
        for length in lengths:
            config = config_of(model(shape), kind, data={"path": "rows.jsonl", "max_length": length})
            advice = plan(config, name)
            term = next(t for t in advice.plan.memory.stages[1].terms if t.name == "activations")
            numbers = re.findall(r"(\d+) layers recomputed|inputs of (\d+)", term.source)
            what = "/".join(a or b for a, b in numbers) or "0"
            size = f"{advice.plan.memory.required_bytes / 1e9:.0f} GB"
            cells.append(f"{what}, {size}" if advice.plan.fits else f"no: {size}")
            if (name, shape, kind, length) == ("a100", "8b", "lora", 32_768):
                assert advice.plan.memory.required_bytes < 80e9
        assert f"| {' | '.join(cells)} |" in page, f"| {' | '.join(cells)} |"


def test_the_table_of_70_billion_parameters_is_that_of_the_plan(model: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    rows = (
        ("qlora", 1, "h100"),
        *(("lora", n, "h100") for n in (1, 2, 8)),
        *(("full", n, "h100") for n in (8, 24, 64)),
    )
    for kind, processes, card in (*rows, ("full", 16, "h200")):
        settings = {"sharded": kind != "qlora" and processes > 1, "data": {"path": "rows.jsonl", "max_length": 4096}}
        advice = plan(config_of(model("70b"), kind, **settings), card, processes)
        gigabytes: dict[str, float] = defaultdict(float)
        for term in advice.plan.memory.stages[1].terms:
            gigabytes[term.name] += term.bytes / 1e9
        trained = gigabytes["adapter"] + gigabytes["gradients"] + gigabytes["moments"]
        (source,) = (t.source for t in advice.plan.memory.stages[1].terms if t.name == "activations")
        again = re.findall(r"(\d+) layers recomputed", source)
        needed = f"{advice.plan.memory.required_bytes / 1e9:.0f} GB"
        cells = [f"`{kind}`", f"{processes} {card}", f"{gigabytes['quantized'] + gigabytes['weights']:.1f}"]
        cells += [
            f"{trained:.1f}",
            f"{gigabytes['gathered']:.1f}",
            f"{gigabytes['activations']:.1f}",
            *(again or ["0"]),
        ]
        cells.append(needed if advice.plan.fits else f"no: {needed}")
        assert f"| {' | '.join(cells)} |" in page, f"| {' | '.join(cells)} |"


def test_a_document_longer_than_the_budget_recomputes_layers(model: Any) -> None:
    config = config_of(model("70b"), "qlora", data={"path": "rows.jsonl", "max_length": 4096})
    advice = plan(config, "h100")
    activations = next(t for t in advice.plan.memory.largest_stage.terms if t.name == "activations")
    assert advice.micro_batch.tokens == 4096 and "layers recomputed" in activations.source and advice.plan.fits
    in_parts = config_of(model("70b"), "lora", sharded=True, data={"path": "rows.jsonl", "max_length": 16_384})
    activations = next(t for t in plan(in_parts, "h100", 8).plan.memory.stages[1].terms if t.name == "activations")
    assert " layers recomputed" in activations.source
    budget, document_bytes = auto_budget(config, read_shape(config.model), DEVICES["h100"])
    # Eighty layers of the base, 14.7 MB a token, and what seven matrices A make of it.
    assert document_bytes == budget * 80 * 2 * (2 * (8192 + 8192 + 1024 + 28_672) + 7 * 16)
    # A router's load is balanced over whole documents, so nothing is recomputed there.
    balanced = {"method": {"kind": "mixture", "top_k": 2}, "data": {"path": "rows.jsonl", "max_length": 60_000}}
    mixture = config_of(model("8b"), "mixture", **balanced)
    assert not plan(mixture, "h100").plan.fits


def test_probe_tries_what_fits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(model("8b"), "lora", training={"tokens_per_micro_batch": "probe"})
    shape = read_shape(config.model)
    fitting, _ = auto_budget(config, shape, DEVICES["rtx4090"])
    assert assumed_micro_batch(config, shape, DEVICES["rtx4090"]).tokens == fitting < CANDIDATE_BUDGETS["cuda"][0]
    # On a large card more is tried than `auto` takes.
    assert CUDA_TOKENS < auto_budget(config, shape, DEVICES["h200"])[0] <= CANDIDATE_BUDGETS["cuda"][-1]
    tried: list[int] = []

    def pack_rows(examples: Any, budget: int) -> Any:
        tried.append(budget)
        return pack(examples, budget)

    policy, _ = tuned("lora")
    # A policy that says it is on a card, and a clock that is not read before the card has finished.
    order: list[str] = []
    monkeypatch.setattr(micro_batch, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(micro_batch, "accumulate", lambda *_: order.append("work"))
    monkeypatch.setattr(type(policy), "device", CUDA)
    micro_batch.measure_micro_batch_tokens(policy, SftObjective(SftConfig()), documents() * 2000, pack_rows, 9000)
    assert tried == [4096, 8192] and order == ["wait", "work", "wait"] * 4
    tried.clear()
    chosen = micro_batch.measure_micro_batch_tokens(policy, SftObjective(SftConfig()), documents(), pack_rows, 1024)
    assert chosen == 1024 and tried == [1024]


def test_a_card_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    memory_use.synchronize(torch.device("cpu"))
    memory_use.synchronize(CUDA)
    assert waited == [CUDA]


def test_memory_of_a_card_is_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    assert memory_use.peak_memory_bytes(CUDA) == 123
    assert memory_use.peak_memory_bytes(torch.device("cpu")) == memory_use.peak_host_memory_bytes() > 10**8
    memory_use.reset_peak_memory(CUDA)
    assert reset == [CUDA]
    # What this process has reserved and its context are not missing: a plan counts them.
    assert memory_use.free_memory(CUDA) == 1300 + CUDA_CONTEXT_BYTES


def test_emulated_bfloat16_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch answers on a T4: supported, by emulation."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert base_model.compute_dtype("auto", CUDA) is torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert base_model.compute_dtype("auto", CUDA) is torch.bfloat16
    assert base_model.compute_dtype("bfloat16", CUDA) is torch.bfloat16


NVIDIA_SMI = "#!/bin/sh\ncat <<'EOF'\n{answer}\nEOF\n"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("NVIDIA H100 80GB HBM3, 81559, 9.0", Device("NVIDIA H100 80GB HBM3", 81_559 * 2**20, 989e12)),
        ("NVIDIA GeForce RTX 4090, 24564, 8.9", Device("NVIDIA GeForce RTX 4090", 24_564 * 2**20, 165e12)),
        ("Tesla T4, 15360, 7.5", Device("Tesla T4", 15_360 * 2**20, 8.1e12, "float32")),
        ("NVIDIA A100-SXM4-80GB, 81920, 8.0", Device("NVIDIA A100-SXM4-80GB", 81_920 * 2**20, 312e12)),
        ("NVIDIA GeForce GTX 1080, 8192, 6.1", Device("NVIDIA GeForce GTX 1080", 2**33, None, "float32")),
        ("NVIDIA H100 PCIe, 81559, 9.0", Device("NVIDIA H100 PCIe", 81_559 * 2**20, None)),
        ("NVIDIA X, -5, 8.0", None),
        ("No devices were found", None),
    ],
)
def test_this_machines_card(answer: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI.format(answer=answer))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # the tests hide cards from torch
    assert find_local_device() == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert find_local_device() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "")
    assert find_local_device() is None


def test_a_card_without_a_known_rate_has_no_time(model: Any) -> None:
    unknown = describe_device("NVIDIA Something", 80 * 2**30, (8, 0))
    advice = advise(config_of(model("8b"), "lora"), device=unknown, tokens=1e6)
    assert advice.plan.fits and advice.plan.seconds is None and advice.plan.flops is not None


def test_fused_moments_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel for all tensors, as on a card; its step count is a tensor on the device."""

    def state(fused: bool) -> OptimizerState:
        monkeypatch.setattr(optimizer, "is_fused", lambda device: fused)
        torch.manual_seed(0)
        named = {"a": torch.nn.Parameter(torch.randn(6, 4)), "b": torch.nn.Parameter(torch.randn(4))}
        return OptimizerState(lambda: named, OptimizerConfig(weight_decay=0.1), lambda name: 1.0)

    def steps(moving: OptimizerState, numbers: range) -> list[torch.Tensor]:
        for number in numbers:
            for p in moving.parameters().values():
                p.grad = torch.sin(p.detach() * (number + 1))
            moving.step(0.05)
        return [p.detach().clone() for p in moving.parameters().values()]

    whole = steps(state(True), range(6))
    first = state(True)
    assert first.optimizer.defaults["fused"] is True
    steps(first, range(3))
    first.save(tmp_path / "checkpoint")
    second = state(True)
    second.load(tmp_path / "checkpoint")
    assert all(torch.equal(a, b) for a, b in zip(steps(second, range(3, 6)), whole, strict=True))
    plain = steps(state(False), range(6))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, whole, strict=True))


def test_no_temporaries_of_the_optimizer_are_planned(model: Any) -> None:
    config = config_of(model("8b"), "full")
    shape = read_shape(config.model)
    on_card = assumed_micro_batch(config, shape, DEVICES["h200"])
    stage = next(s for s in estimate_memory(config, shape, on_card).stages if s.name == "optimizer")
    assert {t.name for t in stage.terms} >= {"weights", "moments", "gradients"}
    assert "temporaries" not in {t.name for t in stage.terms}


def test_the_table_of_cards_is_that_of_the_plan(model: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    for name, device in DEVICES.items():
        if f"| {name} |" not in page:
            continue
        cells = [name, f"{device.memory / 2**30:.1f} GiB"]
        for shape, kind in (("8b", "lora"), ("8b", "qlora"), ("70b", "qlora")):
            advice = plan(config_of(model(shape), kind), name)
            size = f"{advice.plan.memory.required_bytes / 1e9:.0f} GB"
            cells.append(f"{advice.micro_batch.tokens:,} tokens, {size}" if advice.plan.fits else f"no: {size}")
        assert f"| {' | '.join(cells)} |" in page
    # The sentence about full fine-tuning in parts.
    for processes, tokens in ((2, "1,280"), (8, "15,104")):
        advice = plan(config_of(model("8b"), "full", sharded=True), "a100", processes)
        assert f"{advice.micro_batch.tokens:,}" == tokens and f"({tokens}" in page


@pytest.mark.parametrize(("shared", "answers"), [(0, 1), (64, 4)])
def test_what_a_card_stores_of_a_layer_is_what_is_planned(
    shared: int, answers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way that a card takes without flash attention, on a processor: its saved tensors, counted."""
    from rung.models import tree_attention
    from rung.runs.checks import _shared_context

    monkeypatch.setattr(tree_attention._FlashTree, "apply", None)  # not taken
    monkeypatch.setattr(tree_attention, "_on_processor", lambda device: False)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2}
    saved = []
    for layers in (2, 3):
        policy = policy_of(tiny_model(num_hidden_layers=layers, **sizes))
        method = attach_method(policy.model, LoraConfig(rank=2), seed=0)
        policy = policy_of(policy.model, method)
        examples = rows(1, count=1, answers=answers, shared=shared) if shared else documents(count=2, longest=200)
        batch = pack(examples, 10_000)[0]
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            policy.logprobs(batch)
        saved.append(sum(size for place, size in storages.items() if place not in parameters))
    shape = policy.base.shape
    planned = len(batch.ids) * layer_bytes_per_token(shape, "float32", "cuda")
    planned += 4 * 2 * shape.query * _shared_context(batch) + len(batch.ids) * 4 * 7 * 2
    assert saved[1] - saved[0] == pytest.approx(planned, rel=0.12)
    assert (shared > 0) == (_shared_context(batch) > 0)


def test_a_base_that_other_models_share_is_planned_beside_the_quantized_one(model: Any) -> None:
    ppo = {"kind": "ppo", "reward": {"kind": "exact"}}
    alone, shared = (plan(config_of(model("8b"), "qlora", **more), "h200") for more in ({}, {"objective": ppo}))
    names = [{t.name: t.bytes for t in advice.plan.memory.stages[1].terms} for advice in (alone, shared)]
    assert "shared base" not in names[0] and names[1]["shared base"] == 2 * 32 * 218_103_808
    assert "shared base" in {t.name for t in shared.plan.memory.stages[0].terms}


def test_where_a_card_stores_keys_once(model: Any) -> None:
    """In bfloat16 one call takes a row, with a softcap too; in float32 or with wide heads keys are stored for all."""
    shape = read_shape(config_of(model("8b"), "lora").model)
    once = 2 * (4096 + 4096 + 1024 + 14_336)
    for_all_heads = once + 2 * (4096 - 1024) + 4096
    assert layer_bytes_per_token(shape, "bfloat16", "cuda") == layer_bytes_per_token(shape, "bfloat16") == 2 * once
    assert layer_bytes_per_token(shape, "float32", "cuda") == 4 * for_all_heads
    # the plan knows the kernel without torch: the same widths as where it runs
    widths = [w for w in range(1, 300) if has_row_kernel(replace(shape, head_width=w), "bfloat16")]
    assert widths == [w for w in range(1, varlen_attention.MAX_WIDTH + 1) if w % 8 == 0]
    assert layer_bytes_per_token(replace(shape, kind="gemma2"), "bfloat16", "cuda") == 2 * once
    for kind, width in (("llama", 512), ("gemma2", 256)):
        wide = replace(shape, kind=kind, head_width=width, heads=4096 // width, kv_heads=1024 // width)
        assert layer_bytes_per_token(wide, "bfloat16", "cuda") == 2 * for_all_heads
