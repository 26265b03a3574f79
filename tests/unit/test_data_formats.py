"""Rows to records: every format, every refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rung.config.data import DataConfig, Format
from rung.data.formats import FORMATS, ColumnCensus, detect, load_records, to_record
from rung.data.messages import TurnFields, message_to_json, tool_calls_text
from rung.data.read import Row
from rung.data.records import Records, encode_record
from rung.errors import DataError
from rung.types import Candidate, Message, Record, Source

AT = Source("d.jsonl", 3)
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def rows(*values: Row) -> ColumnCensus:
    census = ColumnCensus()
    for row in values:
        census.add(row)
    return census


def convert(row: Row, map: dict[str, str] | None = None, group: str | None = None) -> Record:
    found = detect("d.jsonl", rows(row), map or {}, group=group)
    return to_record(found.format, row, AT, map or {}, group)


def turns(record: Record) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in record.messages]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("q"), assistant("a")]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a"},
    ],
)
def test_references_are_further_accepted_answers(row: Row) -> None:
    """They are kept with the record, on disk too, and the answer that is learned stays the same."""
    assert convert({**row, "references": [1, True]}).references == ("1", "true")
    for value in (["b", "c"], '["b", "c"]'):
        record = convert({**row, "references": value})
        assert record.references == ("b", "c") and record.answer == "a"
        assert list(Records.from_records([record])) == [record]
    for nothing in (None, "", []):
        assert convert({**row, "references": nothing}).references == ()
    plain = convert(row)
    assert encode_record(convert({**row, "references": []})) == encode_record(plain)
    for wrong, reason in (
        ("b", "not a list"),
        ([[1]], "reference is a list"),
        ([""], "empty reference"),
        (3, "no list"),
    ):
        with pytest.raises(DataError, match=reason):
            convert({**row, "references": wrong})


def test_references_may_have_any_column_name() -> None:
    """The answers of SQuAD are called so; unmapped, that column could be what is to be learned."""
    row = {"question": "q", "answer": "a", "answers": ["b"]}
    assert convert(row, {"references": "answers"}).references == ("b",)
    with pytest.raises(DataError, match="could both be"):
        convert(row)


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        ({"messages": [user("q"), assistant("a")]}, "messages", [("user", "q"), ("assistant", "a")]),
        (
            {"messages": json.dumps([{"role": "system", "content": ""}, user("q"), assistant("a")])},
            "messages",
            [("system", ""), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, assistant("a")]},
            "messages",
            [("user", "q"), ("assistant", "a")],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "sharegpt",
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]], "system": ""},
            "alpaca",
            [("user", "q"), ("assistant", "a"), ("user", "i\nx"), ("assistant", "o")],
        ),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", [("user", "i"), ("assistant", "o")]),
        ({"prompt": "p", "completion": " c"}, "prompt_completion", [("user", "p"), ("assistant", " c")]),
        (
            {"prompt": [user("p")], "completion": [assistant("c")]},
            "prompt_completion",
            [("user", "p"), ("assistant", "c")],
        ),
        (
            {"question": "q", "answer": "a", "system": "s", "context": None},
            "question_answer",
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        ({"text": "t"}, "text", []),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference", [("user", "p"), ("assistant", "c")]),
        ({"prompt": "p", "ranked": ["b", "w"]}, "ranked", [("user", "p"), ("assistant", "b")]),
        ({"prompt": "p", "answers": ["w", "b"], "scores": [0, 1]}, "rated", [("user", "p"), ("assistant", "b")]),
    ],
)
def test_every_format(row: Row, format: Format, expected: list[tuple[str, str]]) -> None:
    assert detect("d.jsonl", rows(row), {}).format == format
    record = convert(row)
    assert turns(record) == expected
    assert record.source == AT and record.weight == 1.0
    assert record.text == row.get("text")


def test_every_format_is_tried_above() -> None:
    marks = test_every_format.pytestmark  # type: ignore[attr-defined]
    assert {case[1] for case in marks[0].args[1]} | {"unpaired_preference", "prompt_only"} == set(FORMATS)


def test_prompts_alone_are_read_only_where_they_are_asked_for() -> None:
    """Many files have a column of that name; the rows then have nothing to be learned or expected."""
    row = {"prompt": "p", "context": "c", "system": "s"}
    with pytest.raises(DataError, match="fit no known format"):
        detect("d.jsonl", rows(row), {})
    record = to_record("prompt_only", row, AT, {})
    assert (
        record.is_prompt_only and record.context == "c" and [m.role for m in record.messages][:2] == ["system", "user"]
    )
    assert not to_record("preference", {"prompt": "p", "chosen": "a", "rejected": "b"}, AT, {}).is_prompt_only


@pytest.mark.parametrize(("margin", "said"), [(0.0, "no better"), (-1, "no better"), ("much", "not a number")])
def test_a_margin_says_how_much_better(margin: object, said: str) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert to_record("preference", {**pair, "margin": 2.5}, AT, {}).score == 2.5
    assert to_record("preference", {**pair, "margin": None}, AT, {}).score == 1.0
    with pytest.raises(DataError, match=said):
        to_record("preference", {**pair, "margin": margin}, AT, {})


def test_labels_are_read_only_where_they_are_asked_for() -> None:
    """A column of that name may hold a class, or say that an answer is bad: then every answer would be learned."""
    row = {"prompt": "p", "completion": "c", "label": False}
    of_class = {**row, "label": "billing"}
    assert detect("d.jsonl", rows(of_class), {}).format == "prompt_completion" and convert(of_class).score is None
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    beside = ({"label": False}, {"label": "True"}, {"kto_tag": True}, {"is_correct": 0}, {"label": "bad"})
    for answers in ({"prompt": "p", "completion": "c"}, {"messages": turns}, {"question": "q", "answer": "a"}):
        for column in beside:
            with pytest.raises(DataError, match="all of them would be learned"):
                detect("d.jsonl", rows({**answers, **column}), {})
        assert detect("d.jsonl", rows({**answers, "is_correct": "yes, mostly"}), {}).rows == 1
    for answers in ({"messages": turns}, {"question": "q", "answer": "a"}):
        with pytest.raises(DataError, match="'chosen' and 'rejected' stand beside answers"):
            detect("d.jsonl", rows({**answers, "chosen": "a", "rejected": "b"}), {})
    assert detect("d.jsonl", rows({"messages": turns, "label": False}), {}, "messages").format == "messages"
    unpaired = to_record("unpaired_preference", {"messages": turns, "label": "false"}, AT, {})
    assert unpaired.is_undesirable and (unpaired.question, unpaired.answer) == ("q", "a")
    bad = to_record("unpaired_preference", row, AT, {})
    assert (
        bad.score == 0.0
        and bad.is_undesirable
        and not to_record("unpaired_preference", {**row, "label": 1}, AT, {}).is_undesirable
    )
    for label in ("good", None, 2):
        with pytest.raises(DataError, match="not true or false"):
            to_record("unpaired_preference", {**row, "label": label}, AT, {})
    for label, score in (("True", 1.0), ("1", 1.0), ("false", 0.0), (0, 0.0)):
        assert to_record("unpaired_preference", {**row, "label": label}, AT, {}).score == score


def test_optional_columns() -> None:
    row = {"q": "Q", "gold": "A", "context": "C", "weight": "2.5", "filing": 7}
    record = convert(row, {"question": "q", "answer": "gold"}, "filing")
    assert record == Record((Message("user", "Q"), Message("assistant", "A")), AT, "C", None, "7", 2.5)


def test_tools_are_json_text_and_arguments_are_parsed() -> None:
    tools = [{"name": "f", "parameters": {"x": {"default": None}}}]
    messages = [
        user("q"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "content": "", "name": "f"},
        assistant("a"),
    ]
    record = convert({"messages": messages, "tools": tools})
    assert json.loads(record.tools or "") == tools
    assert json.loads(record.messages[1].tool_calls or "") == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]
    assert record.messages[2] == Message("tool", "", name="f")
    shared = convert(
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "r"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": json.dumps(tools),
        }
    )
    assert shared.messages[1].tool_calls == record.messages[1].tool_calls
    assert shared.tools == record.tools


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "answer": None}, "no answer"),
        ({"question": "q", "answer": "  "}, "empty answer"),
        ({"question": "q", "answer": 4.2}, "answer is the number 4.2 of a binary file"),
        ({"question": "q", "answer": ["a"]}, "answer is a list, not text"),
        ({"question": "", "answer": "a"}, "empty question"),
        ({"question": "q", "answer": "\ud83d"}, "lone surrogate"),
        ({"question": "q", "answer": "a", "weight": 0}, "weight is 0, not a positive number"),
        ({"question": "q", "answer": "a", "weight": "x"}, "weight is 'x'"),
        ({"question": "q", "answer": "a", "weight": 10**400}, "weight is 10000"),
        ({"question": "q", "answer": "a", "context": 3}, "context is the number 3"),
        ({"messages": [user("q"), user("r"), assistant("a")]}, "wrong role order: turn 2 is user after user"),
        ({"messages": [assistant("a")]}, "wrong role order: turn 1 is assistant at the start"),
        ({"messages": [user("q"), assistant("a"), {"role": "tool", "content": "r"}]}, "the turn before calls none"),
        ({"messages": [{"role": "boss", "content": "q"}]}, "unknown role 'boss'"),
        ({"messages": [user("q")]}, "no assistant turn"),
        ({"messages": [user("q"), assistant("a"), user("r")]}, "the last turn is user, not assistant"),
        ({"messages": [user("q"), assistant("")]}, "empty answer in messages[1]"),
        ({"messages": [user("q"), assistant(None)]}, "no answer in messages[1]"),
        ({"messages": []}, "empty messages"),
        ({"messages": "["}, "messages is not JSON"),
        ({"messages": ["q"]}, "messages[0] is a text, not an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts that are not text"),
        ({"messages": [user("q"), assistant("a", tool_calls=[3])]}, "a tool call is a number"),
        ({"messages": [user("q"), assistant("a", tool_calls=[{}])]}, "a tool call names no function"),
        ({"messages": [user("q"), assistant("a")], "tools": "{"}, "tools is not JSON"),
        ({"messages": [user("q"), assistant("a")], "tools": [1]}, "tools is not a list of objects"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "unknown role 'alien'"),
        ({"conversations": [3]}, "conversations[0] is a number"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, "history[0] is not a pair"),
        ({"prompt": "p", "completion": [assistant("c")]}, "both be text or both be lists"),
        ({"text": ""}, "empty text"),
        ({"text": 42}, 'text is the number 42, not text: quote it ("42")'),
    ],
)
def test_bad_rows_say_why(row: Row, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        convert(row)
    assert reason in caught.value.summary
    assert caught.value.where == "d.jsonl line 3"


def test_group_must_have_a_value() -> None:
    with pytest.raises(DataError, match="no value in the group column 'g'"):
        convert({"question": "q", "answer": "a", "g": None}, group="g")


def test_detection_looks_at_all_rows_and_counts() -> None:
    census = rows(*[{"question": "q", "answer": "a"}] * 5, {"question": "q", "answer": "a", "context": "c"})
    found = detect("d.jsonl", census, {})
    assert found.mapping == {"question": "question", "answer": "answer", "context": "context"}
    assert found.counts["context"] == 1
    assert "context <- context (1 of 6 rows)" in str(found)


@pytest.mark.parametrize(
    ("values", "map", "group", "message"),
    [
        ([{"question": "q", "answer": "a", "output": "o"}], {}, None, "'answer' and 'output' could both be"),
        ([{"text": "t", "category": "c"}], {}, None, "'text' and 'category' could both be"),
        ([{"text": "t"}, {"question": "q", "answer": "a"}], {}, None, r"question_answer \(1 rows\), text \(1 rows\)"),
        ([{"foo": "q", "bar": "a"}], {}, None, r"fit no known format(?s:.*)foo \(1 rows\)(?s:.*)data.map"),
        (
            [{"q": "q", "answer": "a"}],
            {"question": "query"},
            None,
            "data.map names a column that is not there: 'query'",
        ),
        ([{"q": "q", "answer": "a"}], {"qestion": "q"}, None, "did you mean question"),
        ([{"question": "q", "answer": "a"}], {}, "filing", "data.group names a column that is not there: 'filing'"),
    ],
)
def test_unclear_columns_are_refused(values: list[Row], map: dict[str, str], group: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        detect("d.jsonl", rows(*values), map, group=group)


def test_map_or_format_decides() -> None:
    both = rows({"question": "q", "answer": "a", "output": "o"})
    assert detect("d.jsonl", both, {"answer": "output"}).mapping["answer"] == "output"
    assert detect("d.jsonl", both, {}, "question_answer").mapping["answer"] == "answer"
    banking = rows({"text": "t", "category": "c"})
    assert detect("d.jsonl", banking, {"question": "text", "answer": "category"}).format == "question_answer"
    assert detect("d.jsonl", banking, {}, "text").unused == ("category",)
    with pytest.raises(DataError, match="no column 'instruction', which the format alpaca needs"):
        detect("d.jsonl", banking, {}, "alpaca")


def test_rejects_policy(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    good = '{"question": "q", "answer": "a"}'
    file.write_text("\n".join([good, *['{"question": "q", "answer": [4]}'] * 12, "broken", good]))
    with pytest.raises(DataError) as caught:
        load_records(DataConfig(path=str(file)), str(file))
    text = str(caught.value)
    assert "13 of 15 rows cannot be used" in text and "line 2: answer is a list" in text
    assert "line 11:" in text and "line 12:" not in text and "and 3 more" in text and "data.rejects: drop" in text
    loaded = load_records(DataConfig(path=str(file), rejects="drop"), str(file))
    assert [r.source.line for r in loaded.records] == [1, 15]
    assert [r.source.line for r in loaded.rejected_rows] == list(range(2, 15))
    detection = loaded.detection
    assert detection.format == "question_answer"
    assert detection.mapping == {"question": "question", "answer": "answer"}
    file.write_text('{"question": "q", "answer": [4]}')
    with pytest.raises(DataError, match="no row is left"):
        load_records(DataConfig(path=str(file), rejects="drop"), str(file))


def test_held_out_file_may_lack_the_group(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"question": "q", "answer": "a"}')
    config = DataConfig(path=str(file), group="g")
    assert load_records(config, str(file), held_out=True).records[0].group is None
    with pytest.raises(DataError, match="data.group"):
        load_records(config, str(file))


def test_pairs_rankings_and_ratings_hold_the_best_first() -> None:
    pair = convert({"prompt": "q", "chosen": "good", "rejected": "bad", "input": "more"})
    assert turns(pair) == [("user", "q\nmore"), ("assistant", "good")]
    assert pair.score == 1.0 and pair.candidates == (Candidate("bad", 0.0),)
    ranked = convert({"prompt": [user("q")], "ranked": ["a", "b", [assistant("c")]]})
    assert ranked.answer == "a" and [(r.content, r.score) for r in ranked.candidates] == [("b", 1.0), ("c", 0.0)]
    rated = convert({"prompt": "q", "answers": ["a", "b", "c"], "scores": [1, 4.5, 1], "context": "box"})
    assert rated.answer == "b" and rated.score == 4.5 and rated.context == "box"
    assert [r.content for r in rated.candidates] == ["a", "c"]
    (again,) = Records.from_records([rated])
    assert again == rated


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": [user("b")]}, "not an answer"),
        ({"prompt": "q", "ranked": ["a"]}, "nothing to be compared with"),
        ({"prompt": "q", "ranked": ["a", "b", "a"]}, "two of the answers"),
        ({"prompt": "q", "ranked": "ab"}, "no list"),
        ({"prompt": "q", "answers": ["a", "b"], "scores": [1]}, "2 answers and 1 scores"),
        ({"prompt": "q", "answers": ["a", "b"], "scores": [1, True]}, "not a number"),
        ({"prompt": "q", "answers": ["a", "b"], "scores": [1, float("nan")]}, "not a number"),
        ({"prompt": "q", "answers": ["a", "b"], "scores": [1, 10**400]}, "not a number"),
        ({"prompt": "q", "answers": ["a", "b"], "scores": [2, 2]}, "the same score"),
    ],
    ids=str,
)
def test_rows_that_compare_nothing(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        convert(row)


def test_the_column_of_the_task_counts_as_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "q", "answer": "a", "kind": "sum"}\n')
    found = load_records(DataConfig(path=str(file), task="kind"), str(file))
    assert found.detection.mapping["task"] == "kind" and found.records[0].task == "sum"


def test_fields_of_a_turn_are_honored_or_refused() -> None:
    """They vanished without a word: turns marked as not to be learned were learned."""
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "q", "name": None, "weight": 0},
        {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0, "refusal": None},
        {"role": "tool", "content": "r", "tool_call_id": "call00001", "name": "f"},
        {"role": "assistant", "content": "a", "reasoning_content": "because", "weight": 1},
    ]
    messages = to_record("messages", {"messages": turns}, AT, {}).messages
    assert [m.is_learned for m in messages] == [True, False, True, True]
    assert (messages[2].tool_call_id, messages[2].name, messages[3].reasoning) == ("call00001", "f", "because")
    for name in ("thinking", "reasoning"):
        answer = {"role": "assistant", "content": "a", name: "because", "loss": True}
        assert to_record("messages", {"messages": [turns[0], answer]}, AT, {}).messages[1].reasoning == "because"
    shares = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]}
    assert not to_record("sharegpt", shares, AT, {}).messages[1].is_learned
    old = {"role": "assistant", "content": "Let me look.", "function_call": {"name": "f", "arguments": "{}"}}
    called = to_record("messages", {"messages": [turns[0], old]}, AT, {}).messages[1]
    assert called.content == "Let me look." and json.loads(called.tool_calls or "")[0]["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ({"date": "2024-01-01"}, "field 'date' that is not read for role assistant"),
        ({"tool_call_id": "x"}, "field 'tool_call_id' that is not read"),
        ({"weight": 0.5}, "weight of messages[1] is 0.5, not 0 or 1"),
        ({"weight": 1, "loss": False}, "both that it is learned and that it is not"),
        ({"reasoning": "x", "thinking": "y"}, "two different texts as reasoning"),
    ],
)
def test_fields_that_nothing_reads_are_refused_by_name(field: dict[str, Any], reason: str) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **field}]
    with pytest.raises(DataError, match=re.escape(reason)):
        to_record("messages", {"messages": turns}, AT, {})


def test_ignored_fields_are_counted(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "date": "today", "weight": 1}]
    file = tmp_path / "d.jsonl"
    file.write_text((json.dumps({"messages": turns}) + "\n") * 3)
    loaded = load_records(DataConfig(path=str(file), unknown_fields="ignore"), str(file))
    fields = {"read": {"role": 6, "content": 6}, "honored": {"weight": 3}, "ignored": {"date": 3}}
    assert len(loaded.records) == 3 and loaded.detection.turn_fields == fields
    assert "fields of turns ignored: date (3 turns)" in str(loaded.detection)
    with pytest.raises(DataError, match="3 of 3 rows cannot be used") as refusal:
        load_records(DataConfig(path=str(file)), str(file))
    assert "data.unknown_fields: ignore" in str(refusal.value)


def test_compared_answers_keep_their_tool_calls() -> None:
    """The text of `chosen` alone was learned, and two answers that are only calls were the same."""

    def answer(function: str) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": function, "arguments": "{}"}}
        return [{"role": "assistant", "content": "", "tool_calls": [call]}]

    row = {"prompt": "q", "chosen": answer("f"), "rejected": answer("g"), "tools": [{"name": "f"}, {"name": "g"}]}
    record = to_record("preference", row, AT, {})
    assert "f" in (record.messages[-1].tool_calls or "") and "g" in (record.candidates[0].tool_calls or "")
    assert record.tools == json.dumps(row["tools"])
    again = next(iter(Records.from_records([record])))
    assert again == record
    with pytest.raises(DataError, match="the same"):
        to_record("preference", {**row, "rejected": answer("f")}, AT, {})
    pair = {"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}
    assert to_record("prompt_completion", pair, AT, {}).tools is not None
    assert (
        to_record("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "2.5"}, AT, {}).score == 2.5
    )


def test_references_beside_a_tool_call_are_refused() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(DataError, match="references are texts"):
        to_record("messages", {"messages": turns, "references": ["a"]}, AT, {})


def test_a_turn_is_written_as_it_is_read() -> None:
    """Generated rows lost the tool calls, names and ids of their prompts."""
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "because", "weight": 0},
        {"role": "tool", "content": "r", "name": "f", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "a"},
    ]
    messages = to_record("messages", {"messages": turns}, AT, {}).messages
    assert [message_to_json(message) for message in messages] == turns


@pytest.mark.parametrize("name", ["arguments", "parameters", "args", "input"])
def test_arguments_of_a_call_are_read_under_any_of_their_names(name: str) -> None:
    """Under another name than OpenAI's they vanished, and a call without arguments was learned."""
    for call in ({"name": "f", name: {"x": 1}}, {"type": "function", "function": {"name": "f", name: '{"x": 1}'}}):
        assert json.loads(tool_calls_text(call))[0]["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"name": "f", "arguments": [1]}, "not an object"),
        ({"name": "f", "arguments": 3}, "not an object"),
        ({"name": "", "arguments": {}}, "names no function"),
        ({"name": "f", "arguments": {}, "parameters": {"x": 1}}, "twice"),
        ({"name": "f", "kwargs": {"x": 1}}, "'kwargs', which nothing reads"),
    ],
)
def test_calls_that_would_lose_something_are_refused(call: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        tool_calls_text(call)


def test_older_names_of_tools_and_roles() -> None:
    turns = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "r"},
        {"role": "assistant", "content": "a", "training": False},
    ]
    record = to_record("messages", {"messages": turns, "functions": [{"name": "f"}]}, AT, {})
    assert [m.role for m in record.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert json.loads(record.tools or "") == [{"type": "function", "function": {"name": "f"}}]
    assert not record.messages[-1].is_learned
    shares = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]
    fields = TurnFields()
    to_record("sharegpt", {"conversations": shares}, AT, {}, fields=fields)
    assert fields.summary() == {"read": {"from": 2, "value": 2}, "honored": {"weight 0": 1}}
    with pytest.raises(DataError, match="name it weight"):
        odd = {"role": "assistant", "content": "a", "loss_mask": 0.5}
        to_record("messages", {"messages": [turns[1], odd]}, AT, {})
