"""What a made row must pass. Every filter says why it leaves a text out; docs/synth.md has the definitions.

The filters of questions see the seeds and all rows that were kept before, so they are asked in order: the same texts in
the same order give the same rows. A filter never repairs a text. `teach` asks them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rung.config.synth import FiltersConfig
from rung.data.deduplication import NearDuplicateIndex
from rung.scoring.metrics import rouge_l
from rung.scoring.quantities import quantities, quantities_agree
from rung.scoring.words import letter_tokens

REFUSAL_CHARACTERS = 200
"""Refusals begin an answer: a later `I cannot` may be part of the answer itself."""
_REFUSALS = re.compile(
    r"\b(as an ai\b|as a (large )?language model"
    r"|i(['’]m| am) (very |so |really )?(sorry|afraid|unable|not able|not allowed)"
    r"|i (can(no|['’])t|can not|won['’]t|will not|must decline|am not able) (to )?"
    r"(help|assist|answer|provide|comply|do|fulfil|discuss|create|write|continue|engage|support)"
    r"|i (do not|don['’]t) have (enough |any |sufficient )?(information|access|context|data)"
    r"|i must (respectfully )?(decline|refuse))",
    re.IGNORECASE,
)
STOP_WORDS = 60
"""Words of the seeds' profile: the most frequent ones of a language are grammar, whatever the topic."""
MIN_DISTINCT_WORDS = 150
"""Distinct words of the seeds below which they give no profile: frequent words would be those of the topic."""
MIN_COMPARED_WORDS = 8
"""Words of a text below which its share of stop words says nothing."""
STOP_WORD_SHARE = 0.25
"""Part of the seeds' mean share of stop words that a text in their language reaches."""
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
    """`length`: words of a question, separated by white space, between `min_words` and `max_words`."""
    words = len(question.split())
    if filters.min_words <= words <= filters.max_words:
        return None
    return Rejection("length", f"a question of {words} words, allowed are {filters.min_words} to {filters.max_words}")


def check_answer_length(answer: str, filters: FiltersConfig) -> Rejection | None:
    """`length`: at most `max_answer_words` words in an answer."""
    words, limit = len(answer.split()), filters.max_answer_words
    if limit is None or words <= limit:
        return None
    return Rejection("length", f"an answer of {words} words, allowed are {limit}")


def check_refusal(answer: str) -> Rejection | None:
    """`refusals`: the answer begins by declining, in English."""
    match = _REFUSALS.search(answer[:REFUSAL_CHARACTERS])
    return Rejection("refusals", f"it declines: {match.group(0)!r}") if match else None


def check_grounded(answer: str, passage: str) -> Rejection | None:
    """`grounded`: every number of the answer agrees with one of the passage, and every name of it stands there.

    A name is a run of capitalized words that does not begin a sentence. An answer in other words than its passage
    passes; one that adds a fact with a number or a name does not.
    """
    of_passage = quantities(passage)
    for quantity in quantities(answer):
        if not any(quantities_agree(quantity, other) for other in of_passage):
            return Rejection("grounded", f"the passage does not hold the number {quantity.numeral:g}")
    words = set(letter_tokens(passage))
    for name in _names(answer):
        if not set(letter_tokens(name)) <= words:
            return Rejection("grounded", f"the passage does not hold the name {name!r}")
    return None


_SENTENCE_START = re.compile(r"(?:^|[.!?:]\s+|\n\s*|[\"“(]\s*)\Z")
_CAPITALIZED = r"[^\W\d_a-z][\w'’&-]*(?:\.\w+)*"
_NAME = re.compile(rf"\b{_CAPITALIZED}(?:\s+{_CAPITALIZED})*")


def _names(text: str) -> Iterable[str]:
    """Runs of capitalized words, without the word that begins a sentence."""
    for match in _NAME.finditer(text):
        if not match.group(0)[:1].isupper():  # scripts without capitals have no names that could be seen
            continue
        words = match.group(0).split()
        if _SENTENCE_START.search(text[: match.start()]):
            words = words[1:]
        if words:
            yield " ".join(words).rstrip(".")


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
        self.has_profile = len(words) >= MIN_DISTINCT_WORDS

    def check(self, text: str) -> Rejection | None:
        """The script or the lack of stop words that tells another language."""
        scripts = Counter(script for script in map(_script, text) if script)
        foreign = {script: count for script, count in scripts.items() if script not in self.scripts}
        if self.scripts and sum(foreign.values()) > FOREIGN_SHARE * scripts.total():
            return Rejection("language", f"letters of {max(foreign, key=foreign.__getitem__).lower()}")
        words = letter_tokens(text)
        if not self.has_profile or len(words) < MIN_COMPARED_WORDS:
            return None
        share = sum(word in self.stop_words for word in words) / len(words)
        if share >= STOP_WORD_SHARE * self.mean_share:
            return None
        return Rejection(
            "language", f"{share:.0%} of its words are frequent ones of the seeds, {self.mean_share:.0%} there"
        )


def _script(character: str) -> str:
    """The script of a letter, as the first word of its Unicode name; empty for what is no letter."""
    return unicodedata.name(character, "").split(" ")[0] if character.isalpha() else ""


def diversity(texts: Sequence[str]) -> float:
    """Distinct word bigrams over all bigrams (Li et al. 2016, distinct-2); 1 where none repeats, 0 without any."""
    bigrams = Counter(pair for words in map(letter_tokens, texts) for pair in zip(words, words[1:], strict=False))
    return len(bigrams) / bigrams.total() if bigrams else 0.0
