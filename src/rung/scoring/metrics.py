"""Metrics: score of one answer against the expected one, from 0 to 1.

Pure functions of two strings, by rules instead of a model: cheap, deterministic and checkable, but blind to
paraphrases (see `evaluation.judge`). `numeric` exists besides `exact` so that a tuned model never wins by formatting
alone. `evaluation.evaluate` scores with `METRICS`, `verifiers` makes rewards of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

from rung.scoring.answer_rules import not_refused
from rung.scoring.answers import MAX_READ, Value, ends_in, final_texts, read_value, read_values, values_agree
from rung.scoring.latex import plain_math
from rung.scoring.math_answers import math
from rung.scoring.opposites import Side, contradicts, sides
from rung.scoring.quantities import Quantity, change_direction, quantities_agree
from rung.scoring.words import letter_tokens, normalize, tokens


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of `METRICS`; higher scores are better."""

    function: Callable[[str, str], float]
    binary: bool
    """Only 0 and 1 occur: a rate, whose interval is exact (Clopper-Pearson) and whose pairs are tested by McNemar."""
    reads_expected: bool = True
    """False for a rule that the answer keeps or breaks by itself."""


def exact(answer: str, expected: str) -> float:
    """1 when the texts are equal except for outer whitespace, else 0. Case and punctuation count."""
    return float(answer.strip() == expected.strip())


def best_score(
    metric: Callable[[str, str], float], answer: str, expected: str, references: Iterable[str] = ()
) -> float:
    """The best score over all accepted answers (Rajpurkar et al. 2016, section 6.1)."""
    return max(float(metric(answer, accepted)) for accepted in (expected, *references))


def normalized(answer: str, expected: str) -> float:
    """1 when the words are equal, else 0: `The Revenue.` equals `revenue`.

    Like SQuAD (Rajpurkar et al. 2016): casefolded, whitespace collapsed, articles a/an/the dropped. Unlike SQuAD, which
    makes 4.1 equal to 41 and -5 to 5, only punctuation *around* a word goes, and numbers keep sign, brackets and point.
    """
    return float(normalize(answer) == normalize(expected))


