"""Rung from a Python program: the same functions as the command line, typed results, a model that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import rung
from processes import inside


def test_train_load_and_answer(config: Path, tmp_path: Path) -> None:
    run = rung.train(config, overrides=["training.max_steps=3"])
    assert run.status == "finished" and run.steps == 3 and run.path == str(tmp_path / "run")
    assert run.config["training"]["max_steps"] == 3 and run.artifact == tmp_path / "run" / "adapter"
    assert {gate.name for gate in run.gates} >= {"preflight", "movement", "save"}
    assert all(gate.state == "passed" for gate in run.gates) and Path(str(run.report)).exists()

    model = rung.load(run.path)
    assert model.kind == "run" and model.config == rung.load_config(config, ["training.max_steps=3"]).config
    answer = model.answer("what is in it, 3?", context="box 3", max_new_tokens=5)
    assert answer == model.answer([rung.Message("user", "what is in it, 3?")], context="box 3", max_new_tokens=5)
    with pytest.raises(rung.DataError, match="longer than the model's context"):
        model.answer("long " * 600)
    with pytest.raises(rung.ConfigError, match="no such task"):
        model.answer("what?", task="fruit")


def test_results_are_those_of_the_command_line(config: Path, tmp_path: Path, capsys: Any) -> None:
    code, printed, err = inside(capsys, "train", config, "data.validation=0", "--json")
    assert code == 0, err
    assert rung.train(config, overrides=["data.validation=0"], resume=True).to_json() == json.loads(printed)
    # nulls too: without validation rows there is no validation loss
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["validation_loss"] is None and {name: json.loads(printed)[name] for name in written} == written

    scores = rung.evaluate(tmp_path / "run", limit=8)
    _, printed, _ = inside(capsys, "eval", tmp_path / "run", "--limit", "8", "--json")
    again = json.loads(printed)
    for timed in (again, mine := scores.to_json()):
        timed.pop("seconds_per_query")
    assert mine == again and scores.examples == 8
    assert scores.scores["exact"].mean == again["scores"]["exact"]["mean"]

    pair = rung.compare(str(tmp_path / "run"), str(tmp_path / "run"), limit=8)
    assert pair.metrics["exact"].difference.mean == 0.0 and pair.baseline == str(tmp_path / "run")


def test_a_config_may_be_a_mapping_a_file_or_an_object(config: Path) -> None:
    mapping = yaml.safe_load(config.read_text())
    advice = rung.plan(mapping, memory="24GiB")
    assert advice.plan.fits and advice.plan.trainable == rung.plan(config).plan.trainable
    loaded = rung.load_config(config).config
    wider = rung.plan(loaded, overrides=["method.rank=8"])
    assert wider.plan.trainable == 2 * advice.plan.trainable and loaded.method.rank == 4
    assert mapping == yaml.safe_load(config.read_text())
    with pytest.raises(rung.ConfigError, match=r"did you mean method\.rank"):
        rung.plan({**mapping, "method": {"kind": "lora", "rnak": 4}})


def test_several_runs_stand_on_one_base(config: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        rung.train(config, overrides=[f"output={tmp_path / name}", f"seed={len(name) + ord(name)}"])
    models = rung.load([tmp_path / "a", tmp_path / "b"])
    weights = {n: m.policy.model.get_input_embeddings().weight.data_ptr() for n, m in models.items()}
    assert list(models) == ["a", "b"] and weights["a"] == weights["b"]
    alone = rung.load(tmp_path / "a").answer("what is in it, 3?", max_new_tokens=5)
    assert models["a"].answer("what is in it, 3?", max_new_tokens=5) == alone


@pytest.mark.parametrize(
    ("target", "words"), [("http://localhost:1/v1", "answers for itself"), ("no-such-base", "no such model")]
)
def test_what_cannot_be_loaded(target: str, words: str) -> None:
    with pytest.raises(rung.ConfigError, match=words):
        rung.load(target)
