"""Hostile input: never a traceback, never a row that is not counted, never a wrong span, never a document lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from chats import TEMPLATES, with_template
from rung.config.data import DataConfig
from rung.config.io import config_to_dict, load_config
from rung.data.chat import ChatTemplate
from rung.data.control_tokens import without_end_token
from rung.data.formats import load_records, read_records
from rung.data.records import Records
from rung.data.splits import assign_splits
from rung.data.tokenize import preflight, tokenize_records
from rung.errors import ConfigError, DataError, RungError
from rung.models.packing import pack
from rung.types import Example, Message, Record, Source

CASES, SOAKED = 400, 10_000
"""Of each property, in `make test` and in `make soak`: five properties."""
HARD = (
    *(
        "\ud800",
        "a\udfffb",
        "\x00",
        "\u202e right to left \u202c",
        "שלום عالم",
        "👩\u200d👩\u200d👧",
        "é" * 3,
        "\r\n",
        "\u2028",
    ),
    *(
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "</s>",
        "<s>",
        "{{ messages }}",
        "{% raw %}",
        "'\"\\",
        "NaN",
        "null",
        " ",
        "",
    ),
)
TEXT = st.one_of(st.sampled_from(HARD), st.text(max_size=12), st.lists(st.sampled_from(HARD), max_size=4).map("".join))
SOUND = TEXT.filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))
"""What the readers let through: half a surrogate pair is no text."""
SCALAR = st.one_of(TEXT, st.none(), st.booleans(), st.integers(), st.floats(), st.just(10**400))
VALUE = st.recursive(
    SCALAR, lambda of: st.one_of(st.lists(of, max_size=3), st.dictionaries(TEXT, of, max_size=3)), max_leaves=6
)
TURN = st.fixed_dictionaries(
    {"role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), VALUE), "content": VALUE}
)
COLUMNS = (
    "question",
    "answer",
    "context",
    "messages",
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "text",
    "conversations",
    "instruction",
    "rejected_response",
    "images",
    "score",
    "weight",
    "tools",
)
ROW = st.one_of(
    st.dictionaries(st.one_of(st.sampled_from(COLUMNS), TEXT), VALUE, max_size=5),
    st.fixed_dictionaries({"question": TEXT, "answer": TEXT}),
    st.fixed_dictionaries({"messages": st.lists(TURN, max_size=4)}),
    st.fixed_dictionaries({"prompt": VALUE, "chosen": TEXT, "rejected": TEXT}),
    st.fixed_dictionaries({"chosen": st.lists(TURN, max_size=3), "rejected": st.lists(TURN, max_size=3)}),
    st.fixed_dictionaries({"conversations": st.lists(TURN, max_size=3), "chosen": VALUE, "rejected": VALUE}),
    VALUE,
)
LINE = st.one_of(ROW.map(lambda row: _encoded(row)), st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")))


def _encoded(row: object) -> bytes:
    """As any writer of JSON may have written it: NaN, lone surrogates and all."""
    return json.dumps(row, ensure_ascii=len(repr(row)) % 2 == 0).encode(errors="surrogatepass")


def often(cases: int, *strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Try a property at once on so many drawn cases."""

    def run(holds: Callable[..., None]) -> None:
        quiet = [
            HealthCheck.too_slow,
            HealthCheck.filter_too_much,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ]
        wrapped = settings(max_examples=cases, deadline=None, database=None, suppress_health_check=quiet)(
            given(*strategies)(holds)
        )
        wrapped()

    return run


def check_readers(cases: int, folder: Path) -> None:
    """Every line is a record, a rejected row, or blank; or the whole file is refused in words."""
    file = folder / "hostile.jsonl"

    @often(cases, st.lists(LINE, max_size=6), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
    def holds(lines: Sequence[bytes], end: bytes, bom: bool) -> None:
        file.write_bytes((b"\xef\xbb\xbf" if bom else b"") + end.join(lines))
        given_rows = [
            n for n, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1) if line.strip()
        ]
        try:
            found = read_records(DataConfig(path=str(file)), str(file))
        except DataError:
            return
        assert len(found.records) + len(found.rejected_rows) == len(given_rows)
        for record in found.records:
            assert record.source.line in given_rows
            assert record.text is not None or record.messages
            "".join([*(m.content for m in record.messages), record.context or ""]).encode()


