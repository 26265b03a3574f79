"""What a made row must pass. Every filter says why it leaves a text out; docs/synth/teach.md has the definitions.

The filters of questions see the seeds and all rows that were kept before, so they are asked in order: the same texts in
the same order give the same rows. A filter never repairs a text. `teach` asks them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rung.config.synth import FiltersConfig
from rung.data.deduplication import NearDuplicateIndex, prompt_words
from rung.scoring.answer_rules import refusal
from rung.scoring.metrics import rouge_l
from rung.scoring.quantities import quantities, quantities_agree
from rung.scoring.words import letter_tokens
from rung.types import Record

STOP_WORDS = 60
"""Words of the seeds' profile: the most frequent ones of a language are grammar, whatever the topic."""
MIN_DISTINCT_WORDS = 150
"""Distinct words of the seeds below which they give no profile: frequent words would be those of the topic."""
MIN_COMPARED_WORDS = 8
"""Words of a text below which its share of stop words says nothing."""
STOP_WORD_SHARE = 0.25
"""Part of the seeds' mean share of stop words that a text in their language reaches."""
SEEDS_LEFT_OUT = 0.05
"""Share of the seeds' own texts that the profile may leave out at most: lists and code have few stop words."""
MIN_SCRIPT_SHARE = 0.05
"""Share of the seeds' letters from which a script is one of theirs."""
FOREIGN_SHARE = 0.1
"""Share of a text's letters that may be of another script: names and quotations."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a text is left out."""

    filter: str
    reason: str


def check_length(question: str, filters: FiltersConfig) -> Rejection | None:
    """`length`: between `min_words` and `max_words` words of letters and digits in a question.

    Of scripts that are written without spaces each character is a word, as for `novelty`.
    """
    words = len(letter_tokens(question))
    if filters.min_words <= words <= filters.max_words:
        return None
    return Rejection("length", f"a question of {words} words, allowed are {filters.min_words} to {filters.max_words}")


def check_incomplete(name: str, text: str, stopped: bool) -> Rejection | None:
    """`cut` and `empty`: a text that reached the limit of tokens, or that holds nothing."""
    if not stopped:
        return Rejection("cut", f"the {name} was cut at max_new_tokens")
    return None if text else Rejection("empty", f"the {name} has no text")


def check_answer_length(answer: str, limit: int | None) -> Rejection | None:
    """`length`: at most `limit` words in an answer."""
    words = len(letter_tokens(answer))
    if limit is None or words <= limit:
        return None
    return Rejection("length", f"an answer of {words} words, allowed are {limit}")


def check_refusal(answer: str) -> Rejection | None:
    """`refusals`: the answer begins by declining, in English."""
    said = refusal(answer)
    return None if said is None else Rejection("refusals", f"it declines: {said!r}")


def check_grounded(answer: str, passage: str) -> Rejection | None:
    """`grounded`: every number of the answer agrees with one of the passage, and every name of it stands there.

    A name is a run of capitalized words that does not begin a sentence; abbreviations such as CEO are none. An answer
    in other words than its passage passes; one that adds a fact with a number or a name does not.
    """
    of_passage = quantities(passage)
    for quantity in quantities(_LIST_MARK.sub("", answer)):
        if not any(quantities_agree(quantity, other) for other in of_passage):
            return Rejection("grounded", f"the passage does not hold the number {quantity.numeral:g}")
    words = set(letter_tokens(passage))
    for name in _names(answer):
        if not set(letter_tokens(name)) <= words:
            return Rejection("grounded", f"the passage does not hold the name {name!r}")
    return None


_LIST_MARK = re.compile(r"^\s*\d+[.)]\s", re.MULTILINE)
_SENTENCE_START = re.compile(r"(?:^|[.!?:]\s{1,3}|\n\s{0,3}|[\"“(]\s?)\Z")
_CAPITALIZED = r"[^\W\d_a-z][\w'’&-]*(?:\.\w+)*"
_NAME = re.compile(rf"\b{_CAPITALIZED}(?:\s+{_CAPITALIZED})*")
_LONGEST_ABBREVIATION = 5


