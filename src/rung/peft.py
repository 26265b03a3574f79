"""Importing this registers Rung's own tuners with peft, so that stock peft loads and serves their files.

    import rung.peft
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, "runs/my-bottleneck/adapter")

peft refuses to register what its enumeration does not list, so its three tables are filled directly: a member of a
string enumeration is found by its string.
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


class OwnType(enum.StrEnum):
    """Names in adapter_config.json, beside those of peft."""

    RUNG_BOTTLENECK = "RUNG_BOTTLENECK"
    RUNG_MIXTURE = "RUNG_MIXTURE"


@dataclass
class OwnConfig(PeftConfig):  # type: ignore[misc]
    """peft's settings, and the config that the tuner is built from."""

    target_modules: list[str] | None = None
    method_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = OwnType[f"RUNG_{(self.method_config or {}).get('kind', '')}".upper()]


@dataclass
class NotInPeft(PeftConfig):  # type: ignore[misc]
    """What peft has no form for: loading it says so instead of naming an unknown type."""

    method_config: dict[str, Any] | None = None
    tasks: dict[str, str] | None = None

    def __post_init__(self) -> None:
        raise ValueError(
            "virtual tokens inside a conversation, and several tasks in one folder, are Rung's own: rung chat and rung "
            "eval answer with them. Of a folder with tasks each task-N in it loads in peft by itself"
        )


class OwnLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A module with adapters behind or beside it, by name."""

    adapter_layer_names = ("rung_adapters",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: OwnConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rung_adapters = nn.ModuleDict({})
        self.beside: dict[str, bool] = {}
        self.merged_adapters: list[str] = []
        self.add(adapter_name, config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models read settings off their layers
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def add(self, adapter_name: str, peft_config: OwnConfig) -> None:
        """Another adapter on the same module."""
        settings = peft_config.method_config or {}
        like = next(self.base_layer.parameters())
        adapter: nn.Module
        if settings.get("kind") == "mixture":
            config = MixtureConfig.model_validate(settings)
            base: Any = self.base_layer
            transposed = not hasattr(base, "in_features")
            outputs, inputs = base.weight.T.shape if transposed else base.weight.shape
            adapter = ExpertPool(inputs, outputs, config, like)
            self.beside[adapter_name] = True
        else:
            narrow = BottleneckConfig.model_validate({k: v for k, v in settings.items() if k != "features"})
            adapter = BottleneckAdapter(int(settings["features"]), narrow, like)
            self.beside[adapter_name] = narrow.placement == "parallel"
        self.rung_adapters[adapter_name] = adapter
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's own output, and what the active adapters add."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.rung_adapters:
                first = result[0] if isinstance(result, tuple) else result
                added = first + self.rung_adapters[name](x if self.beside[name] else first)
                result = (added, *result[1:]) if isinstance(result, tuple) else added
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Never: what these adapters do is not linear, or depends on the token."""
        raise NotImplementedError("this adapter cannot be folded into the base")

    def unmerge(self) -> None:
        """Nothing was merged."""


class OwnModel(BaseTuner):  # type: ignore[misc]
    """Puts the layers in place."""

    prefix = "rung_"
    tuner_layer_cls = OwnLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(
        self,
        peft_config: OwnConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, OwnLayer):
            target.add(adapter_name, peft_config)
            return
        layer = OwnLayer(target, adapter_name, peft_config)
        if adapter_name != self.active_adapter:
            layer.requires_grad_(False)
        if isinstance(parent, nn.ModuleList):
            parent[int(target_name)] = layer
        else:
            setattr(parent, target_name, layer)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".rung_adapters.{adapter_name}.", ".rung_adapters.")


for _own in OwnType:
    peft_tables.PEFT_TYPE_TO_CONFIG_MAPPING[_own] = OwnConfig
    peft_tables.PEFT_TYPE_TO_TUNER_MAPPING[_own] = OwnModel
    peft_tables.PEFT_TYPE_TO_PREFIX_MAPPING[_own] = OwnModel.prefix
for _alone in ("RUNG_P_TUNING", "RUNG_TASKS"):
    peft_tables.PEFT_TYPE_TO_CONFIG_MAPPING[_alone] = NotInPeft
