"""Answers chosen among labels by their log-probability, in place of generated text (`evaluation.choices`).

A model that generates must guess how a label is written; a choice cannot be unreadable, and its probability says how
sure it is. All labels are children of one prompt, which is computed once. `evaluate` calls `choose_labels`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rung.config.evaluation import ChoicesConfig, EvaluationConfig
from rung.console import ProgressBar
from rung.data.chat import ChatTemplate
from rung.data.messages import expected_text
from rung.errors import DataError
from rung.evaluation.prompting import PromptFormat
from rung.inference.choose import choose
from rung.models.policy import Policy
from rung.results.evaluation import Classification, Confusion
from rung.scoring.classification import (
    accuracy_at_coverage,
    class_scores,
    expected_calibration_error,
    macro_f1,
)
from rung.scoring.stats import Clusters, score_interval
from rung.types import Message, Record

MAX_CHOICES = 1_000
"""Labels of a task; with more, rows are probably no labels but answers."""
CONTENT_FREE = "N/A"
"""A question without content (Zhao et al. 2021, arXiv 2102.09690, section 5)."""


def label_choices(config: EvaluationConfig, train: Sequence[Record], test: Sequence[Record]) -> tuple[str, ...]:
    """The labels among which answers are chosen; empty where they are generated.

    `auto`: the distinct answers of the training rows, in alphabetical order. Raises `DataError` for fewer than two or
    more than `MAX_CHOICES`, and for a test row whose answer is none of them.
    """
    if config.choices is None:
        return ()
    labels = config.choices.labels
    choices = tuple(sorted({expected_text(row) for row in train})) if labels == "auto" else labels
    if not 2 <= len(choices) <= MAX_CHOICES:
        summary = f"the training rows have {len(choices):,} distinct answers: these are no labels to choose among"
        raise DataError(summary, where="evaluation.choices", allowed=f"2 to {MAX_CHOICES:,}")
    for row in test:
        if expected_text(row) not in choices:
            summary = "the answer of this test row is none of the labels, so that no model could be right"
            hint = "name all labels in evaluation.choices, or leave the row out"
            raise DataError(summary, where=str(row.source), given=expected_text(row), hint=hint)
    return choices


def with_labels(config: EvaluationConfig, labels: tuple[str, ...]) -> EvaluationConfig:
    """The config with `auto` replaced by the labels; unchanged where there are none."""
    if config.choices is None or not labels:
        return config
    return config.model_copy(update={"choices": config.choices.model_copy(update={"labels": labels})})


@dataclass(frozen=True, slots=True)
class LabelChoice:
    """The label that a model chose for one question."""

    label: str
    confidence: float
    """Its probability among the labels."""
    expected_probability: float
    """Probability of the expected label among the labels; NaN where it is none of them."""


def choose_labels(
    policy: Policy,
    chat: ChatTemplate,
    records: Sequence[Record],
    prompts: Sequence[Sequence[int]],
    prompt_format: PromptFormat,
    config: ChoicesConfig,
    title: str,
) -> list[LabelChoice]:
    """The likeliest label of `config.labels` after each prompt, as an answer that ends there.

    With `config.calibrated` the log-probability of each label after a question without content is subtracted, so that a
    label does not win by being a frequent text (Holtzman et al. 2021, arXiv 2104.08315; Zhao et al. 2021).
    """
    choices = tuple(config.labels)
    options = [answer_ids(chat, records[0], label) for label in choices]
    with ProgressBar(title, len(prompts)) as bar:
        scores_PC = choose(policy, prompts, options, bar.advance, [record.task for record in records])
    if np.isnan(scores_PC).any():
        row = int(np.flatnonzero(np.isnan(scores_PC).any(axis=1))[0])
        summary = "this prompt leaves no room for the longest label"
        raise DataError(summary, where=str(records[row].source), given=f"{len(prompts[row])} tokens")
    if config.calibrated:
        empty = _content_free_prompt(chat, records[0], prompt_format)
        tasks = list(dict.fromkeys(record.task for record in records))
        priors_TC = choose(policy, [empty] * len(tasks), options, tasks=tasks)
        scores_PC = scores_PC - priors_TC[[tasks.index(record.task) for record in records]]
    logprobs_PC = scores_PC - _logsumexp(scores_PC)
    index = {label: i for i, label in enumerate(choices)}
    found = []
    for row, record in zip(logprobs_PC, records, strict=True):
        best, expected = int(row.argmax()), index.get(expected_text(record))
        probability = float(np.exp(row[expected])) if expected is not None else float("nan")
        found.append(LabelChoice(choices[best], float(np.exp(row[best])), probability))
    return found


def answer_ids(chat: ChatTemplate, record: Record, label: str) -> list[int]:
    """Token ids of a label as the answer of a row, with its end: a label that begins another is no part of it."""
    turns = (*record.messages[:-1], Message("assistant", label))
    answer = chat.split_conversation(replace(record, messages=turns), "answer")[-1].text
    return chat.encode([answer], mid_document=True)[0]


def _content_free_prompt(chat: ChatTemplate, record: Record, prompt_format: PromptFormat) -> list[int]:
    """The prompt of the format with a question that says nothing; worked examples are shown where they are fixed."""
    fixed = PromptFormat(prompt_format.instruction, prompt_format.shots, choices=prompt_format.choices)
    turns = (Message("user", CONTENT_FREE), record.messages[-1])
    return chat.prompt_ids(fixed.turns(replace(record, messages=turns, context=None)), tools=record.tools)


def _logsumexp(scores_PC: NDArray[np.float64]) -> NDArray[np.float64]:
    largest = scores_PC.max(axis=1, keepdims=True)
    return np.asarray(largest + np.log(np.exp(scores_PC - largest).sum(axis=1, keepdims=True)))


def classification(
    expected: Sequence[str],
    answered: Sequence[str],
    confidence: Sequence[float],
    expected_probability: Sequence[float],
    clusters: Clusters = None,
) -> Classification:
    """All scores of chosen labels."""
    right = [float(e == a) for e, a in zip(expected, answered, strict=True)]
    # a probability of 0 in float64 would make the loss infinite
    losses = [-float(np.log(max(p, 1e-300))) for p in expected_probability]
    confusions = Counter((e, a) for e, a in zip(expected, answered, strict=True) if e != a)
    return Classification(
        labels=len({*expected, *answered}),
        accuracy=score_interval(right, clusters, binary=True),
        macro_f1=macro_f1(expected, answered, clusters),
        log_loss=score_interval(losses, clusters, bounded=False),
        calibration_error=expected_calibration_error(confidence, right),
        accuracy_at_coverage=accuracy_at_coverage(confidence, right),
        classes=tuple(class_scores(list(expected), list(answered))),
        confusions=tuple(Confusion(expected=e, answered=a, examples=n) for (e, a), n in confusions.most_common()),
    )
