"""Evaluation: answers or likelihoods for held-out questions, scored per item, with what a query costs.

Only per-item scores are stored; every summary, interval and comparison is computed from them later, so two runs can be
compared item by item without generating again. Decoding is greedy: a score is reproducible, and sampling noise does
not hide a difference. `runs.load`, `commands.climb` and `commands.forgetting` call `evaluate`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rung.config.code import CodeLimitsConfig
from rung.config.evaluation import EvaluationConfig, MetricName
from rung.console import ProgressBar
from rung.data.chat import ChatTemplate
from rung.data.messages import expected_text
from rung.data.parsed_answer import ParsedAnswer
from rung.errors import DataError
from rung.evaluation.choices import LabelChoice, choose_labels, classification
from rung.evaluation.prompting import PromptFormat
from rung.evaluation.server_answers import ServerAnswers
from rung.models.generate import Sampling, generate_by_task
from rung.models.packing import pack
from rung.models.policy import Policy, sum_by_document
from rung.planning.memory import tokens_per_micro_batch
from rung.results.base import Estimate
from rung.results.evaluation import Classification
from rung.scoring.answer_rules import not_banned
from rung.scoring.code_answers import CODE, require_tests, run_answers
from rung.scoring.metrics import BINARY_METRICS, METRICS, Metric, best_score
from rung.scoring.stats import ratio_interval, score_interval
from rung.training.run_folder import read_items, write_items
from rung.types import Example, Record, Source

PERPLEXITY, NOT_BANNED = "perplexity", "not_banned"


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """One question, its answer and its scores."""

    source: str
    group: str | None
    question: str = ""
    """Empty for plain text, which is only read."""
    context: str | None = None
    """The context shown with the question."""
    expected: str = ""
    references: Sequence[str] = ()
    """Further accepted answers."""
    answer: str = ""
    """Without the reasoning before it, which is not scored."""
    reasoning: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    stopped: bool = True
    """False when the answer was truncated at `max_new_tokens`."""
    nats: float | None = None
    """Negative log-likelihood of the expected answer, where perplexity is measured."""
    answer_tokens: int | None = None
    confidence: float | None = None
    """With `evaluation.choices`: probability of the chosen label among the labels."""
    expected_probability: float | None = None
    """With `evaluation.choices`: probability of the expected label among the labels."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Per-item results; every summary is computed from them."""

    items: tuple[ScoredItem, ...]
    seconds_per_query: float
    metrics: tuple[str, ...] = field(default=())

    @property
    def clusters(self) -> list[str]:
        """Cluster of each item: its group, or itself."""
        return [item.group if item.group is not None else item.source for item in self.items]

    @property
    def prompt_tokens(self) -> float:
        """Mean tokens of a prompt: a cost of every query."""
        return float(np.mean([item.prompt_tokens for item in self.items]))

    @property
    def cut_off(self) -> int:
        """Answers that were truncated at `max_new_tokens`."""
        return sum(not item.stopped for item in self.items)

    def scores(self, metric: str) -> NDArray[np.float64]:
        """Score of each item; nats per token for perplexity."""
        if metric == PERPLEXITY:
            # per token; `weights` gives long answers their influence back
            return np.array([(i.nats or 0.0) / (i.answer_tokens or 1) for i in self.items])
        return np.array([item.scores[metric] for item in self.items])

    def weights(self, metric: str) -> NDArray[np.float64] | None:
        """Tokens of each item for perplexity, which weights an item by its length; None for other metrics."""
        return np.array([float(i.answer_tokens or 1) for i in self.items]) if metric == PERPLEXITY else None

    def interval(self, metric: str) -> Estimate:
        """Mean and 95 % interval."""
        if metric == PERPLEXITY:
            nats = [item.nats or 0.0 for item in self.items]
            # a ratio of sums: perplexity is not a mean over items
            return ratio_interval(nats, [item.answer_tokens or 1 for item in self.items], self.clusters)
        return score_interval(self.scores(metric), self.clusters, binary=metric in BINARY_METRICS)

    def summary(self) -> dict[str, Any]:
        """For `run.json`."""
        classification = self.classification
        return {
            **({"classification": classification.to_json()} if classification else {}),
            "scores": {name: self.interval(name).to_json() for name in self.metrics},
            "examples": len(self.items),
            "clusters": len(set(self.clusters)),
            "prompt_tokens": round(self.prompt_tokens, 1),
            "seconds_per_query": round(self.seconds_per_query, 4),
            "cut_off": self.cut_off,
        }

    @property
    def classification(self) -> Classification | None:
        """Scores of chosen labels; None where answers were generated."""
        if not self.items or any(item.confidence is None for item in self.items):
            return None
        return classification(
            [item.expected for item in self.items],
            [item.answer for item in self.items],
            [item.confidence or 0.0 for item in self.items],
            [item.expected_probability or 0.0 for item in self.items],
            self.clusters,
        )

    def write(self, path: Path) -> None:
        """Write one row per item; seconds per query and metrics go into the file's metadata."""
        metadata = {"seconds_per_query": self.seconds_per_query, "metrics": list(self.metrics)}
        write_items(path, [asdict(item) for item in self.items], metadata)

    @staticmethod
    def read(path: Path) -> Evaluation:
        """Read what `write` wrote."""
        items, metadata = read_items(path)
        scored_items = tuple(
            ScoredItem(**{**item, "references": tuple(item.get("references") or ())}) for item in items
        )
        return Evaluation(scored_items, metadata["seconds_per_query"], tuple(metadata["metrics"]))


