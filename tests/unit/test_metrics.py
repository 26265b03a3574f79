"""Every metric on texts whose score can be told by reading them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped,unused-ignore]

from rung.scoring.metrics import METRICS, best_score, exact, normalized, numeric, rouge_l, token_f1
from rung.scoring.quantities import Quantity, quantity
from rung.scoring.words import normalize

MINUS = "\u2212"


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("Revenue: 4.", "Revenue: 4.", 1),
        ("  Revenue: 4.\n", "Revenue: 4.", 1),
        ("revenue: 4.", "Revenue: 4.", 0),
        ("Revenue:  4.", "Revenue: 4.", 0),
        ("Revenue: 4", "Revenue: 4.", 0),
    ],
)
def test_exact(answer: str, expected: str, score: float) -> None:
    assert exact(answer, expected) == score


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("The  Revenue.", "revenue", 1),
        ('"Not disclosed" in this filing', "Not disclosed in this filing.", 1),
        ("(yes)", "Yes!", 1),
        ("STRASSE", "stra\u00dfe", 1),
        ("yes\u00a0sir", "yes sir", 1),
        ("no", "yes", 0),
        ("4.1", "41", 0),
        ("-5", "5", 0),
        (f"{MINUS}5", "-5", 1),
        ("(37)", "37", 0),
        (".5", "5", 0),
        ("41%", "41", 0),
        ("", "A", 0),
        ("B", "A", 0),
        ("a", "A.", 1),
        ("the", "a", 0),
    ],
)
def test_normalized(answer: str, expected: str, score: float) -> None:
    assert normalized(answer, expected) == score


@pytest.mark.parametrize(
    ("text", "value", "currency", "percent"),
    [
        ("$1,234 million", 1.234e9, "USD", False),
        ("1.2bn", 1.2e9, None, False),
        ("USD 1,234m", 1.234e9, "USD", False),
        ("US$3k", 3e3, "USD", False),
        ("5 thousand euros", 5e3, "EUR", False),
        ("412-million", 4.12e8, None, False),
        ("12.5%", 12.5, None, True),
        ("12.5 percent", 12.5, None, True),
        ("up 3 per cent", 3.0, None, True),
        ("(12.5)%", -12.5, None, True),
        ("(123)", -123.0, None, False),
        ("USD (37) million", -37e6, "USD", False),
        ("(USD 37 million)", -37e6, "USD", False),
        ("-5", -5.0, None, False),
        (f"{MINUS}$5", -5.0, "USD", False),
        ("$-5", -5.0, "USD", False),
        ("a net loss of $37 million", -37e6, "USD", False),
        ("-.5", -0.5, None, False),
        ("10km", 10.0, None, False),
        ("(5 apples)", 5.0, None, False),
        ("380-412", 412.0, None, False),
    ],
)
def test_a_quantity_is_read(text: str, value: float, currency: str | None, percent: bool) -> None:
    found = quantity(text)
    assert found is not None
    assert (found.value, found.currency, found.percent) == (pytest.approx(value), currency, percent)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Revenue (FY2023): $412 million", 4.12e8),
        ("$412 million, compared with 380 before", 4.12e8),
        ("6 * 9 = 54, then 18 more.\n#### 72", 72.0),
        ("#### 1,080 eggs, not 5", 1080.0),
        ("#### none, so 5", 5.0),
        ("first #### 3 then #### 4", 3.0),
        ("Revenue was 412 in 2023", 412.0),
        ("Revenue was 412 (2023)", 412.0),
        ("412 for the year ended December 31, 2023", 412.0),
        ("412 as of 31 December", 412.0),
        ("It decreased 12 in 2023", 12.0),
        ("in 2023", 2023.0),
        ("5 * 400 = 2000.", 2000.0),
        ("48/2 = <<48/2=24>>24", 24.0),
        ("the 12th of 3", 3.0),
        ("between 3,4", 4.0),
    ],
)
def test_which_number_counts(text: str, value: float) -> None:
    found = quantity(text)
    assert found is not None
    assert found.value == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "five", "FY2023", "Q4 and H1", "the 3rd"])
def test_no_number_is_found(text: str) -> None:
    assert quantity(text) is None


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("It was $412 million in 2023.", "Revenue, FY2023: USD 412 million.", 1),
        ("412", "USD 412 million", 1),
        ("412,000,000", "USD 412 million", 1),
        ("0.412bn", "USD 412 million", 1),
        ("412 thousand", "USD 412 million", 0),
        ("EUR 412 million", "USD 412 million", 0),
        ("413", "USD 412 million", 0),
        ("412.0001", "412", 1),
        ("412.001", "412", 0),
        ("12.5", "12.5%", 1),
        ("0.125", "12.5%", 0),
        ("$12.5", "12.5%", 0),
        ("12.5 million", "12.5%", 0),
        ("-37", "USD (37) million", 1),
        ("37", "USD (37) million", 0),
        ("72", "So 48 + 24 = 72.\n#### 72", 1),
        ("it fell by 3", "down USD 3 million", 1),
        ("-3", "down USD 3 million", 1),
        ("it rose by 3", "down USD 3 million", 0),
        ("-3", "up USD 3 million", 0),
        ("no idea", "USD 3 million", 0),
        ("not disclosed in this filing", "Not disclosed in this filing.", 1),
        ("USD 3 million", "Not disclosed in this filing.", 0),
        ("0", "0.0", 1),
    ],
)
def test_numeric(answer: str, expected: str, score: float) -> None:
    assert numeric(answer, expected) == score


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("net revenue rose", "revenue rose", 0.8),
        ("the the revenue", "revenue", 1.0),
        ("revenue revenue", "revenue", 2 / 3),
        ("cost", "revenue", 0.0),
        ("", "revenue", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_f1(answer: str, expected: str, score: float) -> None:
    assert token_f1(answer, expected) == pytest.approx(score)


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    # Lin 2004, section 3.1, the example of ROUGE-L: the common subsequence has 3, then 2, of 4 words.
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert rouge_l("running", "run") == 0.0  # no stemming


def test_normalized_is_nfc_and_drops_the_punctuation_of_every_script() -> None:
    assert normalized("Cafe\u0301.", "caf\u00e9") == 1.0
    assert normalized("\u00abOui\u00bb", "oui") == normalized("\u300c\u662f\u300d\u3002", "\u662f") == 1.0
    assert normalized("don\u2019t", "don't") == normalized("**Yes**", "yes") == 1.0
    assert normalized("\u0928\u092e\u0938\u094d\u0924\u0947\u0964", "\u0928\u092e\u0938\u094d\u0924\u0947") == 1.0
    # what decides a number or a name stays
    for one, other in (("\uff0837\uff09", "37"), ("\u20135", "5"), ("C#", "C"), ("5\u2030", "5")):
        assert normalized(one, other) == 0.0


def test_scripts_without_spaces_have_words_too() -> None:
    """An answer in Chinese scored 0 under ROUGE-L, right or wrong, and 0 or 1 under F1."""
    expected, near = "\u8425\u6536\u4e0a\u5347", "\u8425\u6536\u4e0b\u964d"
    for metric in (rouge_l, token_f1):
        assert metric(expected, expected) == metric(expected + "\u3002", expected) == 1.0
        assert metric(near, expected) == pytest.approx(0.5)
    assert rouge_l("\u0928\u092e\u0938\u094d\u0924\u0947", "\u0928\u092e\u0938\u094d\u0924\u0947") == 1.0


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_on_ascii_text_rouge_l_is_that_of_the_package(one: str, other: str) -> None:
    package = RougeScorer(["rougeL"], use_stemmer=False).score(other, one)["rougeL"].fmeasure
    assert rouge_l(one, other) == package


def test_the_best_of_several_references_counts() -> None:
    assert best_score(numeric, "12", "5", ("7", "12.0")) == 1.0
    assert best_score(token_f1, "net revenue rose", "cost", ("revenue rose", "net")) == pytest.approx(0.8)
    assert best_score(exact, "a", "b") == 0.0


SCALES = ["", " million", "bn", "%", " thousand"]
QUANTITIES = st.builds(
    lambda sign, before, number, scale: f"{before}{sign}{number}{scale}",
    st.sampled_from(["", "-"]),
    st.sampled_from(["", "$", "EUR "]),
    st.integers(0, 10**6) | st.decimals(0, 1000, places=2),
    st.sampled_from(SCALES),
)


@given(st.text())
def test_every_binary_metric_and_f1_find_a_text_equal_to_itself(text: str) -> None:
    for metric in ("exact", "normalized", "numeric", "token_f1"):
        assert METRICS[metric].function(text, text) == 1.0


@given(st.text(), st.text())
def test_scores_are_within_0_and_1_and_symmetric_where_they_should_be(one: str, other: str) -> None:
    for metric in [
        metric for name, metric in METRICS.items() if name != "math"
    ]:  # milliseconds a call: test_math_answers
        score = metric.function(one, other)
        assert 0.0 <= score <= 1.0
        assert score in (0.0, 1.0) or not metric.binary
    for function in (exact, normalized, token_f1):
        assert function(one, other) == pytest.approx(function(other, one))


@given(QUANTITIES, QUANTITIES)
def test_numeric_is_symmetric_on_quantities(one: str, other: str) -> None:
    assert numeric(one, other) == numeric(other, one)


@given(st.integers(-(10**9), 10**9))
def test_every_way_to_write_an_integer_reads_the_same(number: int) -> None:
    brackets = f"({abs(number):,})" if number < 0 else f"{number:,}"
    for text in (str(number), f"{number:,}", f"{number}.0", brackets, f"so\n#### {number}"):
        assert quantity(text) == Quantity(float(number))


@given(st.text())
def test_a_text_with_words_never_normalizes_to_nothing(text: str) -> None:
    if any(c.isalnum() for c in text):
        assert normalize(text)


def test_the_table_names_what_it_holds() -> None:
    assert list(METRICS) == ["exact", "normalized", "numeric", "math", "token_f1", "rouge_l", "not_refused"]
    assert all(metric.function.__name__ == name and metric.function.__doc__ for name, metric in METRICS.items())


@pytest.mark.parametrize(("answer", "score"), [("( B )", 1), ("[ b ].", 1), ("( C )", 0)])
def test_spaces_inside_brackets_say_nothing(answer: str, score: float) -> None:
    assert METRICS["normalized"].function(answer, "(B)") == score
    assert METRICS["normalized"].function("( 37 )", "(37)") == 1 and METRICS["normalized"].function("( 37 )", "37") == 0


def test_a_frame_is_a_box() -> None:
    assert METRICS["numeric"].function(r"\fbox{42} of 50 apples", "42") == 1


@pytest.mark.parametrize(
    "text", ["정답: C", "答案：C", "答え: C。", "Réponse : C", "Antwort: C.", "Ответ: C", "The answer is C."]
)
def test_an_answer_is_stated_in_any_of_these_languages(text: str) -> None:
    function = METRICS["numeric"].function
    assert (function(text, "C"), function(text, "D")) == (1, 0)
