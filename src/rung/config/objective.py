"""What is minimised."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from rung.config.base import Spec


class SftSpec(Spec):
    """Cross-entropy of the supervised tokens, in nats per token, each row scaled by its `weight` column."""

    RATE: ClassVar[float] = 1.0
    """Default learning rate over the method's own."""
    kind: Literal["sft"] = "sft"


PreferenceLoss = Literal["dpo", "ipo", "hinge", "robust", "simpo", "orpo", "kto", "apo_zero", "sigmoid_norm"]
FREE = frozenset({"simpo", "orpo"})
"""Losses that know no reference."""
COMPARING = frozenset({"preference", "reward"})
"""Objectives of rows with several answers."""
ROLLING = frozenset({"grpo", "ppo"})
"""Objectives that learn from answers of the policy's own."""


class PreferenceSpec(Spec):
    """Make the better of two answers likelier than the other, measured against a reference (Rafailov et al. 2023)."""

    RATE: ClassVar[float] = 0.1
    kind: Literal["preference"] = "preference"
    loss: PreferenceLoss = "dpo"
    """Of the difference h between the answers' log-ratios to the reference: see docs/objectives/preference.md."""
    beta: PositiveFloat | None = None
    """How much a nat of log-ratio counts: small values let the policy move far from the reference. None is 2 for simpo
    and 0.1 for all others."""
    margin: NonNegativeFloat = 0.5
    """Target difference of simpo in nats per token (gamma over beta, Meng et al. 2024, eq. 6)."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of pairs whose label is taken to be wrong, for `robust` (Chowdhury et al. 2024, eq. 11)."""
    bad_weight: PositiveFloat = 1.0
    """Weight of a bad answer beside a good one, for kto: good over bad answers where they are few."""
    sft: NonNegativeFloat | None = None
    """Weight of the best answer's cross-entropy beside the loss, in nats per token; none is 1 for orpo, else 0."""
    reference: str = Field(default="base", min_length=1)
    """`base`: the base, an adapter off or a copy kept frozen; or the folder of a run."""

    @model_validator(mode="after")
    def _nothing_asked_for_in_vain(self) -> PreferenceSpec:
        if self.label_smoothing and self.loss != "robust":
            raise ValueError("label_smoothing is for loss: robust")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss: robust needs label_smoothing, the share of labels that are wrong")
        if self.margin != 0.5 and self.loss != "simpo":
            raise ValueError("margin is for loss: simpo")
        if self.bad_weight != 1.0 and self.loss != "kto":
            raise ValueError("bad_weight is for loss: kto")
        if self.reference != "base" and self.loss in FREE:
            raise ValueError(f"loss: {self.loss} knows no reference")
        return self

    @property
    def against(self) -> str | None:
        """The reference, if it is asked for."""
        return None if self.loss in FREE else self.reference

    @property
    def strength(self) -> float:
        """The beta in use."""
        return (2.0 if self.loss == "simpo" else 0.1) if self.beta is None else self.beta

    @property
    def sft_weight(self) -> float:
        """The weight in use."""
        return float(self.loss == "orpo") if self.sft is None else self.sft


class RewardSpec(Spec):
    """A scalar head that puts better answers above others (Ouyang et al. 2022): pairs, rankings or ratings."""

    RATE: ClassVar[float] = 0.3
    kind: Literal["reward"] = "reward"
    margin: NonNegativeFloat = 0.0
    """How far apart two scores should be, times the difference of the scores in the data: of a pair its `margin`
    column, or 1; of a ranking the places between; of ratings their difference (Touvron et al. 2023, section 3.2.2)."""
    centre: NonNegativeFloat = 0.0
    """Weight of (r_w + r_l)^2, which holds the level of the scores at 0; 0.01 is usual (Eisenstein et al. 2024)."""


class VerifierSpec(Spec):
    """1 for an answer that a metric calls right beside the expected one, else 0; see docs/guide.md for the metrics."""

    kind: Literal["exact", "normalised", "numeric"]


