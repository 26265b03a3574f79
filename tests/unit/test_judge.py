"""What a judge is asked and how its verdicts are read: a real tiny model, and real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from builders import policy_of
from models import tiny_model
from rung.config.io import parse_config
from rung.config.judge import JudgeConfig
from rung.data.chat import ChatTemplate
from rung.errors import ConfigError, DataError
from rung.evaluation.judge import (
    MARKS,
    AnswerPair,
    JudgeVerdict,
    judge_both_orders,
    judge_by_logprobs,
    judge_prompt,
    parse_verdict,
    read_human_labels,
)
from rung.types import Message

PAIR = AnswerPair("What is in it?", "apples and pears", "stones", "rows line 1", "a box", "apples")
SPEC = JudgeConfig(model="tiny")


def text(*settings: bool, config: JudgeConfig = SPEC) -> str:
    return "\n".join(m.content for m in judge_prompt(PAIR, config, *settings))


def test_both_orders_are_asked_and_read_back() -> None:
    shown = text(False, False)
    assert "a box\n\nWhat is in it?" in shown
    assert shown.index("[Answer A]\napples and pears") < shown.index("[Answer B]\nstones")
    assert text(True, False).index("[Answer A]\nstones") < text(True, False).index("[Answer B]\napples and pears")
    always_a = judge_both_orders([PAIR, PAIR], SPEC, lambda prompts: [JudgeVerdict("A", None)] * len(prompts))
    assert [(j.verdicts.first_shown_first, j.verdicts.second_shown_first) for j in always_a] == [
        ("first", "second")
    ] * 2
    assert always_a[0].verdicts.outcome == "tie"
    good = judge_both_orders(
        [PAIR], SPEC, lambda prompts: [JudgeVerdict("AB"["[Answer B]\napples" in p[1].content], 0) for p in prompts]
    )
    assert good[0].verdicts.outcome == "first"


def test_what_the_spec_says_is_what_the_judge_reads() -> None:
    assert "Expected answer" not in text(False, False)
    asked = text(False, True, config=JudgeConfig(model="x", server="http://s/v1", reference=True, criteria="Be brief."))
    assert "[Expected answer]\napples" in asked and "Be brief." in asked and "[[C]] for a tie" in asked
    assert "correct, helpful" in text(False, False)


@pytest.mark.parametrize(
    ("words", "mark"),
    [("[[A]]", "A"), ("Not [[A]], in the end [[B]]", "B"), ("[[C]] ", "C"), ("A", None), ("", None), ("[[D]]", None)],
)
def test_the_last_mark_counts_and_without_one_nothing_does(words: str, mark: str | None) -> None:
    assert parse_verdict(words) == JudgeVerdict(mark, words)


def test_log_probabilities_are_those_of_each_prompt_alone(tiny_tokenizer: object) -> None:
    model = tiny_model(max_position_embeddings=512)
    policy, chat = policy_of(model), ChatTemplate(tiny_tokenizer)  # type: ignore[arg-type]
    prompts = [(Message("user", f"{'word ' * n} which?"),) for n in (1, 5, 2)]
    with torch.no_grad():
        found = judge_by_logprobs(policy, chat)(prompts)
        for said, turns in zip(found, prompts, strict=True):
            ids = chat.prompt_ids(turns)
            alone = {}
            for mark in MARKS:
                (token,) = chat.encode([mark], mid_document=True)[0]
                logits = model(torch.tensor([ids])).logits[0, -1]
                alone[mark] = float(torch.log_softmax(logits, -1)[token])
            assert said.basis == pytest.approx(alone, abs=1e-4)
            assert said.mark == max(alone, key=alone.__getitem__)
    assert len({round(said.basis["A"], 4) for said in found}) == 3


def test_a_prompt_without_room_is_unreadable(tiny_tokenizer: object) -> None:
    policy, chat = policy_of(tiny_model(max_position_embeddings=64)), ChatTemplate(tiny_tokenizer)  # type: ignore[arg-type]
    long, short = judge_by_logprobs(policy, chat)([(Message("user", "word " * 200),), (Message("user", "w"),)])
    assert long.mark is None and "have room" in long.basis and short.mark in MARKS


def labelled(folder: Path, *rows: dict[str, object]) -> str:
    file = folder / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


ROW = {"question": "q", "first": "a", "second": "b"}


def test_labels_of_one_person_or_of_several(tmp_path: Path) -> None:
    pairs, labels = read_human_labels(
        labelled(tmp_path, {**ROW, "human": "tie", "group": 3}, {**ROW, "human": ["first", None], "context": "c"})
    )
    assert labels == [["tie"], ["first", None]]
    assert pairs[0].cluster == "3" and pairs[1].context == "c" and pairs[1].cluster.endswith("line 2")


@pytest.mark.parametrize("bad", [{"human": "A"}, {"human": None}, {"human": []}, {"human": ["first", 1]}, {"first": 1}])
def test_labels_that_are_none_are_refused(bad: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2"):
        read_human_labels(labelled(tmp_path, {**ROW, "human": "first"}, {**ROW, "human": "first", **bad}))


def test_a_judge_spec_is_checked() -> None:
    run = {"data": {"path": "x"}, "output": "y"}
    with pytest.raises(ConfigError, match="requests to a `server`"):
        parse_config({**run, "evaluation": {"judge": {"model": "m", "concurrency": 2}}})
    with pytest.raises(ConfigError, match="server"):
        parse_config({**run, "evaluation": {"judge": {"model": "m", "server": "localhost"}}})
