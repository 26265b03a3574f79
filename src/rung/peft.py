"""Registers Rung's tuners with peft when imported, so that stock peft loads and serves their files.

    import rung.peft
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, "runs/my-bottleneck/adapter")

peft's register function refuses types that its enumeration does not list, so its three tables are filled directly; a
member of a string enumeration equals its string. The price is a dependence on peft's internals, which
tests/reference/test_peft.py guards. Within Rung, `methods` builds the same adapters without this module.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from peft import mapping as peft_tables
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from rung.config.method import BottleneckConfig, MixtureConfig
from rung.methods.bottleneck import BottleneckAdapter
from rung.methods.mixture import ExpertPool


class RungTunerType(enum.StrEnum):
    """Values of `peft_type` in adapter_config.json besides those of peft."""

    RUNG_BOTTLENECK = "RUNG_BOTTLENECK"
    RUNG_MIXTURE = "RUNG_MIXTURE"


@dataclass
class RungTunerConfig(PeftConfig):  # type: ignore[misc]
    """Settings of peft, and the method config that the adapter is built from."""

    target_modules: list[str] | None = None
    method_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # derived from the method config, so that the two cannot disagree
        self.peft_type = RungTunerType[f"RUNG_{(self.method_config or {}).get('kind', '')}".upper()]


@dataclass
class RungOnlyConfig(PeftConfig):  # type: ignore[misc]
    """Types that peft cannot represent: loading one explains this instead of reporting an unknown type."""

    method_config: dict[str, Any] | None = None
    tasks: dict[str, str] | None = None

    def __post_init__(self) -> None:
        raise ValueError(
            "virtual tokens inside a conversation, and several tasks in one folder, are Rung's own: rung chat and rung "
            "eval answer with them. Of a folder with tasks each task-N in it loads in peft by itself"
        )


class RungTunerLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A base module with named adapters, each after it (serial) or parallel to it."""

    # read by peft: attributes whose parameters belong to adapters
    adapter_layer_names = ("rung_adapters",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RungTunerConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rung_adapters = nn.ModuleDict({})
        self.is_parallel: dict[str, bool] = {}
        self.merged_adapters: list[str] = []
        self.add(adapter_name, config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # model code reads attributes such as in_features from its layers
            if name == "base_layer":  # not set yet: the lookup below would recurse
                raise
            return getattr(self.base_layer, name)

    def add(self, adapter_name: str, peft_config: RungTunerConfig) -> None:
        """Add an adapter to the module."""
        settings = peft_config.method_config or {}
        like = next(self.base_layer.parameters())
        adapter: nn.Module
        if settings.get("kind") == "mixture":
            mixture_config = MixtureConfig.model_validate(settings)
            base: Any = self.base_layer
            # transformers' Conv1D (gpt2) stores [in, out] and has no in_features
            transposed = not hasattr(base, "in_features")
            output_width, input_width = base.weight.T.shape if transposed else base.weight.shape
            adapter = ExpertPool(input_width, output_width, mixture_config, like)
            self.is_parallel[adapter_name] = True
        else:
            bottleneck_config = BottleneckConfig.model_validate({k: v for k, v in settings.items() if k != "features"})
            adapter = BottleneckAdapter(int(settings["features"]), bottleneck_config, like)
            self.is_parallel[adapter_name] = bottleneck_config.placement == "parallel"
        self.rung_adapters[adapter_name] = adapter
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output of the base module plus the outputs of the active adapters."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.rung_adapters:
                # attention modules return a tuple whose first element is the output
                hidden = result[0] if isinstance(result, tuple) else result
                output = hidden + self.rung_adapters[name](x if self.is_parallel[name] else hidden)
                result = (output, *result[1:]) if isinstance(result, tuple) else output
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise `NotImplementedError`: these adapters are not linear, or depend on the token."""
        raise NotImplementedError("this adapter cannot be folded into the base")

    def unmerge(self) -> None:
        """Do nothing: these adapters are never merged."""


class RungTunerModel(BaseTuner):  # type: ignore[misc]
    """The tuner that replaces target modules by `RungTunerLayer`."""

    prefix = "rung_"
    tuner_layer_cls = RungTunerLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(
        self,
        peft_config: RungTunerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, RungTunerLayer):
            target.add(adapter_name, peft_config)
            return
        layer = RungTunerLayer(target, adapter_name, peft_config)
        # as peft's tuners: an adapter that is added while another is active must not train
        if adapter_name != self.active_adapter:
            layer.requires_grad_(False)
        # whole decoder layers can be targets (pfeiffer), and those are in a ModuleList
        if isinstance(parent, nn.ModuleList):
            parent[int(target_name)] = layer
        else:
            setattr(parent, target_name, layer)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".rung_adapters.{adapter_name}.", ".rung_adapters.")


for _tuner_type in RungTunerType:
    peft_tables.PEFT_TYPE_TO_CONFIG_MAPPING[_tuner_type] = RungTunerConfig
    peft_tables.PEFT_TYPE_TO_TUNER_MAPPING[_tuner_type] = RungTunerModel
    peft_tables.PEFT_TYPE_TO_PREFIX_MAPPING[_tuner_type] = RungTunerModel.prefix
# strings, not members: these types never reach a tuner
for _type_name in ("RUNG_P_TUNING", "RUNG_TASKS"):
    peft_tables.PEFT_TYPE_TO_CONFIG_MAPPING[_type_name] = RungOnlyConfig
