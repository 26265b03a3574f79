"""Answers sampled from the command line."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builders import example
from processes import inside, start
from rung.commands.forgetting import forgetting_task
from rung.commands.generate import GenerateRequest, load_prompts
from rung.config.data import DataConfig
from rung.config.run import RunConfig
from rung.errors import ConfigError, DataError
from rung.inference.ask import chunk_seed
from rung.inference.journal import Journal
from rung.models.generate import Sampling, generate
from rung.models.packing import pack_separately
from rung.runs.load import open_run
from rung.types import Message


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"what is in box {i}?", "system": "Answer in a word."} for i in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_answers_of_a_base(tiny_base: Path, questions: Path, tmp_path: Path, capsys: Any) -> None:
    given = ("--data", questions, "--n", 3, "--limit", 4, "--max-new-tokens", 6)
    code, out, err = inside(capsys, "generate", tiny_base, *given, "-o", tmp_path / "a.jsonl", "--json")
    assert code == 0, err
    rows = read(tmp_path / "a.jsonl")
    assert len(rows) == 4 and all(len(row["answers"]) == len(row["stopped"]) == 3 for row in rows)
    assert rows[0]["prompt"] == "what is in it, 0?" and rows[0]["context"] == "box 0" and rows[0]["expected"] == "pears"
    assert json.loads(out)["sampled"] == 12
    lengths = [n for row in rows for n in row["tokens"]]
    assert json.loads(out)["means"] == {"tokens": pytest.approx(sum(lengths) / 12)} and max(lengths) <= 6
    assert inside(capsys, "generate", tiny_base, *given, "-o", tmp_path / "b.jsonl")[0] == 0
    assert read(tmp_path / "b.jsonl") == rows  # one seed, the same answers
    assert inside(capsys, "generate", tiny_base, *given, "-o", tmp_path / "c.jsonl", "--seed", 1)[0] == 0
    assert read(tmp_path / "c.jsonl") != rows
    code, _, err = inside(capsys, "generate", tiny_base, *given, "-o", tmp_path / "a.jsonl")
    assert code == 2 and "exists already" in err


def test_prompts_alone_and_equal_answers(tiny_base: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    given = ("--data", prompts, "--n", 4, "--temperature", 0, "--max-new-tokens", 5)
    code, _, err = inside(capsys, "generate", tiny_base, *given, "-o", tmp_path / "a.jsonl")
    assert code == 2 and "format" in err
    given = (*given, "--format", "prompt_only")
    assert inside(capsys, "generate", tiny_base, *given, "-o", tmp_path / "a.jsonl", "--distinct")[0] == 0
    rows = read(tmp_path / "a.jsonl")
    assert [len(row["answers"]) for row in rows] == [1] * 5 and "expected" not in rows[0]
    assert [turn["role"] for turn in rows[0]["prompt"]] == ["system", "user"]
    code, _, err = inside(capsys, "generate", tiny_base, *given[:-1], "proze", "-o", tmp_path / "b.jsonl")
    assert code == 2 and "no such format" in err


def test_a_reward_run_ranks_them(compared: Path, tmp_path: Path, capsys: Any) -> None:
    """What comes out trains preferences as it is: rated, best first, the scores those of the reward model."""
    compared.write_text(compared.read_text().replace("{kind: preference, beta: 0.5}", "{kind: reward}"))
    assert inside(capsys, "train", compared)[0] == 0
    given = ("--data", tmp_path / "pairs.jsonl", "--n", 3, "--limit", 12, "--max-new-tokens", 4, "--distinct")
    base = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["model"]["name"]
    asked = (base, *given, "--reward", tmp_path / "run", "-o", tmp_path / "rated.jsonl")
    code, _, err = inside(capsys, "generate", *asked)
    assert code == 0, err
    rows = read(tmp_path / "rated.jsonl")
    assert all(row["scores"] == sorted(row["scores"], reverse=True) for row in rows)
    assert inside(capsys, "data", "check", tmp_path / "rated.jsonl")[0] == 0
    given = (f"data.path={tmp_path / 'rated.jsonl'}", "data.group=null", "data.test=0", "data.validation=0")
    settings = ("objective={kind: preference}", "training.max_steps=2", f"output={tmp_path / 'next'}")
    code, _, err = inside(capsys, "train", compared, *given, *settings)
    assert code == 0, err
    asked = ("generate", tmp_path / "run", "--data", tmp_path / "pairs.jsonl", "-o", tmp_path / "y.jsonl")
    code, _, err = inside(capsys, *asked)
    assert code == 3 and "reward model" in err and not (tmp_path / "y.jsonl").exists()


def test_how_far_answers_are_from_a_reference(config: Path, questions: Path, tmp_path: Path, capsys: Any) -> None:
    """Each log-ratio written out, the base's weights held once; against itself a model has moved nowhere."""
    assert inside(capsys, "train", config, "training.max_steps=4")[0] == 0
    run = tmp_path / "run"
    base = json.loads((run / "run.json").read_text())["config"]["model"]["name"]
    given = ("--data", questions, "--n", 2, "--limit", 3, "--max-new-tokens", 6)
    code, out, err = inside(capsys, "generate", run, *given, "--reference", base, "-o", tmp_path / "a.jsonl", "--json")
    assert code == 0, err
    rows = read(tmp_path / "a.jsonl")
    opened = open_run(run)
    policy, chat = opened.policy, opened.chat
    asked = [chat.prompt_ids([Message("user", row["prompt"])], context=row["context"]) for row in rows]
    answers = generate(policy, asked, stop_ids=chat.stop_ids, sampling=Sampling(6, 1.0, chunk_seed(0, 0), 2))  # again
    found = [value for row in rows for value in row["log_ratios"]]
    for i, answer in enumerate(answers):
        prompt = asked[i // 2]
        batch = pack_separately([example([*prompt, *answer.all_tokens], len(prompt))])[0]
        expected = float((policy.logprobs(batch).detach() - policy.base_logprobs(batch)).sum())
        assert found[i] == pytest.approx(expected, abs=1e-4) and found[i] != 0
    assert json.loads(out)["means"]["log_ratio"] == pytest.approx(sum(found) / len(found), abs=1e-5)
    given = (*given, "--reference", run, "-o", tmp_path / "b.jsonl")
    assert inside(capsys, "generate", run, *given)[0] == 0
    assert all(abs(value) < 1e-5 for row in read(tmp_path / "b.jsonl") for value in row["log_ratios"])


def test_one_answer_each_keeps_its_score(compared: Path, tmp_path: Path, capsys: Any) -> None:
    """With one answer there is nothing to compare, and every prompt stays."""
    compared.write_text(compared.read_text().replace("{kind: preference, beta: 0.5}", "{kind: reward}"))
    assert inside(capsys, "train", compared)[0] == 0
    base = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["model"]["name"]
    given = ("--data", tmp_path / "pairs.jsonl", "--n", 1, "--limit", 5, "--max-new-tokens", 4)
    asked = (base, *given, "--reward", tmp_path / "run", "-o", tmp_path / "one.jsonl", "--json")
    code, out, err = inside(capsys, "generate", *asked)
    assert code == 0, err
    scores = [score for row in read(tmp_path / "one.jsonl") for score in row["scores"]]
    assert len(scores) == 5 and json.loads(out)["means"]["score"] == pytest.approx(sum(scores) / 5, abs=1e-5)


def test_prompts_alone_teach_nothing(config: Path, prompts: Path, capsys: Any) -> None:
    given = (f"data.path={prompts}", "data.format=prompt_only", "data.group=null", "data.test=0", "data.validation=0")
    code, _, err = inside(capsys, "train", config, *given)
    assert code == 2 and "no answer to learn" in err and "line 1" in err
    reward = "{kind: regex, pattern: a}"
    rolling = f"objective={{kind: grpo, reward: {reward}, rollout: {{num_generations: 4, max_new_tokens: 5}}}}"
    code, _, err = inside(capsys, "train", config, *given, rolling, "training.max_steps=2")
    assert code == 0, err
    file = config.parent / "prompts.yaml"
    file.write_text(f"data: {{path: {prompts}, format: prompt_only}}\noutput: {config.parent / 'none'}\n")
    name = config.read_text().split("name: ")[1].split(",")[0]
    code, out, err = inside(capsys, "data", "check", file, "--model", name, "--json")
    assert code == 0 and json.loads(out)["rejected"] == [], err


def test_a_stop_loses_nothing_that_was_made(tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    """Killed after two parts of six, the same command makes the other four, and the file is the same."""
    many = tmp_path / "many.jsonl"
    rows = [{"question": f"what is in box {i}?" + " or so" * (i % 7), "answer": "pears"} for i in range(380)]
    many.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("generate", tiny_base, "--data", many, "--n", 4, "--max-new-tokens", 24)
    journal = tmp_path / ".b.jsonl.journal"
    with start(*asked, "-o", tmp_path / "b.jsonl") as running:
        while running.poll() is None and not (journal.exists() and journal.read_text().count("\n") > 2):
            time.sleep(0.005)
        running.kill()
    kept = journal.read_text().splitlines()[1:]
    assert len(kept) >= 2 and not (tmp_path / "b.jsonl").exists()
    code, _, err = inside(capsys, *asked, "-o", tmp_path / "b.jsonl")
    assert code == 0 and f"going on after {len(kept)} of 6 parts" in err and not journal.exists()
    assert inside(capsys, *asked, "-o", tmp_path / "a.jsonl")[0] == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_journal_of_another_request(tiny_base: Path, questions: Path, tmp_path: Path, capsys: Any) -> None:
    asked = (
        "generate",
        tiny_base,
        "--data",
        questions,
        "--limit",
        3,
        "--max-new-tokens",
        4,
        "-o",
        tmp_path / "a.jsonl",
    )
    Journal(tmp_path / ".a.jsonl.journal", {"of": "something else"}).close()
    code, _, err = inside(capsys, *asked)
    assert code == 3 and "belongs to a different request" in err and not (tmp_path / "a.jsonl").exists()


def test_hints_about_the_data_name_what_this_command_takes(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They named `data.map`, which this command lacks; a config has it, and is taken in place of the file."""
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps({"Query": f"what is {i}?"}) + "\n" for i in range(2)))
    request = GenerateRequest()
    with pytest.raises(DataError, match=r"data\.map(?s:.*)--data CONFIG\.yaml, with data\.path: (?s:.*)--format does"):
        load_prompts(tmp_path / "a.jsonl", str(file), request)
    with pytest.raises(DataError, match=r"data\.map(?s:.*)a config in its place"):
        forgetting_task(RunConfig(data=DataConfig(path=str(file)), output="x"), str(file), None)
    code, _, err = inside(capsys, "data", "check", file)
    assert code == 2 and f"rung data check CONFIG.yaml, with data.path: {file}" in err
    config = tmp_path / "asked.yaml"
    config.write_text(f"data: {{path: {file}, format: prompt_only, map: {{prompt: Query}}}}\noutput: runs/x\n")
    assert [r.question for r in load_prompts(tmp_path / "a.jsonl", str(config), request)] == [
        "what is 0?",
        "what is 1?",
    ]
    with pytest.raises(ConfigError, match="a config says the format itself"):
        load_prompts(tmp_path / "a.jsonl", str(config), replace(request, format="prompt_only"))
    given = ("--data", config, "--n", 1, "--max-new-tokens", 3, "-o", tmp_path / "a.jsonl")
    assert inside(capsys, "generate", tiny_base, *given)[0] == 0
    assert [row["prompt"] for row in read(tmp_path / "a.jsonl")] == ["what is 0?", "what is 1?"]
    (tmp_path / "data.jsonl").write_text("")
    with pytest.raises(DataError, match=r"did you mean data\.jsonl") as plain:  # a missing file needs no config
        load_prompts(tmp_path / "b.jsonl", str(tmp_path / "dota.jsonl"), request)
    assert "CONFIG" not in str(plain.value)
