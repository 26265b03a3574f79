"""Splits and mixtures: nothing moves, nothing crosses, everything is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rung.config.data import DataConfig, WeightedPath
from rung.data.records import Records, normalized_prompt
from rung.data.splits import (
    assign_splits,
    duplicate_pairs,
    limit_records,
    load_data,
    overlapping_pairs,
    repeat_by_weight,
    split,
    split_positions,
)
from rung.errors import ConfigError, DataError
from rung.types import Message, Record, Source


def record(question: str, answer: str = "a", *, path: str = "d.jsonl", line: int = 1, **more: Any) -> Record:
    return Record((Message("user", question), Message("assistant", answer)), Source(path, line), **more)


def records(n: int, **more: Any) -> Records:
    return Records.from_records(record(f"question {i}", line=i + 1, **more) for i in range(n))


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    file = folder / name
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def rows(n: int, start: int = 0, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"question {i}", "answer": "a", **more} for i in range(start, start + n)]


def position(row: Record) -> float:
    return float(split_positions(Records.from_records([row]))[0])


def crossing_count(left: Sequence[Record], right: Sequence[Record]) -> int:
    return len(overlapping_pairs(Records.from_records(left), Records.from_records(right))[0])


def test_position_is_the_same_in_every_process() -> None:
    code = (
        "from rung.data.records import Records; from rung.data.splits import split_positions; from rung.types import *;"
        "rows = [Record((Message('user','Naïve  Q'),Message('assistant','a')),Source('x',1))];"
        "print(split_positions(Records.from_records(rows))[0])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) == position(record("naïve q", "other"))


def test_shares_are_about_right_and_rows_never_move() -> None:
    few, many = (
        assign_splits(records(1000), validation=0.1, test=0.2),
        assign_splits(records(3000), validation=0.1, test=0.2),
    )
    assert abs(len(few.test) - 200) < 50 and abs(len(few.validation) - 100) < 40
    assert set(few.test) <= set(many.test)
    assert set(few.validation) <= set(many.validation)
    assert set(few.train) <= set(many.train)


def test_a_larger_test_share_takes_no_test_row_back() -> None:
    assert set(assign_splits(records(500), validation=0.1, test=0.1).test) <= set(
        assign_splits(records(500), validation=0.1, test=0.3).test
    )


def test_duplicates_never_cross_and_stay() -> None:
    twice = [*records(300), *(record(f"Question   {i}", "other", line=1000 + i) for i in range(300))]
    parts = split(Records.from_records(twice), DataConfig(path="d"))
    assert sum(map(len, (parts.train, parts.validation, parts.test))) == 600
    assert not crossing_count(parts.train, [*parts.validation, *parts.test])
    assert (
        parts.summary()["train"]["duplicate_prompts"] == len(duplicate_pairs(parts.train)[0]) == len(parts.train) // 2
    )


def test_groups_stay_together() -> None:
    rows = Records.from_records(record(f"q {i}", group=f"g{i % 40}") for i in range(400))
    parts = split(rows, DataConfig(path="d", group="g"))
    found = [{r.group for r in part} for part in (parts.train, parts.validation, parts.test)]
    assert sum(map(len, found)) == len(set.union(*found)) == 40
    assert parts.summary()["groups_shared_with_held_out"] == 0


def test_prompt_is_context_and_turns_before_the_answer() -> None:
    assert normalized_prompt(record("Q", context="C  c")) == "c c user: q"
    assert normalized_prompt(Record((), Source("d", 1), text="A\n B")) == "a b"
    assert position(record("q", context="c")) != position(record("q"))


@pytest.mark.parametrize(
    ("config", "n", "message"),
    [
        (DataConfig(path="d", validation=0, test=0.0001), 5, "the test split is empty(?s:.*)data.test: 0"),
        (DataConfig(path="d", validation=0.0001, test=0), 5, "the validation split is empty"),
        (DataConfig(path="d", validation=0, test=0.99), 2, "the training split is empty"),
    ],
)
def test_empty_splits_are_refused(config: DataConfig, n: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(records(n), config)


def test_shares_beyond_everything_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave no training rows"):
        split(records(5), DataConfig(path="d", validation=0.5, test=0.5))


def test_overlap_with_a_held_out_file(tmp_path: Path) -> None:
    train = write(tmp_path, "train.jsonl", rows(50))
    test = write(tmp_path, "test.jsonl", [{"question": "QUESTION  7", "answer": "b"}, *rows(3, start=100)])
    config = DataConfig(path=train, test=test, validation=0)
    with pytest.raises(DataError) as caught:
        load_data(config, 0)
    text = str(caught.value)
    assert "1 prompts stand in both train and test" in text and "train.jsonl line 8 = " in text
    assert "test.jsonl line 1" in text and "drop_train" in text
    parts = load_data(config.model_copy(update={"overlap": "drop_train"}), 0)
    assert len(parts.train) == 49 and len(parts.test) == 4
    assert parts.summary()["overlap_dropped"] == 1
    assert not crossing_count(parts.train, parts.test)


def test_dropping_every_training_row_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "d.jsonl", rows(3))
    other = write(tmp_path, "e.jsonl", rows(3))
    with pytest.raises(DataError, match="every training prompt"):
        load_data(DataConfig(path=file, validation=0, test=other, overlap="drop_train"), 0)


def test_the_same_prompt_in_two_groups_is_overlap() -> None:
    crossing = [record("the same", group=f"g{i}", line=i) for i in range(60)]
    with pytest.raises(DataError, match="the same prompt in two groups"):
        split(Records.from_records(crossing), DataConfig(path="d", group="g"))


def test_mixture_weighs_training_rows_only(tmp_path: Path) -> None:
    paths = (
        WeightedPath(path=write(tmp_path, "a.jsonl", rows(200)), weight=2),
        WeightedPath(path=write(tmp_path, "b.jsonl", rows(200, start=1000)), weight=0.5),
        WeightedPath(path=write(tmp_path, "c.jsonl", rows(200, start=2000)), weight=1.5),
    )
    parts = load_data(DataConfig(path=paths), 0)
    plain = load_data(DataConfig(path=tuple(WeightedPath(path=p.path) for p in paths)), 0)
    assert parts.validation == plain.validation and parts.test == plain.test
    before = Counter(r.source.path for r in plain.train)
    after = Counter(r.source.path for r in parts.train)
    assert [after[p.path] for p in paths] == [int(before[p.path] * p.weight) for p in paths]
    assert not crossing_count(parts.train, [*parts.validation, *parts.test])
    assert parts == load_data(DataConfig(path=paths), 1)
    summary = parts.summary()
    assert [s["weight"] for s in summary["sets"]] == [2, 0.5, 1.5]
    assert summary["rows_before_weights"] == len(plain.train)
    assert json.loads(json.dumps(summary)) == summary


def test_fractional_weight_does_not_depend_on_the_order_of_the_file() -> None:
    own = records(101)
    half = repeat_by_weight(own, [({"d.jsonl"}, 0.5)])
    assert len(half) == 50 and len(set(half)) == 50
    assert set(half) == set(repeat_by_weight(own[::-1], [({"d.jsonl"}, 0.5)]))
    assert Counter(Counter(repeat_by_weight(own, [({"d.jsonl"}, 1.5)])).values()) == {1: 51, 2: 50}


def test_a_set_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="names a set twice"):
        load_data(DataConfig(path=(WeightedPath(path="a.jsonl"), WeightedPath(path="a.jsonl"))), 0)
    with pytest.raises(ConfigError, match="names no data set"):
        load_data(DataConfig(path=()), 0)


def test_limit_is_drawn_by_the_seed_after_the_split(tmp_path: Path) -> None:
    file = write(tmp_path, "d.jsonl", rows(300))
    whole, ten = load_data(DataConfig(path=file), 0), load_data(DataConfig(path=file, limit=10), 0)
    assert len(ten.train) == 10 and (ten.validation, ten.test) == (whole.validation, whole.test)
    assert set(ten.train) <= set(load_data(DataConfig(path=file, limit=20), 0).train)
    assert ten.train != load_data(DataConfig(path=file, limit=10), 1).train
    assert limit_records(whole.train, 10_000, 0) == whole.train


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    one = load_data(DataConfig(path=write(tmp_path, "a.jsonl", rows(100))), 0)
    same = load_data(DataConfig(path=write(tmp_path, "b.jsonl", rows(100))), 0)
    other = load_data(DataConfig(path=write(tmp_path, "c.jsonl", rows(100, weight=2.0))), 0)
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_real_banking77_overlap_is_found(real_data: Path) -> None:
    config = DataConfig(
        path=str(real_data / "banking77" / "train.csv"),
        map={"question": "text", "answer": "category"},
        validation=0,
        test=str(real_data / "banking77" / "test.csv"),
        overlap="drop_train",
    )
    parts = load_data(config, 0)
    assert parts.summary()["overlap_dropped"] >= 7
    assert len(parts.train) + parts.summary()["overlap_dropped"] == 10_003
