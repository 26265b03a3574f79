"""Scored items on disk: another program reads them, and they come back as they were."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest
from transformers import PreTrainedTokenizerFast

from builders import policy_of
from models import tiny_model
from rung.config.evaluation import EvaluationConfig
from rung.data.chat import ChatTemplate
from rung.errors import CheckpointError
from rung.evaluation.evaluate import Evaluation, ScoredItem, _scores, evaluate
from rung.evaluation.prompting import PromptFormat
from rung.scoring.metrics import METRICS
from rung.training.run_folder import read_items, write_items
from rung.types import Message, Record, Source


def item(line: int, **changes: object) -> ScoredItem:
    fields = {
        "source": f"data line {line}", "group": None, "question": "q\u2028", "context": None, "expected": "é",
        "answer": "\x00", "scores": {"exact": 1.0, "token_f1": 0.5}, "prompt_tokens": 7, "stopped": line % 2 == 0,
    }  # fmt: skip
    return ScoredItem(**{**fields, **changes})  # type: ignore[arg-type]


def test_items_come_back_and_pandas_reads_them(tmp_path: Path) -> None:
    made = Evaluation(
        (item(1), item(2, group="a", nats=2.5, answer_tokens=3, references=("\u00e8", "e"))),
        0.25,
        ("exact", "token_f1"),
    )
    made.write(tmp_path / "items.parquet")
    assert Evaluation.read(tmp_path / "items.parquet") == made
    table = pandas.read_parquet(tmp_path / "items.parquet")
    assert table["score.token_f1"].tolist() == [0.5, 0.5] and table["stopped"].tolist() == [False, True]
    assert [list(names) for names in table["references"]] == [[], ["\u00e8", "e"]]
    assert list(tmp_path.iterdir()) == [tmp_path / "items.parquet"]
    # a list that is empty in every row has no type of its own
    plain = Evaluation((item(1), item(2)), 0.25, ("exact",))
    plain.write(tmp_path / "items.parquet")
    assert Evaluation.read(tmp_path / "items.parquet") == plain


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    with pytest.raises(CheckpointError, match="no scored items"):
        read_items(path)
    path.write_bytes(b"PAR1 torn")
    with pytest.raises(CheckpointError, match="no scored items"):
        read_items(path)
    pandas.DataFrame({"a": [1]}).to_parquet(path)
    with pytest.raises(CheckpointError, match="no scored items"):
        read_items(path)
    write_items(path, [], {"metrics": []})
    assert read_items(path) == ([], {"metrics": []})


def test_an_answer_ends_at_a_stop_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A stop text is any letter that the answers hold: they are cut before it, and count as ended."""
    chat, policy = ChatTemplate(tiny_tokenizer), policy_of(tiny_model())
    question = (Message("user", "2+2?"), Message("assistant", "4"))
    records = [Record(question, Source("data", n)) for n in range(3)]
    config = EvaluationConfig(metrics=("exact",), max_new_tokens=20)
    whole = evaluate(policy, chat, records, PromptFormat(), config)
    letter = whole.items[0].answer[2]
    cut = evaluate(policy, chat, records, PromptFormat(), config.model_copy(update={"stop": (letter,)}))
    assert whole.cut_off == 3 and cut.cut_off == 0
    assert [i.answer for i in cut.items] == [i.answer.partition(letter)[0].strip() for i in whole.items]
    assert [i.prompt_tokens for i in cut.items] == [i.prompt_tokens for i in whole.items]


def test_the_right_call_scores_1_by_every_metric(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The expected JSON was compared with the template's own form: 0 for every rung."""
    chat = ChatTemplate(tiny_tokenizer, "plain")
    call = '[{"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": "a b"}}}]'
    record = Record((Message("user", "q"), Message("assistant", "", call)), Source("d.jsonl", 1))
    metrics = {name: METRICS[name] for name in ("exact", "normalized", "numeric", "token_f1")}
    answer = chat.split_conversation(record, "answer")[-1].text
    turned = answer.replace('"x": 1, "y": "a b"', '"y": "a b", "x": 1')
    expected = chat.expected_calls(record)
    assert turned != answer and set(_scores(chat, metrics, turned, record, expected).values()) == {1.0}
    wrong = _scores(chat, metrics, answer.replace("a b", "a c"), record, expected)
    assert [wrong[name] for name in ("exact", "normalized", "numeric")] == [0.0] * 3 and 0 < wrong["token_f1"] < 1
    assert set(_scores(chat, metrics, "", record, expected).values()) == {0.0}
    # what reads no expected answer judges the answer alone, also in place of a call
    rules = {"not_refused": METRICS["not_refused"]}
    assert _scores(chat, rules, "Which town?", record, expected) == {"not_refused": 1.0}
    assert _scores(chat, rules, "I cannot help with that.", record, expected) == {"not_refused": 0.0}
