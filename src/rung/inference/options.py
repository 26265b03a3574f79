"""Which of several options a server names, and with which probability: read from the text and tokens of its answer.

`inference.openai_client` asks; a model in this process computes the same in `inference.choose`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from rung.data.parsed_answer import REASONING_TAGS
from rung.inference.ask import Answer, Reply, without_reasoning

_IN_BRACKETS = re.compile(r"[(\[]\s*\w{1,3}\s*[)\]]")


def named_option(text: str, options: Sequence[str]) -> str | None:
    """The option that a text names: the last one in brackets, or else the only one that stands as a word in it."""
    words = "|".join(map(re.escape, options))
    if in_brackets := re.findall(rf"[(\[]\s*({words})\s*[)\]]", text):
        return str(in_brackets[-1])
    found = set(re.findall(rf"(?<!\w)({words})(?!\w)", text))
    return found.pop() if len(found) == 1 else None


def named_logprobs(choice: Any, text: str, options: tuple[str, ...]) -> tuple[float, ...]:
    """Log-probabilities of the options at the token that names the chosen one; empty where they cannot be told.

    That is the last such token of an answer in brackets, else the first one behind the reasoning: what follows it is an
    explanation, in which the option is certain.
    """
    answer = without_reasoning(Answer(text, stopped=True)).text
    named = named_option(answer, options) if options else None
    tokens = getattr(getattr(choice, "logprobs", None), "content", None)
    if named is None or not isinstance(tokens, list):
        return ()
    naming = [token for token in _behind_reasoning(tokens) if _mark_of(token) == named]
    if not naming:
        return ()
    alternatives = getattr(naming[-1 if _IN_BRACKETS.search(answer) else 0], "top_logprobs", None)
    listed = [(_mark_of(other), _logprob(other)) for other in alternatives] if isinstance(alternatives, list) else []
    # the chosen token alone says nothing of the others
    if len(listed) < 2 or not all(math.isfinite(value) for _, value in listed) or named not in dict(listed):
        return ()
    values = [value for _, value in listed]
    # an option that is not listed has at most what the listed tokens leave, and no more than the last of them
    rest = math.log(max(1.0 - sum(map(math.exp, values)), 1e-12))
    unlisted = min(rest, *values)
    return tuple(
        float(np.logaddexp.reduce([value for mark, value in listed if mark == option] or [unlisted]))
        for option in options
    )


def _behind_reasoning(tokens: Sequence[Any]) -> Sequence[Any]:
    """The tokens behind the last closing tag of reasoning."""
    texts = [str(getattr(token, "token", "")) for token in tokens]
    text = "".join(texts)
    end = max(text.rfind(tag) + len(tag) if tag in text else 0 for _, tag in REASONING_TAGS)
    starts = accumulate(map(len, texts), initial=0)
    return [token for token, start in zip(tokens, starts, strict=False) if start >= end]


def _mark_of(token: Any) -> str:
    """The text of a token without the space, bracket or star before or behind an option."""
    text = getattr(token, "token", None)
    # vocabularies write the space before a token as one of these characters
    return text.strip(" \u2581\u0120\n\t()[]*\"'.:") if isinstance(text, str) else ""


def _logprob(token: Any) -> float:
    value = getattr(token, "logprob", None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def option_logprobs(reply: Reply | None, options: Sequence[str]) -> list[float]:
    """The row of `Server.choose` for one reply."""
    if reply is None:
        return [math.nan] * len(options)
    answer = without_reasoning(reply.answers[0])
    if answer.option_logprobs:
        total = float(np.logaddexp.reduce(answer.option_logprobs))
        return [value - total for value in answer.option_logprobs]
    named = named_option(answer.text, options)
    return [math.nan if named is None else 0.0 if option == named else -math.inf for option in options]
