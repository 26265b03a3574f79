"""Words of a text, for the metrics that compare words: what punctuation is, and where a word ends without a space.

Python's `str.split` and rouge-score's tokenizer know spaces and ASCII: a Chinese sentence is one word to the first and
no word to the second, so that a wrong answer and a right one get the same score.
"""

from __future__ import annotations

import re
import string
import unicodedata

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Character ranges of scripts that write no space between words: Thai, Lao, Myanmar, Khmer, Kana, Han (Unicode 15.1,
UAX 14, classes ID and SA)."""

_INSIDE_BRACKETS = re.compile(r"(?<=[(\[])\s+|\s+(?=[)\]])")
_ARTICLES = frozenset({"a", "an", "the"})
_SPLIT_UNSPACED = re.compile(f"[{UNSPACED}][\u0300-\u036f\u3099\u309a]?|[^{UNSPACED}]+")
_ASCII_TOKEN = re.compile(r"[a-z0-9]+")
# a typographic apostrophe, quote, hyphen or minus is the ASCII one, and so are full-width brackets, digits and letters
_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if chr(code - 0xFEE0) not in "!,.:;?"}
_TYPOGRAPHIC = {**str.maketrans("\u2018\u2019\u201c\u201d\u2010\u2011\u2012\u2013\u2212", "''\"\"-----"), **_WIDE}
# These decide what a word or a number is: `-5`, `41%`, `C#`, `R&D`, `@home`.
_KEPT = frozenset("-%#&@\u2030\u2031")
_INNER = frozenset("\u00b7\u05f3\u05f4")  # inside words of Catalan and Hebrew
_ASCII_AROUND_WORDS = "".join(c for c in string.punctuation if unicodedata.category(c)[0] == "P" and c not in _KEPT)
# (37) is a negative number, .5 is not 5, and * / \ are operators
_ASCII_AROUND_NUMBERS = ",;:!?\"'"


def normalize(text: str) -> tuple[str, ...]:
    """The words compared by `normalized` and `token_f1`: NFC, casefolded, without punctuation around words.

    Punctuation is the Unicode category P, in every script, without the characters that decide what a word or a number
    is. Articles stay when there is nothing else, or the choice `A` would equal an empty answer.
    """
    # the brackets of `( B )` belong to the word, as in `(B)`
    text = _INSIDE_BRACKETS.sub("", text)
    if text.isascii():
        around_words, around_numbers = _ASCII_AROUND_WORDS, _ASCII_AROUND_NUMBERS
        text = text.lower()
    else:
        # casefolding may take a composed letter apart
        text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).translate(_TYPOGRAPHIC)
        text, around_words, around_numbers = _split_at_punctuation(text)
    words = [_bare_word(word, around_words, around_numbers) for word in text.split()]
    words = [word for word in words if word]
    return tuple([word for word in words if word not in _ARTICLES] or words)


def _split_at_punctuation(text: str) -> tuple[str, str, str]:
    """The text with spaces for the full stops and commas of other scripts, and what is stripped around its words."""
    other = {c: unicodedata.category(c) for c in set(text) if not c.isascii() and c not in _KEPT}
    other = {c: category for c, category in other.items() if category[0] == "P"}
    # no space follows an ideographic comma, and none stands around a long dash
    separators = {ord(c): " " for c, category in other.items() if category in ("Po", "Pd") and c not in _INNER}
    around_numbers = "".join(c for c, category in other.items() if category not in ("Ps", "Pe"))
    around = "".join(other)
    return text.translate(separators), _ASCII_AROUND_WORDS + around, _ASCII_AROUND_NUMBERS + around_numbers


def tokens(text: str) -> tuple[str, ...]:
    """The words of `normalize`; in scripts without spaces each character is one (MLQA, Lewis et al. 2020)."""
    words = normalize(text)
    if text.isascii():
        return words
    return tuple(part for word in words for part in _SPLIT_UNSPACED.findall(word))


def letter_tokens(text: str) -> list[str]:
    """Runs of letters and digits, lower case: rouge-score's tokens for ASCII, and the same in every other script."""
    text = text.lower()
    if text.isascii():
        return _ASCII_TOKEN.findall(text)
    text = unicodedata.normalize("NFC", text)
    # marks belong to letters: without them the words of Indic scripts would fall apart
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()
    return [part for word in words for part in _SPLIT_UNSPACED.findall(word)]


def _bare_word(word: str, around_words: str, around_numbers: str) -> str:
    if any(c.isalpha() for c in word):
        return word.strip(around_words)
    return word.lstrip(around_numbers).rstrip(around_numbers + ".")
