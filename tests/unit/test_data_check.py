"""The report of `rung data check`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from rung.config.data import DataConfig
from rung.data.chat import ChatTemplate
from rung.data.check import colored_tokens, inspect_data
from rung.data.deduplication import near_duplicates
from rung.data.records import Records
from rung.data.tokenize import tokenize_records
from rung.types import Message, Record, Source

LONG = "a farmer has twelve hens and each of them lays two eggs on every day of the week"


def write(folder: Path, name: str, rows: list[Any]) -> str:
    file = folder / name
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(file)


def printed(thing: object) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(thing)
    return console.export_text()


def test_report_of_a_mixed_file(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[Any] = [{"question": f"question [{i}]", "answer": "yes" if i % 2 else "no it is not"} for i in range(40)]
    rows += ["broken", {"question": "q", "context": 3, "answer": "a"}, {"question": "Question  [5]", "answer": "no"}]
    rows += [{"question": "stop", "answer": "a <|im_end|> b"}]
    report = inspect_data(write(tmp_path, "d.jsonl", rows))
    assert (report.kept_count, len(report.rejected_rows), report.supervised_share) == (42, 2, None)
    assert report.lengths is not None and report.lengths.unit == "characters"
    assert not report.ok and sum(report.splits.values()) == 42
    chat = ChatTemplate(tiny_tokenizer).with_control_tokens("keep")
    with_tokens = inspect_data(write(tmp_path, "d.jsonl", rows), chat)
    assert [r.source.line for r in with_tokens.rejected_rows] == [41, 42, 44]
    assert with_tokens.rejected_rows[-1].reason.startswith("the answer holds a stop token of the template;")
    assert with_tokens.lengths is not None and with_tokens.lengths.unit == "tokens"
    assert with_tokens.supervised_share is not None and 0 < with_tokens.supervised_share < 0.5
    assert [a.rpartition(" ")[2] for pair in with_tokens.duplicates for a in pair] == ["43", "6"]
    diversity = with_tokens.diversity
    assert diversity is not None and diversity.most_common_share == pytest.approx(20 / 41)
    data = with_tokens.to_json()
    assert json.loads(json.dumps(data)) == data and data["rejected"][1]["line"] == 42
    text = printed(with_tokens)
    assert "41 kept, 3 rejected" in text and "line 42: context is the number 3" in text


def test_overlap_and_near_duplicates_across_files(tmp_path: Path) -> None:
    train = write(tmp_path, "train.jsonl", [{"question": LONG, "answer": "a"}, {"question": "same", "answer": "a"}])
    held = [
        {"question": f"Surely, {LONG}!", "answer": "a"},
        {"question": " ".join(LONG.split()[:9]) + " so what", "answer": "a"},
        {"question": "SAME", "answer": "a"},
    ]
    config = DataConfig(path=train, test=write(tmp_path, "test.jsonl", held), validation=0)
    report = inspect_data(config)
    assert len(report.overlap) == 1 and not report.ok
    assert [n.held_out.rpartition(" ")[2] for n in report.ngram_matches[8]] == ["1", "2"]
    assert [n.matched for n in report.ngram_matches[13]] == [LONG]
    assert report.ngram_matches[8][1].matched == " ".join(LONG.split()[:9])
    assert 0.5 < report.ngram_matches[13][0].containment < 1
    assert "sharing 13 words" in printed(report)


def test_near_duplicates_of_short_rows_are_none() -> None:
    row = Record((Message("user", "short"), Message("assistant", "a")), Source("d", 1))
    assert near_duplicates(Records.from_records([row]), Records.from_records([row]), 8) == ()
    text = Record((), Source("d", 2), text=LONG)
    assert near_duplicates(Records.from_records([text]), Records.from_records([text]), 8)[0].containment == 1


def test_colored_shows_every_byte_and_what_is_learned(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatTemplate(tiny_tokenizer)
    row = Record((Message("user", "q 🙂"), Message("assistant", "a 🙂")), Source("d", 1))
    text = colored_tokens(tokenize_records(chat, [row]).examples[0], chat)
    assert text.plain == "<|im_start|>user\nq 🙂<|im_end|>\n<|im_start|>assistant\na 🙂<|im_end|>"
    green = "".join(text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style))
    assert green == "a 🙂<|im_end|>"


def test_a_chat_that_refuses_every_row_still_reports(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatTemplate(tiny_tokenizer).with_control_tokens("keep")
    report = inspect_data(write(tmp_path, "d.jsonl", [{"question": "q", "answer": "<|im_end|> x"}]), chat)
    assert (report.kept_count, report.lengths, report.supervised_share) == (0, None, None)


def test_the_data_package_loads_without_torch() -> None:
    code = "import sys, rung.data, rung.data.check; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_real_gsm8k_near_duplicates(real_data: Path) -> None:
    folder = real_data / "gsm8k"
    report = inspect_data(DataConfig(path=str(folder / "train.jsonl"), validation=0, test=str(folder / "test.jsonl")))
    assert report.kept_count == 3319 and not report.rejected_rows
    assert 0 < len(report.ngram_matches[13]) < len(report.ngram_matches[8]) <= 80


def test_better_answers_that_are_mostly_the_longer_are_pointed_out(tmp_path: Path) -> None:
    """A reward model that learned length alone would get them right."""
    rows = [{"prompt": f"q {i}", "chosen": "long " * (3 + i % 2), "rejected": "short " * 2} for i in range(20)]
    found = inspect_data(write(tmp_path, "p.jsonl", [*rows, {"prompt": "q", "chosen": "abc", "rejected": "xyz"}]))
    assert found.answer_lengths is not None and found.answer_lengths.pairs == 21
    assert found.answer_lengths.longer == pytest.approx((20 + 0.5) / 21)
    assert found.answer_lengths.typical == pytest.approx(15 / 12)
    assert found.to_json()["compared"]["pairs"] == 21
    assert "length alone may be what is learned" in printed(found)
    even = [{"prompt": f"q {i}", "chosen": "a" * (2 + i % 2), "rejected": "b" * (3 - i % 2)} for i in range(20)]
    assert "of either length" in printed(inspect_data(write(tmp_path, "e.jsonl", even)))
    assert inspect_data(write(tmp_path, "s.jsonl", [{"question": "q", "answer": "a"}])).answer_lengths is None
