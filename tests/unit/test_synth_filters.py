"""Each filter of made rows against its definition, written out."""

from __future__ import annotations

import time

import numpy as np
import pytest

from rung.config.synth import FiltersConfig
from rung.data.deduplication import NearDuplicateIndex, jaccard
from rung.scoring.metrics import rouge_l
from rung.synth.filters import (
    LanguageFilter,
    LeakFilter,
    NearDuplicateFilter,
    NoveltyFilter,
    check_answer_length,
    check_grounded,
    check_length,
    check_refusal,
    diversity,
)
from rung.synth.requests import final_answer
from rung.types import Message, Record, Source

WORDS = "what who where is was the a box pear plum cellar market red green baker miller counted carried".split()


def questions(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=int(rng.integers(3, 9)))) for _ in range(count)]


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.95])
def test_novelty_is_rouge_to_every_earlier_question(threshold: float) -> None:
    """The bound by common words passes over no question that is too similar; kept questions count, others do not."""
    found = NoveltyFilter(threshold, questions(1, 20))
    earlier = questions(1, 20)
    for question in questions(2, 150):
        nearest = max(rouge_l(question, other) for other in earlier)
        rejection = found.check(question)
        assert (rejection is not None) == (nearest >= threshold)
        if rejection is None:
            found.add(question)
            earlier.append(question)
        else:
            assert f"ROUGE-L {nearest:.2f}" in rejection.reason
    assert 20 < len(earlier) <= 170


