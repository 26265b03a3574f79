"""Rows in the shapes of public data sets and of other tools, with contents of our own.

Each is read as it is meant, or refused with a setting to paste, with which it is then read as it is meant.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from chats import GEMMA, LLAMA2, TEMPLATES, with_template
from rung.config.data import DataConfig, Format
from rung.data.chat import ChatTemplate
from rung.data.check import inspect_data
from rung.data.columns import FORMATS, propose_map
from rung.data.formats import load_records, read_records, to_record
from rung.data.messages import TurnFields
from rung.data.splits import load_data
from rung.data.tokenize import preflight, tokenize_records
from rung.errors import ConfigError, DataError
from rung.types import Message, Record, Source

AT = Source("d.jsonl", 1)
Turns = list[tuple[str, str]]


def u(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def a(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def s(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def shared(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": name, "value": value} for name, value in turns]


def transcript(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


QA: Turns = [("user", "q"), ("assistant", "a")]
TWO: Turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]


class Shape(NamedTuple):
    """A row in the shape of a public set, how it is read, and what its refusal says where it is not read at once."""

    name: str
    row: dict[str, Any]
    format: Format
    turns: Turns
    rejected: str | None = None
    refusal: str | None = None


SHAPES = [
    Shape(
        "Anthropic/hh-rlhf",
        {"chosen": transcript("q", "a", "r", "b"), "rejected": transcript("q", "a", "r", "w")},
        "preference",
        TWO,
        "w",
    ),
    Shape(
        "hh-rlhf with its prompt apart",
        {"prompt": transcript("q", "a", "r", ""), "response": " b", "chosen": " b", "rejected": " w"},
        "preference",
        [*TWO[:3], ("assistant", " b")],
        " w",
    ),
    Shape(
        "HuggingFaceH4/ultrafeedback_binarized",
        {
            "prompt": "q",
            "prompt_id": "1",
            "chosen": [u("q"), a("a")],
            "rejected": [u("q"), a("w")],
            "messages": [u("q"), a("a")],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        "preference",
        QA,
        "w",
        "data.format: messages or data.format: preference",
    ),
    Shape(
        "argilla/dpo-mix-7k",
        {"dataset": "d", "chosen": [s("s"), u("q"), a("a")], "rejected": [s("s"), u("q"), a("w")], "chosen_rating": 5},
        "preference",
        [("system", "s"), *QA],
        "w",
    ),
    Shape(
        "trl-lib/ultrafeedback_binarized",
        {"chosen": [u("q"), a("a")], "rejected": [u("q"), a("w")], "score_chosen": 8.0, "score_rejected": 4.0},
        "preference",
        QA,
        "w",
    ),
    Shape(
        "trl, explicit prompt", {"prompt": [u("q")], "chosen": [a("a")], "rejected": [a("w")]}, "preference", QA, "w"
    ),
    Shape("trl-lib/Capybara", {"source": "x", "messages": [u("q"), a("a")], "num_turns": 1}, "messages", QA),
    Shape("trl-lib/tldr", {"prompt": "q", "completion": "a"}, "prompt_completion", QA),
    Shape(
        "trl-lib/kto-mix-14k",
        {"prompt": [u("q")], "completion": [a("a")], "label": True},
        "unpaired_preference",
        QA,
        refusal="all of them would be learned",
    ),
    Shape(
        "trl-lib/ultrafeedback-prompt",
        {"prompt": [u("q")]},
        "prompt_only",
        [QA[0], ("assistant", "")],
        None,
        "prompt_only",
    ),
    Shape(
        "Intel/orca_dpo_pairs",
        {"system": "s", "question": "q", "chosen": "a", "rejected": "w"},
        "preference",
        [("system", "s"), *QA],
        "w",
        "data: {map: {prompt: question}}",
    ),
    Shape(
        "argilla/distilabel-intel-orca-dpo-pairs",
        {"system": "s", "input": "q", "chosen": "a", "rejected": "w", "status": "tie"},
        "preference",
        [("system", "s"), *QA],
        "w",
        "data: {map: {prompt: input}}",
    ),
    Shape(
        "LLaMA-Factory dpo_en_demo",
        {
            "conversations": shared(("human", "q"), ("gpt", "a"), ("human", "r")),
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "w"},
        },
        "preference",
        TWO,
        "w",
    ),
    Shape(
        "LLaMA-Factory pairs with role and content",
        {"conversations": [u("q")], "system": "s", "chosen": a("a"), "rejected": a("w")},
        "preference",
        [("system", "s"), *QA],
        "w",
    ),
    Shape(
        "LLaMA-Factory pairs, alpaca",
        {"instruction": "q", "input": "more", "chosen": "a", "rejected": "w", "history": [["x", "y"]]},
        "preference",
        [("user", "x"), ("assistant", "y"), ("user", "q\nmore"), ("assistant", "a")],
        "w",
    ),
    Shape(
        "LLaMA-Factory kto_en_demo",
        {"messages": [u("q"), a("a")], "label": True},
        "unpaired_preference",
        QA,
        refusal="all of them would be learned",
    ),
    Shape(
        "LLaMA-Factory alpaca_en_demo",
        {"instruction": "q", "input": "more", "output": "a"},
        "alpaca",
        [("user", "q\nmore"), QA[1]],
    ),
    Shape(
        "LLaMA-Factory glaive_toolcall_en_demo",
        {
            "conversations": shared(
                ("human", "q"),
                ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                ("observation", "r"),
                ("gpt", "b"),
            ),
            "tools": '[{"name": "f"}]',
        },
        "sharegpt",
        [("user", "q"), ("assistant", ""), ("tool", "r"), ("assistant", "b")],
    ),
    Shape(
        "ms-swift, pairs",
        {"messages": [u("q"), a("a")], "rejected_response": "w"},
        "preference",
        QA,
        "w",
        "data: {format: preference, map: {rejected: rejected_response}}",
    ),
    Shape(
        "ms-swift, pairs of conversations",
        {"messages": [u("q"), a("a")], "rejected_messages": [u("q"), a("w")]},
        "preference",
        QA,
        "w",
        "data: {format: preference, map: {rejected: rejected_messages}}",
    ),
    Shape(
        "ms-swift, tools",
        {
            "messages": [
                u("q"),
                {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'},
                {"role": "tool_response", "content": "r"},
                a("b"),
            ]
        },
        "messages",
        [("user", "q"), ("assistant", ""), ("tool", "r"), ("assistant", "b")],
    ),
    Shape(
        "ms-swift, query and response",
        {"query": "q", "response": "a"},
        "question_answer",
        QA,
        refusal="answer: response",
    ),
    Shape("Axolotl chat_template", {"messages": [u("q"), {**a("a"), "training": True}]}, "messages", QA),
    Shape("OpenAI chat", {"messages": [s("s"), u("q"), {**a("a"), "weight": 1}]}, "messages", [("system", "s"), *QA]),
    Shape(
        "OpenAI preference",
        {
            "input": {"messages": [u("q")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [a("a")],
            "non_preferred_output": [a("w")],
        },
        "preference",
        QA,
        "w",
        "data: {map: {prompt: input, chosen: preferred_output, rejected: non_preferred_output}}",
    ),
    Shape(
        "databricks/databricks-dolly-15k",
        {"instruction": "q", "context": "c", "response": "a", "category": "open_qa"},
        "question_answer",
        QA,
        refusal="data: {map: {question: instruction, answer: response}}",
    ),
    Shape(
        "openai/gsm8k", {"question": "q", "answer": "a\n#### 7"}, "question_answer", [QA[0], ("assistant", "a\n#### 7")]
    ),
    Shape(
        "MedQA",
        {"question": "q", "answer": "a", "options": {"A": "a", "B": "b"}, "answer_idx": "A", "meta_info": "step1"},
        "question_answer",
        QA,
    ),
    Shape(
        "tatsu-lab/alpaca",
        {"instruction": "q", "input": "", "output": "a", "text": "### Instruction: q ### Response: a"},
        "alpaca",
        QA,
        refusal="data.format: alpaca or data.format: text",
    ),
    Shape("ShareGPT52k", {"id": "1", "conversations": shared(("human", "q"), ("gpt", "a"))}, "sharegpt", QA),
    Shape(
        "ShareGPT, cut off at its beginning",
        {"id": "1", "conversations": shared(("gpt", "hello"), ("human", "q"), ("gpt", "a"))},
        "sharegpt",
        [("assistant", "hello"), *QA],
    ),
    Shape(
        "cognitivecomputations/dolphin",
        {"instruction": "s", "input": "q", "output": "a"},
        "alpaca",
        [("user", "s\nq"), QA[1]],
    ),
    Shape(
        "a table from a spreadsheet",
        {"Question": "q", "Answer": "a"},
        "question_answer",
        QA,
        refusal="question: Question",
    ),
    Shape(
        "prompt and response", {"prompt": "q", "response": "a"}, "prompt_completion", QA, refusal="completion: response"
    ),
    Shape("Instruction and Output", {"Instruction": "q", "Output": "a"}, "alpaca", QA, refusal="output: Output"),
    Shape(
        "Open-Orca/OpenOrca",
        {"id": "1", "system_prompt": "s", "question": "q", "response": "a"},
        "question_answer",
        [("system", "s"), *QA],
        refusal="data: {map: {answer: response, system: system_prompt}}",
    ),
    Shape("input and output", {"input": "q", "output": "a"}, "question_answer", QA, refusal="question: input"),
    Shape("a classification", {"text": "q", "label": "a"}, "question_answer", QA, refusal="answer: label"),
    Shape(
        "conversations with a label",
        {"conversations": shared(("human", "q"), ("gpt", "a")), "kto_tag": True},
        "unpaired_preference",
        QA,
        refusal="data: {format: unpaired_preference, map: {messages: conversations, label: kto_tag}}",
    ),
    Shape(
        "answers that were judged",
        {"question": "q", "answer": "a", "is_correct": True},
        "unpaired_preference",
        QA,
        refusal="map: {prompt: question, completion: answer, label: is_correct}",
    ),
    Shape("a dialogue", {"dialogue": [u("q"), a("a")]}, "messages", QA, refusal="messages: dialogue"),
]


def write(folder: Path, *rows: dict[str, Any], name: str = "d.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def settings_to_paste(error: DataError, format: Format) -> dict[str, Any]:
    """What the hint says to type: the last `data: {...}` that gives the format, or `data.format: ...`."""
    for match in re.finditer(r"data: (?=\{)", error.hint or ""):
        text = (error.hint or "")[match.end() :]
        depth = 0
        for i, character in enumerate(text):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if not depth:
                return dict(yaml.safe_load(text[: i + 1]))
    assert f"data.format: {format}" in (error.hint or ""), error
    return {"format": format}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_public_shapes_are_read_or_refused_with_what_to_type(shape: Shape, tmp_path: Path) -> None:
    path = write(tmp_path, shape.row)
    settings: dict[str, Any] = {}
    if shape.refusal is not None:
        with pytest.raises(DataError) as caught:
            load_records(DataConfig(path=path), path)
        assert shape.refusal in str(caught.value)
        settings = settings_to_paste(caught.value, shape.format)
    loaded = load_records(DataConfig(path=path, **settings), path)
    (record,) = loaded.records
    assert loaded.detection.format == shape.format
    assert [(m.role, m.content) for m in record.messages] == shape.turns
    assert [c.content for c in record.candidates] == ([] if shape.rejected is None else [shape.rejected])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"segments": [{"label": True, "text": "<s>q"}, {"label": False, "text": "a</s>"}]}, "weight 0 in turns"),
        ({"message_id": "1", "parent_id": None, "text": "q", "role": "prompter", "lang": "en"}, "one turn of a tree"),
        ({"text": "q", "role": "user"}, "one row for each conversation"),
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, "labels of single steps"),
        ({"messages": [u("q <image>"), a("a")], "images": ["a.png"]}, "images belong to this row"),
        ({"messages": [u("q")], "reference_answer": "a"}, "{format: prompt_only, map: {prompt: messages}}"),
        ({"question": "q", "answer": "a", "rejected": "w"}, "map: {prompt: question, chosen: answer}"),
        ({"text": "t", "chosen": "a", "rejected": "b"}, "ambiguous"),
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, "may be the number of one of the choices"),
        ({"question": "q", "options": {"A": "a"}, "answer": 1.0}, "may be the number of one of the options"),
        ({"question": "q", "choices": {"label": ["A"], "text": ["a"]}, "answerKey": "A"}, "text of the right one"),
        (
            {"id": "1", "context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [3]}},
            "as references",
        ),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0}, "the better one as chosen"),
        ({"instruction": "q", "response1": "a", "response2": "b", "annotator1": 1}, "the better one as chosen"),
        ({"message_tree_id": "1", "prompt": {"text": "q", "replies": []}}, "one row for each path"),
        ({"title": "t", "paragraphs": [{"context": "c", "qas": []}]}, "one row for each question"),
        ({"instruction": "q", "instances": [{"input": "", "output": "a"}]}, "one row for each instance"),
        ({"contents": [{"role": "user", "parts": [{"text": "q"}]}]}, "write messages with role and content"),
        ({"question_id": 81, "category": "c", "turns": ["q", "r"]}, "with data.format: prompt_only"),
        ({"question": "q", "answer": ["a", "b"]}, "other accepted answers go into the column references"),
        ({"conversations": [{"human": "q", "assistant": "a"}]}, "conversations[0] has no role"),
    ],
)
def test_other_shapes_are_refused_with_a_reason(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = write(tmp_path, row)
    with pytest.raises(DataError) as caught:
        load_records(DataConfig(path=path), path)
    assert reason in str(caught.value)


def test_columns_of_foreign_shapes_beside_others_say_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "answer": True, "contents": "c", "segments": [], "choices": ["a", "b"]})
    (record,) = load_records(DataConfig(path=path), path).records
    assert (record.question, record.answer) == ("q", "true")


def test_a_second_remedy_keeps_the_map_of_the_first(tmp_path: Path) -> None:
    """MATH-500: the question is named by a map, and then two columns could be the answer."""
    path = write(tmp_path, {"problem": "q", "solution": "s", "answer": "a", "level": 3})
    settings: dict[str, Any] = {}
    for said in ("fit no known format", "'answer' and 'solution' could both"):
        with pytest.raises(DataError, match=said) as caught:
            load_records(DataConfig(path=path, **settings), path)
        settings = settings_to_paste(caught.value, "question_answer")
    (record,) = load_records(DataConfig(path=path, **settings), path).records
    assert (record.question, record.answer) == ("q", "a")


def test_openai_reinforcement_rows_are_prompts_with_their_expected_answer(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": [s("s"), u("q")], "reference_answer": "a"})
    prompts = load_records(DataConfig(path=path, format="prompt_only", map={"prompt": "messages"}), path).records
    assert prompts[0].is_prompt_only and prompts[0].question == "q"
    names = {"prompt": "messages", "completion": "reference_answer"}
    assert load_records(DataConfig(path=path, map=names), path).records[0].answer == "a"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (transcript("q", "a"), transcript("x", "b"), "share no beginning"),
        (transcript("q", "a", "r", "b"), transcript("q", "a"), "differ only in that chosen goes on"),
        (transcript("q", "a"), transcript("q", "a"), "are the same"),
        (transcript("q", "a", "r", "b"), transcript("q", "x", "r", "b"), "differ from turn 2 on"),
        (transcript("q", "a"), "b", "chosen is a conversation, and rejected is an answer alone"),
        ("I like cats", "I like dogs", "no prompt, and chosen and rejected are no conversations"),
        (transcript("q", ""), transcript("q", "b"), "the last turn of chosen is empty"),
        (transcript("", "a"), transcript("", "b"), "turn 1 of chosen is empty"),
        ([u("q"), a("a")], [u("x"), a("b")], "share no beginning"),
        ([u("q"), a("a"), u("r")], [u("q"), a("a"), u("x")], "ends with a turn of the user"),
        ([u("q"), a("a")], [u("q"), a("a"), u("r"), a("b")], "differ only in that rejected goes on"),
    ],
)
def test_pairs_without_a_shared_beginning_say_why(chosen: Any, rejected: Any, reason: str) -> None:
    with pytest.raises(DataError, match=re.escape(reason)):
        to_record("preference", {"chosen": chosen, "rejected": rejected}, AT, {})


@pytest.mark.parametrize("prompt", ["q", "r", [u("q")], [u("q"), a("a"), u("r")], [s("s"), u("q"), a("a"), u("r")]])
def test_a_prompt_that_repeats_the_shared_beginning_is_read_once(prompt: Any) -> None:
    pair = {"chosen": [u("q"), a("a"), u("r"), a("b")], "rejected": [u("q"), a("a"), u("r"), a("w")]}
    record = to_record("preference", {"prompt": prompt, **pair}, AT, {})
    has_system = isinstance(prompt, list) and prompt[0]["role"] == "system"
    assert [(m.role, m.content) for m in record.messages] == [*([("system", "s")] if has_system else []), *TWO]
    with_system = to_record("preference", {"system": "s", **pair}, AT, {})
    assert [m.content for m in with_system.messages] == ["s", "q", "a", "r", "b"]
    with pytest.raises(DataError, match="not the beginning that chosen and rejected share"):
        to_record("preference", {"prompt": "another", **pair}, AT, {})


def test_numbers_and_truth_values_are_answers_as_written_and_counted(tmp_path: Path) -> None:
    """A column `answer: 7` was refused; 1.10 is not 1.1."""
    values = ["7", "-12", "1.10", "1e5", "100000000000000000000000000", "true", "false", '"text"']
    file = tmp_path / "d.jsonl"
    file.write_text("".join(f'{{"question": {i}, "answer": {value}}}\n' for i, value in enumerate(values)))
    report = inspect_data(str(file))
    notes = report.detections[str(file)].notes
    assert notes == (
        "questions that were numbers: 8",
        "answers that were numbers: 5",
        "answers that were true or false: 2",
    )
    assert "answers that were numbers: 5" in str(report.detections[str(file)])
    assert report.to_json()["formats"][str(file)]["notes"] == list(notes)
    records = load_records(DataConfig(path=str(file)), str(file)).records
    assert [r.answer for r in records] == [*values[:-1], "text"] and [r.question for r in records[:2]] == ["0", "1"]
    with file.open("a") as rows:
        rows.write('{"question": 9, "answer": null}\n')
    kept = load_records(DataConfig(path=str(file), rejects="drop"), str(file)).detection.notes
    assert kept == notes  # a row that is left out is not counted
    listed = tmp_path / "d.json"
    listed.write_text('[{"question": "q", "answer": 1.10}]')
    assert load_records(DataConfig(path=str(listed)), str(listed)).records[0].answer == "1.10"


@pytest.mark.parametrize(
    ("row", "turns", "others"),
    [
        ({"instruction": "q", "output": 1}, [("user", "q"), ("assistant", "1")], []),
        ({"prompt": "q", "completion": False}, [("user", "q"), ("assistant", "false")], []),
        ({"messages": [u(2), a(3)]}, [("user", "2"), ("assistant", "3")], []),
        ({"conversations": shared(("human", "q"), ("gpt", 3))}, [("user", "q"), ("assistant", "3")], []),
        ({"prompt": "q", "chosen": 1, "rejected": 2}, [("user", "q"), ("assistant", "1")], ["2"]),
        ({"prompt": "q", "ranked": [1, 2]}, [("user", "q"), ("assistant", "1")], ["2"]),
        ({"prompt": "q", "answers": [1, 2], "scores": [0, 1]}, [("user", "q"), ("assistant", "2")], ["1"]),
    ],
)
def test_numbers_are_answers_in_every_format(
    row: dict[str, Any], turns: Turns, others: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path, row)
    loaded = load_records(DataConfig(path=path), path)
    assert [(m.role, m.content) for m in loaded.records[0].messages] == turns
    assert [c.content for c in loaded.records[0].candidates] == others
    assert any("answers that were" in note for note in loaded.detection.notes)


def test_floats_of_a_binary_file_are_refused(tmp_path: Path) -> None:
    """A column of whole numbers with gaps is stored as 7.0: nobody knows what was written."""
    pq.write_table(pa.table({"question": ["q", "r"], "answer": [7.0, None]}), tmp_path / "d.parquet")
    path = str(tmp_path / "d.parquet")
    reasons = [r.reason for r in read_records(DataConfig(path=path), path).rejected_rows]
    assert reasons[0].startswith("answer is the number 7.0 of a binary file") and "as text" in reasons[0]
    pq.write_table(pa.table({"question": ["q", "r"], "answer": [7, 8]}), tmp_path / "d.parquet")
    assert [r.answer for r in read_records(DataConfig(path=path), path).records] == ["7", "8"]
    datasets.Dataset.from_list([{"question": "q", "answer": True}]).save_to_disk(str(tmp_path / "saved"))
    saved = str(tmp_path / "saved")
    assert read_records(DataConfig(path=saved), saved).records[0].answer == "true"


PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [s(PARTS), u(PARTS), {**a(PARTS), "weight": 1}]},
        {"conversations": [*shared(("system", PARTS), ("human", PARTS), ("gpt", PARTS))]},
        {"prompt": [s(PARTS), u(PARTS)], "completion": [a(PARTS)]},
        {"system": PARTS, "question": PARTS, "answer": PARTS},
        {"system": PARTS, "instruction": PARTS, "output": PARTS},
        {"system": PARTS, "prompt": PARTS, "chosen": PARTS, "rejected": "w"},
        {"system": PARTS, "prompt": PARTS, "chosen": a(PARTS), "rejected": a("w")},
        {"chosen": [s(PARTS), u(PARTS), a(PARTS)], "rejected": [s(PARTS), u(PARTS), a("w")]},
    ],
)
def test_text_parts_are_read_wherever_content_is(row: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, row)
    (record,) = load_records(DataConfig(path=path), path).records
    assert [m.content for m in record.messages] == ["one two"] * 3
    tool = {"role": "tool", "content": PARTS}
    call = {"role": "assistant", "content": PARTS, "tool_calls": [{"name": "f", "arguments": {}}]}
    called = to_record("messages", {"messages": [u("q"), call, tool, a("a")]}, AT, {}).messages
    assert [m.content for m in called] == ["q", "one two", "one two", "a"]


@pytest.mark.parametrize(
    "part",
    [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio", "input_audio": {}}, {"type": "image"}],
)
def test_parts_of_other_types_are_refused_by_name(part: dict[str, Any]) -> None:
    for row in ({"messages": [u([*PARTS, part]), a("a")]}, {"conversations": shared(("human", [part]), ("gpt", "a"))}):
        with pytest.raises(DataError, match=f"parts that are not text, of the type {part['type']}"):
            to_record("messages" if "messages" in row else "sharegpt", row, AT, {})
    with pytest.raises(DataError, match=f"of the type {part['type']}"):
        to_record("preference", {"prompt": "q", "chosen": [part], "rejected": "w"}, AT, {})


def test_role_names_by_a_map(tmp_path: Path) -> None:
    turns = [{"role": "prompter", "content": "q"}, {"role": "bot", "content": "a"}]
    path = write(tmp_path, {"messages": turns}, {"messages": turns}, {"messages": [u("x"), a("y")]})
    with pytest.raises(DataError) as caught:
        load_records(DataConfig(path=path), path)
    assert 'data.roles: {"prompter": user}' in str(caught.value)
    roles = {"prompter": "user", "bot": "assistant"}
    config = DataConfig(path=path, roles=roles, validation=0, test=0)
    loaded = load_records(config, path)
    assert [m.role for r in loaded.records for m in r.messages] == ["user", "assistant"] * 3
    assert "turns of role 'bot', read as assistant: 2" in loaded.detection.notes
    shares = [{"from": "human", "value": "q"}, {"from": "bot", "value": "a"}]
    fields = TurnFields(roles={"bot": "assistant"})
    assert to_record("sharegpt", {"conversations": shares}, AT, {}, fields=fields).answer == "a"
    for read in (lambda c: load_data(c, 0), inspect_data):
        with pytest.raises(ConfigError, match=r"data.roles names a role that no turn has(?s:.*)bott"):
            read(config.model_copy(update={"roles": {**roles, "bott": "assistant"}}))
    with pytest.raises(DataError, match="unknown role 'bot'"):
        load_records(config.model_copy(update={"roles": {"prompter": "user"}}), path)


GREETING = (Message("assistant", "Welcome!"), Message("user", "q"), Message("assistant", "a"))


def learned(chat: ChatTemplate, record: Record, loss_on: Any) -> str:
    tokens = tokenize_records(chat, [record], loss_on=loss_on)
    preflight(chat, tokens)
    (example,) = tokens.examples
    return chat.decode([example.ids[example.supervised].tolist()])[0]


@pytest.mark.parametrize("name", ["chatml", "llama3", "zephyr", "plain", "gemma", "llama2"])
def test_a_greeting_is_context_unless_every_answer_is_learned(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    template, stop = TEMPLATES[name]
    chat = ChatTemplate(with_template(tiny_tokenizer, template))
    for turns in (GREETING, (Message("system", "s"), *GREETING)):
        if name == "gemma" and turns[0].role == "system":
            continue  # it has no system role
        record = Record(turns, AT, context="box")
        assert learned(chat, record, "answer").strip() == f"a{stop}".strip()
        assert "Welcome!" in chat.decode([chat.prompt_ids(turns[:-1])])[0]
        if name != "llama2":  # which opens answers with nothing
            everything = learned(chat, record, "assistant_turns")
            assert [part.strip() for part in everything.split(stop.strip())] == ["Welcome!", "a", ""]
            continue
        with pytest.raises(DataError, match="does not show where the answer before") as caught:
            learned(chat, record, "assistant_turns")
        assert "data.loss_on: answer" in str(caught.value.hint)


def test_a_greeting_that_the_template_refuses_or_drops_is_an_error_of_the_row(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    alternate = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + GEMMA
    drops = LLAMA2.replace("{% else %}", "{% elif not loop.first %}")
    for template, said in ((alternate, "roles must alternate"), (drops, "leaves out the greeting")):
        chat = ChatTemplate(with_template(tiny_tokenizer, template))
        with pytest.raises(DataError, match=said) as caught:
            learned(chat, Record(GREETING, AT), "answer")
        assert caught.value.where == str(AT) and "model.template" in str(caught.value.hint)


def test_an_answer_to_nobody_is_no_greeting() -> None:
    for turns in ([a("x")], [s("s"), a("x")], [a("x"), a("y")], [a("x"), {"role": "tool", "content": "r"}, a("y")]):
        with pytest.raises(DataError, match="wrong role order"):
            to_record("messages", {"messages": turns}, AT, {})


def test_a_column_that_the_map_names_is_read_once(tmp_path: Path) -> None:
    """`prompt: input` gave the prompt, and the column `input` was put behind it once more."""
    row = {"input": "q", "chosen": "a", "rejected": "w"}
    path = write(tmp_path, row)
    loaded = load_records(DataConfig(path=path, map={"prompt": "input"}), path)
    assert loaded.records[0].question == "q" and "input" not in loaded.detection.mapping
    row = {"context": "q", "answer": "a"}
    record = to_record("question_answer", row, AT, {"question": "context"})
    assert (record.question, record.context) == ("q", None)


def test_proposed_maps_are_of_columns_that_are_there_and_of_names_that_are_read() -> None:
    assert propose_map(["a column", "another"]) is None and propose_map(["question", "answer"]) is None
    for columns in (["QUESTION", "Reply"], ["Prompt", "Chosen", "Rejected"], ["Conversations"], ["query", "gold"]):
        proposal = propose_map(columns)
        assert proposal and set(proposal.values()) <= set(columns)
        assert set(proposal) <= {name for format in FORMATS.values() for name in format.names}


@pytest.mark.parametrize(
    ("row", "map"),
    [
        ({"id": 1, "chat_rounds": [u("q"), a("a")]}, {"messages": "chat_rounds"}),
        ({"id": 1, "dialogue_turns": shared(("human", "q"), ("gpt", "a"))}, {"messages": "dialogue_turns"}),
        ({"TEXT": "t", "SOURCE": "s"}, {"text": "TEXT"}),
        ({"completion": "t"}, {"text": "completion"}),
        ({"question": "q", "ground_truth": "a", "model": "m"}, {"answer": "ground_truth"}),
        (
            {"chosen_messages": [u("q"), a("a")], "rejected_messages": [u("q"), a("w")]},
            {"chosen": "chosen_messages", "rejected": "rejected_messages"},
        ),
        ({"question": "q", "pos_answer": "a", "neg_answer": "w"}, {"prompt": "question", "chosen": "pos_answer"}),
    ],
)
def test_columns_are_proposed_by_what_they_hold_and_by_names_of_public_sets(
    tmp_path: Path, row: dict[str, Any], map: dict[str, str]
) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(DataError) as caught:
        load_records(DataConfig(path=str(file)), str(file))
    hint = str(caught.value.hint)
    proposed = yaml.safe_load(hint[hint.index("data: ") + len("data: ") :])["map"]
    assert map.items() <= proposed.items()
    load_records(DataConfig(path=str(file), map=proposed), str(file))


def test_a_conversation_beside_a_pair_may_be_its_prompt(tmp_path: Path) -> None:
    """Axolotl writes the prompt of a pair as `conversation`."""
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"conversation": [u("q")], "chosen": a("a"), "rejected": a("w")}))
    with pytest.raises(DataError, match="map: {prompt: conversation}"):
        load_records(DataConfig(path=str(file)), str(file))
    (record,) = load_records(DataConfig(path=str(file), map={"prompt": "conversation"}), str(file)).records
    assert (record.question, record.answer) == ("q", "a")


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": json.dumps([u("q"), a("a")]), "rejected": json.dumps([u("q"), a("w")])},
        {"prompt": json.dumps([u("q")]), "chosen": json.dumps([a("a")]), "rejected": json.dumps(a("w"))},
        {"prompt": json.dumps([u("q")]), "completion": json.dumps([a("a")])},
        {"chosen": json.dumps({"messages": [u("q"), a("a")]}), "rejected": json.dumps({"messages": [u("q"), a("w")]})},
    ],
)
def test_turns_as_json_in_a_table_are_turns_and_counted(row: dict[str, str]) -> None:
    """A table keeps a list as its text; the answer that would be learned was that text."""
    fields = TurnFields()
    record = to_record("preference" if "chosen" in row else "prompt_completion", row, AT, {}, fields=fields)
    assert [(m.role, m.content) for m in record.messages] == QA
    assert "were turns as JSON" in fields.conversions()[0]


def test_tools_inside_of_json_are_not_lost() -> None:
    text = json.dumps({"messages": [u("q"), a("a")], "tools": [{"name": "f"}]})
    with pytest.raises(DataError, match="write the tools in a column tools"):
        to_record("preference", {"chosen": text, "rejected": text}, AT, {})


def test_answers_that_are_json_stay_text() -> None:
    answer = json.dumps([{"role": "admin", "content": "x"}])
    row = {"prompt": "q", "chosen": answer, "rejected": "[1, 2]"}
    record = to_record("preference", row, AT, {})
    assert (record.answer, record.candidates[0].content) == (answer, "[1, 2]")
    record = to_record("prompt_completion", {"prompt": "q", "completion": json.dumps([a("x")])}, AT, {})
    assert record.answer == json.dumps([a("x")])


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("alpaca", {"instruction": "i", "output": {"age": 57}}, "output is an object, not text; write it as text"),
        ("alpaca", {"instruction": "i", "input": {"x": 1}, "output": "o"}, "input is an object, not text; write it"),
        ("preference", {"prompt": "q", "chosen": {"answer": "a"}, "rejected": "w"}, "an object without a role"),
        ("prompt_completion", {"prompt": "", "completion": "c"}, "write answers to nothing as plain text"),
        ("messages", {"messages": "USER: q\nASSISTANT: a"}, "write a list of turns, each with its role and content"),
        ("messages", {"messages": {"role": ["user"], "content": ["q"]}}, "an object, not a list; write one object"),
    ],
)
def test_refused_values_say_what_to_write(format: Format, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        to_record(format, row, AT, {})
    assert reason in caught.value.summary


def test_rows_without_a_margin_beside_others_are_told(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    pair = {"chosen": "a", "rejected": "w"}
    file.write_text(json.dumps({"prompt": "q", **pair, "margin": 2}) + "\n" + json.dumps({"prompt": "r", **pair}))
    assert read_records(DataConfig(path=str(file)), str(file)).detection.notes == (
        "rows without a value in 'margin', whose margin is 1: 1 of 2",
    )


def test_rows_of_questions_alone_are_proposed_as_prompts(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"question": "q", "sample_id": 7}))
    with pytest.raises(DataError, match="data.format: prompt_only and data.map: {prompt: question}"):
        load_records(DataConfig(path=str(file)), str(file))
    config = DataConfig(path=str(file), format="prompt_only", map={"prompt": "question"})
    assert [r.question for r in load_records(config, str(file)).records] == ["q"]
