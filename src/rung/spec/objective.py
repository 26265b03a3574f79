"""What is minimised."""

from __future__ import annotations

from typing import Literal

from rung.spec.base import Spec


class SftSpec(Spec):
    """Cross-entropy of the supervised tokens, in nats per token, each row scaled by its `weight` column."""

    kind: Literal["sft"] = "sft"


ObjectiveSpec = SftSpec
