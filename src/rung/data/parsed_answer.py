"""A generated text as an answer: reasoning set apart, and cut at the stop texts of the config.

`ChatTemplate.parsed_answer` calls it with the tags of its template. Evaluation asks after each token whether a stop
text has come, so the same function decides when an answer ends and which part of it is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

REASONING_TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))
"""What models write around reasoning: Qwen, DeepSeek and most others; some tunes; Mistral."""


class ParsedAnswer(NamedTuple):
    """A generated answer with its reasoning set apart."""

    text: str
    """The answer without reasoning and surrounding white space; empty where the model never came to its answer."""
    reasoning: str = ""
    found_stop: bool = False
    """Whether a stop text ended the answer."""


def parse_answer(
    text: str,
    prompt_opening: str,
    *,
    stopped: bool,
    stop_texts: Sequence[str],
    reasoning_tags: Sequence[tuple[str, str]] = REASONING_TAGS,
) -> ParsedAnswer:
    """The answer in a generated text and the reasoning before it.

    `prompt_opening`, the end of the prompt, may hold the opening tag. Reasoning without its closing tag leaves an empty
    answer; so does an answer that was cut (`stopped` is False) where the prompt opens the tag.
    """
    text = text.lstrip()
    for opening, closing in reasoning_tags:
        begins = text.startswith(opening)
        if not begins and not prompt_opening.endswith(opening):
            continue
        reasoning, closed, answer = text.removeprefix(opening).partition(closing)
        # a tuned model may answer at once where the prompt opens the tag: then a complete answer has no closing tag
        if closed or begins or not stopped:
            return _cut(answer, stop_texts)._replace(reasoning=reasoning.strip())
    return _cut(text, stop_texts)


def _cut(answer: str, stop_texts: Sequence[str]) -> ParsedAnswer:
    """The answer up to the first stop text; an answer that starts with line breaks is not ended by them."""
    answer = answer.lstrip()
    end = min((i for text in stop_texts if (i := answer.find(text)) >= 0), default=None)
    return ParsedAnswer(answer[:end].strip(), found_stop=end is not None)
