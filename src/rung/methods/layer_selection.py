"""Which layers of a LoRA take part as a run goes on: some drawn at a time, or the winners of a competition.

The competition: all layers move for some steps and are scored by what they learned, the norm of their updates or the
energy of what these add to the linears' outputs (LoRA-drop, Zhou et al. 2024, eq. 3). The winners go back to their
start (Frankle and Carbin 2019, section 1) or on from where they are; the others leave for good.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from rung.config.method import LoraConfig, LotteryConfig
from rung.errors import CheckpointError, ConfigError, PlanError
from rung.methods.lora import TRAINED_ADAPTER, Lora
from rung.methods.protocol import CalibrationData, TrainableSet
from rung.models.layers import layer_count
from rung.models.targets import layer_number


def make_lora(model: PreTrainedModel, config: LoraConfig) -> Lora:
    """LoRA, of which `lisa_n_layers` move at a time where the config says so."""
    return with_layer_sampling(Lora(model, config))


def with_layer_sampling(method: Lora) -> Lora:
    """The same method, its layers drawn where its config asks for it."""
    if method.config.lisa_n_layers is not None:
        method.course = LayerSampling(method)
    return method


def make_lottery(model: PreTrainedModel, config: LotteryConfig) -> Lora:
    """LoRA whose layers compete."""
    method = Lora(model, config)
    method.sample_size = config.init_examples if config.lottery.score == "energy" else 0
    method.course = LayerLottery(method, config)
    return method


class LayerSampling:
    """So many layers at a time, drawn anew every period, from seed and step alone (LISA, Pan et al. 2024, alg. 1)."""

    sample: CalibrationData | None = None

    def __init__(self, method: Lora) -> None:
        self.method = method
        self.layers = _layers(method)

    def at_step(self, step: int) -> TrainableSet:
        """The layers of this period."""
        config = self.method.config
        random = np.random.default_rng([self.method.seed, step // config.lisa_step_interval])
        drawn = random.choice(self.layers, size=config.lisa_n_layers, replace=False).tolist()
        return TrainableSet(_trainables(self.method, drawn))

    def statistics(self) -> Mapping[str, Any]:
        """Nothing: the draw follows from seed and step."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing, for the same reason."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""