def evaluate(
    policy: Policy,
    chat: ChatTemplate,
    records: Sequence[Record],
    prompt_format: PromptFormat,
    config: EvaluationConfig,
    *,
    title: str = "evaluate",
    server: ServerAnswers | None = None,
) -> Evaluation:
    """Answer every record greedily and score it; the answers come from `server`, or from this process.

    Seconds per query are wall time over all items, with shared prefixes encoded once, as a server would do: the time to
    answer, or, where only perplexity is measured, the time to read the expected answer.
    Raises `DataError` for records without a question under metrics that need one.
    """
    require_questions(records)
    if CODE in config.metrics:
        require_tests(records, "evaluation.metrics")
    # virtual tokens take positions of the context too
    max_prompt_tokens = policy.base.context - policy.method.virtual_tokens - config.max_new_tokens
    prompts = prompt_ids(chat, records, prompt_format, max_prompt_tokens)
    answers, stopped, seconds = [ParsedAnswer("")] * len(records), [True] * len(records), 0.0
    labels: list[LabelChoice] = []
    if config.choices is not None and any(name != PERPLEXITY for name in config.metrics):
        start_time = time.perf_counter()
        labels = choose_labels(policy, chat, records, prompts, prompt_format, config.choices, title)
        answers, seconds = [ParsedAnswer(choice.label) for choice in labels], time.perf_counter() - start_time
    elif any(name != PERPLEXITY for name in config.metrics):
        # before anything is generated: a template whose calls cannot be compared would score 0 for every model
        for record in records:
            chat.expected_calls(record)
        # what a method puts before a prompt, such as virtual tokens, may differ from task to task
        tasks = [record.task for record in records]
        answers, stopped, seconds = _generate_answers(policy, chat, prompts, tasks, config, title, server)
    answers_with_stop = list(zip(answers, stopped, strict=True))
    scored = score_answers(
        *(chat, records, prompts, answers_with_stop, seconds, config.metrics),
        code_limits=config.code_limits,
        banned=config.banned,
    )
    if labels:
        pairs = zip(scored.items, labels, strict=True)
        scored = replace(scored, items=tuple(_with_choice(item, choice) for item, choice in pairs))
    if PERPLEXITY not in config.metrics:
        return scored
    start_time = time.perf_counter()
    nats = _answer_nats(policy, chat, records, prompts)
    # generation is what a user waits for; reading counts only where nothing is generated
    seconds = seconds or time.perf_counter() - start_time
    items = tuple(replace(i, nats=n, answer_tokens=tokens) for i, (n, tokens) in zip(scored.items, nats, strict=True))
    return Evaluation(items, seconds / max(1, len(items)), config.metrics)


def _with_choice(item: ScoredItem, choice: LabelChoice) -> ScoredItem:
    return replace(item, confidence=choice.confidence, expected_probability=choice.expected_probability)


def score_answers(
    chat: ChatTemplate,
    records: Sequence[Record],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[tuple[ParsedAnswer, bool]],
    seconds: float,
    metrics: Sequence[MetricName],
    *,
    code_limits: CodeLimitsConfig,
    banned: Sequence[str] = (),
) -> Evaluation:
    """Scores of answers that are there already, each with whether the model ended it; perplexity needs a model.

    Raises `DataError` for records without tests under the metric `code`, `PlanError` where programs are not isolated.
    """
    table = {**METRICS, NOT_BANNED: Metric(not_banned(banned), binary=True, reads_expected=False)}
    functions = {name: table[name] for name in metrics if name not in (PERPLEXITY, CODE)}
    code_scores = _code_scores(records, answers, code_limits) if CODE in metrics else [{} for _ in records]
    items = tuple(
        ScoredItem(
            source=str(record.source),
            group=record.group,
            question=record.question,
            context=record.context,
            expected=expected_text(record),
            answer=answer.text,
            references=record.references,
            reasoning=answer.reasoning,
            scores=code
            | (_scores(chat, functions, answer.text, record, chat.expected_calls(record)) if functions else {}),
            prompt_tokens=len(prompt),
            stopped=stopped,
        )
        for record, prompt, (answer, stopped), code in zip(records, prompts, answers, code_scores, strict=True)
    )
    # max: no division by zero for an empty split
    return Evaluation(items, seconds / max(1, len(items)), tuple(metrics))


