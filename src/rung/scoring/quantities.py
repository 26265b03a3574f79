"""Quantities: the number that a text states, with its sign, scale, currency, percent mark and unit.

One regular expression reads numbers as financial texts write them, in one pass without nested repetition, since
rewards score millions of answers. Fractions, powers, tuples, dates and times are read by `scoring.answers`, which falls
back to this file for plain numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple, TypeVar, cast

from rung.scoring.words import UNSPACED

# wide enough for float arithmetic on scaled numbers, too narrow to accept a rounded answer
RELATIVE_TOLERANCE = 1e-6
MAX_DIGITS = 100
"""Longer numerals are no quantity, but text: reading them takes quadratic time, and floats end at 308."""

Found = TypeVar("Found")
Number = int | Fraction | float
"""Exact where it is written exactly: whole numbers, fractions, and up to two decimals, as money has."""

# `m` is million, as in financial reports, not the Roman thousand.
_SCALES = {
    100: ("hundred",),
    10**3: ("k", "thousand", "thousands"),
    10**4: ("\u4e07", "\u842c"),
    10**5: ("lakh", "lakhs"),
    10**6: ("m", "mm", "mn", "mln", "million", "millions"),
    10**7: ("crore", "crores"),
    10**8: ("\u4ebf", "\u5104"),
    10**9: ("b", "bn", "billion", "billions"),
    10**12: ("tn", "trillion", "trillions"),
}
_SCALE = {word: scale for scale, words in _SCALES.items() for word in words}
_CURRENCY = {
    **dict.fromkeys(("us$", "$", "usd", "us dollars", "dollar", "dollars"), "USD"),
    **dict.fromkeys(("\u20ac", "eur", "euro", "euros"), "EUR"),
    **dict.fromkeys(("\u00a3", "gbp", "pound", "pounds"), "GBP"),
    # also the sign of the yuan, which a number alone does not tell
    **dict.fromkeys(("\u00a5", "jpy", "yen"), "JPY"),
    **dict.fromkeys(("\u20b9", "inr", "rupee", "rupees"), "INR"),
    **dict.fromkeys(("cny", "rmb", "yuan"), "CNY"),
    **dict.fromkeys(("c$", "ca$", "cad"), "CAD"),
    **dict.fromkeys(("a$", "au$", "aud"), "AUD"),
    "chf": "CHF",
    # of which currency a text rarely says
    **dict.fromkeys(("\u00a2", "cent", "cents"), "cents"),
}
_UNITS: dict[str, dict[str, tuple[float, str]]] = {
    # before the degrees of an angle; not converted
    "celsius": {"\u00b0C": (1.0, "degrees? celsius")},
    "fahrenheit": {"\u00b0F": (1.0, "degrees? fahrenheit")},
    "length": {
        "mm": (1e-3, "millimet(?:er|re)s?"),
        "cm": (1e-2, "centimet(?:er|re)s?"),
        "meter": (1.0, "met(?:er|re)s?"),
        "km": (1e3, "kilomet(?:er|re)s?"),
        # NIST SP 811, appendix B.8
        "inch": (0.0254, "inches"),
        "ft": (0.3048, "f(?:oo|ee)t"),
        "yd": (0.9144, "yards?"),
        "mile": (1609.344, "miles"),
    },
    "mass": {
        "mg": (1e-3, "milligrams?"),
        "gram": (1.0, "grams|g"),
        "kg": (1e3, "kilograms?"),
        # NIST SP 811, appendix B.8; `pounds` is a currency here
        "oz": (28.349523125, "ounces?"),
        "lb": (453.59237, "lbs"),
    },
    "time": {
        "sec": (1.0, "seconds?"),
        "min": (60.0, "minutes?|mins"),
        "hour": (3600.0, "hours|hrs?|h"),
        "day": (86400.0, "days"),
        "week": (604800.0, "weeks"),
    },
    # of a length in days that depends on which
    "months": {"month": (1.0, "months"), "year": (12.0, "years")},
    "angle": {"degree": (1.0, "degrees"), "radian": (180.0 / math.pi, "radians|rad")},
    "volume": {
        "ml": (1e-3, "millilit(?:er|re)s?"),
        "liter": (1.0, "liters|litres?"),
        "gallon": (3.785411784, "gallons"),
    },
}
# one group a unit, numbered: the name of the group is no spelling
_UNIT_OF_GROUP = [(dimension, factor) for dimension, units in _UNITS.items() for factor, _ in units.values()]
_UNIT = re.compile(
    r"\s*-?\s*(?:(square|sq\.?|cubic)\s+)?(?:\u00b0(?![CF]\b)|(?:"
    + "|".join(f"({name}|{spelling})" for units in _UNITS.values() for name, (_, spelling) in units.items())
    + r")\b)(?:\s*(?:\^\s*\(?|(?=[\u00b2\u00b3]))([23\u00b2\u00b3])\)?)?",
    re.IGNORECASE,
)
_JOINS = re.compile(r"(?:,|,?\s+and\b)?\s*")
_MAX_BETWEEN = 30
"""Characters between two parts of a measure: the longest unit and `, and `."""
_METERS = {"m": 1.0, "mm": 1e-3}
_POWERS = {None: 1, "square": 2, "sq": 2, "sq.": 2, "cubic": 3, "2": 2, "3": 3, "\u00b2": 2, "\u00b3": 3}


def _regex_alternatives(vocabulary: Iterable[str]) -> str:
    # an alternation takes the first match: `us$` must be tried before `$`
    longest_first = sorted(vocabulary, key=len, reverse=True)
    return "|".join(re.escape(w) + (r"\b" if w[-1].isalpha() and w.isascii() else "") for w in longest_first)


# Currencies that stand before a number: signs and codes.
_BEFORE = [name for name, code in _CURRENCY.items() if name.lower() == code.lower() or not name[-1].isalpha()]
_MARKS = rf"""
    (?:[\s-]*(?P<scale>{_regex_alternatives(_SCALE)}))?
    (?:\s*(?P<percent>%|percent(?:age\ points?)?\b|per\ cent\b|pct\b|(?P<bp>bps?\b|basis\ points?\b)))?
    (?:\s*(?P<after>{_regex_alternatives(_CURRENCY)}))?
