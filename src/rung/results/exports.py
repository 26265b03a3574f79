"""What leaves: merged, exported, pushed and fused models."""

from __future__ import annotations

from typing import Any

from rung.results.base import GateResult, Result
from rung.results.evaluation import MetricComparison


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


class ExportedFile(Result):
    """One file of an export, what proves it, and what it scores where that was measured."""

    file: str
    type: str
    """For example q4_k_m; `adapter` for a LoRA."""
    bytes: int
    kinds: dict[str, int] = {}
    """Bytes of the matrices by the numbers they are stored in: a q4_k_m of a narrow model is mostly Q5_0."""
    gate: GateResult
    """`publish.gguf`; not_reached without llama.cpp."""
    largest_difference: float | None = None
    """Of the log-probabilities of the most probable tokens to those of the run, in nats."""
    mean_difference: float | None = None
    """The same, weighted by the run's probabilities."""
    table_difference: float | None = None
    """Largest difference to the run with GELU from ggml's table in float16, where the model has GELU."""
    ignored_stops: tuple[str, ...] = ()
    """Ends of text of the base at which llama.cpp goes on; requests name them as `stop`."""
    scores: dict[str, MetricComparison] = {}
    """By metric, with --measure: `before` is the run."""
    seconds_per_query: float | None = None


class ExportResult(Result):
    """A run in the form of another tool."""

    path: str
    kind: str
    """gguf, ollama, vllm or merged."""
    files: tuple[ExportedFile, ...] = ()
    commands: tuple[str, ...] = ()
    """How the result is used."""
    notes: tuple[str, ...] = ()
    questions: int | None = None
    """Test questions of --measure."""
    run_seconds_per_query: float | None = None
    """Of the run itself, in Rung and in batches."""


class PushedFile(Result):
    """A file of a repository."""

    name: str
    bytes: int


class PushResult(Result):
    """A run or an export on the hub; without a `commit` nothing was sent."""

    repository: str
    """OWNER/NAME."""
    files: tuple[PushedFile, ...]
    card: str
    """Text of the model card."""
    notes: tuple[str, ...] = ()
    url: str | None = None
    commit: str | None = None


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
