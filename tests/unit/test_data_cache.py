"""The cache: hit by content, miss by anything that decides the ids."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from rung.data.cache import cached_examples
from rung.data.chat import ChatTemplate
from rung.data.tokenize import preflight
from rung.errors import DataError
from rung.types import Message, Record, Source

ROWS = [
    Record((Message("user", f"q {i}"), Message("assistant", "word " * i + "🙂")), Source("d.jsonl", i))
    for i in range(1, 9)
]


def test_hit_gives_the_same_examples_wherever_the_rows_stand(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    chat = ChatTemplate(tiny_tokenizer)
    made = cached_examples(chat, ROWS, max_length=45, overflow="drop", folder=tmp_path)
    assert not made.from_cache and len(made.columns.dropped)
    moved = [replace(r, source=Source("elsewhere.jsonl", r.source.line)) for r in ROWS]
    found = cached_examples(chat, moved, max_length=45, overflow="drop", folder=tmp_path)
    assert found.from_cache
    for a, b in zip(made.examples, found.examples, strict=True):
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.supervised, b.supervised)
        assert b.source.path == "elsewhere.jsonl" and (a.weight, a.group) == (b.weight, b.group)
    assert (found.expected_texts, found.compared_starts) == (made.expected_texts, made.compared_starts)
    assert found.columns.rows["record"].tolist() == made.columns.rows["record"].tolist()
    assert found.columns.dropped.tolist() == made.columns.dropped.tolist()
    assert preflight(chat, found) == preflight(chat, made)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]


def test_everything_that_decides_the_ids_misses(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    chat = ChatTemplate(tiny_tokenizer)
    cached_examples(chat, ROWS, folder=tmp_path)
    template = copy.deepcopy(tiny_tokenizer)
    template.chat_template = (tiny_tokenizer.chat_template or "").replace("'\n' }}{% endfor", "'\n ' }}{% endfor")
    vocabulary = copy.deepcopy(tiny_tokenizer)
    vocabulary.add_tokens(["word"])
    other_eos = copy.deepcopy(tiny_tokenizer)
    other_eos.eos_token = "<|eot_id|>"
    for changed in (template, vocabulary, other_eos):
        assert not cached_examples(ChatTemplate(changed), ROWS, folder=tmp_path).from_cache
    assert not cached_examples(chat, ROWS[1:], folder=tmp_path).from_cache
    assert not cached_examples(chat, ROWS, loss_on="all", folder=tmp_path).from_cache
    assert not cached_examples(chat, ROWS, max_length=99, folder=tmp_path).from_cache
    assert not cached_examples(chat, ROWS, overflow="drop", folder=tmp_path).from_cache
    tiny_tokenizer(["a", "bb bb"], padding=True)  # leaves its traces in the backend
    assert cached_examples(chat, ROWS, folder=tmp_path).from_cache


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_file_is_built_anew(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, damage: str) -> None:
    chat = ChatTemplate(tiny_tokenizer)
    made = cached_examples(chat, ROWS, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    flipped = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
    file.write_bytes({"truncate": data[: len(data) // 2], "flip": flipped, "empty": b""}[damage])
    again = cached_examples(chat, ROWS, folder=tmp_path)
    assert not again.from_cache and again.expected_texts == made.expected_texts
    assert cached_examples(chat, ROWS, folder=tmp_path).from_cache


def test_an_error_stores_nothing(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        cached_examples(ChatTemplate(tiny_tokenizer), ROWS, max_length=4, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_folder_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "here"))
    cached_examples(ChatTemplate(tiny_tokenizer), ROWS)
    assert len(list((tmp_path / "here").rglob("*.safetensors"))) == 1