class RegexSpec(Spec):
    """1 for an answer in which a pattern occurs; where it has a group, that must be the expected answer."""

    kind: Literal["regex"] = "regex"
    pattern: str = Field(default=..., min_length=1)
    """A regular expression of Python."""

    @field_validator("pattern")
    @classmethod
    def _a_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"this is no regular expression: {error}") from error
        return pattern


class FunctionSpec(Spec):
    """A function of your own: `def name(answer: str, row: dict) -> float`."""

    kind: Literal["function"] = "function"
    path: str = Field(default=..., pattern=r"^.+\.py:[A-Za-z_]\w*$")
    """`file.py:name`; the row holds question, expected, context, task and group."""


class ModelRewardSpec(Spec):
    """What a reward run says of an answer."""

    kind: Literal["model"] = "model"
    run: str = Field(default=..., min_length=1)
    """Its folder. On the run's own base it is one more adapter on the same weights."""
    accept: bool = False
    """Take it although its verdict on held-out pairs is not `healthy`."""


RewardSource = Annotated[VerifierSpec | RegexSpec | FunctionSpec | ModelRewardSpec, Field(discriminator="kind")]


class RolloutSpec(Spec):
    """Answers that the policy makes itself, to learn from what they are worth."""

    answers: PositiveInt = 8
    """To each prompt: the group that an answer is compared with."""
    temperature: PositiveFloat = 1.0
    """Of sampling; losses are of the same distribution."""
    max_new_tokens: PositiveInt = 128
    """An answer longer than that is cut."""
    batch: PositiveInt = 64
    """Answers made at once."""
    epochs: PositiveInt = 1
    """How often the answers of a rollout are learned from."""
    minibatches: PositiveInt = 1
    """Optimiser steps of an epoch, each with its share of the prompts; fewer prompts than steps come again."""
    cut: NonNegativeFloat = 0.0
    """Taken off the reward of an answer that was cut."""

    @property
    def steps(self) -> int:
        """Optimiser steps of a rollout."""
        return self.epochs * self.minibatches


class AdaptSpec(Spec):
    """A penalty that rises while the divergence lies above its target (Ziegler et al. 2019, section 2.2)."""

    target: PositiveFloat = 6.0
    """Nats an answer."""
    horizon: PositiveInt = 10_000
    """Answers over which it adapts."""


class PpoStops(Spec):
    """How far a policy may move from the one that made the answers."""

    kl: PositiveFloat = 0.2
    """Nats a token."""
    ratio: PositiveFloat = 10.0
    """Mean ratio of the tokens' probabilities."""


