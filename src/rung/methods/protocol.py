"""The contract of a method: what is trained, how it is saved, and what the trainer may ask.

A method never knows the objective. Most methods need few of these members, so the protocol holds defaults and methods
inherit from it; the cost is a wide interface. `methods/registry.py` lists the implementations.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rung.errors import CheckpointError
from rung.models.fused_modules import plain_linear_params
from rung.models.fused_ops import LinearParams
from rung.models.policy import VirtualTokenStates
from rung.types import LossTerm, PackedBatch


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
        ...

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Gradient of the objective's loss, as in one step over all documents."""
        ...

    def keys_values(self, ids: Sequence[int]) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Keys and values [1, K, T, D] of these tokens in the base, by layer, from position 0."""
        ...


class Method(Protocol):
    """A base with some trainable parameters. Members that most methods do not need have defaults here."""

    kind: str
    artifact: str
    """Subfolder of a finished run: `adapter` or `model`."""
    starts_as_base: bool
    """Whether the model equals the base before the first step."""
    subtracts: bool = False
    """Whether a nonzero initial update is subtracted again: the model then equals the base up to rounding."""
    sample_size: int = 0
    """Number of training documents that `calibrate` needs; 0 if it does nothing."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in a stable order."""
        ...

    def declared_parameters(self) -> int:
        """Expected number of trainable parameters, from the method's formula and the shapes of the base."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """Within the context the model is the base. Raises `PlanError` if the base itself is trained."""
        ...

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
        ...

    def load(self, folder: Path) -> None:
        """Load what `save` wrote. Missing or unexpected keys are an error."""
        ...

    def merge(self) -> nn.Module:
        """Return the model with the method merged; the method cannot be used afterwards.

        Raises `PlanError` with the reason if it cannot be merged.
        """
        ...

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

    def penalty(self, batch: PackedBatch) -> list[LossTerm]:
        """Terms that the method adds to the loss of the batch just computed; not part of a validation loss."""
        return []

    def statistics(self) -> Mapping[str, Any]:
        """Statistics of the method for `run.json`."""
        return {}

    def state(self) -> dict[str, Any]:
        """State for checkpoints besides the trained parameters, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        return

    @property
    def virtual_tokens(self) -> int:
        """Number of positions before every document; 0 while the method is off."""
        return 0

    def task_rows(self, task: str | None) -> Tensor:
        """Source of the virtual tokens of a task, with the autograd graph."""
        return torch.empty(0, 0)

    def virtual_states(self, rows: Tensor) -> VirtualTokenStates:
        """States that precede a document: embeddings [P, H], or keys and values by layer."""
        return {}

    @property
    def inserted_tokens(self) -> int:
        """Number of ids beyond the vocabulary that stand for learned embeddings; 0 while the method is off."""
        return 0

    def inserted_embeddings(self, rows: Tensor) -> Tensor:
        """Embeddings [P, H] of the inserted tokens."""
        return rows


@contextmanager
def turned_off(method: Any) -> Iterator[None]:
    """Within the context `method.enabled` is False, for methods that check it before they act."""
    # The previous value, not True: contexts may be nested.
    previous, method.enabled = method.enabled, False
    try:
        yield
    finally:
        method.enabled = previous


def require_same_shapes(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `CheckpointError` naming the first tensor of another shape, which `copy_` would broadcast."""
    for name, value in expected.items():
        if value.shape != tensors[name].shape:
            raise CheckpointError(
                f"{name} has another shape",
                where=where,
                given=tuple(tensors[name].shape),
                allowed=str(tuple(value.shape)),
            )


def require_same_keys(keys: object, expected: object, where: str) -> None:
    """Raise `CheckpointError` naming the first missing and unexpected keys."""
    present_keys, expected_keys = set(keys), set(expected)  # type: ignore[call-overload]
    if present_keys != expected_keys:
        missing, extra = sorted(expected_keys - present_keys), sorted(present_keys - expected_keys)
        raise CheckpointError(
            f"its tensors are not this method's: {len(missing)} missing, {len(extra)} left over",
            where=where,
            given=f"missing {missing[:2]}, left over {extra[:2]}",
        )
