"""A run from config to artifact, its folder, and going on after an interruption."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from processes import inside, log, process, start
from rung.errors import DataError
from rung.models import matmul, matmul_routine
from rung.models import threads as model_threads
from rung.training.trainer import Trainer


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_run_folder(config: Path, tmp_path: Path) -> None:
    """In a process of its own: stdout is one JSON object, the rest goes to stderr."""
    code, out, err = process("train", config, "training.eval_every=3", "--json")
    assert code == 0, err
    run = tmp_path / "run"
    found = manifest(run)
    assert json.loads(out)["status"] == found["status"] == "finished"
    assert {g["name"]: g["state"] for g in found["gates"]} == {
        "preflight": "passed",
        "step0.trainable": "passed",
        "step0.identity": "passed",
        "step0.packing": "passed",
        "step0.fused": "passed",
        "step0.decoding": "passed",
        "step0.longest": "passed",
        "movement": "passed",
        "save": "passed",
    }
    assert found["steps"] == 6 and found["train_seconds"] > 0 and found["peak_memory_bytes"] > 1e8
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["train_seconds"], rel=0.01)
    assert found["trainable_parameters"] == 4 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert {"config", "fingerprints", "versions", "metrics"} <= found.keys()
    assert found["moves"] == "14 of 14 linears, in 2 of 2 layers" and found["processes"] == 1
    assert found["data"]["validation"]["dropped"] == 0
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "learning_rate", "grad_norm", "tokens", "seconds"} <= log[0].keys()
    assert [("validation_loss" in e) for e in log] == [False, False, True, False, False, True]
    assert sum(e["tokens"] for e in log) == found["tokens"]
    assert (run / "report.html").stat().st_size > 5_000
    assert not list(run.glob(".*")) and not (run / "checkpoints").exists()
    saved = json.loads((run / "adapter" / "generation_config.json").read_text())
    # <|im_end|>, then the tokenizer's own end of text
    assert saved["eos_token_id"] == [4, 2]


def test_a_run_says_once_that_other_processes_need_the_processors(
    config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = model_threads.ContentionWatch(None)  # type: ignore[arg-type]
    watch.shared_measurements = model_threads.NOTICE_SECONDS
    monkeypatch.setattr(model_threads, "_watch", watch)
    monkeypatch.setattr(model_threads, "adapt_threads", lambda: None)
    monkeypatch.setattr(model_threads, "_notice_given", False)
    code, _, err = inside(capsys, "train", config)
    assert code == 0 and err.count("other processes compute on this machine's processors") == 1


def test_short_run_says_that_movement_was_not_reached(config: Path, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "train", config, "training.max_steps=1")[0] == 0
    assert [g["state"] for g in manifest(tmp_path / "run")["gates"] if g["name"] == "movement"] == ["not_reached"]


def test_a_frozen_tensor_that_moves_fails_the_movement_gate(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation: an optimizer step that also touches a frozen norm."""
    from rung.training import trainer

    def meddling(policy: Any, *further: Any) -> torch.Tensor:
        with torch.no_grad():
            policy.model.model.norm.weight[0] += 1e-3
        return genuine(policy, *further)

    genuine = trainer.accumulate
    monkeypatch.setattr(trainer, "accumulate", meddling)
    code, _, err = inside(capsys, "train", config)
    assert code == 3 and "gate movement failed" in err and "model.norm.weight" in err
    assert manifest(tmp_path / "run")["status"] == "failed"
    assert not (tmp_path / "run" / "adapter").exists()


