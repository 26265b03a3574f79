"""The search for settings of a tuned rung: trials on the validation split, stopped early by successive halving.

Trials are drawn by optuna's TPE (Bergstra et al. 2011) and pruned by asynchronous successive halving (Li et al. 2020);
the test split is never read. One trial trains at a time, so halving saves training time and not memory. optuna's
journal in the rung's search folder holds every trial and makes a stopped search resumable. `climb.py` calls
`search_settings` once for each tuned rung; optuna is imported only when a search runs.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rung.config.climb import RungConfig, SearchConfig
from rung.config.run import RunConfig
from rung.console import print_status
from rung.errors import ConfigError, GateError, PlanError
from rung.runs.checks import DoesNotFitError
from rung.training.run_folder import StopCheck, read_json, total_steps, write_json

if TYPE_CHECKING:
    import optuna

VALIDATIONS_PER_TRIAL = 9
"""Measurements of the validation loss in a trial, or a few more: with a reduction factor of 3 trials can be pruned at
the first, third and ninth."""
TrainFunction = Callable[[RunConfig, StopCheck], None]
"""Trains a run into its folder and calls the `StopCheck` with every validation loss."""


def search_settings(
    config: RunConfig, search: SearchConfig, rung: RungConfig, folder: Path, rows: int, train: TrainFunction
) -> RungConfig:
    """The rung with the settings of the best trial; `config` is its run, `folder` its folder, `rows` its training rows.

    Trials are kept in `search.journal`: a stopped climb repeats the interrupted trial and chooses what an uninterrupted
    one chooses. All results are in `search.json`. Raises `ConfigError` if no trial was completed.
    """
    # A search over ranks alone leaves a method without a rank nothing to try.
    if not _search_ranges(search, config):
        return rung
    journal = folder / "search.journal"
    folder.mkdir(parents=True, exist_ok=True)
    study = _study(journal, search)
    # Finished and not started ones are counted, so that an interrupted trial does not use up the number of trials.
    while sum(trial.state.is_finished() for trial in study.trials) < search.trials:
        trial = _next_trial(study, search, config.seed)
        settings = _sample_settings(trial, search, config)
        description = ", ".join(f"{name} {value:.3g}" for name, value in settings.items())
        print_status(f"search {trial.number + 1}/{search.trials} of rung {rung.label}: {description}")
        _run_trial(study, trial, _trial_config(config, settings, folder / "trial", rows), train)
    result = _search_result(study)
    if result["chosen"] is None:
        summary = "no trial of the search came to an end"
        raise ConfigError(summary, where="climb.search", given=f"{search.trials} trials")
    write_json(folder / "search.json", result)
    return apply_settings(rung, result["chosen"])


def apply_settings(rung: RungConfig, settings: Mapping[str, Any]) -> RungConfig:
    """The rung with the settings of a trial in its `method` and `training`."""
    method = {**rung.method, **({"rank": settings["rank"]} if "rank" in settings else {})}
    training = {**rung.training, **{name: settings[name] for name in ("learning_rate", "epochs") if name in settings}}
    return rung.model_copy(update={"method": method, "training": training})


def read_search_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished search in this folder; None if there is none."""
    file = folder / "search.json"
    return read_json(file) if file.exists() else None


def _study(journal: Path, search: SearchConfig) -> optuna.Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=search.reduction_factor)
    return optuna.create_study(study_name="search", storage=storage, pruner=pruner, load_if_exists=True)


