r"""Values that answers state beyond a plain number: fractions, powers, roots, tuples, sets, intervals, dates and times.

`read_value` finds the value that an answer ends in. Plain numbers go straight to `quantities`, so that the usual
financial answer costs no more than one search for structure. Everything else is cut into spans of numbers, single
letters, operators and brackets, and parsed by descent: to an exact number where that can be computed, to a tuple of
values, or to text without spaces, which only equals the same text. There is no symbolic algebra: `x + 1` is not `1 + x`
(the `math` metric knows).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rung.scoring.arithmetic import (
    CLOSE,
    MAX_DEPTH,
    OPEN,
    SEPARATORS,
    SIGNS,
    Token,
    evaluate,
    joined,
    tokenize,
)
from rung.scoring.dates import Moment, moments
from rung.scoring.latex import boxed, plain_math
from rung.scoring.quantities import (
    MAX_DIGITS,
    QUANTITY,
    Quantity,
    join_measures,
    quantities,
    quantities_agree,
    quantity,
    read_marks,
    read_quantity,
)
from rung.scoring.spans import MARKS_ALONE, is_mathematical, is_structured, runs

MAX_CHARACTERS = 20_000
"""Only the end of a longer text is searched for a marker: the result stands there, and hostile text costs time."""
MAX_READ = 3_000
"""Of that, characters that are read as plain numbers: a numeral of one digit costs 20 microseconds."""
MAX_STRUCTURED = 1_500
"""And as mathematics, at 15 to 20 microseconds a character: no answer costs more than 0.05 s."""
MAX_LISTED_WORDS = 12
"""Words of an expected answer of which every quantity counts: `at least 3 hours and 20 minutes, but no more than 5` has
10. A worked solution has more (those of GSM8K 10 to 400, and a marker before the result); its last quantity counts."""


@dataclass(frozen=True, slots=True)
class Compound:
    """Several values: a tuple, set, interval, list, matrix, ratio, date or time."""

    kind: str
    """The brackets and separators as written, or that of a `dates.Moment`."""
    parts: tuple[Value, ...]
    numbers: tuple[int, ...] = ()
    """Of a date, time or ratio."""

    @property
    def is_date(self) -> bool:
        """Like a year, it is the answer only where there is no other number."""
        return self.kind in ("date", "figures")


class Expression(NamedTuple):
    """Text that has no value of its own, without spaces and layout."""

    text: str


Value = Quantity | Compound | Expression

# What the plain reader does not know. Every answer is searched, so each pattern begins with a set of characters, which
# `re` looks for without trying the pattern; a needless hit costs time alone.
_SYMBOLS = re.compile(
    r"[\\^_{}\[\]=<>*+|/\u00d7\u00f7\u00b7\u22c5\u221a\u03c0\u221e\u00b1\u222a\u2264\u2265\u2260\u2044"
    r"\u00b2\u00b3\u00b9\u2070-\u2079\u00bc-\u00be\u2153-\u215e]"
)
_BEHIND_DIGIT = re.compile(
    r"\d(?:\s?:\s?\d|[eE][-+]?\d|\s*[-\u2013\u2212]\s*[\d(]|\s+[-\u2013\u2212]\s|\s?[;$]|\s\d|\s(?:and|or)\s+[-$]?\d"
    r"|['\u2019]\d{3}|,(?!\d{3}(?!\d))\s*[-\u2013\u2212$(\u20ac\d]|\s?[apAP]\.?[mM]\b|\s?[ac-jln-zAC-JLN-Z](?![A-Za-z]))"
)
_BEFORE_DASH = re.compile(r"[-\u2013\u2212](?:(?<=\b[A-Za-z].)\s?|(?<=\b[A-Za-z]\s.)\s?|\s+)\d")
_BEHIND_BRACKET = re.compile(r"\)\s*[-\u2013\u2212(]")
_BEHIND_FORMULA = re.compile(r"\$(?<=\S.)(?!\d)")
_CALCULATION = re.compile(r"<<[^<>]{0,200}>>")  # calculator marks of GSM8K
# `**$5**`, but neither `10**3` nor `2 ** 3 ** 4`
_EMPHASIS = re.compile(r"(?<![\w)*])\*\*(?=[^\s*])([^*\n]{1,300})(?<=\S)\*\*(?!\w)")
# not `10 minus 5` nor `cost minus 5`
_MINUS = re.compile(
    r"(?:\bnegative|(?<![\w)%]\s)(?<![\w)%])minus|(?<=\b(?:is|of|to|at|by|be)\s)minus|(?<=\bwas\s)minus)"
    r"\s+(?=[$\u20ac\u00a3]?\.?\d)",
    re.IGNORECASE,
)
# groups of thousands by a thin space (BIPM, SI Brochure, 9th edition, 5.4.4), and as in Switzerland; one ASCII space
# between two numbers is ambiguous, and separates thousands only at the start of a text
_GROUP = re.compile(r"\d[ \u00a0\u2009\u202f'\u2019]\d{3}")
_GROUPS = re.compile(
    r"(?<![\w.,'\u2019])\d{1,3}(?:(?:[\u00a0\u2009\u202f]\d{3})+|(?:['\u2019]\d{3})+|(?: \d{3}){2,})"
    r"(?![\w'\u2019]|[ \u00a0\u2009\u202f]\d)"
)
_WHOLE_GROUPS = re.compile(r"\A\s*(?:[A-Z]{3}\s|[-$\u20ac\u00a3]{1,2})?\d{1,3} \d{3}(?![\w-]| \d)")
_GROUP_SEPARATOR = re.compile(r"(?<=\d)[ \u00a0\u2009\u202f'\u2019](?=\d)")
_TIMES_TEN = re.compile(r"(?<=\d)\s*x\s*(?=10\s*\^)", re.IGNORECASE)
_POWER_OF = re.compile(r"(?<=[\d)])\s*\*\*\s*(?=[-(\d])")
_TO = re.compile(r"(?<=\d)\s+to\s+(?=[-$\u20ac\u00a3]?\d)")
_BETWEEN = re.compile(r"\bbetween\s+([$\u20ac\u00a3]?[\d,.]{1,30})\s+and\s+(?=[$\u20ac\u00a3]?\d)", re.IGNORECASE)
# `answer:` in Korean, Chinese, Japanese, French, German, Spanish, Italian, Portuguese and Russian too
_STATED = re.compile(
    r"(?:\banswer(?:\s+is|\s*[:\uff1a])|(?:\uc815\ub2f5|\u7b54\u6848|\u7b54\u3048|\br\u00e9ponse|\bantwort|\brespuesta|\brisposta"
    r"|\bresposta|\b\u043e\u0442\u0432\u0435\u0442)\s*[:\uff1a])\s*:?\s*",
    re.IGNORECASE,
)
_POWER = re.compile(r"\^\s*\(?-?(\d)")  # of a word, such as a unit
_AROUND = " \t\r\n.,;:!?*'\"`"
_ENUMERATOR = re.compile(r"(?<!\S)\(?[A-Ea-e]\)\s+(?=[-\d(\\$])")  # `(a) 5`


def read_value(text: str) -> Value | None:
    r"""The value that an answer states; None for a text without one.

    That is the first behind the first `####` (Cobbe et al. 2021: what a model writes behind it is no answer), the
    content of the last `\boxed{}` or `\fbox{}` (Hendrycks et al. 2021), the whole text, or of the values in its
    sentences the last with a currency, percent or scale mark, else the last that is no date, else the last.
    """
    if "####" in text:
        final = _cleaned(text.split("####", 2)[1].strip()[:MAX_STRUCTURED])
        # the line alone first: what is run on is longer
        for part in dict.fromkeys((final.split("\n")[0], final)):
            value = _read_whole(part) or next(iter(_values(part)), None) if _has_structure(part) else quantity(part)
            if value is not None:
                return value
    text = _cleaned(_end(text, MAX_CHARACTERS))
    content = boxed(text)
    text = _end(text, MAX_READ)
    if not content and not _has_structure(text):
        plain = quantity(text)
        # `May 3, 2023` is a date, `in 2023` a year
        dated = moments(text) if plain is not None and plain.is_date else []
        return _moment(dated[-1]) if dated else plain
    text = _end(text, MAX_STRUCTURED)
    if content:
        content = content[:MAX_STRUCTURED]
        plain = None if _has_structure(content) else quantity(content)
        if plain is not None and not plain.is_date:
            return plain
        return _read_whole(content) or _select(_values(content)) or Expression(joined(tokenize(plain_math(content))))
    # `The answer is 3, 4.`: both, where a sentence without these words has two values
    stated = stated_answer(text)
    return _read_whole(text) or (_read_whole(stated) if stated else None) or _select(_values(text))


def read_values(text: str) -> tuple[Value, ...]:
    """The values that an expected answer consists of; empty for a text without one.

    Behind a marker, or in a text of up to `MAX_LISTED_WORDS` words: those with a currency, percent or scale mark, else
    those that are no dates, else all. Of a longer text the value of `read_value`.
    """
    part = _concluding(text)
    if len(part.split(None, MAX_LISTED_WORDS + 1)) <= MAX_LISTED_WORDS:
        values = _counted(_listed(part))
        if len(values) > 1 or (values and isinstance(values[0], Compound)):
            return tuple(values)
    value = read_value(text)
    return () if value is None else (value,)


def ends_in(text: str, wanted: Sequence[Value], agree: Callable[[Value, Value], bool]) -> bool:
    """Whether the last values of a text are the wanted ones, in their order; a list counts as its parts.

    A single list is not a single range: `3, 5` is not `3 to 5`.
    """
    listed = _listed(_concluding(text))
    if len(listed) == len(wanted) == 1:
        return agree(listed[0], wanted[0]) or _is_same_ratio(listed[0], wanted[0])
    parts = [part for value in wanted for part in _parts(value)]
    plain = [value for value in listed if not _is_date(value)]
    # several dates, as in `2019 and 2018`, may follow other numbers
    pools = (_counted(listed), plain, listed) if len(wanted) > 1 else (_counted(listed), plain)
    return any(_ends_in(values, parts, agree) for values in pools)


def _ends_in(values: Sequence[Value], wanted: Sequence[Value], agree: Callable[[Value, Value], bool]) -> bool:
    given: list[Value] = []
    for value in reversed(values):
        if len(given) < len(wanted):
            given = [*_parts(value), *given]
    # the parts of a longer list are not the wanted list
    return len(given) == len(wanted) and all(map(agree, given, wanted))


def _parts(value: Value) -> Sequence[Value]:
    """Of a list, and of a range such as `$5-6 million`, which may be written as `$5 million to $6 million`."""
    if not isinstance(value, Compound) or value.kind not in (",", "-"):
        return (value,)
    return value.parts if value.kind == "," or all(map(_has_mark, value.parts)) else (value,)


def _is_same_ratio(first: Value, second: Value) -> bool:
    """`3 to 1` is read as a range, and may be the ratio 3:1."""
    kinds = {value.kind: value for value in (first, second) if isinstance(value, Compound)}
    if kinds.keys() != {"ratio", "-"} or len(kinds["-"].parts) != len(kinds["ratio"].numbers):
        return False
    numbers = [part.value for part in kinds["-"].parts if isinstance(part, Quantity)]
    pairs = list(zip(numbers, kinds["ratio"].numbers, strict=False))
    return len(pairs) == len(kinds["ratio"].numbers) and all(a * pairs[0][1] == b * pairs[0][0] for a, b in pairs)


def _concluding(text: str) -> str:
    r"""The part that is the answer: the line behind the first `####`, the last box, else all of it."""
    if "####" in text and (final := text.split("####", 2)[1].strip().split("\n")[0]):
        return _cleaned(final[:MAX_STRUCTURED])
    text = _cleaned(_end(text, MAX_CHARACTERS))
    return boxed(text) or text


def _listed(text: str) -> list[Value]:
    """All values of a text, in order, with `3 to 5` and `between 3 and 5` as ranges."""
    text = _BETWEEN.sub(r"\1-", _TO.sub("-", _end(text, MAX_READ)))
    if not _has_structure(text):
        plain = quantities(text)
        return list(plain) if any(not value.is_date for value in plain) else _values(text)
    text = _end(text, MAX_STRUCTURED)
    stated = stated_answer(text)
    whole = _read_whole(text) or (_read_whole(stated) if stated else None)
    return [whole] if whole else _values(text)


def _counted(values: Sequence[Value]) -> Sequence[Value]:
    return [v for v in values if _has_mark(v)] or [v for v in values if not _is_date(v)] or values


def _cleaned(text: str) -> str:
    """The text without Markdown's emphasis, and with a sign in place of the word `minus`."""
    if "**" in text:
        text = _EMPHASIS.sub(r"\1", text)
    if "inus " in text or "egative " in text:
        text = _MINUS.sub("-", text)
    return text


