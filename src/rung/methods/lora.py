"""LoRA through peft: its layers, its initializations, its file format."""

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
from rung.models.bfloat16_weights import keeps_bfloat16_weights, report_float32_weights
from rung.models.fused_modules import plain_linear_params
from rung.models.fused_ops import LinearParams
from rung.models.targets import layer_number, roles_of, select_linears

TRAINED_ADAPTER, FROZEN_HALF = "default", "offset"
"""Names of the two halves within peft: what moves, and the frozen start with its sign turned."""
DROPPED_ADAPTER = "adapter dropout drops each copy of one differently"
"""Why prefixes are not shared."""
_INIT: dict[str, Any] = {"gaussian": "gaussian", "orthogonal": "orthogonal"}


class QuantizedBaseProtocol(Protocol):
    """A base held in few bits."""

    def dequantize(self, model: nn.Module) -> None:
        """Hold it in full width from now on: the same numbers, faster, in more memory."""
        ...

    def merged_linear(self, layer: Any) -> nn.Module:
        """The linear of a peft layer in full width, its update added."""
        ...


class LayerSchedule(Protocol):
    """What decides which layers take part as a run goes on."""

    sample: CalibrationData | None
    """Training documents to judge layers by, once `calibrate` has been called."""

    def at_step(self, step: int) -> TrainableSet | None:
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
    """W + (alpha / rank) B A on the chosen linears; the base never moves (Hu et al. 2021, eq. 3).

    A start B0 A0 that is not zero is held a second time, frozen and with its sign turned, so that W + s (B A - B0 A0)
    begins as W. Saved, both halves are one plain adapter of twice the rank.
    """

    artifact = "adapter"

    def __init__(
        self, model: PreTrainedModel, config: LowRankConfig, quantized: QuantizedBaseProtocol | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.kind: str = config.kind
        self.quantized: QuantizedBaseProtocol | None = quantized
        self.course: LayerSchedule | None = None
        self.starts_as_base = config.init != "loftq"  # which begins nearer to the base that was not quantized
        self.seed = torch.initial_seed()  # what `attach` has just set
        self.names = select_linears(model, config.targets, config.layers)
        self.kept = list(self.names)
        """Those that take part: all, unless `keep` was called."""
        self.sample_size = config.init_examples if config.init in CALIBRATED_INITS else 0
        self.subtracts = config.init in SUBTRACTED_INITS
        self.shapes = {name: _linear_shape(model.get_submodule(name)) for name in self.names}
        self.ranks = {name: _rank_of(name, config) for name in self.names}
        self._check()
        self.whole = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in config.modules_to_save]
        """Modules trained whole, by full names: peft takes a bare one for every name that ends with it."""
        if config.dora and keeps_bfloat16_weights(model):
            model.float()  # peft takes the norms of the columns in the type the weights are held in
        try:
            targets = [model.get_submodule(name) for name in self.names]
            with nullcontext() if config.dora else report_float32_weights(targets):
                self.peft: PeftModel = without_peft_warnings(get_peft_model, model, self._config(self.whole))
                if self.subtracts:
                    without_peft_warnings(self.peft.add_adapter, FROZEN_HALF, self._config([]))
        except ValueError as error:  # an initialization that this rank cannot have
            raise ConfigError(str(error), where="method.init", given=config.init) from error
        self._trainable = {
            name: p for name, p in model.named_parameters() if p.requires_grad and f".{FROZEN_HALF}." not in name
        }
        self._offsets = [p for name, p in model.named_parameters() if f".{FROZEN_HALF}." in name]
        if self.subtracts:
            for layer in self.layers().values():
                layer.set_adapter([TRAINED_ADAPTER, FROZEN_HALF])
        for parameter in self._offsets:  # zero until `calibrate` or `load` says otherwise
            parameter.requires_grad_(False)
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = torch.zeros_like(parameter.data, dtype=wide)
        for parameter in self._trainable.values():  # peft leaves modules trained whole in the base's bfloat16
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()

    def trainable(self) -> dict[str, nn.Parameter]:
        """A, B, magnitudes, and modules trained whole."""
        return dict(self._trainable)

    def at_step(self, step: int) -> TrainableSet | None:
        """As the course says, where there is one."""
        return None if self.course is None else self.course.at_step(step)

    def statistics(self) -> Mapping[str, Any]:
        """What the course has to say."""
        return {} if self.course is None else self.course.statistics()

    def state(self) -> dict[str, Any]:
        """Where the course is."""
        return {} if self.course is None else self.course.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the course."""
        if self.course is not None:
            self.course.load_state(state)

    def keep_only(self, names: Collection[str]) -> None:
        """From now on these linears alone take part: the others add nothing and are not saved."""
        self.kept = [name for name in self.names if name in names]
        with torch.no_grad():
            for name in set(self.names) - set(self.kept):
                self.layer(name).lora_B[TRAINED_ADAPTER].weight.zero_()

    def learning_rate_factor(self, name: str) -> float:
        """LoRA+ moves B faster than A."""
        return self.config.loraplus_lr_ratio if ".lora_B." in name else 1.0

    def declared_parameters(self) -> int:
        """Sum of r (inputs + outputs) over the targets, plus outputs with DoRA, plus modules trained whole."""
        low_rank = sum(self.ranks[name] * sum(shape) for name, shape in self.shapes.items())
        magnitudes = sum(outputs for _, outputs in self.shapes.values()) if self.config.dora else 0
        kept: list[Any] = [self.model.get_submodule(name) for name in self.whole]
        whole = sum(int(p.numel()) for module in kept for p in module.original_module.parameters())
        return low_rank + magnitudes + whole

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone, inside the context."""
        own = [*self._trainable.values(), *self._offsets]
        moved = [p.requires_grad for p in own]
        try:
            with self.peft.disable_adapter():
                yield
        finally:
            for parameter, flag in zip(own, moved, strict=True):  # peft switches all of them on again
                parameter.requires_grad_(flag)

    def linear_params(self, module: nn.Module) -> LinearParams | None:
        """What peft's layer computes at this moment; None with dropout, DoRA, or whatever else it must do itself."""
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
        a, b = ([factor[n].weight for n in names] for factor in (layer.lora_A, layer.lora_B))
        both = (a[0], b[0]) if len(names) == 1 else (torch.cat(a), torch.cat(b, dim=1))
        return base._replace(a=both[0], b=both[1], scale=float(layer.scaling[names[0]]))

    def prefix_sharing_blocker(self) -> str | None:
        """Dropout."""
        return DROPPED_ADAPTER if self.config.dropout else None

    def calibrate(self, sample: CalibrationData, start: Path | None = None) -> None:
        """Set A and B as `init` says, and the frozen half so that the model is still the base."""
        if self.course is not None:
            self.course.sample = sample
        if start is not None:
            self.load(start)
            return
        with torch.random.fork_rng(devices=[]):  # svd_lowrank draws
            torch.manual_seed(self.seed)
            for name, (b_OR, a_RI) in self._starts(sample):
                layer = self.layer(name)
                layer.lora_A[TRAINED_ADAPTER].weight.data.copy_(a_RI)
                layer.lora_B[TRAINED_ADAPTER].weight.data.copy_(b_OR)
                if self.subtracts:
                    layer.lora_A[FROZEN_HALF].weight.data.copy_(a_RI)
                    layer.lora_B[FROZEN_HALF].weight.data.copy_(-b_OR)

    def save(self, folder: Path) -> None:
        """Write peft's two files; with a frozen half, one adapter of twice the rank."""
        config = {**self.peft.peft_config[TRAINED_ADAPTER].to_dict(), "target_modules": self.kept}
        if self.subtracts:
            double = math.sqrt(2.0) if self.config.rslora else 2.0
            config.update(r=2 * config["r"], lora_alpha=double * config["lora_alpha"])
            config["rank_pattern"] = {key: 2 * rank for key, rank in config["rank_pattern"].items()}
            config["alpha_pattern"] = {key: double * alpha for key, alpha in config["alpha_pattern"].items()}
        write_peft_files(folder, self._state(), config)

    def load(self, folder: Path) -> None:
        """Read them; keys missing or left over raise `CheckpointError`."""
        if self.course is not None:
            self.keep_only(set(json.loads((folder / CONFIG).read_text())["target_modules"]))
        state, own = read_state(folder), self._state()
        require_same_keys(state.keys(), own.keys(), str(folder))
        require_same_shapes(own, state, str(folder))
        for adapter, half in _split_halves(state).items() if self.subtracts else [(TRAINED_ADAPTER, state)]:
            without_peft_warnings(set_peft_model_state_dict, self.peft, half, adapter_name=adapter)

    def merge(self) -> nn.Module:
        """The base with B A added; raises when a merged weight is not finite."""
        self.model.float()  # B A would be rounded away in bfloat16
        if self.quantized is not None:
            for name in self.names:
                self.model.set_submodule(name, self.quantized.merged_linear(self.layer(name)))
            self.quantized.dequantize(self.model)
        merged: nn.Module = without_peft_warnings(self.peft.merge_and_unload, safe_merge=True)
        head = self.model.get_output_embeddings()
        if head is not None and head.weight is not self.model.get_input_embeddings().weight:
            self.model.config.tie_word_embeddings = False  # a head trained whole beside the adapter is its own now
        return merged

    def layer(self, name: str) -> Any:
        """Peft's module at a target."""
        return self.model.get_submodule(name)

    def _config(self, modules_to_save: list[str]) -> LoraConfig:
        config = self.config
        alpha = 2.0 * config.rank if config.alpha is None else config.alpha
        others = {name: rank for name, rank in self.ranks.items() if rank != config.rank}
        return LoraConfig(
            r=config.rank,
            lora_alpha=alpha,
            rank_pattern=others,
            alpha_pattern={name: 2.0 * rank for name, rank in others.items()} if config.alpha is None else {},
            lora_dropout=config.dropout,
            target_modules=self.names,
            use_rslora=config.rslora,
            use_dora=config.dora,
            init_lora_weights=_INIT.get(config.init, True),
            modules_to_save=modules_to_save or None,
            fan_in_fan_out=any(isinstance(self.model.get_submodule(n), Conv1D) for n in self.names),
            task_type="CAUSAL_LM",
        )

    def _check(self) -> None:
        config = self.config
        known = {name.rsplit(".", 1)[-1] for name, _ in self.model.named_modules()}
        if unknown := sorted(set(config.modules_to_save) - known):
            raise ConfigError("no such module", where="method.modules_to_save", given=", ".join(unknown))
        over = [m for m in config.modules_to_save if any(f".{m}." in f".{name}." for name in self.names)]
        if over:
            what = "these modules would be trained whole and get an adapter as well"
            raise ConfigError(what, where="method.modules_to_save", given=", ".join(over))
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

    def _starts(self, sample: CalibrationData) -> Iterator[tuple[str, starts.LowRankPair]]:
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
                turned = gradient.T if isinstance(layers[name].base_layer, Conv1D) else gradient
                yield name, starts.lora_ga(turned, self.ranks[name])
        else:
            widths = {name: inputs for name, (inputs, _) in self.shapes.items()}
            for name, moment in input_second_moments(layers, widths, sample):
                weight, rank = _dense_weight(layers[name]), self.ranks[name]
                if init == "eva":
                    yield name, starts.eva(weight, moment, rank)
                else:
                    scale, knowledge = float(layers[name].scaling[TRAINED_ADAPTER]), init == "corda_knowledge"
                    yield name, starts.corda(weight, moment, rank, scale, knowledge=knowledge)

    def _state(self) -> dict[str, Tensor]:
        left = [f".{name}." for name in set(self.names) - set(self.kept)]
        own = {k: v for k, v in self._half(TRAINED_ADAPTER).items() if not any(name in k for name in left)}
        if not self.subtracts:
            return own
        offset = self._half(FROZEN_HALF)
        return {k: torch.cat([v, offset[k]], dim=_axis(k)) if k in offset else v for k, v in own.items()}

    def _half(self, adapter: str) -> dict[str, Tensor]:
        return dict(
            without_peft_warnings(
                get_peft_model_state_dict, self.peft, adapter_name=adapter, save_embedding_layers=False
            )
        )