class GrpoSpec(Spec):
    """Answers better than others to the same prompt become likelier (Shao et al. 2024): no value model."""

    RATE: ClassVar[float] = 0.1
    kind: Literal["grpo"] = "grpo"
    loss: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """`grpo`: advantages over the group's spread, each answer the mean of its tokens (Shao et al. 2024, eq. 3);
    `dr_grpo`: neither, so that length and difficulty weigh nothing (Liu et al. 2025); `rloo`: against the mean of the
    others, whole answers (Ahmadian et al. 2024, eq. 7)."""
    reward: RewardSource = Field(default=...)
    """What an answer is worth."""
    beta: NonNegativeFloat = 0.04
    """Weight of the KL divergence to the reference, in nats; 0 needs no reference."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """How far the ratio to the policy that made the answers may move a loss."""
    rollout: RolloutSpec = RolloutSpec()
    """How answers are made."""
    reference: str = Field(default="base", min_length=1)
    """As for preference."""

    @model_validator(mode="after")
    def _a_group_has_several(self) -> GrpoSpec:
        if self.rollout.answers < 2:
            raise ValueError("a group needs rollout.answers of at least 2")
        if self.reference != "base" and not self.beta:
            raise ValueError("beta: 0 knows no reference")
        return self

    @property
    def against(self) -> str | None:
        """The reference, if it is asked for."""
        return self.reference if self.beta else None


class PpoSpec(Spec):
    """Answers worth more than a value model expected become likelier (Schulman et al. 2017; Ouyang et al. 2022)."""

    RATE: ClassVar[float] = 0.1
    kind: Literal["ppo"] = "ppo"
    reward: RewardSource = Field(default=...)
    """What an answer is worth."""
    beta: NonNegativeFloat = 0.05
    """Taken off the reward for each nat of log-ratio to the reference, token by token; 0 needs no reference."""
    adapt: AdaptSpec | None = None
    """How `beta` follows the divergence; none keeps it as it is."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """How far a ratio may move the loss."""
    value_clip: PositiveFloat = 0.2
    """How far a value may move in a rollout before it is held back."""
    value_weight: PositiveFloat = 0.1
    """Of the value loss beside the policy's."""
    value: Literal["fresh", "reward"] = "fresh"
    """Where the value model begins: a fresh adapter on the same base, or the adapter and head of the reward run."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Discount of a token."""
    decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.95
    """Lambda of generalised advantage estimation: 1 trusts rewards alone, 0 the value model."""
    whiten: bool = True
    """Advantages of a rollout get mean 0 and variance 1."""
    entropy: NonNegativeFloat = 0.0
    """Weight of the entropy, which keeps answers various."""
    stops: PpoStops = PpoStops()
    """When the rest of a rollout is left."""
    rollout: RolloutSpec = RolloutSpec(answers=1, epochs=4, minibatches=2)
    """How answers are made."""
    reference: str = Field(default="base", min_length=1)
    """As for preference."""

    @model_validator(mode="after")
    def _nothing_asked_for_in_vain(self) -> PpoSpec:
        if not self.beta and (self.reference != "base" or self.adapt is not None):
            raise ValueError("beta: 0 knows no reference, and nothing to adapt")
        if self.value == "reward" and self.reward.kind != "model":
            raise ValueError("value: reward needs reward: {kind: model, run: ...}")
        return self

    @property
    def against(self) -> str | None:
        """The reference, if it is asked for."""
        return self.reference if self.beta else None


class DistillSpec(Spec):
    """The distribution of a teacher is followed token by token (Hinton et al. 2015; Agarwal et al. 2024)."""

    RATE: ClassVar[float] = 1.0
    kind: Literal["distill"] = "distill"
    teacher: str = Field(default=..., min_length=1)
    """A run's folder, or any base; its vocabulary must be the student's."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """`forward`: KL(teacher || student), which covers all that the teacher would say; `reverse`: KL(student ||
    teacher), which keeps to it; `jsd`: between the two (Agarwal et al. 2024, eq. 1)."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Of jsd: the teacher's share of the mixture; near 0 it is forward, near 1 reverse."""
    temperature: PositiveFloat = 1.0
    """Both distributions are made so much flatter; the term is multiplied by its square."""
    weight: PositiveFloat = 1.0
    """Of the divergence."""
    cross_entropy: NonNegativeFloat = 0.0
    """Weight of the data's own tokens beside it."""
    cosine: NonNegativeFloat = 0.0
    """Weight of 1 - cos between the last hidden states, which must be equally wide (Sanh et al. 2019)."""
    on_policy: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the rows that the student answers itself, as `rollout` says, and is corrected on (Agarwal et al. 2024,
    algorithm 1); their tokens take no part in `cross_entropy`."""
    rollout: RolloutSpec = RolloutSpec(answers=1)
    """How the student answers."""
    keep_states: bool = True
    """What the teacher gave for a document is kept on disk: from the second epoch on it is not asked again."""

    @model_validator(mode="after")
    def _nothing_asked_for_in_vain(self) -> DistillSpec:
        if self.beta != 0.5 and self.divergence != "jsd":
            raise ValueError("beta is for divergence: jsd")
        if self.rollout != RolloutSpec(answers=1) and not self.on_policy:
            raise ValueError("rollout is for on_policy above 0")
        if self.rollout.answers != 1 or self.rollout.minibatches != 1 or self.rollout.cut:
            raise ValueError("a student gives one answer to a row, in one step: leave answers, minibatches and cut")
        return self


ObjectiveSpec = Annotated[
    SftSpec | PreferenceSpec | RewardSpec | GrpoSpec | PpoSpec | DistillSpec, Field(discriminator="kind")
]
