"""`rung fuse`: several runs of one base into one adapter that is a plain LoRA, with what was lost on the way."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.optimize import minimize
from torch import Tensor

from rung import run as running
from rung.data.chat import Chat
from rung.engine.checkpoint import write_folder
from rung.engine.pack import pack_in_slices
from rung.engine.record import read_manifest, versions, write_json
from rung.engine.step import mean_loss
from rung.errors import CheckpointError, ConfigError
from rung.method.fusion import Factors, How, combined, concatenated, factors_of, recompressed, reduced
from rung.method.lora import OWN, Lora
from rung.model.load import load_base, load_tokenizer
from rung.model.policy import Policy
from rung.model.targets import layer_number, roles_of
from rung.objective.table import OBJECTIVES
from rung.publish.artefact import write_origin, write_text_side
from rung.spec.io import load, parse
from rung.spec.method import LoraSpec
from rung.spec.model import ModelSpec
from rung.spec.run import RunSpec

ROUNDS = 40
"""Evaluations of the loss in a search for weights: LoraHub's budget (Huang et al. 2023, section 3.2)."""
BOUND = 1.5
"""Largest weight a search may take, of either sign."""
DENSITY = 0.2
"""Share of entries kept unless another is stated (Yadav et al. 2023, section 4)."""
PENALTY = 0.05
"""Of the mean size of the weights, in nats (Huang et al. 2023, eq. 2)."""


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    how: How = "sum"
    density: float = DENSITY
    """Share of entries kept by ties, dare and magnitude."""
    weights: tuple[float, ...] | None = None
    """One for each; none is 1 for each."""
    rank: int | None = None
    """Rank of the result; none keeps the sum exact, and otherwise takes the largest rank of the given."""
    seed: int = 0
    learn: str | None = None
    """A config whose training rows the weights are searched on."""


def way(text: str) -> tuple[How, float]:
    """`how:density` of the command line. Raises `ConfigError` for another word, or a share that is none."""
    how, _, share = text.partition(":")
    if how not in get_args(How):
        raise ConfigError("no such way to fuse", where="--how", given=text, allowed=", ".join(get_args(How)))
    try:
        density = float(share) if share else DENSITY
    except ValueError:
        density = 0.0
    if not 0.0 < density <= 1.0 or (share and how == "sum"):
        allowed = "above 0, at most 1, for ties, dare and magnitude"
        raise ConfigError("the share of entries that are kept", where="--how", given=text, allowed=allowed)
    return how, density  # type: ignore[return-value]


def numbers(text: str | None) -> tuple[float, ...] | None:
    """Weights as the command line has them. Raises `ConfigError` for what is no number."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError("weights are numbers with commas between", where="--weights", given=text) from error


def fuse_runs(runs: Sequence[Path], folder: Path, plan: Plan) -> dict[str, Any]:
    """Write the fused run and return what it is made of.

    Raises `ConfigError` and `CheckpointError` for runs that do not go together.
    """
    _check(runs, folder, plan)
    manifests = [_manifest(run) for run in runs]
    updates = _updates(runs, manifests)
    weights = tuple(plan.weights or [1.0] * len(runs))
    searched = None
    if plan.learn is not None:
        weights, searched = learn_weights(runs, updates, plan)
    fused, lost = _fused(updates, weights, plan)
    _write(folder, runs, manifests, fused, {"how": plan.how, "weights": list(weights), "lost": lost})
    ranks = sorted({len(f.a_RI) for f in fused.values()})
    return {
        "path": str(folder),
        "weights": list(weights),
        "ranks": ranks,
        "lost": lost,
        "search": searched,
    }


def learn_weights(
    runs: Sequence[Path], updates: Sequence[dict[str, Factors]], plan: Plan
) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Weights of the exact sum with the lowest loss on the rows of `plan.learn` (LoraHub, on true updates).

    Powell's search without derivatives within plus and minus 1.5, starting from an even share.
    """
    assert plan.learn is not None  # noqa: S101 -- for the type checker
    task = load(plan.learn).spec
    base = running.load(parse(_manifest(runs[0])["spec"], str(runs[0])).model)
    data = running.tokenise(task, running.read_splits(task), base)
    names = sorted(set().union(*updates))
    spec = _spec_for(names, {name: sum(len(u[name].a_RI) for u in updates if name in u) for name in names})
    method = Lora(base.model, spec)
    policy = Policy(base, method)
    objective = OBJECTIVES[task.objective.kind](task.objective)
    budget = running.budget_of(task, base)
    losses: list[float] = []

    def loss(weights: np.ndarray) -> float:
        _set(method, {name: _sum(updates, weights.tolist(), name) for name in names})
        batches = pack_in_slices(data.train.examples, budget, device=policy.device)
        losses.append(mean_loss(policy, objective, batches))
        return losses[-1] + PENALTY * float(np.abs(weights).mean())

    start = np.full(len(runs), 1.0 / len(runs))
    found = minimize(
        loss, start, method="Powell", bounds=[(-BOUND, BOUND)] * len(runs), options={"maxfev": ROUNDS, "ftol": 1e-3}
    )
    return tuple(float(w) for w in found.x), {"evaluations": len(losses), "first": losses[0], "best": min(losses)}


def _check(runs: Sequence[Path], folder: Path, plan: Plan) -> None:
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