def test_not_finite_never_steps_and_stops_after_three(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rung.training import trainer

    genuine, seen = trainer.accumulate, []

    def poisoned(policy: Any, *further: Any) -> torch.Tensor:
        loss = genuine(policy, *further)
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        if len(seen) >= 2:
            parameters[0].grad[0] = float("inf")
        seen.append([p.detach().clone() for p in parameters])
        return loss

    monkeypatch.setattr(trainer, "accumulate", poisoned)
    code, _, err = inside(capsys, "train", config, "training.max_grad_norm=null")
    assert code == 3 and "not finite in 3 steps" in err
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[4], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    found = manifest(tmp_path / "run")
    assert found["not_finite"]["rows"] and found["status"] == "failed"
    kept = [json.loads(line) for line in (tmp_path / "run" / "not_finite.jsonl").read_text().splitlines()]
    assert [row["source"] for row in kept] == found["not_finite"]["rows"]
    assert all(row["supervised"] and max(row["supervised"]) < len(row["ids"]) for row in kept)


@pytest.mark.parametrize(
    "method",
    [
        "kind: lora, dropout: 0.1",
        "kind: lora, init: lora_ga, rank: 4",
        "kind: lora, layers: [1]",
        "kind: lora, lisa_n_layers: 1, lisa_step_interval: 2",
        "kind: lottery, lottery: {scout_steps: 2}",
        "kind: lottery, lottery: {scout_steps: 2, rewind: false}",
        "kind: lottery, lottery: {scout_steps: 5, score: energy}",
        "kind: full",
        "kind: head",
        "kind: qlora",
        "kind: bottleneck, width: 4",
        "kind: mixture, experts: 2",
        "kind: prompt, virtual_tokens: 3",
        "kind: prefix, virtual_tokens: 3, projection: 6",
        "kind: p_tuning, virtual_tokens: 3",
        "kind: p_tuning, virtual_tokens: 3, positions: {front: 1, user: 1, assistant: 1}",
        "kind: peft, config: {peft_type: IA3, feedforward_modules: []}",
    ],
)
def test_resume_gives_the_run_that_was_never_stopped(method: str, config: Path, tmp_path: Path, capsys: Any) -> None:
    settings = [f"method={{{method}}}", "training.checkpoint_every=2", "training.eval_every=3"]
    if "layers: [1]" in method:  # steps 4 to 6 read the states of layer 0 that steps 1 to 3 computed
        settings += ["training.max_steps=null", "training.epochs=2", "training.examples_per_step=27"]
    assert inside(capsys, "train", config, *settings, f"output={tmp_path / 'whole'}")[0] == 0
    assert inside(capsys, "train", config, *settings)[0] == 0
    run = tmp_path / "run"
    # as if killed during step 5: no artifact, the checkpoint of step 4, a log that is one step further
    found = manifest(run)
    for name in ("adapter", "model"):
        if (run / name).exists():
            for file in (run / name).iterdir():
                file.unlink()
            (run / name).rmdir()
    (run / "run.json").write_text(json.dumps({**found, "status": "running"}))
    code, _, err = inside(capsys, "train", config, *settings, "--resume")
    assert code == 0 and "resumed from step-00000004" in err
    whole_model = method in ("kind: full", "kind: head")
    file = "model/model.safetensors" if whole_model else "adapter/adapter_model.safetensors"
    whole, resumed = load_file(tmp_path / "whole" / file), load_file(run / file)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [
        [json.loads(x)["loss"] for x in (f / "log.jsonl").read_text().splitlines()] for f in (run, tmp_path / "whole")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("settings", [[], ["method={kind: lora, rank: 4, layers: [1]}", "training.max_steps=14"]])
def test_batches_packed_ahead_are_those_of_their_steps(
    settings: list[str], config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card: packed in another thread, one step ahead and none beyond the last; the run is the same."""
    packed_by = dict[str, list[str]]()
    original = Trainer._pack_share

    def pack_share(trainer: Trainer, examples: Any) -> Any:
        packed_by[run].append(threading.current_thread().name)
        return original(trainer, examples)

    monkeypatch.setattr(Trainer, "_pack_share", pack_share)
    for run in ("here", "ahead"):
        packed_by[run] = []
        monkeypatch.setattr(Trainer, "_packs_ahead", lambda trainer: run == "ahead")  # noqa: B023
        assert inside(capsys, "train", config, "training.epochs=9", *settings, f"output={tmp_path / run}")[0] == 0
    names = {thread.rsplit("_", 1)[0] for thread in packed_by["ahead"]}
    steps = manifest(tmp_path / "ahead")["steps"]
    assert names == {"packing"} and len(packed_by["ahead"]) == len(packed_by["here"]) == steps
    assert not any(thread.name.startswith("packing") for thread in threading.enumerate())
    here, ahead = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("here", "ahead"))
    assert here.keys() == ahead.keys() and all(torch.equal(here[name], ahead[name]) for name in here)


def test_packing_ahead_that_fails_ends_the_run_at_its_step(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Trainer._pack_share, list[int]()

    def pack_share(trainer: Trainer, examples: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 3:
            raise DataError("the disk is gone", where="rows")
        return original(trainer, examples)

    monkeypatch.setattr(Trainer, "_pack_share", pack_share)
    monkeypatch.setattr(Trainer, "_packs_ahead", lambda trainer: True)
    code, _, err = inside(capsys, "train", config)
    assert code == 2 and "the disk is gone" in err
    assert manifest(tmp_path / "run")["status"] == "failed" and len(log(tmp_path / "run")) == 2


def test_damaged_checkpoints_are_passed_over(config: Path, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "train", config, "training.checkpoint_every=2")[0] == 0
    run = tmp_path / "run"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    weights = run / "checkpoints" / "step-00000004" / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(bytes(raw))
    (run / "run.json").write_text(json.dumps({**manifest(run), "status": "running"}))
    code, _, err = inside(capsys, "train", config, "training.checkpoint_every=2", "--resume")
    assert code == 0
    assert "step-00000004 passed over: weights.safetensors is not what its manifest says" in err
    assert "resumed from step-00000002" in err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_saves_and_goes_on(sent: signal.Signals, config: Path, tmp_path: Path) -> None:
    settings = ["training.max_steps=null", "training.epochs=400"]
    running = start("train", config, *settings)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(sent)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130, err
    assert "Traceback" not in err
    found = manifest(tmp_path / "run")
    assert found["status"] == "interrupted" and found["steps"] >= 3
    assert (tmp_path / "run" / "checkpoints" / f"step-{found['steps']:08d}" / "manifest.json").exists()


def test_finished_run_prints_its_result_on_resume(config: Path, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "train", config)[0] == 0
    half_written = tmp_path / "run" / ".report.html.writing-1"  # killed between the last step and the end of the report
    half_written.write_text("<html>")
    code, out, _ = inside(capsys, "train", config, "--resume", "--json")
    assert code == 0 and json.loads(out)["status"] == "finished"
    assert not half_written.exists() and (tmp_path / "run" / "report.html").exists()


def test_patience_keeps_the_best_weights(config: Path, tmp_path: Path, capsys: Any) -> None:
    settings = [
        "training.eval_every=1",
        "training.patience=1",
        "training.learning_rate=12.0",
        "training.max_grad_norm=null",
        "training.max_steps=12",
    ]
    code, _, err = inside(capsys, "train", config, *settings)
    assert code == 0, err
    found = manifest(tmp_path / "run")
    assert "stopped early" in err and f"kept the weights of step {found['best_step']}" in err
    losses = [json.loads(x)["validation_loss"] for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert found["validation_loss"] == min(losses) != losses[-1]


def test_dry_run_writes_nothing(config: Path, tmp_path: Path, capsys: Any) -> None:
    code, out, _ = inside(capsys, "train", config, "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0 and found["trainable_parameters"] > 0 and found["train"]["examples"] > 0
    assert not (tmp_path / "run").exists()


def test_settings_that_must_not_change_the_result(config: Path, tmp_path: Path, capsys: Any) -> None:
    """Equivalence: micro-batches, packing and prefix sharing are matters of speed."""
    runs = {
        "auto": [],
        "small": ["training.tokens_per_micro_batch=40"],
        "unpacked": ["training.packing=none"],
        "unshared": ["training.packing=flat"],
        "plain": ["model.fused=false"],
        "probed": ["training.tokens_per_micro_batch=probe"],
    }
    losses = {}
    for name, settings in runs.items():
        assert inside(capsys, "train", config, *settings, f"output={tmp_path / name}")[0] == 0
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses[name] = torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)
    for name in runs:
        drift = losses[name] - losses["auto"]
        assert drift.abs().max() < 1e-4 and drift.mean().abs() < 2e-5, name


def test_frozen_layers_run_once_a_document_and_nothing_else_changes(config: Path, tmp_path: Path, capsys: Any) -> None:
    settings = ["method.layers=[1]", "training.max_steps=null", "training.epochs=2"]
    losses = []
    for name, cached in (("cached", True), ("computed", False)):
        given = [*settings, f"training.cache_frozen_layers={str(cached).lower()}", f"output={tmp_path / name}"]
        code, _, err = inside(capsys, "train", config, *given)
        assert code == 0 and ("layers below 1 do not move" in err) == cached
        found = manifest(tmp_path / name)
        assert ("trunk" in found) == cached
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses.append(torch.tensor([json.loads(line)["loss"] for line in lines]))
    kept = {"layer": 1, "documents": 81, "bytes": found["tokens"] // 2 * 32 * 4}
    assert manifest(tmp_path / "cached")["trunk"] == kept
    assert (losses[0] - losses[1]).abs().max() < 1e-4


def test_states_that_the_disk_has_no_room_for_are_not_kept(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("rung.training.frozen_layer_cache.shutil.disk_usage", lambda _: free)
    settings = ["method.layers=[1]", "training.max_steps=null", "training.epochs=2"]
    code, _, err = inside(capsys, "train", config, *settings)
    assert code == 0 and "keeping them would take" in err and "trunk" not in manifest(tmp_path / "run")


def test_a_probed_micro_batch_is_kept_by_a_resume(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["training.tokens_per_micro_batch=probe", "training.checkpoint_every=2"]
    monkeypatch.setattr("rung.runs.train.measure_micro_batch_tokens", lambda *_: 333)
    assert inside(capsys, "train", config, *settings)[0] == 0
    run = tmp_path / "run"
    assert manifest(run)["tokens_per_micro_batch"] == 333
    (run / "run.json").write_text(json.dumps({**manifest(run), "status": "running"}))
    monkeypatch.setattr("rung.runs.train.measure_micro_batch_tokens", lambda *_: pytest.fail("measured again"))
    assert inside(capsys, "train", config, *settings, "--resume")[0] == 0
    assert manifest(run)["tokens_per_micro_batch"] == 333


@pytest.mark.parametrize(("setting", "alone"), [("dropout=0.1", 14), ("dora=true", 14), ("rank=2", 0)])
def test_linears_that_are_not_fused_are_said(
    setting: str, alone: int, config: Path, tmp_path: Path, capsys: Any
) -> None:
    code, _, err = inside(capsys, "train", config, "training.max_steps=2", f"method.{setting}")
    assert code == 0 and ("peft's own forward" in err) == bool(alone)
    assert manifest(tmp_path / "run")["not_fused"] == alone


def test_every_engine_setting_changes_something(config: Path, tmp_path: Path, capsys: Any) -> None:
    """A dead option is a bug: each of these gives another course of the loss or another artifact."""
    base = ["training.max_steps=4"]

    def course(*settings: str) -> str:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        assert inside(capsys, "train", config, *base, *settings, f"output={folder}")[0] == 0
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return json.dumps([[e["loss"], e["learning_rate"], e["tokens"]] for e in lines])

    reference = course()
    assert course() == reference
    for setting in (
        "training.learning_rate=1.0e-3",
        "training.schedule=constant",
        "training.warmup_ratio=0.5",
        "training.max_grad_norm=0.01",
        "training.examples_per_step=4",
        "training.max_steps=3",
        "training.optimizer.weight_decay=0.5",
        "training.optimizer.beta1=0.1",
        "training.optimizer.beta2=0.5",
        "training.optimizer.epsilon=0.1",
        "seed=1",
        "method.rank=2",
        "method.alpha=1",
        "method.dropout=0.5",
        "method.rslora=true",
        "method.dora=true",
        "method.init=gaussian",
        "method.layers=[0]",
        "method.targets=[q]",
        "method.modules_to_save=[lm_head]",
        "method.rank_pattern={down: 2}",
        "method.loraplus_lr_ratio=16",
        "method.lisa_n_layers=1",
        "method.init=pissa",
        "method.init=lora_ga",
        "data.limit=20",
        "data.loss_on=all",
        "data.validation=0.3",
        "model.template=plain",
        "model.dtype=bfloat16",
    ):
        assert course(setting) != reference, setting
    assert course("training.max_steps=null", "training.epochs=0.5").count("[") < course(
        "training.max_steps=null"
    ).count("[")


def test_resume_on_other_data_is_refused(config: Path, questions: Path, tmp_path: Path, capsys: Any) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(questions.read_text())
    settings = [f"data.path={mine}", "training.checkpoint_every=2"]
    assert inside(capsys, "train", config, *settings)[0] == 0
    run = tmp_path / "run"
    (run / "run.json").write_text(json.dumps({**manifest(run), "status": "running"}))
    mine.write_text(questions.read_text().replace("apples", "plums"))
    code, _, err = inside(capsys, "train", config, *settings, "--resume")
    assert code == 3 and "cannot resume: data changed since" in err


def test_resume_on_another_shard_is_refused(config: Path, questions: Path, tmp_path: Path, capsys: Any) -> None:
    """All files of a folder are the data of the run, and what it reads of a folder is printed and recorded."""
    folder, rows = tmp_path / "shards", questions.read_text().splitlines(keepends=True)
    folder.mkdir()
    for i in range(3):
        (folder / f"part-{i}.jsonl.gz").write_bytes(gzip.compress("".join(rows[40 * i : 40 * i + 40]).encode()))
    (folder / "README.md").write_text("# Boxes")
    settings = [f"data.path={folder}", "training.checkpoint_every=2", "training.max_steps=2"]
    code, _, err = inside(capsys, "train", config, *settings)
    note = f"3 data files of {folder}; not read: README.md"
    assert code == 0 and note in err
    (recorded,) = manifest(tmp_path / "run")["data"]["splits"]["sets"]
    assert recorded["kept"] == 120 and recorded["notes"] == [note]
    unfinished(tmp_path / "run")
    assert inside(capsys, "train", config, *settings, "--resume")[0] == 0
    unfinished(tmp_path / "run")
    (folder / "part-2.jsonl.gz").write_bytes(gzip.compress("".join(rows[81:]).encode()))
    code, _, err = inside(capsys, "train", config, *settings, "--resume")
    assert code == 3 and "cannot resume: data changed since" in err


def unfinished(run: Path) -> None:
    (run / "run.json").write_text(json.dumps({**manifest(run), "status": "running", "error": "an old one"}))


def test_movement_is_judged_after_a_resume_at_step_one(config: Path, tmp_path: Path, capsys: Any) -> None:
    settings = ["training.checkpoint_every=1", "training.save_total_limit=9"]
    assert inside(capsys, "train", config, *settings)[0] == 0
    run = tmp_path / "run"
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.name != "step-00000001":
            shutil.rmtree(checkpoint)
    unfinished(run)
    found = manifest(run)
    found["gates"] = [g for g in found["gates"] if g["name"] not in ("movement", "save")]
    (run / "run.json").write_text(json.dumps(found))
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 99, "lo')  # torn by the kill
    code, _, err = inside(capsys, "train", config, *settings, "--resume")
    assert code == 0 and "resumed from step-00000001" in err
    assert [g["state"] for g in manifest(run)["gates"] if g["name"] == "movement"] == ["passed"]
    assert "error" not in manifest(run)
    assert [json.loads(x)["step"] for x in (run / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_sigkill_and_resume(config: Path, tmp_path: Path) -> None:
    settings = ["training.max_steps=60", "training.epochs=60", "training.checkpoint_every=5"]
    assert process("train", config, *settings, f"output={tmp_path / 'whole'}")[0] == 0
    running = start("train", config, *settings)
    checkpoints = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.kill()
    running.communicate()
    code, _, err = process("train", config, *settings, "--resume")
    assert code == 0 and "resumed from step-" in err
    file = "adapter/adapter_model.safetensors"
    whole, resumed = load_file(tmp_path / "whole" / file), load_file(tmp_path / "run" / file)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_settings_that_would_do_nothing_are_refused(config: Path, tmp_path: Path, capsys: Any) -> None:
    for settings, words in (
        (["training.patience=2"], "eval_every"),
        (["training.eval_every=2", "data.validation=0"], "data.validation"),
        (["evaluation.shots=0"], "evaluation.shots"),
        (["method={kind: head, rank: 4}"], "it is a setting of lora"),
    ):
        code, _, err = inside(capsys, "train", config, *settings)
        assert code == 2 and words in err, err
    assert not (tmp_path / "run").exists()


def test_paths_may_be_written_in_any_way(config: Path, questions: Path, tmp_path: Path, capsys: Any) -> None:
    twisted = f"{questions.parent}/./{questions.name}"
    assert inside(capsys, "train", config, f"data.path={twisted}")[0] == 0
    twice = [f"data.path=[{{path: {twisted}}}, {{path: {questions}}}]", f"output={tmp_path / 'other'}"]
    code, _, err = inside(capsys, "train", config, *twice)
    assert code == 2 and "twice" in err


def test_a_run_json_that_is_no_manifest(config: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run").mkdir()
    for text in ("{}", "[1]", "{", ""):
        (tmp_path / "run" / "run.json").write_text(text)
        code, _, err = inside(capsys, "train", config, "--resume")
        assert code == 3 and "run.json" in err, err


def test_broken_gguf(config: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bad.gguf").write_text("not a model")
    code, _, err = inside(capsys, "train", config, f"model.name={tmp_path / 'bad.gguf'}")
    assert code == 2 and "GGUF" in err and "Traceback" not in err


def test_a_lottery_that_is_never_drawn_is_refused(config: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "train", config, "method={kind: lottery, lottery: {scout_steps: 6}}")
    assert code == 2 and "before the lottery is drawn" in err and not (tmp_path / "run").exists()


def test_the_best_of_steps_taken_again_is_not_kept(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after step 6 was the best, taken up at step 3, and this time nothing is better than step 3 was."""
    from rung.training import trainer

    settings = ["training.eval_every=1", "training.patience=9", "training.checkpoint_every=3", "data.validation=0.2"]
    assert inside(capsys, "train", config, *settings)[0] == 0
    run, file = tmp_path / "run", "adapter/adapter_model.safetensors"
    last, found = load_file(run / file), manifest(run)
    assert found["best_step"] == 6
    (run / "run.json").write_text(json.dumps({**found, "status": "running"}))
    monkeypatch.setattr(trainer, "mean_loss", lambda *_: 1e9)
    code, _, err = inside(capsys, "train", config, *settings, "--resume")
    assert code == 0 and "kept the weights" not in err and "step 3 had the lowest validation loss" in err
    assert all(torch.equal(last[name], value) for name, value in load_file(run / file).items())


def test_the_best_of_a_lottery_is_one_that_its_winners_made(config: Path, tmp_path: Path, capsys: Any) -> None:
    """Losses of all layers do not count once most have left: the saved adapter is the one that was measured."""
    settings = [
        "method={kind: lottery, lottery: {scout_steps: 4, keep: 0.5}}",
        "training.eval_every=1",
        "training.patience=3",
    ]
    code, _, err = inside(capsys, "train", config, *settings, "training.learning_rate=0.05")
    assert code == 0, err
    found = manifest(tmp_path / "run")
    assert found["best_step"] > 4 and len(found["lottery"]["winners"]) == 1
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    late = [entry["validation_loss"] for entry in log if entry["step"] > 4 and "validation_loss" in entry]
    assert found["validation_loss"] == min(late)


def test_a_validation_loss_that_is_no_number_is_never_the_best(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """Nothing lies below it, so a first one would stay: with patience the run would end with its weights."""
    from rung.training import trainer

    real, told = trainer.mean_loss, []

    def first_is_nan(*given: Any) -> float:
        told.append(real(*given))
        return float("nan") if len(told) == 1 else told[-1]

    monkeypatch.setattr(trainer, "mean_loss", first_is_nan)
    settings = ("training.patience=2", "training.eval_every=1", "data.validation=0.2")
    code, _, err = inside(capsys, "train", config, *settings)
    assert code == 0 and "counts as no better" in err, err
    losses = [entry["validation_loss"] for entry in log(tmp_path / "run")]
    assert losses[0] is None and len(losses) == 6  # JSON knows no such number
    assert json.loads((tmp_path / "run" / "run.json").read_text())["validation_loss"] == min(losses[1:])


def test_the_longest_row_comes_first(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit is known before the first step, with the row; what fits leaves no trace."""
    from rung.training import micro_batch

    rows = [{"question": "a" * (3 + i), "answer": "b"} for i in range(12)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = (f"data.path={tmp_path / 'd.jsonl'}", "data.group=null", "data.test=0", "data.validation=0")
    genuine, seen = micro_batch.accumulate, []

    def short(policy: Any, objective: Any, window: Any) -> torch.Tensor:
        seen.append([str(d.source) for batch in window for d in batch.documents])
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(micro_batch, "accumulate", short)
    code, _, err = inside(capsys, "train", config, *given)
    assert code == 3 and "the longest row of the data does not fit" in err and "line 12" in err
    assert [len(own) for own in seen] == [1] and seen[0][0].endswith("line 12")
    monkeypatch.setattr(micro_batch, "accumulate", lambda *_: torch.zeros(()))
    assert inside(capsys, "train", config, *given, "method.dropout=0.2", "--overwrite")[0] == 0
    without = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    monkeypatch.setattr(micro_batch, "accumulate", genuine)
    assert inside(capsys, "train", config, *given, "method.dropout=0.2", "--overwrite")[0] == 0
    tried = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(without[name], tried[name]) for name in without)


def test_a_model_that_nobody_shares_is_said_to_be_held_whole(config: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "train", config, "model.sharded=true", "training.max_steps=1")
    assert code == 0 and "model.sharded shares the model over several processes: this one is alone" in err


def test_a_resume_keeps_the_compute_type_and_refuses_another_device(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` chooses by the processor: a run that goes on elsewhere must not change its type without a gate."""

    def processor(*, multiplies_bfloat16: bool) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies_bfloat16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: multiplies_bfloat16)

    settings = ("model.dtype=auto", "training.checkpoint_every=3")
    processor(multiplies_bfloat16=False)
    assert inside(capsys, "train", config, *settings)[0] == 0
    assert manifest(tmp_path / "run")["fingerprints"]["compute_dtype"] == "float32"
    run_json = tmp_path / "run" / "run.json"
    run_json.write_text(json.dumps({**manifest(tmp_path / "run"), "status": "running"}))
    first = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    processor(multiplies_bfloat16=True)
    code, _, err = inside(capsys, "train", config, *settings, "--resume")
    assert code == 0 and "resumed from" in err, err
    assert manifest(tmp_path / "run")["compute_dtype"] == "float32"
    second = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    fingerprints = {**manifest(tmp_path / "run")["fingerprints"], "device": "cuda"}
    run_json.write_text(json.dumps({**manifest(tmp_path / "run"), "status": "running", "fingerprints": fingerprints}))
    code, _, err = inside(capsys, "train", config, *settings, "--resume")
    assert code == 3 and "device: cuda at its start, cpu now" in err, err


def test_a_resume_keeps_the_routine_of_its_products(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` measures: a run that goes on where another routine is faster must compute the same bits."""
    monkeypatch.setattr(matmul, "_routine", "onednn")
    monkeypatch.setattr(matmul_routine, "_measure", lambda: "blas")
    settings = ("model.matmul=auto", "training.checkpoint_every=3")
    assert inside(capsys, "train", config, *settings)[0] == 0
    assert manifest(tmp_path / "run")["fingerprints"]["matmul"] == "blas" and matmul.routine_in_use() == "blas"
    first = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    run_json = tmp_path / "run" / "run.json"
    run_json.write_text(json.dumps({**manifest(tmp_path / "run"), "status": "running"}))
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(matmul_routine, "_measure", lambda: "onednn")
    code, _, err = inside(capsys, "train", config, *settings, "--resume")
    assert code == 0 and "resumed from" in err, err
    assert matmul.routine_in_use() == "blas"
    second = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_end_tokens_of_the_model_are_published(config: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    """Llama 3 names three; the published config had only the one of the template."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    generation = json.loads((base / "generation_config.json").read_text())
    settings = {**generation, "eos_token_id": [2, 9, 10], "do_sample": True, "temperature": 0.6}
    (base / "generation_config.json").write_text(json.dumps(settings))
    assert inside(capsys, "train", config, f"model.name={base}", "training.max_steps=2")[0] == 0
    saved = json.loads((tmp_path / "run" / "adapter" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [4, 2, 9, 10]
    code, _, err = inside(capsys, "merge", tmp_path / "run", tmp_path / "merged")
    assert code == 0, err
    merged = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert merged["eos_token_id"] == [4, 2, 9, 10] and merged["temperature"] == 0.6
