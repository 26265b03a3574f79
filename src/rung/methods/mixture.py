"""A pool of low-rank experts beside each linear, mixed by a learned router (LoRAMoE, Dou et al. 2023, eq. 4-5).

    y = W x + s sum_e w_e(x) B_e A_e x,    w = softmax(R x), or its k largest entries renormalized (Li et al. 2024)

All experts of a linear are two products: their A matrices are stacked, their B matrices concatenated, and the router's
weights are multiplied in between. Unchosen experts are computed too, which wastes products if `top_k` is small. B
starts at zero, so the model starts as its base. The update depends on the token, so it cannot be merged.

The balance loss of a document is E sum_e f_e P_e (Fedus et al. 2022, eq. 4-6): f_e the share of its tokens that expert
e got, P_e its mean router weight; 1 when all experts get the same. Where all experts act, f_e is P_e itself: a count
would be the same for all. The loss is computed for each document and each linear, so it does not depend on how a step
is divided into micro-batches.

Suffixes: T tokens, I inputs, O outputs, E experts, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rung.config.method import MixtureConfig
from rung.methods.adapter_files import named_adapter_parameters, read_rung_tuner, write_rung_tuner
from rung.methods.protocol import Method
from rung.models.base_model import widest_float
from rung.models.fused_modules import linear_weight
from rung.models.targets import select_linears
from rung.types import LossTerm, PackedBatch

NAME = "mixture"
"""Name of the submodule added to a linear."""
ROUTER_INIT_STD = 0.02
"""Initial standard deviation of the router."""


class ExpertPool(nn.Module):
    """The experts of one linear; the result is added to its output."""

    def __init__(self, inputs: int, outputs: int, config: MixtureConfig, reference: Tensor) -> None:
        super().__init__()
        factory: Any = {"device": reference.device, "dtype": torch.promote_types(reference.dtype, torch.float32)}
        self.count, self.rank, self.top = config.experts, config.rank, config.top_k
        self.scale = (2.0 * config.rank if config.alpha is None else config.alpha) / config.rank
        self.router = nn.Parameter(torch.randn(config.experts, inputs, **factory) * ROUTER_INIT_STD)
        self.a = nn.Parameter(torch.empty(config.experts * config.rank, inputs, **factory))
        # As in LoRA: A random, B zero, so the first output is that of the base.
        self.b = nn.Parameter(torch.zeros(outputs, config.experts * config.rank, **factory))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.tracks_balance = config.balance_weight > 0.0
        self.routing: tuple[Tensor, Tensor] | None = None
        """Probabilities and shares [T, E] of the last call with a graph; `penalty` reads and clears them."""
        self.load_E = torch.zeros(config.experts, device=reference.device, dtype=widest_float(reference.device))
        """Router weight of each expert, summed over tokens of calls with a graph."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O], in the dtype of `x`."""
        flat_TI = x.reshape(-1, x.shape[-1])
        wide_TI = flat_TI.to(torch.promote_types(x.dtype, self.a.dtype))
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 could change which experts are chosen
            probabilities_TE = torch.softmax(wide_TI @ self.router.T, dim=-1)
        weights_TE = top_k_weights(probabilities_TE, self.top)
        # Evaluation must not change the statistics of training.
        if torch.is_grad_enabled():
            self.load_E += weights_TE.detach().sum(0)
            self.routing = (probabilities_TE, expert_shares(weights_TE, self.top)) if self.tracks_balance else None
        # Router weights scale the low-rank products, R numbers an expert, instead of outputs with O numbers.
        low_TER = (wide_TI @ self.a.T).view(-1, self.count, self.rank) * weights_TE[..., None]
        y_TO = self.scale * (low_TER.flatten(1) @ self.b.T)
        return y_TO.view(*x.shape[:-1], -1).to(x.dtype)


