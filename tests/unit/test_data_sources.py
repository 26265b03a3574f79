"""Where rows come from: compressed files, other separators, patterns, folders of shards, saved data sets."""

from __future__ import annotations

import bz2
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builders import read_rows
from rung.config.data import DataConfig, WeightedPath
from rung.config.data_files import find_data
from rung.config.evaluation import RetrievalConfig
from rung.config.io import load_config
from rung.config.run import RunConfig
from rung.data.check import inspect_data
from rung.data.formats import load_records
from rung.data.read import stream_rows
from rung.data.splits import load_data
from rung.errors import ConfigError, DataError
from rung.evaluation.retrieval import read_documents
from rung.planning.throughput import guess_data_volume
from rung.types import Source


def zstd(content: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(content)
    return bytes(buffer.getvalue())


COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


def questions(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"question {i}?", "answer": f"answer {i}"} for i in range(start, start + count)]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(file: Path, content: str | bytes) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def refusal(path: str) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    return str(caught.value)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv"])
def test_compressed_files_are_read_as_what_is_in_them(kind: str, suffix: str, tmp_path: Path) -> None:
    rows = questions(3)
    tab = "\t".join
    content = {
        "json": json.dumps(rows),
        "csv": "question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows),
        "tsv": "question\tanswer\n" + "".join(tab(r.values()) + "\n" for r in rows),
    }.get(kind, lines(rows))
    plain = read_rows(write(tmp_path / f"plain.{kind}", content))[0]
    path = write(tmp_path / f"d.{kind}{suffix}", COMPRESS[suffix](content.encode()))
    packed = read_rows(path)[0]
    assert [r.row for r in packed] == [r.row for r in plain] == rows
    assert [r.source for r in packed] == [Source(path, r.source.line) for r in plain]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_damaged_archive_is_refused_with_its_name_and_a_remedy(suffix: str, tmp_path: Path) -> None:
    packed = COMPRESS[suffix](lines(questions(2000)).encode())
    cut = refusal(write(tmp_path / f"cut.jsonl{suffix}", packed[: len(packed) // 2]))
    assert f"cut.jsonl{suffix}" in cut and "download it again" in cut
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    if suffix != ".zst":  # its frames have no checksum here, and another byte may decode
        assert "cannot be read" in refusal(write(tmp_path / f"flipped.jsonl{suffix}", bytes(flipped)))
    misnamed = refusal(write(tmp_path / "plain.jsonl", packed))
    assert f"rename it to plain.jsonl{suffix}" in misnamed
    unpacked = refusal(write(tmp_path / f"plain.csv{suffix}", "question,answer\n"))
    assert "rename it to plain.csv" in unpacked


def test_archives_in_several_members_are_read_to_their_end(tmp_path: Path) -> None:
    """`cat a.gz b.gz` is a gzip file too; a reader that stops at the first member loses the rest."""
    parts = [lines(questions(2)).encode(), lines(questions(2, 2)).encode()]
    for suffix, compress in COMPRESS.items():
        path = write(tmp_path / f"d.jsonl{suffix}", b"".join(map(compress, parts)))
        assert [r.row for r in read_rows(path)[0]] == questions(4)


def test_a_compressed_file_is_read_in_bounded_memory(tmp_path: Path) -> None:
    text = (json.dumps({"question": "q" * 400, "answer": "a"}) + "\n") * 8_000  # 3.5 MB
    path = write(tmp_path / "d.jsonl.gz", gzip.compress(text.encode()))
    del text
    next(iter(stream_rows(path)))  # imports
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    count = sum(1 for _ in stream_rows(path))
    peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert count == 8_000 and peak < 1_500_000, peak


def test_other_kinds_of_archives_say_what_to_do(tmp_path: Path) -> None:
    for name, expected in (
        ("d.zip", "unpack it"),
        ("d.tar.gz", "unpack it"),
        ("d.parquet.gz", "unpack it to d.parquet"),
        ("d.gz", "name what is inside, for example d.jsonl.gz"),
        ("d.xlsx", "save a table as .csv"),
        ("d.txt", 'write each text as {"text": ...}'),
    ):
        assert expected in refusal(write(tmp_path / name, b"x"))


@pytest.mark.parametrize(("separator", "word"), [(";", "semicolon"), ("\t", "tab")])
def test_separators_other_than_commas_are_told(separator: str, word: str, tmp_path: Path) -> None:
    notes: list[str] = []
    text = separator.join(("question", "answer")) + "\n" + separator.join(('"2; 3\t4, 5"', "9,5")) + "\n"
    path = write(tmp_path / "d.csv", text)
    (row,) = stream_rows(path, notes.append)
    assert row[1] == {"question": "2; 3\t4, 5", "answer": "9,5"}
    assert len(notes) == 1 and f"{word}-separated" in notes[0] and path in notes[0]
    assert f"{word}-separated" in str(next(iter(inspect_data(path).detections.values())))


def test_where_two_separators_are_possible_nothing_is_guessed(tmp_path: Path) -> None:
    said = refusal(write(tmp_path / "d.csv", "question;answer;note, if any\n1;2;3\n"))
    assert "this looks semicolon-separated" in said and "quotes" in said
    path = write(tmp_path / "e.csv", '"question; long",answer\n1,2\n')
    assert read_rows(path)[0][0].row == {"question; long": "1", "answer": "2"}
    assert "rename it to f.csv" in refusal(write(tmp_path / "f.tsv", "question,answer\n1,2\n"))
    rows = read_rows(write(tmp_path / "g.csv", 'sep=;\nquestion;answer\n"a\nb";2\n3;4\n'))[0]
    assert [(r.source.line, r.row["question"]) for r in rows] == [(3, "a\nb"), (5, "3")]


def test_json_lists_and_lines_under_the_name_of_the_other(tmp_path: Path) -> None:
    """The last line of a list with an object a line was read as its only row."""
    rows = questions(3)
    listed = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
    for content in (listed, json.dumps(rows), json.dumps(rows, indent=2), "\n [" + json.dumps(rows[0]) + "]"):
        said = refusal(write(tmp_path / "d.jsonl", content))
        assert "a JSON list is .json: rename the file to d.json" in said
    said = refusal(write(tmp_path / "d.jsonl.gz", gzip.compress(listed.encode())))
    assert "rename the file to d.json.gz" in said
    assert "write each object on a line of its own" in refusal(
        write(tmp_path / "d.jsonl", json.dumps(rows[0], indent=2))
    )
    assert "one object per line is .jsonl: rename the file to d.jsonl" in refusal(
        write(tmp_path / "d.json", lines(rows))
    )


def shards(folder: Path) -> Path:
    for i in (2, 0, 1):
        write(folder / f"part-{i}.jsonl", lines(questions(20, 20 * i)))
    write(folder / "README.md", "# Data")
    write(folder / ".hidden.jsonl", "broken")
    return folder


def test_folders_and_patterns_are_read_file_by_file_in_order(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    for path in (str(folder), f"{folder}/*.jsonl", f"{folder}/part-[0-9].jsonl"):
        notes: list[str] = []
        rows = [item for item in stream_rows(path, notes.append)]
        assert [row[1] for row in rows] == questions(60)
        assert rows[20][0] == Source(str(folder / "part-1.jsonl"), 1)
        expected = [f"3 data files of {folder}; not read: .hidden.jsonl, README.md"] if path == str(folder) else []
        assert notes == expected
    report = inspect_data(str(folder))
    assert report.kept_count == 60 and "not read: .hidden.jsonl, README.md" in str(report.detections[str(folder)])


def test_folders_of_several_kinds_or_splits_are_refused_and_named(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    write(folder / "part-0.csv", "question,answer\n1,2\n")
    said = refusal(str(folder))
    assert ".csv (part-0.csv)" in said and ".jsonl (part-0.jsonl)" in said and f"{folder}/*.csv" in said
    assert "several kinds" in refusal(f"{folder}/part*")
    held = tmp_path / "held"
    for name in ("train-0", "train-1", "test"):
        write(held / f"{name}.jsonl", lines(questions(2)))
    said = refusal(str(held))
    assert "different splits" in said and "test: " in said and "test.jsonl" in said
    assert len(read_rows(f"{held}/train*.jsonl")[0]) == 4
    empty = tmp_path / "empty"
    write(empty / "notes.txt", "x")
    assert "holds no data file" in refusal(str(empty)) and "notes.txt" in refusal(str(empty))
    assert "no data file matches" in refusal(f"{held}/*.csv") and "train-0.jsonl" in refusal(f"{held}/*.csv")
    write(empty / "inner" / "a.jsonl", lines(questions(2)))
    assert f"{empty}/**/*.parquet" in refusal(str(empty)) and len(read_rows(f"{empty}/**/*.jsonl")[0]) == 2
    assert "no data is named" in refusal("")  # it would be the current folder
    write(held / "train-2.jsonl", "")
    assert "train-2.jsonl: the file is empty" in refusal(f"{held}/train*.jsonl")


def test_tables_with_other_columns_are_no_shards(tmp_path: Path) -> None:
    """Two tables that lie in one folder are rarely one set: half of the rows would lack their columns."""
    write(tmp_path / "a.csv", "question,answer\n1,2\n")
    write(tmp_path / "b.csv", "answer,question\n4,3\n")
    assert [r.row for r in read_rows(str(tmp_path))[0]][1] == {"question": "3", "answer": "4"}
    write(tmp_path / "c.csv", "question,note\n5,6\n")
    said = refusal(str(tmp_path))
    assert "c.csv: other columns than" in said and "given: note, question" in said and "a.csv" in said


def test_a_rejected_row_of_a_folder_names_its_file(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    write(folder / "part-1.jsonl", lines(questions(2)) + "broken\n")
    with pytest.raises(DataError, match=r"part-1\.jsonl line 3: broken JSON"):
        load_records(DataConfig(path=str(folder)), str(folder))


def test_saved_data_sets_are_read_by_split(tmp_path: Path) -> None:
    one, both = tmp_path / "one", tmp_path / "both"
    train, test = (datasets.Dataset.from_list(questions(3, start)) for start in (0, 10))
    train.save_to_disk(str(one))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(both))
    for path, start in ((one, 0), (both, 0), (f"{both}:test", 10)):
        rows = read_rows(str(path))[0]
        assert [r.row for r in rows] == questions(3, start) and rows[2].source == Source(str(path), 3)
    assert "allowed: train, test" in refusal(f"{both}:dev") and "no such split" in refusal(f"{both}:dev")
    assert "without splits" in refusal(f"{one}:test")
    (one / "data-00000-of-00001.arrow").write_bytes(b"broken")
    assert "cannot be read" in refusal(str(one)) and "save it anew" in refusal(str(one))


def test_fingerprints_follow_every_shard(tmp_path: Path) -> None:
    """A resume compares them: a change in any file of the source must be noticed, another packing must not."""
    folder = shards(tmp_path / "data")
    config = DataConfig(path=str(folder), validation=0.2, test=0.2)
    first = load_data(config, 0).fingerprint
    for file in folder.glob("part-*.jsonl"):
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    packed = config.model_copy(update={"path": f"{folder}/*.gz"})
    assert load_data(packed, 0).fingerprint == first
    file = folder / "part-2.jsonl"
    for content in (lines(questions(20, 41)), ""):
        file.write_text(content) if content else file.unlink()
        assert load_data(config.model_copy(update={"path": f"{folder}/*.jsonl"}), 0).fingerprint != first


def test_weights_hold_for_all_files_of_a_set(tmp_path: Path) -> None:
    """They were found by the path of the set, which no row of a folder has: the set had no row left."""
    folder = shards(tmp_path / "data")
    other = write(tmp_path / "other.jsonl", lines(questions(40, 100)))
    sets = (WeightedPath(path=str(folder), weight=2), WeightedPath(path=other, weight=0.5))
    config = DataConfig(path=sets, validation=0, test=0)
    train = load_data(config, 0).train
    counts = [sum(r.source.path == path for r in train) for path in (str(folder / "part-1.jsonl"), other)]
    assert counts == [40, 20] and len(train) == 140
    twice = (WeightedPath(path=str(folder)), WeightedPath(path=f"{folder}/part-1*"))
    for read in (lambda c: load_data(c, 0), inspect_data):
        with pytest.raises(ConfigError, match=r"names a file in two sets(?s:.*)part-1\.jsonl"):
            read(config.model_copy(update={"path": twice}))


def test_held_out_files_may_be_patterns_and_compressed(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    held_out = write(tmp_path / "test.csv.gz", gzip.compress(b"question;answer\nq;a\n"))
    config = DataConfig(path=f"{folder}/part-[01].jsonl", validation=f"{folder}/part-2*", test=held_out)
    splits = load_data(config, 0)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [40, 20, 1]
    assert "semicolon-separated" in splits.notes["held_out_files"]["test"]["notes"][0]


def test_documents_come_from_the_same_sources(tmp_path: Path) -> None:
    rows = [{"text": f"passage {i}"} for i in range(4)]
    packed = write(tmp_path / "rows" / "a.jsonl.gz", gzip.compress(lines(rows[:2]).encode()))
    write(tmp_path / "rows" / "b.jsonl.gz", gzip.compress(lines(rows[2:]).encode()))
    for path, expected in ((packed, 2), (str(tmp_path / "rows"), 4), (f"{tmp_path}/rows/*.gz", 4)):
        assert read_documents(RetrievalConfig(documents=path)) == [row["text"] for row in rows[:expected]]
    write(tmp_path / "texts" / "a.txt", "one")
    write(tmp_path / "texts" / "b.md", "two")
    assert read_documents(RetrievalConfig(documents=f"{tmp_path}/texts/*.txt")) == ["one"]
    write(tmp_path / "rows" / "README.md", "about the rows")
    with pytest.raises(DataError, match="texts and files of rows"):
        read_documents(RetrievalConfig(documents=str(tmp_path / "rows")))
    with pytest.raises(DataError, match="no document matches"):
        read_documents(RetrievalConfig(documents=f"{tmp_path}/texts/*.TXT.md"))


def test_a_plan_counts_every_file(tmp_path: Path) -> None:
    """A folder counted as no data, so a plan had no time."""
    folder = shards(tmp_path / "data")
    characters = sum(f.stat().st_size for f in folder.glob("part*"))
    for path in (str(folder), f"{folder}/*.jsonl"):
        volume = guess_data_volume(RunConfig(data=DataConfig(path=path, validation=0, test=0), output="runs/x"))
        assert volume is not None and volume.tokens == characters / 4
    packed = write(tmp_path / "d.jsonl.gz", gzip.compress(b"x"))
    volume = guess_data_volume(RunConfig(data=DataConfig(path=packed, validation=0, test=0), output="runs/x"))
    assert volume is not None and volume.tokens == pytest.approx(Path(packed).stat().st_size * 3.1 / 4)
    assert guess_data_volume(RunConfig(data=DataConfig(path=str(tmp_path / "none")), output="runs/x")) is None


def test_a_compressed_data_file_is_no_config(tmp_path: Path) -> None:
    for name in ("d.jsonl.gz", "d.tsv", "d.ndjson"):
        with pytest.raises(ConfigError, match="this is data where a config is asked for"):
            load_config(write(tmp_path / name, b"\x1f\x8b"))


def test_parquet_shards(tmp_path: Path) -> None:
    for i in range(2):
        pq.write_table(pa.Table.from_pylist(questions(2, 2 * i)), tmp_path / f"part-{i}.parquet")
    rows = read_rows(str(tmp_path))[0]
    assert [r.row for r in rows] == questions(4) and rows[3].source == Source(str(tmp_path / "part-1.parquet"), 2)


def test_a_path_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config's path is read by no shell."""
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_data("~/rows.jsonl") == find_data(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("pattern", ["", "/*.jsonl"])
def test_a_link_to_a_shard_that_is_gone_is_refused(tmp_path: Path, pattern: str) -> None:
    """Its rows were missing, and a line among others named it as not read."""
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="b.jsonl: this link points to nothing"):
        find_data(f"{tmp_path}{pattern}")


def test_two_links_to_one_file_are_refused(tmp_path: Path) -> None:
    """Its rows counted twice, and only the number of equal prompts showed it."""
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match=r"two names of one file(?s:.*)a\.jsonl and b\.jsonl"):
            find_data(str(path))
