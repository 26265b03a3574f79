r"""LaTeX answers as plain text that `scoring.expressions` reads: `\frac{1}{2}` is `((1)/(2))`, `9{,}500` is `9,500`.

Only what occurs in answers is known, by one pass of regular expressions: no macro is expanded and no value computed.
What is not known stays as it is, so that two texts still differ where their sources do. The `math` metric has a
whole parser.
"""

from __future__ import annotations

import re

MAX_GROUPS = 64
"""Fractions that are read, counted from the end: an answer has a few, and hostile text costs time."""
MAX_GROUP_CHARACTERS = 2000
"""Length up to which the end of a group is looked for."""

# `\left(`, `\!` and the like change the look alone
_LAYOUT = re.compile(r"\\(?:displaystyle|textstyle|limits|nolimits|[bB]igg?[lrm]?|quad|qquad)(?![A-Za-z])|\\[!,;:> ]|~")
# nothing, not a space: the minus of `-\left(` belongs to the bracket
_SIZE = re.compile(r"\\(?:left|right)(?![A-Za-z])")
_THOUSANDS = re.compile(r"\{,\}\s*|,\\!\s*")
_FRACTION = re.compile(r"\\[dtc]?frac(?![A-Za-z])\s*")
_ROOT_OF_DIGIT = re.compile(r"\\sqrt\s*(\d)")
_BRACE = re.compile(r"\\?[{}]")
# `{1, 2}` is a set, the argument of a command or an index is none
_PLAIN_SET = re.compile(r"(?<![\w}\])^_\\])\{([^{},]{0,300},[^{}]{0,300})\}")
_WHOLE_AHEAD = re.compile(r"(?<![\w.^_{])\d+\s*\Z")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mbox|math(?:rm|bf|it|sf|tt)|operatorname|boxed|fbox)\s*(?:\{([^{}]*)\}|(?=\{))"
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BOX_JOINT = re.compile(r"[\s$,;]*(?:\\text\s*\{)?\s*(?:and|or)?\s*\}?[\s$,;]*(?:[A-Za-z]\s*=\s*)?")
MAX_JOINT = 30
"""Characters between two boxes that are one answer, such as `, \\text{ and } `."""
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([A-Za-z]*matrix|array)\}(?:\{[lcr|]{0,20}\})?")
_MATH = re.compile(r"\$\$|\\[()\[\]]|(?<!\\)\$(?=[^\s$][^$\n]{0,300}(?<=[^\s\\])\$(?![\w$]))|(?<=[^\s\\])\$(?![\w$])")
_COMMAND = re.compile(r"\\([A-Za-z]+|.)")
_COMMANDS = {
    **dict.fromkeys(("cdot", "times", "ast"), "*"),
    **dict.fromkeys(("div",), "/"),
    **dict.fromkeys(("le", "leq", "leqslant"), "\u2264"),
    **dict.fromkeys(("ge", "geq", "geqslant"), "\u2265"),
    **dict.fromkeys(("in", "approx", "equiv"), "="),
    **dict.fromkeys(("lbrace", "{"), "\u2774"),
    **dict.fromkeys(("rbrace", "}"), "\u2775"),
    "ne": "\u2260",
    "neq": "\u2260",
    "pm": "\u00b1",
    "mp": "\u2213",
    "cup": "\u222a",
    "cap": "\u2229",
    "pi": "\u03c0",
    "infty": "\u221e",
    "sqrt": "\u221a",
    "circ": "\u00b0",
    "degree": "\u00b0",
    "lt": "<",
    "gt": ">",
    "mid": "|",
    "ldots": "\u2026",
    "dots": "\u2026",
}
_DEGREE = re.compile(r"\^\s*(?:\{\s*\u00b0\s*\}|\u00b0)")
_SUPERSCRIPT = re.compile("[\u00b2\u00b3\u00b9\u2070-\u2079\u207b]+")
_SUPERSCRIPTS = str.maketrans("\u00b2\u00b3\u00b9\u2070\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "2310456789-")
_VULGAR = {
    "\u00bd": "1/2", "\u2153": "1/3", "\u2154": "2/3", "\u00bc": "1/4", "\u00be": "3/4", "\u2155": "1/5",
    "\u2156": "2/5", "\u2157": "3/5", "\u2158": "4/5", "\u2159": "1/6", "\u215a": "5/6", "\u215b": "1/8",
    "\u215c": "3/8", "\u215d": "5/8", "\u215e": "7/8",
}  # fmt: skip
_VULGAR_FRACTION = re.compile(f"[{''.join(_VULGAR)}]")
_OPERATORS = str.maketrans("\u00d7\u00b7\u22c5\u00f7\u2044\u2212\u2013\u223c\u2248", "***//--==")


def plain_math(text: str) -> str:
    """The text without LaTeX: commands are characters, groups in brackets, sets in ornamental braces (U+2774)."""
    if "\\" in text or "{" in text or "$" in text:
        text = _plain_latex(text)
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda m: f"^({m[0].translate(_SUPERSCRIPTS)})", text)
        text = _VULGAR_FRACTION.sub(lambda m: f" {_VULGAR[m[0]]} ", text)
        text = text.translate(_OPERATORS)
    return text


def boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{}` or `\fbox{}`, where MATH (Hendrycks et al. 2021) has its answers, or None."""
    opening = max((match.end() for match in _BOX.finditer(text)), default=-1)
    if opening < 0:
        return None
    if text[opening : opening + 1] != "{":
        # \boxed 5 and \boxed5
        return text[opening:].split("$")[0].split("\n")[0].strip() or None
    end = _group_end(text, opening)
    return text[opening + 1 : end - 1].strip() if end else None


def last_boxes(text: str) -> str | None:
    r"""The last `\boxed{}` with those before it that nothing but a comma, `and` or `or` separates; None without one.

    A box before other text is an attempt or a step: `\boxed{2}. Wait, \boxed{3}` is 3.
    """
    boxes = [match.span() for match in _BOX.finditer(text)]
    if not boxes:
        return None
    first, opening = boxes.pop()
    end = _group_end(text, opening) or len(text)
    while boxes:
        start, opening = boxes.pop()
        closing = _group_end(text, opening)
        if closing is None or first - closing > MAX_JOINT or not _BOX_JOINT.fullmatch(text[closing:first]):
            break
        first = start
    return text[first:end]


def _plain_latex(text: str) -> str:
    # rows of a matrix; before spaces, as "\\ " is one
    text = _THOUSANDS.sub(",", text.replace("\\\\", " ; "))
    text = _MATH.sub(" ", text)
    text = _LAYOUT.sub(" ", _SIZE.sub("", text))
    if "\\" not in text and "{" not in text:
        return text
    text = _ENVIRONMENT.sub(lambda m: " \u27e6 " if m[1] == "begin" else " \u27e7 ", text)
    # only columns of a matrix are separated by an unescaped &
    if "\u27e6" in text:
        text = re.sub(r"(?<!\\)&", ",", text)
    text = _TEXT.sub(lambda m: f" {m[1] or ''} ", text) if "\\" in text else text
    text = _ROOT_OF_DIGIT.sub(r"\\sqrt{\1}", _fractions(text))
    text = _COMMAND.sub(_command, text)
    text = _PLAIN_SET.sub("\u2774\\1\u2775", _DEGREE.sub("\u00b0", text))
    return text.replace("\u2774", "\u2774 ").replace("{", "(").replace("}", ")")


def _command(match: re.Match[str]) -> str:
    name = match[1]
    if name in ("$", "%", "#", "&", "_"):
        return name
    # an unknown command keeps its backslash: \alpha is no word
    return _COMMANDS.get(name, match[0])


def _fractions(text: str) -> str:
    r"""`\frac{a}{b}` as `((a)/(b))`; behind a whole number as `1 4/5`, a mixed number."""
    starts = [(match.start(), match.end()) for match in _FRACTION.finditer(text)]
    # from the last one backwards, so that the groups of an outer fraction are plain already and positions still hold
    for start, end in starts[: -MAX_GROUPS - 1 : -1]:
        above, middle = _argument(text, end)
        below, behind = _argument(text, middle)
        if above is not None and below is not None:
            is_mixed = above.isdigit() and below.isdigit() and _WHOLE_AHEAD.search(text[max(0, start - 20) : start])
            fraction = f" {above}/{below} " if is_mixed else f"(({above})/({below}))"
            text = text[:start] + fraction + text[behind:]
    return text


def _argument(text: str, start: int) -> tuple[str | None, int]:
    r"""The argument of a command at a position, a group or one character, and where it ends."""
    while start < len(text) and text[start] == " ":
        start += 1
    if start >= len(text):
        return None, start
    if text[start] == "{":
        end = _group_end(text, start)
        return (text[start + 1 : end - 1].strip(), end) if end else (None, start)
    if text[start] == "\\" and (command := _COMMAND.match(text, start)):
        return command[0], command.end()
    return text[start], start + 1


def _group_end(text: str, start: int) -> int | None:
    """Behind the brace that closes the one at `start`; None if it stays open."""
    depth = 0
    for brace in _BRACE.finditer(text, start, start + MAX_GROUP_CHARACTERS):
        if brace[0][0] != "\\":
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return brace.end()
    return None