def numeric(answer: str, expected: str) -> float:
    """1 when the answer states the expected quantity, else 0: `$1.2bn` equals `USD 1,200 million`.

    Which number counts: the first behind the first `####`; else the one in the last box; else the last with a currency,
    percent or scale mark; else the last that is no date (see `Quantity.is_date`); else the last. A fraction, power,
    root, tuple, set, range, date or time is read as a whole (`answers.read_value`), and so is `5 feet 10 inches`.
    Digits glued to letters (FY2023, Q4) are no number. Brackets, a minus (as a sign or a word), `negative` and `loss
    of` make it negative. Points are decimals; commas, apostrophes and narrow spaces group thousands.

    What is equal: two numbers that are written exactly (whole numbers, fractions, up to two decimals) only where they
    are the same, others within 1e-6 relative. A side without a scale, a unit, or any mark facing a percentage is also
    right when the bare numerals agree (`412` for `USD 412 million`, `12.5` for `12.5%`). Two different currencies never
    agree. Where the expected answer states a direction (`fell by 3`), magnitudes are compared and the opposite
    direction (`rose by 3`) is wrong; so is an opposite beside the number (`at most 5` for `at least 5`, 10 BC for 10
    AD).

    Where the expected answer has several numbers that count (`3 of 5`, `3 dogs and 4 cats`), the answer must end in all
    of them, in their order, or have the same words: one alone is wrong. Only of an expected answer with more than
    `answers.MAX_LISTED_WORDS` words, a worked solution, the last one is enough. Without a number the score is
    `normalized`, so that `Not disclosed.` can be right.
    """
    if answer.strip() == expected.strip():
        return 1.0
    wanted = _read_expected(expected)
    if not wanted.values:
        return _same_words(answer, expected)
    if len(wanted.values) == 1 and isinstance(wanted.values[0], Quantity):
        given = read_value(answer)
        return float(given is not None and _agree(given, wanted, answer) and not _contradicts(answer, wanted, given))
    return _same_values(answer, expected, wanted)


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of word precision and recall (SQuAD, Rajpurkar et al. 2016) on the words of `normalize`.

    `net revenue rose` against `revenue rose` is 0.8. Two empty texts score 1, as in SQuAD 2.0.
    """
    answer_words, expected_words = tokens(answer), tokens(expected)
    if not answer_words or not expected_words:
        return float(answer_words == expected_words)
    # multisets: a repeated word counts as often as both have it
    shared = sum((Counter(answer_words) & Counter(expected_words)).values())
    return 2.0 * shared / (len(answer_words) + len(expected_words))


def rouge_l(answer: str, expected: str) -> float:
    """F-measure of the longest common subsequence (Lin 2004), by the rouge-score package, no stemming.

    The package's tokenizer keeps ASCII letters and digits alone, so that any two Chinese answers have the score 0; here
    words are runs of letters and digits of every script, and single characters where no spaces are written. On ASCII
    text both are the same.
    """
    return float(_rouge_scorer().score(expected, answer)["rougeL"].fmeasure)


class _Expected(NamedTuple):
    """What an expected answer states."""

    values: tuple[Value, ...]
    direction: int
    sides: tuple[Side, ...]


_MAX_EXTRA = 2_000
"""Characters of layout and LaTeX that an answer may have beyond four times its expected answer: words cost time."""


# rewards compare many answers with one expected answer
@lru_cache(maxsize=4096)
def _read_expected(text: str) -> _Expected:
    values = read_values(text)
    return _Expected(values, change_direction(text), tuple(sides(text[-MAX_READ:])) if values else ())


def _agree(given: Value, wanted: _Expected, answer: str) -> bool:
    return _directed(wanted.direction and change_direction(answer), wanted.direction)(given, wanted.values[0])


def _directed(stated: int, direction: int) -> Callable[[Value, Value], bool]:
    """How two values are compared where the expected answer states a direction and the answer another, or none (0)."""

    def agree(given: Value, wanted: Value) -> bool:
        # `fell by 3` may be written as -3 or as 3: only magnitude and direction are comparable
        if not direction or not isinstance(given, Quantity) or not isinstance(wanted, Quantity):
            return values_agree(given, wanted)
        opposite = (stated or (-1 if given.numeral < 0 else 0)) == -direction
        return not opposite and quantities_agree(abs(given), abs(wanted))

    return agree


def _contradicts(answer: str, wanted: _Expected, *given: Value) -> bool:
    numbers = [number for value in given if isinstance(value, Quantity) for number in (value.numeral, value.value)]
    return bool(wanted.sides) and contradicts(answer[-MAX_READ:], wanted.sides, numbers)


def _same_values(answer: str, expected: str, wanted: _Expected) -> float:
    """Of an expected answer that is not one plain quantity."""
    given = read_value(answer) if len(wanted.values) == 1 else None
    if given is None or not values_agree(given, wanted.values[0]):
        agree = _directed(wanted.direction and change_direction(answer), wanted.direction)
        if not ends_in(answer, wanted.values, agree):
            return _same_words(answer, expected) if len(wanted.values) > 1 else 0.0
    return float(not _contradicts(answer, wanted))


def _same_words(answer: str, expected: str) -> float:
    """`normalized`, of the answer or of what it states as its answer."""
    expected_words = normalize(plain_math(expected))
    longest = _MAX_EXTRA + 4 * len(expected)
    texts = [text for text in final_texts(answer) if len(text) <= longest]
    return float(any(normalize(plain_math(text)) == expected_words for text in texts))


class _LetterTokenizer:
    """Replaces rouge-score's own tokenizer, which drops every letter beyond ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return letter_tokens(text)


@cache
def _rouge_scorer() -> Any:
    # Not at the top: it imports nltk, which only runs with this metric should wait for.
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped,unused-ignore]

    return RougeScorer(["rougeL"], tokenizer=_LetterTokenizer())


METRICS: dict[str, Metric] = {
    **{function.__name__: Metric(function, binary=True) for function in (exact, normalized, numeric, math)},
    **{function.__name__: Metric(function, binary=False) for function in (token_f1, rouge_l)},
    "not_refused": Metric(not_refused, binary=True, reads_expected=False),
}
"""All metrics without settings. Perplexity (`stats.ratio_interval`), `code` (`code_answers`) and `not_banned` are made
with those of a config."""
BINARY_METRICS = frozenset({"code", "not_banned", *(name for name, metric in METRICS.items() if metric.binary)})
"""Metrics of which only 0 and 1 occur."""
