"""Answers chosen among labels: what is chosen, with which probability, in which prompt, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from processes import inside
from rung.config.evaluation import ChoicesConfig
from rung.config.model import ModelConfig
from rung.evaluation.choices import answer_ids, choose_labels
from rung.evaluation.evaluate import prompt_ids
from rung.evaluation.prompting import PromptFormat
from rung.runs.load import open_target
from rung.training.run_folder import read_items
from rung.types import Message, Record, Source

LABELS = ("apple", "apple pie", "box", "pear")


@pytest.fixture
def labeled(config: Path, tmp_path: Path) -> Path:
    """A task of four labels, one of which begins another; its rows are told apart by one word."""
    rows = [
        {"question": f"what is in {'abcd'[i % 4]} {i}?", "answer": LABELS[i % 4], "group": f"g{i}"} for i in range(120)
    ]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = config.read_text()
    config.write_text(text + "climb: {rungs: [zero_shot, few_shot, lora]}\n")
    return config


def settings(tmp_path: Path, *more: str) -> list[str]:
    return [f"data.path={tmp_path / 'labels.jsonl'}", "data.group=null", "evaluation.metrics=[exact]", *more]


def record(question: str, answer: str = "box") -> Record:
    return Record((Message("user", question), Message("assistant", answer)), Source("x", 1))


@pytest.mark.parametrize("calibrated", [False, True])
def test_probabilities_are_those_of_separate_passes(tiny_base: Path, calibrated: bool) -> None:
    """77 labels as children of one prompt are what 77 passes of the whole model give, to 1e-5 nats."""
    model = open_target(str(tiny_base), ModelConfig(name=str(tiny_base), dtype="float32"))
    labels = tuple(
        f"{word} {number}" for number in range(11) for word in ("a", "card", "card lost", "top", "up", "x", "pay")
    )
    records = [record(f"question {i}", labels[i]) for i in range(3)]
    prompt_format = PromptFormat("Say the label.", choices=labels[:3])
    prompts = prompt_ids(model.chat, records, prompt_format, 500)
    config = ChoicesConfig(labels=labels, calibrated=calibrated)
    found = choose_labels(model.policy, model.chat, records, prompts, prompt_format, config, "test")

    def nats(prompt: list[int], label: str) -> float:
        answer = answer_ids(model.chat, records[0], label)
        with torch.no_grad():
            logits = model.policy.model(torch.tensor([[*prompt, *answer]])).logits[0].double()
        logprobs = torch.log_softmax(logits, -1)
        return float(sum(logprobs[len(prompt) + i - 1, token] for i, token in enumerate(answer)))

    empty = model.chat.prompt_ids(prompt_format.turns(record("N/A")))
    for row, prompt in enumerate(prompts):
        scores = np.array([nats(prompt, label) - (nats(empty, label) if calibrated else 0.0) for label in labels])
        probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        assert found[row].label == labels[int(scores.argmax())]
        assert np.log(found[row].confidence) == pytest.approx(np.log(probabilities.max()), abs=1e-5)
        assert np.log(found[row].expected_probability) == pytest.approx(np.log(probabilities[row]), abs=1e-5)


def test_prompts_of_several_tasks_keep_their_task(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods with parameters per task (prompt, prefix, p_tuning) choose them by it, for the prior too."""
    model, seen = open_target(str(tiny_base)), []

    def noted(policies: Any, documents: Any, *_: Any) -> list[float]:
        seen.extend(document.task for document in documents)
        return [float(len(seen) + i) for i in range(len(documents))]

    monkeypatch.setattr("rung.inference.choose.values_by_document", noted)
    records = [replace(record(f"q {i}"), task=task) for i, task in enumerate(("one", "two", "one"))]
    prompts = prompt_ids(model.chat, records, PromptFormat(), 500)
    config = ChoicesConfig(labels=("a", "b"), calibrated=True)
    choose_labels(model.policy, model.chat, records, prompts, PromptFormat(), config, "test")
    assert seen == ["one", "one", "two", "two", "one", "one", "one", "one", "two", "two"]


def test_a_label_ends_and_the_instruction_lists_all(tiny_base: Path) -> None:
    """Without its end the shorter of "apple" and "apple pie" would always win."""
    chat = open_target(str(tiny_base)).chat
    short, long = answer_ids(chat, record("q"), "apple"), answer_ids(chat, record("q"), "apple pie")
    assert long[: len(short)] != short and short[-1] == long[-1]
    turns = PromptFormat("Be brief.", choices=LABELS).turns(record("q"))
    assert turns[0].content == "Be brief.\n\nAnswer with one of these labels:\napple\napple pie\nbox\npear"
    assert PromptFormat(choices=()).turns(record("q")) == (Message("user", "q"),)


def test_a_climb_chooses_and_scores_classes(labeled: Path, tmp_path: Path, capsys: Any) -> None:
    code, out, err = inside(capsys, "climb", labeled, *settings(tmp_path, "evaluation.choices=auto"), "--json")
    assert code == 0, err
    rows = {row["rung"]: row for row in json.loads(out)["rows"]}
    for row in rows.values():
        classes = row["classification"]
        assert classes["labels"] <= 4 and row["cut_off"] == 0.0
        assert classes["accuracy"]["mean"] == row["scores"]["exact"]["mean"]
        assert sum(each["examples"] for each in classes["classes"]) == json.loads(out)["examples"]
        assert set(classes["accuracy_at_coverage"]) == {"0.5", "0.8", "0.9", "1.0"}
    items, _ = read_items(tmp_path / "run" / "rungs" / "zero_shot" / "items.parquet")
    assert {item["answer"] for item in items} <= set(LABELS)
    assert all(0.25 <= item["confidence"] <= 1.0 and 0.0 < item["expected_probability"] <= 1.0 for item in items)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "macro-F1" in page and "apple pie" in page
    code, out, err = inside(capsys, "eval", tmp_path / "run" / "rungs" / "lora")
    assert code == 0 and "macro-F1" in out and "log-loss" in out, err


def test_choices_that_are_none(labeled: Path, tmp_path: Path, capsys: Any) -> None:
    for setting, message in (
        ("evaluation.choices=[apple, box]", "the answer of this test row is none of the labels"),
        ("evaluation.choices=[apple]", "two or more different texts"),
        ("evaluation.choices=[apple, apple]", "two or more different texts"),
        ("evaluation.choices=some", "evaluation.choices"),
        ("evaluation={choices: auto, metrics: [exact], stop: [x]}", "stop ends generated answers"),
        ("evaluation.choices={labels: auto, calibrated: true, top: 3}", "top"),
    ):
        code, _, err = inside(capsys, "climb", labeled, *settings(tmp_path, setting))
        assert code == 2 and message in err, (setting, err)
    (tmp_path / "labels.jsonl").write_text(
        "".join(json.dumps({"question": f"q {i}", "answer": f"a {i}"}) + "\n" for i in range(3000))
    )
    code, _, err = inside(capsys, "climb", labeled, *settings(tmp_path, "evaluation.choices=auto"))
    assert code == 2 and "no labels to choose among" in err
    assert not (tmp_path / "run").exists()
