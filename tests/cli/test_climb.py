"""The ladder: measured on one test set, taken up where it stands, judged with intervals."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest

from processes import inside
from rung.runs import load
from rung.training.run_folder import read_items, write_items


@pytest.fixture
def climb(config: Path) -> Path:
    config.write_text(config.read_text() + "climb: {rungs: [zero_shot, few_shot, head, lora, full]}\n")
    return config


def test_ladder_of_five_rungs(climb: Path, tmp_path: Path, capsys: Any) -> None:
    code, out, err = inside(capsys, "climb", climb, "--json")
    assert code == 0, err
    found = json.loads(out)
    rows = {row["rung"]: row for row in found["rows"]}
    assert list(rows) == ["zero_shot", "few_shot", "head", "lora", "full"]
    assert rows["zero_shot"]["trainable_parameters"] == rows["zero_shot"]["train_seconds"] == 0
    assert rows["zero_shot"]["gain"] is None and rows["lora"]["gain"]["examples"] == found["examples"]
    assert rows["head"]["trainable_parameters"] == 320 * 32
    assert rows["few_shot"]["prompt_tokens"] > rows["zero_shot"]["prompt_tokens"] > rows["lora"]["prompt_tokens"]
    assert rows["few_shot"]["sees"] == "instruction, 2 shots, context" and rows["lora"]["sees"] == "context"
    assert all(row["seconds_per_query"] > 0 and row["peak_memory_bytes"] > 1e8 for row in rows.values())
    assert found["verdict"]["text"]
    runs = {
        name: json.loads((tmp_path / "run" / "rungs" / name / "run.json").read_text())
        for name in ("head", "lora", "full")
    }
    # the config's rate is the config's method's; another method starts from its own default
    assert {name: run["learning_rate"] for name, run in runs.items()} == {"head": 5e-4, "lora": 1e-2, "full": 5e-5}
    items = {
        name: [item["source"] for item in read_items(tmp_path / "run" / "rungs" / name / "items.parquet")[0]]
        for name in rows
    }
    assert len({tuple(sources) for sources in items.values()}) == 1
    shots = json.loads((tmp_path / "run" / "rungs" / "few_shot" / "result.json").read_text())["shots"]
    assert len(shots) == 2 and not set(shots) & set(items["few_shot"])
    assert (tmp_path / "run" / "report.html").exists()


def test_finished_rungs_are_not_repeated(climb: Path, tmp_path: Path, capsys: Any) -> None:
    settings = ["climb.rungs=[zero_shot, lora]"]
    _, first, _ = inside(capsys, "climb", climb, *settings, "--json")
    items = tmp_path / "run" / "rungs" / "zero_shot" / "items.parquet"
    stamp = items.stat().st_mtime_ns
    (tmp_path / "run" / "rungs" / "lora" / "result.json").unlink()
    code, again, err = inside(capsys, "climb", climb, *settings, "--json")
    assert code == 0 and "rung lora" in err and "rung zero_shot" not in err and "train 1/6" not in err
    assert items.stat().st_mtime_ns == stamp
    scores = [[row["scores"] for row in json.loads(out)["rows"]] for out in (first, again)]
    assert scores[0] == scores[1]
    code, _, err = inside(capsys, "climb", climb, "climb.rungs=[zero_shot]")
    assert code == 3 and "climb.rungs" in err


def test_a_verdict_over_cut_answers_says_so(climb: Path, tmp_path: Path, capsys: Any) -> None:
    """A random model never stops; where no answer is cut the verdict says nothing of it."""
    settings = ("climb.rungs=[zero_shot]", "evaluation.limit=4")
    code, out, err = inside(capsys, "climb", climb, *settings, "--json")
    assert code == 0, err
    ladder = json.loads(out)
    assert ladder["rows"][0]["cut_off"] > 0.1
    share = f"{ladder['rows'][0]['cut_off']:.0%}"
    assert f"Answers of zero_shot ({share}) were cut at evaluation.max_new_tokens" in ladder["verdict"]["text"]
    result = tmp_path / "run" / "rungs" / "zero_shot" / "items.parquet"
    items, metadata = read_items(result)
    write_items(result, [{**item, "stopped": True} for item in items], metadata)
    again = json.loads(inside(capsys, "climb", climb, *settings, "--json")[1])
    assert again["rows"][0]["cut_off"] == 0.0 and "were cut" not in again["verdict"]["text"]


def test_seeds_widen_and_make_runs_of_their_own(climb: Path, tmp_path: Path, capsys: Any) -> None:
    settings = ["climb.rungs=[zero_shot, lora]", "climb.seeds=2", "evaluation.metrics=[token_f1]"]
    code, out, err = inside(capsys, "climb", climb, *settings, "--json")
    assert code == 0, err
    runs = [tmp_path / "run" / "rungs" / "lora" / f"seed-{n}" for n in (0, 1)]
    seeds = [json.loads((run / "run.json").read_text())["config"]["seed"] for run in runs]
    assert seeds == [0, 1]
    assert (runs[0] / "log.jsonl").read_text() != (runs[1] / "log.jsonl").read_text()
    assert json.loads(out)["rows"][1]["scores"]["token_f1"]["examples"] == json.loads(out)["examples"]


def test_rungs_with_settings_of_their_own(climb: Path, tmp_path: Path, capsys: Any) -> None:
    rungs = (
        "[few_shot, {kind: few_shot, name: one-shot, shots: 1},"
        " {kind: lora, name: lora-r2, method: {rank: 2}, training: {max_steps: 2}}]"
    )
    code, out, err = inside(capsys, "climb", climb, f"climb.rungs={rungs}", "--json")
    assert code == 0, err
    run = json.loads((tmp_path / "run" / "rungs" / "lora-r2" / "run.json").read_text())
    assert run["config"]["method"]["rank"] == 2 and run["steps"] == 2
    prompts = [row["prompt_tokens"] for row in json.loads(out)["rows"]]
    assert prompts[0] > prompts[1] > prompts[2]


@pytest.mark.parametrize(
    ("rungs", "words"),
    [
        ("[zero_shot, lora, lora]", "stands twice"),
        ("[lorra]", "'lora'"),
        ("[]", "at least one rung"),
        ("[{kind: zero_shot, method: {rank: 2}}]", "trains nothing"),
        ("[{kind: lora, method: {rnak: 2}}]", "did you mean method.rank?"),
        ("[{kind: lora, shots: 2}]", "only few_shot"),
    ],
)
def test_bad_rungs(rungs: str, words: str, climb: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "climb", climb, f"climb.rungs={rungs}")
    assert code == 2 and words in err, err
    assert not (tmp_path / "run").exists()


def test_context_can_be_withheld(climb: Path, capsys: Any) -> None:
    settings = ["climb.rungs=[zero_shot]", "--json"]
    _, given, _ = inside(capsys, "climb", climb, *settings)
    _, withheld, _ = inside(capsys, "climb", climb, "evaluation.context=withheld", *settings, "--overwrite")
    rows = [json.loads(out)["rows"][0] for out in (given, withheld)]
    assert rows[0]["prompt_tokens"] > rows[1]["prompt_tokens"]
    assert rows[1]["sees"] == "instruction, closed book"


def test_single_run_and_climb_do_not_mix(climb: Path, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "train", climb)[0] == 0
    code, _, err = inside(capsys, "climb", climb)
    assert code == 3 and "not a climb" in err
    assert inside(capsys, "climb", climb, "climb.rungs=[zero_shot]", f"output={tmp_path / 'c'}")[0] == 0
    for verb in (["chat", tmp_path / "c", "--question", "x"], ["eval", tmp_path / "c"]):
        code, _, err = inside(capsys, *verb)
        assert code == 2 and "rungs" in err


def test_a_finished_climb_is_printed_without_a_model(
    climb: Path, tiny_base: Path, capsys: Any, monkeypatch: Any
) -> None:
    settings = ["climb.rungs=[zero_shot, lora]", "--json"]
    _, first, _ = inside(capsys, "climb", climb, *settings)

    monkeypatch.setattr("rung.runs.train.load_base_to_train", lambda *_: pytest.fail("a model was loaded"))
    code, again, _ = inside(capsys, "climb", climb, *settings)
    assert code == 0 and json.loads(again) == json.loads(first)


def test_rungs_on_other_data_do_not_stand_in_one_ladder(
    climb: Path, questions: Path, tmp_path: Path, capsys: Any
) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(questions.read_text())
    settings = [f"data.path={mine}", "climb.rungs=[zero_shot]"]
    assert inside(capsys, "climb", climb, *settings)[0] == 0
    mine.write_text(questions.read_text().replace("apples", "plums"))
    code, _, err = inside(capsys, "climb", climb, *settings)
    assert code == 3 and "the data has changed" in err and "--overwrite" in err
    assert inside(capsys, "climb", climb, *settings, "--overwrite")[0] == 0


def test_withheld_context_is_withheld_in_training_too(climb: Path, tmp_path: Path, capsys: Any) -> None:
    for name in ("given", "withheld"):
        settings = [f"evaluation.context={name}", f"output={tmp_path / name}", "climb.rungs=[lora]"]
        assert inside(capsys, "climb", climb, *settings)[0] == 0
    tokens = [
        json.loads((tmp_path / n / "rungs" / "lora" / "run.json").read_text())["tokens"] for n in ("given", "withheld")
    ]
    assert tokens[0] > tokens[1]


def test_rungs_that_answered_other_questions_are_not_compared(climb: Path, tmp_path: Path, capsys: Any) -> None:
    settings = ["climb.rungs=[zero_shot, few_shot]"]
    assert inside(capsys, "climb", climb, *settings)[0] == 0
    items = tmp_path / "run" / "rungs" / "few_shot" / "items.parquet"
    kept, about = read_items(items)
    write_items(items, [{**item, "expected": "kiwis"} for item in kept], about)
    code, _, err = inside(capsys, "climb", climb, *settings)
    assert code == 3 and "answered other questions" in err


def test_eval_of_a_rung_leaves_the_ladder_alone(climb: Path, tmp_path: Path, capsys: Any) -> None:
    settings = ["climb.rungs=[zero_shot, lora]", "climb.seeds=2", "evaluation.limit=8"]
    _, first, _ = inside(capsys, "climb", climb, *settings, "--json")
    assert inside(capsys, "eval", tmp_path / "run" / "rungs" / "lora" / "seed-1")[0] == 0
    _, again, _ = inside(capsys, "climb", climb, *settings, "--json")
    assert json.loads(first) == json.loads(again)


def test_names_that_would_share_a_folder(climb: Path, capsys: Any) -> None:
    rungs = "[{kind: lora, name: r 8}, {kind: lora, name: R=8, method: {rank: 2}}]"
    code, _, err = inside(capsys, "climb", climb, f"climb.rungs={rungs}")
    assert code == 2 and "share a folder" in err


def test_what_cannot_be_climbed_leaves_no_folder(climb: Path, tmp_path: Path, capsys: Any) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"some words {i}"}) + "\n" for i in range(60)))
    for settings, words in (
        ([f"data.path={texts}", "data.group=null"], "no question"),
        (["evaluation.shots=200"], "200 worked examples"),
    ):
        code, _, err = inside(capsys, "climb", climb, *settings)
        assert code == 2 and words in err, err
    assert not (tmp_path / "run").exists()


def test_perplexity_decides(climb: Path, capsys: Any) -> None:
    settings = ["climb.rungs=[zero_shot, lora]", "evaluation.metrics=[perplexity]", "climb.target=1000"]
    code, out, err = inside(capsys, "climb", climb, *settings, "--json")
    assert code == 0, err
    found = json.loads(out)
    means = {row["rung"]: row["scores"]["perplexity"]["mean"] for row in found["rows"]}
    assert means["lora"] < means["zero_shot"] < 1000
    assert found["verdict"]["recommended"] == "zero_shot" and "target 1000" in found["verdict"]["text"]
    assert f"{means['zero_shot']:.3f}" in found["verdict"]["text"]


INSIDE = "method={kind: p_tuning, virtual_tokens: 4, hidden: 8, positions: {front: 1, user: 2, assistant: 1}}"


def test_rungs_with_virtual_tokens_inside_stand_beside_others(config: Path, tmp_path: Path, capsys: Any) -> None:
    """Their ids lie beyond the vocabulary: no other rung may read them."""
    code, out, err = inside(capsys, "climb", config, INSIDE, "climb.rungs=[zero_shot, p_tuning, lora]", "--json")
    assert code == 0, err
    rows = {row["rung"]: row for row in json.loads(out)["rows"]}
    assert rows["p_tuning"]["prompt_tokens"] == rows["lora"]["prompt_tokens"] + 3
    run = tmp_path / "run" / "rungs" / "p_tuning"
    code, out, err = inside(capsys, "chat", run, "--question", "what is in it?", "--max-new-tokens", 5, "--compare")
    assert code == 0, err
    code, out, err = inside(capsys, "eval", run, "--json")
    assert code == 0, err


def test_no_rung_holds_the_base_of_another(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two bases on a card one is too many: each is gone before the next is loaded."""
    loaded: list[weakref.ref[Any]] = []
    alive: list[int] = []
    genuine = load.load_base

    def noted(*arguments: Any, **options: Any) -> Any:
        gc.collect()
        alive.append(sum(reference() is not None for reference in loaded))
        base = genuine(*arguments, **options)
        loaded.append(weakref.ref(base.model))
        return base

    monkeypatch.setattr(load, "load_base", noted)
    rungs = "climb.rungs=[zero_shot, lora, {kind: full}]"
    code, _, err = inside(capsys, "climb", config, rungs, "training.max_steps=1", "evaluation.limit=4")
    assert code == 0, err
    assert len(alive) == 2 and alive == [0, 0]
