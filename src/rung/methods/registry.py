"""The table of methods, and `attach_method`, which applies one to a loaded model.

A method is a line here, a config class and a module. The contract tests run over this table, so no method escapes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from rung.config.method import MethodConfig
from rung.methods.bottleneck import Bottleneck
from rung.methods.full import Full, Head
from rung.methods.layer_selection import make_lottery
from rung.methods.lora import Lora
from rung.methods.mixture import Mixture
from rung.methods.peft_tuner import PeftTuner
from rung.methods.prompt_learning import VirtualTokens
from rung.methods.protocol import Method
from rung.models.fused_modules import install_fused_forwards

METHODS: dict[str, Callable[[PreTrainedModel, Any], Method]] = {
    "full": Full,
    "head": Head,
    "lora": Lora,
    "qlora": Lora,
    "lottery": make_lottery,
    "mixture": Mixture,
    "bottleneck": Bottleneck,
    "prompt": VirtualTokens,
    "prefix": VirtualTokens,
    "p_tuning": VirtualTokens,
    "peft": PeftTuner,
}


def attach_method(model: PreTrainedModel, config: MethodConfig, *, seed: int, fused: bool = True) -> Method:
    """Attach the method of a config to a model. New parameters depend only on the seed.

    `fused` installs the functions of `models/fused_ops.py`; results are the same within rounding.
    """
    # Methods and peft draw initial values from torch's global generator.
    torch.manual_seed(seed)
    method = METHODS[config.kind](model, config)
    # New modules start in training mode: their dropout would be active in every answer.
    model.eval()
    if fused:
        install_fused_forwards(model, method.linear_params)
    return method
