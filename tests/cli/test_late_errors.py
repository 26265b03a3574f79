"""Errors in the middle of a run: no finished step is lost, and a resume continues as if nothing had failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from processes import inside, log
from rung.errors import CheckpointError
from rung.training import checkpoint
from rung.training.step import accumulate
from rung.training.trainer import Trainer

TIMES = ("seconds", "rollout_seconds", "judge_seconds")


def manifest(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "run.json").read_text())
    return content


def checkpoints(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").glob("step-*"))


def assert_same_run(first: Path, second: Path) -> None:
    """The same adapter bit for bit, and the same log but for the times."""
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, second)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    logs = [[{k: v for k, v in entry.items() if k not in TIMES} for entry in log(run)] for run in (first, second)]
    assert logs[0] == logs[1]


def test_a_reward_function_that_fails_late_loses_no_step(config: Path, tmp_path: Path, capsys: Any) -> None:
    """The state before the failed rollout is saved; the mended function goes on from there, and run.json says so."""
    code_file, limit = tmp_path / "mine.py", tmp_path / "limit"
    mended = "def few(answer, row):\n    return -len(answer) / 8\n"
    failing = (
        f"from pathlib import Path\ncount = 0\ndef few(answer, row):\n    global count\n    count += 1\n"
        f"    if count > int(Path({str(limit)!r}).read_text()):\n        raise ValueError('no JSON')\n"
        f"    return -len(answer) / 8\n"
    )
    reward = f"{{kind: function, path: '{code_file}:few'}}"
    rollout = "{num_generations: 2, max_new_tokens: 3, num_iterations: 1, num_minibatches: 1}"
    with config.open("a") as file:
        file.write(f"objective: {{kind: ppo, adaptive_kl: {{}}, reward: {reward}, rollout: {rollout}}}\n")
    settings = ("training.examples_per_step=3", "training.max_steps=5")
    code_file.write_text(mended)
    assert inside(capsys, "train", config, *settings, f"output={tmp_path / 'whole'}")[0] == 0
    # 3 prompts a step with 2 answers: the fourth step fails
    code_file.write_text(failing)
    limit.write_text(str(3 * 3 * 2 + 4))
    code, _, err = inside(capsys, "train", config, *settings)
    run = tmp_path / "run"
    assert code == 2 and "ValueError: no JSON" in err and "saved after step 3" in err, err
    assert manifest(run)["status"] == "failed" and checkpoints(run) == ["step-00000003"] and len(log(run)) == 3
    code_file.write_text(mended)
    code, _, err = inside(capsys, "train", config, *settings, "--resume")
    assert code == 0 and "resumed from step-00000003" in err and "reward function has changed" in err, err
    assert len(manifest(run)["reward_changes"]) == 1 and manifest(run)["status"] == "finished"
    assert_same_run(run, tmp_path / "whole")
    # the checkpoint was for the resume alone
    assert checkpoints(run) == []


def test_a_reward_function_that_changes_in_a_run_that_did_not_fail_is_refused(
    config: Path, tmp_path: Path, capsys: Any
) -> None:
    code_file = tmp_path / "mine.py"
    code_file.write_text("def few(answer, row):\n    return -len(answer) / 8\n")
    with config.open("a") as file:
        reward = f"{{kind: function, path: '{code_file}:few'}}"
        file.write(f"objective: {{kind: grpo, reward: {reward}, rollout: {{num_generations: 2, max_new_tokens: 2}}}}\n")
    settings = ("training.examples_per_step=3", "training.max_steps=2", "training.checkpoint_every=1")
    assert inside(capsys, "train", config, *settings)[0] == 0
    content = manifest(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({**content, "status": "interrupted"}))
    code_file.write_text("def few(answer, row):\n    return len(answer) / 8\n")
    code, _, err = inside(capsys, "train", config, *settings, "--resume")
    assert code == 3 and "reward changed" in err


@pytest.mark.parametrize("failing_step", [4, 6])
def test_a_validation_that_fails_is_made_up_by_the_resume(
    failing_step: int, config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of the last step, whose loss the run reports; an error of a library is one of the run as well."""
    settings = ("training.eval_every=2", "data.validation=0.1", "training.patience=5", "training.examples_per_step=3")
    assert inside(capsys, "train", config, *settings, f"output={tmp_path / 'whole'}")[0] == 0
    measure = Trainer._validation_metrics

    def without_memory(self: Trainer, validation: Any) -> Any:
        if self.progress.step == failing_step:
            raise torch.OutOfMemoryError("out of memory")
        return measure(self, validation)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validation_metrics", without_memory)
        code, _, err = inside(capsys, "train", config, *settings)
    assert code != 0 and f"saved after step {failing_step}" in err, err
    assert manifest(run)["status"] == "failed" and "out of memory" in manifest(run)["error"]
    code, _, err = inside(capsys, "train", config, *settings, "--resume")
    assert code == 0, err
    assert_same_run(run, tmp_path / "whole")
    losses = [manifest(folder)["metrics"]["validation_loss"] for folder in (run, tmp_path / "whole")]
    assert losses[0] == losses[1] is not None