def check_rejects(cases: int, folder: Path) -> None:
    """Rejected rows stop a run unless they are to be dropped, and are counted either way."""
    file = folder / "some.jsonl"

    @often(cases, st.lists(LINE, max_size=4), st.integers(1, 3))
    def holds(lines: Sequence[bytes], good: int) -> None:
        rows = [json.dumps({"question": f"q {i}", "answer": "a"}).encode() for i in range(good)]
        file.write_bytes(b"\n".join([*rows, *lines]))
        try:
            kept = load_records(DataConfig(path=str(file), rejects="drop", format="question_answer"), str(file))
        except DataError:
            return
        assert len(kept.records) >= good
        if kept.rejected_rows:
            with pytest.raises(DataError, match="rows cannot be used"):
                load_records(DataConfig(path=str(file), format="question_answer"), str(file))


def check_spans(cases: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """What is learned of a conversation decodes to its answer and the stop; or the row is refused in words."""
    chats = [ChatTemplate(with_template(tokenizer, template)) for template, _ in TEMPLATES.values()]

    @often(
        cases,
        st.integers(0, len(chats) - 1),
        st.lists(SOUND, min_size=2, max_size=4).filter(lambda t: len(t) % 2 == 0),
        SOUND,
    )
    def holds(which: int, contents: Sequence[str], context: str) -> None:
        chat, roles = chats[which], ("user", "assistant")
        turns = tuple(Message(roles[i % 2], text) for i, text in enumerate(contents))
        row = Record(turns, Source("d.jsonl", 3), context=context or None)
        for loss_on in ("answer", "assistant_turns"):
            try:
                found = tokenize_records(chat, [row], loss_on=loss_on)  # type: ignore[arg-type]
                preflight(chat, found)
            except RungError as refused:
                assert "d.jsonl" in str(refused) or "no document" in str(refused)
                continue
            (example,) = found.examples
            assert chat.decode([example.ids[example.supervised].tolist()], mid_document=True) == [
                found.expected_texts[0]
            ]
            answers = [
                without_end_token(text, chat.stop_texts)[0]  # as exports leave them
                for i, text in enumerate(contents)
                if i % 2 and (loss_on != "answer" or i == len(contents) - 1)
            ]
            assert all("".join(text.split()) in "".join(found.expected_texts[0].split()) for text in answers)


def check_packing(cases: int) -> None:
    """Every prediction of every document survives, whatever begins like what."""
    ids = st.lists(st.integers(0, 5), min_size=2, max_size=40)

    @often(cases, st.lists(ids, min_size=1, max_size=12), st.integers(1, 200), st.booleans())
    def holds(texts: Sequence[Sequence[int]], budget: int, share: bool) -> None:
        examples = [
            Example(np.array(text, dtype=np.int32), np.arange(len(text)) >= len(text) // 2, Source("d", i))
            for i, text in enumerate(texts)
        ]
        batches = pack(examples, budget, share_prefixes=share)
        packed = [d for batch in batches for d in batch.documents]
        assert sorted(d.source.line for d in packed) == list(range(len(examples)))
        assert sum(len(batch.loss.target) for batch in batches) == sum(e.predictions for e in examples)
        for batch in batches:
            for number, document in enumerate(batch.documents):
                own = batch.loss.target[batch.loss.owner == number].tolist()
                assert own == document.ids[document.supervised & (np.arange(len(document)) > 0)].tolist()


def check_configs(cases: int, folder: Path) -> None:
    """A config is refused in words, or is one that can be written down and read again."""
    file = folder / "hostile.yaml"
    names = (
        "model",
        "data",
        "method",
        "objective",
        "training",
        "evaluation",
        "climb",
        "output",
        "seed",
        "kind",
        "path",
        "rank",
        "name",
    )
    key = st.one_of(st.sampled_from(names), TEXT)
    tree = st.recursive(
        st.one_of(SCALAR, st.sampled_from(["lora", "full", "sft", "smollm2-135m", "d.jsonl", "auto"])),
        lambda of: st.one_of(st.lists(of, max_size=3), st.dictionaries(key, of, max_size=4)),
        max_leaves=12,
    )
    sound = {"model": {"name": "smollm2-135m"}, "data": {"path": "d.jsonl"}, "output": "runs/x"}

    @often(cases, st.dictionaries(key, tree, max_size=4), st.booleans(), st.lists(st.tuples(key, TEXT), max_size=2))
    def holds(given_tree: dict[str, Any], complete: bool, overrides: Sequence[tuple[str, str]]) -> None:
        try:
            text = yaml.safe_dump({**(sound if complete else {}), **given_tree}, allow_unicode=True)
            file.write_bytes(text.encode(errors="surrogatepass"))
        except (yaml.YAMLError, UnicodeError, ValueError):
            assume(False)
        try:
            config = load_config(file, [f"{name}={value}" for name, value in overrides]).config
        except ConfigError as refused:
            assert str(refused)
            return
        json.dumps(config_to_dict(config))

    raw = [
        b"\xff\xfe",
        b"a: &x [*x]\n",
        b"{" * 3000,
        b"data: {path: x, path: y}\n",
        b"!!python/object/apply:os.system ['true']\n",
    ]
    for content in raw:
        file.write_bytes(content)
        with pytest.raises(ConfigError):
            load_config(file)


def check_splits(cases: int) -> None:
    """Each row is in one part; a group, and equal prompts, never in two."""
    rows = st.lists(st.tuples(SOUND, st.one_of(st.none(), st.sampled_from("abc"))), max_size=30)

    @often(cases, rows, st.floats(0, 0.5), st.floats(0, 0.45))
    def holds(given_rows: Sequence[tuple[str, str | None]], validation: float, test: float) -> None:
        records = Records.from_records(
            Record((Message("user", text or "q"), Message("assistant", "a")), Source("d", i + 1), group=group)
            for i, (text, group) in enumerate(given_rows)
        )
        parts = assign_splits(records, validation=validation, test=test)
        own = [{r.source.line for r in part} for part in (parts.train, parts.validation, parts.test)]
        assert sum(map(len, own)) == len(records) and set.union(*own) == {r.source.line for r in records}
        for what in (lambda r: r.group, lambda r: None if r.group else r.messages[0].content):
            found = [{what(r) for r in part} - {None} for part in (parts.train, parts.validation, parts.test)]
            assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
        if records:
            reweighted = Records.from_records(replace(r, weight=2.0) for r in reversed(records))
            again = assign_splits(reweighted, validation=validation, test=test)
            assert {r.source.line for r in again.test} == own[2]


def test_readers(tmp_path: Path) -> None:
    check_readers(CASES, tmp_path)


def test_rejected_rows(tmp_path: Path) -> None:
    check_rejects(CASES // 2, tmp_path)


def test_spans(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    check_spans(CASES, tiny_tokenizer)


def test_packing() -> None:
    check_packing(CASES)


def test_configs(tmp_path: Path) -> None:
    check_configs(CASES, tmp_path)


def test_splits() -> None:
    check_splits(CASES // 2)


@pytest.mark.soak
def test_fifty_thousand_cases(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    check_readers(SOAKED, tmp_path)
    check_rejects(SOAKED // 2, tmp_path)
    check_spans(SOAKED, tiny_tokenizer)
    check_packing(SOAKED)
    check_configs(SOAKED, tmp_path)
    check_splits(SOAKED // 2)


@pytest.mark.parametrize("size", [10_000_000])
def test_a_line_of_ten_megabytes(size: int, tmp_path: Path) -> None:
    """One row: long, not many."""
    file = tmp_path / "long.jsonl"
    rows = [{"question": "q", "answer": "a" * size}, {"question": "r", "answer": "b"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_records(DataConfig(path=str(file)), str(file))
    assert [len(r.answer) for r in found.records] == [size, 1] and not found.rejected_rows


def test_nesting_and_keys_that_stand_twice(tmp_path: Path) -> None:
    file = tmp_path / "deep.jsonl"
    deep = '{"question": "q", "answer": ' + "[" * 100_000 + "]" * 100_000 + "}"
    twice = '{"question": "q", "question": "r", "answer": "a"}'
    file.write_text("\n".join([deep, twice, '{"question": "q", "answer": "a"}']))
    found = read_records(DataConfig(path=str(file)), str(file))
    assert [r.source.line for r in found.records] == [3] and [r.source.line for r in found.rejected_rows] == [1, 2]
