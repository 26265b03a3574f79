"""What is minimised."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from rung.spec.base import Spec


class SftSpec(Spec):
    """Cross-entropy of the supervised tokens, in nats per token, each row scaled by its `weight` column."""

    RATE: ClassVar[float] = 1.0
    """Default learning rate over the method's own."""
    kind: Literal["sft"] = "sft"


PreferenceLoss = Literal["dpo", "ipo", "hinge", "robust", "simpo", "orpo", "kto", "apo_zero", "sigmoid_norm"]
FREE = frozenset({"simpo", "orpo"})
"""Losses that know no reference."""


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
    def strength(self) -> float:
        """The beta in use."""
        return (2.0 if self.loss == "simpo" else 0.1) if self.beta is None else self.beta

    @property
    def sft_weight(self) -> float:
        """The weight in use."""
        return float(self.loss == "orpo") if self.sft is None else self.sft


ObjectiveSpec = Annotated[SftSpec | PreferenceSpec, Field(discriminator="kind")]
