"""LoRA through peft: its layers, initializations and file format, with fused products and data-dependent starts.

peft's modules are kept, so that files load in stock peft and new variants arrive with it; `linear_params` lets
`models/fused_ops.py` compute them with less memory. DoRA and dropout keep peft's slower forward. `methods/registry.py`
builds it, for `lottery` through `methods/layer_selection.py`; `methods/qlora.py` quantizes the base.

Suffixes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rung.config.method import CALIBRATED_INITS, SUBTRACTED_INITS, LowRankConfig, QloraConfig
from rung.errors import CheckpointError, ConfigError
from rung.methods import lora_init as starts
from rung.methods.adapter_files import CONFIG, read_state, saved_scale, write_peft_files
from rung.methods.adapter_merging import LowRankFactors
from rung.methods.lora_init import input_second_moments, weight_gradients
from rung.methods.protocol import CalibrationData, Method, TrainableSet
from rung.methods.qlora import dequantize_base, four_bit_params, merged_linear, quantize
from rung.models.bfloat16_storage import keeps_bfloat16_weights, pretend_float32_weights
from rung.models.fused_modules import linear_weight, plain_linear_params
from rung.models.fused_ops import LinearParams
from rung.models.targets import layer_number, roles_of, select_linears
from rung.models.weight_files import stored_tensor
from rung.planning.method_cost import rank_at

TRAINED_ADAPTER, OFFSET_ADAPTER = "default", "offset"
"""peft's names of the trained adapter and of the frozen one that subtracts the initial B A (decision 0013)."""
DROPOUT_BLOCKS_SHARING = "adapter dropout drops each copy of one differently"
"""The reason why prefixes are not shared."""


