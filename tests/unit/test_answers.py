"""Values that answers state: different quantities are different, however they are written, and equal ones are equal."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from rung.scoring.answers import Expression, final_texts, read_value, values_agree
from rung.scoring.arithmetic import MAX_BITS
from rung.scoring.metrics import numeric
from rung.scoring.quantities import Quantity

DATA = os.environ.get("RUNG_DATA")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3/2", "1/2"),
        ("1e5", "1e3"),
        ("(5, 4)", "(3, 4)"),
        ("3:30", "2:30"),
        ("May 3, 2023", "June 3, 2023"),
        ("2023-05-03", "2023-06-03"),
        ("5/3/2023", "6/3/2023"),
        (r"2\pi", "2"),
        (r"3\sqrt{5}", r"2\sqrt{5}"),
        (r"\frac{1}{2}", r"\frac{3}{2}"),
        ("x + 3", "3"),
        ("5r^5", "5"),
        ("204_5", "204_7"),
        ("[2, 3]", "(2, 3)"),
        (r"\{1, 2\}", r"\{1, 3\}"),
        ("3, 4", "4"),
        ("16:9", "4:9"),
        ("380-412", "412"),
        ("1.2.3", "1.2.4"),
        ("2023Q4", "2023Q3"),
        ("50 basis points", "50%"),
        ("5 crore", "5 lakh"),
        ("5\u4e07", "5\u4ebf"),
        ("3 hours", "3 minutes"),
        ("20\u00b0C", "20\u00b0F"),
        ("5 CAD", "5 USD"),
        ("12,345,678", "12,345,679"),
        ("$1,234,567.89", "$1,234,567.98"),
        ("10\u00b3", "10"),
        ("2\u00bd", "2"),
        ("9" * 400, "8" * 400),
        (r"-\left(3\right)/2", "3/2"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 3 \\ 2 \end{pmatrix}"),
    ],
)
def test_numeric_tells_different_quantities_apart(one: str, other: str) -> None:
    for sentence in ("{}", "The answer is {}.", r"So \boxed{{{}}}", "#### {}"):
        assert numeric(sentence.format(one), other) == numeric(sentence.format(other), one) == 0.0, sentence
        assert numeric(sentence.format(one), one) == numeric(sentence.format(other), other) == 1.0, sentence


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1/2", "0.5"),
        ("1e3", "1000"),
        ("1.5e3", "1500"),
        ("$9{,}500", "9500"),
        (r"\$9{,}500", "9500"),
        ("$9,500$", "9500"),
        (r"10^{3}", "1000"),
        ("10\u00b3", "1000"),
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac12", r"\tfrac{1}{2}"),
        (r"1\frac{4}{5}", "1.8"),
        ("137 1/2", "137.5"),
        ("2\u00bd", "2.5"),
        (r"50\%", "50%"),
        (r"\boxed{\frac{3}{4}}", "0.75"),
        (r"2 \sqrt{5}", r"2\sqrt5"),
        (r"\sqrt{16}", "4"),
        (r"\sqrt[3]{27}", "3"),
        (r"12 \times 3", "36"),
        ("x = 5", "5"),
        (r"f(x) = 5", "5"),
        ("6 * 9 = 54", "54"),
        (r"\left( 5, 4 \right)", "(5,4)"),
        (r"\{2, 1\}", r"\{1, 2\}"),
        (r"(\frac{1}{2}, 3]", "(0.5, 3]"),
        ("3:30 pm", "15:30"),
        ("3:30 p.m.", "3:30"),
        ("3 May 2023", "May 3, 2023"),
        ("May 3rd, 2023", "2023-05-03"),
        ("4:2", "2:1"),
        ("180 minutes", "3 hours"),
        ("1/2 million", "500,000"),
        ("$1/2 million", "USD 500,000"),
        ("50 bps", "0.5%"),
        ("5 lakh", "500,000"),
        (r"11,\! 111,\! 100", "11111100"),
        (r"106^\circ", "106"),
        (r"15\mbox{ cm}^2", "15 square cm"),
        ("\u7b54\u6848\u662f72\u3002", "72"),
        (f"1/{10**30}", "1e-30"),
    ],
)
def test_numeric_knows_equal_quantities(one: str, other: str) -> None:
    assert numeric(one, other) == numeric(other, one) == 1.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1 000 000", "1000000"),
        ("1\u202f000\u202f000", "1000000"),
        ("1\u00a0000\u00a0000", "1000000"),
        ("It is 1 234 567 km", "1234567 km"),
        ("\u20ac1 000", "1000 EUR"),
        ("1'234", "1234"),
        ("1\u2019234\u2019567", "1,234,567"),
        ("minus 5", "-5"),
        ("negative 5", "-5"),
        ("The answer is minus 5.", "-5"),
        ("6 x 10^4", "60000"),
        ("5.0 x 10\u00b3", "5000"),
        ("10**3", "1000"),
        ("{1,2}", "{2,1}"),
        (r"\{1, 2\}", "{1, 2}"),
        ("10 to 20", "10-20"),
        ("between 10 and 20", "10-20"),
        ("5 million to 6 million", "5-6 million"),
        ("3:1", "3 to 1"),
        ("**\u00a3(8.1m)**", "\u00a3(8.1m)"),
        ("The loss was **\u00a3(8.1m)**.", "\u00a3(8.1m)"),
        ("2 hours and 20 minutes", "140 minutes"),
        ("5 feet, 10 inches", "70 inches"),
        ("5 km", "5000 m"),
        ("5 kg", "5000 g"),
        ("5 mm", "0.5 cm"),
        ("$5m", "$5mm"),
    ],
)
def test_numeric_knows_equal_forms(one: str, other: str) -> None:
    """Groups of thousands by spaces, words for a minus, plain braces and Markdown made other numbers of them."""
    assert numeric(one, other) == numeric(other, one) == 1.0


def test_the_first_marker_is_the_answer() -> None:
    """A model that goes on with the next question does not lose, and one that adds an answer does not win."""
    assert numeric("so 18\n#### 18\n\nQuestion: more?\n#### 7", "6 + 12 = 18\n#### 18") == 1.0
    assert numeric("#### 7\n#### 18", "#### 18") == 0.0
    assert numeric("#### (5, 4)\n\n#### 2", "(5, 4)") == 1.0
    assert numeric("#### east\n\nQuestion: 7 steps\n#### west", "east") == 1.0


def test_the_last_box_is_the_answer() -> None:
    assert numeric(r"first \boxed{3}, no: \boxed{\frac{1}{2}} of 7", "1/2") == 1.0
    assert numeric(r"\boxed{\text{east}}, 5 miles", "East") == 1.0


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("Revenue was 412 in Q4", "412", 1),
        ("Revenue - 412 million", "USD 412 million", 1),
        (
            "From 380 to 412 (see 5/7 of the filing of 2024-02-01), or $412 million",
            "USD 412 million",
            1,
        ),
        ("a total of 412 at 3:30 pm on May 3, 2023", "412", 0),
        ("2x + 3", "x + 3", 0),
        ("The line is x + 3", "x+3", 1),
        ("(a) 5", "5", 1),
        ("FY2022/23", "FY2022/23", 1),
        ("May", "may", 1),
        ("36 degrees", "$36", 0),
        ("(37)", "-37", 1),
        ("((1)/(2))", "0.5", 1),
        ("The answer is 3, 4.", "3, 4", 1),
        ("3 and 4", "3, 4", 1),
        ("A", "(A)", 1),
        ("She has $43 - $18 = $25", "25", 1),
        ("$1000-($150+$300+$250) = $300 are left", "300", 1),
        ("Alyssa ate 100/5 = 5A/5 or 20 = A.", "20", 1),
        ("Sam memorized 4+6=10 digits of pi.", "10", 1),
        ("B", "(A)", 0),
    ],
)
def test_sentences(answer: str, expected: str, score: float) -> None:
    assert numeric(answer, expected) == score


class Written(NamedTuple):
    """A quantity as written, and what it is: its kind and value for an oracle that reads no text."""

    text: str
    kind: str
    value: object


FRACTIONS = [Fraction(a, b) for a in range(-4, 8) for b in range(1, 8)]
RATIONALS = [Written(form.format(f.numerator, f.denominator), "number", f) for f in FRACTIONS for form in
             ("{}/{}", r"\frac{{{}}}{{{}}}", r"$\dfrac{{{}}}{{{}}}$")]  # fmt: skip
POWERS = [Written(form.format(a, b), "number", Fraction(a) * Fraction(10) ** b) for a in (1, 2, 7) for b in range(-3, 7)
          for form in ("{}e{}", r"{} \times 10^{{{}}}", "{}*10^({})")]  # fmt: skip
RADICALS = [Written(rf"{a}\sqrt{{{b}}}", "number", a * sympy.sqrt(b)) for a in (1, 2, 3) for b in range(2, 12)]
PI = [Written(form.format(a), "number", sympy.pi * a) for a in range(2, 9) for form in (r"{}\pi", "{} * pi")]
PI += [Written(rf"\frac{{{a}\pi}}{{7}}", "number", sympy.pi * a / 7) for a in range(2, 7)]
TUPLES = [Written(f"{o}{a}, {b}{c}", o + c, (a, b)) for a in range(3) for b in range(3) for o, c in ("()", "[]", "(]")]
SETS = [Written(rf"\{{{a}, {b}\}}", "set", frozenset((a, b))) for a in range(4) for b in range(4) if a != b]
DATES = [Written(f"{m} {d}, {y}", "date", (m, d, y)) for m in ("May", "June") for d in (3, 4) for y in (2022, 2023)]
DATES += [Written(f"{y}-0{n}-0{d}", "date", (m, d, y)) for n, m in ((5, "May"), (6, "June")) for d in (3, 4)
          for y in (2022, 2023)]  # fmt: skip
TIMES = [Written(f"{h}:{m:02}", "time", (h, m)) for h in (1, 2, 3, 14) for m in (0, 5, 30)]
PERCENTS = [Written(form.format(p), "percent", Fraction(p)) for p in ("12.5", "13", "7") for form in ("{}%", r"{}\%")]
CURRENCIES = (
    ("${}", "USD", 1),
    ("USD {} million", "USD", 10**6),
    ("{}bn euro", "EUR", 10**9),
    ("\u20ac{}k", "EUR", 1000),
)
MONEY = [Written(form.format(n), code, Fraction(n) * scale) for n in ("3", "3.5", "12") for form, code, scale in
         CURRENCIES]  # fmt: skip
QUANTITIES = [*RATIONALS, *POWERS, *RADICALS, *PI, *TUPLES, *SETS, *DATES, *TIMES, *PERCENTS, *MONEY]


def oracle(one: Written, other: Written) -> bool | None:
    """Whether two quantities are equal; None where one leaves out what the other states (see `numeric`)."""
    kinds = {one.kind, other.kind}
    if kinds & {"USD", "EUR", "percent"}:
        return None if len(kinds) > 1 and "number" in kinds or one.kind == other.kind in ("USD", "EUR") else (
            one.kind == other.kind and one.value == other.value)  # fmt: skip
    return len(kinds) == 1 and one.value == other.value


def test_no_two_different_quantities_of_a_generated_list_are_equal() -> None:
    values = [read_value(written.text) for written in QUANTITIES]
    compared = 0
    for (one, first), (other, second) in itertools.combinations(zip(QUANTITIES, values, strict=True), 2):
        assert first is not None and second is not None
        if (equal := oracle(one, other)) is not None:
            assert values_agree(first, second) == values_agree(second, first) == equal, (one, other)
            compared += 1
    assert compared > 60_000
    # money of one currency: a side without a scale may stand for the other, all else differs
    for one, other in itertools.combinations(MONEY, 2):
        scaled = ["million" in w.text or "bn" in w.text or "k" in w.text for w in (one, other)]
        if one.kind == other.kind and (all(scaled) or not any(scaled)):
            assert numeric(one.text, other.text) == float(one.value == other.value), (one, other)


@pytest.mark.parametrize(
    "sentence", ["{}", "The answer is {}.", "so x.\n#### {}", "#### {}\n\nNext: 7\n#### 8", r"\boxed{{{}}}"]
)
def test_every_quantity_of_a_generated_list_equals_itself(sentence: str) -> None:
    for written in QUANTITIES:
        assert numeric(sentence.format(written.text), written.text) == 1.0, written


# Pairs of MATH-500 that are equal: as numbers, or where one side leaves out a unit or scale (`numeric`'s docstring).
EQUAL_IN_MATH = {
    (r"10,\!080", "10080"), (r"2 \sqrt{5}", r"2\sqrt{5}"), (r"\frac14", r"\frac{1}{4}"), ("5", "x=5"),
    ("120", r"120^\circ"), ("30", r"30^\circ"), ("36", r"36^\circ"), ("90", r"90^\circ"), ("36", r"\$36"),
    ("15", r"15\mbox{ cm}^2"), ("2", "2k"), ("2000", "2k"),
}  # fmt: skip


@pytest.mark.skipif(not DATA or not (Path(DATA or "") / "math500").is_dir(), reason="RUNG_DATA has no math500")
def test_no_two_different_answers_of_math_are_equal() -> None:
    """547 of 45,150 pairs were."""
    rows = json.loads((Path(str(DATA)) / "math500" / "test.json").read_text())
    answers = sorted({row["answer"] for row in rows})
    assert len(answers) == 301
    values = {answer: read_value(answer) for answer in answers}
    pairs = set()
    for (one, first), (other, second) in itertools.combinations(values.items(), 2):
        if first is None or second is None:
            assert not numeric(one, other) and not numeric(other, one)
        elif values_agree(first, second):
            pairs.add((one, other))
    assert pairs == EQUAL_IN_MATH
    for answer in answers:
        for sentence in ("The answer is {}.", "The answer is ${}$.", r"So \boxed{{{}}}.", "#### {}\n\nNext: 7"):
            assert numeric(sentence.format(answer), answer) == 1.0, (answer, sentence)


@pytest.mark.skipif(not DATA or not (Path(DATA or "") / "gsm8k").is_dir(), reason="RUNG_DATA has no gsm8k")
def test_answers_of_gsm8k() -> None:
    rows = [json.loads(line) for line in (Path(str(DATA)) / "gsm8k" / "test.jsonl").read_text().splitlines()]
    for row in rows:
        gold = row["answer"].rpartition("####")[2].strip()
        run_on = row["answer"] + "\n\nQuestion: more\n#### 1.5"
        assert numeric(row["answer"], gold) == numeric(gold, row["answer"]) == numeric(run_on, gold) == 1.0
        value = Fraction(gold.replace(",", "")) + 1
        assert numeric(f"The answer is {value}.", row["answer"]) == 0.0


INTEGERS = st.integers(-(10**6), 10**6)


@given(INTEGERS, st.integers(1, 10**4), INTEGERS, st.integers(1, 10**4))
def test_fractions_are_equal_where_their_values_are(a: int, b: int, c: int, d: int) -> None:
    assert numeric(f"{a}/{b}", rf"\frac{{{c}}}{{{d}}}") == float(Fraction(a, b) == Fraction(c, d))


@given(st.text(alphabet="0123456789+-*/^_=()[]{}\\ ,.:;%$<>|abcxkmeE\u03c0\u221a#\n", max_size=40))
def test_any_mathematics_is_read_and_equals_itself(text: str) -> None:
    value = read_value(text)
    assert value is None or values_agree(value, value)
    assert numeric(text, text) == 1.0
    assert numeric(f"  {text}\n", text) == 1.0


def combined(parts: tuple[tuple[str, Fraction], str, tuple[str, Fraction]]) -> tuple[str, Fraction]:
    (one, first), operator, (other, second) = parts
    if operator == "/":
        return (rf"\frac{{{one}}}{{{other}}}", first / second) if second else (f"({one}) - ({other})", first - second)
    sign = {"+": first + second, "-": first - second, "*": first * second}
    return f"({one}) {operator} ({other})", sign[operator]


SUMS = st.recursive(
    st.integers(1, 50).map(lambda n: (str(n), Fraction(n))),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(combined),
    max_leaves=8,
)


@given(SUMS)
def test_an_expression_has_the_value_of_its_parts(drawn: tuple[str, Fraction]) -> None:
    text, expected = drawn
    value = read_value(text)
    assert isinstance(value, Quantity) and value.numeral == expected


HOSTILE = [
    "9", "1,234,", "1.", "-", "(", ")", "{", r"\frac", r"\frac{1}{", "$", "$1 ", r"\sqrt{", "2^", " 1", "1:2:", "1/2/",
    "#### 1 ", r"\boxed{", "answer is ", "<<1", "1e9", "loss of ", "5% ", "\u4e2d5", "\u00b2", r"\text{", "(1,", "1=",
    "1 and ", "may 3, ", "3 p.m", "5 cm", "9^9^9",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_of_100_kb_costs_less_than_two_seconds(text: str) -> None:
    """A tenth of it is usual; backtracking or recursion would take minutes."""
    long = text * (100_000 // len(text))
    start = time.process_time()
    numeric("The answer is " + long, "5")
    assert time.process_time() - start < 2.0


DEGENERATE = [
    "1,", "3!", "1 ", "1. ", "$1 ", "x+1=", "a1", "3 to 5 ", "3 hours ", "at least 5 ", "5 or more ", "{1,2} ",
    "**5** ", r"\{", "answer is ", "minus 5 ", "1 000 ", "between 3 and ", "1'000", "{,", "5 feet 1 inch ", "**",
    "10**",
]  # fmt: skip


@pytest.mark.parametrize("size", [6_000, 120_000])
def test_a_degenerate_answer_costs_no_more_than_7_searches_of_120_kb(size: int) -> None:
    """Repeated text of a model that does not stop took 0.2 to 0.6 s: every reward of a step waits for it.

    Seven searches are 50 ms where the dearest of these answers costs 19 ms, and more on a slower or shared processor.
    """
    answers = [text * (size // len(text)) for text in DEGENERATE] + ["{" * (size // 2) + "1"]
    for answer in answers:
        for expected in ("3 of 5", "at least 5", "Paris"):
            # again where another process had the core
            assert any(seconds(lambda a=answer, e=expected: numeric(a, e)) < 7 * seconds(search) for _ in range(4)), (
                answer[:20],
                expected,
            )


def search() -> None:
    re.findall(r"(?:\d+|[a-z]+)\s?[!%]?", "3!a bc " * 17_000)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def test_a_number_too_large_is_text() -> None:
    assert isinstance(read_value(f"2^{2 * MAX_BITS}"), Expression)
    assert numeric("9^9^9", "9^9^9") == 1.0
    assert numeric("9^9^9", "9^9^8") == 0.0


def test_final_texts() -> None:
    assert final_texts("The answer is x. So \\boxed{y}\n#### z") == [
        "The answer is x. So \\boxed{y}\n#### z",
        "z",
        "y",
        "x",
    ]


@pytest.mark.parametrize(
    "steps",
    [
        "14 - 4 = 10, 10 + 6 = 16",
        "14 - 4 = 10; 10 + 6 = 16",
        "14 - 4 = 10 and 10 + 6 = 16.",
        "14 - 4 = 10\n10 + 6 = 16",
        "14 - 4 = 10\n10 + 6\n= 16",
        "14 - 4 = 10,\n10 + 6 = 16;",
        "14 - 4 = 10\n\n16",
        "x = 14 - 4 = 10\ny = 10 + 6 = 16",
        "So 14 - 4 = 10, 10 + 6 = 16.",
        "$14 - $4 = $10, $10 + $6 = $16",
        r"\(14 - 4 = 10\), \(10 + 6 = 16\)",
        "1,004 - 1,000 = 4, 4 * 4 = 16",
    ],
)
def test_a_calculation_in_steps_states_its_last_result(steps: str) -> None:
    """Each was read as a list of equations, which equals no number."""
    assert numeric(steps, "16") == 1.0 and numeric(steps, "10") == numeric(steps, "17") == 0.0
    if not steps.startswith("So"):  # of an expected sentence both results count
        assert numeric("9 + 7 = 16", steps) == numeric("16", steps) == 1.0 and numeric("10, 16", steps) == 0.0


@pytest.mark.parametrize(
    "several", ["x = 4, y = 16", "10, 16", "10\n16", "14 - 4 = 10, 16", "x = 4\ny = 16", "10 = 10, 16 = 16"]
)
def test_several_values_are_no_steps(several: str) -> None:
    assert numeric(several, "16") == 0.0 and numeric(several, several) == 1.0
