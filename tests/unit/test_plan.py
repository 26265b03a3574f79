"""What a run takes, by formulas on the shape of its model, against the models themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models import SHAPES, tiny_model
from plan_tables import LISTED, lever_rows, listed, rule_rows
from rung.errors import CheckpointError, ConfigError, PlanError
from rung.method.table import attach
from rung.plan.shape import read_shape, shape_of
from rung.plan.trained import trained
from rung.spec.catalog import CATALOG
from rung.spec.method import METHOD_SPECS
from rung.spec.model import ModelSpec

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora some": {"rank": 3, "targets": ("q", "down"), "layers": (1,)},
    "lora ranks": {"rank": 4, "ranks": {"q": 2, "1": 3, "1.down": 5}},
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
    shape = shape_of(model.config.to_dict())
    assert shape.parameters == model.num_parameters()
    assert shape.layers == model.config.num_hidden_layers and shape.vocabulary == model.config.vocab_size


@pytest.mark.parametrize("kind", SHAPES)
def test_a_config_as_it_is_written_says_the_same(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    shape = read_shape(ModelSpec(name=str(tmp_path)))
    assert shape.parameters == model.num_parameters() and shape.stored == "float32"
    model.bfloat16().save_pretrained(tmp_path)
    assert read_shape(ModelSpec(name=str(tmp_path))).stored == "bfloat16"


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "gemma2"])
@pytest.mark.parametrize("name", METHODS)
def test_what_moves_is_what_the_method_declares(kind: str, name: str) -> None:
    spec = METHOD_SPECS[name.split()[0]](**METHODS[name])
    model = tiny_model(kind)
    shape = shape_of(model.config.to_dict())
    found = trained(spec, shape)
    method = attach(model, spec, seed=0)
    parameters = method.trainable()
    assert found.moving == method.declared_parameters() == sum(p.numel() for p in parameters.values())
    if name.split()[0] not in ("prefix", "p_tuning"):  # of an encoder the largest tensor is taken for its whole
        assert found.largest == max(p.numel() for p in parameters.values())


def test_the_known_base_is_its_own_shape() -> None:
    known = CATALOG["smollm2-135m"]
    shape = read_shape(ModelSpec(name=known.name))
    assert shape.parameters == known.parameters and shape.context == known.context


def test_a_run_leads_to_its_base(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"spec": {"model": {"name": "smollm2-135m"}}}))
    assert read_shape(ModelSpec(name=str(tmp_path))).layers == 30
    student = ModelSpec(student_of=str(tmp_path), layers="every_other")
    assert read_shape(student).layers == 15
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="manifest"):
        read_shape(ModelSpec(name=str(tmp_path)))


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
        read_shape(ModelSpec(name=str(folder)))


def test_the_tables_on_the_page_are_those_of_the_plan() -> None:
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    for row in (*rule_rows(), *lever_rows()):
        assert row in page
    assert {method: listed(method) for method in LISTED} == LISTED
    assert round(32 * 0.45 + 16 * 0.61) == 24  # mBART at batch 32
