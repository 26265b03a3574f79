"""What a run takes, by formulas on the shape of its model, against the models themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models import SHAPES, tiny_model
from plan_tables import LISTED, lever_rows, listed, rule_rows
from rung.config.method import METHOD_CONFIGS
from rung.config.model import ModelConfig
from rung.config.model_catalog import CATALOG
from rung.config.run import RunConfig
from rung.errors import CheckpointError, ConfigError, PlanError
from rung.methods.qlora import is_quantized
from rung.methods.registry import attach_method
from rung.models.bfloat16_storage import compute_in_float32
from rung.planning.architecture import read_shape, shape_from_config
from rung.planning.devices import DEVICES
from rung.planning.memory import weight_terms
from rung.planning.method_cost import method_cost
from rung.planning.throughput import DataVolume, record_throughput, throughput_for, token_flops

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora some": {"rank": 3, "targets": ("q", "down"), "layers": (1,)},
    "lora ranks": {"rank": 4, "rank_pattern": {"q": 2, "1": 3, "1.down": 5}},
    "lora dora": {"dora": True},
    "lora pissa": {"init": "pissa"},
    "lora head": {"modules_to_save": ("lm_head",)},
    "full": {},
    "head": {},
    "bottleneck": {"width": 5},
    "bottleneck pfeiffer": {"placement": "pfeiffer", "layers": "last"},
    "bottleneck parallel": {"placement": "parallel"},
    "prompt": {"virtual_tokens": 7, "tasks": ("a", "b")},
    "prefix": {"virtual_tokens": 3},
    "prefix projected": {"projection": 6},
    "p_tuning": {},
    "p_tuning lstm": {"encoder": "lstm", "hidden": 5},
    "p_tuning all": {"layers": "all", "virtual_tokens": 2},
    "mixture": {"experts": 3, "rank": 2},
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_number_of_a_model_is_counted(kind: str, tied: bool) -> None:
    model = tiny_model(kind, tie_word_embeddings=tied)
    shape = shape_from_config(model.config.to_dict())
    assert shape.parameters == model.num_parameters()
    assert shape.layers == model.config.num_hidden_layers and shape.vocabulary == model.config.vocab_size


@pytest.mark.parametrize("kind", SHAPES)
def test_a_config_as_it_is_written_says_the_same(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    shape = read_shape(ModelConfig(name=str(tmp_path)))
    assert shape.parameters == model.num_parameters() and shape.stored_dtype == "float32"
    model.bfloat16().save_pretrained(tmp_path)
    assert read_shape(ModelConfig(name=str(tmp_path))).stored_dtype == "bfloat16"


PLANNED = {
    **{name: (name.split()[0], settings) for name, settings in METHODS.items()},
    "lottery": ("lottery", {"rank": 4}),
    "qlora": ("qlora", {"double_quant": False}),
    "qlora 8": ("qlora", {"bits": 8}),
    "peft IA3": ("peft", {"config": {"peft_type": "IA3", "feedforward_modules": []}}),
    "peft LOHA": ("peft", {"config": {"peft_type": "LOHA", "r": 4}}),
}
"""Every kind of method, by a name."""


def quantized_scales(model: torch.nn.Module) -> int:
    """Bytes of the scales that bitsandbytes keeps beside its weights."""
    tensors: list[torch.Tensor] = []
    for module in filter(is_quantized, model.modules()):
        weight: Any = module.weight
        if hasattr(weight, "SCB"):  # the first product moves it to the state
            tensors.append(module.state.SCB if weight.SCB is None else weight.SCB)  # type: ignore[union-attr]
        else:
            tensors.append(weight.quant_state.absmax)
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    ("kind", "compute"), [("llama", "float32"), ("llama", "bfloat16"), ("gemma2", "float32"), ("phi", "float32")]
)
@pytest.mark.parametrize("name", PLANNED)
def test_planned_weights_are_the_bytes_that_a_method_on_a_bfloat16_base_holds(
    name: str, kind: str, compute: str
) -> None:
    """2 bytes were counted where dora and peft's tuners widen to 4, and for Gemma's embeddings; exact, byte by byte."""
    method_kind, settings = PLANNED[name]
    model = tiny_model(kind, dtype=torch.bfloat16, tie_word_embeddings=kind != "phi")
    shape = shape_from_config(model.config.to_dict(), "bfloat16")
    if compute == "float32":
        compute_in_float32(model)
    base = {id(p): p for p in model.parameters()}
    config = METHOD_CONFIGS[method_kind](**settings)
    method = attach_method(model, config, seed=0)
    held = {id(p): p for p in [*model.parameters(), *method.trainable().values()]}
    if name == "head":
        held |= base  # its untrained head is kept for a reference
    run = RunConfig(data={"path": "rows.jsonl"}, output="run", method=config)
    planned = sum(term.bytes for term in weight_terms(run, shape, compute) if not term.mapped)
    cost = method_cost(config, shape)
    trained = sum(p.numel() for p in method.trainable().values())
    if name != "full":
        planned += 4 * (cost.stored_parameters if cost.trainable is not None else trained)
    real = sum(p.numel() * p.element_size() for p in held.values())
    assert planned == real + (quantized_scales(model) if method_kind == "qlora" else 0)
    assert {p.dtype for p in method.trainable().values()} == {torch.float32}


def test_every_kind_of_method_is_planned() -> None:
    assert {kind for kind, _ in PLANNED.values()} == set(METHOD_CONFIGS)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "gemma2", "phi"])
@pytest.mark.parametrize("name", METHODS)
def test_what_moves_is_what_the_method_declares(kind: str, name: str) -> None:
    config = METHOD_CONFIGS[name.split()[0]](**METHODS[name])
    model = tiny_model(kind)
    shape = shape_from_config(model.config.to_dict())
    found = method_cost(config, shape)
    method = attach_method(model, config, seed=0)
    parameters = method.trainable()
    assert found.trainable == method.declared_parameters() == sum(p.numel() for p in parameters.values())
    if name.split()[0] not in ("prefix", "p_tuning"):  # of an encoder the largest tensor is taken for its whole
        assert found.largest_tensor == max(p.numel() for p in parameters.values())


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_says_its_shape(tied: bool, tmp_path: Path) -> None:
    """By llama.cpp's names; the numbers are those of the model that it would be."""
    from gguf import GGUFWriter

    config = tiny_model(tie_word_embeddings=tied).config
    file = tmp_path / "tiny.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_tensor("token_embd.weight", np.zeros((config.vocab_size, config.hidden_size), np.float32))
    if not tied:
        writer.add_tensor("output.weight", np.zeros((config.vocab_size, config.hidden_size), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shape = read_shape(ModelConfig(name=str(file)))
    assert shape.parameters == tiny_model(tie_word_embeddings=tied).num_parameters() and shape.tied == tied
    assert shape.context == config.max_position_embeddings and shape.stored_dtype == "float32"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match="GGUF"):
        read_shape(ModelConfig(name=str(file)))


@pytest.mark.parametrize("name", CATALOG)
def test_a_known_base_is_its_own_shape(name: str) -> None:
    known = CATALOG[name]
    shape = read_shape(ModelConfig(name=known.name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known.config))
    assert shape.parameters == known.parameters == model.num_parameters() and shape.context == known.context


def test_a_run_leads_to_its_base(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"config": {"model": {"name": "smollm2-135m"}}}))
    assert read_shape(ModelConfig(name=str(tmp_path))).layers == 30
    student = ModelConfig(student_of=str(tmp_path), layers="every_other")
    assert read_shape(student).layers == 15
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="manifest"):
        read_shape(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "config", "error"),
    [
        ("nothing", None, ConfigError),
        ("falcon", {"model_type": "falcon"}, PlanError),
        ("empty", {}, ConfigError),
        ("torn", "{", ConfigError),
        ("text", {"model_type": "llama", "hidden_size": "wide"}, ConfigError),
    ],
)
def test_what_has_no_shape(name: str, config: Any, error: type[Exception], tmp_path: Path) -> None:
    folder = tmp_path / name
    if config is not None:
        folder.mkdir()
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(error):
        read_shape(ModelConfig(name=str(folder)))


