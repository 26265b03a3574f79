"""The probability of a pair on its way from a file to a batch: read, exchanged, counted, kept, and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rung.config.data import DataConfig
from rung.data.cache import cached_examples
from rung.data.chat import ChatTemplate
from rung.data.check import inspect_data
from rung.data.formats import LoadedRows, load_records, read_records, to_record
from rung.data.records import Records, encode_record, fingerprint
from rung.errors import DataError
from rung.models.packing import pack, pack_lazily, pack_separately
from rung.objectives.pairs import answer_pairs
from rung.types import Record, Source

AT = Source("d.jsonl", 1)
PAIR = {"prompt": "what is it?", "chosen": "apples", "rejected": "stones"}


def read(folder: Path, rows: list[dict[str, Any]], **config: Any) -> LoadedRows:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(DataConfig(path=str(path), **config), str(path))


def answers(record: Record) -> tuple[str, ...]:
    return (record.answer, *(c.content for c in record.candidates))


@pytest.mark.parametrize("p", [0.5, 0.8, "0.8", 0.999, 1, "1.0"])
def test_a_probability_is_read(p: object) -> None:
    record = to_record("preference", {**PAIR, "probability": p}, AT, {})
    assert record.probability == float(p) and answers(record) == ("apples", "stones")  # type: ignore[arg-type]


@pytest.mark.parametrize("margin", [{}, {"margin": 2.5}])
def test_below_one_half_the_answers_are_exchanged(margin: dict[str, float]) -> None:
    """And nothing else: the margin stays that of the better answer."""
    record = to_record("preference", {**PAIR, **margin, "probability": 0.25}, AT, {})
    other = {**PAIR, **margin, "chosen": "stones", "rejected": "apples", "probability": 0.75}
    assert record == to_record("preference", other, AT, {})
    assert answers(record) == ("stones", "apples") and record.probability == 0.75
    assert (record.score, record.candidates[0].score) == (margin.get("margin", 1.0), 0.0)
    certain = to_record("preference", {**PAIR, **margin, "probability": 0}, AT, {})
    assert answers(certain) == ("stones", "apples") and certain.probability == 1.0


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *((value, "not a number between 0 and 1") for value in (1.01, -0.1, 80, "80%", True, "likely", [0.8])),
        *((value, "not a number between 0 and 1") for value in (float("nan"), float("inf"))),
    ],
)
def test_other_values_are_refused(value: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        to_record("preference", {**PAIR, "probability": value}, AT, {})


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_value_is_a_certain_pair(empty: object) -> None:
    assert to_record("preference", {**PAIR, "probability": empty}, AT, {}) == to_record("preference", PAIR, AT, {})


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_wherever_two_answers_make_one_pair() -> None:
    turns = [{"role": "user", "content": "q"}]
    pairs = (
        ("preference", {"conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"}),
        ("preference", {"instruction": "q", "chosen": "a", "rejected": "b"}),
        ("preference", {"messages": [*turns, answer("a")], "rejected": "b"}),
        ("preference", {"chosen": [*turns, answer("a")], "rejected": [*turns, answer("b")]}),
        ("ranked", {"prompt": "q", "ranked": ["a", "b"]}),
        ("rated", {"prompt": "q", "answers": ["b", "a"], "scores": [1.0, 3.0]}),
    )
    for format, row in pairs:
        record = to_record(format, {**row, "probability": 0.2}, AT, {})  # type: ignore[arg-type]
        assert (answers(record), record.probability) == (("b", "a"), 0.8), row
        # the scores stay in place: the first answer is the better one
        assert record.score == to_record(format, row, AT, {}).score  # type: ignore[arg-type]
    for format, row in (
        ("ranked", {"prompt": "q", "ranked": ["a", "b", "c"]}),
        ("rated", {"prompt": "q", "answers": ["a", "b", "c"], "scores": [3, 2, 1]}),
    ):
        with pytest.raises(DataError, match="that of a pair, and this row compares 3 answers"):
            to_record(format, {**row, "probability": 0.8}, AT, {})  # type: ignore[arg-type]


def test_rows_are_counted_as_the_file_has_them(tmp_path: Path) -> None:
    bad = {**PAIR, "prompt": "bad", "probability": 7}
    values = [0.9, 0.3, None, 0.6]
    rows = [{**PAIR, "prompt": f"q {i}", "probability": p} for i, p in enumerate(values)]
    found = read(tmp_path, [*rows, bad], rejects="drop")
    assert [r.probability for r in found.records] == pytest.approx([0.9, 0.7, None, 0.6])
    assert (found.detection.soft_labels.rows, found.detection.soft_labels.exchanged) == (3, 1)
    assert found.detection.soft_labels.mean == pytest.approx(0.6)
    assert found.detection.notes == (
        "rows without a value in 'probability', whose better answer is certain: 1 of 4",
        "rows with a value below 0.5 in 'probability', whose rejected answer is taken as the better one: 1 of 4",
    )
    assert len(found.rejected_rows) == 1
    assert read(tmp_path, rows[:1]).detection.notes == () == read(tmp_path, [PAIR]).detection.notes


def test_the_report_of_a_file_shows_them(tmp_path: Path) -> None:
    rows = [{**PAIR, "prompt": f"q {i}", "probability": p} for i, p in enumerate([0.9, 0.3, None, 0.5])]
    read(tmp_path, rows)
    report = inspect_data(str(tmp_path / "d.jsonl"))
    found = report.to_json()["probability"]
    assert (found["rows"], found["exchanged"]) == (3, 1) and found["mean"] == pytest.approx(1.7 / 3)
    # a pair of 0.5 has no better answer that could be the longer one
    assert report.answer_lengths is not None and report.answer_lengths.pairs == 3
    read(tmp_path, [PAIR])
    assert inspect_data(str(tmp_path / "d.jsonl")).to_json()["probability"] is None


@pytest.mark.parametrize("column", ["soft_label", "prob", "Probability", "chosen_probability"])
def test_a_column_that_may_be_the_probability_is_asked_about(column: str, tmp_path: Path) -> None:
    rows = [{**PAIR, column: 0.8}]
    with pytest.raises(DataError, match="may be the probability") as refused:
        read(tmp_path, rows)
    assert f"data: {{map: {{probability: {column}}}}}" in str(refused.value.hint)
    assert read(tmp_path, rows, map={"probability": column}).records[0].probability == 0.8
    assert read(tmp_path, rows, format="preference").records[0].probability is None
    assert read(tmp_path, [{**PAIR, "probability": 0.7, column: 0.8}]).records[0].probability == 0.7
    assert read(tmp_path, [{**PAIR, column: None}]).records[0].probability is None


def test_the_map_of_other_names_has_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        read(tmp_path, [{"Prompt": "q", "accepted": "a", "dispreferred": "b", "prob": 0.8}])
    assert "probability: prob" in str(refused.value.hint)


@pytest.mark.parametrize("name", [{}, {"map": {"probability": "sure"}}])
def test_labeled_answers_have_none(name: dict[str, Any], tmp_path: Path) -> None:
    column = name["map"]["probability"] if name else "probability"
    row = {"prompt": "q", "completion": "a", "label": True, column: 0.8}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for labeled in (row, {"messages": turns, "label": True, column: 0.8}):
        with pytest.raises(DataError, match="a labeled answer has no other"):
            read(tmp_path, [labeled], format="unpaired_preference", rejects="drop", **name)
    assert len(read(tmp_path, [{**row, column: None}], format="unpaired_preference").records) == 1


def test_rows_of_other_formats_do_not_read_it(tmp_path: Path) -> None:
    """As a margin there: it is listed as not read."""
    found = read(tmp_path, [{"question": "q", "answer": "a", "probability": 0.8, "margin": 2.0}])
    assert found.detection.unused == ("probability", "margin") and found.records[0].probability is None


def test_records_keep_it_and_their_fingerprint_knows_it() -> None:
    certain, soft = (to_record("preference", {**PAIR, "probability": p}, AT, {}) for p in (None, 0.8))
    assert list(Records.from_records([soft, certain, soft])) == [soft, certain, soft]
    with_references = replace(soft, references=("pears",))
    assert list(Records.from_records([with_references])) == [with_references]
    assert len({fingerprint([r]) for r in (certain, soft, replace(soft, probability=0.9))}) == 3
    # data without probabilities keep the fingerprint that they had
    assert json.loads(encode_record(certain)) == [
        [["user", "what is it?", None, None], ["assistant", "apples", None, None]],
        *(None, None, None, 1.0, None, None, 1.0),
        [["stones", 0.0]],
    ]


def test_it_reaches_the_batch_from_the_cache(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Of every way to pack, and each answer with its own."""
    labels = {f"what is in box {i}?": p for i, p in enumerate([0.8, None, 0.125, 0.5, 0.75])}
    rows = [{**PAIR, "prompt": prompt, "probability": p} for prompt, p in labels.items()]
    records = read(tmp_path, rows).records
    chat, cache = ChatTemplate(tiny_tokenizer), tmp_path / "cache"
    for from_cache in (False, True):
        dataset = cached_examples(chat, records, with_candidates=True, folder=cache)
        assert dataset.from_cache == from_cache
        assert [e.probability for e in dataset.examples] == [
            *(0.8, 1.0 - 0.8, None, None, 0.875, 0.125, 0.5, 0.5, 0.75, 0.25)
        ]
        assert [e.probability for row in dataset.rows for e in row] == [e.probability for e in dataset.examples]
        for batches in (
            pack(dataset.examples, 10_000),
            pack(dataset.examples, 60),
            pack_separately(dataset.examples),
            list(pack_lazily(dataset.examples, 60)),
        ):
            found = {batch.documents[a].row: p for batch in batches for a, p in _labels(batch)}
            assert found == {0: 0.8, 1: 1.0, 2: 0.875, 3: 0.5, 4: 0.75}
    # other labels are other data
    other = [replace(r, probability=0.6) for r in records]
    assert not cached_examples(chat, other, with_candidates=True, folder=cache).from_cache


def _labels(batch: Any) -> list[tuple[int, float]]:
    pairs = answer_pairs(batch)
    return list(zip(pairs.chosen, pairs.probability, strict=True))


def test_a_bad_probability_stops_the_run_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps({**PAIR, "probability": 1.5}) + "\n")
    with pytest.raises(DataError) as refused:
        load_records(DataConfig(path=str(path)), str(path))
    assert "line 2: probability is 1.5, not a number between 0 and 1" in str(refused.value.hint)