def _next_trial(study: optuna.Study, search: SearchConfig, seed: int) -> optuna.Trial:
    """The trial that was interrupted, or a new one; its draws depend only on its number and the trials before it."""
    import optuna

    unfinished_trials = [trial for trial in study.trials if not trial.state.is_finished()]
    number = unfinished_trials[0].number if unfinished_trials else len(study.trials)
    sampler_seed = int(np.random.SeedSequence([seed, 9, number]).generate_state(1)[0])
    # A sampler of its own for each trial: with one generator for the study, a resumed search would draw other settings.
    # Half of the trials are random, since TPE needs results to model.
    study.sampler = optuna.samplers.TPESampler(seed=sampler_seed, n_startup_trials=max(2, search.trials // 2))
    # optuna has no public way to take up a trial that is still running.
    return optuna.Trial(study, unfinished_trials[0]._trial_id) if unfinished_trials else study.ask()


def _run_trial(study: optuna.Study, trial: optuna.Trial, config: RunConfig, train: TrainFunction) -> None:
    """Train one trial until it is complete, or until others did better at the same measurement."""
    from optuna.trial import TrialState

    # After a kill the folder holds part of this trial, which is trained from the start.
    shutil.rmtree(config.output, ignore_errors=True)
    losses: list[float] = []
    stop_reasons: list[str] = []

    def check_loss(loss: float) -> str | None:
        losses.append(loss)
        if not math.isfinite(loss):
            stop_reasons.append("the validation loss is no number")
        else:
            trial.report(loss, len(losses))
            if trial.should_prune():
                stop_reasons.append("other settings did better by then")
        return stop_reasons[-1] if stop_reasons else None

    start = time.perf_counter()
    try:
        train(config, check_loss)
    except DoesNotFitError:
        # A rung that does not fit is skipped by the climb; more trials would not change that.
        raise
    except (GateError, PlanError) as error:
        # A rate that diverges or a rank that is not supported is a bad trial, and others may be good.
        print_status(f"this trial failed: {error.summary}")
        stop_reasons.append("failed")
    finally:
        # The time before an interruption was spent as well.
        seconds = trial.user_attrs.get("seconds", 0.0) + time.perf_counter() - start
        trial.set_user_attr("seconds", round(seconds, 3))
        shutil.rmtree(config.output, ignore_errors=True)
    # FAIL and not PRUNED: TPE learns from the losses of pruned trials, but not from failed ones.
    # A run too short for one validation has no loss to compare and cannot be chosen.
    state = TrialState.PRUNED if stop_reasons or not losses else TrialState.COMPLETE
    if stop_reasons == ["failed"]:
        state = TrialState.FAIL
    study.tell(trial, losses[-1] if state is TrialState.COMPLETE else None, state=state)


def _search_ranges(search: SearchConfig, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Lowest and highest value of each setting that is searched for this method."""
    rank = search.rank if config.method.adapter_rank is not None else None
    ranges = {"rank": rank, "learning_rate": search.learning_rate, "epochs": search.epochs}
    return {name: limits for name, limits in ranges.items() if limits}


def _sample_settings(trial: optuna.Trial, search: SearchConfig, config: RunConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, limits in _search_ranges(search, config).items():
        suggest = trial.suggest_int if name == "rank" else trial.suggest_float
        settings[name] = suggest(name, *limits, log=name != "epochs")
    return settings


def _trial_config(config: RunConfig, settings: Mapping[str, Any], folder: Path, rows: int) -> RunConfig:
    """The run of the rung with a trial's settings, validated often enough for successive halving."""
    method = config.method.model_copy(update={"rank": settings["rank"]}) if "rank" in settings else config.method
    training = config.training.model_copy(update={name: value for name, value in settings.items() if name != "rank"})
    rollout = config.objective.rollout
    eval_every = max(1, total_steps(training, rows, rollout.steps if rollout else 1) // VALIDATIONS_PER_TRIAL)
    # No early stopping, which would compete with the pruner, and no checkpoints: a trial is repeated, not resumed.
    training = training.model_copy(update={"eval_every": eval_every, "patience": None, "checkpoint_every": None})
    return config.model_copy(update={"method": method, "training": training, "output": str(folder)})


def _search_result(study: optuna.Study) -> dict[str, Any]:
    """All trials, and the settings of the best completed one."""
    from optuna.trial import TrialState

    trials = []
    for trial in study.trials:
        losses = [loss for _, loss in sorted(trial.intermediate_values.items())]
        facts = {"state": trial.state.name.lower(), "seconds": trial.user_attrs.get("seconds", 0.0)}
        trials.append({**trial.params, **facts, "validation_losses": losses})
    complete_trials = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    best = min(complete_trials, key=lambda trial: (trial.value, trial.number), default=None)
    return {"split": "validation", "trials": trials, "chosen": None if best is None else best.params}
