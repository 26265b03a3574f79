"""Composes a `RunConfig` into objects and starts it: the only place that sees both tables."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rung.config.io import config_to_dict
from rung.config.run import RunConfig
from rung.config.support import TESTED_MODELS, UNTESTED_DEVICES
from rung.console import Interrupted, print_status, status
from rung.data.chat import ChatTemplate
from rung.data.tokenize import PromptDataset
from rung.errors import CheckpointError, DataError, RungError
from rung.evaluation.reward_model import score_reward_model
from rung.files import find_damage, is_run_folder, write_folder
from rung.methods.protocol import Method
from rung.methods.registry import attach_method
from rung.models.base_model import BaseModel
from rung.models.fused_modules import unfused_linears
from rung.models.policy import Policy
from rung.models.targets import coverage
from rung.objectives.protocol import Objective
from rung.objectives.registry import make_objective
from rung.objectives.reward import RewardObjective
from rung.planning.advise import assumed_micro_batch, auxiliary_shapes
from rung.planning.memory import estimate_memory, tokens_per_micro_batch
from rung.runs import checks
from rung.runs.artifact import pad_token_outside_stops, write_origin, write_tokenizer_files
from rung.runs.auxiliary_models import AuxiliaryModels, load_auxiliary_models, make_reward_function
from rung.runs.checks import check_lottery, check_processes, check_tasks
from rung.runs.dataset import RunData, read_splits, tokenize_splits
from rung.runs.load import device, load_base_on_device
from rung.runs.reward_head import write_score_head
from rung.training import gates
from rung.training.distributed import SINGLE_PROCESS, World
from rung.training.micro_batch import measure_micro_batch_tokens, try_longest
from rung.training.rollout import RewardFunction, RolloutSource
from rung.training.run_folder import (
    NOT_FINITE_FILE,
    Gate,
    RunFolder,
    StopCheck,
    never_stop,
    peak_memory_bytes,
    progress_summary,
    read_manifest,
    reset_peak_memory,
    versions,
)
from rung.training.step import CalibrationBatch
from rung.training.trainer import Trainer

PROBE_DOCUMENTS = 4
"""Training documents that the step-0 gates look at: the shortest, which cost nothing."""


def train_run(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    beyond_memory: bool = False,
    world: World = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Train one run into its folder and return its manifest.

    Nothing is written before data and model have proved usable. `beyond_memory` starts what the plan says does not fit.
    Raises `RungError`s, and `Interrupted` when stopped.
    """
    output = Path(config.output)

    def finished() -> dict[str, Any] | None:
        RunFolder.check(output, config_to_dict(config), resume=resume, overwrite=overwrite)
        there = read_manifest(output) if resume and is_run_folder(output) else {}
        return there if there.get("status") == "finished" else None

    done: dict[str, Any] | None = world.on_rank0(finished)
    if done is not None:
        return done
    splits = read_splits(config)
    if world.size == 1:
        checks.refuse_if_too_large(config, device(), beyond=beyond_memory)
    base = load_base_on_device(config.model)
    data = world.rank0_first(lambda: tokenize_splits(config, splits, base))  # the other processes find it in the cache
    _, folder = train_on_data(
        config, base, data, resume=resume, overwrite=overwrite, beyond_memory=beyond_memory, world=world
    )
    world.barrier()
    return folder.manifest


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Everything up to the first step: data, model, preflight; writes nothing."""
    splits = read_splits(config)
    base = load_base_on_device(config.model)
    data = tokenize_splits(config, splits, base)
    check_tasks(config, data)
    check_lottery(config, len(data.train.rows))
    models = load_auxiliary_models(config, base, data.chat)
    shape, method = base.shape, attach_method(base.model, config.method, seed=config.seed, fused=config.model.fused)
    heads = _objective(config, Policy(base, method), models).trainable().values()
    rollout = config.objective.rollout
    steps_per_epoch = -(-len(data.train.rows) // config.training.examples_per_step) * (rollout.steps if rollout else 1)
    plan = estimate_memory(config, shape, assumed_micro_batch(config, shape, None), auxiliary_shapes(config))
    return {
        **data.summary(),
        "steps_per_epoch": steps_per_epoch,
        "tokens_per_micro_batch": micro_batch_tokens(config, base),
        "trainable_parameters": method.declared_parameters() + sum(p.numel() for p in heads),
        "learning_rate": config.learning_rate,
        "plan": plan.to_json(),
    }


def train_on_data(
    config: RunConfig,
    base: BaseModel,
    data: RunData,
    *,
    resume: bool = False,
    overwrite: bool = False,
    beyond_memory: bool = False,
    world: World = SINGLE_PROCESS,
    stop_check: StopCheck = never_stop,
) -> tuple[Policy, RunFolder]:
    """Train on data already read; the policy comes back in eval mode with the run's final weights.

    `stop_check` is given every validation loss, and returns why the run should end there, or None.
    """
    shape = base.shape
    check_processes(config, world)
    # first: data or a method that cannot be leave no folder behind
    check_tasks(config, data)
    check_lottery(config, len(data.train.rows))
    models = load_auxiliary_models(config, base, data.chat)
    method = attach_method(base.model, config.method, seed=config.seed, fused=config.model.fused)
    policy = Policy(base, method, models.reference)
    with closing(_claim_folder(config, world, resume=resume, overwrite=overwrite)) as folder:
        trainer = _trainer(config, policy, data, folder, models, world, stop_check)
        try:
            plan = checks.plan_run(config, shape, trainer, data, beyond=beyond_memory) if world.size == 1 else None
        except RungError as error:
            folder.update(status="failed", error=str(error))
            raise
        loading = peak_memory_bytes()
        _train(config, trainer, data, folder, resume=resume)
        if plan is not None:
            folder.update(plan=checks.measured_vs_planned(config, shape, plan, folder.manifest, loading))
    return policy, folder


def _claim_folder(config: RunConfig, world: World, *, resume: bool, overwrite: bool) -> RunFolder:
    """The run's folder, which one process writes."""
    path, claimed = Path(config.output), list[RunFolder]()

    def claim() -> dict[str, Any]:
        claimed.append(RunFolder.acquire(path, config_to_dict(config), resume=resume, overwrite=overwrite))
        return claimed[0].manifest

    manifest = world.on_rank0(claim)
    return claimed[0] if claimed else RunFolder(path, manifest, writes=False)


