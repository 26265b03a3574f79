"""Arithmetic of answers: tokens of a plain text, and the number that an expression of them is.

Numbers stay exact (int, Fraction) through the four operations and whole powers, and become floats with decimals, roots
and pi. There are no variables: an expression with one has no number. `scoring.answers` decides what is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from rung.scoring.quantities import MAX_DIGITS, Number, parse_numeral

MAX_DEPTH = 40
"""Nested brackets that are read."""
MAX_BITS = 960
"""Of a number: `9^9^9` is none here. Floats end at 1,024, and a scale may follow."""
MAX_TOKENS = 200
"""Of an expression that is read as a number."""

_TOKEN = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e[-+]?\d+(?!\w))?|\.\d+(?:e[-+]?\d+(?!\w))?)"
    r"|(?P<name>\\?[^\W\d_]+)|(?P<mark>us\$|[^\s\w]|_)",
    re.IGNORECASE,
)
OPEN = {"(": ")", "[": "]", "\u2774": "\u2775", "\u27e6": "\u27e7"}
CLOSE = frozenset(OPEN.values())
SEPARATORS = frozenset(",;\u222a")
COMPARISONS = frozenset("<>\u2264\u2265\u2260")
OPERATORS = frozenset("+-*/^_=:\u221a\u00b1\u2213|") | COMPARISONS
SIGNS = frozenset("$\u20ac\u00a3\u00a5\u20b9")
CONSTANTS: dict[str, float] = {"\u03c0": math.pi, "pi": math.pi, "\u221e": math.inf}
FUNCTIONS = frozenset(
    # not `min` and `sec`, which are units
    "sqrt sin cos tan cot csc arcsin arccos arctan sinh cosh tanh log ln exp gcd lcm".split()
)


class Token(NamedTuple):
    """One token, its kind (number, name or mark) and where it stands."""

    text: str
    kind: str
    start: int
    end: int


def tokenize(text: str) -> list[Token]:
    """The tokens of a text by `plain_math`, without white space."""
    return [Token(match[0], match.lastgroup or "", match.start(), match.end()) for match in _TOKEN.finditer(text)]


def joined(tokens: Sequence[Token]) -> str:
    """The tokens as one text, with brackets around every exponent and index of one token."""
    parts: list[str] = []
    for i, token in enumerate(tokens):
        is_index = i > 0 and tokens[i - 1].text in "^_" and token.kind != "mark"
        # neighbors that would be one token stay apart
        apart = parts and token.kind != "mark" and tokens[i - 1].kind == token.kind
        parts += [f"({token.text})" if is_index else f" {token.text}" if apart else token.text]
    return "".join(parts)


def evaluate(tokens: Sequence[Token]) -> Number | None:
    """The number of an expression; None for one with a variable, or one too large."""
    if len(tokens) > MAX_TOKENS:
        return None
    try:
        value = _Evaluator(tokens).number()
    except (_NotANumberError, ZeroDivisionError, OverflowError):
        return None
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return value if _bits(value) <= MAX_BITS else None


class _NotANumberError(Exception):
    """The tokens are no arithmetic of numbers."""


class _Evaluator:
    """Recursive descent: sums of products of signed powers of atoms."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = tokens
        self._position = 0
        self._depth = 0

    def number(self) -> Number:
        value = self._sum()
        if self._position < len(self._tokens):
            raise _NotANumberError
        return value

    def _peek(self) -> str:
        return self._tokens[self._position].text if self._position < len(self._tokens) else ""

    def _take(self, text: str) -> bool:
        if self._peek() != text:
            return False
        self._position += 1
        return True

    def _sum(self) -> Number:
        value = self._product()
        while self._peek() in ("+", "-"):
            value = value + self._product() if self._take("+") else value - self._next(self._product)
        return value

    def _next(self, read: Callable[[], Number]) -> Number:
        self._position += 1
        return read()

    def _product(self) -> Number:
        value = self._signed()
        while text := self._peek():
            if text == "*":
                value = value * self._next(self._signed)
            elif text == "/":
                value = _divided(value, self._next(self._signed))
            elif text in ("(", "\u221a") or text in CONSTANTS or text == "\\sqrt":
                value = value * self._power()
            else:
                break
        return value

    def _signed(self) -> Number:
        negative = False
        while self._peek() in ("+", "-"):
            negative ^= self._peek() == "-"
            self._position += 1
        return -self._power() if negative else self._power()

    def _power(self) -> Number:
        base = self._atom()
        if not self._take("^"):
            return base
        self._enter()
        value = _raised(base, self._signed())
        self._depth -= 1
        return value

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _NotANumberError

    def _atom(self) -> Number:
        self._enter()
        if self._position >= len(self._tokens):
            raise _NotANumberError
        token = self._tokens[self._position]
        self._position += 1
        if token.kind == "number":
            value = self._mixed(_numeral(token.text))
        elif token.text in CONSTANTS:
            value = CONSTANTS[token.text]
        elif token.text in ("\u221a", "sqrt", "\\sqrt"):
            value = self._root()
        elif token.text == "(":
            value = self._sum()
            if not self._take(")"):
                raise _NotANumberError
        else:
            raise _NotANumberError
        self._depth -= 1
        return value

    def _mixed(self, whole: Number) -> Number:
        """`1 4/5`: a whole number and a fraction of whole numbers behind a space."""
        ahead = self._tokens[self._position : self._position + 3]
        if [t.kind for t in ahead] != ["number", "mark", "number"] or ahead[1].text != "/":
            return whole
        above, below = _numeral(ahead[0].text), _numeral(ahead[2].text)
        if not (isinstance(whole, int) and isinstance(above, int) and isinstance(below, int)):
            raise _NotANumberError
        self._position += 3
        return whole + Fraction(above, below)

    def _root(self) -> Number:
        degree: Number = 2
        if self._take("["):
            degree = self._sum()
            if not self._take("]"):
                raise _NotANumberError
        radicand = self._atom()
        if radicand < 0 or not degree:
            raise _NotANumberError
        root = float(radicand) ** (1 / float(degree))
        # a root of a square is exact again
        whole = round(root) if root < 1e15 else 0
        return whole if isinstance(radicand, int) and degree == 2 and whole * whole == radicand else root


def _numeral(text: str) -> Number:
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > MAX_DIGITS or len(exponent) > 5:
        raise _NotANumberError
    number = parse_numeral(mantissa)
    return _shortened(number * _raised(10, int(exponent))) if exponent else number


def _divided(number: Number, divisor: Number) -> Number:
    if isinstance(number, float) or isinstance(divisor, float):
        return number / divisor
    return _shortened(Fraction(number) / divisor)


def _raised(base: Number, exponent: Number) -> Number:
    if isinstance(exponent, int) and not isinstance(base, float):
        # 2 has two bits, and its powers gain one at a time
        if abs(exponent) * _bits(base) > 2 * MAX_BITS:
            raise _NotANumberError
        return _shortened(Fraction(base) ** exponent)
    if base < 0 and exponent != int(exponent):
        raise _NotANumberError  # complex
    return math.pow(base, exponent)


def _shortened(number: Number) -> Number:
    return number.numerator if isinstance(number, Fraction) and number.denominator == 1 else number


def _bits(number: int | Fraction) -> int:
    return max(abs(number.numerator).bit_length(), number.denominator.bit_length())
