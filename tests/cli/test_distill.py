"""A teacher, a student out of its layers, and what cannot be taught."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from processes import goes_on_as_if_never_stopped, inside, log
from rung.runs.load import load_base_on_device


@pytest.fixture
def taught(config: Path, tmp_path: Path, capsys: Any) -> Path:
    """A config whose teacher is a full run."""
    text = config.read_text().replace("{kind: lora, rank: 4}", "{kind: full}").replace("1.0e-2", "3.0e-3")
    config.write_text(text)
    assert inside(capsys, "train", config, f"output={tmp_path / 'teacher'}")[0] == 0
    name = text.split("name: ")[1].split(",")[0]
    config.write_text(text.replace(f"name: {name}", f"student_of: {tmp_path / 'teacher'}"))
    return config


def test_a_student_of_some_layers(taught: Path, tmp_path: Path, capsys: Any) -> None:
    objective = f"objective={{kind: distill, teacher: {tmp_path / 'teacher'}, cross_entropy: 0.5, cosine: 0.1}}"
    settings = (objective, "training.epochs=3", "training.max_steps=24", "model.layers=[1]")
    code, _, err = inside(capsys, "train", taught, *settings)
    assert code == 0 and "gate movement: passed" in err, err
    entries = log(tmp_path / "run")
    assert entries[-1]["divergence"] < 0.8 * entries[0]["divergence"] and entries[-1]["validation_divergence"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.num_hidden_layers == 1
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["fingerprints"]["teacher"] != manifest["fingerprints"]["base"]
    assert inside(capsys, "eval", tmp_path / "run", "--limit", 3)[0] == 0


def test_an_adapter_on_a_student_and_a_resume(taught: Path, tmp_path: Path, capsys: Any) -> None:
    objective = f"objective={{kind: distill, teacher: {tmp_path / 'teacher'}, divergence: jsd}}"
    settings = ["method={kind: lora, rank: 4}", objective, "training.checkpoint_every=3", "training.learning_rate=1e-2"]
    _, parts = goes_on_as_if_never_stopped(capsys, taught, settings, tmp_path, 3)
    assert inside(capsys, "eval", parts, "--limit", 3)[0] == 0  # opened again: the student is built anew


def test_teacher_states_are_kept_only_for_a_second_epoch_and_in_the_cache_folder(
    taught: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch would write states that nothing reads; the system's temporary folder may be memory."""
    folders: list[Any] = []

    def temporary_file(*arguments: Any, **options: Any) -> Any:
        folders.append(options.get("dir"))
        return tempfile.TemporaryFile(*arguments, **options)

    monkeypatch.setattr("rung.objectives.distill.TemporaryFile", temporary_file)
    objective = f"objective={{kind: distill, teacher: {tmp_path / 'teacher'}}}"
    settings = (objective, "method={kind: lora, rank: 4}", "training.max_steps=null", "training.examples_per_step=30")
    assert inside(capsys, "train", taught, *settings, f"output={tmp_path / 'one'}")[0] == 0
    assert folders == []
    epochs = "training.epochs=2"
    assert inside(capsys, "train", taught, *settings, epochs, f"output={tmp_path / 'two'}")[0] == 0
    assert folders == [tmp_path / "cache"]
    no_room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("rung.training.frozen_layer_cache.shutil.disk_usage", lambda _: no_room)
    code, _, err = inside(capsys, "train", taught, *settings, epochs, f"output={tmp_path / 'full'}")
    assert code == 0 and len(folders) == 1 and "teacher's states are computed in every epoch" in err, err


def test_the_teacher_computes_as_the_student_does(
    taught: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that resumes on another processor keeps its type; `auto` would choose another for its teacher."""
    dtypes: list[str] = []

    def load(config: Any, **options: Any) -> Any:
        dtypes.append(config.dtype)
        return load_base_on_device(config, **options)

    monkeypatch.setattr("rung.runs.auxiliary_models.load_base_on_device", load)
    for feature in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, feature, lambda: False)
    objective = f"objective={{kind: distill, teacher: {tmp_path / 'teacher'}}}"
    settings = (objective, "model.dtype=auto", "training.max_steps=1")
    assert inside(capsys, "train", taught, *settings)[0] == 0 and dtypes == ["float32"]


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        ("model.layers=[0, 7]", 2, "rising numbers"),
        ("model.name=other", 2, "two models"),
        ("objective.beta=0.2", 2, "beta is for"),
        ("objective.teacher=smol", 2, "no such model"),
    ],
)
def test_what_cannot_be(setting: str, code: int, said: str, taught: Path, tmp_path: Path, capsys: Any) -> None:
    objective = f"objective={{kind: distill, teacher: {tmp_path / 'teacher'}}}"
    found, _, err = inside(capsys, "train", taught, objective, setting)
    assert found == code and said in err, err
    assert not (tmp_path / "run").exists()


def test_other_tokens(taught: Path, tmp_path: Path, tiny_base: Path, capsys: Any) -> None:
    """Named with the first token that differs."""
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"<start_of_turn>"', '"<start_of_talk>"'))
    code, _, err = inside(capsys, "train", taught, f"objective={{kind: distill, teacher: {other}}}")
    assert code == 2 and "<start_of_t" in err


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_student_corrected_on_its_own_words(share: float, taught: Path, tmp_path: Path, capsys: Any) -> None:
    rollout = "rollout: {num_generations: 1, max_new_tokens: 6}"
    teacher = f"kind: distill, teacher: {tmp_path / 'teacher'}, cross_entropy: 0.5"
    objective = f"objective={{{teacher}, divergence: reverse, on_policy: {share}, {rollout}}}"
    code, _, err = inside(
        capsys, "train", taught, objective, "training.max_steps=8", "training.epochs=2", "model.layers=[0]"
    )
    assert code == 0 and "gate movement: passed" in err, err
    entries = log(tmp_path / "run")
    assert all(e["rollout_seconds"] > 0 for e in entries) and entries[-1]["validation_divergence"] > 0
    assert all(("cross_entropy" in e) == (share < 1.0) for e in entries)  # its own words are not to be repeated