def _end(text: str, length: int) -> str:
    """The last characters of a text, from the first whole word."""
    if len(text) <= length:
        return text
    text = text[-length:]
    return text.partition(" ")[2] or text


def _has_structure(text: str) -> bool:
    """Whether a text may state more than plain numbers."""
    if _SYMBOLS.search(text) or _BEHIND_DIGIT.search(text) or _BEFORE_DASH.search(text):
        return True
    return bool((")" in text and _BEHIND_BRACKET.search(text)) or ("$" in text and _BEHIND_FORMULA.search(text)))


def final_texts(text: str) -> list[str]:
    r"""What a text may say is its answer: all of it, the line behind the first `####`, the last box, what it states."""
    final = text.split("####", 2)[1].strip().split("\n")[0] if "####" in text else None
    return [text, *(part for part in (final, boxed(text), stated_answer(text)) if part)]


def stated_answer(text: str) -> str | None:
    """What follows the last `answer is` or `answer:`, up to the end of the sentence; None if there is none."""
    text = text[-MAX_CHARACTERS:]
    ends = [match.end() for match in _STATED.finditer(text)]
    if not ends:
        return None
    rest = text[ends[-1] :]
    return re.split(r"\.\s|\n", rest, maxsplit=1)[0].strip().removesuffix(".")


