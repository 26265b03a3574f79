"""How a step runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rung.config.base import Config, Fraction


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2)."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay, applied to matrices only, never to biases or norms."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.999
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    state_dtype: Literal["float32", "int8"] = "float32"
    """`int8` keeps both moments in 8 bits (Dettmers et al. 2022; bitsandbytes), on a graphics card in memory that pages
    out; tensors of fewer than 4,096 numbers stay in float32."""


class TrainingConfig(Config):
    """Steps, rates and what is kept."""

    epochs: PositiveFloat = 1.0
    """Passes over the training rows; a fraction stops within a pass."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    examples_per_step: PositiveInt = 16
    """Documents whose gradients make one optimizer step."""
    tokens_per_micro_batch: Annotated[int, Field(ge=16)] | Literal["auto", "probe"] = "auto"
    """Tokens computed at once. It sets memory and speed, never the result; `auto` follows from the model's shape,
    `probe` measures once on this machine and keeps what it found in run.json, so that a resume computes the same."""
    packing: Literal["tree", "flat", "none"] = "tree"
    """`tree` computes what several documents of a step begin with once; `flat` packs whole documents; `none` computes
    one document at a time. The result is the same: the slower ones are for comparing and for finding faults."""
    cache_frozen_layers: bool = True
    """Keep what enters the lowest layer that moves in a file beside the cache from the first epoch on, when there are
    layers below it and more than one epoch. Costs 4 bytes a token and unit of width while the run lasts."""
    learning_rate: PositiveFloat | None = None
    """Peak rate; none takes the method's default (lora 5e-4, head 5e-4, full 5e-5)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the rate after the warm-up; cosine and linear end at 0."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the rate rises from 0."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Largest gradient norm; none never clips."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW's own settings."""
    checkpoint_every: PositiveInt | None = None
    """Optimizer steps between checkpoints; none saves only when interrupted."""
    eval_every: PositiveInt | None = None
    """Optimizer steps between measurements of the validation loss; none measures it at the end."""
    patience: NonNegativeInt | None = None
    """Stop when this many measurements in a row did not improve the best validation loss, and keep the best weights."""
    save_total_limit: PositiveInt = 2
    """Checkpoints kept, newest first; the best by validation loss is kept besides."""

    @model_validator(mode="after")
    def _patience_needs_measurements(self) -> TrainingConfig:
        if self.patience is not None and self.eval_every is None:
            raise ValueError("patience counts measurements: set eval_every too")
        return self
