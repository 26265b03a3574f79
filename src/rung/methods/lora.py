"""LoRA through peft: its layers, initializations and file format, with fused products and data-dependent starts.

peft's modules are kept, so that files load in stock peft and new variants arrive with it; `linear_params` lets
`models/fused_ops.py` compute them with less memory. DoRA and dropout keep peft's slower forward. `methods/registry.py`
builds it through `methods/layer_selection.py`, `methods/qlora.py` on a quantized base.

Suffixes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rung.config.method import CALIBRATED_INITS, SUBTRACTED_INITS, LowRankConfig
from rung.errors import ConfigError
from rung.methods import lora_init as starts
from rung.methods.adapter_files import CONFIG, read_state, write_peft_files
from rung.methods.lora_init import input_second_moments, weight_gradients
from rung.methods.protocol import CalibrationData, Method, TrainableSet, require_same_keys, require_same_shapes
from rung.models.bfloat16_weights import keeps_bfloat16_weights, pretend_float32_weights
from rung.models.fused_modules import plain_linear_params
from rung.models.fused_ops import LinearParams
from rung.models.targets import layer_number, roles_of, select_linears

TRAINED_ADAPTER, OFFSET_ADAPTER = "default", "offset"
"""peft's names of the trained adapter and of the frozen one that subtracts the initial B A (decision 0013)."""
DROPOUT_BLOCKS_SHARING = "adapter dropout drops each copy of one differently"
"""The reason why prefixes are not shared."""
_INIT: dict[str, Any] = {"gaussian": "gaussian", "orthogonal": "orthogonal"}


class QuantizedBaseProtocol(Protocol):
    """A base with quantized linears."""

    def dequantize(self, model: nn.Module) -> None:
        """Replace quantized weights by dense ones: the same values, faster, in more memory."""
        ...

    def merged_linear(self, layer: Any) -> nn.Module:
        """The dense linear of a peft layer, with its update added."""
        ...


