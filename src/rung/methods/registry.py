"""The table of methods: the contract suite runs over its lines, so nothing escapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from rung.config.method import MethodConfig
from rung.methods.bottleneck import Bottleneck
from rung.methods.full import Full, Head
from rung.methods.layer_selection import make_lora, make_lottery
from rung.methods.mixture import Mixture
from rung.methods.peft_tuner import PeftTuner
from rung.methods.prompt_learning import VirtualTokens
from rung.methods.protocol import Method
from rung.methods.qlora import make_qlora
from rung.models.fused_modules import install_fused_forwards

METHODS: dict[str, Callable[[PreTrainedModel, Any], Method]] = {
    "full": Full,
    "head": Head,
    "lora": make_lora,
    "qlora": make_qlora,
    "lottery": make_lottery,
    "mixture": Mixture,
    "bottleneck": Bottleneck,
    "prompt": VirtualTokens,
    "prefix": VirtualTokens,
    "p_tuning": VirtualTokens,
    "peft": PeftTuner,
}


def attach_method(model: PreTrainedModel, config: MethodConfig, *, seed: int, fused: bool = True) -> Method:
    """Free the numbers a config names. The draw of new numbers depends on the seed alone.

    `fused` puts Rung's own functions under the modules; the numbers are the same within rounding.
    """
    torch.manual_seed(seed)
    method = METHODS[config.kind](model, config)
    model.eval()  # what a method put in place begins in training mode: dropout would be on in every answer
    if fused:
        install_fused_forwards(model, method.linear_params)
    return method
