"""`rung fuse`: combines several runs of one base into one run.

LoRA runs become a plain LoRA, full runs a full run, or with `--rank` a LoRA. All methods work on the true updates in
float32, scale times B A: to combine A and B separately, as peft does, adds cross terms that no adapter had. The price
is a larger rank for the exact sum, or an SVD and a measured loss for everything else. The mathematics is in
`methods/adapter_merging.py`; `cli` and `rung.fuse` call `fuse`. Fused kernels (`models/fused_ops.py`) are something
else.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.optimize import minimize
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from rung.config.io import load_config
from rung.config.method import FullConfig, LoraConfig, MethodConfig
from rung.config.objective import ROLLOUT_KINDS
from rung.config.run import RunConfig
from rung.errors import CheckpointError, ConfigError, PlanError
from rung.files import require_undamaged, write_folder
from rung.methods import adapter_merging
from rung.methods.adapter_merging import CombineMethod, LowRankFactors
from rung.methods.lora import TRAINED_ADAPTER, Lora
from rung.methods.protocol import Method
from rung.methods.registry import attach_method
from rung.models.base_model import BaseModel
from rung.models.fused_modules import install_fused_forwards
from rung.models.load import check_fingerprint
from rung.models.packing import pack_lazily
from rung.models.policy import Policy
from rung.models.targets import layer_number, roles_of
from rung.objectives.registry import make_objective
from rung.results.exports import FuseResult
from rung.runs.artifact import write_origin, write_tokenizer_files
from rung.runs.auxiliary_models import load_reference
from rung.runs.dataset import read_splits, tokenize_splits
from rung.runs.load import config_of_run, load_base_on_device, saved_chat
from rung.runs.train import micro_batch_tokens
from rung.training.run_folder import is_climb, read_json, read_manifest, versions, write_json
from rung.training.step import mean_loss

MAX_EVALUATIONS = 40
"""Evaluations of the loss in a search for weights: LoraHub's budget (Huang et al. 2023, section 3.2)."""
MAX_WEIGHT = 1.5
"""Largest weight in a search, with either sign."""
DENSITY = 0.2
"""Default share of entries kept (Yadav et al. 2023, section 4)."""
PENALTY = 0.05
"""Penalty on the mean absolute weight, in nats (Huang et al. 2023, eq. 2)."""

Weights = tuple[float, ...]
"""One weight for each run."""
Factors = dict[str, LowRankFactors]
"""The update of each module, by its name."""


@dataclass(frozen=True)
class FusePlan:
    """How the runs are combined."""

    how: CombineMethod = "sum"
    density: float = DENSITY
    """Share of entries kept by ties, dare and magnitude."""
    weights: Weights | None = None
    """None gives every run the weight 1."""
    rank: int | None = None
    """Rank of the result. None keeps a sum exact; the other methods then take the largest rank of the runs."""
    seed: int = 0
    """Random seed for dare."""
    learn: str | None = None
    """A config on whose training rows the weights are searched."""


def parse_method(text: str) -> tuple[CombineMethod, float]:
    """`method:density` from the command line. Raises `ConfigError` for an unknown method or an invalid density."""
    method, _, share = text.partition(":")
    if method not in get_args(CombineMethod):
        raise ConfigError("no such way to fuse", where="--how", given=text, allowed=", ".join(get_args(CombineMethod)))
    try:
        density = float(share) if share else DENSITY
    except ValueError:
        density = 0.0
    # A sum keeps every entry, so a density for it is a mistake.
    if not 0.0 < density <= 1.0 or (share and method == "sum"):
        allowed = "above 0, at most 1, for ties, dare and magnitude"
        raise ConfigError("the share of entries that are kept", where="--how", given=text, allowed=allowed)
    return method, density  # type: ignore[return-value]


