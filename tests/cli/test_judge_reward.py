"""A judge as the source of rewards: its shares of wins reach the objective, and it is asked only if people agree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from loopback import Local
from processes import goes_on_as_if_never_stopped, inside, log
from rung.models.policy import Policy
from rung.objectives.grpo import GrpoObjective
from rung.types import Rollout


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Labels of people who prefer the answer with more of the letter e."""
    file = tmp_path / "people.jsonl"
    rows = [
        {"question": f"which, {i}?", "first": "eee" if i % 2 else "no", "second": "no" if i % 2 else "eee"}
        for i in range(40)
    ]
    file.write_text(
        "".join(json.dumps({**row, "human": "first" if i % 2 else "second"}) + "\n" for i, row in enumerate(rows))
    )
    return file


@pytest.fixture
def judged(config: Path, local: Local, people: Path) -> Path:
    """The config of a run whose answers are judged by a server that likes the letter e."""
    local.rule(judge="e")
    reward = f"{{kind: judge, model: big, server: '{local.url}', human_labels: {people}}}"
    rollout = "{num_generations: 4, max_new_tokens: 8}"
    text = config.read_text().replace("learning_rate: 1.0e-2", "learning_rate: 3.0e-2")
    config.write_text(text + f"objective: {{kind: grpo, beta: 0.01, reward: {reward}, rollout: {rollout}}}\n")
    return config


def shares(texts: Sequence[str]) -> list[float]:
    """Oracle: of the numbers of the letter e, the share of the others that each exceeds, equal ones count half."""
    counts = [text.count("e") for text in texts]
    return [
        float(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for j, b in enumerate(counts) if j != i]))
        for i, a in enumerate(counts)
    ]


def test_shares_of_wins_are_the_rewards_of_a_group(
    judged: Path,
    local: Local,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every reward is that of the rule, and the policy learns the rule."""
    rollouts, columns = [], GrpoObjective.rollout_columns

    def recorded(self: GrpoObjective, policy: Policy, rollout: Rollout) -> list[Mapping[str, np.ndarray]]:
        rollouts.append(rollout)
        return columns(self, policy, rollout)

    monkeypatch.setattr(GrpoObjective, "rollout_columns", recorded)
    code, _, err = inside(capsys, "train", judged, "training.max_steps=16", "training.epochs=3")
    assert code == 0, err
    assert "judge: up to 96 verdicts a rollout, of 8 prompts with 4 answers" in err and "kappa with people 1.00" in err
    counts = []
    for rollout in rollouts:
        groups: dict[int, list[int]] = {}
        for i, document in enumerate(rollout.documents):
            groups.setdefault(document.row, []).append(i)
        answers = [
            d.ids[d.supervised][: -1 if stopped else None]
            for d, stopped in zip(rollout.documents, rollout.stopped, strict=True)
        ]
        texts = [tiny_tokenizer.decode(ids.tolist()) for ids in answers]
        counts.append(np.mean([text.count("e") for text in texts]))
        for group in groups.values():
            prompt = tiny_tokenizer.decode(rollout.documents[group[0]].ids.tolist())
            if "box 6\n" not in prompt:
                assert [rollout.rewards[i] for i in group] == pytest.approx(shares([texts[i] for i in group]))
    assert np.mean(counts[-4:]) > np.mean(counts[:4]) + 0.5
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["judge"]["trusted"] is True and manifest["judge"]["kappa"]["mean"] == 1.0
    assert list((tmp_path / "run" / "judged").glob("*.jsonl"))
    # equal answers and repeated pairs are not asked about
    for request in local.requests():
        first, second = (
            request["question"].split("[Answer A]\n")[1].rpartition("\n\nWhich")[0].split("\n\n[Answer B]\n")
        )
        assert first != second


def test_a_killed_run_asks_nothing_again(judged: Path, local: Local, tmp_path: Path, capsys: Any) -> None:
    """The same answers get the verdicts that are kept in the folder: the adapter is the same bit for bit."""
    settings = ["training.max_steps=6", "training.checkpoint_every=2", "training.epochs=2"]
    runs = goes_on_as_if_never_stopped(capsys, judged, settings, tmp_path, 4)
    kept = [len(lines(file)) - 1 for run in runs for file in (run / "judged").glob("*.jsonl")]
    labeled = 2 * 40  # once for all runs: these verdicts are in the cache
    assert len(kept) >= 2 * 6 and len(local.requests()) == labeled + sum(kept)


def test_a_judge_here_compares_with_expected_answers(
    judged: Path, people: Path, tiny_base: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a server: by log-probabilities. A random model agrees with nobody; with 0 as its limit it may judge."""
    here = f"{{kind: judge, model: {tiny_base}, human_labels: {people}, against: expected}}"
    settings = ("training.max_steps=2", f"objective.reward={here}")
    code, _, err = inside(capsys, "train", judged, *settings)
    assert code == 3 and "this judge is not trusted" in err and not (tmp_path / "run").exists(), err
    monkeypatch.setattr("rung.scoring.pairwise.cohen_kappa", _agreeing)
    code, _, err = inside(capsys, "train", judged, *settings)
    assert code in (0, 3) and "not trusted" not in err, err
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["fingerprints"]["reward"] and manifest["judge"]["trusted"] is True
    code, out, err = inside(capsys, "plan", judged, settings[1], "--json")
    assert code == 0 and "judge" in json.dumps(json.loads(out)), err


def _agreeing(*_: Any) -> Any:
    from rung.results.base import Estimate

    return Estimate(mean=1.0, low=1.0, high=1.0, examples=40, clusters=40)


PPO = (
    "objective={{kind: ppo, beta: 0.02, reward: {reward}, "
    "rollout: {{num_generations: {n}, max_new_tokens: 8, num_iterations: 2, num_minibatches: 2}}}}"
)


def test_ppo_is_rewarded_by_comparison_with_expected_answers(
    judged: Path, local: Local, people: Path, tmp_path: Path, capsys: Any
) -> None:
    reward = f"{{kind: judge, model: big, server: '{local.url}', human_labels: {people}, against: expected}}"
    settings = ("training.max_steps=96", "training.epochs=4", "training.learning_rate=2e-2", "training.eval_every=32")
    code, _, err = inside(capsys, "train", judged, PPO.format(reward=reward, n=4), *settings)
    assert code == 0, err
    entries = [e for e in log(tmp_path / "run") if "rollout_seconds" in e]
    first, last = (np.mean([e["reward"] for e in part]) for part in (entries[:4], entries[-4:]))
    assert last > first + 0.2, [round(e["reward"], 2) for e in entries]
    (validation,) = [e["validation_reward"] for e in log(tmp_path / "run") if "validation_reward" in e][-1:]
    assert 0.0 <= validation <= 1.0


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        (("objective.reward.human_labels=null",), 2, "human_labels"),
        (("objective.reward.against=expected", "objective.reward.reference=true"), 2, "shows the judge the expected"),
        ((PPO.format(reward="{kind: judge, model: x, human_labels: y}", n=1),), 2, "nothing to compare it with"),
        (("objective.reward.human_labels=none.jsonl",), 2, "none.jsonl"),
        (("objective.reward.min_kappa=0.99", "rule"), 3, "this judge is not trusted"),
    ],
)
def test_what_is_refused(
    settings: tuple[str, ...], code: int, said: str, judged: Path, local: Local, tmp_path: Path, capsys: Any
) -> None:
    if settings[-1] == "rule":
        settings = settings[:-1]
        local.rule(judge="no")
    found, _, err = inside(capsys, "train", judged, *settings)
    assert found == code and said in err and not (tmp_path / "run").exists(), err


