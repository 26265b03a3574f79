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
from rung.config.io import load_config
from rung.data.chat import ChatTemplate
from rung.runs.dataset import read_splits
from rung.runs.load import load_base_on_device
from rung.runs.teacher import TeacherPrompts


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

    monkeypatch.setattr("rung.runs.teacher.load_base_on_device", load)
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


STOPS = 'evaluation.stop=["e", "a", "o", "i", "u", "t", "n", "s"]'
"""An untrained model ends no answer: these letters do."""
SEES = "teacher_sees: {instruction: true, shots: 2}"


def test_a_prompt_is_distilled_into_rows_without_answers(config: Path, tmp_path: Path, capsys: Any) -> None:
    """The base is the teacher and writes the answers; the loss at the start is what the prompt does to the base."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"what is in it, {i}?", "box": i % 20} for i in range(40)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = config.read_text().split("data: {path: ")[1].split(",")[0]
    paths = f"['{data}', {{path: {prompts}, format: prompt_only}}]"
    settings = (f"data.path={paths}", f"objective={{kind: distill, teacher: base, {SEES}}}", STOPS)
    code, _, err = inside(capsys, "train", config, *settings)
    assert code == 0, err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    counts = run["data"]["splits"]["teacher_answers"]
    assert 0 < counts["answered"] <= counts["rows"] - counts["cut"] and "teacher's answers:" in err
    assert run["fingerprints"]["teacher"] == run["fingerprints"]["base"]
    entries = log(tmp_path / "run")
    assert 0 < entries[-1]["divergence"] < entries[0]["divergence"]
    # the same command finds the answers in the cache: nothing is generated again
    (journal,) = (tmp_path / "cache" / "teacher-answers").iterdir()
    before = journal.read_bytes()
    code, _, err = inside(capsys, "train", config, *settings, "--overwrite")
    assert code == 0 and "going on after 1 of 1 parts" in err and journal.read_bytes() == before


def test_a_distilled_prompt_resumes(config: Path, tmp_path: Path, capsys: Any) -> None:
    objective = f"objective={{kind: distill, teacher: base, {SEES}, answers: data}}"
    settings = [objective, "training.checkpoint_every=3", "training.epochs=2"]
    _, parts = goes_on_as_if_never_stopped(capsys, config, settings, tmp_path, 3)
    assert inside(capsys, "eval", parts, "--limit", 3)[0] == 0


@pytest.mark.parametrize("method", ["{kind: full}", "{kind: qlora, rank: 4}", "{kind: prompt, virtual_tokens: 4}"])
def test_any_method_learns_a_prompt(method: str, config: Path, tmp_path: Path, capsys: Any) -> None:
    """Full fine-tuning moves the base, so that its teacher is a second copy; QLoRA quantizes what the teacher reads."""
    objective = f"objective={{kind: distill, teacher: base, {SEES}, answers: data, on_policy: 0.5}}"
    settings = (objective, f"method={method}", "training.learning_rate=null", "training.max_steps=3")
    code, _, err = inside(capsys, "train", config, *settings)
    assert code == 0, err
    assert ("the teacher is a second model in memory" in err) == ("full" in method)
    assert all(entry["divergence"] > 0 for entry in log(tmp_path / "run"))
    assert inside(capsys, "plan", config, *settings)[0] == 0


def test_a_row_is_no_worked_example_of_itself(config: Path, tmp_path: Path, capsys: Any, tiny_base: Path) -> None:
    """Its answer would stand in its own prompt, to be copied."""
    for selection in ("random", "similarity"):
        objective = {"kind": "distill", "teacher": "base", "teacher_sees": {"shots": 2, "example_selection": selection}}
        run = load_config(config, ["objective=" + json.dumps(objective)]).config
        splits = read_splits(run)
        chat = ChatTemplate(load_base_on_device(run.model).tokenizer)
        prompts = TeacherPrompts.of_run(run, splits, chat, None)
        turns = [prompts.turns(record) for record in splits.train]
        shots = {len(t) for t in turns}
        assert shots <= {3, 5} and 5 in shots and all(t[-1].role == "user" for t in turns)
        for record, t in zip(splits.train, turns, strict=True):
            assert not any(record.question in turn.content for turn in t[:-1])


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("teacher: base", "give it a longer prompt"),
        ("teacher: base, teacher_sees: {}", "adds nothing"),
        ("teacher: base, teacher_sees: {context: given}", "adds nothing: the student's context is given too"),
        ("teacher: base, teacher_sees: {shots: 1}, cosine: 1", "cosine"),
        ("teacher: base, teacher_sees: {instruction: true, example_selection: random}", "example_selection"),
        ("teacher: base, teacher_sees: {shots: 1000}", "1000 worked examples"),
        (f"teacher: base, {SEES}", "the teacher completed no answer"),
    ],
)
def test_prompts_that_cannot_be_distilled(objective: str, said: str, config: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "train", config, f"objective={{kind: distill, {objective}}}")
    assert code == 2 and said in err and not (tmp_path / "run").exists(), err


def test_a_rung_stands_beside_the_prompt_that_it_replaces(config: Path, tmp_path: Path, capsys: Any) -> None:
    """It learns the prompt of the rung before it, with the instruction that the climb chose."""
    rungs = "[zero_shot, few_shot, distilled_prompt, {kind: distilled_prompt, name: short, replaces: zero_shot}]"
    settings = (f"climb.rungs={rungs}", "climb.instructions=[Say which fruit it is.]", "data.validation=0.2", STOPS)
    code, out, err = inside(capsys, "climb", config, *settings, "--json")
    assert code == 0, err
    rows = {row["rung"]: row for row in json.loads(out)["rows"]}
    assert rows["distilled_prompt"]["prompt_tokens"] < rows["few_shot"]["prompt_tokens"]
    assert rows["distilled_prompt"]["sees"] == "context, in place of the prompt of few_shot"
    assert rows["short"]["sees"] == "context, in place of the prompt of zero_shot"
    rung = json.loads((tmp_path / "run" / "rungs" / "distilled_prompt" / "run.json").read_text())["config"]
    assert rung["objective"]["teacher_sees"]["shots"] == 2 and rung["method"] == {**rung["method"], "rank": 4}
    zero_shot = json.loads((tmp_path / "run" / "rungs" / "zero_shot" / "result.json").read_text())
    assert rung["evaluation"]["instruction"] == zero_shot["instruction"]
    short = json.loads((tmp_path / "run" / "rungs" / "short" / "run.json").read_text())["config"]
    assert short["objective"]["teacher_sees"] == {**short["objective"]["teacher_sees"], "shots": 0, "instruction": True}
    assert "distilled_prompt" in (tmp_path / "run" / "report.html").read_text()
    for wrong, said in (
        ("distilled_prompt, few_shot", "before it"),
        ("few_shot, {kind: lora, replaces: few_shot}", "takes no"),
    ):
        code, _, err = inside(capsys, "climb", config, f"climb.rungs=[{wrong}]", f"output={tmp_path / 'other'}")
        assert code == 2 and said in err, err
