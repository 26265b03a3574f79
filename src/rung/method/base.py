"""The contract of a method. A method never knows the objective."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from rung.errors import CheckpointError
from rung.model.fused import Part


class Method(Protocol):
    """A base with some numbers free to move."""

    kind: str
    artefact: str
    """Folder a finished run keeps it in: `adapter` or `model`."""
    starts_as_base: bool
    """Whether the model answers exactly like the base before the first step."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """What moves, by name, in a stable order."""
        ...

    def declared_parameters(self) -> int:
        """How many numbers should move, from the formula of the method and the shapes of the base."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """The base alone, inside the context. Raises `PlanError` where the base itself has moved."""
        ...

    def part(self, module: nn.Module) -> Part | None:
        """How a linear computes with this method, for `model/fuse.py`; None where only the module itself can."""
        ...

    def shares_prefixes(self) -> bool:
        """Whether one copy of a shared prefix may stand for several (not with dropout: the copies would differ)."""
        ...

    def save(self, folder: Path) -> None:
        """Write files that peft or transformers load as they are."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Keys missing or left over are an error."""
        ...

    def merge(self) -> nn.Module:
        """The model with the method folded in, on its own: afterwards this method is spent."""
        ...


def state_of(method: Method) -> dict[str, Tensor]:
    """The moving numbers, detached, for checkpoints."""
    return {name: parameter.detach() for name, parameter in method.trainable().items()}


@torch.no_grad()
def load_state(method: Method, state: Mapping[str, Tensor]) -> None:
    """Put checkpointed numbers back. Raises `CheckpointError` unless names and shapes are the same."""
    own = method.trainable()
    same_keys(state.keys(), own.keys(), "checkpoint")
    for name, parameter in own.items():
        if parameter.shape != state[name].shape:
            raise CheckpointError(
                f"{name} has another shape", given=tuple(state[name].shape), allowed=str(tuple(parameter.shape))
            )
        parameter.copy_(state[name])


def same_keys(found: object, expected: object, where: str) -> None:
    """Raise `CheckpointError` naming the first missing and left-over keys."""
    have, want = set(found), set(expected)  # type: ignore[call-overload]
    if have != want:
        missing, extra = sorted(want - have), sorted(have - want)
        raise CheckpointError(
            f"its tensors are not this method's: {len(missing)} missing, {len(extra)} left over",
            where=where,
            given=f"missing {missing[:2]}, left over {extra[:2]}",
        )