def _code_scores(
    records: Sequence[Record], answers: Sequence[tuple[ParsedAnswer, bool]], limits: CodeLimitsConfig
) -> list[dict[str, float]]:
    """Programs of all answers run at once, as many as there are processors."""
    require_tests(records, "evaluation.metrics")
    tests = [record.tests for record in records if record.tests is not None]
    results = run_answers([answer.text for answer, _ in answers], tests, limits)
    return [{CODE: float(result.passed)} for result in results]


def _scores(
    chat: ChatTemplate,
    metrics: Mapping[MetricName, Metric],
    answer: str,
    record: Record,
    expected_calls: str | None,
) -> dict[str, float]:
    """Scores of an answer; tool calls are compared as calls, by metrics that compare words as their canonical text."""
    if expected_calls is None:
        expected = expected_text(record)
        references = record.references
        return {name: best_score(metric.function, answer, expected, references) for name, metric in metrics.items()}
    calls = chat.canonical_calls(answer)
    scores: dict[str, float] = {}
    for name, metric in metrics.items():
        if not metric.reads_expected:
            scores[name] = metric.function(answer, expected_calls)
        elif metric.binary:
            scores[name] = float(calls == expected_calls)
        else:
            scores[name] = metric.function(calls or answer, expected_calls)
    return scores


def prompt_ids(
    chat: ChatTemplate, records: Sequence[Record], prompt_format: PromptFormat, max_prompt_tokens: int
) -> list[list[int]]:
    """Ids of each prompt. Raises `DataError` for a prompt of more than `max_prompt_tokens` tokens."""
    prompts = [chat.prompt_ids(prompt_format.turns(record), tools=record.tools) for record in records]
    if longest := max((p for p in prompts if len(p) > max_prompt_tokens), key=len, default=None):
        summary = f"this prompt has {len(longest)} tokens and the model takes {max_prompt_tokens} before an answer"
        where = str(records[prompts.index(longest)].source)
        hint = "lower evaluation.shots, shorten the contexts or retrieve less, or use a base with a longer context"
        raise DataError(summary, where=where, hint=hint)
    return prompts


def require_questions(records: Sequence[Record]) -> None:
    """Raise `DataError` for plain text, which has no question to answer."""
    if record := next((record for record in records if not record.messages), None):
        hint = "evaluate rows with a question and an answer"
        raise DataError("plain text has no question to answer", where=str(record.source), hint=hint)


def _generate_answers(
    policy: Policy,
    chat: ChatTemplate,
    prompts: Sequence[list[int]],
    tasks: Sequence[str | None],
    config: EvaluationConfig,
    title: str,
    server: ServerAnswers | None,
) -> tuple[list[ParsedAnswer], list[bool], float]:
    start_time = time.perf_counter()
    with ProgressBar(title, len(prompts)) as bar:
        stop_ids, stop_texts = chat.generation_stop_ids, config.stop
        on_token = partial(chat.has_stop_text, stop_texts=stop_texts) if stop_texts else None
        options: Any = {"on_token": on_token, "on_batch": bar.advance}
        if server is not None:
            answers = server.answer(policy, prompts, stop_ids, config.max_new_tokens, **options)
        else:
            sampling = Sampling(config.max_new_tokens)
            options |= {"stop_ids": stop_ids, "sampling": sampling, "batch_size": config.batch}
            answers = generate_by_task(policy, prompts, tasks, **options)
    seconds = time.perf_counter() - start_time
    parsed = [chat.parsed_answer(a.all_tokens, stopped=a.stopped, stop_texts=stop_texts) for a in answers]
    return parsed, [a.stopped for a in answers], seconds


@torch.no_grad()
def _answer_nats(
    policy: Policy, chat: ChatTemplate, records: Sequence[Record], prompts: Sequence[list[int]]
) -> Sequence[tuple[float, int]]:
    """Nats and tokens of each expected answer with its stop, given its prompt."""
    examples = []
    for record, prompt in zip(records, prompts, strict=True):
        # the answer as training renders it, behind the prompt of this format
        answer = chat.encode([chat.split_conversation(record, "answer")[-1].text], mid_document=True)[0]
        ids = np.array([*prompt, *answer], dtype=np.int32)
        if len(ids) > policy.base.context - policy.method.virtual_tokens:
            raise DataError("prompt and expected answer are longer than the model's context", where=str(record.source))
        examples.append(Example(ids, np.arange(len(ids)) >= len(prompt), record.source, task=record.task))
    budget = tokens_per_micro_batch(policy.base.shape, policy.device.type)
    nats_and_tokens: dict[Source, tuple[float, int]] = {}
    batches = pack(examples, budget, device=policy.device, boundary=policy.rope_boundary)
    for batch in policy.iterate_batches(batches):  # shared worked examples are computed once
        nats = sum_by_document(batch, -policy.logprobs(batch)).tolist()
        nats_and_tokens |= {d.source: (n, d.predictions) for d, n in zip(batch.documents, nats, strict=True)}
    # packing reorders documents
    return [nats_and_tokens[record.source] for record in records]
