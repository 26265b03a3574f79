"""How answers are made and scored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from rung.spec.base import Spec
from rung.spec.judge import JudgeSpec

MetricName = Literal["exact", "normalised", "numeric", "token_f1", "rouge_l", "perplexity"]


class EvaluateSpec(Spec):
    """Greedy answers to held-out questions, scored item by item."""

    metrics: tuple[MetricName, ...] = Field(default=("exact", "numeric"), min_length=1)
    """Scores to report; the first one decides."""
    instruction: str | None = None
    """System turn given to the untuned rungs: the strongest honest prompt you have. Tuned rungs do without it."""
    shots: NonNegativeInt = 4
    """Worked examples in front of each question of the few-shot rung, taken from the training split."""
    context: Literal["given", "withheld"] = "given"
    """Whether the row's own context stands in the prompt, of tuned rungs in training too."""
    max_new_tokens: PositiveInt = 64
    """Longest answer in tokens."""
    limit: PositiveInt | None = None
    """Use at most this many test items, taken in the order of the seed."""
    dequantise: bool = False
    """Answer from a copy of a quantised base in full width: the same numbers, faster, in more memory (qlora only)."""
    batch: PositiveInt = 32
    """Questions answered at once."""
    judge: JudgeSpec | None = None
    """Who says which of two answers is better, for `rung eval RUN --against OTHER`."""