def values_agree(first: Value, second: Value) -> bool:
    """Whether two values are equal: quantities by `quantities_agree`, compounds part by part, expressions as text."""
    if isinstance(first, Quantity) and isinstance(second, Quantity):
        return quantities_agree(first, second)
    if isinstance(first, Compound) and isinstance(second, Compound):
        if {first.kind, second.kind} == {"time", "clock"}:
            return _clock_agrees(first, second)
        if (first.kind, first.numbers, len(first.parts)) != (second.kind, second.numbers, len(second.parts)):
            return False
        if first.kind.startswith("\u2774"):
            return _same_set(first.parts, list(second.parts))
        return all(map(values_agree, first.parts, second.parts))
    return isinstance(first, Expression) and first == second


def _same_set(parts: Sequence[Value], remaining: list[Value]) -> bool:
    for part in parts:
        match = next((i for i, other in enumerate(remaining) if values_agree(part, other)), None)
        if match is None:
            return False
        del remaining[match]
    return True


def _clock_agrees(first: Compound, second: Compound) -> bool:
    """`3:30` may stand for 3:30 am and 3:30 pm; `15:30` for the latter alone."""
    plain, clock = (first, second) if first.kind == "time" else (second, first)
    hour, twelve = plain.numbers[0], clock.numbers[0]
    return plain.numbers[1:] == clock.numbers[1:] and (hour == twelve or (0 < hour <= 12 and hour % 12 == twelve % 12))


