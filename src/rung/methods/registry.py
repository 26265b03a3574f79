"""The table of methods: the contract suite runs over its lines, so nothing escapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from rung.config.method import MethodSpec
from rung.methods.bottleneck import Bottleneck
from rung.methods.full import Full, Head
from rung.methods.layer_selection import lora, lottery
from rung.methods.mixture import Mixture
from rung.methods.peft_tuner import Passthrough
from rung.methods.prompt_learning import VirtualTokens
from rung.methods.protocol import Method
from rung.methods.qlora import qlora
from rung.models.fused_modules import fuse

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
