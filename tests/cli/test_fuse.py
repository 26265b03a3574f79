"""`rung fuse`: several runs into one that answers as their sum does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from processes import inside
from rung.runs.load import open_run


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture
def runs(config: Path, tmp_path: Path, capsys: Any) -> list[Path]:
    made = []
    for i, method in enumerate(["{kind: lora, rank: 4}", "{kind: lora, rank: 8, rslora: true, layers: [1]}"]):
        folder = tmp_path / f"run{i}"
        given = [f"method={method}", f"seed={i}", "training.max_steps=3", f"output={folder}"]
        assert inside(capsys, "train", config, *given)[0] == 0
        made.append(folder)
    return made


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every matrix of the run, base and updates added."""
    policy = open_run(folder).policy
    method: Any = policy.method
    return {n: p.detach() for n, p in method.merge().named_parameters()}


def test_the_sum_is_exact_and_a_run_like_any_other(runs: list[Path], tmp_path: Path, capsys: Any) -> None:
    fused = tmp_path / "fused"
    code, out, err = inside(capsys, "fuse", *map(str, runs), "--output", str(fused), "--weights", "0.5,2", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["lost"] == 0.0 and result["weights"] == [0.5, 2.0] and result["ranks"] == [4, 12]
    first, second, both = (weights_of(folder) for folder in (*runs, fused))
    policy = open_run(runs[0]).policy
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


@pytest.fixture
def models(config: Path, tmp_path: Path, capsys: Any) -> list[Path]:
    made = [tmp_path / f"model{i}" for i in range(2)]
    for i, folder in enumerate(made):
        given = ["method={kind: full}", f"seed={i}", "training.max_steps=3", "training.learning_rate=1e-3"]
        assert inside(capsys, "train", config, *given, f"output={folder}")[0] == 0
    return made


def test_full_runs_add_up_tensor_by_tensor(models: list[Path], tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    """Embeddings and norms too: the base plus the weighted differences."""
    fused = tmp_path / "fused"
    code, out, err = inside(capsys, "fuse", *models, "-o", fused, "--weights", "0.5,-2", "--json")
    assert code == 0, err
    assert json.loads(out)["lost"] == 0.0 and manifest(fused)["config"]["method"]["kind"] == "full"
    base, first, second, both = (
        load_file(folder / "model.safetensors") for folder in (tiny_base, *(m / "model" for m in (*models, fused)))
    )
    assert base.keys() == both.keys()
    for name, value in both.items():
        expected = base[name] + 0.5 * (first[name] - base[name]) - 2.0 * (second[name] - base[name])
        assert (value - expected).abs().max() < 1e-6, name
        assert not torch.equal(value, base[name]), name
    assert inside(capsys, "eval", fused, "--limit", "3")[0] == 0


@pytest.mark.parametrize("how", ["sum", "ties:0.5"])
def test_full_runs_cut_to_a_rank_are_a_lora(
    how: str, models: list[Path], tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    """What embeddings and norms moved is lost, so the loss is above that of the matrices alone."""
    fused = tmp_path / "fused"
    code, out, err = inside(capsys, "fuse", *models, "-o", fused, "--how", how, "--rank", "64", "--json")
    assert code == 0, err
    assert 0.0 < json.loads(out)["lost"] < 1.0 and json.loads(out)["ranks"] == [16, 32]
    if how == "sum":
        base, first, second = (load_file(f / "model.safetensors") for f in (tiny_base, *(m / "model" for m in models)))
        name = "model.layers.1.mlp.down_proj.weight"
        assert (weights_of(fused)[name] - (first[name] + second[name] - base[name])).abs().max() < 1e-5


def test_runs_that_cannot_be_fused(
    runs: list[Path], models: list[Path], config: Path, tmp_path: Path, capsys: Any
) -> None:
    target = ["-o", str(tmp_path / "fused")]
    code, _, err = inside(capsys, "fuse", runs[0], models[0], *target)
    assert code == 2 and "do not fuse" in err
    code, _, err = inside(capsys, "fuse", *models, *target, "--learn", config)
    assert code == 2 and "adapters alone" in err
    settings = ["climb.rungs=[zero_shot]", f"output={tmp_path / 'climb'}"]
    assert inside(capsys, "climb", config, *settings)[0] == 0
    code, _, err = inside(capsys, "fuse", runs[0], tmp_path / "climb", *target)
    assert code == 3 and "a climb" in err
    assert inside(capsys, "train", config, "method.kind=qlora", f"output={tmp_path / 'narrow'}")[0] == 0
    code, _, err = inside(capsys, "fuse", runs[0], tmp_path / "narrow", *target)
    assert code == 3 and "quantized base" in err
    other = manifest(runs[1])
    other["fingerprints"]["text"] = "0" * 64
    (runs[1] / "run.json").write_text(json.dumps(other))
    code, _, err = inside(capsys, "fuse", *runs, *target)
    assert code == 3 and "templates" in err
    assert not (tmp_path / "fused").exists()


def test_prompts_for_tasks_neither_fuse_nor_merge(config: Path, tmp_path: Path, capsys: Any) -> None:
    """Both say why, and neither asks for a task."""
    data = config.read_text().split("data: {path: ")[1].split(",")[0]
    config.write_text(config.read_text().replace(f"data: {{path: {data}", f"data: {{path: [{{path: {data}, task: a}}]"))
    method = "method={kind: prompt, virtual_tokens: 2, tasks: [a]}"
    assert inside(capsys, "train", config, method, f"output={tmp_path / 'soft'}")[0] == 0
    code, _, err = inside(capsys, "fuse", tmp_path / "soft", tmp_path / "soft", "-o", tmp_path / "fused")
    assert code == 3 and "do not fuse" in err, err
    code, _, err = inside(capsys, "merge", tmp_path / "soft", tmp_path / "merged")
    assert code == 3 and "cannot be folded" in err, err