def _moment(moment: Moment) -> Compound:
    return Compound(moment.kind, (), moment.numbers)


def _has_mark(value: Value) -> bool:
    if isinstance(value, Quantity):
        return value.has_mark
    return isinstance(value, Compound) and any(map(_has_mark, value.parts))


def _select(values: Sequence[Value]) -> Value | None:
    """As `quantities.select_quantity`, of all values."""
    last: Value | None = None
    for value in reversed(values):
        if _has_mark(value):
            return value
        if last is None or (_is_date(last) and not _is_date(value)):
            last = value
    return last


def _is_date(value: Value) -> bool:
    return not isinstance(value, Expression) and value.is_date


def _plain_text(text: str) -> str:
    if "**" in text:
        text = _POWER_OF.sub("^", text)
    plain = plain_math(_CALCULATION.sub(" ", text))
    if _GROUP.search(plain):
        plain = _GROUPS.sub(_without_separators, _WHOLE_GROUPS.sub(_without_separators, plain))
    if "^" in plain:
        plain = _TIMES_TEN.sub("*", plain)
    return _ENUMERATOR.sub("", plain)


def _without_separators(match: re.Match[str]) -> str:
    return _GROUP_SEPARATOR.sub("", match[0])


def _read_whole(text: str) -> Value | None:
    """The value of a text that is nothing but mathematics, or a date or time; None for prose and for plain numbers."""
    plain = _plain_text(text).strip(_AROUND)
    tokens = tokenize(plain)
    if not tokens:
        return None
    if (found := moments(plain)) and (found[0].start, found[0].end) == (0, len(plain)):
        return _moment(found[0])
    if not all(map(is_mathematical, tokens)) or not is_structured(tokens):
        return None
    return _parse(tokens, plain, is_whole=True)


