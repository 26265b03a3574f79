"""Which of several options a server names, and with which probability: read from the text and tokens of its answer.

`inference.openai_client` asks; a model in this process computes the same in `inference.choose`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from rung.inference.ask import Answer, Reply, without_reasoning


def named_option(text: str, options: Sequence[str]) -> str | None:
    """The option that a text names: the last one in brackets, or else the only one that stands as a word in it."""
    words = "|".join(map(re.escape, options))
    if in_brackets := re.findall(rf"[(\[]\s*({words})\s*[)\]]", text):
        return str(in_brackets[-1])
    found = set(re.findall(rf"(?<!\w)({words})(?!\w)", text))
    return found.pop() if len(found) == 1 else None


def named_logprobs(choice: Any, text: str, options: tuple[str, ...]) -> tuple[float, ...]:
    """Log-probabilities of the options at the last token that names the chosen one; empty without them."""
    named = named_option(without_reasoning(Answer(text, stopped=True)).text, options) if options else None
    tokens = getattr(getattr(choice, "logprobs", None), "content", None)
    if named is None or not isinstance(tokens, list):
        return ()
    for token in reversed(tokens):
        if _mark_of(token) != named:
            continue
        alternatives = getattr(token, "top_logprobs", None)
        listed = [(_mark_of(other), _logprob(other)) for other in (alternatives or [token])]
        known = [value for _, value in listed if math.isfinite(value)]
        if not known:
            return ()
        # an option that is not listed is at most as probable as the last one that is
        return tuple(
            float(np.logaddexp.reduce([value for mark, value in listed if mark == option] or [min(known)]))
            for option in options
        )
    return ()


def _mark_of(token: Any) -> str:
    """The text of a token without the space, bracket or star before or behind an option."""
    text = getattr(token, "token", None)
    return text.strip(" \n\t()[]*\"'.:") if isinstance(text, str) else ""


def _logprob(token: Any) -> float:
    value = getattr(token, "logprob", None)
    return float(value) if isinstance(value, int | float) else -math.inf


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
