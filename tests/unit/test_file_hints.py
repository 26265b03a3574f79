"""Files that are no valid JSON or CSV: the message names the cause and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import read_rows
from rung.errors import DataError

ROW = '{"question": "q", "answer": "a"}'


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("d.json", f"{ROW},\n{ROW},\n", "put [ before the first object and ] after the last"),
        ("d.json", f"[{ROW},]", "remove the comma before the ]"),
        ("d.json", '[{"question": "q", "answer": "a",}]', "remove the comma before the }"),
        ("d.json", f"[{ROW}, {ROW[:20]}", None),
        ("d.json", f"[{ROW},", "it may be cut off"),
        ("d.json", f"{ROW}\n{ROW}\n", "rename the file to d.jsonl"),
        ("d.json", ROW, "put it into a list, [{...}]"),
        ("d.jsonl", f"{ROW},\n{ROW},\n", "objects on lines have no commas between them"),
        ("d.json", '[[{"role": "user", "content": "q"}]]', 'a list of turns is written as {"messages": [...]}'),
        *(
            (name, "<!DOCTYPE html><html></html>\n", "download the file itself")
            for name in ("d.json", "d.jsonl", "d.csv")
        ),
        *(
            (name, "version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "git lfs pull")
            for name in ("d.json", "d.jsonl", "d.csv")
        ),
    ],
)
def test_files_that_are_no_data_say_what_they_are(tmp_path: Path, name: str, text: str, remedy: str | None) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / name))
    if remedy is not None:
        assert remedy in str(caught.value)


def test_a_header_with_pipes_is_read_and_told(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("question|answer\nq|a, b\n")
    rows, rejected = read_rows(str(tmp_path / "d.csv"))
    assert [row.row for row in rows] == [{"question": "q", "answer": "a, b"}] and not rejected
    (tmp_path / "d.csv").write_text("question|answer,note\nq|a,b\n")
    with pytest.raises(DataError, match="a comma and a pipe could both separate the columns"):
        read_rows(str(tmp_path / "d.csv"))


def test_json_lines_under_the_name_of_a_text_say_how_to_rename_them(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(ROW + "\n")
    with pytest.raises(DataError, match="rename it to train.jsonl"):
        read_rows(str(tmp_path / "train.txt"))
