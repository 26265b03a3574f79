"""The models that a server offers: runs and bases by name, adapters of one base on the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rung.errors import ConfigError, PlanError
from rung.evaluation.reward_model import RewardScorer
from rung.models.base_model import BaseModel
from rung.runs.load import (
    LoadedRun,
    config_of_run,
    load_base_on_device,
    open_reward_model,
    open_run,
    open_target,
    share_base_if_same,
    target_kind,
)


@dataclass(frozen=True)
class ServedModel:
    """A model with the name by which requests choose it."""

    name: str
    model: LoadedRun
    stop_texts: tuple[str, ...] = ()
    """Texts that end every answer: `evaluation.stop` of the run."""
    scorer: RewardScorer | None = None
    """For a reward model, which gives scores and writes nothing."""


def open_models(targets: Sequence[str]) -> dict[str, ServedModel]:
    """Open runs and bases. The name of a run is that of its folder, of a base the one that was given.

    Raises `ConfigError` for two models of one name, a server and a climb; `PlanError` for a run with tasks of its own.
    """
    names = [_name(target) for target in targets]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        hint = "the name of a run is that of its folder"
        raise ConfigError("two models have one name", given=", ".join(repeated), hint=hint)
    bases: list[BaseModel] = []
    served = {}
    for name, target in zip(names, targets, strict=True):
        if (reward := _reward_model(target, bases)) is not None:
            served[name] = ServedModel(name, *reward)
            continue
        model = _open(target, bases)
        if model.tasks:
            reason = "this run learned a prompt for each task, and a request names a model and no task"
            raise PlanError(reason, where=target, hint="rung chat and rung generate answer for a task")
        served[name] = ServedModel(name, model, tuple(model.config.evaluation.stop) if model.config else ())
    return served


def _reward_model(target: str, bases: list[BaseModel]) -> tuple[LoadedRun, tuple[str, ...], RewardScorer] | None:
    run = Path(target)
    if target_kind(target) != "run" or config_of_run(run).objective.kind != "reward":
        return None
    base = _base_for(run, bases) if (run / "adapter").is_dir() else None
    policy, chat, objective, config = open_reward_model(run, base)
    return LoadedRun(policy, chat, config, "run"), (), RewardScorer(policy, objective)


def _name(target: str) -> str:
    return Path(target).resolve().name if target_kind(target) == "run" else target


def _open(target: str, bases: list[BaseModel]) -> LoadedRun:
    if target_kind(target) != "run" or not (Path(target) / "adapter").is_dir():
        return open_target(target)
    return open_run(Path(target), _base_for(Path(target), bases))


def _base_for(run: Path, bases: list[BaseModel]) -> BaseModel:
    """Modules of its own for each run: an adapter that is attached to one must not be seen by another."""
    if (shared := _shared(run, bases)) is not None:
        return shared
    bases.append(load_base_on_device(config_of_run(run).model))
    return bases[-1].share_weights()


def _shared(run: Path, bases: Iterable[BaseModel]) -> BaseModel | None:
    return next((shared for base in bases if (shared := share_base_if_same(run, base)) is not None), None)
