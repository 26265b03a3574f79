"""Settings chosen on the validation split, and the learning curve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from processes import inside
from rung.commands import hyperparameter_search
from rung.config.climb import RungConfig, SearchConfig
from rung.config.climb_runs import rung_run_config
from rung.config.io import load_config
from rung.config.run import RunConfig

RANGES = {"trials": 5, "rank": [2, 8], "learning_rate": [1e-4, 1e-1], "epochs": [0.5, 2]}


def climb(config: Path, **settings: Any) -> Path:
    config.write_text(config.read_text().replace("max_steps: 6, ", "") + f"climb: {json.dumps(settings)}\n")
    return config


def test_the_best_trial_on_validation_is_what_is_trained(config: Path, tmp_path: Path, capsys: Any) -> None:
    climb(config, rungs=["zero_shot", "lora"], search=RANGES)
    code, out, err = inside(capsys, "climb", config, "data.validation=0.2", "--json")
    assert code == 0, err
    found = json.loads((tmp_path / "run" / "rungs" / "lora" / "result.json").read_text())["search"]
    assert found["split"] == "validation" and len(found["trials"]) == 5
    whole = [t for t in found["trials"] if t["state"] == "complete"]
    best = min(whole, key=lambda t: t["validation_losses"][-1])
    assert found["chosen"] == {name: best[name] for name in ("rank", "learning_rate", "epochs")}
    run_config = json.loads((tmp_path / "run" / "rungs" / "lora" / "run.json").read_text())["config"]
    assert (
        run_config["method"]["rank"] == best["rank"]
        and run_config["training"]["learning_rate"] == best["learning_rate"]
    )
    assert all(2 <= t["rank"] <= 8 and 1e-4 <= t["learning_rate"] <= 1e-1 for t in found["trials"])
    spent = sum(trial["seconds"] for trial in found["trials"])
    own = json.loads((tmp_path / "run" / "rungs" / "lora" / "run.json").read_text())["train_seconds"]
    assert spent > 0 and json.loads(out)["rows"][1]["train_seconds"] == pytest.approx(own + spent)
    items = [p for p in (tmp_path / "run").rglob("items.parquet")]
    assert len(items) == 2  # the test was answered once for each rung, never for a trial
    assert not (tmp_path / "run" / "search" / "lora" / "trial").exists()
    code, again, err = inside(capsys, "climb", config, "data.validation=0.2", "--json")
    assert code == 0 and "search" not in err and json.loads(again) == json.loads(out)


def test_halving_ends_the_worse_and_goes_on_after_a_kill(config: Path, tmp_path: Path) -> None:
    """With a known loss for each rate: what is far from the best does not get all its steps."""
    run_config = load_config(str(config), ["data.validation=0.2", "training.max_steps=18"]).config
    rung = RungConfig(kind="lora")
    run = rung_run_config(run_config, rung, str(tmp_path / "run"), 0)
    steps: list[int] = []
    asked = SearchConfig(trials=9, learning_rate=(1e-5, 1.0))

    def train(trial: RunConfig, watch: Any) -> None:
        rate = trial.learning_rate
        if len(steps) == 4 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        taken = 0
        for taken in range(1, 11):  # ten steps, each measured
            if watch(abs(rate - 0.01) + 1.0 / taken) is not None:
                break
        steps.append(taken)

    with pytest.raises(KeyboardInterrupt):
        hyperparameter_search.search_settings(run, asked, rung, tmp_path / "s", 80, train)
    assert hyperparameter_search.read_search_result(tmp_path / "s") is None and len(steps) == 4
    chosen = hyperparameter_search.search_settings(run, asked, rung, tmp_path / "s", 80, train)
    found = hyperparameter_search.read_search_result(tmp_path / "s")
    assert found is not None and len(found["trials"]) == 9
    assert {trial["state"] for trial in found["trials"]} == {"pruned", "complete"} and min(steps) < 10
    best = min((t for t in found["trials"] if t["state"] == "complete"), key=lambda t: t["validation_losses"][-1])
    assert chosen.training == {"learning_rate": best["learning_rate"]} and chosen.method == {}
    hyperparameter_search.search_settings(run, asked, rung, tmp_path / "alone", 80, train)
    alone = hyperparameter_search.read_search_result(tmp_path / "alone")
    for trial in (*found["trials"], *(alone or {})["trials"]):
        assert trial.pop("seconds") >= 0
    assert alone == found  # as if nothing had happened


def test_learning_curve(config: Path, tmp_path: Path, capsys: Any) -> None:
    climb(config, rungs=["zero_shot", "lora"], curve=[8, 16, 10_000])
    code, out, err = inside(capsys, "climb", config, "training.max_steps=3", "--json")
    assert code == 0 and "10,000 are passed over" in err, err
    found = json.loads(out)
    assert [(p["rung"], p["rows"]) for p in found["curve"]] == [("lora", 8), ("lora", 16)]
    assert all(p["score"]["examples"] == found["examples"] and p["train_seconds"] > 0 for p in found["curve"])
    sources = []
    for rows in ("8", "16"):
        data = json.loads((tmp_path / "run" / "curve" / rows / "run.json").read_text())["data"]
        sources.append(data["splits"]["train"]["rows"])
    assert sources == [8, 16]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The highest tuned rung with fewer rows" in page and "training rows" in page
    shutil.rmtree(tmp_path / "run" / "curve" / "16")
    code, out, err = inside(capsys, "climb", config, "training.max_steps=3", "--json")
    assert code == 0 and "16 rows" in err and "8 rows" not in err.replace("18 rows", "")
    assert json.loads(out)["curve"][1]["score"] == found["curve"][1]["score"]
    # killed between the last result and the ladder: the next call completes the folder and trains nothing
    file = tmp_path / "run" / "run.json"
    manifest = json.loads(file.read_text())
    ladder = manifest.pop("ladder")
    file.write_text(json.dumps({**manifest, "status": "running"}))
    code, _, err = inside(capsys, "climb", config, "training.max_steps=3")
    assert code == 0 and "passed over" not in err, "a finished climb looks at no point that it passes over"
    manifest = json.loads(file.read_text())
    assert manifest["status"] == "finished" and manifest["ladder"]["rows"] == ladder["rows"]


@pytest.mark.parametrize(
    ("settings", "more", "words"),
    [
        ({"rungs": ["zero_shot"], "search": {"rank": [2, 4]}}, (), "tuned rungs"),
        ({"rungs": ["zero_shot"], "curve": [8]}, (), "tuned rungs"),
        ({"rungs": ["lora"], "search": {"trials": 3}}, (), "tries nothing"),
        ({"rungs": ["lora"], "search": {"rank": [8, 2]}}, (), "lowest"),
        ({"rungs": ["lora"], "search": {"rank": [2, 8]}}, ("data.validation=0",), "validation"),
        ({"rungs": ["lora"], "curve": [16, 8]}, (), "rising"),
    ],
)
def test_nonsense(config: Path, capsys: Any, settings: dict[str, Any], more: tuple[str, ...], words: str) -> None:
    code, _, err = inside(capsys, "climb", climb(config, **settings), *more)
    assert code == 2 and words in err


def test_settings_that_cannot_be_do_not_end_a_search(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from rung.commands import climb as climbing
    from rung.errors import GateError

    train, tried = climbing.train_on_data, []

    def failing(run_config: RunConfig, *given: Any, **more: Any) -> Any:
        tried.append(run_config)
        if len(tried) == 1:
            raise GateError("gate step0.packing failed")
        return train(run_config, *given, **more)

    monkeypatch.setattr(climbing, "train_on_data", failing)
    climb(config, rungs=["zero_shot", "lora"], search={"trials": 3, "rank": [2, 8]})
    code, _, err = inside(capsys, "climb", config, "data.validation=0.2", "--json")
    assert code == 0 and "this trial failed" in err, err
    found = json.loads((tmp_path / "run" / "rungs" / "lora" / "result.json").read_text())["search"]
    assert [trial["state"] for trial in found["trials"]][0] == "fail" and len(tried) == 4
