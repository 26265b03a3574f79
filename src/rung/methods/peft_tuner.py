"""Any other peft tuner through its own config: IA3, VeRA, OFT and others, computed by peft.

It gives access to every tuner in peft without code for each. The cost: peft's forward is slower than the fused one, the
base is float32, and tuners that need a training loop of their own are refused by name. `methods/registry.py` builds it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rung.config.base import ALL_LINEAR
from rung.config.method import PeftTunerConfig
from rung.errors import ConfigError, PlanError
from rung.methods.adapter_files import read_state, write_peft_files
from rung.methods.lora import DROPOUT_BLOCKS_SHARING, without_peft_warnings
from rung.methods.protocol import Method
from rung.models.fused_modules import plain_linear_params
from rung.models.fused_ops import LinearParams
from rung.models.targets import select_linears


class PeftTuner(Method):
    """A peft tuner in Rung's trainer, with peft's forward and file format."""

    kind = "peft"

    def __init__(self, model: PreTrainedModel, config: PeftTunerConfig) -> None:
        self.model, self.config = model, config
        self.starts_as_base = config.starts_as_base
        peft_config = _peft_config(model, config)
        model.float()  # as `PeftTunerConfig.widens_base` says
        try:
            self.peft: peft.PeftModel = without_peft_warnings(peft.get_peft_model, model, peft_config)
        # peft raises any of these for a config that does not fit the model.
        except (ValueError, TypeError, NotImplementedError, KeyError, AttributeError) as error:
            reason = f"peft does not take this config: {error}"
            raise ConfigError(reason, where="method.config", given=config.config.get("peft_type")) from error
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._trainable:
            reason = "peft found nothing in this model that this tuner could train"
            raise ConfigError(reason, where="method.config", given=config.config.get("peft_type"))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that peft marks trainable."""
        return dict(self._trainable)

    def declared_parameters(self) -> int:
        """Number of trainable parameters as counted by peft."""
        return int(self.peft.get_nb_trainable_parameters()[0])

    def disabled(self) -> AbstractContextManager[None]:
        """Within the context the model is the base without the method."""
        return self.peft.disable_adapter()  # type: ignore[no-any-return]

    def linear_params(self, module: nn.Module) -> LinearParams | None:
        """Parameters of a plain linear; None for a tuner's layer, which computes itself."""
        return None if isinstance(module, BaseTunerLayer) else plain_linear_params(module)

    def prefix_sharing_blocker(self) -> str | None:
        """Dropout, if the tuner's config sets one."""
        has_dropout = any("dropout" in key and value for key, value in self.config.config.items())
        return DROPOUT_BLOCKS_SHARING if has_dropout else None

    def save(self, folder: Path) -> None:
        """Write peft's two files."""
        write_peft_files(folder, self._state(), self.peft.peft_config["default"].to_dict())

    def load(self, folder: Path) -> None:
        """Load what `save` wrote; missing or unexpected keys raise `CheckpointError`."""
        without_peft_warnings(peft.set_peft_model_state_dict, self.peft, read_state(folder, self._state()))

    def merge(self) -> nn.Module:
        """Merge the tuner into the base. Raises `PlanError` if peft cannot."""
        try:
            merged: nn.Module = without_peft_warnings(self.peft.merge_and_unload, safe_merge=True)
        except (AttributeError, NotImplementedError, ValueError) as error:
            raise PlanError(f"peft cannot fold this tuner into the base: {error}") from error
        return merged

    def _state(self) -> dict[str, Tensor]:
        return dict(without_peft_warnings(peft.get_peft_model_state_dict, self.peft, save_embedding_layers=False))


