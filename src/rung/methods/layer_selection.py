"""A lottery among the layers of a LoRA: all are trained at first, then only the winners.

It trains all layers for some steps and scores each by the norm of its update, or by the energy that the update
adds to the outputs of its linears (LoRA-drop, Zhou et al. 2024, eq. 3). The winners restart from their initial values
(Frankle and Carbin 2019, section 1) or continue; the others are dropped permanently. It costs the scouting steps and a
copy of the initial values. `methods/registry.py` builds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from rung.config.method import LotteryConfig
from rung.errors import CheckpointError, ConfigError, PlanError
from rung.methods.lora import TRAINED_ADAPTER, Lora
from rung.methods.lora_init import run_hooked
from rung.methods.protocol import CalibrationData, TrainableSet
from rung.models.base_model import widest_float
from rung.models.layers import layers_of
from rung.models.targets import layer_number


def make_lottery(model: PreTrainedModel, config: LotteryConfig) -> Lora:
    """LoRA with a lottery among its layers."""
    method = Lora(model, config)
    method.sample_size = config.init_examples if config.lottery.score == "energy" else 0
    method.layer_schedule = LayerLottery(method, config)
    return method


class LayerLottery:
    """Scouting with all layers, then training of the winners."""

    def __init__(self, method: Lora, config: LotteryConfig) -> None:
        self.method, self.config = method, config
        self.sample: CalibrationData | None = None
        self.layers = method.adapted_layers()
        if winner_count(config, len(self.layers)) == len(self.layers):
            reason = f"of {len(self.layers)} layers all would be kept: that is lora"
            raise ConfigError(reason, where="method.lottery.keep", given=config.lottery.keep)
        # Cloned before the first step; the winners restart from these values.
        self.initial_values = {name: p.detach().clone() for name, p in method.trainable().items()}
        self.winners: tuple[int, ...] | None = None
        self.scores: dict[int, float] = {}

    def trainable_at_step(self, step: int) -> TrainableSet | None:
        """None (all parameters) while scouting, then the winners; with `rewind` their moments restart as well."""
        if step < self.config.lottery.scout_steps:
            return None
        is_draw_step = self.winners is None and step == self.config.lottery.scout_steps
        if is_draw_step:
            self._choose_winners()
        if self.winners is None:
            raise CheckpointError("this checkpoint does not tell who won")
        # Only at the draw: later steps keep the moments they have accumulated.
        restart_moments = is_draw_step and self.config.lottery.rewind
        names = self.method.trainable_names(self.winners)
        return TrainableSet(names, restart_moments, changes_permanently=is_draw_step)

    def state(self) -> dict[str, Any]:
        """Scores and winners, once chosen."""
        return {} if self.winners is None else {"scores": sorted(self.scores.items()), "winners": self.winners}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the winners without choosing again."""
        if state:
            self.scores = {int(number): float(score) for number, score in state["scores"]}
            self.winners = tuple(map(int, state["winners"]))
            self._drop_losers()

    def statistics(self) -> Mapping[str, Any]:
        """Scores of the layers as shares of their sum, and the winners."""
        if not self.scores:
            return {}
        scores = {str(number): round(score, 5) for number, score in self.scores.items()}
        draw = {"of_layers": len(layers_of(self.method.model)), "choose": self.config.lottery.choose}
        return {"lottery": {"scores": scores, "winners": list(self.winners or ()), **draw}}

    def update_norms(self) -> dict[int, float]:
        """Squared Frobenius norm of each layer's updates, from their factors: |B A|^2 = sum((B^T B) * (A A^T))."""
        norms = dict.fromkeys(self.layers, 0.0)
        for name, layer in self.method.layers().items():
            # From the factors, so that the matrix B A is never built.
            a, b = (half[TRAINED_ADAPTER].weight.detach().cpu().double() for half in (layer.lora_A, layer.lora_B))
            norms[_layer(name)] += float(((b.T @ b) * (a @ a.T)).sum()) * layer.scaling[TRAINED_ADAPTER] ** 2
        return norms

    def energies(self) -> dict[int, float]:
        """Sum over the sample's tokens of |s B A x|^2 for each layer. Raises `PlanError` without a sample."""
        if self.sample is None:
            raise PlanError("there are no documents to score layers on", where="method.lottery.score", given="energy")
        energies, layers = dict.fromkeys(self.layers, 0.0), self.method.layers().items()
        run_hooked(self.sample, [(layer, partial(_add_energy, energies, _layer(name))) for name, layer in layers])
        return energies

    def _choose_winners(self) -> None:
        scores = self.update_norms() if self.config.lottery.score == "delta" else self.energies()
        total = sum(scores.values()) or 1.0
        self.scores = {number: score / total for number, score in scores.items()}
        self.winners = choose_winners(self.scores, self.config, self.method.seed)
        self._drop_losers()
        if self.config.lottery.rewind:
            parameters = self.method.trainable()
            with torch.no_grad():
                for name in self.method.trainable_names(self.winners):
                    parameters[name].copy_(self.initial_values[name])

    def _drop_losers(self) -> None:
        self.method.keep_only_modules([name for name in self.method.names if _layer(name) in (self.winners or ())])


def winner_count(config: LotteryConfig, layer_count: int) -> int:
    """Number of winners among `layer_count` layers, at least 1."""
    return max(1, round(config.lottery.keep * layer_count))


def choose_winners(scores: Mapping[int, float], config: LotteryConfig, seed: int) -> tuple[int, ...]:
    """The winners: the best layers, or as many others as a control (`choose`)."""
    layers, count = sorted(scores), winner_count(config, len(scores))
    if config.lottery.choose == "best":
        # Ties go to the lower layer, whatever the order of the scores.
        winners = sorted(layers, key=lambda number: (-scores[number], number))[:count]
    elif config.lottery.choose == "random":
        # A stream separate from those of other draws with the same seed.
        winners = np.random.default_rng([seed, 4]).choice(layers, size=count, replace=False).tolist()
    else:
        loser_count = len(layers) - count
        first = {"first": 0, "middle": loser_count // 2, "last": loser_count}[config.lottery.choose]
        winners = layers[first : first + count]
    return tuple(sorted(winners))


def _add_energy(energies: dict[int, float], number: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    layer: Any = module
    a, b = layer.lora_A[TRAINED_ADAPTER].weight, layer.lora_B[TRAINED_ADAPTER].weight
    with torch.no_grad():
        x = inputs[0].reshape(-1, a.shape[1]).to(a.dtype)
        update = (layer.scaling[TRAINED_ADAPTER] * (x @ a.T @ b.T)).to(widest_float(x.device))
        energies[number] += float(update.square().sum())


def _layer(name: str) -> int:
    number = layer_number(f"{name}.")
    assert number is not None  # noqa: S101 -- for the type checker: targets stand in layers
    return number
