"""Rungs with rows of their own: made rows, human rows and both, on the questions of the climb."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from processes import inside
from rung.commands.climb_data import ClimbData
from rung.config.io import parse_config
from rung.runs.teacher import TeacherPrompts
from rung.training.run_folder import read_items
from rung.types import Message, Record

MADE = 60


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Rows that ask nothing of the test."""
    file = tmp_path / "made.jsonl"
    rows = [
        {"context": f"crate {i}", "question": f"which fruit, {i}?", "answer": "apples" if i % 2 else "pears"}
        for i in range(MADE)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def climb(
    capsys: Any, config: Path, rungs: list[Any], *settings: object, **climb_settings: Any
) -> tuple[int, Any, str]:
    """Exit code, ladder, errors."""
    section = json.dumps({"rungs": rungs, **climb_settings})
    code, out, err = inside(capsys, "climb", config, f"climb={section}", *settings, "--json")
    return code, json.loads(out) if code == 0 else None, err


def manifest(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def same_adapter(first: Path, second: Path) -> bool:
    tensors = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, second)]
    return tensors[0].keys() == tensors[1].keys() and all(torch.equal(tensors[0][n], tensors[1][n]) for n in tensors[0])


def own(path: object, **settings: Any) -> dict[str, Any]:
    return {"data": {"path": path, **settings}}


def test_made_rows_human_rows_and_both(config: Path, made: Path, questions: Path, tmp_path: Path, capsys: Any) -> None:
    both = own([str(questions), str(made)], overlap="drop_train")
    rungs = ["zero_shot", "lora", {"kind": "lora", "name": "made", **own(str(made))}]
    code, ladder, err = climb(capsys, config, [*rungs, {"kind": "lora", "name": "both", **both}])
    assert code == 0, err
    runs = tmp_path / "run" / "rungs"
    items = {name: read_items(runs / name / "items.parquet")[0] for name in ("zero_shot", "lora", "made", "both")}
    asked = [(item["source"], item["expected"]) for item in items["lora"]]
    assert all([(item["source"], item["expected"]) for item in rung] == asked for rung in items.values())
    splits = {name: manifest(runs / name)["data"]["splits"] for name in ("lora", "made", "both")}
    # a tenth for validation, as in the section `data`, and the climb's test in all of them
    assert 0 < splits["made"]["validation"]["rows"] < MADE / 4
    assert splits["made"]["train"]["rows"] + splits["made"]["validation"]["rows"] == MADE
    assert {split["test"]["rows"] for split in splits.values()} == {len(asked)}
    # both: all rows of both files but those of the test, which the first file holds too
    assert splits["both"]["overlap_dropped"] == len(asked)
    assert splits["both"]["train"]["rows"] + splits["both"]["validation"]["rows"] == MADE + 120 - len(asked)
    assert f"climb.rungs both: {len(asked)} rows ask what the test asks and are left out" in err
    # and what is trained is what these rows alone make
    section = json.dumps({"path": str(made), "test": 0})
    code, _, err = inside(capsys, "train", config, f"data={section}", f"output={tmp_path / 'alone'}")
    assert code == 0 and same_adapter(runs / "made", tmp_path / "alone"), err
    assert not same_adapter(runs / "made", runs / "lora")
    assert str(made) in (tmp_path / "run" / "report.html").read_text()
    assert [row["rung"] for row in ladder["rows"]] == ["zero_shot", "lora", "made", "both"]


def test_a_rung_with_rows_of_its_own_is_scored_on_the_test_of_its_ladder(
    config: Path, made: Path, tmp_path: Path, capsys: Any
) -> None:
    """The same questions give the same score; a run without a test that is in no ladder is refused."""
    rungs = [{"kind": "lora", "name": "made", **own(str(made))}]
    settings = ("training.max_steps=2", "evaluation.limit=7")
    code, ladder, err = climb(capsys, config, rungs, *settings, seeds=2)
    assert code == 0, err
    for seed in (0, 1):
        run = tmp_path / "run" / "rungs" / "made" / f"seed-{seed}"
        in_ladder = read_items(run / "items.parquet")[0]
        code, out, err = inside(capsys, "eval", run, "--json")
        assert code == 0 and "on the test split of the ladder" in err, err
        again = read_items(run / "eval.parquet")[0]
        assert [item["source"] for item in again] == [item["source"] for item in in_ladder] and len(again) == 7
        assert [item["answer"] for item in again] == [item["answer"] for item in in_ladder]
        contamination = json.loads(out)["contamination"]
        assert contamination["train_rows"] == manifest(run)["data"]["splits"]["train"]["rows"]
    shutil.copytree(run, tmp_path / "moved")
    code, _, err = inside(capsys, "eval", tmp_path / "moved")
    assert code == 2 and "no test split to be scored on" in err and "--config" in err, err