"""
_MARKS_BEHIND = re.compile(_MARKS, re.VERBOSE | re.IGNORECASE)
QUANTITY = re.compile(
    rf"""
    (?<![A-Za-z0-9_.])(?<![^\W{UNSPACED}])         # FY2023, Q4 and 1.2.3 contain no separate number
    (?P<loss>(?:loss|deficit)\ of\ )?
    (?P<open>\()? (?P<minus>[-\u2212\u2013])?
    (?:(?P<before>{"|".join(map(re.escape, sorted(_BEFORE, key=len, reverse=True)))})\s*)?
    (?P<open_late>\()? (?P<minus_late>[-\u2212\u2013])?
    (?P<numeral>(?>(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+))
    (?!(?:st|nd|rd|th)\b|\.\d|[A-Za-z]{{1,3}}\d)   # nor are 3rd, 1.2.3 and 2023Q4
    (?P<close>\))?
    {_MARKS}
    (?P<close_late>\))?
    """,
    re.VERBOSE | re.IGNORECASE,
)
MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?"
    r"|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
_DATE = re.compile(
    rf"(?:\b(?:in|for|during|since|year|fiscal|fy|ended|{MONTH})(?:\ \d\d?(?:st|nd|rd|th)?,)?\s*|\()"
    # both years of `in 2022 and 2023`
    rf"(?:(?:19|20)\d\d,?\ (?:and|or|to)\ )?(?:19|20)\d\d\Z"
    rf"|\b{MONTH}\ \d\d?\Z",
    re.IGNORECASE,
)
_MONTH_NEXT = re.compile(rf"\ {MONTH}", re.IGNORECASE)
_UP = re.compile(r"\b(?:rose|risen|up|increas\w*|grew|grown|gain\w*)\b", re.IGNORECASE)
_DOWN = re.compile(r"\b(?:fell|fallen|down|decreas\w*|declin\w*|dropp?\w*|shrank)\b", re.IGNORECASE)


class Unit(NamedTuple):
    """A unit as written: `square inches` is an inch, a length of 0.0254 meters, to the power of 2."""

    dimension: str
    factor: float
    """Units of the dimension's own unit: meter, gram, second, month, degree or liter."""
    power: int


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number as written: `USD (1.2) million` is numeral -1.2, scale 1e6, currency USD."""

    numeral: Number
    scale: int | None = None
    percent: bool = False
    currency: str | None = None
    is_date: bool = False
    """A year after a word for time (`in 2023`, `FY 2023`, `(2023)`), or a day or year next to a month's name."""
    unit: Unit | None = field(default=None, compare=False)
    meters: float | None = field(default=None, compare=False)
    """Of a scale written `m` or `mm`: the meters that it is beside a length, where it is no million."""

    @property
    def value(self) -> Number:
        """The scaled number: 412 million is 4.12e8, 12.5% is 12.5."""
        return self.numeral if self.scale is None else self.numeral * self.scale

    @property
    def _length(self) -> float | None:
        """In meters, where `m` and `mm` may be read as units and not as millions."""
        if self.meters is not None:
            return float(self.numeral) * self.meters
        is_length = self.unit is not None and (self.unit.dimension, self.unit.power) == ("length", 1)
        return _in_own_unit(self) if is_length else None

    def __abs__(self) -> Quantity:
        return replace(self, numeral=-self.numeral) if self.numeral < 0 else self

    @property
    def has_mark(self) -> bool:
        """True if it has a currency, percent or scale mark."""
        return bool(self.scale or self.percent or self.currency)


def quantity(text: str) -> Quantity | None:
    """The number of a text by the rule of `numeric`; None if there is none."""
    # GSM8K's format: the final answer follows ####; what a model writes after it is no answer (Cobbe et al. 2021)
    if "####" in text and (final := quantities(text.split("####", 2)[1])):
        return final[0]
    return select_quantity(quantities(text))


def select_quantity(candidates: Sequence[Quantity]) -> Quantity | None:
    """The last with a mark, else the last that is not part of a date, else the last: results stand at the end."""
    last = None
    for candidate in reversed(candidates):
        if candidate.has_mark:
            return candidate
        if last is None or (last.is_date and not candidate.is_date):
            last = candidate
    return last


def quantities(text: str) -> list[Quantity]:
    """All numbers of a text, in order."""
    matches = [match for match in QUANTITY.finditer(text) if len(match["numeral"]) <= MAX_DIGITS]
    found = [read_quantity(match) for match in matches]
    if len(found) < 2 or not any(quantity.unit for quantity in found):
        return found
    placed = [(match.start(), match.end(), quantity) for match, quantity in zip(matches, found, strict=True)]
    return [quantity for _, _, quantity in join_measures(text, placed)]


def join_measures(text: str, found: Sequence[tuple[int, int, Found]]) -> list[tuple[int, int, Found]]:
    """The values found in a text and where they stand, `5 feet 10 inches` as one: 70 inches."""
    joined: list[tuple[int, int, Found]] = []
    for start, end, value in found:
        if joined and isinstance(value, Quantity) and value.unit and isinstance(joined[-1][2], Quantity):
            whole = _joined(joined[-1][2], text[joined[-1][1] : start], value)
            if whole is not None:
                joined[-1] = (joined[-1][0], end, cast("Found", whole))
                continue
        joined.append((start, end, value))
    return joined


def _joined(first: Quantity, between: str, second: Quantity) -> Quantity | None:
    """Two parts of one measure, the larger unit first; None if they are two quantities."""
    large, small = first.unit, second.unit
    if not large or not small or (large.dimension, large.power, small.power) != (small.dimension, 1, 1):
        return None
    ratio = round(large.factor / small.factor)
    is_whole = math.isclose(ratio, large.factor / small.factor, rel_tol=1e-9)
    unit = _UNIT.match(between) if len(between) <= _MAX_BETWEEN else None
    if unit is None or not _JOINS.fullmatch(between, unit.end()) or first.scale or second.scale:
        return None
    if ratio < 2 or not is_whole or not 0 <= second.numeral < ratio:
        return None
    rest = -second.numeral if first.numeral < 0 else second.numeral
    return Quantity(first.numeral * ratio + rest, unit=small)


def parse_numeral(numeral: str) -> Number:
    """The number of digits with grouping commas: exact for whole numbers and up to two decimals, else a float."""
    whole, point, decimals = numeral.replace(",", "").partition(".")
    if not point or not decimals.strip("0"):
        return int(whole or "0")
    if len(decimals) <= 2:
        return Fraction(int(whole + decimals), 10 ** len(decimals))
    return float(f"{whole}.{decimals}")


def read_quantity(match: re.Match[str]) -> Quantity:
    """The quantity of a match of `QUANTITY`."""
    groups = match.groupdict()
    in_brackets = (groups["open"] or groups["open_late"]) and (groups["close"] or groups["close_late"])
    negative = groups["minus"] or groups["minus_late"] or in_brackets or groups["loss"]
    number = parse_numeral(groups["numeral"])
    # money and percentages have no other unit
    is_measure = not (groups["before"] or groups["after"] or groups["percent"])
    unit = read_unit(match.string, match.end()) if is_measure else None
    quantity = _marked(-number if negative else number, groups, groups["before"], unit)
    # the sign is dropped: the hyphen of `May-2023` is no minus
    if not quantity.has_mark and _is_date(match):
        return Quantity(number, is_date=True)
    return quantity


def read_marks(number: Number, text: str, position: int, currency: str | None = None) -> tuple[Quantity, int]:
    """The quantity of a number with the marks and the unit behind it, and where they end."""
    match = _MARKS_BEHIND.match(text, position)
    groups, end = (match.groupdict(), match.end()) if match else ({}, position)
    unit = _UNIT.match(text, end)
    return _marked(number, groups, currency, read_unit(text, end)), unit.end() if unit else end


def currency_code(sign: str) -> str | None:
    """The code of a currency's sign or name."""
    return _CURRENCY.get(sign.lower())


def _marked(number: Number, groups: Mapping[str, str | None], before: str | None, unit: Unit | None) -> Quantity:
    scale, currency = groups.get("scale"), before or groups.get("after")
    return Quantity(
        # a basis point is a hundredth of a percent
        numeral=number * Fraction(1, 100) if groups.get("bp") else number,
        scale=_SCALE[scale.lower()] if scale else None,
        percent=bool(groups.get("percent")),
        currency=_CURRENCY[currency.lower()] if currency else None,
        unit=unit,
        meters=_METERS.get(scale) if scale and not currency else None,
    )


def read_unit(text: str, position: int) -> Unit | None:
    """The unit at a position of a text, if a known one stands there."""
    match = _UNIT.match(text, position)
    if match is None:
        return None
    # the first and the last group are the power, written before or after
    *units, after = match.groups()[1:]
    dimension, factor = next((_UNIT_OF_GROUP[i] for i, name in enumerate(units) if name), ("angle", 1.0))
    return Unit(dimension, factor, _POWERS[after] if after else _POWERS[match[1] and match[1].lower()])


def _is_date(match: re.Match[str]) -> bool:
    text, start, end = match.string, match.start("numeral"), match.end("numeral")
    day_first = end - start <= 2 and _MONTH_NEXT.match(text, end)
    return bool(day_first or _DATE.search(text[max(0, start - 24) : end]))


def quantities_agree(first: Quantity, second: Quantity) -> bool:
    """Whether two quantities are equal; a side without currency, scale, percent or unit leaves it to the question."""
    if first.currency and second.currency and first.currency != second.currency:
        return False
    if first.unit and second.unit and first.unit != second.unit:
        if (first.unit.dimension, first.unit.power) != (second.unit.dimension, second.unit.power):
            return False
        return math.isclose(_in_own_unit(first), _in_own_unit(second), rel_tol=RELATIVE_TOLERANCE)
    if _differ_in_kind(first, second) or _differ_in_kind(second, first):
        return False
    if _is_scaled_beside_unit(first, second) or _is_scaled_beside_unit(second, first):
        # 5 km are neither 5 m nor 5 million of what the question asks for, 5000 m are
        one, other = first._length, second._length
        same_length = one is not None and other is not None and math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE)
        return same_length or numbers_agree(first.value, second.value)
    same_numeral = numbers_agree(first.numeral, second.numeral)
    if first.percent != second.percent:  # percent is a unit of its own, but a number without any mark may stand for it
        return same_numeral and not (first.has_mark and second.has_mark)
    if first.scale is None or second.scale is None:
        # one side may leave the scale to the question (`in millions`)
        return same_numeral or numbers_agree(first.value, second.value)
    return numbers_agree(first.value, second.value)


def numbers_agree(first: Number, second: Number) -> bool:
    """Equal: exactly for two exact numbers, else within `RELATIVE_TOLERANCE`. 12,345,678 is not 12,345,679."""
    if isinstance(first, float) or isinstance(second, float):
        return math.isclose(first, second, rel_tol=RELATIVE_TOLERANCE)
    return first == second


def change_direction(text: str) -> int:
    """1 if the text states an increase, -1 for a decrease, 0 for neither or both."""
    return bool(_UP.search(text)) - bool(_DOWN.search(text))


def _differ_in_kind(first: Quantity, second: Quantity) -> bool:
    """36 degrees are neither 36 dollars nor 36 %."""
    is_measure = first.unit and not (first.currency or first.percent)
    return bool(is_measure and not second.unit and (second.currency or second.percent))


def _is_scaled_beside_unit(first: Quantity, second: Quantity) -> bool:
    return bool(first.unit and not first.scale and second.scale and not second.unit)


def _in_own_unit(quantity: Quantity) -> float:
    return float(quantity.value) * (quantity.unit.factor**quantity.unit.power if quantity.unit else 1.0)
