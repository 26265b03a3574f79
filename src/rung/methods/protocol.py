"""The contract of a method. A method never knows the objective."""

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
    """What moves in a step. The gradients of everything else are off, and its moments are dropped."""

    names: Collection[str]
    restart_moments: bool = False
    """Drop the moments of what moves as well: it begins again."""
    changes_permanently: bool = False
    """From here on it is another model: what was measured before does not compare."""


class CalibrationData(Protocol):
    """Training documents that a method may look at before the first step."""

    tokens: int
    """How many tokens `read` passes through the model."""
    tokenizer: Any
    """The base's own."""

    def run_forward(self) -> None:
        """Run them once, without gradient; every linear is called as a module, so hooks see its inputs."""
        ...

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The gradient of the objective's loss, as one step over all of them would have it."""
        ...

    def keys_values(self, ids: Sequence[int]) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Keys and values [1, K, T, D] of these tokens in the base, by layer, from position 0 on."""
        ...


class Method(Protocol):
    """A base with some numbers free to move. What most methods have nothing of is written out here."""

    kind: str
    artifact: str
    """Folder a finished run keeps it in: `adapter` or `model`."""
    starts_as_base: bool
    """Whether the model answers exactly like the base before the first step."""
    subtracts: bool = False
    """Whether a start that is not zero is taken off again: then it starts as the base only to rounding."""
    sample_size: int = 0
    """Training documents that `calibrate` looks at; 0 where it has nothing to do."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """What moves, by name, in a stable order."""
        ...

    def declared_parameters(self) -> int:
        """How many numbers should move, from the formula of the method and the shapes of the base."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """The base alone, inside the context. Raises `PlanError` where the base itself has moved."""
        ...

    def linear_params(self, module: nn.Module) -> LinearParams | None:
        """How a linear computes with this method, for `models.fused_modules`; None where only the module itself can."""
        return plain_linear_params(module)

    def freeze_output_head(self) -> None:
        """The objective does not read the model's output head: it must not move. Raises `PlanError` if all does."""
        return

    def prefix_sharing_blocker(self) -> str | None:
        """Why one copy of a shared prefix may not stand for several; None where it may."""
        return None

    def supports_recompute(self) -> bool:
        """Whether a layer may compute a second time in the backward pass, to hold less."""
        return True

    def trainable_for_tasks(self, tasks: Collection[str | None]) -> Collection[str] | None:
        """Names of what documents of these tasks can move; None is everything."""
        return None

    def save(self, folder: Path) -> None:
        """Write files that peft or transformers load as they are."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Keys missing or left over are an error."""
        ...

    def merge(self) -> nn.Module:
        """The model with the method folded in, on its own: afterwards this method is spent.

        Raises `PlanError` with the reason where it cannot be.
        """
        ...

    def calibrate(self, sample: CalibrationData, start: Path | None = None) -> None:
        """Set what starts from weights, activations or gradients, before the first step of a run.

        `start` is a folder that `save` wrote when the run began: a resumed run takes that up.
        """
        return

    def at_step(self, step: int) -> TrainableSet | None:
        """Called before each optimizer step, counted from 0; None lets everything move."""
        return None

    def learning_rate_factor(self, name: str) -> float:
        """Learning rate of a trainable over the run's."""
        return 1.0

    def penalty(self, batch: PackedBatch) -> list[LossTerm]:
        """What the method itself adds to the loss of the batch just computed; no part of a validation loss."""
        return []

    def statistics(self) -> Mapping[str, Any]:
        """What it has to say about a run, for `run.json`."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the trained numbers, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave when the run was stopped."""
        return

    @property
    def virtual_tokens(self) -> int:
        """How many positions it puts before every document; 0 where it is off."""
        return 0

    def task_rows(self, task: str | None) -> Tensor:
        """What virtual tokens are made of for documents of this task, with the graph."""
        return torch.empty(0, 0)

    def virtual_states(self, rows: Tensor) -> VirtualTokenStates:
        """Those that stand before a document: embeddings [P, H], or keys and values by layer."""
        return {}

    @property
    def inserted_tokens(self) -> int:
        """How many ids beyond the vocabulary stand for something learned; 0 where it is off."""
        return 0

    def inserted_embeddings(self, rows: Tensor) -> Tensor:
        """Their embeddings [P, H]."""
        return rows


@contextmanager
def turned_off(method: Any) -> Iterator[None]:
    """Inside, `method.enabled` is False: for methods that ask it whenever they would act."""
    previous, method.enabled = method.enabled, False
    try:
        yield
    finally:
        method.enabled = previous


def require_same_shapes(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `CheckpointError` naming the first tensor of another shape: copying would stretch it."""
    for name, value in expected.items():
        if value.shape != tensors[name].shape:
            raise CheckpointError(
                f"{name} has another shape",
                where=where,
                given=tuple(tensors[name].shape),
                allowed=str(tuple(value.shape)),
            )


def require_same_keys(keys: object, expected: object, where: str) -> None:
    """Raise `CheckpointError` naming the first missing and left-over keys."""
    present_keys, expected_keys = set(keys), set(expected)  # type: ignore[call-overload]
    if present_keys != expected_keys:
        missing, extra = sorted(expected_keys - present_keys), sorted(present_keys - expected_keys)
        raise CheckpointError(
            f"its tensors are not this method's: {len(missing)} missing, {len(extra)} left over",
            where=where,
            given=f"missing {missing[:2]}, left over {extra[:2]}",
        )