class LayerSchedule(Protocol):
    """Decides which layers are trained as a run proceeds."""

    sample: CalibrationData | None
    """Training documents for scoring layers, once `calibrate` has been called."""

    def trainable_at_step(self, step: int) -> TrainableSet | None:
        """As in `Method`."""
        ...

    def statistics(self) -> Mapping[str, Any]:
        """As in `Method`."""
        ...

    def state(self) -> dict[str, Any]:
        """As in `Method`."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """As in `Method`."""
        ...


class Lora(Method):
    """W + (alpha / rank) B A on the chosen linears; the base stays frozen (Hu et al. 2021, eq. 3).

    An initial B0 A0 that is not zero is stored a second time, frozen and negated, so that W + s (B A - B0 A0) starts as
    W. Both halves are saved as one plain adapter of twice the rank.
    """

    artifact = "adapter"

    def __init__(
        self, model: PreTrainedModel, config: LowRankConfig, quantized: QuantizedBaseProtocol | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.kind: str = config.kind
        self.quantized: QuantizedBaseProtocol | None = quantized
        self.layer_schedule: LayerSchedule | None = None
        self.starts_as_base = config.init != "loftq"  # LoftQ starts closer to the unquantized base
        self.seed = torch.initial_seed()  # set by `attach_method` just before
        # Full names, so that peft adapts exactly these modules.
        self.names = select_linears(model, config.targets, config.layers)
        self.active_names = list(self.names)
        """Linears whose update is active: all, unless `keep_only_modules` was called."""
        self.sample_size = config.init_examples if config.init in CALIBRATED_INITS else 0
        self.subtracts = config.init in SUBTRACTED_INITS
        self.shapes = {name: _linear_shape(model.get_submodule(name)) for name in self.names}
        self.ranks = {name: _rank_of(name, config) for name in self.names}
        self._check()
        self.full_module_names = [
            name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in config.modules_to_save
        ]
        """Full names of fully trained modules; peft matches a short name with every module that ends with it."""
        if config.dora and keeps_bfloat16_weights(model):
            # DoRA: peft computes column norms in the dtype of the stored weight.
            model.float()
        try:
            targets = [model.get_submodule(name) for name in self.names]
            with nullcontext() if config.dora else pretend_float32_weights(targets):
                self.peft: PeftModel = without_peft_warnings(
                    get_peft_model, model, self._config(self.full_module_names)
                )
                if self.subtracts:
                    without_peft_warnings(self.peft.add_adapter, OFFSET_ADAPTER, self._config([]))
        except ValueError as error:  # this rank is impossible for this initialization
            raise ConfigError(str(error), where="method.init", given=config.init) from error
        # peft marks the second adapter trainable too; its parameters are excluded by name.
        self._trainable = {
            name: p for name, p in model.named_parameters() if p.requires_grad and f".{OFFSET_ADAPTER}." not in name
        }
        self._offsets = [p for name, p in model.named_parameters() if f".{OFFSET_ADAPTER}." in name]
        if self.subtracts:
            for layer in self.layers().values():
                layer.set_adapter([TRAINED_ADAPTER, OFFSET_ADAPTER])
        # Zero until `calibrate` or `load` sets it.
        for parameter in self._offsets:
            parameter.requires_grad_(False)
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = torch.zeros_like(parameter.data, dtype=dtype)
        # peft leaves fully trained modules in the base's bfloat16.
        for parameter in self._trainable.values():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()

    def trainable(self) -> dict[str, nn.Parameter]:
        """A, B, DoRA magnitudes, and fully trained modules."""
        return dict(self._trainable)

    def trainable_at_step(self, step: int) -> TrainableSet | None:
        """Parameters trained at this step; None (all) without a layer schedule."""
        return None if self.layer_schedule is None else self.layer_schedule.trainable_at_step(step)

    def statistics(self) -> Mapping[str, Any]:
        """Statistics of the layer schedule."""
        return {} if self.layer_schedule is None else self.layer_schedule.statistics()

    def state(self) -> dict[str, Any]:
        """State of the layer schedule."""
        return {} if self.layer_schedule is None else self.layer_schedule.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the layer schedule."""
        if self.layer_schedule is not None:
            self.layer_schedule.load_state(state)

    def keep_only_modules(self, names: Collection[str]) -> None:
        """Keep only the updates of these linears; the others add nothing and are not saved."""
        self.active_names = [name for name in self.names if name in names]
        with torch.no_grad():
            for name in set(self.names) - set(self.active_names):
                # Zero B instead of removing the module: the module tree and the optimizer's parameters stay the same.
                self.layer(name).lora_B[TRAINED_ADAPTER].weight.zero_()

    def learning_rate_factor(self, name: str) -> float:
        """LoRA+ gives B a higher learning rate than A."""
        return self.config.loraplus_lr_ratio if ".lora_B." in name else 1.0

    def declared_parameters(self) -> int:
        """Sum of r (inputs + outputs) over the targets, plus outputs with DoRA, plus fully trained modules."""
        low_rank = sum(self.ranks[name] * sum(shape) for name, shape in self.shapes.items())
        magnitudes = sum(outputs for _, outputs in self.shapes.values()) if self.config.dora else 0
        copied_modules: list[Any] = [self.model.get_submodule(name) for name in self.full_module_names]
        full_modules = sum(int(p.numel()) for module in copied_modules for p in module.original_module.parameters())
        return low_rank + magnitudes + full_modules

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context the model is the base without the method."""
        parameters = [*self._trainable.values(), *self._offsets]
        requires_grad = [p.requires_grad for p in parameters]
        try:
            with self.peft.disable_adapter():
                yield
        finally:
            for parameter, flag in zip(parameters, requires_grad, strict=True):  # peft sets all of them to True
                parameter.requires_grad_(flag)

    def linear_params(self, module: nn.Module) -> LinearParams | None:
        """Parameters of peft's layer as it computes now; None if only peft can compute it (dropout, DoRA, variants)."""
        # The exact type: peft's other layers (quantized, embeddings) have their own products.
        if type(module) is not PeftLinear:
            return plain_linear_params(module)
        layer: Any = module
        base = plain_linear_params(layer.base_layer)
        if base is None or layer.disable_adapters or layer.merged:
            return base
        names = layer.active_adapters
        if any(not isinstance(layer.lora_dropout[n], nn.Identity) or layer.lora_bias[n] for n in names):
            return None
        if any(name in layer.lora_variant for name in names):
            return None
        # Both halves as one pair of factors: they have the same scale, and one product is faster than two.
        a, b = ([factor[n].weight for n in names] for factor in (layer.lora_A, layer.lora_B))
        factors = (a[0], b[0]) if len(names) == 1 else (torch.cat(a), torch.cat(b, dim=1))
        return base._replace(a=factors[0], b=factors[1], scale=float(layer.scaling[names[0]]))

    def prefix_sharing_blocker(self) -> str | None:
        """Dropout: each copy of a prefix would be dropped differently."""
        return DROPOUT_BLOCKS_SHARING if self.config.dropout else None

    def calibrate(self, sample: CalibrationData, start: Path | None = None) -> None:
        """Set A and B as `init` says, and the frozen half so that the model still equals the base."""
        if self.layer_schedule is not None:
            self.layer_schedule.sample = sample
        if start is not None:
            self.load(start)
            return
        with torch.random.fork_rng(devices=[]):  # svd_lowrank is randomized
            torch.manual_seed(self.seed)
            for name, (b_OR, a_RI) in self._initial_factors(sample):
                layer = self.layer(name)
                layer.lora_A[TRAINED_ADAPTER].weight.data.copy_(a_RI)
                layer.lora_B[TRAINED_ADAPTER].weight.data.copy_(b_OR)
                if self.subtracts:
                    layer.lora_A[OFFSET_ADAPTER].weight.data.copy_(a_RI)
                    layer.lora_B[OFFSET_ADAPTER].weight.data.copy_(-b_OR)

    def save(self, folder: Path) -> None:
        """Write peft's two files; a frozen half makes it one adapter of twice the rank."""
        config = {**self.peft.peft_config[TRAINED_ADAPTER].to_dict(), "target_modules": self.active_names}
        if self.subtracts:
            # Twice the rank must not change alpha / rank, or alpha / sqrt(rank) with rsLoRA.
            alpha_factor = math.sqrt(2.0) if self.config.rslora else 2.0
            config.update(r=2 * config["r"], lora_alpha=alpha_factor * config["lora_alpha"])
            config["rank_pattern"] = {key: 2 * rank for key, rank in config["rank_pattern"].items()}
            config["alpha_pattern"] = {key: alpha_factor * alpha for key, alpha in config["alpha_pattern"].items()}
        write_peft_files(folder, self._state(), config)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote; missing or unexpected keys raise `CheckpointError`."""
        # A lottery saves only the winners' linears.
        if self.layer_schedule is not None:
            self.keep_only_modules(set(json.loads((folder / CONFIG).read_text())["target_modules"]))
        state, expected = read_state(folder), self._state()
        require_same_keys(state.keys(), expected.keys(), str(folder))
        require_same_shapes(expected, state, str(folder))
        for adapter, half in _split_halves(state).items() if self.subtracts else [(TRAINED_ADAPTER, state)]:
            without_peft_warnings(set_peft_model_state_dict, self.peft, half, adapter_name=adapter)

    def merge(self) -> nn.Module:
        """Merge B A into the base; peft raises if a merged weight is not finite."""
        self.model.float()  # B A would be rounded away in bfloat16
        if self.quantized is not None:
            # peft would quantize the sum again, which rounds small updates away.
            for name in self.names:
                self.model.set_submodule(name, self.quantized.merged_linear(self.layer(name)))
            self.quantized.dequantize(self.model)
        merged: nn.Module = without_peft_warnings(self.peft.merge_and_unload, safe_merge=True)
        head = self.model.get_output_embeddings()
        if head is not None and head.weight is not self.model.get_input_embeddings().weight:
            self.model.config.tie_word_embeddings = False  # a fully trained head differs from the embeddings now
        return merged

    def layer(self, name: str) -> Any:
        """Peft's module for a target."""
        return self.model.get_submodule(name)

    def _config(self, modules_to_save: list[str]) -> LoraConfig:
        config = self.config
        # Without an alpha the scale is 2 for every rank, also where `rank_pattern` sets another one.
        alpha = 2.0 * config.rank if config.alpha is None else config.alpha
        other_ranks = {name: rank for name, rank in self.ranks.items() if rank != config.rank}
        return LoraConfig(
            r=config.rank,
            lora_alpha=alpha,
            rank_pattern=other_ranks,
            alpha_pattern={name: 2.0 * rank for name, rank in other_ranks.items()} if config.alpha is None else {},
            lora_dropout=config.dropout,
            target_modules=self.names,
            use_rslora=config.rslora,
            use_dora=config.dora,
            # Data-dependent starts begin with peft's default; `calibrate` overwrites it.
            init_lora_weights=_INIT.get(config.init, True),
            modules_to_save=modules_to_save or None,
            # GPT-2's Conv1D stores its weight transposed.
            fan_in_fan_out=any(isinstance(self.model.get_submodule(n), Conv1D) for n in self.names),
            task_type="CAUSAL_LM",
        )

    def _check(self) -> None:
        config = self.config
        module_names = {name.rsplit(".", 1)[-1] for name, _ in self.model.named_modules()}
        if unknown := sorted(set(config.modules_to_save) - module_names):
            raise ConfigError("no such module", where="method.modules_to_save", given=", ".join(unknown))
        overlapping = [m for m in config.modules_to_save if any(f".{m}." in f".{name}." for name in self.names)]
        if overlapping:
            reason = "these modules would be trained whole and get an adapter as well"
            raise ConfigError(reason, where="method.modules_to_save", given=", ".join(overlapping))
        # The three forms of a key in `rank_pattern`: layer, role, and layer with role.
        places = {str(layer_number(name)) for name in self.names} | {r for name in self.names for r in roles_of(name)}
        places |= {f"{layer_number(name)}.{role}" for name in self.names for role in roles_of(name)}
        if idle := sorted(config.rank_pattern.keys() - places):
            raise ConfigError("no adapter stands there", where="method.rank_pattern", given=", ".join(idle))
        for name, (inputs, outputs) in self.shapes.items():
            if config.init in CALIBRATED_INITS:
                starts.check_rank(config.init, self.ranks[name], name, outputs, inputs)
        count = len({layer_number(f".{name}") for name in self.names})
        if config.lisa_n_layers is not None and config.lisa_n_layers > count:
            raise ConfigError(
                "more layers are to be drawn than have an adapter",
                where="method.lisa_n_layers",
                given=config.lisa_n_layers,
                allowed=f"1 to {count}",
            )

    def layers(self) -> dict[str, Any]:
        """Peft's modules by target."""
        return {name: self.layer(name) for name in self.names}

    def _initial_factors(self, sample: CalibrationData) -> Iterator[tuple[str, starts.LowRankPair]]:
        init, layers = self.config.init, self.layers()
        if init not in CALIBRATED_INITS:
            return
        if init in ("pissa", "olora"):
            for name, layer in layers.items():
                weight = _dense_weight(layer)
                rank, scale = self.ranks[name], float(layer.scaling[TRAINED_ADAPTER])
                yield name, starts.pissa(weight, rank, scale) if init == "pissa" else starts.olora(weight, rank)
        elif init == "lora_ga":
            for name, gradient in weight_gradients({n: layer.base_layer.weight for n, layer in layers.items()}, sample):
                gradient_OI = gradient.T if isinstance(layers[name].base_layer, Conv1D) else gradient
                yield name, starts.lora_ga(gradient_OI, self.ranks[name])
        else:
            widths = {name: inputs for name, (inputs, _) in self.shapes.items()}
            for name, moment in input_second_moments(layers, widths, sample):
                weight, rank = _dense_weight(layers[name]), self.ranks[name]
                if init == "eva":
                    yield name, starts.eva(weight, moment, rank)
                else:
                    scale, preserve_knowledge = float(layers[name].scaling[TRAINED_ADAPTER]), init == "corda_knowledge"
                    yield name, starts.corda(weight, moment, rank, scale, knowledge=preserve_knowledge)

    def _state(self) -> dict[str, Tensor]:
        inactive = [f".{name}." for name in set(self.names) - set(self.active_names)]
        trained = {
            k: v for k, v in self._adapter_state(TRAINED_ADAPTER).items() if not any(name in k for name in inactive)
        }
        if not self.subtracts:
            return trained
        offsets = self._adapter_state(OFFSET_ADAPTER)
        # W + s (B A - B0 A0) is one product of stacked factors, so stock peft loads it.
        return {k: torch.cat([v, offsets[k]], dim=_axis(k)) if k in offsets else v for k, v in trained.items()}

    def _adapter_state(self, adapter: str) -> dict[str, Tensor]:
        return dict(
            without_peft_warnings(
                get_peft_model_state_dict, self.peft, adapter_name=adapter, save_embedding_layers=False
            )
        )


