"""What a rung takes from the sections of a climb, and what is its own."""

from __future__ import annotations

from typing import Any

import pytest

from rung.config.climb_runs import model_titles, on_top_run_config, rung_data, rung_model, rung_run_config
from rung.config.io import parse_config
from rung.config.model import ModelConfig
from rung.config.run import RunConfig
from rung.errors import ConfigError


def climb(*rungs: Any, **sections: Any) -> RunConfig:
    climb_section = {"rungs": list(rungs), **sections.pop("climb", {})}
    return parse_config({"data": {"path": "a.jsonl"}, "output": "o", **sections, "climb": climb_section})


def on(**model: Any) -> dict[str, Any]:
    return {"kind": "zero_shot", "model": model}


OF_ANY_BASE = {"dtype": "bfloat16", "fused": False}
SECTION = {"name": "owner/base", "revision": "r1", "template": "plain", "template_kwargs": {"a": 1}, **OF_ANY_BASE}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, SECTION),
        ({"dtype": "float32"}, {**SECTION, "dtype": "float32"}),
        ({"name": "owner/base", "revision": "r2"}, {**SECTION, "revision": "r2"}),
        # what says something of one base is not taken over to another
        ({"name": "other"}, {"name": "other", **OF_ANY_BASE}),
        ({"name": "other", "template": "plain"}, {"name": "other", "template": "plain", **OF_ANY_BASE}),
        ({"student_of": "other"}, {"student_of": "other", **OF_ANY_BASE}),
    ],
)
def test_the_model_of_a_rung(own: dict[str, Any], expected: dict[str, Any]) -> None:
    config = climb({**on(**own), "name": "r"}, model=SECTION)
    assert rung_model(config, config.climb.rungs[0]) == ModelConfig(**expected)


def test_a_rung_on_the_teacher_of_the_section_is_no_student() -> None:
    config = climb({**on(name="big"), "name": "r"}, model={"student_of": "big", "layers": "first"})
    assert rung_model(config, config.climb.rungs[0]) == ModelConfig(name="big")
    config = climb({**on(layers="last"), "name": "r"}, model={"student_of": "big", "layers": "first"})
    assert rung_model(config, config.climb.rungs[0]) == ModelConfig(student_of="big", layers="last")


def test_names_of_rungs_and_of_bases() -> None:
    with pytest.raises(ConfigError, match="stands twice"):
        climb("zero_shot", on(name="owner/base"), on(name="models/base/"))
    config = climb(
        "zero_shot",
        on(name="owner/base"),
        {**on(name="models/base"), "name": "folder"},
        {**on(dtype="float32"), "name": "wide"},
        on(student_of="x/big.gguf", template="plain"),
        {**on(name="small", dtype="auto"), "name": "same as the section"},
        model={"name": "small"},
    )
    assert [rung.label for rung in config.climb.rungs][:2] == ["zero_shot", "zero_shot on base"]
    assert config.climb.rungs[4].label == "zero_shot on big.gguf"
    assert model_titles(config) == {
        "zero_shot": "small",
        "zero_shot on base": "owner/base",
        "folder": "models/base",
        "wide": "small, dtype float32",
        "zero_shot on big.gguf": "student of big.gguf",
        "same as the section": "small",
    }


def test_the_data_of_a_rung() -> None:
    section = {"path": "a.jsonl", "validation": 0.2, "test": 0.3, "group": "g", "map": {"answer": "gold"}}
    rows = {"path": ["b.jsonl", "a.jsonl"], "overlap": "drop_train"}
    own_rungs = ({"kind": "few_shot", "data": rows}, {"kind": "lora", "name": "own", "data": rows})
    config = climb("zero_shot", "lora", *own_rungs, data=section)
    human, shown, own = (rung_data(config, rung) for rung in config.climb.rungs[1:])
    assert human == config.data
    assert (own.validation, own.test, own.group, own.map) == (0.2, 0.0, None, {}) and len(own.path) == 2
    assert shown == own.model_copy(update={"validation": 0.0})
    run = rung_run_config(config, config.climb.rungs[3], "out", 0)
    assert run.data == own and run.model == config.model


def test_a_run_on_top_of_a_rung_has_the_model_settings_of_that_rung() -> None:
    rung = {"kind": "lora", "name": "r", "model": {"name": "other", "template": "plain", "revision": None}}
    top = {"base_rung": "r", "objective": {"kind": "sft"}}
    config = climb("zero_shot", rung, climb={"on_top": [top]}, model=SECTION)
    run = on_top_run_config(config, config.climb.on_top[0], "runs/r", "out", 0)
    assert run.model == ModelConfig(name="runs/r", template="plain", dtype="bfloat16", fused=False)