class Lottery(Protocol):
    """Decides which layers go on being trained; implemented in `methods/layer_selection.py`."""

    sample: CalibrationData | None
    """Training documents for scoring layers, once `calibrate` has been called."""

    def trainable_at_step(self, step: int) -> TrainableSet | None:
        """As in `Method`."""

    def statistics(self) -> Mapping[str, Any]:
        """As in `Method`."""

    def state(self) -> dict[str, Any]:
        """As in `Method`."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """As in `Method`."""


class Lora(Method):
    """W + (alpha / rank) B A on the chosen linears; the base stays frozen (Hu et al. 2021, eq. 3).

    An initial B0 A0 that is not zero is stored a second time, frozen and negated, so that W + s (B A - B0 A0) starts as
    W. Both halves are saved as one plain adapter of twice the rank.
    """

    def __init__(self, model: PreTrainedModel, config: LowRankConfig) -> None:
        self.model, self.config, self.kind = model, config, config.kind
        # LoftQ reads the dense weights while they are quantized; afterwards they are gone.
        quantized_starts = quantize(model, config) if isinstance(config, QloraConfig) else {}
        self.layer_schedule: Lottery | None = None
        self.starts_as_base = config.init != "loftq"  # LoftQ starts closer to the unquantized base
        self.seed = torch.initial_seed()  # set by `attach_method` just before
        # Full names, so that peft adapts exactly these modules.
        self.names = select_linears(model, config.targets, config.layers)
        self.active_names = list(self.names)
        """Linears whose update is active: all, unless `keep_only_modules` was called."""
        self.sample_size = config.init_examples if config.init in CALIBRATED_INITS else 0
        self.subtracts = config.init in SUBTRACTED_INITS
        self.shapes = {name: _linear_shape(model.get_submodule(name)) for name in self.names}
        self.ranks = {name: rank_at(config, layer_number(name), roles_of(name)) for name in self.names}
        self._check()
        saved, names = config.modules_to_save, dict(model.named_modules())
        self.full_module_names = [name for name in names if name.rsplit(".", 1)[-1] in saved]
        """Full names of fully trained modules; peft matches a short name with every module that ends with it."""
        if keeps_bfloat16_weights(model) and config.widens_base("float32"):
            model.float()
        try:
            targets = [model.get_submodule(name) for name in self.names]
            is_stored = any(stored_tensor(p) is not None for target in targets for p in target.parameters())
            # DoRA reads the weights; those that are not there yet it reads in `on_base_read`
            with nullcontext() if config.dora and not is_stored else pretend_float32_weights(targets):
                peft_config = self._config(self.full_module_names)
                self.peft: PeftModel = without_peft_warnings(get_peft_model, model, peft_config)
                if self.subtracts:
                    without_peft_warnings(self.peft.add_adapter, OFFSET_ADAPTER, self._config([]))
        except ValueError as error:  # this rank is impossible for this initialization
            raise ConfigError(str(error), where="method.init", given=config.init) from error
        # peft marks the second adapter trainable too; its parameters are excluded by name.
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._trainable = {name: p for name, p in trainable.items() if f".{OFFSET_ADAPTER}." not in name}
        self._offsets = [p for name, p in model.named_parameters() if f".{OFFSET_ADAPTER}." in name]
        if self.subtracts:
            for layer in self.layers().values():
                layer.set_adapter([TRAINED_ADAPTER, OFFSET_ADAPTER])
        # Zero until `calibrate` or `load` sets it.
        for p in self._offsets:
            p.requires_grad_(False)
            p.data = torch.zeros_like(p.data, dtype=torch.promote_types(p.dtype, torch.float32))
        # peft leaves fully trained modules in the base's bfloat16.
        for p in self._trainable.values():
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
        for name, factors in quantized_starts.items():
            self._set_factors(name, TRAINED_ADAPTER, factors)

    def trainable(self) -> dict[str, nn.Parameter]:
        """A, B, DoRA magnitudes, and fully trained modules."""
        return dict(self._trainable)

    def trainable_at_step(self, step: int) -> TrainableSet | None:
        """Parameters trained at this step: those of the lottery or of LISA's sample of layers; else None (all)."""
        config = self.config
        if self.layer_schedule is not None:
            return self.layer_schedule.trainable_at_step(step)
        if config.lisa_n_layers is None:
            return None
        # From the period number, not from a running generator: a resumed run draws the same layers.
        generator = np.random.default_rng([self.seed, step // config.lisa_step_interval])
        layers = generator.choice(self.adapted_layers(), size=config.lisa_n_layers, replace=False).tolist()
        return TrainableSet(self.trainable_names(layers))

    def adapted_layers(self) -> list[int]:
        """Numbers of the layers with an adapter."""
        return sorted({number for name in self.names if (number := layer_number(f"{name}.")) is not None})

    def trainable_names(self, layers: Collection[int]) -> set[str]:
        """Names of trainable parameters in these layers, and of those outside all layers."""
        return {name for name in self._trainable if layer_number(f".{name}") in {None, *layers}}

    def statistics(self) -> Mapping[str, Any]:
        """Statistics of the lottery."""
        return {} if self.layer_schedule is None else self.layer_schedule.statistics()

    def state(self) -> dict[str, Any]:
        """State of the lottery."""
        return {} if self.layer_schedule is None else self.layer_schedule.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the lottery."""
        if self.layer_schedule is not None:
            self.layer_schedule.load_state(state)

    def keep_only_modules(self, names: Collection[str]) -> None:
        """Keep only the updates of these linears; the others add nothing and are not saved."""
        self.active_names = [name for name in self.names if name in names]
        with torch.no_grad():
            for name, layer in self.layers().items():
                # Zero B instead of removing the module: the module tree and the optimizer's parameters stay the same.
                if name not in self.active_names:
                    layer.lora_B[TRAINED_ADAPTER].weight.zero_()

    def learning_rate_factor(self, name: str) -> float:
        """LoRA+ gives B a higher learning rate than A."""
        return self.config.loraplus_lr_ratio if ".lora_B." in name else 1.0

    def declared_parameters(self) -> int:
        """Sum of r (inputs + outputs) over the targets, plus outputs with DoRA, plus fully trained modules."""
        low_rank = sum(self.ranks[name] * sum(shape) for name, shape in self.shapes.items())
        magnitudes = sum(outputs for _, outputs in self.shapes.values()) if self.config.dora else 0
        copied_modules: list[Any] = [self.model.get_submodule(name) for name in self.full_module_names]
        full_modules = sum(int(p.numel()) for m in copied_modules for p in m.original_module.parameters())
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
            for p, flag in zip(parameters, requires_grad, strict=True):  # peft sets all of them to True
                p.requires_grad_(flag)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within the context the adapted linears hold W + scale * B A, and no adapter is multiplied.

        W itself is kept beside it and comes back, bit for bit. In 16 bits the sum rounds most of a small update away
        (docs/log.md), so callers ask for it in 32 bits alone. Where an adapter cannot be merged exactly as it computes
        (dropout, DoRA, 4 and 8 bits), or is off, the model computes as before.
        """
        layers = [layer for layer in self.layers().values() if type(layer) is PeftLinear]
        params = [self.linear_params(layer) for layer in layers]
        if not layers or len(layers) < len(self.names) or any(p is None or p.a is None for p in params):
            yield
            return
        weights = [layer.base_layer.weight for layer in layers]
        originals = [weight.data for weight in weights]
        try:
            for layer, weight, p in zip(layers, weights, params, strict=True):
                weight.data = _merged_weight(p, weight)  # type: ignore[arg-type]
                layer.merged_adapters.extend(layer.active_adapters)
            yield
        finally:
            for layer, weight, original in zip(layers, weights, originals, strict=True):
                weight.data = original
                layer.merged_adapters.clear()

    def linear_params(self, module: nn.Module) -> LinearParams | None:
        """Parameters of peft's layer as it computes now; None if only peft can compute it (dropout, DoRA, variants)."""
        # The exact types: peft's other layers (8 bits, embeddings) have their own products.
        if type(module) is not PeftLinear and type(module).__name__ != "Linear4bit":
            return plain_linear_params(module)
        layer: Any = module
        if not hasattr(layer, "base_layer"):  # in 4 bits without an adapter
            return four_bit_params(layer)
        base = plain_linear_params(layer.base_layer) or four_bit_params(layer.base_layer)
        if base is None or layer.disable_adapters or layer.merged:
            return base
        names = layer.active_adapters
        has_dropout = any(not isinstance(layer.lora_dropout[n], nn.Identity) for n in names)
        if has_dropout or any(layer.lora_bias[n] or n in layer.lora_variant for n in names):
            return None
        # Both halves as one pair of factors: they have the same scale, and one product is faster than two.
        a, b = ([factor[n].weight for n in names] for factor in (layer.lora_A, layer.lora_B))
        a_RI, b_OR = (a[0], b[0]) if len(names) == 1 else (torch.cat(a), torch.cat(b, dim=1))
        return base._replace(a=a_RI, b=b_OR, scale=float(layer.scaling[names[0]]))

    def prefix_sharing_blocker(self) -> str | None:
        """Dropout: each copy of a prefix would be dropped differently."""
        return DROPOUT_BLOCKS_SHARING if self.config.dropout else None

    def adapter_parameters(self) -> Sequence[nn.Parameter]:
        """Both halves of the update, and fully trained modules."""
        return [*self._trainable.values(), *self._offsets]

    def on_base_read(self) -> None:
        """Set DoRA's magnitudes: the norms of the rows of each weight, while B A is zero (Liu et al. 2024, eq. 5)."""
        if self.config.dora:
            with torch.no_grad():
                for layer in self.layers().values():
                    norms = torch.linalg.vector_norm(_dense_weight(layer), dim=1)
                    layer.lora_magnitude_vector[TRAINED_ADAPTER].weight.copy_(norms)

    def calibrate(self, sample: CalibrationData, start: Path | None = None) -> None:
        """Set A and B as `init` says, and the frozen half so that the model still equals the base."""
        if self.layer_schedule is not None:
            self.layer_schedule.sample = sample
        if start is not None:
            self.load(start)
            return
        with torch.random.fork_rng(devices=[]):  # svd_lowrank is randomized
            torch.manual_seed(self.seed)
            for name, factors in self._initial_factors(sample):
                self._set_factors(name, TRAINED_ADAPTER, factors)
                if self.subtracts:
                    self._set_factors(name, OFFSET_ADAPTER, factors._replace(b_OR=-factors.b_OR))

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
        """Load what `save` wrote; missing or unexpected keys and another scale raise `CheckpointError`."""
        settings = json.loads((folder / CONFIG).read_text())
        # A lottery saves only the winners' linears.
        if self.layer_schedule is not None:
            self.keep_only_modules(set(settings["target_modules"]))
        for name in self.active_names:
            # B A is trained for one scale; a config whose default has changed since would multiply it by another.
            saved, scale = saved_scale(settings, name), self.config.scale_at(self.ranks[name])
            if not math.isclose(saved, scale, rel_tol=1e-6):
                hint = f"set method.alpha so that B A is multiplied by {saved:g}"
                reason = f"the update of {name} was trained for another scale"
                raise CheckpointError(reason, where=str(folder), given=scale, allowed=f"{saved:g}", hint=hint)
        state = read_state(folder, self._state())
        for adapter, half in _split_halves(state).items() if self.subtracts else [(TRAINED_ADAPTER, state)]:
            without_peft_warnings(set_peft_model_state_dict, self.peft, half, adapter_name=adapter)

    def merge(self) -> nn.Module:
        """Merge B A into the base; peft raises if a merged weight is not finite."""
        self.model.float()  # B A would be rounded away in bfloat16
        if isinstance(self.config, QloraConfig):
            # peft would quantize the sum again, which rounds small updates away.
            for name, layer in self.layers().items():
                self.model.set_submodule(name, merged_linear(layer, TRAINED_ADAPTER))
            dequantize_base(self.model)
        merged: nn.Module = without_peft_warnings(self.peft.merge_and_unload, safe_merge=True)
        head = self.model.get_output_embeddings()
        if head is not None and head.weight is not self.model.get_input_embeddings().weight:
            self.model.config.tie_word_embeddings = False  # a fully trained head differs from the embeddings now
        return merged

    def _set_factors(self, name: str, adapter: str, factors: LowRankFactors) -> None:
        layer: Any = self.model.get_submodule(name)
        layer.lora_A[adapter].weight.data.copy_(factors.a_RI)
        layer.lora_B[adapter].weight.data.copy_(factors.b_OR)

    def _config(self, modules_to_save: list[str]) -> LoraConfig:
        config = self.config
        other_ranks = {name: rank for name, rank in self.ranks.items() if rank != config.rank}
        alphas = {name: config.scale_at(rank) * rank for name, rank in other_ranks.items()}
        return LoraConfig(
            r=config.rank,
            lora_alpha=config.resolved_alpha,
            rank_pattern=other_ranks,
            alpha_pattern=alphas if config.alpha is None and not config.rslora else {},
            lora_dropout=config.dropout,
            target_modules=self.names,
            use_rslora=config.rslora,
            use_dora=config.dora,
            # Data-dependent starts begin with peft's default; `calibrate` overwrites it.
            init_lora_weights=config.init if config.init in ("gaussian", "orthogonal") else True,
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
            reason, given = "more layers are to be drawn than have an adapter", config.lisa_n_layers
            raise ConfigError(reason, where="method.lisa_n_layers", given=given, allowed=f"1 to {count}")

    def layers(self) -> dict[str, Any]:
        """Peft's modules by target."""
        return {name: self.model.get_submodule(name) for name in self.names}

    def _initial_factors(self, sample: CalibrationData) -> Iterator[tuple[str, LowRankFactors]]:
        init, layers = self.config.init, self.layers()
        scales = {name: float(layer.scaling[TRAINED_ADAPTER]) for name, layer in layers.items()}
        if init in ("pissa", "olora"):
            for name, layer in layers.items():
                weight, rank = _dense_weight(layer), self.ranks[name]
                yield name, starts.pissa(weight, rank, scales[name]) if init == "pissa" else starts.olora(weight, rank)
        elif init == "lora_ga":
            for name, gradient in weight_gradients({n: layer.base_layer.weight for n, layer in layers.items()}, sample):
                gradient_OI = gradient.T if isinstance(layers[name].base_layer, Conv1D) else gradient
                yield name, starts.lora_ga(gradient_OI, self.ranks[name])
        elif init in CALIBRATED_INITS:
            widths, knowledge = {name: inputs for name, (inputs, _) in self.shapes.items()}, init == "corda_knowledge"
            for name, moment in input_second_moments(layers, widths, sample):
                weight, rank = _dense_weight(layers[name]), self.ranks[name]
                if init == "eva":
                    yield name, starts.eva(weight, moment, rank)
                else:
                    yield name, starts.corda(weight, moment, rank, scales[name], knowledge=knowledge)

    def _state(self) -> dict[str, Tensor]:
        inactive = [f".{name}." for name in set(self.names) - set(self.active_names)]
        state = self._adapter_state(TRAINED_ADAPTER)
        trained = {key: value for key, value in state.items() if not any(name in key for name in inactive)}
        if not self.subtracts:
            return trained
        offsets = self._adapter_state(OFFSET_ADAPTER)
        # W + s (B A - B0 A0) is one product of stacked factors, so stock peft loads it.
        return {k: torch.cat([v, offsets[k]], dim=_axis(k)) if k in offsets else v for k, v in trained.items()}

    def _adapter_state(self, adapter: str) -> dict[str, Tensor]:
        options = {"adapter_name": adapter, "save_embedding_layers": False}
        return dict(without_peft_warnings(get_peft_model_state_dict, self.peft, **options))


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


def _dense_weight(layer: Any) -> Tensor:
    """The base weight [O, I] in float32 or wider; one that ranks share in parts is gathered by all of them."""
    weight = linear_weight(layer.base_layer).detach()
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _linear_shape(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear; the weight of a quantized one has a packed shape."""
    return tuple(module.weight.shape) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


@torch.no_grad()
def _merged_weight(params: LinearParams, weight: Tensor) -> Tensor:
    """W + scale * B A in the type and layout of `weight`, which GPT-2 stores transposed."""
    if params.a is None or params.b is None:
        raise ValueError("a linear without an adapter")
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = (params.b.to(wide) @ params.a.to(wide)).mul_(params.scale)
    merged = delta.add_(params.weight).to(weight.dtype)
    return merged if weight.shape == params.weight.shape and weight.stride() == params.weight.stride() else merged.T