@pytest.mark.parametrize("limit", ["null", "2"])
@pytest.mark.parametrize("kind", ["lora", "few_shot"])
def test_rows_of_the_test_are_refused_before_anything_is_spent(
    kind: str, limit: str, config: Path, made: Path, questions: Path, tmp_path: Path, capsys: Any
) -> None:
    """In another form too, and the questions that a limit leaves out as well."""
    assert climb(capsys, config, ["zero_shot"])[0] == 0
    item = read_items(tmp_path / "run" / "rungs" / "zero_shot" / "items.parquet")[0][-1]
    asked = json.loads(questions.read_text().splitlines()[int(item["source"].rpartition(" ")[2]) - 1])
    turns = [
        {"role": "user", "content": f"{asked['context'].upper()}\n{asked['question']}"},
        {"role": "assistant", "content": asked["answer"]},
    ]
    leaked = tmp_path / "leaked.jsonl"
    leaked.write_text(json.dumps({"messages": turns}) + "\n")
    settings = (f"output={tmp_path / 'two'}", f"evaluation.limit={limit}")
    paths = [str(made), str(leaked)]
    code, _, err = climb(capsys, config, ["zero_shot", {"kind": kind, "name": "r", **own(paths)}], *settings)
    assert code == 2 and "1 rows of this rung ask what the test asks" in err and "drop_train" in err, err
    assert not (tmp_path / "two").exists()
    rung = {"kind": kind, "name": "r", **own(paths, overlap="drop_train")}
    code, _, err = climb(capsys, config, [rung], *settings, "training.max_steps=1")
    assert code == 0 and "climb.rungs r: 1 rows ask what the test asks and are left out" in err, err
    nothing_left = {"kind": kind, "name": "r", **own(str(leaked), overlap="drop_train", validation=0)}
    code, _, err = climb(capsys, config, [nothing_left], f"output={tmp_path / 'three'}")
    assert code == 2 and "every training row of this rung asks what the test asks" in err, err


def test_a_rung_on_top_leaves_rows_of_the_test_out(config: Path, questions: Path, tmp_path: Path, capsys: Any) -> None:
    on_top = {"base_rung": "lora", "objective": {"kind": "sft"}, **own(str(questions))}
    code, _, err = climb(capsys, config, ["lora"], on_top=[on_top])
    assert code == 2 and "ask what the test asks" in err and not (tmp_path / "run").exists()
    on_top = {**on_top, **own(str(questions), overlap="drop_train"), "training": {"max_steps": 1}}
    code, _, err = climb(capsys, config, ["lora"], on_top=[on_top])
    assert code == 0 and "climb.on_top lora then sft: " in err, err
    splits = manifest(tmp_path / "run" / "rungs" / "lora-then-sft")["data"]["splits"]
    below = manifest(tmp_path / "run" / "rungs" / "lora")["data"]["splits"]
    assert splits["overlap_dropped"] == below["test"]["rows"]


def test_worked_examples_from_other_rows(config: Path, made: Path, tmp_path: Path, capsys: Any) -> None:
    rungs = ["few_shot", {"kind": "few_shot", "name": "made examples", **own(str(made))}]
    rungs.append({"kind": "few_shot", "name": "near", "example_selection": "similarity", **own(str(made))})
    code, ladder, err = climb(capsys, config, rungs)
    assert code == 0, err
    sources = {
        name: json.loads((tmp_path / "run" / "rungs" / name / "result.json").read_text())["shots"]
        for name in ("few_shot", "made-examples", "near")
    }
    assert all(str(made) in source for name in ("made-examples", "near") for source in sources[name])
    assert not any(str(made) in source for source in sources["few_shot"])
    assert len(sources["made-examples"]) == 2
    # nothing is chosen on such rows, so none are held out
    code, _, err = climb(
        capsys, config, [{"kind": "few_shot", "shots": MADE, **own(str(made))}], f"output={tmp_path / 'all'}",
        "evaluation.max_new_tokens=1",
    )  # fmt: skip
    assert "worked examples" not in err and "tokens" in err  # there are 60, and their prompt is too long for this base


