"""Words of a text, in every place that compares or counts them: metrics, retrieval, duplicates, diversity, passages.

Python's `str.split` and rouge-score's tokenizer know spaces and ASCII: a Chinese sentence is one word to the first and
no word to the second, so that a wrong answer and a right one get the same score. Regular expressions leave combining
marks out of words, which cuts the words of Hindi at their vowels. Scripts that write no space between words are cut
into characters with their marks, or into overlapping pairs of them where a search must tell texts apart
(`search_words`).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

UNSPACED = (
    # without their digits: a number is one word in every script
    "\u0e00-\u0e4f\u0e5a-\u0ecf\u0eda-\u0eff\u1000-\u103f\u104a-\u108f\u109a-\u109f\u1780-\u17df\u17ea-\u17ff"
    "\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa7f\u1950-\u19cf\u1a20-\u1a7f\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
"""Character ranges of scripts that write no space between words: Thai, Lao, Myanmar, Khmer, Tai, Kana, Han (Unicode
15.1, UAX 14, classes ID and SA)."""

_INSIDE_BRACKETS = re.compile(r"(?<=[(\[])\s+|\s+(?=[)\]])")
_ARTICLES = frozenset({"a", "an", "the"})
_ANY_UNSPACED = re.compile(f"[{UNSPACED}]")
_ASCII_WORD = re.compile(r"\w+")
_SPACED_PIECE = re.compile(r"\S+")
_JOINERS = {0x200C: None, 0x200D: None}
"""Zero-width joiner and non-joiner: they shape a word of Persian or an Indic script, and are often left out."""
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
    return tuple(part for word in words for part in _characters_apart(word))


def letter_tokens(text: str) -> list[str]:
    """Runs of letters and digits, lower case: rouge-score's tokens for ASCII, and the same in every other script."""
    text = text.lower()
    if text.isascii():
        return _ASCII_TOKEN.findall(text)
    text = unicodedata.normalize("NFC", text)
    # marks belong to letters: without them the words of Indic scripts would fall apart
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()
    return [part for word in words for part in _characters_apart(word)]


def _bare_word(word: str, around_words: str, around_numbers: str) -> str:
    if any(c.isalpha() for c in word):
        return word.strip(around_words)
    return word.lstrip(around_numbers).rstrip(around_numbers + ".")


def plain_words(text: str) -> list[str]:
    """Runs of letters, digits and `_` with their marks, NFKC and casefolded; of scripts without spaces each character.

    No stemming and no stop words: all languages are treated equally.
    """
    words, is_spaced = _runs_of_letters(text)
    return words if is_spaced else [part for word in words for part in _characters_apart(word)]


def search_words(text: str) -> list[str]:
    """`plain_words`, with overlapping pairs of characters in scripts without spaces; a lone character stays alone.

    Single characters are shared by most texts of a language, and pairs need no dictionary (Luk and Kwok 2002, section
    3.2; Lucene's CJKBigramFilter). A run of three characters A, B and C gives the words AB and BC.
    """
    words, is_spaced = _runs_of_letters(text)
    return words if is_spaced else [part for word in words for part in _pairs(_characters_apart(word))]


def _runs_of_letters(text: str) -> tuple[list[str], bool]:
    """Runs of letters, digits and `_` of a text, and whether spaces stand between all of its words."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower()), True
    text = unicodedata.normalize("NFKC", text).casefold().translate(_JOINERS)
    return _patterns().word.findall(text), _ANY_UNSPACED.search(text) is None


def readable(words: Sequence[str]) -> str:
    """Words of `search_words` as one text: overlapping pairs are written once."""
    parts: list[str] = []
    previous = ""
    for word in words:
        pair = _characters_apart(word)
        is_unspaced = _ANY_UNSPACED.match(word) is not None
        if is_unspaced and previous and len(pair) == 2 and pair[0] == previous:
            parts[-1] += pair[1]
        else:
            parts.append(word)
        previous = pair[-1] if is_unspaced else ""
    return " ".join(parts)


def piece_spans(text: str) -> list[tuple[int, int]]:
    """Begin and end of each piece that a length in words counts.

    A piece is what stands between white space, and in scripts without spaces each character with the punctuation that
    follows it.
    """
    pattern = _SPACED_PIECE if text.isascii() or _ANY_UNSPACED.search(text) is None else _patterns().piece
    return [match.span() for match in pattern.finditer(text)]


class _Patterns:
    """Patterns that need the combining marks of all scripts, which `re` has no class for."""

    def __init__(self) -> None:
        marks = "".join(f"{chr(start)}-{chr(end)}" for start, end in _mark_ranges())
        self.word = re.compile(f"[\\w{marks}]+")
        self.part = re.compile(f"[{UNSPACED}][{marks}]*|[^{UNSPACED}]+")
        self.piece = re.compile(f"[{UNSPACED}][{marks}]*(?:(?![{UNSPACED}])[^\\w\\s])*|[^\\s{UNSPACED}]+")


@cache
def _patterns() -> _Patterns:
    # at the first text that is not ASCII: looking up all characters takes 15 ms
    return _Patterns()


def _mark_ranges() -> Iterator[tuple[int, int]]:
    """Ranges of the characters of category M (Unicode, of this Python); above U+1FFFF only selectors of variants."""
    start: int | None = None
    for code in range(0x300, 0x20000):
        is_mark = unicodedata.category(chr(code))[0] == "M"
        if is_mark and start is None:
            start = code
        elif not is_mark and start is not None:
            yield start, code - 1
            start = None
    yield 0xE0100, 0xE01EF


def _characters_apart(word: str) -> list[str]:
    """A word, cut into the characters of scripts without spaces, with their marks, and what stands between them."""
    if word.isascii() or _ANY_UNSPACED.search(word) is None:
        return [word]
    return list(_patterns().part.findall(word))


def _pairs(parts: list[str]) -> Iterator[str]:
    """Neighboring characters of scripts without spaces as pairs; other words and lone characters as they are."""
    unspaced = [_ANY_UNSPACED.match(part) is not None for part in parts]
    last = len(parts) - 1
    for i, part in enumerate(parts):
        follows, goes_on = i > 0 and unspaced[i - 1], i < last and unspaced[i + 1]
        if unspaced[i] and goes_on:
            yield part + parts[i + 1]
        elif not (unspaced[i] and follows):
            yield part
