"""Preferences from the command line: pairs in, a margin that grows, and errors that say what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from processes import inside, log
from rung.training.run_folder import read_items


@pytest.mark.parametrize("method", ["{kind: lora, rank: 4}", "{kind: full}", "{kind: prompt, virtual_tokens: 3}"])
def test_the_margin_grows(method: str, compared: Path, tmp_path: Path, capsys: Any) -> None:
    """From ln 2; where the base itself moves, against a copy that does not."""
    settings = (f"method={method}", "training.epochs=3", "training.max_steps=null", "training.learning_rate=1e-2")
    code, _, err = inside(capsys, "train", compared, *settings)
    assert code == 0, err
    entries = log(tmp_path / "run")
    if "prompt" not in method:
        assert entries[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and abs(entries[0]["margin"]) < 1e-3
    assert entries[-1]["margin"] > entries[0]["margin"] + 0.2 and entries[-1]["validation_accuracy"] > 0.9
    assert ("second model" in err) == ("full" in method)
    assert inside(capsys, "eval", tmp_path / "run", "--limit", 3)[0] == 0


def test_a_run_is_the_reference_of_the_next(compared: Path, tmp_path: Path, capsys: Any) -> None:
    """As its base, or by name: either way the first step stands at ln 2."""
    first = tmp_path / "first"
    assert inside(capsys, "train", compared, "objective={kind: sft}", f"output={first}")[0] == 0
    for number, settings in enumerate(([], [f"objective.reference={first}"])):
        given = [f"model.name={first}", *settings, f"output={tmp_path / str(number)}"]
        code, _, err = inside(capsys, "train", compared, *given)
        assert code == 0, err
        assert log(tmp_path / str(number))[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    code, _, err = inside(capsys, "train", compared, f"objective.reference={first}", f"output={tmp_path / 'other'}")
    assert code == 0, err
    assert abs(log(tmp_path / "other")[0]["margin"]) > 1e-3


def test_rows_without_rivals_are_refused(compared: Path, questions: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "train", compared, f"data.path={questions}")
    assert code == 2 and "compares nothing" in err


def test_answers_too_long_go_with_their_row(compared: Path, tmp_path: Path, capsys: Any) -> None:
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    long = {**json.loads(lines[0]), "rejected": "stones " * 60}
    (tmp_path / "pairs.jsonl").write_text("\n".join([json.dumps(long), *lines[1:]]) + "\n")
    given = ("data.max_length=60", "data.test=0", "data.validation=0")
    code, _, err = inside(capsys, "train", compared, *given)
    assert code == 2 and "longer than" in err
    code, _, err = inside(capsys, "train", compared, *given, "data.overflow=drop")
    assert code == 0, err
    found = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["train"]
    assert found["dropped"] == 1 and found["examples"] == 2 * 79
    assert inside(capsys, "train", compared, *given, "data.overflow=trim_prompt", "--overwrite")[0] == 2


def test_labelled_answers_are_told_apart_and_never_learned_as_they_are(
    compared: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = [
        {
            "prompt": f"what is in box {i}?",
            "completion": "apples" if i % 2 else "stones",
            "label": bool(i % 2),
            "box": i % 20,
        }
        for i in range(80)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = inside(capsys, "train", compared, "objective={kind: sft}", "data.format=unpaired_preference")
    assert code == 2 and "labelled as bad" in err
    code, _, err = inside(capsys, "train", compared, "data.format=unpaired_preference")
    assert code == 2 and "loss: kto" in err
    settings = (
        "data.format=unpaired_preference",
        "objective={kind: preference, loss: kto, beta: 0.5}",
        "training.epochs=3",
        "training.max_steps=null",
    )
    code, _, err = inside(capsys, "train", compared, *settings)
    assert code == 0, err
    entries = log(tmp_path / "run")
    assert entries[0]["loss"] == pytest.approx(0.5, abs=1e-3) and entries[-1]["margin"] > 0.2
    compared.write_text(compared.read_text().replace("data: {", "data: {format: unpaired_preference, "))
    assert inside(capsys, "data", "check", compared)[0] == 0
    code, out, err = inside(capsys, "eval", tmp_path / "run", "--json")
    assert code == 0, err
    items = read_items(tmp_path / "run" / "eval.parquet")[0]
    assert items and {item["expected"] for item in items} == {"apples"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.loss_on=all"], "loss_on is answer"),
        (["objective.loss=kto", "training.examples_per_step=1"], "at least 2"),
        (["method={kind: p_tuning, virtual_tokens: 2, positions: {user: 2}}"], "all of them in front"),
        (["objective.reference=runs/nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_written(
    settings: list[str], said: str, compared: Path, tmp_path: Path, capsys: Any
) -> None:
    code, _, err = inside(capsys, "train", compared, *settings)
    assert code in (2, 3) and said in err and not (tmp_path / "run").exists()


def test_another_reference_under_the_same_name_is_noticed(compared: Path, tmp_path: Path, capsys: Any) -> None:
    first = tmp_path / "first"
    sft = ("objective={kind: sft}", f"output={first}")
    assert inside(capsys, "train", compared, *sft)[0] == 0
    given = [f"objective.reference={first}", "training.checkpoint_every=2"]
    assert inside(capsys, "train", compared, *given)[0] == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**run, "status": "interrupted"}))
    assert inside(capsys, "train", compared, *sft, "seed=5", "--overwrite")[0] == 0
    code, _, err = inside(capsys, "train", compared, *given, "--resume")
    assert code == 3 and "cannot resume: reference changed" in err


@pytest.mark.parametrize("objective", ["beta: 0.5", "loss: kto, sft: 0.1, beta: 0.5", "loss: orpo"])
def test_a_resumed_run_is_the_one_that_was_never_stopped(
    objective: str, compared: Path, tmp_path: Path, capsys: Any
) -> None:
    """Second epoch included, where the reference is not asked again."""
    settings = [f"objective={{kind: preference, {objective}}}", "training.epochs=2", "training.max_steps=14"]
    settings += ["training.checkpoint_every=10"]
    assert inside(capsys, "train", compared, *settings, f"output={tmp_path / 'whole'}")[0] == 0
    assert inside(capsys, "train", compared, *settings)[0] == 0
    run = tmp_path / "run"
    shutil.rmtree(run / "adapter")
    found = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**found, "status": "running"}))
    code, _, err = inside(capsys, "train", compared, *settings, "--resume")
    assert code == 0 and "resumed from step-00000010" in err
    whole, resumed = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (tmp_path / "whole", run))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [[entry["loss"] for entry in log(f)] for f in (tmp_path / "whole", run)]
    assert losses[0] == losses[1] and len(losses[0]) == 14


def relabel(path: Path, probabilities: list[float | None], *, exchanged: bool = False) -> None:
    """Write the pairs with these probabilities in turn, `exchanged` with their answers in each other's place."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["probability"] = probabilities[i % len(probabilities)]
        if exchanged:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("objective", ["kind: preference, loss: orpo", "kind: preference", "kind: reward"])