def test_rows_that_changed_do_not_stand_in_one_ladder(config: Path, made: Path, tmp_path: Path, capsys: Any) -> None:
    rungs = ["lora", {"kind": "lora", "name": "made", **own(str(made))}]
    assert climb(capsys, config, rungs)[0] == 0
    code, again, err = climb(capsys, config, rungs)
    assert code == 0 and "rung made" not in err
    made.write_text(made.read_text().replace("pears", "plums"))
    for unfinished in (False, True):
        if unfinished:
            (tmp_path / "run" / "rungs" / "made" / "result.json").unlink()
        code, _, err = climb(capsys, config, rungs)
        assert code == 3 and "the data of made has changed since this climb began" in err and "--overwrite" in err, err


def test_a_climb_that_is_stopped_in_such_a_rung_goes_on(config: Path, made: Path, tmp_path: Path, capsys: Any) -> None:
    rungs = ["lora", {"kind": "lora", "name": "made", **own(str(made))}]
    settings = ("training.checkpoint_every=2",)
    code, whole, err = climb(capsys, config, rungs, *settings)
    assert code == 0, err
    run = tmp_path / "run" / "rungs" / "made"
    first = load_file(run / "adapter" / "adapter_model.safetensors")
    (run / "result.json").unlink()
    (run / "run.json").write_text(json.dumps({**manifest(run), "status": "running"}))
    code, parts, err = climb(capsys, config, rungs, *settings)
    assert code == 0 and "resumed from step-" in err and "rung lora" not in err, err
    second = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [row["scores"] for row in parts["rows"]] == [row["scores"] for row in whole["rows"]]


def test_search_and_learning_curve_are_about_the_rows_of_the_rung(
    config: Path, made: Path, questions: Path, tmp_path: Path, capsys: Any
) -> None:
    both = own([str(questions), str(made)], overlap="drop_train", validation=0.2)
    # 100 rows are more than the climb has for training, and fewer than the rung has
    code, ladder, err = climb(
        capsys, config, ["lora", {"kind": "lora", "name": "both", **both}], "training.max_steps=3",
        curve=[40, 100, 500], search={"trials": 2, "learning_rate": [1e-4, 1e-2]},
    )  # fmt: skip
    assert code == 0, err
    assert [point["rung"] for point in ladder["curve"]] == ["both", "both"]
    splits = manifest(tmp_path / "run" / "curve" / "100")["data"]["splits"]
    assert splits["sets"][1]["path"] == str(made) and splits["train"]["rows"] == ladder["curve"][1]["rows"] <= 100
    assert "500 are passed over" in err
    code, _, err = climb(
        capsys, config, ["lora", {"kind": "lora", "name": "both", **both}], "training.max_steps=3",
        curve=[40, 100, 500], search={"trials": 2, "learning_rate": [1e-4, 1e-2]},
    )  # fmt: skip
    assert code == 0 and "loading" not in err, err  # finished: nothing is missing


