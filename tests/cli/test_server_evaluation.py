"""Runs and bases whose answers a server generates: the same answers and scores, or a refusal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from processes import inside
from rung.config.server import ModelServerConfig
from rung.evaluation.evaluate import Evaluation
from rung.files import find_damage
from rung.inference import vllm_client
from rung.inference.vllm_client import STALE_SECONDS, AdapterServer
from vllm_server import Engine


@pytest.fixture
def here(config: Path, tmp_path: Path) -> Path:
    """The config of a run whose answers end before the first p that they have."""
    text = config.read_text().replace("max_new_tokens: 8", "max_new_tokens: 8, stop: [p], limit: 8")
    config.write_text(text.replace("max_steps: 6", "max_steps: 8"))
    return config


@pytest.fixture
def there(here: Path, tmp_path: Path, vllm: Engine) -> Path:
    """The same with answers from a server in float32."""
    file = tmp_path / "there.yaml"
    server = f"server: {{url: '{vllm.url}', model: base, dtype: float32}}"
    file.write_text(here.read_text().replace("stop: [p]", f"stop: [p], {server}"))
    return file


def answers(evaluation: Evaluation) -> list[tuple[Any, ...]]:
    return [(i.source, i.answer, i.stopped, i.scores, i.prompt_tokens) for i in evaluation.items]


def test_a_run_answers_there_as_it_does_here(
    here: Path, there: Path, tmp_path: Path, vllm: Engine, capsys: Any
) -> None:
    """Answers, stops, stop texts and scores; perplexity is read here. Then its base, and both side by side."""
    run = tmp_path / "run"
    assert inside(capsys, "train", there)[0] == 0 and not vllm.requests
    code, out, err = inside(capsys, "eval", run, "--json")
    assert code == 0 and "gate evaluation.server: passed" in err, err
    by_server = Evaluation.read(run / "eval.parquet")
    result, manifest = json.loads(out), json.loads((run / "run.json").read_text())
    assert result["server"] == manifest["metrics"]["server"] == {"url": vllm.url, "model": "base"}
    paths = [path for path, _ in vllm.requests]
    assert paths.count("/completions") == 8 and paths[-1] == "/unload_lora_adapter" and not vllm.adapters
    loaded = next(asked for path, asked in vllm.requests if path == "/load_lora_adapter")
    assert loaded["lora_path"] == str(run / "adapter") and find_damage(run / "adapter") is None
    # the same without a server
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(
        json.dumps({**manifest, "config": {**manifest["config"], **without_server(manifest)}})
    )
    code, out, err = inside(capsys, "eval", run, "--json")
    assert code == 0 and "server" not in json.loads(out), err
    local = Evaluation.read(run / "eval.parquet")
    assert answers(by_server) == answers(local) and by_server.cut_off == local.cut_off < 8
    assert json.loads(out)["scores"] == result["scores"] and any(not i.answer for i in local.items)
    (run / "run.json").write_text(text)
    # the base, whose name on the server is its own
    base = json.loads(text)["config"]["model"]["name"]
    scores = [json.loads(inside(capsys, "eval", base, "--config", c, "--json")[1])["scores"] for c in (here, there)]
    assert scores[0] == scores[1]
    code, out, err = inside(capsys, "eval", run, "--baseline", base, "--json")
    assert code == 0 and json.loads(out)["server"]["model"] == "base" and "exact" in json.loads(out)["metrics"], err


def without_server(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"evaluation": {**manifest["config"]["evaluation"], "server": None}}


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"missing": True}, "those of the base"),
        ({"other_base": True}, "another base"),
        ({"die_after": 3}, "the server answers nobody"),
        ({"reply": lambda reply: reply["choices"][0].pop("token_ids")}, "no token ids"),
    ],
)
def test_answers_that_cannot_be_trusted_are_not_stored(
    rules: dict[str, Any], words: str, trained: Path, vllm: Engine, capsys: Any
) -> None:
    vllm.rules = rules
    before = (trained / "run.json").read_text()
    code, _, err = inside(capsys, "eval", trained)
    assert code == 3 and words in err, err
    assert (trained / "run.json").read_text() == before and not (trained / "eval.parquet").exists()
    assert not vllm.adapters


@pytest.fixture
def trained(there: Path, tmp_path: Path, capsys: Any) -> Path:
    """A run of a few steps whose answers come from the server."""
    assert inside(capsys, "train", there, "training.max_steps=3", "training.learning_rate=5e-2")[0] == 0
    return tmp_path / "run"


def test_adapters_of_other_evaluations(
    trained: Path, vllm: Engine, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of today belongs to an evaluation beside this one and stays; what a killed process left long ago goes."""
    server = AdapterServer(ModelServerConfig(url=vllm.url, model="base"), "evaluation.server", "")
    adapter = trained / "adapter"
    today = server.adapter_name(adapter)
    assert server.adapter_name(adapter) != today
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(vllm_client.time, "time", lambda: now - STALE_SECONDS - 60)
        forgotten = server.adapter_name(adapter)
    for name in (today, forgotten):
        assert vllm.load(name, str(adapter))[0] == 200
    code, _, err = inside(capsys, "eval", trained)
    assert code == 0 and list(vllm.adapters) == [today], err
    vllm.unload(today)


def test_a_ladder_is_the_same_ladder(here: Path, there: Path, tmp_path: Path, vllm: Engine, capsys: Any) -> None:
    rungs = "climb.rungs=[zero_shot, lora]"
    scores = []
    for file, folder in ((here, "here"), (there, "there")):
        code, out, err = inside(capsys, "climb", file, rungs, f"output={tmp_path / folder}", "--json")
        assert code == 0, err
        scores.append([(row["rung"], row["scores"]) for row in json.loads(out)["rows"]])
    assert scores[0] == scores[1] and err.count("gate evaluation.server: passed") == 2
    results = [json.loads(file.read_text()) for file in sorted((tmp_path / "there" / "rungs").rglob("result.json"))]
    assert len(results) == 2 and all(r["server"]["url"] == vllm.url for r in results) and not vllm.adapters
    moved = f"evaluation.server.url={vllm.url.replace('127.0.0.1', 'localhost')}"
    assert inside(capsys, "climb", there, rungs, f"output={tmp_path / 'there'}", moved)[0] == 0


ON_TOP = "climb.on_top=[{base_rung: lora, objective: {kind: preference}}]"


@pytest.mark.parametrize(
    ("verb", "settings", "words"),
    [
        ("train", ("method={kind: full}",), "plain LoRA updates"),
        ("climb", ("climb.rungs=[zero_shot, full]",), "plain LoRA updates"),
        ("climb", ("climb.rungs=[{kind: lora, name: other, model: {name: smollm2-135m}}]",), "one base"),
        ("climb", ("climb.rungs=[lora]", ON_TOP), "merge of another rung"),
        ("climb", ("climb.rungs=[lora]", "evaluation.server.model=other"), "no such model"),
        ("train", ("evaluation.metrics=[perplexity]",), "perplexity alone generates none"),
        ("train", ("evaluation.batch=8",), "server.concurrency"),
        ("train", ("evaluation.dequantize=true", "method.kind=qlora"), "dequantize"),
        ("train", ("objective.kind=reward",), "a reward model generates nothing"),
    ],
)
def test_what_a_server_cannot_do(
    verb: str, settings: tuple[str, ...], words: str, there: Path, tmp_path: Path, capsys: Any
) -> None:
    code, _, err = inside(capsys, verb, there, *settings)
    assert code in (2, 3) and words in err, err
    assert not (tmp_path / "run").exists() and "loading" not in err
