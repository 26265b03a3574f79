"""Metrics: score of one answer against the expected one, from 0 to 1.

Pure functions of two strings, by rules instead of a model: cheap, deterministic and checkable, but blind to
paraphrases (see `evaluation.judge`). `numeric` exists besides `exact` so that a tuned model never wins by formatting
alone. `evaluation.evaluate` scores with `METRICS`, `verifiers` makes rewards of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

# wide enough for float arithmetic on scaled numbers, too narrow to accept a rounded answer
RELATIVE_TOLERANCE = 1e-6

_ARTICLES = frozenset({"a", "an", "the"})
_QUOTES = "\"'\u2018\u2019\u201c\u201d"
_BRACKETS = "()[]{}"

# `m` is million, as in financial reports, not the Roman thousand.
_SCALES = {
    1e3: ("k", "thousand", "thousands"),
    1e6: ("m", "mm", "mn", "mln", "million", "millions"),
    1e9: ("b", "bn", "billion", "billions"),
    1e12: ("tn", "trillion", "trillions"),
}
_SCALE = {word: scale for scale, words in _SCALES.items() for word in words}
_CURRENCY = {
    **dict.fromkeys(("us$", "$", "usd", "us dollars", "dollar", "dollars"), "USD"),
    **dict.fromkeys(("\u20ac", "eur", "euro", "euros"), "EUR"),
    **dict.fromkeys(("\u00a3", "gbp", "pound", "pounds"), "GBP"),
    # also the sign of the yuan, which a number alone does not tell
    **dict.fromkeys(("\u00a5", "jpy", "yen"), "JPY"),
    "chf": "CHF",
}


def _regex_alternatives(vocabulary: dict[str, Any]) -> str:
    # an alternation takes the first match: `us$` must be tried before `$`
    longest_first = sorted(vocabulary, key=len, reverse=True)
    return "|".join(re.escape(w) + (r"\b" if w[-1].isalpha() else "") for w in longest_first)


_QUANTITY = re.compile(
    rf"""
    (?<![\w.])                                     # FY2023, Q4 and 1.2.3 contain no separate number
    (?P<loss>(?:loss|deficit)\ of\ )?
    (?P<open>\()? (?P<minus>[-\u2212])?
    (?:(?P<before>us\$|[$\u20ac\u00a3\u00a5]|usd|eur|gbp|jpy|chf)\s*)?
    (?P<open_late>\()? (?P<minus_late>[-\u2212])?
    (?P<numeral>(?>(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+))
    (?!(?:st|nd|rd|th)\b)
    (?P<close>\))?
    (?:[\s-]*(?P<scale>{_regex_alternatives(_SCALE)}))?
    (?:\s*(?P<percent>%|percent(?:age\ points?)?\b|per\ cent\b|pct\b))?
    (?:\s*(?P<after>{_regex_alternatives(_CURRENCY)}))?
    (?P<close_late>\))?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?"
    r"|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
_DATE = re.compile(
    rf"(?:\b(?:in|for|during|since|year|fiscal|fy|ended|{_MONTH})(?:\ \d\d?,)?\s*|\()(?:19|20)\d\d\Z"
    rf"|\b{_MONTH}\ \d\d?\Z",
    re.IGNORECASE,
)
_MONTH_NEXT = re.compile(rf"\ {_MONTH}", re.IGNORECASE)
_UP = re.compile(r"\b(?:rose|risen|up|increas\w*|grew|grown|gain\w*)\b", re.IGNORECASE)
_DOWN = re.compile(r"\b(?:fell|fallen|down|decreas\w*|declin\w*|dropp?\w*|shrank)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number as written: `USD (1.2) million` is numeral -1.2, scale 1e6, currency USD."""

    numeral: float
    scale: float | None = None
    percent: bool = False
    currency: str | None = None
    is_date: bool = False
    """A year after a word for time (`in 2023`, `FY 2023`, `(2023)`), or a day or year next to a month's name."""

    @property
    def value(self) -> float:
        """The scaled number: 412 million is 4.12e8, 12.5% is 12.5."""
        return self.numeral * (self.scale or 1.0)

    def __abs__(self) -> Quantity:
        return replace(self, numeral=abs(self.numeral))

    @property
    def has_mark(self) -> bool:
        """True if it has a currency, percent or scale mark."""
        return bool(self.scale or self.percent or self.currency)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of `METRICS`; higher scores are better."""

    function: Callable[[str, str], float]
    binary: bool
    """Only 0 and 1 occur, so Wilson's interval and McNemar's test apply."""


def exact(answer: str, expected: str) -> float:
    """1 when the texts are equal except for outer whitespace, else 0. Case and punctuation count."""
    return float(answer.strip() == expected.strip())


def normalized(answer: str, expected: str) -> float:
    """1 when the words are equal, else 0: `The Revenue.` equals `revenue`.

    Like SQuAD (Rajpurkar et al. 2016): casefolded, whitespace collapsed, articles a/an/the dropped. Unlike SQuAD, which
    makes 4.1 equal to 41 and -5 to 5, only punctuation *around* a word goes, and numbers keep sign, brackets and point.
    """
    return float(normalize(answer) == normalize(expected))


def numeric(answer: str, expected: str) -> float:
    """1 when the quantity in the answer is the expected one, else 0: `$1.2bn` equals `USD 1,200 million`.

    Which number counts: the first after the last `####`; else the last with a currency, percent or scale mark; else
    the last that is not part of a date (see `Quantity.is_date`); else the last. Digits glued to letters (FY2023, Q4)
    are no number. Brackets, a minus (ASCII or U+2212) and `loss of` make it negative. Points are decimals, commas
    group thousands.

    What is equal: the same value after scaling, within 1e-6 relative. A side without a scale, or with no mark at all
    facing a percentage, is also right when the bare numerals agree (`412` for `USD 412 million`, `12.5` for `12.5%`).
    Two different currencies never agree. Where the expected answer states a direction (`fell by 3`), magnitudes are
    compared and the opposite direction (`rose by 3`) is wrong. When the expected answer holds no number, the score is
    `normalized`, so that `Not disclosed.` can be right.
    """
    expected_quantity = quantity(expected)
    if expected_quantity is None:
        return normalized(answer, expected)
    answer_quantity = quantity(answer)
    if answer_quantity is None:
        return 0.0
    # `fell by 3` may be written as -3 or as 3: only magnitude and direction are comparable
    if direction := _change_direction(expected):
        opposite = (_change_direction(answer) or (-1 if answer_quantity.numeral < 0 else 0)) == -direction
        return float(not opposite and _quantities_agree(abs(answer_quantity), abs(expected_quantity)))
    return float(_quantities_agree(answer_quantity, expected_quantity))


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of word precision and recall (SQuAD, Rajpurkar et al. 2016) on the words of `normalize`.

    `net revenue rose` against `revenue rose` is 0.8. Two empty texts score 1, as in SQuAD 2.0.
    """
    answer_words, expected_words = normalize(answer), normalize(expected)
    if not answer_words or not expected_words:
        return float(answer_words == expected_words)
    # multisets: a repeated word counts as often as both have it
    shared = sum((Counter(answer_words) & Counter(expected_words)).values())
    return 2.0 * shared / (len(answer_words) + len(expected_words))


def rouge_l(answer: str, expected: str) -> float:
    """F-measure of the longest common subsequence (Lin 2004), by the rouge-score package, no stemming.

    Its tokenizer keeps ASCII letters and digits only: do not use it for text in other scripts.
    """
    return float(_rouge_scorer().score(expected, answer)["rougeL"].fmeasure)


def normalize(text: str) -> tuple[str, ...]:
    """The words compared by `normalized` and `token_f1`.

    Articles stay when there is nothing else, or the choice `A` would equal an empty answer.
    """
    # a typographic minus (U+2212) equals the ASCII one
    words = [w for w in map(_bare_word, text.casefold().replace("\u2212", "-").split()) if w]
    return tuple([w for w in words if w not in _ARTICLES] or words)


def quantity(text: str) -> Quantity | None:
    """The number of a text by the rule of `numeric`; None if there is none."""
    # GSM8K's format: the final answer follows ####
    if "####" in text and (final := _quantities(text.rpartition("####")[2])):
        return final[0]
    quantities = _quantities(text)
    # the last candidate: answers state their result at the end
    for candidates in ([q for q in quantities if q.has_mark], [q for q in quantities if not q.is_date], quantities):
        if candidates:
            return candidates[-1]
    return None


def _quantities(text: str) -> list[Quantity]:
    return [_read_quantity(match) for match in _QUANTITY.finditer(text)]


def _read_quantity(match: re.Match[str]) -> Quantity:
    groups = match.groupdict()
    in_brackets = (groups["open"] or groups["open_late"]) and (groups["close"] or groups["close_late"])
    negative = groups["minus"] or groups["minus_late"] or in_brackets or groups["loss"]
    number = float(groups["numeral"].replace(",", ""))
    currency = groups["before"] or groups["after"]
    quantity = Quantity(
        numeral=-number if negative else number,
        scale=_SCALE[groups["scale"].lower()] if groups["scale"] else None,
        percent=bool(groups["percent"]),
        currency=_CURRENCY[currency.lower()] if currency else None,
    )
    # the sign is dropped: the hyphen of `May-2023` is no minus
    if not quantity.has_mark and _is_date(match):
        return Quantity(number, is_date=True)
    return quantity


def _is_date(match: re.Match[str]) -> bool:
    text, start, end = match.string, match.start("numeral"), match.end("numeral")
    day_first = end - start <= 2 and _MONTH_NEXT.match(text, end)
    return bool(day_first or _DATE.search(text[max(0, start - 24) : end]))


def _quantities_agree(first: Quantity, second: Quantity) -> bool:
    same_numeral = math.isclose(first.numeral, second.numeral, rel_tol=RELATIVE_TOLERANCE)
    if first.currency and second.currency and first.currency != second.currency:
        return False
    if first.percent != second.percent:  # percent is a unit of its own, but a number without any mark may stand for it
        return same_numeral and not (first.has_mark and second.has_mark)
    if first.scale is None or second.scale is None:
        # one side may leave the scale to the question (`in millions`)
        return same_numeral or math.isclose(first.value, second.value, rel_tol=RELATIVE_TOLERANCE)
    return math.isclose(first.value, second.value, rel_tol=RELATIVE_TOLERANCE)


def _change_direction(text: str) -> int:
    """1 if the text states an increase, -1 for a decrease, 0 for neither or both."""
    return bool(_UP.search(text)) - bool(_DOWN.search(text))


def _bare_word(word: str) -> str:
    if any(c.isalpha() for c in word):
        return word.strip(".,;:!?" + _QUOTES + _BRACKETS)
    return word.lstrip(",;:!?" + _QUOTES).rstrip(".,;:!?" + _QUOTES)  # (37) is a negative number, .5 is not 5


@cache
def _rouge_scorer() -> Any:
    # Not at the top: it imports nltk, which only runs with this metric should wait for.
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped,unused-ignore]

    return RougeScorer(["rougeL"], use_stemmer=False)


METRICS: dict[str, Metric] = {
    **{function.__name__: Metric(function, binary=True) for function in (exact, normalized, numeric)},
    **{function.__name__: Metric(function, binary=False) for function in (token_f1, rouge_l)},
}
"""All metrics that compare two texts. Perplexity does not: see `stats.ratio_interval`."""
