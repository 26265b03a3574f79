"""The models that a server offers: runs and bases by name, adapters of one base on the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rung.config.model import ComputeType, ModelConfig
from rung.errors import ConfigError, PlanError
from rung.evaluation.reward_model import RewardScorer
from rung.models.base_model import BaseModel
from rung.runs.load import (
    LoadedRun,
    config_of_run,
    load_base_on_device,
    open_base,
    open_reward_model,
    open_run,
    open_target,
    share_base_if_same,
    target_kind,
)

Bases = list[tuple[ModelConfig, BaseModel]]
"""Bases that are in memory, with the settings under which they were loaded."""


@dataclass(frozen=True)
class ServedModel:
    """A model with the name by which requests choose it."""

    name: str
    model: LoadedRun
    stop_texts: tuple[str, ...] = ()
    """Texts that end every answer: `evaluation.stop` of the run."""
    scorer: RewardScorer | None = None
    """For a reward model, which gives scores and writes nothing."""


def model_names(targets: Sequence[str]) -> dict[str, str]:
    """Targets by the name of each model: that of its folder or file, of a base the one that was given.

    Raises `ConfigError` for two models of one name.
    """
    names = [_name(target) for target in targets]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        hint = "the name of a run is that of its folder, of a GGUF file the file's"
        raise ConfigError("two models have one name", given=", ".join(repeated), hint=hint)
    return dict(zip(names, targets, strict=True))


def is_gguf_file(target: str) -> bool:
    """Whether llama.cpp serves this target."""
    return target_kind(target) == "base" and Path(target).suffix.lower() == ".gguf"


def open_models(targets: Mapping[str, str], dtype: ComputeType = "auto") -> dict[str, ServedModel]:
    """Open runs and bases by name; `dtype` is that of the bases, a run has its own.

    Raises `ConfigError` for a server and a climb, `PlanError` for a run with tasks of its own.
    """
    bases: Bases = []
    served = {}
    for name, target in targets.items():
        if (reward := _reward_model(target, bases)) is not None:
            served[name] = ServedModel(name, *reward)
            continue
        model = _open(target, bases, dtype)
        if model.tasks:
            reason = "this run learned a prompt for each task, and a request names a model and no task"
            raise PlanError(reason, where=target, hint="rung chat and rung generate answer for a task")
        served[name] = ServedModel(name, model, tuple(model.config.evaluation.stop) if model.config else ())
    return served


def _reward_model(target: str, bases: Bases) -> tuple[LoadedRun, tuple[str, ...], RewardScorer] | None:
    run = Path(target)
    if target_kind(target) != "run" or config_of_run(run).objective.kind != "reward":
        return None
    base = _base_for(run, bases) if (run / "adapter").is_dir() else None
    policy, chat, objective, config = open_reward_model(run, base)
    return LoadedRun(policy, chat, config, "run"), (), RewardScorer(policy, objective)


def _name(target: str) -> str:
    if is_gguf_file(target):
        return Path(target).stem
    return Path(target).resolve().name if target_kind(target) == "run" else target


def _open(target: str, bases: Bases, dtype: ComputeType) -> LoadedRun:
    if target_kind(target) == "run" and (Path(target) / "adapter").is_dir():
        return open_run(Path(target), _base_for(Path(target), bases))
    if target_kind(target) != "base":
        return open_target(target)
    settings = ModelConfig(name=target, dtype=dtype)
    base = next((base for loaded, base in bases if loaded == settings), None)
    return open_base(settings, _loaded(settings, bases) if base is None else base.share_weights())


def _base_for(run: Path, bases: Bases) -> BaseModel:
    """The base of a run, in memory once for all that compute with it in one type."""
    settings = config_of_run(run).model
    alike = (share_base_if_same(run, base) for loaded, base in bases if loaded.dtype == settings.dtype)
    return next((base for base in alike if base is not None), None) or _loaded(settings, bases)


def _loaded(settings: ModelConfig, bases: Bases) -> BaseModel:
    """A base, and modules of its own: an adapter that is attached to one must not be seen by another."""
    bases.append((settings, load_base_on_device(settings)))
    return bases[-1][1].share_weights()