def without_peft_warnings(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call into peft without two warnings: of its own use of a deprecated transformers name, and of tied layers.

    A copy of a tied layer that is trained beside the adapter is untied here by `merge`, which says so in the config.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for about_ties in ("Model has `tie_word_embeddings=True`", "Input and output embeddings are no longer tied"):
            warnings.filterwarnings("ignore", message=about_ties, category=UserWarning)
        return call(*args, **kwargs)


def _axis(key: str) -> int:
    """The axis of a factor that counts ranks."""
    return 0 if ".lora_A." in key else 1


def _split_halves(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A saved adapter of twice the rank, taken apart; what has no ranks belongs to the half that moved."""
    halves: dict[str, dict[str, Tensor]] = {TRAINED_ADAPTER: {}, FROZEN_HALF: {}}
    for key, value in state.items():
        if ".lora_A." not in key and ".lora_B." not in key:
            halves[TRAINED_ADAPTER][key] = value
            continue
        for adapter, half in zip(halves, value.chunk(2, dim=_axis(key)), strict=True):
            halves[adapter][key] = half.contiguous()
    return halves


def _rank_of(name: str, config: LowRankConfig) -> int:
    """The most specific entry of `ranks`: layer and role, then layer, then role (of a fused projection, its first)."""
    layer, roles = layer_number(name), roles_of(name)
    keys = [*(f"{layer}.{role}" for role in roles), str(layer), *roles]
    return next((config.rank_pattern[key] for key in keys if key in config.rank_pattern), config.rank)


def _dense_weight(layer: Any) -> Tensor:
    """The base's weight [O, I] in float32 or wider."""
    part = plain_linear_params(layer.base_layer)
    assert part is not None  # noqa: S101 -- for the type checker: targets are linears
    return part.weight.detach().to(torch.promote_types(part.weight.dtype, torch.float32))


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear; GPT-2's Conv1D stores its weight transposed, a quantized one in no shape."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    weight: Tensor = module.weight  # type: ignore[assignment]
    first, second = weight.shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)
