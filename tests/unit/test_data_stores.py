"""Rows on disk: the same as rows in memory, found again by another process, and no memory that grows with them."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerFast

from builders import read_rows
from rung.config.data import DataConfig
from rung.data.byte_store import BUFFER_BYTES, AppendFile, chunks
from rung.data.cache import cached_examples
from rung.data.chat import ChatTemplate
from rung.data.formats import load_records
from rung.data.records import Records, RecordWriter, distinct_conversations, fingerprint, index_of_first_occurrence
from rung.data.splits import load_data, split_positions
from rung.data.token_store import StoredExamples
from rung.data.tokenize import tokenize_records
from rung.errors import CheckpointError, DataError
from rung.evaluation.prompting import choose_shots
from rung.types import Message, Record, Source

CALL = '[{"type": "function", "function": {"name": "f", "arguments": {}}}]'
ROWS = [
    Record((Message("user", "q\u2028 é🙂"), Message("assistant", "a\n")), Source("d.jsonl", 1)),
    Record((Message("user", "q"), Message("assistant", "a")), Source("d.jsonl", 2), "context", None, "g", 0.1),
    Record((), Source("e.csv", 3), text="plain"),
    Record(
        (
            Message("system", ""),
            Message("user", "q"),
            Message("assistant", "", tool_calls=CALL),
            Message("tool", "", name="f"),
            Message("assistant", "a"),
        ),
        Source("e.csv", 4),
        tools='[{"name": "f"}]',
    ),
]
FEW, MANY = 1_000, 20_000
GROWTH = 20_000_000
"""Bytes. Kept as objects the rows took 62 MB more; on disk they take 11, most of it buffers that then grow no more."""


def write(file: Path, rows: int, answer: str = "a") -> str:
    lines = (json.dumps({"question": f"question {i}", "answer": f"{answer} {i % 7}"}) + "\n" for i in range(rows))
    file.write_text("".join(lines))
    return str(file)


@pytest.mark.parametrize(
    "take",
    [
        lambda x: list(x),
        lambda x: [x[i] for i in range(len(x))],
        lambda x: [x[i] for i in np.arange(len(x))],
        lambda x: [x[-1], x[-len(x)]],
        lambda x: list(x[1:3]),
        lambda x: list(x[::-1]),
        lambda x: list(x[-2:][1:]),
        lambda x: list(x[10:]),
        lambda x: (x[2] in x, x.index(x[3]), x.count(x[0])),
        lambda x: [len(x), len(x[1:]), bool(x), bool(x[:0])],
    ],
)
def test_records_on_disk_are_the_records(take: Callable[[object], object]) -> None:
    assert take(Records.from_records(ROWS)) == take(ROWS)


def test_records_compare_by_content() -> None:
    own = Records.from_records(ROWS)
    assert own == ROWS and own == tuple(ROWS) and own == Records.from_records(ROWS) and own[1:] == ROWS[1:]
    assert own != ROWS[:3] and own != [*ROWS[:3], ROWS[0]] and own != 4
    assert Records.from_records(own) is own and Records.from_records([]) == []
    for i in (4, -5):
        with pytest.raises(IndexError):
            own[i]
    with pytest.raises(TypeError):
        hash(own)


def test_selected_and_joined_records_keep_their_sources() -> None:
    own, other = Records.from_records(ROWS), Records.from_records([replace(ROWS[0], source=Source("f.json", 9))])
    assert own.select(np.array([3, 0, 3])) == [ROWS[3], ROWS[0], ROWS[3]]
    both = Records.concatenate([own, other, own[2:]])
    assert both == [*ROWS, replace(ROWS[0], source=Source("f.json", 9)), *ROWS[2:]]
    assert Records.concatenate([]) == [] and Records.concatenate([own]) is own
    assert both.indices_from_files({"e.csv"}).tolist() == [2, 3, 5, 6] and both.indices_from_files(
        {"f.json"}
    ).tolist() == [4]
    assert [both.source(i) for i in (1, 4)] == [ROWS[1].source, Source("f.json", 9)]


def test_the_fingerprint_is_that_of_the_records() -> None:
    """The values were computed by the code that kept records in memory: splits and fingerprints stay what they were."""
    assert fingerprint(Records.from_records(ROWS)) == fingerprint(ROWS) == fingerprint(iter(ROWS))
    assert fingerprint(ROWS) == "c63333722db2540d43fd10722bc85d79637bec5747e4b9217ed5ef9893e46a74"
    assert split_positions(Records.from_records(ROWS[:2])).tolist() == [0.29139760907040446, 0.32402661774298214]


def test_keys_mark_the_first_and_the_distinct() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 3, size=(200, 2)).astype(np.uint64)
    seen: dict[tuple[int, int], int] = {}
    assert index_of_first_occurrence(keys).tolist() == [
        seen.setdefault((int(a), int(b)), i) for i, (a, b) in enumerate(keys)
    ]
    assert index_of_first_occurrence(keys[:0]).tolist() == []
    copies = [*ROWS, replace(ROWS[1], weight=3.0), replace(ROWS[0], context="other")]
    assert distinct_conversations(copies).tolist() == [0, 4, 3, 5]


def test_chunks_are_bounded_in_number_and_size() -> None:
    sizes = [1, 1, 1, 9, 50, 2, 2, 2, 2]
    assert list(chunks(sizes, int, count=3, limit=10)) == [[1, 1, 1], [9], [50], [2, 2, 2], [2]]
    assert list(chunks([], int, count=3, limit=10)) == []


def test_a_blob_reads_what_was_written_across_buffers() -> None:
    blob, texts = AppendFile.new(), RecordWriter()
    parts = [bytes([i]) * (BUFFER_BYTES // 3 + i) for i in range(8)]
    starts = [blob.append(part) for part in parts]
    assert [blob.read(start, len(part)) for start, part in zip(starts, parts, strict=True)] == parts
    blob.append(b"more")
    assert blob.read(blob.size - 4, 4) == b"more"
    for number, text in ((7, "é"), (9, "\ud83d"), (11, "")):
        texts.add(Record((), Source("d.jsonl", number), text=text))
    assert [(r.source.line, r.text) for r in texts.records()] == [(7, "é"), (9, "\ud83d"), (11, "")]


def test_a_file_cut_short_while_in_use_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "blob"
    file.write_bytes(b"0123456789")
    blob = AppendFile.open(file)
    os.truncate(file, 5)
    with pytest.raises(CheckpointError, match="cut short"):
        blob.read(3, 6)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match=r"could not write(?s:.*)disk space"):
        RecordWriter()


def test_nothing_stays_on_disk_or_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "cache"))
    gc.collect()  # files of earlier tests would be closed in between
    before = len(os.listdir("/proc/self/fd"))
    splits = load_data(DataConfig(path=write(tmp_path / "d.jsonl", 50)), 0)
    assert len(os.listdir("/proc/self/fd")) > before and not list((tmp_path / "cache").iterdir())
    del splits
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("overflow", ["drop", "trim_prompt"])
def test_examples_on_disk_are_the_examples(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, overflow: str
) -> None:
    rows = [replace(row, source=Source("d", i)) for i, row in enumerate([*ROWS[:3], *ROWS[:3]])]
    long = replace(rows[1], messages=(Message("user", "q " * 50), Message("assistant", "a")))
    rows.insert(2, replace(long, source=Source("d", 9)))
    chat = ChatTemplate(tiny_tokenizer)
    made = cached_examples(chat, rows, max_length=60, overflow=overflow, folder=tmp_path)  # type: ignore[arg-type]
    found = cached_examples(chat, Records.from_records(rows), max_length=60, overflow=overflow, folder=tmp_path)  # type: ignore[arg-type]
    assert not made.from_cache and found.from_cache and isinstance(found.examples, StoredExamples)
    assert {**made.summary(), "from_cache": True} == found.summary()
    records = made.columns.rows["record"].tolist()
    assert (records, made.expected_texts, made.compared_starts) == (
        found.columns.rows["record"].tolist(),
        found.expected_texts,
        found.compared_starts,
    )
    for made_table, found_table in (
        (made.columns.dropped, found.columns.dropped),
        (made.columns.trimmed, found.columns.trimmed),
    ):
        assert made_table.tolist() == found_table.tolist()
    assert [record for record, _ in (*found.columns.dropped, *found.columns.trimmed)] == [2]
    for i, (a, b) in enumerate(zip(made.examples, found.examples, strict=True)):
        alone = tokenize_records(chat, [rows[records[i]]], max_length=60, overflow="trim_prompt").examples[0]
        for other in (a, b, found.examples[i - len(found.examples)], found.examples[i:][0]):
            assert other.ids.dtype == np.int32 and other.supervised.dtype == bool
            assert np.array_equal(other.ids, alone.ids) and np.array_equal(other.supervised, alone.supervised)
            assert (other.source, other.weight, other.group) == (alone.source, alone.weight, alone.group)
        b.ids[0] = 0  # an example belongs to who asked for it
    assert np.array_equal(found.examples[0].ids, made.examples[0].ids)
    assert found.lengths.tolist() == [len(e) for e in made.examples]
    assert found.supervised_tokens == sum(int(e.supervised.sum()) for e in made.examples)


def test_another_process_finds_the_cache_and_any_reader_takes_it(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    made = cached_examples(ChatTemplate(tiny_tokenizer), ROWS[:2], folder=tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys; from pathlib import Path; from transformers import AutoTokenizer;"
        "from rung.data import ChatTemplate, cached_examples; from rung.types import *;"
        "rows = [Record((Message('user', 'q\\u2028 é🙂'), Message('assistant', 'a\\n')), Source('x', 5)),"
        "Record((Message('user', 'q'), Message('assistant', 'a')), Source('x', 6), 'context', None, 'g', 0.1)];"
        "chat = ChatTemplate(AutoTokenizer.from_pretrained(sys.argv[1]));"
        "found = cached_examples(chat, rows, folder=Path(sys.argv[2]));"
        "print(found.from_cache, [e.ids.tolist() for e in found.examples])"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "tokenizer"), str(tmp_path)]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"True {[e.ids.tolist() for e in made.examples]}"
    (file,) = tmp_path.glob("*.safetensors")
    stored = load_file(file)
    assert stored["ids"].tolist() == [i for e in made.examples for i in e.ids.tolist()]
    assert stored["supervised"].tolist() == [s for e in made.examples for s in e.supervised.tolist()]


def test_two_that_fill_one_cache_leave_one_whole_file(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Each writes a file of its own and renames it; a reader of the first goes on reading that one."""
    from rung.data import cache

    chat = ChatTemplate(tiny_tokenizer)
    first = cached_examples(chat, ROWS[:2], folder=tmp_path)
    found = cached_examples(chat, ROWS[:2], folder=tmp_path)
    (file,) = tmp_path.iterdir()
    cache._store(file, first.examples._columns)  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == [file]
    assert np.array_equal(found.examples[1].ids, first.examples[1].ids)
    assert cached_examples(chat, ROWS[:2], folder=tmp_path).from_cache


