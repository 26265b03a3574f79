"""RLHF's third step from the command line: a toy reward, a reward model on the same weights, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from processes import goes_on_as_if_never_stopped, inside, log


@pytest.fixture
def short(config: Path, tmp_path: Path) -> Path:
    """The config of a run whose answers are better the shorter they are."""
    (tmp_path / "mine.py").write_text("def few(answer, row):\n    return -len(answer) / 8\n")
    text = config.read_text().replace("learning_rate: 1.0e-2", "learning_rate: 2.0e-2")
    reward = f"{{kind: function, path: '{tmp_path}/mine.py:few'}}"
    rollout = "{num_generations: 4, max_new_tokens: 8, num_iterations: 2, num_minibatches: 2}"
    config.write_text(text + f"objective: {{kind: ppo, beta: 0.02, reward: {reward}, rollout: {rollout}}}\n")
    return config


@pytest.mark.parametrize("method", ["{kind: lora, rank: 4}", "{kind: full}", "{kind: prompt, virtual_tokens: 3}"])
def test_a_toy_reward_is_climbed(method: str, short: Path, tmp_path: Path, capsys: Any) -> None:
    """Where the base itself moves values are read off the policy's own states, else off an adapter beside it."""
    rate = "1e-3" if "full" in method else "5e-2" if "prompt" in method else "2e-2"
    settings = (f"method={method}", "training.max_steps=64", "training.epochs=3", f"training.learning_rate={rate}")
    code, _, err = inside(capsys, "train", short, *settings)
    assert code == 0, err
    entries = [e for e in log(tmp_path / "run") if "rollout_seconds" in e]
    assert entries[0]["ratio"] == pytest.approx(1.0, abs=1e-4)
    if "prompt" not in method:  # which does not begin as the base
        assert entries[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    first, last = (sum(e["reward"] for e in part) / 4 for part in (entries[:4], entries[-4:]))
    if "prompt" not in method:  # three vectors before a random model turn little
        assert last > first + 0.1, [round(e["reward"], 2) for e in entries]
    assert "gate movement: passed" in err and max(abs(e["kl"]) for e in entries) < 5.0
    assert inside(capsys, "eval", tmp_path / "run", "--limit", 3)[0] == 0


def test_a_killed_run_goes_on_with_its_values_and_its_penalty(short: Path, tmp_path: Path, capsys: Any) -> None:
    settings = [
        "training.max_steps=12",
        "training.checkpoint_every=4",
        "objective.adaptive_kl={target: 0.5, horizon: 50}",
    ]
    whole, parts = goes_on_as_if_never_stopped(capsys, short, settings, tmp_path, 8)
    betas = [[e["beta"] for e in log(run)] for run in (whole, parts)]
    assert betas[0] == betas[1] and len(set(betas[0])) > 1


def test_equal_rewards_teach_ppo_nothing(short: Path, tmp_path: Path, capsys: Any) -> None:
    """Whitening scales the errors of the value model to 1: without this check the policy would follow noise."""
    (tmp_path / "mine.py").write_text("def same(answer, row):\n    return 1.0\n")
    path = f"objective.reward.path={tmp_path}/mine.py:same"
    code, _, err = inside(capsys, "train", short, path, "training.max_steps=4")
    assert code == 3 and "in none of 4 steps did the rewards of a group differ" in err, err


def test_a_rollout_is_left_when_the_policy_runs_away(short: Path, tmp_path: Path, capsys: Any) -> None:
    settings = ("objective.stops.target_kl=1e-6", "training.max_steps=8", "objective.rollout.num_iterations=4")
    assert inside(capsys, "train", short, *settings)[0] == 0
    entries = log(tmp_path / "run")
    assert any("halted" in e and "divergence" in e["halted"] for e in entries)
    assert entries[-1]["step"] == len(entries) == 8 and any(e["tokens"] == 0 for e in entries)


def fruit(more: int, what: str = "apples") -> str:
    return " ".join([what] * (1 + more))


@pytest.fixture
def rewarded(compared: Path, tmp_path: Path, capsys: Any) -> Path:
    """A reward model that likes apples, taught by enough pairs to be healthy; its config follows it."""
    text = compared.read_text().replace(
        "{kind: preference, beta: 0.5}", "{kind: reward, center_rewards_coefficient: 0.01}"
    )
    compared.write_text(text)
    rows = [
        {"prompt": f"what is in {i}?", "chosen": fruit(i % 4), "rejected": fruit((7 * i + 2) % 5, "stones"), "box": i}
        for i in range(120)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = tmp_path / "reward"
    settings = ("training.max_steps=12", "training.epochs=2", "data.validation=0.4", "data.test=0", f"output={reward}")
    code, _, err = inside(capsys, "train", compared, *settings)
    assert code == 0 and "reward model: healthy" in err, err
    return compared


def test_a_reward_model_on_the_same_weights(rewarded: Path, tmp_path: Path, capsys: Any) -> None:
    reward = f"reward: {{kind: model, run: {tmp_path / 'reward'}}}"
    objective = f"objective={{kind: ppo, {reward}, value: reward, rollout: {{num_generations: 2, max_new_tokens: 6}}}}"
    code, _, err = inside(
        capsys, "train", rewarded, objective, "data.test=0", "training.max_steps=4", "data.validation=0"
    )
    assert code == 0, err
    assert err.count("loading") == 1, err  # one copy of the base
    entries = log(tmp_path / "run")
    assert all(torch.isfinite(torch.tensor(e["reward"])) for e in entries) and entries[0]["kl"] == pytest.approx(
        0, abs=1e-4
    )


def test_a_reward_model_that_is_not_healthy(rewarded: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "reward" / "run.json"
    manifest = json.loads(path.read_text())
    manifest["reward"].update(verdict="length", reason="it mostly measures length")
    path.write_text(json.dumps(manifest))
    model = f"{{kind: model, run: {tmp_path / 'reward'}}}"
    objective = f"objective={{kind: grpo, reward: {model}, rollout: {{num_generations: 2, max_new_tokens: 6}}}}"
    code, _, err = inside(capsys, "train", rewarded, objective, "training.max_steps=2")
    assert code == 3 and "not fit to be followed" in err and not (tmp_path / "run").exists()
    code, _, err = inside(capsys, "train", rewarded, objective, "objective.reward.accept=true", "training.max_steps=2")
    assert code == 0 and "is taken although" in err, err
    code, _, err = inside(capsys, "train", rewarded, objective, f"objective.reward.run={tmp_path}", "--overwrite")
    assert code == 2 and "no such run" in err
    code, _, err = inside(capsys, "train", rewarded, "objective={kind: ppo, reward: {kind: exact}, value: reward}")
    assert code == 2 and "value: reward" in err
