"""Expected answers that are not one plain number: every number counts, and so does an opposite beside it."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

import pytest

from rung.scoring.answers import MAX_LISTED_WORDS
from rung.scoring.metrics import numeric

DIFFERENT_IN_PART = [
    ("2 hours and 20 minutes", "3 hours and 20 minutes"),
    ("3 hours 20 minutes", "2 hours 20 minutes"),
    ("5 feet 10 inches", "6 feet 10 inches"),
    ("1 year and 6 months", "2 years and 6 months"),
    ("3 tablespoons, 1 teaspoon", "2 tablespoons, 1 teaspoon"),
    ("3 of 5", "4 of 5"),
    ("3 out of 5", "4 out of 5"),
    ("3 to 5", "4 to 5"),
    ("3 to 5 million", "4 to 5 million"),
    ("between 3 and 5", "between 4 and 5"),
    ("from 3 to 5", "from 4 to 5"),
    ("5 million to 6 million", "4 million to 6 million"),
    ("3 dogs and 4 cats", "5 dogs and 4 cats"),
    ("mean 3, sd 1", "mean 4, sd 1"),
    ("Revenue 10, cost 5", "Revenue 20, cost 5"),
    ("chapter 3, verse 16", "chapter 4, verse 16"),
    ("in 2022 and 2023", "in 2021 and 2023"),
    ("5 km", "5 m"),
    ("5 cm", "5 mm"),
    ("5 kg", "5 g"),
    ("10 BC", "10 AD"),
    ("40\u00b0 N", "40\u00b0 S"),
    ("at most 5", "at least 5"),
    ("at most $5 million", "at least $5 million"),
    ("more than 5", "less than 5"),
    ("no more than 5", "no less than 5"),
    ("5 or more", "5 or fewer"),
    ("before 5", "after 5"),
    ("5 minutes early", "5 minutes late"),
    ("10:00 AM", "10:00 PM"),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT_IN_PART)
def test_every_number_of_a_short_expected_answer_counts(one: str, other: str) -> None:
    """The last number alone was compared: `3 of 5` was `4 of 5`, and `at most 5` was `at least 5`."""
    for sentence in ("{}", "The answer is {}.", r"So \boxed{{{}}}", "#### {}"):
        assert numeric(sentence.format(one), other) == numeric(sentence.format(other), one) == 0.0, sentence
        assert numeric(sentence.format(one), one) == numeric(sentence.format(other), other) == 1.0, sentence
    assert numeric("so\n#### " + one, "thus\n#### " + other) == 0.0


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("5", "3 of 5", 0),
        ("20", "3 hours and 20 minutes", 0),
        ("Of the 5 apples, 3 of 5 were red", "3 of 5", 1),
        ("2, 3, 4", "3, 4", 0),
        ("3, 5", "3 to 5", 0),
        ("3 of 5", "3 to 5", 0),
        ("about 16 years as of December 31, 2019", "open orders as of December 31, 2019", 0),
        ("$0.9 million", "$0.3 million, $0.9 million", 0),
        ("Based on the filing, $773, $2,055", "$773, $2,055", 1),
        ("By the 5 reports in 2019 and 2018", "in 2019 and 2018", 1),
        ("4 cats and 3 dogs", "3 dogs and 4 cats", 0),
        ("5 or more", "5", 1),
        ("10 minus 5", "5", 1),
        ("10 minus 5", "-5", 0),
        ("5", "at least 5", 1),
        ("At most 10 came, so 5", "at least 5", 1),
        ("at most 5,000,000", "at least 5 million", 0),
        ("up 5% to $412 million", "$412 million", 1),
        ("down 5% to $412 million", "up 5% to $412 million", 0),
        ("up 5% to $412 million", "up 5% to $412 million in all", 1),
    ],
)
def test_several_numbers(answer: str, expected: str, score: float) -> None:
    assert numeric(answer, expected) == score


def test_of_a_worked_solution_the_last_number_counts() -> None:
    solution = "She sold 48 in April and half as many, 24, in May. Together that makes 72."
    assert len(solution.split()) > MAX_LISTED_WORDS
    assert numeric("72", solution) == numeric("48 + 24 = 72", solution) == 1.0
    assert numeric("24", solution) == 0.0


class Written(NamedTuple):
    """A quantity as written, and its value for an oracle that reads no text."""

    text: str
    value: object


PAIRS = [(a, b) for a in (2, 3, 4) for b in (5, 6, 7)]
BOUNDS = (("at least {}", "at most {}"), ("more than {}", "less than {}"), ("above {}", "below {}"),
          ("before {}", "after {}"), ("{} or more", "{} or less"), ("no more than {}", "no less than {}"))  # fmt: skip
PLACES = (("{} BC", "{} AD"), ("{}\u00b0 N", "{}\u00b0 S"), ("{}\u00b0 E", "{}\u00b0 W"), ("{} N", "{} S"),
          ("{}\u00b0 north", "{}\u00b0 south"), ("{}:00 AM", "{}:00 PM"),
          ("{} days ago", "{} days from now"))  # fmt: skip


def in_pairs(*forms: str) -> list[Written]:
    return [Written(form.format(a, b), (a, b)) for form in forms for a, b in PAIRS]


def in_parts(form: str, ratio: int) -> list[Written]:
    return [Written(form.format(a, b), ratio * a + b) for a, b in PAIRS]


def in_units(**units: int) -> list[Written]:
    return [Written(f"{n} {unit}", n * factor) for n in (1, 5, 1000) for unit, factor in units.items()]


# in each family every text is a quantity; those of one value are equal, others differ
FAMILIES: dict[str, list[Written]] = {
    "of": in_pairs("{} of {}", "{} out of {}"),
    "range": in_pairs("{} to {}", "{}-{}", "between {} and {}"),
    "money": in_pairs("${}-{} million", "${} million to ${} million"),
    "things": in_pairs("{} dogs and {} cats", "{} dogs, {} cats"),
    "duration": [*in_parts("{} hours and {} minutes", 60), *in_parts("{} hours, {} min", 60)],
    "height": in_parts("{} feet {} inches", 12),
    "age": in_parts("{} years and {} months", 12),
    "length": in_units(km=10**6, m=1000, cm=10),
    "mass": in_units(kg=10**6, g=1000, mg=1),
}
for forms in (*BOUNDS, *PLACES):
    FAMILIES[" | ".join(forms)] = [Written(form.format(n), (form, n)) for form in forms for n in (5, 6, 10)]


@pytest.mark.parametrize("family", FAMILIES)
def test_quantities_of_several_parts_are_equal_where_all_parts_are(family: str) -> None:
    for one, other in itertools.product(FAMILIES[family], repeat=2):
        for sentence in ("{}", "The answer is {}."):
            score = numeric(sentence.format(one.text), other.text)
            assert score == float(one.value == other.value), (one, other)


def test_no_quantity_of_several_parts_equals_one_of_its_numbers() -> None:
    for family in ("of", "range", "money", "things", "duration", "height", "age"):
        for written in FAMILIES[family]:
            for number in re.findall(r"\d+", written.text):
                assert numeric(number, written.text) == 0.0, written