def without_peft_warnings(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call peft without two warnings: its use of a deprecated transformers name, and tied layers.

    `merge` unties a copy of a tied layer that is trained beside the adapter, and sets the config accordingly.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for message in ("Model has `tie_word_embeddings=True`", "Input and output embeddings are no longer tied"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        return call(*args, **kwargs)


def _axis(key: str) -> int:
    """The rank axis of a factor."""
    return 0 if ".lora_A." in key else 1


def _split_halves(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split a saved adapter of twice the rank; tensors without a rank axis belong to the trained half."""
    halves: dict[str, dict[str, Tensor]] = {TRAINED_ADAPTER: {}, OFFSET_ADAPTER: {}}
    for key, value in state.items():
        if ".lora_A." not in key and ".lora_B." not in key:
            halves[TRAINED_ADAPTER][key] = value
            continue
        for adapter, half in zip(halves, value.chunk(2, dim=_axis(key)), strict=True):
            halves[adapter][key] = half.contiguous()
    return halves


def _rank_of(name: str, config: LowRankConfig) -> int:
    """The most specific entry of `rank_pattern`: layer and role, then layer, then role (the first if several)."""
    layer, roles = layer_number(name), roles_of(name)
    keys = [*(f"{layer}.{role}" for role in roles), str(layer), *roles]
    return next((config.rank_pattern[key] for key in keys if key in config.rank_pattern), config.rank)


def _dense_weight(layer: Any) -> Tensor:
    """The base weight [O, I] in float32 or wider."""
    params = plain_linear_params(layer.base_layer)
    assert params is not None  # noqa: S101 -- for the type checker: targets are linears
    return params.weight.detach().to(torch.promote_types(params.weight.dtype, torch.float32))


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear. GPT-2's Conv1D stores its weight transposed, bitsandbytes in a packed shape."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    weight: Tensor = module.weight  # type: ignore[assignment]
    first, second = weight.shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)