def test_an_error_in_a_step_saves_the_state_before_it(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout too: the generator of random numbers has moved on when the step fails."""
    settings = ("method={kind: lora, rank: 4, dropout: 0.2}",)
    assert inside(capsys, "train", config, *settings, f"output={tmp_path / 'whole'}")[0] == 0
    steps = 0

    def failing(*arguments: Any) -> Any:
        nonlocal steps
        loss = accumulate(*arguments)
        steps += 1
        if steps == 3:
            raise RuntimeError("the driver is gone")
        return loss

    with monkeypatch.context() as patch:
        patch.setattr("rung.training.trainer.accumulate", failing)
        code, _, err = inside(capsys, "train", config, *settings)
    assert code == 1 and "saved after step 2" in err and manifest(tmp_path / "run")["status"] == "failed", err
    assert inside(capsys, "train", config, *settings, "--resume")[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_an_error_between_the_steps_of_a_rollout_names_the_newest_checkpoint(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its documents are gone, so the state in the middle of a rollout is no place to continue from."""
    (tmp_path / "mine.py").write_text("def few(answer, row):\n    return -len(answer) / 8\n")
    reward = f"{{kind: function, path: '{tmp_path}/mine.py:few'}}"
    rollout = "{num_generations: 4, max_new_tokens: 4, num_iterations: 2, num_minibatches: 1}"
    with config.open("a") as file:
        file.write(f"objective: {{kind: grpo, reward: {reward}, rollout: {rollout}}}\n")
    steps = 0

    def failing(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise RuntimeError("the driver is gone")
        return accumulate(*arguments)

    monkeypatch.setattr("rung.training.trainer.accumulate", failing)
    code, _, err = inside(capsys, "train", config, "training.checkpoint_every=2")
    assert code == 1 and "an error after step 3: the newest checkpoint is step-00000002" in err, err
    assert checkpoints(tmp_path / "run") == ["step-00000002"]


def test_checkpoints_by_time(config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default a kill loses some minutes; a full disk does not end the run, and nothing is left over."""
    clock, saved = [0.0], list[str]()
    write = checkpoint.write_checkpoint

    def record(folder: Path, *rest: Any) -> None:
        saved.append(folder.name)
        if len(saved) == 2:
            raise CheckpointError("could not write: No space left on device", where=str(folder))
        write(folder, *rest)

    def ten_minutes_later(*arguments: Any) -> Any:
        clock[0] += 600.0
        return accumulate(*arguments)

    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoint, "write_checkpoint", record)
    monkeypatch.setattr("rung.training.trainer.accumulate", ten_minutes_later)
    code, _, err = inside(capsys, "train", config)
    # 15 minutes are over after two steps of ten, and a step that is the last writes the artifact instead
    assert code == 0 and saved == ["step-00000002", "step-00000004"], (saved, err)
    assert "no checkpoint, and the run goes on:" in err and "No space left" in err
    assert checkpoints(tmp_path / "run") == []
    saved.clear()
    code, _, err = inside(capsys, "train", config, "training.checkpoint_every=null", "--overwrite")
    assert code == 0 and saved == []


def test_a_gate_that_failed_is_checked_again(config: Path, tmp_path: Path, capsys: Any) -> None:
    """Otherwise the resumed run would end well with a failed gate in its manifest."""
    settings = ("training.checkpoint_every=1",)
    assert inside(capsys, "train", config, *settings, "training.save_total_limit=9")[0] == 0
    run = tmp_path / "run"
    content = manifest(run)
    for gate in content["gates"]:
        if gate["name"] == "movement":
            gate.update(state="failed")
    (run / "run.json").write_text(json.dumps({**content, "status": "failed"}))
    for name in checkpoints(run)[2:]:
        for file in (run / "checkpoints" / name).iterdir():
            file.unlink()
        (run / "checkpoints" / name).rmdir()
    code, _, err = inside(capsys, "train", config, *settings, "training.save_total_limit=9", "--resume")
    assert code == 0 and "gate movement: passed" in err, err
    assert [gate["state"] for gate in manifest(run)["gates"] if gate["name"] == "movement"] == ["passed"]