def _parse(tokens: Sequence[Token], plain: str, *, is_whole: bool = False, depth: int = 0) -> Value:
    """The value of mathematics: an equation's right side, several values, a range, a number, or the text itself."""
    if is_whole and any(token.text == "=" for token in tokens):
        tokens = _last_step(tokens, plain)
    texts = [token.text for token in tokens]
    if is_whole and "=" in texts and (right := _right_side(tokens)):
        return _parse(right, plain)
    parts, separators = _split(tokens, SEPARATORS | {"and", "or"})
    if separators and depth < MAX_DEPTH:
        kind = "".join(sorted({"," if s in ("and", "or") else s for s in separators}))
        return Compound(kind, tuple(_parse(part, plain, depth=depth + 1) for part in parts if part))
    if depth < MAX_DEPTH and _is_one_group(tokens):
        parts, separators = _split(tokens[1:-1], SEPARATORS)
        if separators or texts[0] != "(":
            kind = texts[0] + "".join(sorted(set(separators))) + texts[-1]
            return Compound(kind, tuple(_parse(part, plain, depth=depth + 1) for part in parts if part))
    return _range(tokens, plain) or _number(tokens, plain) or Expression(joined(tokens))


def _last_step(tokens: Sequence[Token], plain: str) -> Sequence[Token]:
    """Of a calculation in steps, `9 - 5 = 4, 4 + 2 = 6` or one step a line, the last; other tokens as they are.

    `x = 4, y = 6` states two values. Behind steps on lines of their own a last line may be the result alone.
    """
    lines: list[list[Token]] = [[]]
    for i, token in enumerate(tokens):
        # an equation may go on in the next line
        if i and "\n" in plain[tokens[i - 1].end : token.start] and token.text != "=":
            lines.append([])
        lines[-1].append(token)
    *before, last = lines
    if before and not all(_are_steps(line) for line in before):
        return tokens
    parts = [part for part in _split(last, SEPARATORS | {"and", "or"})[0] if part]
    return parts[-1] if parts and _are_steps(last) else last


def _are_steps(line: Sequence[Token]) -> bool:
    """Whether each part of a line computes something: `9 - 5 = 4`, `x = 9 - 5 = 4`."""
    parts = [part for part in _split(line, SEPARATORS | {"and", "or"})[0] if part]
    return bool(parts) and all(map(_is_step, parts))


def _is_step(tokens: Sequence[Token]) -> bool:
    first, *sides = _split(tokens, {"="}, nested=True)[0]
    sides = sides if first and _is_name(first) else [first, *sides]
    return len(sides) > 1 and len(sides[0]) > 1 and all(map(_is_arithmetic, sides))


def _right_side(tokens: Sequence[Token]) -> Sequence[Token] | None:
    """What an equation states: `x = 5`, `f(x) = 5`, `$6 * 9 = $54` the right side, `20 = x` the left. Else None."""
    parts, _ = _split(tokens, {"="}, nested=True)
    *left, right = parts
    if [token.kind for token in right] == ["name"] and len(left) == 1 and _is_arithmetic(left[0]):
        return left[0]
    is_result = all(not part or _is_name(part) or _is_arithmetic(part) for part in left)
    return right if right and is_result else None


