"""Worked examples: drawn, nearest to a question, or covering the words of all."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import e

from hypothesis import given
from hypothesis import strategies as st

from rung.evaluation.prompting import PromptFormat, choose_shots, coverage_shots, nearest_shots
from rung.evaluation.retrieval import Bm25Index
from rung.scoring.words import search_words
from rung.types import Message, Record, Source

TEXTS = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=5), min_size=1, max_size=7)


def covered(texts: list[list[str]], chosen: list[int]) -> int:
    """Weight of the words in the chosen texts: each as many texts as it stands in."""
    return sum(sum(word in text for text in texts) for word in {w for i in chosen for w in texts[i]})


@given(TEXTS, st.integers(1, 7))
def test_coverage_is_greedy_by_sets(texts: list[list[str]], count: int) -> None:
    expected: list[int] = []
    done: list[int] = []  # those that count towards what is covered; begun anew when all words are
    while len(expected) < min(count, len(texts)):
        free = [i for i in range(len(texts)) if i not in expected]
        gains = [covered(texts, [*done, i]) - covered(texts, done) for i in free]
        if max(gains) == 0 and done:
            done = []
            gains = [covered(texts, [i]) for i in free]
        taken = free[gains.index(max(gains))]
        expected.append(taken)
        done.append(taken)
    assert coverage_shots(texts, count) == expected


@given(TEXTS, st.integers(1, 3))
def test_coverage_is_near_the_best_there_is(texts: list[list[str]], count: int) -> None:
    count = min(count, len(texts))
    best = max(covered(texts, list(chosen)) for chosen in combinations(range(len(texts)), count))
    assert covered(texts, coverage_shots(texts, count)) >= (1 - 1 / e) * best - 1e-9


def rows(*questions: str) -> list[Record]:
    return [
        Record((Message("user", q), Message("assistant", f"answer {i}")), Source("f", i), group=f"g{i % 2}")
        for i, q in enumerate(questions)
    ]


def test_nearest_are_bm25s_best_with_the_nearest_last() -> None:
    train = rows("red apples", "green pears", "what is red?", "red apples", "what are apples?", "!")
    scores = Bm25Index([search_words(r.question) for r in train]).scores(search_words("what are red apples?"))
    nearest = nearest_shots(train, 3)
    (asked,) = rows("What are RED apples?")
    order = sorted(range(6), key=lambda i: (-scores[i], i))
    assert [r.source.line for r in nearest(asked)] == order[:3][::-1] and scores[order[2]] > 0
    (strange,) = rows("quid novi")
    assert [r.source.line for r in nearest(strange)] == [2, 1, 0]  # nothing in common: still three, and the same ones


def test_covering_shots_are_fixed_and_say_what_others_do() -> None:
    train = rows("a", "a b", "c d e", "a b", "c")
    assert [r.question for r in choose_shots(train, 2, seed=0, selection="coverage")] == ["a b", "c d e"]
    assert choose_shots(train, 3, seed=0, selection="coverage") == choose_shots(train, 3, seed=9, selection="coverage")
    assert choose_shots(train, 0, seed=0, selection="coverage") == ()


def test_shots_of_its_own_stand_before_each_question() -> None:
    first, second, third = rows("one", "two", "three")
    framing = PromptFormat(
        "Be brief.", nearest_shots=lambda record: (second,) if record.question == "one" else (first,)
    )
    assert [m.content for m in framing.turns(first)] == ["Be brief.", "two", "answer 1", "one"]
    assert [m.content for m in framing.turns(third)] == ["Be brief.", "one", "answer 0", "three"]


def test_answers_that_are_not_to_be_learned_are_no_examples() -> None:
    train = rows("one", "two", "three")
    excluded = replace(train[1], messages=(train[1].messages[0], replace(train[1].messages[1], is_learned=False)))
    shots = choose_shots([train[0], excluded, train[2]], 2, seed=0)
    assert {shot.question for shot in shots} == {"one", "three"}