def test_the_tables_on_the_page_are_those_of_the_plan() -> None:
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    for row in (*rule_rows(), *lever_rows()):
        assert row in page
    assert {method: listed(method) for method in LISTED} == LISTED
    assert round(32 * 0.45 + 16 * 0.61) == 24  # mBART at batch 32


def test_the_fastest_run_is_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path))
    assert throughput_for(None, "float32") is None
    for flops in (2e9, 5e9, 3e9):
        record_throughput("float32", flops, f"at {flops:.0e}")
    found = throughput_for(None, "float32")
    assert found is not None and found.flops == 5e9 and "5e+09" in found.source
    assert throughput_for(None, "bfloat16") is None
    stated = throughput_for(DEVICES["h100"], "bfloat16")
    assert stated is not None and stated.flops == 0.4 * 989e12
    (tmp_path / "rates.json").write_text("{torn")
    assert throughput_for(None, "float32") is None


def test_operations_are_those_of_the_products() -> None:
    """Against a count of the products themselves: 4 P a token with a frozen base, 6 P without one, and so on."""
    shape = shape_from_config(CATALOG["smollm2-135m"].config)
    amount = DataVolume(1.0, supervised_share=0.0, document_tokens=0.0, is_counted=True)
    inside = shape.layers * shape.linear_parameters

    def token(**method: Any) -> float:
        config = RunConfig.model_validate({"data": {"path": "x"}, "output": "y", "method": method})
        return token_flops(config, shape, amount, method_cost(config.method, shape))

    assert token(kind="full") == 6 * inside and token(kind="prompt") == 4 * inside
    assert token(kind="lora") == 4 * inside + 6 * 4_884_480
    assert token(kind="head") == 2 * inside
    half = token(kind="lora", layers="15-29")
    assert half == 2 * inside + inside + 6 * 4_884_480 / 2
    learned = DataVolume(1.0, supervised_share=1.0, document_tokens=100.0, is_counted=True)
    config = RunConfig.model_validate({"data": {"path": "x"}, "output": "y"})
    attention = 12 * shape.query * 50 * shape.layers
    cost = method_cost(config.method, shape)
    assert token_flops(config, shape, learned, cost) == token(kind="lora") + 4 * shape.embedding_parameters + attention
