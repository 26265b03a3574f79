"""Files to rows: every kind, and every way in which a file is broken."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from builders import read_rows
from rung.data.read import stream_rows
from rung.errors import DataError
from rung.planning import hub


def write(folder: Path, name: str, content: str | bytes) -> str:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def test_jsonl_keeps_line_numbers_and_rejects_broken_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"a": i}) for i in range(16)] + ['{"a": 17,, }', "", "[1]", '{"a": NaN}', '{"a": 1, "a": 2}']
    rows, rejected = read_rows(write(tmp_path, "d.jsonl", "\n".join(lines)))
    assert [s.line for s, _ in rows] == list(range(1, 17))
    assert [r.source.line for r in rejected] == [17, 19, 20, 21]
    reasons = [r.reason for r in rejected]
    assert "broken JSON" in reasons[0] and "(column 10)" in reasons[0]
    assert "not an object" in reasons[1] and "NaN" in reasons[2] and "'a' stands twice" in reasons[3]


def test_bom_crlf_and_unicode_line_separators_are_tolerated(tmp_path: Path) -> None:
    content = '\ufeff{"a": "x\u2028y"}\r\n{"a": "z"}\r\n'
    assert [r["a"] for _, r in read_rows(write(tmp_path, "d.jsonl", content))[0]] == ["x\u2028y", "z"]
    csv, _ = read_rows(write(tmp_path, "d.csv", "\ufeffa,b\r\n1,2\r\n"))
    assert csv[0].row == {"a": "1", "b": "2"}


@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": 2}]', '{"data": [{"a": 1}, {"a": 2}]}'])
def test_json_forms(tmp_path: Path, content: str) -> None:
    rows, _ = read_rows(write(tmp_path, "d.json", content))
    assert [(s.line, r["a"]) for s, r in rows] == [(1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("d.json", '[\n{"a": 1},\n{"a" 2}]', "line 3: broken JSON: Expecting ':' delimiter (column 6)"),
        ("d.json", '{"a": 1}\n{"a": 2}', "rename the file"),
        ("d.json", '{"rows": []}', "not a list of objects"),
        ("d.json", '[{"a": Infinity}]', "Infinity is not JSON"),
        ("d.jsonl", "", "the file is empty"),
        ("d.jsonl", "\n\n", "holds no readable row"),
        ("d.jsonl", "nope\nnope\n", "the first: "),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2: byte 0xff is not UTF-8"),
        ("d.csv", 'a,b\n1,"open\n', "line 2: broken CSV"),
        ("d.csv", "a,a\n1,2\n", "'a' stands twice in the header"),
        ("d.csv", "a,b\n", "holds no readable row"),
        ("d.parquet", "not parquet", "broken parquet"),
        ("d.xlsx", "x", "unknown kind of file"),
    ],
)
def test_broken_files_say_where_and_why(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    with pytest.raises(DataError, match=r"(?s).*") as caught:
        read_rows(write(tmp_path, name, content))
    assert expected in str(caught.value)
    assert name in str(caught.value)


def test_missing_file_names_the_near_one(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "{}")
    with pytest.raises(DataError, match="did you mean train.jsonl"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="no such folder"):
        read_rows(str(tmp_path / "nowhere" / "train.jsonl"))


def test_csv_with_quoted_newlines_keeps_true_lines(tmp_path: Path) -> None:
    rows, rejected = read_rows(write(tmp_path, "d.csv", 'q,a\n"one\ntwo",x\n"three, ""four""",y\nonly\n\n5,z\n'))
    assert [(s.line, r["q"]) for s, r in rows] == [(2, "one\ntwo"), (4, 'three, "four"'), (7, "5")]
    assert [(r.source.line, r.reason) for r in rejected] == [(5, "1 fields, but the header names 2")]


def test_parquet_null_tool_fields_do_not_leak(tmp_path: Path) -> None:
    tools = [
        [{"name": "weather", "parameters": {"city": {"type": "string"}}}],
        [{"name": "clock", "parameters": {"zone": {"type": "string"}}}],
    ]
    pq.write_table(pa.table({"tools": tools, "note": [None, "x"]}), tmp_path / "d.parquet")
    rows, _ = read_rows(str(tmp_path / "d.parquet"))
    assert [r["tools"] for _, r in rows] == tools
    assert [r["note"] for _, r in rows] == [None, "x"]


def test_datasets_name_with_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        if config is None and name == "glue/mrpc":
            raise FileNotFoundError("no such set")
        return datasets.Dataset.from_list([{"question": "q", "answer": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("gsm8k")[0][0].row == {"question": "q", "answer": "a"}
    read_rows("glue/mrpc:test")
    read_rows("openai/gsm8k/main:test")
    read_rows("gsm8k:train[:100]")  # no pattern of files
    assert asked == [
        ("gsm8k", None, "train"),
        ("glue/mrpc", None, "test"),
        ("glue", "mrpc", "test"),
        ("openai/gsm8k", "main", "test"),
        ("gsm8k", None, "train[:100]"),
    ]


def test_unreachable_datasets_name_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> Any:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("rung.data.read.hub_is_reachable", lambda: True)
    with pytest.raises(DataError, match=r"neither a file here(?s:.*)no route(?s:.*)save the set as a file"):
        read_rows("a/b")


def test_a_name_of_the_hub_without_a_network_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The hub's client tried for half a minute, with a line on stderr for each try."""

    def refuse(*arguments: object, **options: object) -> object:
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    hub.hub_is_reachable.cache_clear()
    start = time.perf_counter()
    with pytest.raises(DataError, match="the hub cannot be reached") as error:
        list(stream_rows("owner/some-set"))
    assert time.perf_counter() - start < 5.0 and "save the set as a file" in str(error.value)
    assert "Retrying" not in capfd.readouterr().err
    # a program around Rung keeps its own settings
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
