"""Mathematics in sentences: which tokens of a text belong together, and which of them are more than a plain number."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from rung.scoring.arithmetic import CLOSE, CONSTANTS, FUNCTIONS, OPEN, OPERATORS, SEPARATORS, SIGNS, Token

_VARIABLE = re.compile(r"[A-Za-z\u0391-\u03c9]\Z")
_KNOWN_NAMES = FUNCTIONS | CONSTANTS.keys() | {"and", "or"}
MARKS_ALONE = frozenset("%\u00b0")
_MATHEMATICAL = OPERATORS | OPEN.keys() | CLOSE | SEPARATORS | SIGNS | MARKS_ALONE | CONSTANTS.keys() | {"us$"}
_STRUCTURING = frozenset("*/^_=<>|[\u2774\u27e6\u221a\u03c0\u221e\u00b1\u222a\u2264\u2265\u2260")
_PREFIXES = frozenset("+-\u221a\u00b1|")
_INFIX = frozenset("+-*/^_=<>\u00b1\u2264\u2265\u2260")
_BINDING = frozenset("^_(")


_AROUND_MONEY = SIGNS | MARKS_ALONE | frozenset("()+-")


def is_mathematical(token: Token) -> bool:
    """Whether a token may be part of mathematics: a number, an operator, one letter, a command or a function."""
    text = token.text
    if token.kind == "name":
        return bool(_VARIABLE.match(text)) or text[0] == "\\" or text.lower() in _KNOWN_NAMES
    return token.kind == "number" or text in _MATHEMATICAL


def is_structured(tokens: Sequence[Token]) -> bool:
    """Whether there is more than a plain number with its sign, brackets and marks."""
    numbers = sum(token.kind == "number" for token in tokens)
    names = [token for token in tokens if token.kind == "name" and token.text.lower() not in ("and", "or")]
    marks = {token.text for token in tokens if token.kind == "mark"}
    if numbers == 1 and len(names) == 1 and marks <= _AROUND_MONEY and _is_scaled(tokens, names[0]):
        return False  # 3k is three thousand, and so is (3k)
    has_powers = any(token.kind == "number" and "e" in token.text.lower() for token in tokens)
    if not has_number(tokens) and not (marks - set("()")):
        return False  # (A) is a choice
    return bool(numbers > 1 or names or has_powers or marks & _STRUCTURING)


def _is_scaled(tokens: Sequence[Token], name: Token) -> bool:
    before = tokens[tokens.index(name) - 1] if tokens[0] != name else None
    if before is None or before.kind != "number":
        return False
    # 5 g are grams, 5g may be five times g
    return name.text in "kmbKMB" or (name.text in "gh" and before.end < name.start)


def has_number(tokens: Sequence[Token]) -> bool:
    """Whether there is a number or a constant."""
    return any(token.kind == "number" or token.text in CONSTANTS for token in tokens)


def runs(tokens: Sequence[Token]) -> Iterator[Sequence[Token]]:
    """The longest sequences of tokens that are mathematics in a sentence: `It is (5, 4), or 3/2.` has two."""
    run: list[Token] = []
    depth = 0
    for i, token in enumerate(tokens):
        if _continues(tokens, i, run, depth):
            run.append(token)
            depth += (token.text in OPEN) - (token.text in CLOSE)
            continue
        yield from _trimmed(run)
        starts = _continues(tokens, i, [], 0)
        run, depth = ([token], int(token.text in OPEN)) if starts else ([], 0)
    yield from _trimmed(run)


def _continues(tokens: Sequence[Token], i: int, run: Sequence[Token], depth: int) -> bool:
    """Whether token i belongs to the run before it, or begins one."""
    token, before = tokens[i], tokens[i - 1] if i else None
    behind = tokens[i + 1] if i + 1 < len(tokens) else None
    if token.text in CONSTANTS:
        return True
    if token.kind == "number":
        if before is not None and before.kind == "name" and before.end == token.start:
            return False  # Q4, FY2023
        # two numbers side by side are one only as 1 4/5
        is_mixed = i + 2 < len(tokens) and tokens[i + 1].text == "/" and tokens[i + 2].kind == "number"
        return not (run and run[-1].kind == "number") or (is_mixed and "." not in run[-1].text)
    if token.kind == "mark":
        return _mark_continues(token, before, behind, run, depth)
    return _name_continues(token, before, behind, run)


def _mark_continues(token: Token, before: Token | None, behind: Token | None, run: Sequence[Token], depth: int) -> bool:
    text = token.text
    if text in SEPARATORS:
        return depth > 0 or (bool(run) and text == "\u222a")
    if text in CLOSE:
        return depth > 0
    if text in SIGNS:
        return not (run and run[-1].kind == "number")
    # a sign touches its number, a dash between words does not: `Revenue - 412`
    if text in "+-" and not run:
        is_free = before is None or before.end < token.start
        return is_free and behind is not None and behind.start == token.end
    return text in OPEN or (text in OPERATORS and text != ":" and (bool(run) or text in _PREFIXES))


def _name_continues(token: Token, before: Token | None, behind: Token | None, run: Sequence[Token]) -> bool:
    if not is_mathematical(token) or token.text.lower() in ("and", "or"):
        return False
    if len(token.text) > 1:
        return True
    is_glued = before is not None and before.end == token.start
    is_glued_behind = behind is not None and behind.start == token.end
    if behind is not None and is_glued_behind and behind.kind == "number":
        return False  # Q4
    if before is not None and is_glued and before.kind == "number" and token.text in "kmbKMB":
        return False  # 3k
    # a letter alone is a word: `a`, `I`
    if (is_glued and run) or (behind is not None and is_glued_behind and behind.text in _BINDING):
        return True
    return any(neighbor is not None and neighbor.text in _INFIX for neighbor in (run[-1] if run else None, behind))


def _trimmed(run: Sequence[Token]) -> Iterator[Sequence[Token]]:
    """A run without operators at its ends, cut at brackets that nothing opens or closes."""
    opened: list[int] = []
    cuts: list[int] = []
    for i, token in enumerate(run):
        if token.text in OPEN:
            opened.append(i)
        elif token.text in CLOSE and opened:
            opened.pop()
        elif token.text in CLOSE:
            cuts.append(i)
    edges = [-1, *sorted(cuts + opened), len(run)]
    for start, end in pairwise(edges):
        part = list(run[start + 1 : end])
        while part and (part[-1].text in OPERATORS | SIGNS or part[-1].text in SEPARATORS):
            part.pop()
        while part and part[0].text not in _PREFIXES and part[0].text in OPERATORS | SEPARATORS:
            del part[0]
        if part:
            yield part