def _names(text: str) -> Iterable[str]:
    """Runs of capitalized words, without the word that begins a sentence, single letters and abbreviations."""
    text = _LIST_MARK.sub("", text)
    for match in _NAME.finditer(text):
        if not match.group(0)[:1].isupper():  # scripts without capitals have no names that could be seen
            continue
        words = match.group(0).split()
        # a few characters: the whole text before it would make long answers quadratic
        if _SENTENCE_START.search(text[max(0, match.start() - 5) : match.start()]):
            words = words[1:]
        words = [word for word in words if not (word.isupper() and len(word) <= _LONGEST_ABBREVIATION)]
        if words:
            yield " ".join(words).rstrip(".")


class LeakFilter:
    """`leak`: a question that, word by word, is one of the rows that must not occur.

    Context and question are compared as one text. Where one of the two rows has no context the question alone decides;
    two questions in the same words about two contexts are two questions.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._whole: dict[tuple[str, ...], str] = {}
        self._questions: dict[tuple[str, ...], str] = {}
        self._without_context: dict[tuple[str, ...], str] = {}
        for record in records:
            source = str(record.source)
            self._whole.setdefault(tuple(prompt_words(record)), source)
            question = tuple(prompt_words(replace(record, context=None)))
            self._questions.setdefault(question, source)
            if not record.context:
                self._without_context.setdefault(question, source)

    @property
    def questions(self) -> list[list[str]]:
        """Words of all contexts and questions, sorted."""
        return sorted(map(list, self._whole))

    def check(self, record: Record) -> Rejection | None:
        """The row that asks the same, if there is one."""
        question = tuple(prompt_words(replace(record, context=None)))
        questions = self._without_context if record.context else self._questions
        source = self._whole.get(tuple(prompt_words(record))) or questions.get(question)
        return None if source is None else Rejection("leak", f"it asks what {source} asks")


class NoveltyFilter:
    """`novelty`: ROUGE-L F1 to every seed and every earlier question below a threshold (Wang et al. 2023, section 2.2).

    ROUGE-L is at most 2 n / (a + b) for texts of a and b words with n words in common, counted with repetition, so only
    questions that can reach the threshold are compared.
    """

    def __init__(self, threshold: float, questions: Iterable[str] = ()) -> None:
        self.threshold = threshold
        self._questions: list[str] = []
        self._lengths: list[int] = []
        self._occurrences: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for question in questions:
            self.add(question)

    def add(self, question: str) -> None:
        """Add a question that later ones must differ from."""
        counts = Counter(letter_tokens(question))
        for word, count in counts.items():
            self._occurrences[word].append((len(self._questions), count))
        self._questions.append(question)
        self._lengths.append(counts.total())

    def check(self, question: str) -> Rejection | None:
        """The most similar earlier question, if it is too similar."""
        similarity, nearest = self.most_similar(question)
        if similarity < self.threshold:
            return None
        return Rejection("novelty", f"ROUGE-L {similarity:.2f} with: {nearest}")

    def most_similar(self, question: str) -> tuple[float, str]:
        """The highest ROUGE-L F1 that reaches the threshold, with its question; (0, "") if none does."""
        counts = Counter(letter_tokens(question))
        shared = np.zeros(len(self._questions))
        for word, count in counts.items():
            for i, other in self._occurrences.get(word, ()):
                shared[i] += min(count, other)
        bounds = 2.0 * shared / np.maximum(1, np.array(self._lengths) + counts.total())
        best = (0.0, "")
        for i in np.argsort(-bounds, kind="stable"):
            if bounds[i] < max(self.threshold, best[0]):
                break
            if (similarity := rouge_l(question, self._questions[i])) > best[0]:
                best = (similarity, self._questions[i])
        return best if best[0] >= self.threshold else (0.0, "")


class NearDuplicateFilter:
    """`near_duplicates`: Jaccard similarity of the character 5-grams of question and answer below a threshold."""

    def __init__(self, threshold: float) -> None:
        self.threshold, self._index = threshold, NearDuplicateIndex()

    def add(self, text: str) -> None:
        """Add a text that later ones must differ from."""
        self._index.add(_plain(text))

    def check(self, text: str) -> Rejection | None:
        """The most similar earlier text, if it is too similar."""
        nearest = self._index.most_similar(_plain(text))
        if nearest is None or nearest[0] < self.threshold:
            return None
        return Rejection("near_duplicates", f"{nearest[0]:.0%} of its 5-grams are those of an earlier row")


def _plain(text: str) -> str:
    return " ".join(letter_tokens(text))


class LanguageFilter:
    """`language`: a text has the scripts of the seeds, and their stop words.

    The profile is the seeds' `STOP_WORDS` most frequent words; a text of at least `MIN_COMPARED_WORDS` words must have
    `STOP_WORD_SHARE` of the share that they have in the seeds. Few seeds give no profile, and then scripts alone count.
    """

    def __init__(self, seeds: Sequence[str]) -> None:
        scripts = Counter(script for text in seeds for script in map(_script, text) if script)
        total = scripts.total()
        self.scripts = {script for script, count in scripts.items() if count >= MIN_SCRIPT_SHARE * total}
        words = Counter(word for text in seeds for word in letter_tokens(text))
        self.stop_words = frozenset(word for word, _ in words.most_common(STOP_WORDS) if word.isalpha())
        self.mean_share = sum(words[word] for word in self.stop_words) / max(1, words.total())
        # numbers vary where a template does not: they tell no language
        self.has_profile = sum(word.isalpha() for word in words) >= MIN_DISTINCT_WORDS
        shares = [share for text in seeds if (share := self._share(text)) is not None]
        lowest = float(np.quantile(shares, SEEDS_LEFT_OUT)) if shares else 0.0
        self.least_share = min(STOP_WORD_SHARE * self.mean_share, lowest)

    def check(self, text: str) -> Rejection | None:
        """The script or the lack of stop words that tells another language."""
        scripts = Counter(script for script in map(_script, text) if script)
        foreign = {script: count for script, count in scripts.items() if script not in self.scripts}
        if self.scripts and sum(foreign.values()) > FOREIGN_SHARE * scripts.total():
            return Rejection("language", f"letters of {max(foreign, key=foreign.__getitem__).lower()}")
        share = self._share(text)
        if not self.has_profile or share is None or share >= self.least_share:
            return None
        reason = f"{share:.0%} of its words are frequent ones of the seeds, of whose words it is {self.mean_share:.0%}"
        return Rejection("language", reason)

    def _share(self, text: str) -> float | None:
        """Share of stop words among the words of a text; None for a text of few words."""
        words = letter_tokens(text)
        if len(words) < MIN_COMPARED_WORDS:
            return None
        return sum(word in self.stop_words for word in words) / len(words)


_WRITTEN_TOGETHER = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK"}
"""Scripts of one text in Japanese, under one name."""
_NO_SCRIPTS = frozenset({"FULLWIDTH", "HALFWIDTH", "MICRO", "MODIFIER", "FEMININE", "MASCULINE"})
"""First words of names that tell no script."""


def _script(character: str) -> str:
    """The script of a letter, as the first word of its Unicode name; empty for what is no letter."""
    if not character.isalpha():
        return ""
    script = unicodedata.name(character, "").split(" ")[0]
    return "" if script in _NO_SCRIPTS else _WRITTEN_TOGETHER.get(script, script)


def diversity(texts: Sequence[str]) -> float:
    """Distinct word bigrams over all bigrams (Li et al. 2016, distinct-2); 1 where none repeats, 0 without any."""
    bigrams = Counter(pair for words in map(letter_tokens, texts) for pair in zip(words, words[1:], strict=False))
    return len(bigrams) / bigrams.total() if bigrams else 0.0
