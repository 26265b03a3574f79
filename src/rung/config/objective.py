"""What is minimized."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from rung.config.base import Config


class ObjectiveBase(Config):
    """What every objective answers, whatever its settings: the code that composes a run asks nothing else."""

    LEARNING_RATE_SCALE: ClassVar[float]
    """Factor of the method's default learning rate."""

    @property
    def reference_model(self) -> str | None:
        """The model that log-probabilities are compared with: `base` or a run; None where there is none."""
        return None

    @property
    def on_policy_share(self) -> float:
        """Share of the rows that the policy answers itself."""
        return 0.0


class SftConfig(ObjectiveBase):
    """Cross-entropy of the supervised tokens, in nats per token, each row scaled by its `weight` column."""

    LEARNING_RATE_SCALE: ClassVar[float] = 1.0
    """Default learning rate over the method's own."""
    rollout: ClassVar[None] = None
    reward: ClassVar[None] = None
    kind: Literal["sft"] = "sft"


PreferenceLoss = Literal["dpo", "ipo", "hinge", "robust", "simpo", "orpo", "kto", "apo_zero", "sigmoid_norm"]
REFERENCE_FREE = frozenset({"simpo", "orpo"})
"""Losses that know no reference."""
COMPARISON_KINDS = frozenset({"preference", "reward"})
"""Objectives of rows with several answers."""
ROLLOUT_KINDS = frozenset({"grpo", "ppo"})
"""Objectives that learn from answers of the policy's own."""


class PreferenceConfig(ObjectiveBase):
    """Make the better of two answers likelier than the other, measured against a reference (Rafailov et al. 2023)."""

    LEARNING_RATE_SCALE: ClassVar[float] = 0.1
    rollout: ClassVar[None] = None
    reward: ClassVar[None] = None
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
    undesirable_weight: PositiveFloat = 1.0
    """Weight of a bad answer beside a good one, for kto: good over bad answers where they are few."""
    sft: NonNegativeFloat | None = None
    """Weight of the best answer's cross-entropy beside the loss, in nats per token; none is 1 for orpo, else 0."""
    reference: str = Field(default="base", min_length=1)
    """`base`: the base, an adapter off or a copy kept frozen; or the folder of a run."""

    @model_validator(mode="after")
    def _reject_unused_settings(self) -> PreferenceConfig:
        if self.label_smoothing and self.loss != "robust":
            raise ValueError("label_smoothing is for loss: robust")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss: robust needs label_smoothing, the share of labels that are wrong")
        if self.margin != 0.5 and self.loss != "simpo":
            raise ValueError("margin is for loss: simpo")
        if self.undesirable_weight != 1.0 and self.loss != "kto":
            raise ValueError("undesirable_weight is for loss: kto")
        if self.reference != "base" and self.loss in REFERENCE_FREE:
            raise ValueError(f"loss: {self.loss} knows no reference")
        return self

    @property
    def reference_model(self) -> str | None:
        """The reference, if it is asked for."""
        return None if self.loss in REFERENCE_FREE else self.reference

    @property
    def resolved_beta(self) -> float:
        """The beta in use."""
        return (2.0 if self.loss == "simpo" else 0.1) if self.beta is None else self.beta

    @property
    def sft_weight(self) -> float:
        """The weight in use."""
        return float(self.loss == "orpo") if self.sft is None else self.sft


class RewardConfig(ObjectiveBase):
    """A scalar head that puts better answers above others (Ouyang et al. 2022): pairs, rankings or ratings."""

    LEARNING_RATE_SCALE: ClassVar[float] = 0.3
    rollout: ClassVar[None] = None
    reward: ClassVar[None] = None
    kind: Literal["reward"] = "reward"
    margin: NonNegativeFloat = 0.0
    """How far apart two scores should be, times the difference of the scores in the data: of a pair its `margin`
    column, or 1; of a ranking the places between; of ratings their difference (Touvron et al. 2023, section 3.2.2)."""
    center_rewards_coefficient: NonNegativeFloat = 0.0
    """Weight of (r_w + r_l)^2, which holds the level of the scores at 0; 0.01 is usual (Eisenstein et al. 2024)."""