def test_near_duplicates_are_found_by_exact_similarity() -> None:
    """MinHash proposes; of texts with one word exchanged all are found, and none below the threshold is."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=40)) for _ in range(50)]
    index = NearDuplicateIndex()
    for text in texts:
        index.add(text)
    for i, text in enumerate(texts):
        words = text.split()
        words[20] = "quince"
        similar = " ".join(words)
        nearest = index.most_similar(similar)
        assert nearest is not None and nearest[1] == i and nearest[0] == jaccard(text, similar) > 0.8
    assert NearDuplicateIndex().most_similar("a") is None and index.most_similar("") is None
    found = NearDuplicateFilter(0.8)
    found.add("Where is the red box of pears?\nIn the cellar, behind the door.")
    assert found.check("Where is the red box of pears?\nIn the cellar, behind the doors.") is not None
    assert found.check("Where is the red box of pears?\nNobody knows that any more, they say.") is None


def test_lengths_are_words() -> None:
    filters = FiltersConfig(max_words=5)
    assert check_length("one two three", filters) is None and check_length("one two", filters) is not None
    assert check_length("1 2 3 4 5 6", filters) is not None
    assert check_answer_length("a b", 2) is None and check_answer_length("a b c", 2) is not None
    assert check_answer_length("a " * 999, None) is None


@pytest.mark.parametrize(
    "text",
    [
        *(
            "I'm sorry, but I can't help with that.",
            "I’m unable to answer this.",
            "As an AI language model, I do not eat.",
        ),
        *(
            "I cannot provide that information.",
            "I am sorry, I do not know.",
            "Unfortunately, I can't assist with this.",
        ),
        *("I don't have access to the filing.", "I must respectfully decline.", "I won't write this."),
        *("I'm just an AI model and can't do that", "Unfortunately, I won't be able to help with that."),
        *("I apologize, but I cannot assist with this request.", "Sorry, I can't help you there."),
        *(
            "I can't recommend that.",
            "I cannot advise you on this.",
            "I'm unable to suggest a fund.",
            "I'm sorry, I can't.",
        ),
        *("Sorry, but no.", "As an assistant, I can't do this.", "I'm not comfortable helping with that."),
    ],
)
def test_refusals(text: str) -> None:
    assert check_refusal(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        *("Not disclosed", "He was sorry that the pears were gone.", "The company cannot pay its debt.", "No.", ""),
        *("I'm sorry to hear that your parcel is late. We will send a new one.", "I am very sorry for your loss."),
        *("I am afraid of spiders.", "I don't have access to a car.", "I cannot stress this enough: read it."),
        *("I can't do better than the previous answer: 42", "No, but I can tell you the price.", "No"),
        *("The AI market grew by 5%.", "I can help with that: add the two numbers.", "42 " * 80 + "I cannot help"),
    ],
)
def test_answers_that_are_no_refusals(text: str) -> None:
    assert check_refusal(text) is None


PASSAGE = (
    "Halden Mills reported revenue of USD 1,250 million for FY2023, up 4.5% from FY2022. Its chief is Ada Nyström."
)


@pytest.mark.parametrize(
    ("answer", "left_out"),
    [
        *(
            ("Revenue was USD 1,250 million.", False),
            ("It was 1.25 billion dollars.", False),
            ("It rose by 4.5%.", False),
        ),
        *(("Revenue was USD 1,300 million.", True), ("It rose by 5 percent.", True), ("In FY2021.", True)),
        *(("Ada Nyström leads Halden Mills.", False), ("It is led by Bruno Keller.", True), ("Its chief, Ada.", False)),
        *(("1. Halden Mills\n2. Ada Nyström", False), ("It is I who said so.", False), ("The CEO is Ada.", False)),
        *(("It was on Monday.", True), ("They said nothing about it.", False), ("Yes. It did.", False), ("", False)),
    ],
)
def test_answers_say_no_number_and_no_name_that_their_passage_lacks(answer: str, left_out: bool) -> None:
    assert (check_grounded(answer, PASSAGE) is not None) == left_out


def test_a_long_answer_of_many_names_is_read_in_linear_time() -> None:
    started = time.perf_counter()
    assert check_grounded("A b Ada " * 20_000, PASSAGE) is None
    assert time.perf_counter() - started < 5.0


def test_a_question_leaks_with_its_context_or_without_one() -> None:
    def row(question: str, context: str | None) -> Record:
        return Record((Message("user", question), Message("assistant", "")), Source("test", 1), context)

    found = LeakFilter([row("What was it?", "Box one."), row("Where is it?", None)])
    assert found.check(row("what was it", "box one")) is not None
    assert found.check(row("What was it?", "Box two.")) is None  # the same words about something else
    assert found.check(row("What was it?", None)) is not None
    assert found.check(row("Where is it?", "Any box.")) is not None
    assert found.check(row("Who is it?", None)) is None


def test_the_language_of_the_seeds() -> None:
    topics = [f"topic{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(150)]
    text = "What was the {} of the company in the year that is shown in the table, and how was it made?"
    seeds = [text.format(topic) for topic in topics]
    found = LanguageFilter(seeds)
    assert found.check("Who was the chief of the company in the year before, and what did it say?") is None
    german = found.check("Welche Firma hat in diesem Jahr den besten Umsatz gemacht und warum war das so?")
    assert german is not None and "frequent ones" in german.reason
    russian = found.check("Какая выручка была у компании?")
    assert russian is not None and "cyrillic" in russian.reason
    assert found.check("USD 41 million") is None and found.check("") is None
    few = LanguageFilter(seeds[:100])
    assert few.check("Welche Firma hat in diesem Jahr den besten Umsatz gemacht und warum?") is None
    assert few.check("この会社の売上はいくらですか") is not None
    assert LanguageFilter(["この会社の売上は", "Revenue"]).check("会社の利益は") is None
    assert LanguageFilter(["この会社の売上は"]).check("コンピューターとは何ですか") is None
    # lists and code among the seeds' own answers: they are of their language
    mixed = LanguageFilter([*seeds, *("1 2 3 4 5 6 7 8 9 10 11 12" for _ in range(15))])
    assert mixed.check("20 21 22 23 24 25 26 27 28 29") is None


def test_diversity_counts_distinct_pairs_of_words() -> None:
    assert diversity(["a b c", "a b d"]) == pytest.approx(3 / 4)
    assert diversity(["a b", "c d"]) == 1.0 and diversity(["a"]) == diversity([]) == 0.0


def test_the_final_answer_is_the_last_marked_line() -> None:
    assert final_answer("It is 4.\nAnswer: 3\nno,\n  Answer: 4 pears ") == "4 pears"
    assert final_answer("the Answer: 4") is None and final_answer("Answer:") is None and final_answer("") is None
