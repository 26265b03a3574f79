"""The table of methods: the contract suite runs over its lines, so nothing escapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from rung.method.base import Method
from rung.method.bottleneck import Bottleneck
from rung.method.course import lora, lottery
from rung.method.full import Full, Head
from rung.method.mixture import Mixture
from rung.method.passthrough import Passthrough
from rung.method.quantised import qlora
from rung.method.soft_prompt import VirtualTokens
from rung.model.fuse import fuse
from rung.spec.method import MethodSpec

METHODS: dict[str, Callable[[PreTrainedModel, Any], Method]] = {
    "full": Full,
    "head": Head,
    "lora": lora,
    "qlora": qlora,
    "lottery": lottery,
    "mixture": Mixture,
    "bottleneck": Bottleneck,
    "prompt": VirtualTokens,
    "prefix": VirtualTokens,
    "p_tuning": VirtualTokens,
    "peft": Passthrough,
}


def attach(model: PreTrainedModel, spec: MethodSpec, *, seed: int, fused: bool = True) -> Method:
    """Free the numbers a spec names. The draw of new numbers depends on the seed alone.

    `fused` puts Rung's own functions under the modules; the numbers are the same within rounding.
    """
    torch.manual_seed(seed)
    method = METHODS[spec.kind](model, spec)
    model.eval()  # what a method put in place begins in training mode: dropout would be on in every answer
    if fused:
        fuse(model, method.part)
    return method
