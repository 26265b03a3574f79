"""The `training` section: steps, micro-batches, packing, optimizer, checkpoints and validation."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rung.config.base import Config, Fraction


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2)."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; applied to matrices, not to biases or norms."""
    beta1: Fraction = 0.9
    """Decay rate of the first moment."""
    beta2: Fraction = 0.999
    """Decay rate of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    state_dtype: Literal["float32", "int8"] = "float32"
    """Type of both moments. `int8`: 8 bits (Dettmers et al. 2022; needs bitsandbytes), on a graphics card in pageable
    memory; tensors of fewer than 4,096 elements stay in float32."""


_MINUTES = re.compile(r"(\d+(?:\.\d+)?) ?min")


def _require_interval(value: object) -> object:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    match = _MINUTES.fullmatch(value) if isinstance(value, str) else None
    if match is None or float(match[1]) <= 0:
        raise ValueError("a number of optimizer steps, or minutes such as 15min")
    return value


class TrainingConfig(Config):
    """Training steps, learning rate, memory and checkpoints."""

    epochs: PositiveFloat = 1.0
    """Passes over the training rows; a fractional value ends within a pass."""
    max_steps: PositiveInt | None = None
    """Maximum number of optimizer steps; ends a run before `epochs` does."""
    examples_per_step: PositiveInt = 16
    """Data rows per optimizer step."""
    tokens_per_micro_batch: Annotated[int, Field(ge=16)] | Literal["auto", "probe"] = "auto"
    """Tokens computed at once. Affects memory and speed, not the result. `auto`: from the shape of the model, and on a
    graphics card what fits into its free memory; `probe`: measured once. The value is stored in run.json, so that a
    resume uses the same."""
    packing: Literal["tree", "flat", "none"] = "tree"
    """`tree`: packed rows, shared prefixes of the documents of a step computed once; `flat`: packed whole documents;
    `none`: one document at a time. The result is the same; the slower ones are for comparisons and debugging."""
    cache_frozen_layers: bool = True
    """Store the hidden states that enter the lowest trained layer on disk (in the cache folder) in the first epoch and
    read them in later ones, if there are frozen layers below it and more than one epoch. Needs 4 bytes per token and
    unit of width during the run."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate; default: that of the method (lora 5e-4, head 5e-4, full 5e-5) times that of the objective."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up; cosine and linear decay to 0."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the rate rises linearly from 0."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are clipped to this norm; null: no clipping."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Settings of AdamW."""
    checkpoint_every: Annotated[int | str | None, BeforeValidator(_require_interval)] = "15min"
    """Between checkpoints: optimizer steps (`500`) or minutes (`15min`). Those by steps stay after the run, those by
    time are removed. null: none on the way. An interrupt or an error saves one in any case."""
    eval_every: PositiveInt | None = None
    """Optimizer steps between measurements of the validation loss; default: measured at the end only."""
    patience: NonNegativeInt | None = None
    """End the run after more than this many measurements in a row without a better validation loss, with the best
    weights."""
    save_total_limit: PositiveInt = 2
    """Number of newest checkpoints kept; the one with the best validation loss is kept in addition."""

    @property
    def checkpoint_steps(self) -> int | None:
        """Optimizer steps between checkpoints; None where they come by time."""
        return self.checkpoint_every if isinstance(self.checkpoint_every, int) else None

    @property
    def checkpoint_seconds(self) -> float | None:
        """Seconds between checkpoints; None where they come by steps."""
        match = _MINUTES.fullmatch(self.checkpoint_every) if isinstance(self.checkpoint_every, str) else None
        return 60.0 * float(match[1]) if match else None

    def _check(self) -> None:
        if self.patience is not None and self.eval_every is None:
            raise ValueError("patience counts measurements: set eval_every too")
