"""A training run, and its plan beside what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rung.results.base import GateResult, Result
from rung.results.data import ContaminationResult, DataResult, SplitsResult, TokenResult
from rung.results.evaluation import HarnessScore, RewardModelHealth


class PlanComparison(Result):
    """Planned and measured memory of a run, in bytes."""

    peak_bytes: int
    footprint_bytes: int
    """Resident bytes of the libraries, which no plan can predict."""
    measured: dict[str, int | None]
    """By stage."""

    @property
    def measured_peak(self) -> int:
        """The largest measurement of any stage."""
        return max(value for value in self.measured.values() if value)


class LotteryResult(Result):
    """Layers that a lottery scored, and those that continued."""

    scores: dict[str, float]
    """Share of the score by number of the layer."""
    winners: tuple[int, ...]
    of_layers: int
    """Layers of the model."""
    choose: str


class RunResult(Result):
    """A training run as its `run.json` describes it."""

    status: str = "unknown"
    """finished, failed, interrupted or running."""
    path: str = ""
    """The run folder."""
    report: str | None = None
    """The HTML report."""
    config: dict[str, Any] = {}
    """The resolved config, defaults included."""
    metrics: dict[str, Any] = {}
    harness: tuple[HarnessScore, ...] = ()
    """Scores of `rung eval --tasks`."""
    gates: tuple[GateResult, ...] = ()
    data: DataResult = DataResult()
    steps: int | None = None
    best_step: int | None = None
    """Step of the lowest validation loss."""
    tokens: int = 0
    """Tokens trained on."""
    train_loss: float | None = None
    """In the last step, in the objective's unit."""
    validation_loss: float | None = None
    train_seconds: float | None = None
    """From the first forward pass to the last step, without loading, evaluation and saving."""
    tokens_per_second: float | None = None
    """Tokens of the documents, whether or not a prefix was shared, over `train_seconds`."""
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    moves: str | None = None
    """Trained parameters that change during the run, for example the layers of a lottery."""
    learning_rate: float | None = None
    plan: PlanComparison | None = None
    contamination: ContaminationResult | None = None
    reward: RewardModelHealth | None = None
    """Of a reward run."""
    lottery: LotteryResult | None = None
    router_load: dict[str, tuple[float, ...]] = {}
    """Of a mixture: the share of tokens of each expert, by linear."""
    device: str | None = None
    compute_dtype: str | None = None
    versions: dict[str, str | None] = {}
    fingerprints: dict[str, str | None] = {}
    """Hashes of base, data and chat template."""
    rollout_server: dict[str, str] = {}
    """URL and model of the server that drew the answers of the run; empty where this process did."""
    not_finite: dict[str, Any] = {}
    """Rows of the step whose loss was not finite."""
    error: str | None = None

    @property
    def artifact(self) -> Path:
        """The folder of the trained weights: an adapter, or a whole model."""
        adapter = Path(self.path) / "adapter"
        return adapter if adapter.is_dir() else Path(self.path) / "model"


class PreviewResult(Result):
    """What a dry run finds out before the first step."""

    splits: SplitsResult
    train: TokenResult
    preflight: dict[str, int]
    """Rows and failing rows of the check of the chat template."""
    steps_per_epoch: int
    tokens_per_micro_batch: int
    trainable_parameters: int
    learning_rate: float
    plan: dict[str, Any]
    """The memory estimate, as `rung plan --json` gives it."""
