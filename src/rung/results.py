"""What the verbs return: typed values that mirror the JSON that `--json` prints and that run folders hold.

Each is a pydantic model whose `to_json` gives back what it was made of, fields of an objective's own included, so that
reading a folder and writing it again loses nothing. Results hold numbers and words alone: no tensors, no open files.
They are made by `rung.commands`, and read by the terminal, the report and Python programs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

GateState = Literal["passed", "failed", "not_reached"]


class Result(BaseModel):
    """The base of all results. Unknown fields are kept: an objective logs numbers of its own."""

    # extra="allow": a manifest that a later version wrote must survive being read and written by this one
    model_config = ConfigDict(frozen=True, extra="allow", arbitrary_types_allowed=False)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the fields that were given, under their own names."""
        return self.model_dump(mode="json", exclude_unset=True)


class Estimate(Result):
    """A mean, or a paired difference of two, with its 95 % interval."""

    mean: float
    low: float | None
    """Lower bound; None is minus infinity: no bound can be given from these items."""
    high: float | None
    """Upper bound; None is infinity."""
    examples: int = 0
    clusters: int = 0
    method: str = ""
    """How the interval was computed, for example `wilson` or `cluster bootstrap`."""
    p_value: float | None = None
    """Of a difference: two-sided."""


class GateResult(Result):
    """What a gate measured."""

    name: str
    state: GateState
    measured: Any = None
    limit: Any = None


class RunResult(Result):
    """A training run as its `run.json` describes it."""

    status: str
    """finished, failed, interrupted or running."""
    path: str = ""
    """The run folder."""
    report: str | None = None
    """The HTML report."""
    config: dict[str, Any] = {}
    """The resolved config, defaults included."""
    metrics: dict[str, Any] = {}
    gates: tuple[GateResult, ...] = ()
    steps: int | None = None
    train_loss: float | None = None
    """In the last step, in the objective's unit."""
    validation_loss: float | None = None
    train_seconds: float | None = None
    """From the first forward pass to the last step, without loading, evaluation and saving."""
    tokens_per_second: float | None = None
    """Tokens of the documents, whether or not a prefix was shared, over `train_seconds`."""
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    learning_rate: float | None = None
    error: str | None = None

    @property
    def artifact(self) -> Path:
        """The folder of the trained weights: an adapter, or a whole model."""
        adapter = Path(self.path) / "adapter"
        return adapter if adapter.is_dir() else Path(self.path) / "model"


class EvaluationResult(Result):
    """Scores of a run or a base on held-out questions; of a reward run, how well it orders held-out pairs."""

    target: str
    task: str
    examples: int
    clusters: int | None = None
    scores: dict[str, Estimate] = {}
    """By metric; the first one decides."""
    prompt_tokens: float | None = None
    """Mean tokens of a prompt."""
    seconds_per_query: float | None = None
    cut_off: int = 0
    """Answers that were cut at `evaluation.max_new_tokens`."""
    retrieval: dict[str, Any] | None = None
    contamination: dict[str, Any] | None = None
    """How many test items also stand in the training rows, and the scores without them."""
    reward: dict[str, Any] | None = None
    """Of a reward run: accuracy on pairs, calibration, and the verdict."""
    summary: str | None = None
    """Of a reward run: the same in words."""


class MetricComparison(Result):
    """One metric of two systems on the same items."""

    before: Estimate
    after: Estimate
    difference: Estimate
    """After minus before, paired."""
    detectable: float | None = None
    """The smallest true difference that these items would show with 80 % power."""


class ComparisonResult(Result):
    """Two systems on the same questions: target minus baseline."""

    target: str
    baseline: str
    task: str
    metrics: dict[str, MetricComparison]
    examples: int
    clusters: int
    judge: dict[str, Any] | None = None
    """Which answers a judge prefers, and whether the judge agrees with people."""


class ForgettingComparison(Result):
    """A run against its own base on data that it did not learn from: run minus base."""

    target: str
    forgetting: str
    """The data file or config."""
    metrics: dict[str, MetricComparison]
    examples: int
    clusters: int
    dropped: int = 0
    """Texts longer than the model's context, which were left out."""


class GenerationResult(Result):
    """Answers that were sampled and written to a file, one row for each prompt."""

    output: str
    prompts: int
    answers: int
    """Answers written."""
    sampled: int
    """Answers sampled, before equal ones and prompts without a comparison were left out."""
    cut: int
    """Answers that reached no stop."""
    nothing_to_compare: int
    """Prompts left out because all their answers have the same score."""
    means: dict[str, float]


class MergeResult(Result):
    """An adapter folded into its base, and the proof that the written model is the run's."""

    path: str
    measure: str
    """What `difference` measures."""
    difference: float
    limit: float
    moved_from_base: float | None = None
    """Largest difference of log-probabilities between base and merged model, in nats."""
    moved_from_run: float | None = None
    """For a quantized run: between the run and the merged model, in nats."""
    largest_change: float | None = None
    """Merged shard by shard: the largest change of a weight."""
    files: int | None = None
    """Merged shard by shard: safetensors files written."""


class FuseResult(Result):
    """Several runs combined into one."""

    path: str
    weights: tuple[float, ...]
    ranks: tuple[int, ...] = ()
    """Ranks of the fused modules; empty for whole models."""
    search: dict[str, Any] | None = None
    """How the weights were searched, where they were."""
    lost: float
    """Share of the update's norm that the rank of the result cannot hold."""