def _trainer(
    config: RunConfig,
    policy: Policy,
    data: RunData,
    folder: RunFolder,
    models: AuxiliaryModels,
    world: World,
    stop_check: StopCheck,
) -> Trainer:
    """The loop with all that it needs; the folder says what it stands on."""
    method: Method = policy.method  # type: ignore[assignment]
    objective = _objective(config, policy, models)
    if not objective.reads_head:
        method.freeze_output_head()
    _record_start(config, policy, data, folder, models, world)
    return Trainer(
        policy,
        method,
        objective=objective,
        config=config.training,
        peak_rate=config.learning_rate,
        budget=micro_batch_tokens(config, policy.base),
        seed=config.seed,
        folder=folder,
        rollouts=_rollouts(config, policy, objective, data, models),
        world=world,
        in_parts=config.model.sharded and world.size > 1,
        stop_check=stop_check,
    )


def _train(config: RunConfig, trainer: Trainer, data: RunData, folder: RunFolder, *, resume: bool) -> None:
    """Gates, steps, files: all that happens in the run's folder."""
    policy, method, objective, world = trainer.policy, trainer.method, trainer.objective, trainer.world
    try:
        _calibrate(trainer, data, folder, resume=resume)
        if not (resume and trainer.restore()):
            folder.trim_log(0)
            _pass_gates(policy, method, trainer, data, folder)
        _resolve_micro_batch_tokens(trainer, data)
        if trainer.progress.step == 0:
            _try_longest(trainer, data, folder)
            torch.manual_seed(config.seed)  # of dropout: a resumed run goes on with the state it saved
        reset_peak_memory()
        trainer.run(data.train.rows, data.validation.rows if data.validation else ())
        folder.update(**progress_summary(trainer.progress, trainer.trainable), **method.statistics())
        trainer.optimizer_state.release()
        trainer.gather_model()
        if world.is_rank0:
            _save_artifact(folder, trainer, data.chat)
        if world.is_rank0 and isinstance(objective, RewardObjective) and data.validation:
            health = score_reward_model(policy, objective, data.validation.examples, trainer.budget)
            folder.update(reward=health.to_json())
            print_status(str(health))
    except Interrupted:
        folder.update(status="interrupted", **progress_summary(trainer.progress, trainer.trainable))
        print_status(f"saved after step {trainer.progress.step} in {folder.path}; --resume continues from there")
        raise
    except RungError as error:
        folder.update(status="failed", error=str(error))
        raise
    folder.update(status="finished", metrics={"validation_loss": trainer.progress.validation})


