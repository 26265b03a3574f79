"""What of a test set stands in the training data: three tiers, each with the rows behind it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rung.config.data import DataConfig
from rung.data import deduplication
from rung.data.contamination import contamination
from rung.data.deduplication import JACCARD_THRESHOLD, fuzzy_duplicates, jaccard, prompt_words, shingles
from rung.data.formats import load_records
from rung.data.records import Records
from rung.types import Message, Record, Source

WORDS = "the a of box pear apple stone river tall old green seven under over walks sees finds keeps near far".split()


def record(question: str, path: str, line: int, context: str | None = None) -> Record:
    return Record((Message("user", question), Message("assistant", "x")), Source(path, line), context)


def records(path: str, *questions: str) -> Records:
    return Records.from_records(record(question, path, line) for line, question in enumerate(questions, 1))


LONG = "how many green apples does the old man find under the tall stone near the river"


def test_tiers_by_hand() -> None:
    train = records("train", "What is it?", f"tell me {LONG} today", "Where do the seven pears grow in autumn?")
    test = records(
        "test",
        "what IS  it?",  # the same but for case and space
        f"{LONG} and why",  # sixteen words in a row
        "Where do the seven pears grow in Autumn, then?",  # 8 words in a row, and most characters
        "Nothing alike stands in any of the others.",
    )
    found = contamination(train, test)
    assert found.exact == (("test line 1", "train line 1"),)
    assert found.flagged("13-gram") == {"test line 2"}
    assert found.flagged("8-gram") == {"test line 2", "test line 3"}
    assert found.ngrams[13][0].matched == LONG and found.ngrams[13][0].train == "train line 2"
    assert found.flagged("fuzzy") == {"test line 1", "test line 3"}  # of the second more than a fifth is not shared
    assert (found.items, found.train) == (4, 3)
    assert list(found.tiers) == ["exact", "13-gram", "8-gram", "fuzzy"]
    assert found.examples("exact") == [{"held_out": "test line 1", "train": "train line 1"}]
    assert json.dumps([found.examples(tier) for tier in found.tiers])


def test_similarity_is_exact_and_counts_shingles() -> None:
    assert shingles("abcdefg") == {"abcde", "bcdef", "cdefg"} and shingles("ab") == {"ab"}
    assert jaccard("abcdefg", "abcdefh") == 2 / 4
    (found,) = fuzzy_duplicates(records("train", LONG), records("test", f"{LONG} now"))
    assert found.jaccard == jaccard(LONG, f"{LONG} now") and found.text == LONG


@pytest.mark.parametrize("compared_pairs", [0, 10**9])
def test_what_minhash_finds_is_what_comparing_all_pairs_finds(
    compared_pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few pairs are all compared, of many those with equal bands of their signatures; both find the same."""
    monkeypatch.setattr(deduplication, "MAX_COMPARED_PAIRS", compared_pairs)
    rng = np.random.default_rng(0)
    train = [" ".join(rng.choice(WORDS, size=rng.integers(3, 25))) for _ in range(150)]
    changed = []
    for text in train[:80]:  # one word in ten, and one more, so that similarities lie on both sides of the bound
        own = [str(rng.choice(WORDS)) if rng.random() < 0.08 else word for word in text.split()]
        changed.append(" ".join(own))
    test = [*changed, *(" ".join(rng.choice(WORDS, size=8)) for _ in range(40))]
    found = {x.held_out: x.jaccard for x in fuzzy_duplicates(records("train", *train), records("test", *test))}
    best = {f"test line {i}": max(jaccard(text, other) for other in train) for i, text in enumerate(test, 1)}
    assert found == {source: similar for source, similar in best.items() if similar >= JACCARD_THRESHOLD}
    assert 20 < len(found) < 100


def test_texts_too_short_or_without_words_do_no_harm() -> None:
    found = fuzzy_duplicates(records("train", "?", "hi", "ok"), records("test", "!", "Hi!", "no"))
    assert [(x.held_out, x.train, x.jaccard) for x in found] == [("test line 2", "train line 2", 1.0)]
    assert fuzzy_duplicates(records("train", "a"), records("test")) == ()


def test_real_gsm8k_and_banking77(real_data: Path) -> None:
    def load(path: Path, **columns: str) -> list[Record]:
        return list(load_records(DataConfig(path=str(path), map=columns), str(path)).records)

    folder = real_data / "gsm8k"
    found = contamination(load(folder / "train.jsonl"), load(folder / "test.jsonl"))
    assert found.items == 1_319 and len(found.exact) == 0
    assert 0 < len(found.ngrams[13]) <= 3 < len(found.ngrams[8]) <= 80  # 3 and 80 against the whole training split
    assert all(len(x.matched.split()) >= 13 for x in found.ngrams[13])
    folder = real_data / "banking77"
    columns = {"question": "text", "answer": "category"}
    train, test = load(folder / "train.csv", **columns), load(folder / "test.csv", **columns)
    found = contamination(train, test)
    assert len(found.exact) == 7
    by_source = {str(r.source): " ".join(prompt_words(r)) for r in [*train, *test]}
    assert found.flagged("exact") <= found.flagged("fuzzy")
    for alike in found.fuzzy:
        assert alike.jaccard == pytest.approx(jaccard(by_source[alike.held_out], by_source[alike.train]))
