"""Retrieval: BM25 against its formula, passages, hits, and documents that mean no good."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rung.config.evaluation import RetrievalConfig
from rung.errors import ConfigError, DataError
from rung.evaluation.retrieval import Bm25Index, Library, read_documents, row_contexts, split_passages
from rung.scoring.stats import score_interval
from rung.scoring.words import search_words
from rung.types import Message, Record, Source


def lucene(query: Sequence[str], texts: Sequence[Sequence[str]], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """BM25 as Lucene computes it with exact lengths (Kamphuis et al. 2020, table 1), word by word."""
    mean = sum(map(len, texts)) / len(texts)
    found = []
    for text in texts:
        counts, total = Counter(text), 0.0
        for word in query:
            df = sum(word in other for other in texts)
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            total += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(text) / mean))
        found.append(total)
    return found


TEXT = st.lists(st.sampled_from("abcdefg"), max_size=8)


@given(st.lists(TEXT, min_size=1, max_size=9).filter(any), st.lists(st.sampled_from("abcdefgxyz"), max_size=6))
def test_bm25_is_its_formula(texts: list[list[str]], query: list[str]) -> None:
    index = Bm25Index(texts)
    expected = lucene(query, texts)
    np.testing.assert_allclose(index.scores(query), expected, rtol=1e-12, atol=1e-14)
    order = sorted(range(len(texts)), key=lambda i: (-index.scores(query)[i], i))
    assert index.best(query, 3) == [i for i in order if expected[i] > 0][:3]


def test_ties_go_to_the_earlier_text() -> None:
    texts = [["x"], ["a", "b"], ["b", "a"], ["a", "b"]]
    assert Bm25Index(texts).best(["a", "b"], 2) == [1, 2] and Bm25Index(texts).best(["a"], 9) == [1, 2, 3]


@pytest.mark.parametrize("texts", [[[]], [[], []]])
def test_texts_without_words_are_never_found(texts: list[list[str]]) -> None:
    assert Bm25Index(texts).scores(["a"]).tolist() == [0.0] * len(texts) and Bm25Index(texts).best(["a"], 3) == []
    assert Bm25Index([["a"], []]).best(["a"], 3) == [0]


def test_words_of_any_script() -> None:
    assert search_words("Straße FY2023: 41.5% — 売上, ﬁnance\u00a0Ⅳ") == [
        "strasse",
        "fy2023",
        "41",
        "5",
        "売上",
        "finance",
        "iv",
    ]
    assert search_words("STRASSE") == search_words("straße") and search_words("?! … \n") == []


@given(st.integers(0, 40), st.integers(1, 9), st.data())
def test_passages_hold_every_word_and_share_what_is_stated(count: int, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    text = "".join(f"w{i}" + ("\n\n" if i % 3 else "  ") for i in range(count))
    passages = split_passages(text, size, overlap)
    assert all(passage in text for passage in passages)  # as it stands there, line breaks and all
    found = [[int(word[1:]) for word in passage.split()] for passage in passages]
    assert sorted({number for own in found for number in own}) == list(range(count))
    assert all(own == list(range(own[0], own[0] + min(size, count))) for own in found)
    for first, second in zip(found, found[1:], strict=False):
        shared = len(set(first) & set(second))
        assert shared == overlap or (second is found[-1] and overlap <= shared < size)


def record(question: str, answer: str = "x", context: str | None = None, line: int = 1) -> Record:
    return Record((Message("user", question), Message("assistant", answer)), Source("f", line), context)


def library(documents: Sequence[str], **settings: object) -> Library:
    return Library.from_documents(documents, RetrievalConfig(**settings), "here")  # type: ignore[arg-type]


def test_documents_are_counted_whatever_they_hold() -> None:
    found = library(["apples are red", "", " \n?!", "apples  are\nred", "pears are green"])
    assert found.passages == ("apples are red", "pears are green")
    assert found.notes == {"documents": 5, "empty_documents": 2, "passages": 2, "duplicate_passages": 1}
    with pytest.raises(DataError, match="no document has a word"):
        library(["", "!"])


def test_what_is_found_stands_in_place_of_the_context_best_first() -> None:
    found = library(["pears are green", "apples are red", "red apples, red apples"], top_k=2)
    shown = found.with_passages(record("which APPLES are red?", context="something else"))
    ranked = sorted(
        range(3),
        key=lambda i: -lucene(search_words("which apples are red"), [search_words(p) for p in found.passages])[i],
    )
    assert shown.context == "\n\n".join(found.passages[i] for i in ranked[:2])
    assert shown.messages == record("which APPLES are red?").messages
    assert found.with_passages(record("quid novi?", context="own")).context is None  # no word in common
    assert len(library(["a b", "a c"], top_k=9).find("a")) == 2  # more are asked for than there are
    text = Record((), Source("f", 1), text="a b")
    assert found.with_passages(text) == text


def test_a_hit_is_the_rows_own_context_or_the_answer() -> None:
    long = " ".join(f"w{i}" for i in range(30))
    found = library(
        [f"{long} tail", "the box holds USD 42 million", "the Box holds 4 pears"], chunk_words=10, overlap=2, top_k=1
    )
    rows = [
        record("box with 42 million?", context="The box, holds usd 42"),  # a passage holds it all
        record("w3?", context=f"{long} tail"),  # a passage was cut from inside it
        record("box with 42 million?", context="the box holds USD 43 million"),
        record("pears?", context="the box holds 4 pears and a spoon"),  # a whole document is no piece of it
        record("pears?", answer="4"),
        record("million?", answer="4"),  # 4 is not in 42
        record("nothing known", answer="4"),
    ]
    told = found.hit_rate([Record(**{**_fields(row), "source": Source("f", i)}) for i, row in enumerate(rows)])
    assert told["hits"] == 3 and told["without_passages"] == 1
    assert (told["judged_by_context"], told["judged_by_answer"]) == (4, 3)
    assert told["hit_rate"] == score_interval([1.0] * 3 + [0.0] * 4, binary=True).to_json()
    for i, expected in enumerate([True, True, False, False, True, False, False]):
        assert found.hit_rate([rows[i]])["hits"] == expected, i
    assert told["chunk_words"] == 10 and told["passages"] == len(found.passages)


def _fields(row: Record) -> dict[str, object]:
    return {"messages": row.messages, "context": row.context}


def test_the_fingerprint_is_of_what_can_be_found() -> None:
    assert library(["a b", "c"]).fingerprint == library(["a b", "", "c", "a  b"]).fingerprint
    assert library(["a b", "c"]).fingerprint != library(["a bc"]).fingerprint


def test_documents_come_from_folders_files_and_columns(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    (folder / "inner").mkdir(parents=True)
    (folder / "b.md").write_text("\ufeffsecond ü", encoding="utf-8")
    (folder / "inner" / "c.TXT").write_text("third")
    (folder / "a.txt").write_text("first")
    (folder / "picture.png").write_bytes(b"\xff\x00")
    assert read_documents(RetrievalConfig(documents=str(folder))) == ["first", "second ü", "third"]
    assert read_documents(RetrievalConfig(documents=str(folder / "a.txt"))) == ["first"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one", "body": "two"}\n{"text": "", "body": "three"}\n')
    assert read_documents(RetrievalConfig(documents=str(rows))) == ["one", ""]
    assert read_documents(RetrievalConfig(documents=str(rows), column="body")) == ["two", "three"]
    (tmp_path / "rows.csv").write_text("body\nfour\n")
    assert read_documents(RetrievalConfig(documents=str(tmp_path / "rows.csv"), column="body")) == ["four"]


def test_documents_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "latin.txt").write_bytes("ü".encode("latin-1"))
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    for name, words_ in (
        ("empty", "no document"),
        ("bad", "latin.txt"),
        ("rows.jsonl", "line 2"),
        ("broken.jsonl", "line 2"),
        ("none.txt", "no such file"),
        ("none.jsonl", "no such file"),
    ):
        with pytest.raises(DataError, match=words_):
            read_documents(RetrievalConfig(documents=str(tmp_path / name)))
    with pytest.raises(ConfigError, match="column"):
        read_documents(RetrievalConfig(documents=str(tmp_path / "bad"), column="text"))
    with pytest.raises(DataError, match="'body'"):
        read_documents(RetrievalConfig(documents=str(tmp_path / "rows.jsonl"), column="body"))


def test_own_contexts_stand_once() -> None:
    rows = [record("q", context="a"), record("r", context=" "), record("s"), record("t", context="a")]
    assert row_contexts([rows, [record("u", context="b")]]) == ["a", "b"]
    with pytest.raises(DataError, match="no row has a context"):
        row_contexts([rows[1:3]])


def test_real_questions_find_their_paragraphs(real_data: Path) -> None:
    entries = json.loads(next((real_data / "xquad_en").glob("*.json")).read_text())["data"]
    paragraphs = [(p["context"], q["question"]) for e in entries for p in e["paragraphs"] for q in p["qas"]]
    found = Library.from_documents(
        dict.fromkeys(context for context, _ in paragraphs), RetrievalConfig(chunk_words=2000), "xquad"
    )
    told = found.hit_rate([record(q, context=c, line=i) for i, (c, q) in enumerate(paragraphs)])
    assert told["hit_rate"]["mean"] > 0.9