@pytest.mark.parametrize("place", [0.0, 0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_flipped_byte_anywhere_is_noticed(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, place: float
) -> None:
    chat = ChatTemplate(tiny_tokenizer)
    made = cached_examples(chat, ROWS[:3], folder=tmp_path)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 0xFF
    file.write_bytes(data)
    again = cached_examples(chat, ROWS[:3], folder=tmp_path)
    assert not again.from_cache and again.expected_texts == made.expected_texts


def test_a_first_row_that_misleads_costs_a_second_pass_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    rows = [{"question": "q"}, {"question": "q", "answer": "a", "g": 1}, {"question": "r", "answer": [4], "g": 1}]
    file.write_text("\n".join(map(json.dumps, rows)))
    loaded = load_records(DataConfig(path=str(file), rejects="drop", group="g"), str(file))
    assert [(r.source.line, r.group) for r in loaded.records] == [(2, "1")]
    assert [(r.source.line, r.reason[:9]) for r in loaded.rejected_rows] == [(1, "no value "), (3, "answer is")]
    assert loaded.detection.counts == {"question": 3, "answer": 2, "g": 2} and loaded.detection.rows == 3


def test_a_list_in_json_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"a": "x" * i, "b": [i, {"c": "]},"}]} for i in range(40)]
    file = tmp_path / "d.json"
    for indent in (None, 2):
        file.write_text(json.dumps(values, indent=indent) + " \n")
        for piece in (1, 7, 64, 10_000):
            monkeypatch.setattr("rung.data.read.CHUNK_CHARACTERS", piece)
            assert [row for _, row in read_rows(str(file))[0]] == values
    monkeypatch.setattr("rung.data.read.CHUNK_CHARACTERS", 16)
    for text, words in (
        ('[{"a": 1}, {"a": 2} {"a": 3}]', "Expecting ',' delimiter"),
        ('[{"a": 1}, {"a": 2},]', "broken JSON"),
        ('[{"a": 1}, {"a": 2}', "Expecting ',' delimiter"),
        ('[{"a": 1}, {"a": 2}] 3', "Extra data"),
        ('[{"a": 1}, {"a": 2, "a": 3}]', "'a' stands twice"),
        ("[]", "holds no readable row"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=words):
            read_rows(str(file))
    file.write_text('[{"a": 1}, 12345, [], {"a": 2}]')
    rows, rejected = read_rows(str(file))
    assert [s.line for s, _ in rows] == [1, 4] and [r.source.line for r in rejected] == [2, 3]


def test_a_huge_line_and_half_characters_are_rows_like_others(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    call = {"function": {"name": "f", "arguments": {"x": "\ud83d"}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    rows = [
        {"messages": [{"role": "user", "content": "q " * 5_000_000}, {"role": "assistant", "content": "a"}]},
        {"messages": [*turns, {"role": "tool", "content": "t"}, {"role": "assistant", "content": "a"}]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    loaded = load_records(DataConfig(path=str(file), rejects="drop"), str(file))
    assert [len(r.question) for r in loaded.records] == [10_000_000]
    assert [str(r) for r in loaded.rejected_rows] == [
        f"{file} line 2: tool_calls holds half a character (a lone surrogate) at position 68"
    ]


def test_memory_does_not_grow_with_the_rows(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak resident memory of reading, splitting, tokenizing and the preflight, in a process of its own."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys; from pathlib import Path; from transformers import PreTrainedTokenizerFast;"
        "from rung.data import ChatTemplate, cached_examples, load_data; from rung.config.data import DataConfig\n"
        "from rung.data.tokenize import preflight\n"
        "chat = ChatTemplate(PreTrainedTokenizerFast.from_pretrained(sys.argv[1]))\n"
        "for path in (sys.argv[2], *sys.argv[2:]):\n"  # the first once more: what it leaves is there already
        "    Path('/proc/self/clear_refs').write_text('5')\n"
        "    splits = load_data(DataConfig(path=path), 0)\n"
        "    splits.summary()\n"
        "    preflight(chat, cached_examples(chat, splits.train))\n"
        "    print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    )
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "cache"))
    files = [write(tmp_path / f"{rows}.jsonl", rows, "word " * 10) for rows in (FEW, MANY)]
    arguments = [sys.executable, "-c", code, str(tmp_path / "tokenizer"), *files]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    _, few, many = (int(line) * 1024 for line in out.split())
    assert many - few < GROWTH, (few, many)


def test_worked_examples_are_drawn_as_from_memory(tmp_path: Path) -> None:
    rows = [replace(ROWS[1], messages=(Message("user", f"q {i % 9}"), Message("assistant", "a"))) for i in range(30)]
    rows = [replace(row, source=Source("d", i), group=f"g{i % 4}") for i, row in enumerate(rows)]
    chosen = choose_shots(Records.from_records([*rows, ROWS[2]]), 6, 0)
    assert choose_shots(Records.from_records(rows), 0, 0) == ()
    assert len({shot.question for shot in chosen}) == 6 and len({shot.group for shot in chosen[:3]}) == 3
    assert min(shot.source.line for shot in chosen) >= 21  # of copies the last
    with pytest.raises(DataError, match="the training split has 9 rows"):
        choose_shots(Records.from_records(rows), 10, 0)
