"""`rung fuse`: several runs into one that answers as their sum does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from processes import inside
from rung.run import open_run


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture
def runs(config: Path, tmp_path: Path, capsys: Any) -> list[Path]:
    made = []
    for i, method in enumerate(["{kind: lora, rank: 4}", "{kind: lora, rank: 8, rslora: true, layers: [1]}"]):
        folder = tmp_path / f"run{i}"
        given = [f"method={method}", f"seed={i}", "engine.max_steps=3", f"output={folder}"]
        assert inside(capsys, "train", config, *given)[0] == 0
        made.append(folder)
    return made


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every matrix of the run, base and updates added."""
    policy, _, _ = open_run(folder)
    method: Any = policy.method
    return {n: p.detach() for n, p in method.merge().named_parameters()}


def test_the_sum_is_exact_and_a_run_like_any_other(runs: list[Path], tmp_path: Path, capsys: Any) -> None:
    fused = tmp_path / "fused"
    code, out, err = inside(capsys, "fuse", *map(str, runs), "--output", str(fused), "--weights", "0.5,2", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["lost"] == 0.0 and result["weights"] == [0.5, 2.0] and result["ranks"] == [4, 12]
    first, second, both = (weights_of(folder) for folder in (*runs, fused))
    policy, _, _ = open_run(runs[0])
    base = {n.replace(".base_layer", ""): p.detach() for n, p in policy.model.named_parameters() if "lora_" not in n}
    for name, value in both.items():
        expected = base[name] + 0.5 * (first[name] - base[name]) + 2.0 * (second[name] - base[name])
        assert (value - expected).abs().max() < 1e-6, name
    assert manifest(fused)["fused_from"] == [str(run) for run in runs]
    assert inside(capsys, "eval", str(fused), "--limit", "3")[0] == 0


@pytest.mark.parametrize("how", ["ties", "dare", "magnitude", "sum"])
def test_every_way_gives_a_lora_of_the_stated_rank(how: str, runs: list[Path], tmp_path: Path, capsys: Any) -> None:
    fused = tmp_path / "fused"
    given = [
        "--output",
        str(fused),
        "--how",
        how if how == "sum" else f"{how}:0.5",
        "--rank",
        "3",
        "--seed",
        "4",
        "--json",
    ]
    code, out, err = inside(capsys, "fuse", *map(str, runs), *given)
    assert code == 0, err
    assert json.loads(out)["ranks"] == [3] and 0.0 < json.loads(out)["lost"] < 1.0
    shapes = {k: len(v) for k, v in load_file(fused / "adapter" / "adapter_model.safetensors").items() if "lora_A" in k}
    assert set(shapes.values()) == {3} and len(shapes) == 14


def test_learned_weights_lose_less_than_an_even_share(
    runs: list[Path], config: Path, tmp_path: Path, capsys: Any
) -> None:
    fused = tmp_path / "fused"
    given = ["--output", str(fused), "--learn", str(config), "--json"]
    code, out, err = inside(capsys, "fuse", *map(str, runs), *given)
    assert code == 0, err
    found = json.loads(out)
    assert found["search"]["best"] < found["search"]["first"] and found["search"]["evaluations"] <= 60
    assert all(abs(w) <= 1.5 for w in found["weights"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--how", "mean"], "sum, ties, dare, magnitude"),
        (["--weights", "1"], "one weight for each"),
        (["--weights", "1,x"], "numbers with commas"),
        (["--weights", "1,nan"], "finite"),
        (["--how", "ties:0"], "share of entries"),
        (["--how", "ties:x"], "share of entries"),
        (["--how", "sum:0.5"], "share of entries"),
        (["--rank", "0"], "at least 1"),
        (["--learn", "x.yaml", "--how", "ties"], "plain sum"),
    ],
)
def test_wrong_wishes(given: list[str], said: str, runs: list[Path], tmp_path: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "fuse", *map(str, runs), "--output", str(tmp_path / "fused"), *given)
    assert code == 2 and said in err and not (tmp_path / "fused").exists()


def test_runs_that_do_not_go_together(runs: list[Path], tmp_path: Path, capsys: Any) -> None:
    target = ["--output", str(tmp_path / "fused")]
    assert inside(capsys, "fuse", str(runs[0]), *target)[0] == 2
    other = manifest(runs[1])
    other["fingerprints"]["base"] = "0" * 64
    (runs[1] / "run.json").write_text(json.dumps(other))
    code, _, err = inside(capsys, "fuse", *map(str, runs), *target)
    assert code == 3 and "different bases" in err