def test_rows_without_answers_are_distilled(
    config: Path, questions: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is that of the few-shot rung, with its examples, and the questions are others."""
    asked: list[list[str]] = []
    turns_of = TeacherPrompts.turns

    def noted(prompts: TeacherPrompts, record: Record) -> tuple[Message, ...]:
        turns = turns_of(prompts, record)
        asked.append([turn.content for turn in turns])
        return turns

    monkeypatch.setattr(TeacherPrompts, "turns", noted)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"crate {i}\n\nwhich fruit, {i}?"}) + "\n" for i in range(40)))
    # an untrained model ends no answer: these letters do
    stops = ('evaluation.stop=["e", "a", "o", "i", "u", "t", "n", "s"]', "evaluation.max_new_tokens=40")
    rungs = ["few_shot", {"kind": "distilled_prompt", "name": "distilled", **own(str(prompts), format="prompt_only")}]
    code, ladder, err = climb(capsys, config, rungs, *stops, "training.max_steps=2")
    assert code == 0, err
    runs = tmp_path / "run" / "rungs"
    splits = manifest(runs / "distilled")["data"]["splits"]
    assert splits["sets"][0]["path"] == str(prompts) and 0 < splits["teacher_answers"]["rows"] == 40
    assert ladder["rows"][1]["sees"] == "context, in place of the prompt of few_shot"
    shots = json.loads((runs / "few_shot" / "result.json").read_text())["shots"]
    lines = [json.loads(questions.read_text().splitlines()[int(shot.rpartition(" ")[2]) - 1]) for shot in shots]
    assert asked
    for *before, question in asked:
        assert "which fruit" in question and "which fruit" not in str(before)
        assert all(any(line["question"] in text for text in before) for line in lines)


@pytest.mark.parametrize("kind", ["prompt", "full", "prefix"])
def test_any_method_learns_other_rows(kind: str, config: Path, made: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = climb(capsys, config, [{"kind": kind, "name": "r", **own(str(made))}], "training.max_steps=1")
    assert code == 0, err
    assert manifest(tmp_path / "run" / "rungs" / "r")["data"]["splits"]["sets"][0]["path"] == str(made)


@pytest.mark.parametrize(
    ("rung", "words"),
    [
        ({"kind": "zero_shot", "data": {"path": "made.jsonl"}}, "neither trains nor shows worked examples"),
        ({"kind": "rag", "data": {"path": "made.jsonl"}}, "neither trains nor shows worked examples"),
        ({"kind": "lora", "data": {"path": "made.jsonl", "test": 0.1}}, "takes no `test`"),
        ({"kind": "lora", "data": {"pth": "made.jsonl"}}, "did you mean data.path?"),
        ({"kind": "few_shot", "data": {"validation": 0}}, "data.path is missing"),
        ({"kind": "lora", "data": {"path": "no-such.jsonl"}}, "no-such.jsonl"),
        ({"kind": "lora", "context": "retrieved", "data": {"path": "made.jsonl"}}, "evaluation.retrieve.documents"),
    ],
)
def test_bad_data_of_a_rung(rung: dict[str, Any], words: str, config: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = climb(capsys, config, [rung])
    assert code == 2 and words in err and not (tmp_path / "run").exists(), err


def test_chosen_instructions_need_no_validation_rows_of_a_rung(
    config: Path, made: Path, tmp_path: Path, capsys: Any
) -> None:
    rungs = ["zero_shot", {"kind": "lora", "name": "made", **own(str(made), validation=0)}]
    settings = ("data.validation=0.2", "training.max_steps=1")
    code, _, err = climb(capsys, config, rungs, *settings, instructions=["Say which fruit it is."])
    assert code == 0, err
    assert manifest(tmp_path / "run" / "rungs" / "made")["data"]["splits"]["train"]["rows"] == MADE


def test_all_rungs_read_the_questions_in_one_way(config: Path, made: Path, tmp_path: Path, capsys: Any) -> None:
    """Control tokens in a question are text, as the section `data` says, whatever a rung's own rows are read with."""
    rows = [{"question": f"what is in box {i}<|im_end|>?", "answer": "apples" if i % 2 else "pears"} for i in range(80)]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rungs = ["lora", {"kind": "lora", "name": "made", **own(str(made), control_tokens="keep")}]
    settings = (f"data={{path: {asked}, test: 0.25}}", "training.max_steps=1")
    code, ladder, err = climb(capsys, config, rungs, *settings)
    assert code == 0, err
    first, second = (row["prompt_tokens"] for row in ladder["rows"])
    assert first == second
    (tmp_path / "run" / "rungs" / "made" / "result.json").unlink()  # and opened again, after a stop
    code, ladder, err = climb(capsys, config, rungs, *settings)
    assert code == 0 and ladder["rows"][1]["prompt_tokens"] == first, err


def test_rows_that_are_not_scored_need_nothing_of_a_metric(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs are run against the tests of the climb's rows; made rows without tests can still be learned from."""
    monkeypatch.setattr("rung.runs.dataset.require_isolation", lambda _: None)
    asked = tmp_path / "programs.jsonl"
    rows = [
        {"question": f"add {i}", "answer": "def f(x): ...", "tests": [f"assert f(1) == {i + 1}"]} for i in range(40)
    ]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rung = {"kind": "lora", "name": "made", **own(str(made))}
    sections = {"data": {"path": str(asked)}, "evaluation": {"metrics": ["code"]}, "output": "o"}
    run = parse_config({**sections, "climb": {"rungs": [rung]}})
    assert len(ClimbData(run).splits_of(run.climb.rungs[0]).train) > MADE / 2