class VerifierConfig(Config):
    """1 for an answer that a metric calls right beside the expected one, else 0; see docs/guide.md for the metrics."""

    kind: Literal["exact", "normalized", "numeric"]


class RegexRewardConfig(Config):
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


class FunctionRewardConfig(Config):
    """A function of your own: `def name(answer: str, row: dict) -> float`."""

    kind: Literal["function"] = "function"
    path: str = Field(default=..., pattern=r"^.+\.py:[A-Za-z_]\w*$")
    """`file.py:name`; the row holds question, expected, context, task and group."""


class ModelRewardConfig(Config):
    """What a reward run says of an answer."""

    kind: Literal["model"] = "model"
    run: str = Field(default=..., min_length=1)
    """Its folder. On the run's own base it is one more adapter on the same weights."""
    accept: bool = False
    """Take it although its verdict on held-out pairs is not `healthy`."""


RewardSourceConfig = Annotated[
    VerifierConfig | RegexRewardConfig | FunctionRewardConfig | ModelRewardConfig, Field(discriminator="kind")
]


class RolloutConfig(Config):
    """Answers that the policy makes itself, to learn from what they are worth."""

    num_generations: PositiveInt = 8
    """To each prompt: the group that an answer is compared with."""
    temperature: PositiveFloat = 1.0
    """Of sampling; losses are of the same distribution."""
    max_new_tokens: PositiveInt = 128
    """An answer longer than that is cut."""
    batch: PositiveInt = 64
    """Answers made at once."""
    num_iterations: PositiveInt = 1
    """How often the answers of a rollout are learned from."""
    num_minibatches: PositiveInt = 1
    """Optimizer steps of an epoch, each with its share of the prompts; fewer prompts than steps come again."""
    truncation_penalty: NonNegativeFloat = 0.0
    """Taken off the reward of an answer that was cut."""

    @property
    def steps(self) -> int:
        """Optimizer steps of a rollout."""
        return self.num_iterations * self.num_minibatches


class AdaptiveKlConfig(Config):
    """A penalty that rises while the divergence lies above its target (Ziegler et al. 2019, section 2.2)."""

    target: PositiveFloat = 6.0
    """Nats an answer."""
    horizon: PositiveInt = 10_000
    """Answers over which it adapts."""


class PpoStopConfig(Config):
    """How far a policy may move from the one that made the answers."""

    target_kl: PositiveFloat = 0.2
    """Nats a token."""
    ratio: PositiveFloat = 10.0
    """Mean ratio of the tokens' probabilities."""