def _peft_config(model: PreTrainedModel, config: PeftTunerConfig) -> peft.PeftConfig:
    """Build peft's config. Raises `ConfigError` for a tuner that is unknown, refused, or a method of Rung."""
    settings: dict[str, Any] = dict(config.config)
    kind = str(settings.get("peft_type", "")).upper()
    if kind in OWN_METHODS:
        replacement = OWN_METHODS[kind]
        raise ConfigError("this tuner has a method of its own", where="method.config", given=kind, allowed=replacement)
    if kind not in peft.PeftType.__members__:
        names = ", ".join(sorted(set(peft.PeftType.__members__) - set(OWN_METHODS)))
        raise ConfigError("no such tuner", where="method.config.peft_type", given=kind or None, allowed=names)
    if kind in REFUSED:
        hint = "kind: lora with rank_pattern, or lottery"
        raise ConfigError(REFUSED[kind], where="method.config", given=kind, hint=hint)
    if kind == "TRAINABLE_TOKENS" and model.config.tie_word_embeddings:
        reason = "rows of a tied embedding are the head's as well, which is read past the tuner"
        raise ConfigError(reason, where="method.config", given=kind, hint="kind: full, or a base whose head is its own")
    if settings.get("task_type", "CAUSAL_LM") != "CAUSAL_LM" or settings.get("inference_mode"):
        refused = {key: settings[key] for key in ("task_type", "inference_mode") if key in settings}
        raise ConfigError("a run trains a model that writes", where="method.config", given=refused)
    settings |= {"peft_type": kind, "task_type": "CAUSAL_LM"}
    # Targets that a tuner would ignore are an error: a setting without effect is a bug.
    selects_modules = config.targets != ALL_LINEAR or config.layers is not None
    if selects_modules and (kind in _NO_TARGETS or "target_modules" in settings):
        cause = "finds its modules itself" if kind in _NO_TARGETS else "names them in its config"
        raise ConfigError(f"targets and layers would do nothing: this tuner {cause}", where="method", given=kind)
    if kind not in _NO_TARGETS:
        settings.setdefault("target_modules", select_linears(model, config.targets, config.layers))
    if kind == "IA3" and isinstance(settings["target_modules"], list):
        # Full names, like the targets: peft refuses a file whose feed-forward modules are not among the targets.
        ends = settings.get("feedforward_modules", FEED_FORWARD)
        ends = (ends,) if isinstance(ends, str) else tuple(ends or ())
        settings["feedforward_modules"] = [name for name in settings["target_modules"] if name.endswith(ends)]
    try:
        peft_config = peft.get_peft_config(settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error), where="method.config", given=kind) from error
    if hasattr(peft_config, "fan_in_fan_out") and any(isinstance(module, Conv1D) for module in model.modules()):
        peft_config.fan_in_fan_out = True  # GPT-2 stores its weights transposed
    return peft_config


FEED_FORWARD = ("down_proj", "fc_out", "fc2", "dense_4h_to_h", "mlp.c_proj")
"""Endings of the names of matrices whose inputs IA3 scales (Liu et al. 2022, section 3.3)."""
OWN_METHODS = {
    "LORA": "kind: lora",
    "PROMPT_TUNING": "kind: prompt",
    "PREFIX_TUNING": "kind: prefix",
    "P_TUNING": "kind: p_tuning",
    "MULTITASK_PROMPT_TUNING": "kind: prompt",
    "CPT": "kind: prompt",
    "CARTRIDGE": "kind: prefix",
    "XLORA": "kind: mixture",
}
"""Tuners for which Rung has a method, and that method."""
REFUSED = {
    "ADALORA": "AdaLoRA hands its ranks out anew between steps, which peft leaves to a training loop of its own",
    "POLY": "Poly chooses among its skills by task ids, which peft wants as an argument of every forward",
    "ADAMSS": "AdaMSS freezes parts of itself between steps, which peft leaves to a training loop of its own",
    "LILY": "Lily's router averages over every token at hand, those of other documents and those to come among them",
    "SHADOW": "Shadow's layers read what a forward of peft's own left behind, which no other forward does",
}
"""Tuners that would train differently than their name says, with the reason."""
_NO_TARGETS = frozenset({"LN_TUNING", "ADAPTION_PROMPT", "TRAINABLE_TOKENS"})
"""Tuners that choose their modules themselves."""
