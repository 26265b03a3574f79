"""Checkpoints: weights, moments, generators, what a reference gave. safetensors and JSON only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rung.whole import verify, write_folder


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; what is passed over is told to `warn`."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        if problem := verify(candidate):
            warn(f"checkpoint {candidate.name} passed over: {problem}")
            continue
        return candidate
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` numbered checkpoints."""
    for old in sorted(folder.glob("step-*"), reverse=True)[keep:]:
        shutil.rmtree(old)


REFERENCE = "reference.safetensors"


def write_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    known: Mapping[int, float] | None = None,
) -> None:
    """Everything a later process needs to go on as if nothing had happened; `known` is the reference's, by document."""

    def fill(aside: Path) -> None:
        save_file({name: value.contiguous().cpu() for name, value in weights.items()}, aside / "weights.safetensors")
        save_file({**_optimiser_tensors(optimiser), "rng": torch.get_rng_state()}, aside / "optimiser.safetensors")
        (aside / "progress.json").write_text(json.dumps(dict(progress), indent=2) + "\n")
        if known:
            keys, nats = torch.tensor(list(known)), torch.tensor(list(known.values()), dtype=torch.float64)
            save_file({"documents": keys, "nats": nats}, aside / REFERENCE)

    write_folder(folder, fill)


def read_known(folder: Path) -> dict[int, float]:
    """What the reference gave documents by then; nothing where it was not asked."""
    if not (folder / REFERENCE).exists():
        return {}
    found = load_file(folder / REFERENCE)
    return dict(zip(found["documents"].tolist(), found["nats"].tolist(), strict=True))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The moving numbers of a checkpoint."""
    return load_file(folder / "weights.safetensors")


def read_checkpoint(folder: Path, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Put the optimiser's and the generator's state back; return weights and progress."""
    state = load_file(folder / "optimiser.safetensors")
    torch.set_rng_state(state.pop("rng"))
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            optimiser.state[parameter] = {}
    parameters = _numbered(optimiser)
    for key, value in state.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        if name == "step":  # torch counts in a float tensor, bitsandbytes in a plain number
            optimiser.state[parameter][name] = int(value) if value.dtype is torch.int64 else value
        else:
            optimiser.state[parameter][name] = value.to(parameter.device)
    return read_weights(folder), json.loads((folder / "progress.json").read_text())


def _optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": torch.as_tensor(value).detach().contiguous().cpu()
        for number, parameter in enumerate(_numbered(optimiser))
        for name, value in optimiser.state.get(parameter, {}).items()
    }


def _numbered(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]