def parse_weights(text: str | None) -> Weights | None:
    """Weights from the command line, separated by commas. Raises `ConfigError` for anything but numbers."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError("weights are numbers with commas between", where="--weights", given=text) from error


def fuse(runs: Sequence[Path], folder: Path, plan: FusePlan) -> FuseResult:
    """Combine several runs of one base into one, written as a run folder.

    Raises `ConfigError` and `CheckpointError` for runs that cannot be combined.
    """
    _check(runs, folder, plan)
    manifests = [_manifest(run) for run in runs]
    kinds = [manifest["config"]["objective"]["kind"] for manifest in manifests]
    if reward_runs := [run for run, kind in zip(runs, kinds, strict=True) if kind == "reward"]:
        raise ConfigError("a reward model has a head of its own, which no sum keeps", given=reward_runs[0])
    are_full_runs = _require_compatible(runs, manifests)
    if are_full_runs and plan.learn is not None:
        raise ConfigError("weights are searched for adapters alone", where="--learn", given="full runs")
    weights = tuple(plan.weights or [1.0] * len(runs))
    search, ranks, lost_share = None, [], 0.0
    first_config = config_of_run(runs[0])
    base = load_base_on_device(first_config.model)
    for run, manifest in zip(runs, manifests, strict=True):
        check_fingerprint(manifest, base, run)
    method: Method
    config: MethodConfig = FullConfig()
    if are_full_runs and plan.rank is None:
        method = _sum_of_models(base, runs, weights, plan)
    else:
        if are_full_runs:
            fused_factors, lost_share = _models_as_lora(base, runs, weights, plan)
        else:
            updates = [_adapter_update(run) for run in runs]
            # The search attaches a LoRA of its own; the shared base stays free for the result.
            if plan.learn is not None:
                weights, search = learn_weights(base.share_weights(), updates, plan)
            fused_factors, lost_share = _fuse_updates(updates, weights, plan)
        ranks = sorted({len(f.a_RI) for f in fused_factors.values()})
        config = _config_for({name: len(f.a_RI) for name, f in fused_factors.items()})
        method = Lora(base.model, config)
        _set_factors(method, fused_factors)
    facts = {"fingerprints": manifests[0]["fingerprints"], "gates": [], "versions": versions()}
    facts["fused_from"] = [str(run) for run in runs]
    facts["fused"] = {"how": plan.how, "weights": list(weights), "lost": lost_share}
    run_config = first_config.model_copy(update={"method": config, "output": str(folder)})
    _write(runs[0], run_config, base, method, facts)
    return FuseResult(path=str(folder), weights=weights, ranks=tuple(ranks), lost=lost_share, search=search)


def learn_weights(base: BaseModel, updates: Sequence[Factors], plan: FusePlan) -> tuple[Weights, dict[str, Any]]:
    """Weights of the exact sum with the lowest loss on the rows of `plan.learn` (LoraHub, on true updates).

    Powell's derivative-free search between -1.5 and 1.5, starting from equal weights with sum 1.
    """
    assert plan.learn is not None  # noqa: S101 -- for the type checker
    task = load_config(plan.learn).config
    if task.objective.kind in ("reward", "distill", *ROLLOUT_KINDS):
        summary = "weights are searched on the loss of a model that writes"
        raise ConfigError(summary, where="--learn", given=task.objective.kind)
    data = tokenize_splits(task, read_splits(task), base)
    names = sorted(set().union(*updates))
    # The exact sum has at most the sum of the ranks, so one LoRA of that size can hold every candidate.
    config = _config_for({name: sum(len(u[name].a_RI) for u in updates if name in u) for name in names})
    method = Lora(base.model, config)
    policy = Policy(base, method)
    policy.reference = load_reference(task, base)
    objective = make_objective(task.objective)
    install_fused_forwards(base.model, method.linear_params)
    # Packed once: all evaluations read the same rows, and only the factors change.
    batches = list(
        pack_lazily(
            data.train.examples, micro_batch_tokens(task, base), device=policy.device, boundary=policy.rope_boundary
        )
    )
    losses: dict[Weights, float] = {}

    def loss(weights: np.ndarray) -> float:
        sums = {n: adapter_merging.concatenate(*_updates_of(n, updates, weights.tolist())) for n in names}
        _set_factors(method, sums)
        mean = losses[tuple(weights.tolist())] = mean_loss(policy, objective, batches)
        return mean + PENALTY * float(np.abs(weights).mean())

    start, bounds = np.full(len(updates), 1.0 / len(updates)), [(-MAX_WEIGHT, MAX_WEIGHT)] * len(updates)
    minimize(loss, start, method="Powell", bounds=bounds, options={"maxfev": MAX_EVALUATIONS, "ftol": 1e-3})
    # Powell's last point is not always its best, so the best of all evaluated ones is taken.
    best = min(losses, key=lambda weights: losses[weights] + PENALTY * float(np.abs(weights).mean()))
    return best, {"evaluations": len(losses), "first": losses[tuple(start.tolist())], "best": losses[best]}


def _check(runs: Sequence[Path], folder: Path, plan: FusePlan) -> None:
    if len(runs) < 2:
        raise ConfigError("fusing takes at least two runs", given=len(runs))
    if folder.exists():
        raise CheckpointError("this folder exists already", where=str(folder))
    if plan.weights is not None and len(plan.weights) != len(runs):
        raise ConfigError("one weight for each run", given=len(plan.weights), allowed=str(len(runs)))
    if plan.weights is not None and not all(map(math.isfinite, plan.weights)):
        raise ConfigError("weights are finite numbers", given=plan.weights)
    if plan.rank is not None and plan.rank < 1:
        raise ConfigError("a rank is at least 1", given=plan.rank)
    if plan.learn is not None and (plan.weights is not None or plan.how != "sum"):
        raise ConfigError("a search for weights is for the plain sum, and takes none of its own", given=plan.how)


def _manifest(run: Path) -> dict[str, Any]:
    manifest = read_manifest(run)
    if manifest.get("status") != "finished":
        raise CheckpointError(f"this run is not finished (status {manifest.get('status')})", where=str(run))
    return manifest


def _require_compatible(runs: Sequence[Path], manifests: Sequence[dict[str, Any]]) -> bool:
    """Whether the runs are full runs. Raises for runs with different bases, templates or kinds."""
    for run, manifest in zip(runs, manifests, strict=True):
        kind = manifest["config"]["method"]["kind"]
        if not (run / "adapter").is_dir() and not ((run / "model").is_dir() and kind == "full"):
            given = "a climb" if is_climb(run) else kind
            summary = "there is nothing here to fuse"
            raise CheckpointError(summary, where=str(run), given=given, allowed="runs of lora or full")
        # Its update was learned against rounding errors that another base does not have.
        if kind == "qlora":
            hint = "rung merge each onto one base, or train a lora"
            raise CheckpointError("its adapter belongs on a quantized base", where=str(run), given=kind, hint=hint)
    full_flags = {(run / "model").is_dir() for run in runs}
    if len(full_flags) > 1:
        raise ConfigError("adapters and whole models do not fuse", given=", ".join(map(str, runs)))
    problems = {"base": "stand on different bases", "text": "were trained with different templates"}
    for name, problem in problems.items():
        first = manifests[0]["fingerprints"][name]
        for run, manifest in zip(runs, manifests, strict=True):
            if (fingerprint := manifest["fingerprints"][name]) != first:
                allowed = f"{first[:16]}, that of {runs[0]}"
                raise CheckpointError(f"these runs {problem}", where=str(run), given=fingerprint[:16], allowed=allowed)
    return full_flags.pop()


def _adapter_update(run: Path) -> Factors:
    """The updates of an adapter by module name."""
    require_undamaged(run / "adapter")
    if not (run / "adapter" / "adapter_model.safetensors").exists():
        raise PlanError("virtual tokens for each task do not fuse: they are no update of a weight", where=str(run))
    config = read_json(run / "adapter" / "adapter_config.json")
    return adapter_merging.lora_factors(load_file(run / "adapter" / "adapter_model.safetensors"), config, str(run))


@torch.no_grad()
def _sum_of_models(base: BaseModel, runs: Sequence[Path], weights: Weights, plan: FusePlan) -> Method:
    """The base plus one combined difference of every tensor (task arithmetic, Ilharco et al. 2023, section 2)."""
    method = attach_method(base.model, FullConfig(), seed=plan.seed, fused=False)
    # In place: the base is not needed any more, and a second copy would double the memory.
    for name, update in _combined_models(dict(method.trainable()), runs, weights, plan):
        method.trainable()[name].add_(update)
    return method


@torch.no_grad()
def _models_as_lora(base: BaseModel, runs: Sequence[Path], weights: Weights, plan: FusePlan) -> tuple[Factors, float]:
    """The combined differences truncated to a rank, and the lost share: embeddings and norms are lost completely."""
    assert plan.rank is not None  # noqa: S101 -- for the type checker
    factors: Factors = {}
    lost_squares = total = 0.0
    for name, update in _combined_models(dict(base.model.named_parameters()), runs, weights, plan):
        # `lost` is 1 for a tensor that no LoRA holds: embeddings, norms and biases.
        module, size, lost_share = name.removesuffix(".weight"), float(update.norm()), 1.0
        if update.dim() == 2 and layer_number(f"{module}.") is not None and roles_of(module):
            # LowRankFactors are [O, R] and [R, I], while GPT-2's Conv1D stores [I, O].
            is_transposed = isinstance(base.model.get_submodule(module), Conv1D)
            truncated = adapter_merging.truncate(update.T if is_transposed else update, plan.rank)
            factors[module], lost_share = truncated.factors, truncated.lost
        lost_squares, total = lost_squares + (lost_share * size) ** 2, total + size**2
    return factors, math.sqrt(lost_squares / total) if total else 0.0


def _combined_models(
    base: Mapping[str, Tensor], runs: Sequence[Path], weights: Weights, plan: FusePlan
) -> Iterator[tuple[str, Tensor]]:
    """The combined difference to the base, tensor by tensor: the runs' models are never in memory as a whole."""
    # One generator for all tensors in their order, so that the seed decides the whole result.
    generator = torch.Generator().manual_seed(plan.seed)
    files = [_tensor_files(run / "model") for run in runs]
    for name, tensor in base.items():
        base_tensor = tensor.detach().float().cpu()
        differences = [tensors[name].get_tensor(name).float() - base_tensor for tensors in files]
        if any(d.any() for d in differences):
            update = adapter_merging.combine(differences, weights, plan.how, density=plan.density, generator=generator)
            yield name, update.to(tensor.device)