def _objective(config: RunConfig, policy: Policy, models: AuxiliaryModels) -> Objective:
    """What is minimized, with the models and heads that it computes with."""
    objective = make_objective(config.objective, models.objective)
    objective.begin(policy, config.seed)
    return objective


def _record_start(
    config: RunConfig, policy: Policy, data: RunData, folder: RunFolder, models: AuxiliaryModels, world: World
) -> None:
    """Say what the run stands on. Raises `CheckpointError` where that is not what it began with."""
    alone = _report_unusual(policy, policy.method, config)  # type: ignore[arg-type]
    fingerprints = {**models.fingerprints, **_fingerprints(policy.base, data)}
    world.assert_equal({**fingerprints, "versions": versions()})
    begun = folder.manifest.get("fingerprints", fingerprints)
    if changed := [name for name, value in fingerprints.items() if begun.get(name) != value]:
        what = f"what this run began with has changed: its {' and '.join(changed)}"
        raise CheckpointError(what, where=config.output, hint="start anew with --overwrite")
    for told in ("error", "not_finite"):  # of an end that this run goes on from
        folder.manifest.pop(told, None)
    if folder.writes:
        (folder.path / NOT_FINITE_FILE).unlink(missing_ok=True)
    folder.update(
        status="running",
        fingerprints=fingerprints,
        data=data.summary(),
        device=policy.device.type,
        compute_dtype=str(policy.base.compute_dtype).removeprefix("torch."),
        learning_rate=config.learning_rate,
        not_fused=alone,
        moves=coverage(policy.model, policy.method.trainable()),  # type: ignore[attr-defined]
        processes=world.size,
    )


def _rollouts(
    config: RunConfig, policy: Policy, objective: Objective, data: RunData, models: AuxiliaryModels
) -> RolloutSource | None:
    """How the policy answers and who says what that is worth, for objectives that learn from it."""
    if objective.rollout is None:
        return None
    worth, own, held, budget = (
        models.reward_source,
        data.train,
        data.validation,
        micro_batch_tokens(config, policy.base),
    )
    judges: list[RewardFunction | None] = [None, None]
    if worth is not None and isinstance(own, PromptDataset):
        parts = (own, held if isinstance(held, PromptDataset) else own)
        judges = [make_reward_function(worth, data.chat, part, budget) for part in parts]
    return RolloutSource(
        policy,
        objective,
        objective.rollout,
        stop_ids=data.chat.stop_ids,
        train=judges[0],
        validation=judges[1],
        seed=config.seed,
        budget=budget,
    )


def _pass_gates(policy: Policy, method: Method, trainer: Trainer, data: RunData, folder: RunFolder) -> None:
    """Gates 1 and 2; each is recorded before it is enforced."""
    folder.gate(Gate("preflight", "passed", data.preflight.to_json(), "0 failing rows"))
    print_status(f"gate preflight: passed ({data.preflight.failing} of {data.preflight.rows} rows failing; limit 0)")
    shortest = np.argsort(data.train.lengths, kind="stable")[:PROBE_DOCUMENTS]
    probe = [data.train.examples[int(i)] for i in shortest]
    if not probe:
        raise DataError("no training rows are left", hint="look at the counts of: rung data check")
    heads = sum(p.numel() for p in trainer.objective.trainable().values())
    found = [
        gates.check_trainable(method, trainer.optimizer_state.optimizer, heads),
        gates.check_identity(policy, method, probe),
        gates.check_reference(policy, method, probe),
        gates.check_packing(policy, probe),
        gates.check_fused(policy, probe),
        gates.check_decoding(policy, probe),
    ]
    for gate in found:
        if gate is not None:
            folder.gate(gate)
            print_status(str(gate))
            gates.enforce(gate)


