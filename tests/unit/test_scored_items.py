"""Scored items on disk: another program reads them, and they come back as they were."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from rung.errors import CheckpointError
from rung.evaluation.evaluate import Evaluation, ScoredItem
from rung.training.run_folder import read_items, write_items


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