def _updates(runs: Sequence[Path], manifests: Sequence[dict[str, Any]]) -> list[dict[str, Factors]]:
    """The updates of each run by module: of adapters as they are, of full runs their difference to the base."""
    bases = [manifest["fingerprints"]["base"] for manifest in manifests]
    for run, base in zip(runs, bases, strict=True):
        if base != bases[0]:
            raise CheckpointError(
                "these runs stand on different bases",
                where=str(run),
                given=base[:16],
                allowed=f"{bases[0][:16]}, the base of {runs[0]}",
            )
    return [_update(run, manifest) for run, manifest in zip(runs, manifests, strict=True)]


def _update(run: Path, manifest: dict[str, Any]) -> dict[str, Factors]:
    if (run / "adapter").is_dir():
        config = json.loads((run / "adapter" / "adapter_config.json").read_text())
        file = run / "adapter" / "adapter_model.safetensors"
        return factors_of(load_file(file), config, str(run))
    spec = parse(manifest["spec"], str(run / "run.json"))
    base = dict(load_base(spec.model).model.named_parameters())
    tuned = {k: v for file in sorted((run / "model").glob("*.safetensors")) for k, v in load_file(file).items()}
    found = {}
    for name, value in tuned.items():
        module = name.removesuffix(".weight")
        if value.dim() != 2 or layer_number(f"{module}.") is None or not roles_of(module):
            if not torch.equal(value.float(), base[name].detach().float()):
                raise CheckpointError(
                    "a run that moved more than the linears of the layers has no LoRA that is equal to it",
                    where=str(run),
                    given=name,
                )
            continue
        difference = value.float() - base[name].detach().float()
        found[module] = Factors(difference, torch.eye(difference.shape[1]))
    return found


def _fused(
    updates: Sequence[dict[str, Factors]], weights: Sequence[float], plan: Plan
) -> tuple[dict[str, Factors], float]:
    """The fused factors by module, and the share of the whole update's norm that the stated rank lost."""
    generator = torch.Generator().manual_seed(plan.seed)
    fused: dict[str, Factors] = {}
    squares = whole = 0.0
    for name in sorted(set().union(*updates)):
        own = [(w, u[name]) for w, u in zip(weights, updates, strict=True) if name in u]
        ranks = [min(*f.b_OR.shape, len(f.a_RI)) for _, f in own]
        exact = _sum(updates, weights, name)
        if plan.how == "sum" and plan.rank is None and len(exact.a_RI) <= min(len(exact.b_OR), exact.a_RI.shape[1]):
            fused[name] = exact
            continue
        rank = plan.rank or (sum(ranks) if plan.how == "sum" else max(ranks))
        if plan.how == "sum":
            found, size = recompressed(exact, rank), float(exact.dense.norm())
        else:
            dense: Tensor = combined(
                [f.dense for _, f in own], [w for w, _ in own], plan.how, density=plan.density, generator=generator
            )
            found, size = reduced(dense, rank), float(dense.norm())
        fused[name] = found.factors
        squares, whole = squares + (found.lost * size) ** 2, whole + size**2
    return fused, math.sqrt(squares / whole) if whole else 0.0


def _spec_for(names: Sequence[str], ranks: dict[str, int]) -> LoraSpec:
    """A spec whose targets are at least these modules; others of the same roles and layers stay zero."""
    roles = sorted({roles_of(name)[0] for name in names})
    layers = sorted({number for name in names if (number := layer_number(f"{name}.")) is not None})
    most = max(ranks.values())
    others = {f"{layer_number(f'{n}.')}.{roles_of(n)[0]}": rank for n, rank in ranks.items() if rank != most}
    return LoraSpec(rank=most, ranks=others, alpha=None, targets=tuple(roles), layers=tuple(layers))


def _sum(updates: Sequence[dict[str, Factors]], weights: Sequence[float], name: str) -> Factors:
    own = [(w, u[name]) for w, u in zip(weights, updates, strict=True) if name in u]
    return concatenated([f for _, f in own], [w for w, _ in own])


@torch.no_grad()
def _set(method: Lora, fused: dict[str, Factors]) -> None:
    """Put factors into a LoRA, its scale taken out of B; modules without any stay zero."""
    for name, (b, a) in fused.items():
        layer: Any = method.model.get_submodule(name)
        layer.lora_A[OWN].weight.copy_(a)
        layer.lora_B[OWN].weight.copy_(b / layer.scaling[OWN])


def _write(
    folder: Path,
    runs: Sequence[Path],
    manifests: Sequence[dict[str, Any]],
    fused: dict[str, Factors],
    made: dict[str, Any],
) -> None:
    """A run folder like any other, its adapter checked by loading it."""
    first = parse(manifests[0]["spec"], str(runs[0] / "run.json"))
    base = running.load(first.model)
    spec = _spec_for(list(fused), {name: len(f.a_RI) for name, f in fused.items()})
    method = Lora(base.model, spec)
    _set(method, fused)
    chat = Chat(load_tokenizer(ModelSpec(name=str(runs[0]))))  # the template the first was trained with

    def fill(aside: Path) -> None:
        method.save(aside)
        write_text_side(aside, chat)
        write_origin(aside, chat, base)

    folder.mkdir(parents=True)
    try:
        write_folder(folder / "adapter", fill)
        whole: RunSpec = first.model_copy(update={"method": spec, "output": str(folder)})
        manifest = {
            "status": "finished",
            "spec": whole.model_dump(mode="json"),
            "fingerprints": manifests[0]["fingerprints"],
            "gates": [],
            "versions": versions(),
            "fused_from": [str(run) for run in runs],
            "fused": made,
        }
        write_json(folder / "run.json", manifest)
    except BaseException:
        shutil.rmtree(folder)
        raise