def _report_unusual(policy: Policy, method: Method, config: RunConfig) -> int:
    """A shape or a device without proof behind it; how many adapted linears are not computed by our functions."""
    if (shape := policy.model.config.model_type) not in TESTED_MODELS:
        print_status(f"{shape} is not among the architectures proved by a test; the step-0 gates decide")
    if said := UNTESTED_DEVICES.get(policy.device.type):
        print_status(f"{policy.device.type}: {said}")
    alone = unfused_linears(policy.model, method.linear_params) if config.model.fused else []
    if alone:
        why = "dropout, DoRA, a quantized base, a tuner of peft's"
        print_status(f"{len(alone)} adapted linears compute through peft's own forward ({why}): slower, same result")
    return len(alone)


def _calibrate(trainer: Trainer, data: RunData, folder: RunFolder, *, resume: bool) -> None:
    """A start that is read off weights or data is kept in the run folder: a resume takes up the very same."""
    method, start = trainer.method, folder.path / "start"
    if not method.sample_size:
        return
    again = trainer.world.on_rank0(lambda: resume and start.is_dir())
    if not trainer.world.is_rank0:
        trainer.world.barrier()  # until it is written, as it is for a resume
        again = True
    rows = data.train.rows
    order = np.random.default_rng([trainer.seed, 3]).permutation(len(rows))[: method.sample_size]
    examples = [e for i in order for e in rows[int(i)]]
    sample = CalibrationBatch(trainer.policy, trainer.objective, examples, trainer.budget)
    if again and (problem := find_damage(start)):
        raise CheckpointError(f"the run's start cannot be used: {problem}", where=str(start))
    with status("reading the start off the base"):
        method.calibrate(sample, start if again else None)
    if not again:
        write_folder(start, method.save)
    if trainer.world.is_rank0:
        trainer.world.barrier()


def _save_artifact(folder: RunFolder, trainer: Trainer, chat: ChatTemplate) -> None:
    """Gate 4: the artifact with everything serving needs, whole or not at all."""

    def fill(aside: Path) -> None:
        trainer.method.save(aside)
        pad = None
        if (head := trainer.objective.published_head()) is not None:
            pad = pad_token_outside_stops(chat)
            write_score_head(aside, head, pad)
        write_tokenizer_files(aside, chat, pad)
        write_origin(aside, chat, trainer.policy.base)

    write_folder(folder.path / trainer.method.artifact, fill)
    gate = Gate("save", "passed", "every tensor finite and not empty, hashes in manifest.json", "all")
    folder.gate(gate)
    print_status(str(gate))


def _resolve_micro_batch_tokens(trainer: Trainer, data: RunData) -> None:
    """A run keeps the micro-batch it began with: sums in another order would not be the same bits."""
    recorded = trainer.folder.manifest.get("tokens_per_micro_batch")
    if recorded is not None:
        trainer.set_budget(recorded)
    elif trainer.config.tokens_per_micro_batch == "probe":
        with status("measuring micro-batches"):
            tokens = measure_micro_batch_tokens(trainer.policy, trainer.objective, data.train.examples, trainer.pack)
        trainer.set_budget(trainer.world.gather(tokens)[0])  # every process measures, and they might not agree
        print_status(f"{trainer.budget} tokens a micro-batch")
    trainer.folder.update(tokens_per_micro_batch=trainer.budget)


def _try_longest(trainer: Trainer, data: RunData, folder: RunFolder) -> None:
    """Gate 2, last: rows of the data, which may be longer than all that a first step happens to hold."""
    if isinstance(data.train, PromptDataset):
        return
    row = data.train.longest_row()
    seconds = try_longest(trainer.policy, trainer.method, trainer.objective, row, trainer.pack, trainer.budget)
    gate = Gate("step0.longest", "passed", f"{max(map(len, row)):,} tokens in {seconds:.1f} s", "memory")
    folder.gate(gate)
    print_status(str(gate))


def micro_batch_tokens(config: RunConfig, base: BaseModel) -> int:
    """Tokens computed at once, as far as the config and the base decide it."""
    given = config.training.tokens_per_micro_batch
    return given if isinstance(given, int) else tokens_per_micro_batch(base.shape, device().type)


def _fingerprints(base: BaseModel, data: RunData) -> dict[str, str]:
    return {
        "base": base.fingerprint,
        "data": data.splits.fingerprint,
        "text": hashlib.sha256(data.chat.identity().encode()).hexdigest(),
    }