def _tensor_files(folder: Path) -> dict[str, Any]:
    """The open file of each tensor of a saved model by name."""
    handles = [safe_open(str(file), framework="pt") for file in sorted(folder.glob("*.safetensors"))]
    return {str(key): file for file in handles for key in file.keys()}  # type: ignore[no-untyped-call]


def _fuse_updates(updates: Sequence[Factors], weights: Weights, plan: FusePlan) -> tuple[Factors, float]:
    """The combined factors by module, and the share of the norm of the whole update that truncation lost."""
    generator = torch.Generator().manual_seed(plan.seed)
    fused_factors: Factors = {}
    lost_squares = total = 0.0
    # Sorted, since the draws of dare depend on the order.
    for name in sorted(set().union(*updates)):
        factors, module_weights = _updates_of(name, updates, weights)
        # A LoRA may have a larger rank than its matrix.
        ranks = [min(*f.b_OR.shape, len(f.a_RI)) for f in factors]
        exact_sum = adapter_merging.concatenate(factors, module_weights)
        largest_rank = min(len(exact_sum.b_OR), exact_sum.a_RI.shape[1])
        # Exact unless the summed rank exceeds what the matrix can have, which truncation then removes without loss.
        if plan.how == "sum" and plan.rank is None and len(exact_sum.a_RI) <= largest_rank:
            fused_factors[name] = exact_sum
            continue
        if plan.how == "sum":
            truncated = adapter_merging.truncate_product(exact_sum, plan.rank or sum(ranks))
            size = float(exact_sum.dense.norm())
        else:
            matrices = [f.dense for f in factors]
            update = adapter_merging.combine(matrices, module_weights, plan.how, plan.density, generator)
            truncated, size = adapter_merging.truncate(update, plan.rank or max(ranks)), float(update.norm())
        fused_factors[name] = truncated.factors
        lost_squares, total = lost_squares + (truncated.lost * size) ** 2, total + size**2
    return fused_factors, math.sqrt(lost_squares / total) if total else 0.0