class GrpoConfig(ObjectiveBase):
    """Answers better than others to the same prompt become likelier (Shao et al. 2024): no value model."""

    LEARNING_RATE_SCALE: ClassVar[float] = 0.1
    kind: Literal["grpo"] = "grpo"
    loss: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """`grpo`: advantages over the group's spread, each answer the mean of its tokens (Shao et al. 2024, eq. 3);
    `dr_grpo`: neither, so that length and difficulty weigh nothing (Liu et al. 2025); `rloo`: against the mean of the
    others, whole answers (Ahmadian et al. 2024, eq. 7)."""
    reward: RewardSourceConfig = Field(default=...)
    """What an answer is worth."""
    beta: NonNegativeFloat = 0.04
    """Weight of the KL divergence to the reference, in nats; 0 needs no reference."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """How far the ratio to the policy that made the answers may move a loss."""
    rollout: RolloutConfig = RolloutConfig()
    """How answers are made."""
    reference: str = Field(default="base", min_length=1)
    """As for preference."""

    @model_validator(mode="after")
    def _a_group_has_several(self) -> GrpoConfig:
        if self.rollout.num_generations < 2:
            raise ValueError("a group needs rollout.num_generations of at least 2")
        if self.reference != "base" and not self.beta:
            raise ValueError("beta: 0 knows no reference")
        return self

    @property
    def on_policy_share(self) -> float:
        """All of them."""
        return 1.0

    @property
    def reference_model(self) -> str | None:
        """The reference, if it is asked for."""
        return self.reference if self.beta else None


class PpoConfig(ObjectiveBase):
    """Answers worth more than a value model expected become likelier (Schulman et al. 2017; Ouyang et al. 2022)."""

    LEARNING_RATE_SCALE: ClassVar[float] = 0.1
    kind: Literal["ppo"] = "ppo"
    reward: RewardSourceConfig = Field(default=...)
    """What an answer is worth."""
    beta: NonNegativeFloat = 0.05
    """Taken off the reward for each nat of log-ratio to the reference, token by token; 0 needs no reference."""
    adaptive_kl: AdaptiveKlConfig | None = None
    """How `beta` follows the divergence; none keeps it as it is."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """How far a ratio may move the loss."""
    cliprange_value: PositiveFloat = 0.2
    """How far a value may move in a rollout before it is held back."""
    vf_coef: PositiveFloat = 0.1
    """Of the value loss beside the policy's."""
    value: Literal["fresh", "reward"] = "fresh"
    """Where the value model begins: a fresh adapter on the same base, or the adapter and head of the reward run."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Discount of a token."""
    gae_lambda: Annotated[float, Field(ge=0.0, le=1.0)] = 0.95
    """Lambda of generalized advantage estimation: 1 trusts rewards alone, 0 the value model."""
    whiten: bool = True
    """Advantages of a rollout get mean 0 and variance 1."""
    entropy: NonNegativeFloat = 0.0
    """Weight of the entropy, which keeps answers various."""
    stops: PpoStopConfig = PpoStopConfig()
    """When the rest of a rollout is left."""
    rollout: RolloutConfig = RolloutConfig(num_generations=1, num_iterations=4, num_minibatches=2)
    """How answers are made."""
    reference: str = Field(default="base", min_length=1)
    """As for preference."""

    @model_validator(mode="after")
    def _reject_unused_settings(self) -> PpoConfig:
        if not self.beta and (self.reference != "base" or self.adaptive_kl is not None):
            raise ValueError("beta: 0 knows no reference, and nothing to adapt")
        if self.value == "reward" and self.reward.kind != "model":
            raise ValueError("value: reward needs reward: {kind: model, run: ...}")
        return self

    @property
    def on_policy_share(self) -> float:
        """All of them."""
        return 1.0

    @property
    def reference_model(self) -> str | None:
        """The reference, if it is asked for."""
        return self.reference if self.beta else None


class DistillConfig(ObjectiveBase):
    """The distribution of a teacher is followed token by token (Hinton et al. 2015; Agarwal et al. 2024)."""

    LEARNING_RATE_SCALE: ClassVar[float] = 1.0
    reward: ClassVar[None] = None
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
    rollout: RolloutConfig = RolloutConfig(num_generations=1)
    """How the student answers."""
    cache_teacher_states: bool = True
    """What the teacher gave for a document is kept on disk: from the second epoch on it is not asked again."""

    @property
    def on_policy_share(self) -> float:
        """As set."""
        return self.on_policy

    @model_validator(mode="after")
    def _reject_unused_settings(self) -> DistillConfig:
        if self.beta != 0.5 and self.divergence != "jsd":
            raise ValueError("beta is for divergence: jsd")
        if self.rollout != RolloutConfig(num_generations=1) and not self.on_policy:
            raise ValueError("rollout is for on_policy above 0")
        if self.rollout.num_generations != 1 or self.rollout.num_minibatches != 1 or self.rollout.truncation_penalty:
            raise ValueError("a student gives one answer to a row, in one step: leave answers, minibatches and cut")
        return self


ObjectiveConfig = Annotated[
    SftConfig | PreferenceConfig | RewardConfig | GrpoConfig | PpoConfig | DistillConfig, Field(discriminator="kind")
]