def _is_name(tokens: Sequence[Token]) -> bool:
    return [token.kind for token in tokens] in (["name"], ["name", "mark", "name", "mark"])


def _is_arithmetic(tokens: Sequence[Token]) -> bool:
    return evaluate([token for token in tokens if token.text not in SIGNS | MARKS_ALONE]) is not None


def _split(
    tokens: Sequence[Token], separators: Collection[str], *, nested: bool = False
) -> tuple[list[list[Token]], list[str]]:
    """The tokens between separators outside of brackets, and the separators."""
    parts: list[list[Token]] = [[]]
    seen: list[str] = []
    depth = 0
    for token in tokens:
        depth += (token.text in OPEN) - (token.text in CLOSE)
        if token.text in separators and (nested or depth == 0):
            parts.append([])
            seen.append(token.text)
        else:
            parts[-1].append(token)
    return parts, seen


def _is_one_group(tokens: Sequence[Token]) -> bool:
    """Whether the first bracket is closed by the last token; intervals may end in another bracket."""
    depth = 0
    for i, token in enumerate(tokens):
        depth += (token.text in OPEN) - (token.text in CLOSE)
        if depth == 0:
            return len(tokens) > 1 and i == len(tokens) - 1 and token.text in CLOSE
    return False


def _range(tokens: Sequence[Token], plain: str) -> Compound | None:
    """`380-412`, `$3 - $5 million`: numbers with hyphens between them are no difference."""
    bare = [token for token in tokens if token.text not in SIGNS]
    kinds = [token.kind == "number" for token in bare]
    if len(bare) < 3 or len(bare) % 2 == 0 or not all(kinds[::2]) or any(t.text != "-" for t in bare[1::2]):
        return None
    currency = next((token.text for token in tokens if token.text in SIGNS), None)
    values = [evaluate([token]) for token in bare[::2]]
    return Compound("-", tuple(read_marks(v, plain, tokens[-1].end, currency)[0] for v in values if v is not None))


def _number(tokens: Sequence[Token], plain: str) -> Quantity | None:
    """The quantity of an expression with the marks around it."""
    sign = next((token for token in tokens[:2] if token.text in SIGNS), None)
    core = [token for token in tokens if token is not sign]
    if len(core) > 2 and core[-2].text == "\u00b0" and core[-1].text in "CF":
        core.pop()
    while core and core[-1].text in MARKS_ALONE:
        core.pop()
    value = evaluate(core) if core else None
    if value is None:
        return None
    quantity, end = read_marks(value, plain, core[-1].end, sign.text if sign else None)
    return quantity if end >= tokens[-1].end else None


def _values(text: str) -> list[Value]:
    """The values in the sentences of a text, in order."""
    plain = _plain_text(text)
    spans: list[tuple[int, int, Value]] = [(m.start, m.end, _moment(m)) for m in moments(plain)]
    covered = [(start, end) for start, end, _ in spans]
    for run in runs(tokenize(plain)):
        start, end = run[0].start, run[-1].end
        if is_structured(run) and _states_number(run) and not any(start < e and s < end for s, e in covered):
            value = _parse(run, plain, is_whole=True)
            # the marks of a number or range behind it are part of it
            if not isinstance(value, Expression):
                end = read_marks(0, plain, end)[1]
            spans.append((start, end, value))
    for start, end, _ in spans:
        plain = plain[:start] + " " * (end - start) + plain[end:]
    powers = {match.start(1) for match in _POWER.finditer(plain)}
    placed = list(spans)
    for match in QUANTITY.finditer(plain):
        if len(match["numeral"]) <= MAX_DIGITS and match.start("numeral") not in powers:
            placed.append((match.start(), match.end(), read_quantity(match)))
    return [value for _, _, value in join_measures(plain, sorted(placed, key=lambda found: found[0]))]


def _states_number(run: Sequence[Token]) -> bool:
    """`digits of pi` do not."""
    return any(token.kind == "number" or token.text in "\u03c0\u221e" for token in run)