def _config_for(ranks: dict[str, int]) -> LoraConfig:
    """A config whose targets include modules of these ranks; others of the same roles and layers stay zero."""
    roles = sorted({roles_of(name)[0] for name in ranks})
    layers = sorted({number for name in ranks if (number := layer_number(f"{name}.")) is not None})
    max_rank = max(ranks.values())
    # The pattern names only the exceptions; alpha=None gives every module its default scale, divided out of B later.
    rank_pattern = {f"{layer_number(f'{n}.')}.{roles_of(n)[0]}": rank for n, rank in ranks.items() if rank != max_rank}
    return LoraConfig(rank=max_rank, rank_pattern=rank_pattern, alpha=None, targets=tuple(roles), layers=tuple(layers))


def _updates_of(
    name: str, updates: Sequence[Factors], weights: Sequence[float]
) -> tuple[list[LowRankFactors], list[float]]:
    """The updates of one module in the runs that have it, and the weights of these runs."""
    pairs = [(u[name], w) for u, w in zip(updates, weights, strict=True) if name in u]
    return [factors for factors, _ in pairs], [weight for _, weight in pairs]


@torch.no_grad()
def _set_factors(method: Lora, factors: Factors) -> None:
    """Write factors into a LoRA, with its scale divided out of B; modules without factors stay zero."""
    for name, (b, a) in factors.items():
        layer: Any = method.model.get_submodule(name)
        layer.lora_A[TRAINED_ADAPTER].weight.copy_(a)
        layer.lora_B[TRAINED_ADAPTER].weight.copy_(b / layer.scaling[TRAINED_ADAPTER])


def _write(run: Path, config: RunConfig, base: BaseModel, method: Method, facts: Mapping[str, Any]) -> None:
    """Write the run folder, which is like that of a trained run; `run` is one of those that were combined."""
    folder = Path(config.output)
    # From a run and not from the base: the template is the one that all of them were trained with.
    chat = saved_chat(run)

    def fill(staging: Path) -> None:
        method.save(staging)
        write_tokenizer_files(staging, chat)
        write_origin(staging, chat, base)

    folder.mkdir(parents=True)
    try:
        write_folder(folder / method.artifact, fill)
        write_json(folder / "run.json", {"status": "finished", "config": config.model_dump(mode="json"), **facts})
    except BaseException:
        # Also after Ctrl-C: half a run folder would be refused by the next attempt.
        shutil.rmtree(folder)
        raise
