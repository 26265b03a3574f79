"""LoRA through peft: its layers, its initialisations, its file format."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rung.errors import ConfigError
from rung.method.base import same_keys
from rung.model.fuse import plain_part
from rung.model.fused import Part
from rung.model.resident import held_narrow, seeming_wide
from rung.model.targets import select
from rung.spec.method import LoraSpec

WEIGHTS = "adapter_model.safetensors"
_INIT: dict[str, Any] = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}


class Lora:
    """W + (alpha / rank) B A on the chosen linears; the base never moves (Hu et al. 2021, eq. 3)."""

    kind = "lora"
    artefact = "adapter"
    starts_as_base = True

    def __init__(self, model: PreTrainedModel, spec: LoraSpec) -> None:
        self.model = model
        self.spec = spec
        self.names = select(model, spec.targets, spec.layers)
        self._shapes = [_shape(model.get_submodule(name)) for name in self.names]
        known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        if unknown := sorted(set(spec.modules_to_save) - known):
            raise ConfigError("no such module", where="method.modules_to_save", given=", ".join(unknown))
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            lora_dropout=spec.dropout,
            target_modules=self.names,
            use_rslora=spec.rslora,
            use_dora=spec.dora,
            init_lora_weights=_INIT[spec.init],
            modules_to_save=list(spec.modules_to_save) or None,
            fan_in_fan_out=any(isinstance(model.get_submodule(n), Conv1D) for n in self.names),
            task_type="CAUSAL_LM",
        )
        if spec.dora and held_narrow(model):
            model.float()  # peft takes the norms of the columns in the type the weights are held in
        try:
            targets = [model.get_submodule(name) for name in self.names]
            with nullcontext() if spec.dora else seeming_wide(targets):
                self.peft: PeftModel = quiet(get_peft_model, model, config)
        except ValueError as error:  # an initialisation that this rank cannot have
            raise ConfigError(str(error), where="method.init", given=spec.init) from error
        for parameter in self.trainable().values():  # peft leaves modules trained whole in the base's bfloat16
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()

    def trainable(self) -> dict[str, nn.Parameter]:
        """A, B, magnitudes, and modules trained whole."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def declared_parameters(self) -> int:
        """Sum of r (inputs + outputs) over the targets, plus outputs with DoRA, plus modules trained whole."""
        low_rank = sum(self.spec.rank * (inputs + outputs) for inputs, outputs in self._shapes)
        magnitudes = sum(outputs for _, outputs in self._shapes) if self.spec.dora else 0
        whole = 0
        for name, module in self.model.named_modules():
            if name.rsplit(".", 1)[-1] in self.spec.modules_to_save:
                whole += sum(p.numel() for p in module.original_module.parameters())
        return low_rank + magnitudes + whole

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone, inside the context."""
        with self.peft.disable_adapter():
            yield

    def part(self, module: nn.Module) -> Part | None:
        """What peft's layer computes at this moment; None with dropout, DoRA, or whatever else it must do itself."""
        if type(module) is not PeftLinear:
            return plain_part(module)
        layer: Any = module
        base = plain_part(layer.base_layer)
        if base is None or layer.disable_adapters or layer.merged:
            return base
        (name,) = layer.active_adapters
        if not isinstance(layer.lora_dropout[name], nn.Identity) or name in layer.lora_variant or layer.lora_bias[name]:
            return None
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        return base._replace(a=a, b=b, scale=float(layer.scaling[name]))

    def shares_prefixes(self) -> bool:
        """Unless dropout would differ between copies of a prefix."""
        return self.spec.dropout == 0.0

    def save(self, folder: Path) -> None:
        """Write peft's two files."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().contiguous().cpu() for name, value in self._state().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        config = self.peft.peft_config["default"].to_dict()
        config["inference_mode"] = True
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, default=str) + "\n")

    def load(self, folder: Path) -> None:
        """Read them; keys missing or left over raise `CheckpointError`."""
        state = load_file(folder / WEIGHTS)
        same_keys(state.keys(), self._state().keys(), str(folder))
        quiet(set_peft_model_state_dict, self.peft, state)

    def merge(self) -> nn.Module:
        """The base with B A added; raises when a merged weight is not finite."""
        self.model.float()  # B A would be rounded away in bfloat16
        merged: nn.Module = quiet(self.peft.merge_and_unload, safe_merge=True)
        head = self.model.get_output_embeddings()
        if head is not None and head.weight is not self.model.get_input_embeddings().weight:
            self.model.config.tie_word_embeddings = False  # a head trained whole beside the adapter is its own now
        return merged

    def _state(self) -> dict[str, Tensor]:
        return dict(quiet(get_peft_model_state_dict, self.peft, save_embedding_layers=False))


def quiet(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call into peft without two warnings: of its own use of a deprecated transformers name, and of tied layers.

    A copy of a tied layer that is trained beside the adapter is untied here by `merge`, which says so in the config.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for about_ties in ("Model has `tie_word_embeddings=True`", "Input and output embeddings are no longer tied"):
            warnings.filterwarnings("ignore", message=about_ties, category=UserWarning)
        return call(*args, **kwargs)


def _shape(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear; GPT-2's Conv1D stores its weight transposed."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    first, second = weight.shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)
