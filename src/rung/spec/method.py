"""Which numbers may move."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rung.spec.base import ALL_LINEAR, Role, Share, Spec


class FullSpec(Spec):
    """Every weight of the base moves."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 5e-5
    kind: Literal["full"] = "full"


class HeadSpec(Spec):
    """Only the output head moves. A head tied to the embeddings is untied first, and the saved config says so."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 5e-4
    kind: Literal["head"] = "head"


class LoraSpec(Spec):
    """Low-rank update W + (alpha / rank) * B @ A (Hu et al. 2021, eq. 3)."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 5e-4
    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    """Columns of B. Trainable parameters grow linearly with it."""
    alpha: PositiveFloat = 32.0
    """Numerator of the scale: the update is multiplied by alpha / rank."""
    dropout: Share = 0.0
    """Dropout on the adapter's input. Above 0 prefix sharing is off: copies of a prefix would differ."""
    targets: tuple[Role, ...] = Field(default=ALL_LINEAR, min_length=1)
    """Roles (q, k, v, o, gate, up, down), not module names; a fused projection counts as any of its roles."""
    layers: tuple[NonNegativeInt, ...] | None = None
    """Numbers of the layers that get an adapter, counted from 0; none is all."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023, eq. 4)."""
    dora: bool = False
    """Learn magnitude and direction apart (Liu et al. 2024, eq. 5)."""
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """Start of A (and, for orthogonal, B) that leaves the base alone."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules trained whole beside the adapter and saved with it, for example [lm_head]."""


MethodSpec = Annotated[FullSpec | HeadSpec | LoraSpec, Field(discriminator="kind")]
METHOD_SPECS: dict[str, type[FullSpec | HeadSpec | LoraSpec]] = {"full": FullSpec, "head": HeadSpec, "lora": LoraSpec}
