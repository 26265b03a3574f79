"""LoRA on the layers that win: all move for some steps, the best are kept, the others leave for good.

Layers are scored by what they learned while all moved: the norm of their updates, or the energy of what the updates add
to the linears' outputs (LoRA-drop, Zhou et al. 2024, eq. 3). The winners go back to their start (Frankle and Carbin
2019, section 1) or on from where they are. The file holds the winners alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rung.errors import CheckpointError
from rung.method.base import Moving, Sample, same_keys
from rung.method.lora import OWN, WEIGHTS, Lora, quiet, set_peft_model_state_dict
from rung.model.targets import layer_number
from rung.spec.method import LotterySpec


class Lottery(Lora):
    """Scouting with all layers, then training with the winners."""

    kind = "lottery"

    def __init__(self, model: PreTrainedModel, spec: LotterySpec) -> None:
        super().__init__(model, spec)
        self.lottery = spec
        self.sample_size = spec.init_examples if spec.score == "energy" else 0
        self.sample: Sample | None = None
        self.layers = sorted({_layer(name) for name in self.names})
        self.start = {name: p.detach().clone() for name, p in self._trainable.items()}
        self.winners: tuple[int, ...] | None = None
        self.scores: dict[int, float] = {}

    def calibrate(self, sample: Sample, start: Path | None = None) -> None:
        """Keep the documents for the scores; the start is LoRA's own."""
        self.sample = sample

    def at_step(self, step: int) -> Moving | None:
        """Everything while scouting; then the winners, which begin anew with their moments when they rewind."""
        if step < self.lottery.scout_steps:
            return None
        drawn = self.winners is None
        if drawn and step == self.lottery.scout_steps:
            self._draw()
        elif drawn:  # a resumed run: what left has updates of zero
            self.winners = tuple(n for n in self.layers if any(b.any() for b in self._factors(n, "lora_B")))
        return Moving(self._names(self.winners or ()), anew=drawn and step == self.lottery.scout_steps)

    def statistics(self) -> Mapping[str, Any]:
        """Scores of the layers, as shares of their sum, and who won."""
        if not self.scores:
            return {}
        shares = {str(number): round(score, 5) for number, score in self.scores.items()}
        third = max(1, len(self.layers) // 3)
        parts = {
            "first": self.layers[:third],
            "middle": self.layers[third : len(self.layers) - third],
            "last": self.layers[len(self.layers) - third :],
        }
        thirds = {name: round(sum(self.scores[n] for n in own), 5) for name, own in parts.items()}
        return {"lottery": {"scores": shares, "thirds": thirds, "winners": list(self.winners or ())}}

    def save(self, folder: Path) -> None:
        """Peft's two files, with the winners alone."""
        super().save(folder)
        if self.winners is None:
            return
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        config["target_modules"] = [name for name in self.names if _layer(name) in self.winners]
        path.write_text(json.dumps(config, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read them; layers that are not in the file have lost."""
        config = json.loads((folder / "adapter_config.json").read_text())
        kept = set(config["target_modules"])
        if unknown := sorted(kept - set(self.names)):
            raise CheckpointError("its modules are not this method's", where=str(folder), given=unknown[0])
        self.winners = tuple(sorted({_layer(name) for name in kept}))
        state = load_file(folder / WEIGHTS)
        same_keys(state.keys(), self._state().keys(), str(folder))
        self._leave()
        quiet(set_peft_model_state_dict, self.peft, state, adapter_name=OWN)

    def _draw(self) -> None:
        found = self._norms() if self.lottery.score == "delta" else self._energies()
        whole = sum(found.values()) or 1.0
        self.scores = {number: score / whole for number, score in found.items()}
        self.winners = chosen(self.scores, self.lottery, self.seed)
        self._leave()
        if self.lottery.rewind:
            with torch.no_grad():
                for name in self._names(self.winners):
                    self._trainable[name].copy_(self.start[name])

    def _leave(self) -> None:
        """Losers add nothing any more."""
        with torch.no_grad():
            for number in set(self.layers) - set(self.winners or ()):
                for b in self._factors(number, "lora_B"):
                    b.zero_()

    def _norms(self) -> dict[int, float]:
        """Squared Frobenius norm of a layer's updates, from their factors alone."""
        norms = dict.fromkeys(self.layers, 0.0)
        for name, layer in self._layers().items():
            a, b = layer.lora_A[OWN].weight.detach().double(), layer.lora_B[OWN].weight.detach().double()
            squared = (b.T @ b) * (a @ a.T)  # |B A|^2 = sum((B^T B) * (A A^T))
            norms[_layer(name)] += float(squared.sum()) * layer.scaling[OWN] ** 2
        return norms

    def _energies(self) -> dict[int, float]:
        """Sum over the sample's tokens of |s B A x|^2."""
        if self.sample is None:
            raise CheckpointError("the lottery has no documents to score layers on", where="method.score")
        energies = dict.fromkeys(self.layers, 0.0)
        hooks = [
            layer.register_forward_pre_hook(partial(_add_energy, energies, name))
            for name, layer in self._layers().items()
        ]
        try:
            self.sample.read()
        finally:
            for hook in hooks:
                hook.remove()
        return energies

    def _names(self, layers: Collection[int]) -> set[str]:
        """Trainables of these layers, and those outside of all."""
        return {name for name in self._trainable if layer_number(f".{name}") in {None, *layers}}

    def _factors(self, number: int, factor: str) -> list[Tensor]:
        return [
            p for name, p in self._trainable.items() if layer_number(f".{name}") == number and f".{factor}." in name
        ]

    def _state(self) -> dict[str, Tensor]:
        state = super()._state()
        if self.winners is None:
            return state
        return {key: value for key, value in state.items() if layer_number(f".{key}") in {None, *self.winners}}


def chosen(scores: Mapping[int, float], spec: LotterySpec, seed: int) -> tuple[int, ...]:
    """The layers that stay: the best, or as many others to compare them with."""
    layers = sorted(scores)
    count = max(1, round(spec.keep * len(layers)))
    if spec.choose == "best":
        picked = sorted(layers, key=lambda number: (-scores[number], number))[:count]
    elif spec.choose == "random":
        picked = np.random.default_rng([seed, 4]).choice(layers, size=count, replace=False).tolist()
    else:
        spare = len(layers) - count
        begin = {"first": 0, "middle": spare // 2, "last": spare}[spec.choose]
        picked = layers[begin : begin + count]
    return tuple(sorted(picked))


def _add_energy(energies: dict[int, float], name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    layer: Any = module
    x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).to(layer.lora_A[OWN].weight.dtype)
    with torch.no_grad():
        added = layer.scaling[OWN] * (x @ layer.lora_A[OWN].weight.T @ layer.lora_B[OWN].weight.T)
    energies[_layer(name)] += float(added.double().square().sum())


def _layer(name: str) -> int:
    number = layer_number(f"{name}.")
    assert number is not None  # noqa: S101 -- for the type checker: targets stand in layers
    return number