def test_probabilities_reach_the_weights(objective: str, compared: Path, tmp_path: Path, capsys: Any) -> None:
    """Soft labels train something else than certain ones, whichever of the answers is called chosen."""
    pairs = tmp_path / "pairs.jsonl"
    found = {}
    for name, labels, exchanged in (
        ("hard", [None], False),
        ("soft", [0.7], False),
        ("exchanged", [0.3], True),
        ("mixed", [0.7, None], False),
    ):
        relabel(pairs, labels, exchanged=exchanged)
        settings = (f"objective={{{objective}}}", f"output={tmp_path / name}")
        code, _, err = inside(capsys, "train", compared, *settings)
        assert code == 0, err
        assert ("rejected answer is taken as the better one: 80 of 80" in err) == exchanged
        assert ("whose better answer is certain: 40 of 80" in err) == (name == "mixed")
        found[name] = weights_of(tmp_path / name)
    assert all(torch.equal(found["soft"][name], found["exchanged"][name]) for name in found["soft"])
    for first, second in (("hard", "soft"), ("hard", "mixed"), ("soft", "mixed")):
        assert any(not torch.equal(found[first][name], found[second][name]) for name in found["soft"]), (first, second)
    metrics = log(tmp_path / "soft")[-1]
    assert log(tmp_path / "exchanged")[-1]["accuracy"] == metrics["accuracy"]


def test_pairs_of_which_no_answer_is_better_are_trained_without_a_margin(
    compared: Path, tmp_path: Path, capsys: Any
) -> None:
    """Nothing about them can be right; equal scores are learned, and DPO begins with them."""
    relabel(tmp_path / "pairs.jsonl", [0.5])
    code, _, err = inside(capsys, "train", compared, "objective={kind: reward}")
    assert code == 0, err
    entries, health = log(tmp_path / "run"), json.loads((tmp_path / "run" / "run.json").read_text())["reward"]
    assert entries[-1]["loss"] == pytest.approx(0.6931, abs=0.01) and "margin" not in entries[-1]
    assert (health["pairs"], health["verdict"]) == (0, "unproven")
    assert (tmp_path / "run" / "report.html").exists()
    code, _, err = inside(capsys, "train", compared, "--overwrite")
    assert code == 3 and "gate movement" in err


@pytest.mark.parametrize("loss", ["kto", "robust, label_smoothing: 0.1"])
def test_losses_that_cannot_use_a_probability_refuse_it(loss: str, compared: Path, tmp_path: Path, capsys: Any) -> None:
    relabel(tmp_path / "pairs.jsonl", [None, None, 0.8])
    code, _, err = inside(capsys, "train", compared, f"objective={{kind: preference, loss: {loss}}}")
    assert code == 2 and "a probability that the loss cannot use" in err and not (tmp_path / "run").exists()


def test_a_resume_goes_on_with_the_probabilities_it_began_with(compared: Path, tmp_path: Path, capsys: Any) -> None:
    relabel(tmp_path / "pairs.jsonl", [0.8, None, 0.3])
    settings = ["training.max_steps=6", "training.checkpoint_every=3", "objective.sft=0.5"]
    assert inside(capsys, "train", compared, *settings, f"output={tmp_path / 'whole'}")[0] == 0
    assert inside(capsys, "train", compared, *settings)[0] == 0
    run = tmp_path / "run"
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**manifest, "status": "running"}))
    shutil.rmtree(run / "adapter")
    relabel(tmp_path / "pairs.jsonl", [0.8, None, 0.31])
    code, _, err = inside(capsys, "train", compared, *settings, "--resume")
    assert code == 3 and "cannot resume: data changed" in err
    relabel(tmp_path / "pairs.jsonl", [0.8, None, 0.3])
    code, _, err = inside(capsys, "train", compared, *settings, "--resume")
    assert code == 0 and "resumed from step-00000003" in err
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(run)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