def test_rows_that_a_judge_cannot_compare(judged: Path, tmp_path: Path, capsys: Any) -> None:
    """Prompts alone have groups to compare; a held-out one has a single answer, and nothing to compare it with."""
    rows = [{"prompt": f"write {i}"} for i in range(24)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data={{path: {tmp_path / 'prompts.jsonl'}, format: prompt_only, test: 0"
    evaluation = "evaluation={max_new_tokens: 8}"
    code, _, err = inside(capsys, "train", judged, data + "}", evaluation)
    assert code == 2 and "held-out question" in err and "data.validation: 0" in err, err
    alone = (data + ", validation: 0}", evaluation, "training.max_steps=2")
    code, _, err = inside(capsys, "train", judged, *alone, "objective.reward.against=expected")
    assert code == 2 and "this reward compares with the expected answer" in err, err
    assert inside(capsys, "train", judged, *alone)[0] == 0


@pytest.fixture
def improve(judged: Path, local: Local, people: Path) -> Path:
    """Rounds of a tiny model whose answers a judge compares with the expected ones."""
    text = judged.read_text().split("objective:")[0]
    text = text.replace("evaluation: {metrics: [exact, numeric, perplexity], ", "evaluation: {")
    text = text.replace("test: 0.25", "test: 0.25, validation: 0.25").replace(
        "instruction: Name the fruit.", "stop: [t, n]"
    )
    text = text.replace("training: {", "training: {epochs: 8, ").replace("max_steps: 6, ", "")
    judge = f"{{kind: judge, model: big, server: '{local.url}', human_labels: {people}, against: expected}}"
    judged.write_text(f"synth: {{kind: improve, verifier: {judge}, rounds: 1, samples: 4, pairs: true}}\n" + text)
    return judged


def test_improve_keeps_what_is_as_good_as_the_expected_answer(
    improve: Path, local: Local, tmp_path: Path, capsys: Any
) -> None:
    """Both expected answers have one e: an answer with as many or with more is accepted."""
    code, out, err = inside(capsys, "synth", "improve", improve, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["judge"]["trusted"] is True and result["rounds"][1]["rows"] > 0
    rows = lines(tmp_path / "run" / "round-1" / "rows.jsonl")
    assert rows and all(row["answer"].count("e") >= 1 and row["context"] != "box 6" for row in rows)
    pairs = lines(tmp_path / "run" / "round-1" / "pairs.jsonl")
    assert all(p["chosen"].count("e") > p["rejected"].count("e") or p["context"] == "box 6" for p in pairs)
    before = len(local.requests())
    (tmp_path / "run" / "test.json").unlink()
    manifest = json.loads((tmp_path / "run" / "synth.json").read_text())
    del manifest["result"]
    (tmp_path / "run" / "synth.json").write_text(json.dumps(manifest))
    code, again, err = inside(capsys, "synth", "improve", improve, "--json")
    assert code == 0 and json.loads(again) == result and len(local.requests()) == before, err


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        (("synth.verifier.against=group",), 2, "set verifier.against: expected"),
        (("synth.threshold=1",), 2, "threshold is at least 0 and below 1"),
        (("rule",), 3, "this judge is not trusted"),
    ],
)
def test_what_cannot_improve(
    settings: tuple[str, ...], code: int, said: str, improve: Path, local: Local, tmp_path: Path, capsys: Any
) -> None:
    if settings == ("rule",):
        settings = ()
        local.rule(judge="no")
    found, _, err = inside(capsys, "synth", "improve", improve, *settings)
    assert found == code and said in err and not (tmp_path / "run").exists(), err