class LayerLottery:
    """Scouting with all layers, then training with the winners."""

    def __init__(self, method: Lora, config: LotteryConfig) -> None:
        self.method, self.config = method, config
        self.sample: CalibrationData | None = None
        self.layers = _layers(method)
        if winner_count(config, len(self.layers)) == len(self.layers):
            what = f"of {len(self.layers)} layers all would be kept: that is lora"
            raise ConfigError(what, where="method.lottery.keep", given=config.lottery.keep)
        self.start = {name: p.detach().clone() for name, p in method.trainable().items()}
        self.winners: tuple[int, ...] | None = None
        self.scores: dict[int, float] = {}

    def at_step(self, step: int) -> TrainableSet | None:
        """Everything while scouting; then the winners, which begin anew, their moments too, when they rewind."""
        if step < self.config.lottery.scout_steps:
            return None
        drawn = self.winners is None and step == self.config.lottery.scout_steps
        if drawn:
            self._choose_winners()
        if self.winners is None:
            raise CheckpointError("this checkpoint does not tell who won")
        return TrainableSet(
            _trainables(self.method, self.winners),
            restarted=drawn and self.config.lottery.rewind,
            changes_for_good=drawn,
        )

    def state(self) -> dict[str, Any]:
        """Scores and winners, once they are drawn."""
        return {} if self.winners is None else {"scores": sorted(self.scores.items()), "winners": self.winners}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The same winners: no second draw."""
        if state:
            self.scores = {int(number): float(score) for number, score in state["scores"]}
            self.winners = tuple(map(int, state["winners"]))
            self._drop_losers()

    def statistics(self) -> Mapping[str, Any]:
        """Scores of the layers, as shares of their sum, and who won."""
        if not self.scores:
            return {}
        return {
            "lottery": {
                "scores": {str(number): round(score, 5) for number, score in self.scores.items()},
                "winners": list(self.winners or ()),
                "of_layers": layer_count(self.method.model),
                "choose": self.config.lottery.choose,
            }
        }

    def norms(self) -> dict[int, float]:
        """Squared Frobenius norm of each layer's updates, from their factors: |B A|^2 = sum((B^T B) * (A A^T))."""
        norms = dict.fromkeys(self.layers, 0.0)
        for name, layer in self.method.layers().items():
            a, b = (
                layer.lora_A[TRAINED_ADAPTER].weight.detach().double(),
                layer.lora_B[TRAINED_ADAPTER].weight.detach().double(),
            )
            norms[_layer(name)] += float(((b.T @ b) * (a @ a.T)).sum()) * layer.scaling[TRAINED_ADAPTER] ** 2
        return norms

    def energies(self) -> dict[int, float]:
        """Sum over the sample's tokens of |s B A x|^2 for each layer."""
        if self.sample is None:
            raise PlanError("there are no documents to score layers on", where="method.score", given="energy")
        energies = dict.fromkeys(self.layers, 0.0)
        hooks = [
            layer.register_forward_pre_hook(partial(_add_energy, energies, _layer(name)))
            for name, layer in self.method.layers().items()
        ]
        try:
            self.sample.run_forward()
        finally:
            for hook in hooks:
                hook.remove()
        return energies

    def _choose_winners(self) -> None:
        found = self.norms() if self.config.lottery.score == "delta" else self.energies()
        whole = sum(found.values()) or 1.0
        self.scores = {number: score / whole for number, score in found.items()}
        self.winners = choose_winners(self.scores, self.config, self.method.seed)
        self._drop_losers()
        if self.config.lottery.rewind:
            own = self.method.trainable()
            with torch.no_grad():
                for name in _trainables(self.method, self.winners):
                    own[name].copy_(self.start[name])

    def _drop_losers(self) -> None:
        self.method.keep_only([name for name in self.method.names if _layer(name) in (self.winners or ())])


def winner_count(config: LotteryConfig, layers: int) -> int:
    """How many of so many layers go on."""
    return max(1, round(config.lottery.keep * layers))


def choose_winners(scores: Mapping[int, float], config: LotteryConfig, seed: int) -> tuple[int, ...]:
    """The layers that stay: the best, or as many others to compare them with."""
    layers = sorted(scores)
    count = winner_count(config, len(layers))
    if config.lottery.choose == "best":
        picked = sorted(layers, key=lambda number: (-scores[number], number))[:count]
    elif config.lottery.choose == "random":
        picked = np.random.default_rng([seed, 4]).choice(layers, size=count, replace=False).tolist()
    else:
        spare = len(layers) - count
        begin = {"first": 0, "middle": spare // 2, "last": spare}[config.lottery.choose]
        picked = layers[begin : begin + count]
    return tuple(sorted(picked))


def _add_energy(energies: dict[int, float], number: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    layer: Any = module
    a, b = layer.lora_A[TRAINED_ADAPTER].weight, layer.lora_B[TRAINED_ADAPTER].weight
    with torch.no_grad():
        x = inputs[0].reshape(-1, a.shape[1]).to(a.dtype)
        energies[number] += float((layer.scaling[TRAINED_ADAPTER] * (x @ a.T @ b.T)).double().square().sum())


def _layers(method: Lora) -> list[int]:
    return sorted({_layer(name) for name in method.names})


def _trainables(method: Lora, layers: Collection[int]) -> set[str]:
    """Names of what can move in these layers, and outside of all."""
    return {name for name in method.trainable() if layer_number(f".{name}") in {None, *layers}}


def _layer(name: str) -> int:
    number = layer_number(f"{name}.")
    assert number is not None  # noqa: S101 -- for the type checker: targets stand in layers
    return number