class Mixture(Method):
    """Experts beside the chosen linears; the base stays frozen."""

    kind = NAME
    merge_refusal = "a mixture cannot be folded into the base: its router weighs the experts anew for every token"

    def __init__(self, model: PreTrainedModel, config: MixtureConfig) -> None:
        self.model, self.config = model, config
        self.hosts: dict[str, nn.Module] = {}
        reference = next(model.parameters())
        for name in select_linears(model, config.targets, config.layers):
            host = model.get_submodule(name)
            outputs, inputs = linear_weight(host).shape
            host.add_module(NAME, ExpertPool(inputs, outputs, config, reference))
            host.register_forward_hook(self._add_experts)
            self.hosts[name] = host

    def trainable(self) -> dict[str, nn.Parameter]:
        """Router, A and B of every chosen linear."""
        return named_adapter_parameters(self.hosts, NAME)

    def declared_parameters(self) -> int:
        """Sum over linears of E I + E r (I + O)."""
        shapes = [linear_weight(host).shape for host in self.hosts.values()]
        return sum(self.config.experts * (i + self.config.rank * (i + o)) for o, i in shapes)

    def prefix_sharing_blocker(self) -> str | None:
        """The balance loss, which is computed for each document."""
        return "a mixture's balance counts each token for its own document" if self.config.balance_weight else None

    def supports_recompute(self) -> bool:
        """False with a balance loss, which reads the routing of the first forward pass."""
        return self.config.balance_weight == 0.0

    def penalty(self, batch: PackedBatch) -> list[LossTerm]:
        """`balance_weight` times the mean over linears of each document's balance loss, summed over documents."""
        if not self.config.balance_weight:
            return []
        owner_T = document_of_token(batch)
        losses: list[Tensor] = []
        for experts in self._experts().values():
            # Cleared at once: the tensors hold the graph of the batch.
            routing, experts.routing = experts.routing, None
            if routing is not None:
                probabilities_TE, shares_TE = routing
                losses.append(balance_loss(probabilities_TE, shares_TE, owner_T, batch.sequences))
        weight = self.config.balance_weight
        return [LossTerm(weight * torch.stack(losses).mean(), "sequences", "balance")] if losses else []

    def statistics(self) -> Mapping[str, Any]:
        """Share of the router weight that each expert got in training, by linear, for `run.json`."""
        loads = {name: pool.load_E for name, pool in self._experts().items()}
        shares = {name: (load / load.sum()).tolist() for name, load in loads.items() if load.any()}
        return {"router_load": {name: [round(share, 4) for share in values] for name, values in shares.items()}}

    def state(self) -> dict[str, Any]:
        """Summed router weights so far."""
        return {name: pool.load_E.tolist() for name, pool in self._experts().items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the summed router weights."""
        for name, load in state.items():
            self._experts()[name].load_E.copy_(torch.tensor(load, dtype=torch.float64))

    def save(self, folder: Path) -> None:
        """Write files that peft loads once `rung.peft` is imported."""
        write_rung_tuner(folder, self.hosts, NAME, self.config.model_dump(mode="json"))

    def load(self, folder: Path) -> None:
        """Load what `save` wrote; missing or unexpected keys raise `CheckpointError`."""
        read_rung_tuner(folder, self.hosts, NAME)

    def _experts(self) -> dict[str, Any]:
        return {name: host.get_submodule(NAME) for name, host in self.hosts.items()}

    def _add_experts(self, host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + host.get_submodule(NAME)(inputs[0]) if self.enabled else output


def top_k_weights(probabilities_TE: Tensor, top: int | None) -> Tensor:
    """Weights of the experts: all, or the `top` largest renormalized to sum 1."""
    if top is None or top >= probabilities_TE.shape[1]:
        return probabilities_TE
    values, indices = probabilities_TE.topk(top, dim=1)
    return torch.zeros_like(probabilities_TE).scatter(1, indices, values / values.sum(1, keepdim=True))


def document_of_token(batch: PackedBatch) -> Tensor:
    """Document index of each token in a row without shared parts, int64 [T]."""
    # Filled on the processor and moved once: one transfer instead of one a document.
    owner_T = torch.empty(len(batch.ids), dtype=torch.long)
    for number, rows in enumerate(batch.rows):
        owner_T[torch.from_numpy(rows)] = number
    return owner_T.to(batch.ids.device)


def expert_shares(weights_TE: Tensor, top: int | None) -> Tensor:
    """Share of each token that an expert got: 1/k if chosen, or its weight if all experts act."""
    if top is None or top >= weights_TE.shape[1]:
        return weights_TE
    return (weights_TE.detach() > 0).to(weights_TE.dtype) / top


def balance_loss(probabilities_TE: Tensor, shares_TE: Tensor, owner_T: Tensor, documents: int) -> Tensor:
    """Sum over documents of E sum_e f_e P_e; `owner_T` is the document index of each token."""
    experts = probabilities_TE.shape[1]
    empty = probabilities_TE.new_zeros(documents, experts)
    shares_DE = empty.index_add(0, owner_T, shares_TE)
    means_DE = empty.index_add(0, owner_T, probabilities_TE)
    tokens_D = shares_DE.sum(1, keepdim=True)  # the shares of one token add up to 1
    return experts * (shares_DE * means_DE / tokens_D.square()).sum()
