"""The contract of a method: what is trained, how it is saved, and what the trainer may ask.

A method never knows the objective. Most methods need few of these members, so the protocol holds defaults and methods
inherit from it; the cost is a wide interface. `methods/registry.py` lists the implementations.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from rung.errors import CheckpointError, PlanError
from rung.models.fused_modules import plain_linear_params
from rung.models.fused_ops import LinearParams
from rung.models.policy import PolicyMethod


class TrainableSet(NamedTuple):
    """Parameters trained in a step; all others get no gradients and lose their moments."""

    names: Collection[str]
    restart_moments: bool = False
    """Drop the moments of these parameters as well, because they restart."""
    changes_permanently: bool = False
    """The model changed: earlier measurements are not comparable with later ones."""


class CalibrationData(Protocol):
    """Training documents that a method may read before the first step."""

    tokens: int
    """Number of tokens that `run_forward` passes through the model."""
    tokenizer: Any
    """The tokenizer of the base."""

    def run_forward(self) -> None:
        """Run the documents once, without gradient; every linear is called as a module, so hooks see its inputs."""

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Gradient of the objective's loss, as in one step over all documents."""

    def keys_values(self, ids: Sequence[int]) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Keys and values [1, K, T, D] of these tokens in the base, by layer, from position 0."""


class Method(PolicyMethod, Protocol):
    """A base with some trainable parameters. Members that most methods do not need have defaults here."""

    kind: str
    artifact: str = "adapter"
    """Subfolder of a finished run: `adapter` or `model`."""
    starts_as_base: bool = True
    """Whether the model equals the base before the first step."""
    subtracts: bool = False
    """Whether a nonzero initial update is subtracted again: the model then equals the base up to rounding."""
    merge_refusal: str = ""
    """The reason why the method cannot be merged into the base; methods that can override `merge`."""
    enabled: bool = True
    """False while the method is off, for methods that check it before they act."""
    sample_size: int = 0
    """Number of training documents that `calibrate` needs; 0 if it does nothing."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in a stable order."""

    def declared_parameters(self) -> int:
        """Expected number of trainable parameters, from the method's formula and the shapes of the base."""

    def disabled(self) -> AbstractContextManager[None]:
        """Within the context the model is the base. Raises `PlanError` if the base itself is trained."""
        return turned_off(self)

    def linear_params(self, module: nn.Module) -> LinearParams | None:
        """Parameters of a linear with this method, for `models/fused_modules.py`; None if only the module can."""
        return plain_linear_params(module)

    def freeze_output_head(self) -> None:
        """Freeze the output head, which the objective does not read. Raises `PlanError` if only the head is trained."""
        return

    def prefix_sharing_blocker(self) -> str | None:
        """The reason why documents may not share one copy of a prefix; None if they may."""
        return None

    def supports_recompute(self) -> bool:
        """Whether layers may recompute in the backward pass to save memory."""
        return True

    def trainable_for_tasks(self, tasks: Collection[str | None]) -> Collection[str] | None:
        """Names of parameters that documents of these tasks can train; None means all."""
        return None

    def save(self, folder: Path) -> None:
        """Write files that peft or transformers load directly."""

    def load(self, folder: Path) -> None:
        """Load what `save` wrote. Missing or unexpected keys are an error."""

    def merge(self) -> nn.Module:
        """Return the model with the method merged; the method cannot be used afterwards.

        Raises `PlanError` with the reason if it cannot be merged.
        """
        raise PlanError(self.merge_refusal, hint="serve the base with the adapter, or train a lora")

    def adapter_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters besides those of the base, trained or not; ranks that share the base in parts hold them whole."""
        return list(self.trainable().values()) if self.artifact == "adapter" else []

    def on_base_read(self) -> None:
        """Called once the weights of a base that was in its files at first are there, each rank holding some rows.

        For what a method computes from them when it is attached. Every rank calls it, so it may gather.
        """
        return

    def calibrate(self, sample: CalibrationData, start: Path | None = None) -> None:
        """Initialize from weights, activations or gradients, before the first step of a run.

        `start` is a folder that `save` wrote at the start of the run; a resumed run loads it instead.
        """
        return

    def trainable_at_step(self, step: int) -> TrainableSet | None:
        """Parameters trained at this optimizer step, counted from 0; None means all."""
        return None

    def learning_rate_factor(self, name: str) -> float:
        """Factor on the run's learning rate for a trainable parameter."""
        return 1.0

    def statistics(self) -> Mapping[str, Any]:
        """Statistics of the method for `run.json`."""
        return {}

    def state(self) -> dict[str, Any]:
        """State for checkpoints besides the trained parameters, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        return


@contextmanager
def turned_off(method: Method) -> Iterator[None]:
    """Within the context `method.enabled` is False, for methods that check it before they act."""
    # The previous value, not True: contexts may be nested.
    previous, method.enabled = method.enabled, False
    try:
        yield
    finally:
        method.enabled = previous


def require_same_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `CheckpointError` for missing or unexpected names, or for the first tensor of another shape."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        reason = f"its tensors are not this method's: {len(missing)} missing, {len(extra)} left over"
        raise CheckpointError(reason, where=where, given=f"missing {missing[:2]}, left over {extra[:2]}")
    # `copy_` would broadcast.
    for name, value in expected.items():
        if value.shape != tensors[name].shape:
            given, allowed = tuple(tensors[name].shape), str(tuple(value.shape))
            raise CheckpointError(f"{name} has another shape", where=where, given=given, allowed=allowed)
