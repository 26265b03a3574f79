"""Training one run: composes a `RunConfig` into objects, passes the gates, trains and saves.

The only place that knows both the table of methods and the table of objectives, so that neither has to know the other.
Every step that can refuse a run comes before the folder is written or the first step is taken. `commands/train.py`
calls `train_run`; the climb, whose rungs share their data, calls `train_on_data`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rung.config.io import config_to_dict
from rung.config.objective import FunctionRewardConfig
from rung.config.run import RunConfig
from rung.config.support import TESTED_MODELS, UNTESTED_DEVICES
from rung.console import Interrupted, print_status, status
from rung.data.chat import ChatTemplate
from rung.data.tokenize import PromptDataset
from rung.errors import CheckpointError, DataError, NoSignalError
from rung.evaluation.reward_model import score_reward_model
from rung.files import find_damage, is_run_folder, write_folder
from rung.methods.protocol import Method
from rung.methods.qlora import quantized_tensors
from rung.methods.registry import attach_method
from rung.models.base_model import BaseModel
from rung.models.fused_modules import unfused_linears
from rung.models.policy import Policy
from rung.models.targets import coverage
from rung.models.weight_files import model_tensors, write_model
from rung.models.weight_layout import order_weights
from rung.objectives.protocol import Objective
from rung.objectives.registry import make_objective
from rung.objectives.reward import RewardObjective
from rung.planning.advise import assumed_micro_batch, auto_budget, auxiliary_shapes
from rung.planning.memory import estimate_memory
from rung.planning.recomputation import DocumentLimit, document_limit
from rung.report.formatting import format_bytes
from rung.runs import checks
from rung.runs.artifact import pad_token_outside_stops, write_origin, write_tokenizer_files
from rung.runs.auxiliary_models import AuxiliaryModels, load_auxiliary_models, reward_function, validation_source
from rung.runs.dataset import RunData, read_splits
from rung.runs.judge import JudgeScorer
from rung.runs.load import device, hardware_fingerprints, keep_arithmetic, load_base_to_train, settle_arithmetic
from rung.runs.reward_head import write_score_head
from rung.runs.server import MOVABLE_SETTINGS, check_servers, rollout_sampler
from rung.runs.teacher import tokenize_run
from rung.training import checkpoint, gates
from rung.training import run_folder as folders
from rung.training.distributed import SINGLE_PROCESS, World
from rung.training.fsdp import digests, gather, shard_policy
from rung.training.memory_use import peak_memory_bytes, reset_peak_memory
from rung.training.micro_batch import measure_micro_batch_tokens, try_longest
from rung.training.rollout import RolloutSource
from rung.training.run_folder import Gate, RunFolder, StopCheck, never_stop
from rung.training.step import CalibrationBatch
from rung.training.trainer import Trainer

PROBE_DOCUMENTS = 4
"""Training documents that the step-0 gates compute with: the shortest ones, which cost little, and the longest."""


class StartMode(NamedTuple):
    """How a run starts in its folder and in the memory of the machine."""

    resume: bool = False
    overwrite: bool = False
    beyond_memory: bool = False
    """Start a run that does not fit by plan."""


NEW_RUN = StartMode()


def train_run(config: RunConfig, start: StartMode = NEW_RUN, world: World = SINGLE_PROCESS) -> dict[str, Any]:
    """Train one run into its folder and return its manifest.

    Nothing is written before data and model have proved usable. Raises `RungError`s, and `Interrupted` when stopped.
    """
    output = Path(config.output)

    def finished_manifest() -> dict[str, Any] | None:
        options: Any = {"resume": start.resume, "overwrite": start.overwrite, "free": MOVABLE_SETTINGS}
        RunFolder.check(output, config_to_dict(config), **options)
        manifest = folders.read_manifest(output) if start.resume and is_run_folder(output) else {}
        if manifest.get("status") != "finished":
            return None
        # a kill after the last step may have left a half-written report, which only the owner of the lock may remove
        RunFolder.acquire(output, config_to_dict(config), **{**options, "overwrite": False}).close()
        return manifest

    manifest: dict[str, Any] | None = world.on_rank0(finished_manifest)
    if manifest is not None:
        return manifest
    check_servers(config)
    splits = read_splits(config)
    checks.check_code_reward(config, splits)
    load_config = keep_arithmetic(config, output) if start.resume else config
    settle_arithmetic(load_config, world)
    if world.size == 1:
        checks.refuse_if_too_large(load_config, device(), beyond=start.beyond_memory)
    base = load_base_to_train(load_config, world)
    data = world.rank0_first(lambda: tokenize_run(config, splits, base))  # the other ranks read the cache
    _, folder = train_on_data(config, base, data, start, world=world)
    world.barrier()
    return folder.manifest


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Everything up to the first step: data, model, preflight. Writes nothing."""
    check_servers(config)
    splits = read_splits(config)
    checks.check_code_reward(config, splits)
    base = load_base_to_train(config)
    data = tokenize_run(config, splits, base)
    checks.check_tasks(config, data)
    checks.check_lottery(config, len(data.train.rows))
    models = load_auxiliary_models(config, base, data)
    method = attach_method(base.model, config.method, seed=config.seed, fused=config.model.fused)
    heads = _objective(config, Policy(base, method), models).trainable().values()
    steps_per_window = config.objective.rollout.steps if config.objective.rollout else 1
    micro_batch = assumed_micro_batch(config, base.shape, checks.local_card(device()))
    plan = estimate_memory(config, base.shape, micro_batch, auxiliary_shapes(config))
    return {
        **data.summary(),
        "steps_per_epoch": -(-len(data.train.rows) // config.training.examples_per_step) * steps_per_window,
        "tokens_per_micro_batch": micro_batch_tokens(config, base),
        "trainable_parameters": method.declared_parameters() + sum(p.numel() for p in heads),
        "learning_rate": config.learning_rate,
        "plan": plan.to_json(),
    }


def train_on_data(
    config: RunConfig,
    base: BaseModel,
    data: RunData,
    start: StartMode = NEW_RUN,
    *,
    world: World = SINGLE_PROCESS,
    stop_check: StopCheck = never_stop,
) -> tuple[Policy, RunFolder]:
    """Train on tokenized data. Returns the policy in eval mode with the final weights of the run, and its folder.

    `stop_check` gets every validation loss and returns the reason to end the run there, or None.
    """
    # checks first: data or a method that cannot be used must leave no folder
    check_servers(config)
    checks.check_processes(config, world)
    checks.check_tasks(config, data)
    checks.check_lottery(config, len(data.train.rows))
    models = load_auxiliary_models(config, base, data, world)
    method = attach_method(base.model, config.method, seed=config.seed, fused=config.model.fused)
    policy = Policy(base, method, models.reference)
    if config.model.sharded and world.size > 1:
        with status("reading the rows of this process"):
            shard_policy(policy, method, fused=config.model.fused)
        world = replace(world, sharded=True)
    if world.size > 1 and config.method.kind == "qlora":
        # every process quantizes its own copy, and cards of other kinds may round otherwise
        world.assert_equal(digests(quantized_tensors(base.model)))
    order_weights(base.model)
    with closing(_acquire_folder(config, world, start)) as folder:
        trainer = _trainer(config, policy, data, folder, models, world, stop_check)
        try:
            plan = checks.plan_run(config, trainer, data, beyond=start.beyond_memory) if world.size == 1 else None
        except Exception as error:
            folder.record_failure(error)
            raise
        loading_bytes = peak_memory_bytes(policy.device)
        _train(config, trainer, data, resume=start.resume)
        if plan is not None:
            folder.update(plan=checks.measured_vs_planned(config, policy, plan, folder.manifest, loading_bytes))
    return policy, folder


def _acquire_folder(config: RunConfig, world: World, start: StartMode) -> RunFolder:
    """The locked folder of the run; ranks other than 0 get a copy of its manifest and write nothing."""
    path, folders_of_rank0 = Path(config.output), list[RunFolder]()

    def acquire() -> dict[str, Any]:
        settings, resume, overwrite = config_to_dict(config), start.resume, start.overwrite
        options: Any = {"resume": resume, "overwrite": overwrite, "free": MOVABLE_SETTINGS}
        folders_of_rank0.append(RunFolder.acquire(path, settings, **options))
        return folders_of_rank0[0].manifest

    manifest = world.on_rank0(acquire)
    return folders_of_rank0[0] if folders_of_rank0 else RunFolder(path, manifest, writes=False)


def _trainer(
    config: RunConfig,
    policy: Policy,
    data: RunData,
    folder: RunFolder,
    models: AuxiliaryModels,
    world: World,
    stop_check: StopCheck,
) -> Trainer:
    """The trainer with its objective and rollouts. The fingerprints of data and models go into the folder."""
    method: Method = policy.method  # type: ignore[assignment]
    objective = _objective(config, policy, models)
    if not objective.reads_head:
        method.freeze_output_head()
    budget, documents = _token_budget(config, policy.base, world)
    trainer = Trainer(
        policy,
        method,
        objective=objective,
        config=config.training,
        peak_rate=config.learning_rate,
        budget=budget,
        seed=config.seed,
        folder=folder,
        rollouts=_rollouts(config, policy, objective, data, models, budget, folder),
        world=world,
        stop_check=stop_check,
        document_limit=documents,
    )
    _record_start(config, trainer, data, models)
    return trainer


def _train(config: RunConfig, trainer: Trainer, data: RunData, *, resume: bool) -> None:
    """Calibrate or restore, pass the gates, take the steps and save the artifact."""
    method, objective, folder = trainer.method, trainer.objective, trainer.folder
    is_rank0 = trainer.world.is_rank0
    try:
        _calibrate(trainer, data, resume=resume)
        if not (resume and trainer.restore()):
            folder.trim_log(0)
            _pass_gates(trainer, data)
        _resolve_micro_batch_tokens(trainer, data)
        if trainer.progress.step == 0:
            _try_longest(trainer, data)
            torch.manual_seed(config.seed)  # of dropout; a resumed run continues with the state that it saved
        reset_peak_memory(trainer.policy.device)
        trainer.run(data.train.rows, data.validation.rows if data.validation else ())
        folder.update(**trainer.summary(), **method.statistics())
        trainer.optimizer_state.release()
        _save_artifact(trainer, data.chat)
        if is_rank0 and isinstance(objective, RewardObjective) and data.validation:
            health = score_reward_model(trainer.policy, objective, data.validation.examples, trainer.budget)
            folder.update(reward=health.to_json())
            print_status(str(health))
    except Interrupted:
        folder.update(status="interrupted", **trainer.summary())
        print_status(f"saved after step {trainer.progress.step} in {folder.path}; --resume continues from there")
        raise
    except NoSignalError as error:
        folder.update(status="no_signal", error=str(error), **trainer.summary())
        raise
    except KeyboardInterrupt:  # a second Ctrl-C, which does not wait for the step
        folder.update(status="interrupted")
        raise
    except Exception as error:
        folder.record_failure(error)
        raise
    if is_rank0 and config.training.checkpoint_steps is None:
        # they were for a resume alone, and the run is complete
        checkpoint.remove_old_checkpoints(trainer.checkpoints, keep=0)
    folder.update(status="finished", metrics={"validation_loss": trainer.progress.validation})


def _objective(config: RunConfig, policy: Policy, models: AuxiliaryModels) -> Objective:
    """The objective with its models and heads."""
    objective = make_objective(config.objective, models.objective)
    objective.begin(policy, config.seed)
    return objective


def _record_start(config: RunConfig, trainer: Trainer, data: RunData, models: AuxiliaryModels) -> None:
    """Write fingerprints and facts into the manifest. Raises `CheckpointError` where a resumed run had others."""
    policy, method, folder, world = trainer.policy, trainer.method, trainer.folder, trainer.world
    unfused_count = _report_unusual(policy, method, config)
    text_fingerprint = hashlib.sha256(data.chat.identity().encode()).hexdigest()
    data_fingerprints = {"base": policy.base.fingerprint, "data": data.splits.fingerprint, "text": text_fingerprint}
    hardware = hardware_fingerprints(policy.base)
    fingerprints = {**models.fingerprints, **data_fingerprints, **hardware}
    world.assert_equal({**fingerprints, "versions": folders.versions()})
    # gates do not run again at a resume: another compute type or device would train unchecked
    recorded_fingerprints = folder.manifest.get("fingerprints", fingerprints)
    changed = [name for name, value in fingerprints.items() if recorded_fingerprints.get(name) != value]
    if _is_mended_reward(config, folder, changed):
        change = {"from": recorded_fingerprints["reward"], "to": fingerprints["reward"]}
        changes = [*folder.manifest.get("reward_changes", []), change]
        print_status("the reward function has changed since it failed: later steps use the new one")
        folder.update(reward_changes=changes)
        changed = []
    if changed:
        summary = f"cannot resume: {' and '.join(changed)} changed since this run started"
        values = ((name, recorded_fingerprints.get(name), fingerprints[name]) for name in changed)
        given = "; ".join(f"{name}: {earlier} at its start, {current} now" for name, earlier, current in values)
        raise CheckpointError(summary, where=config.output, given=given, hint="start anew with --overwrite")
    for key in ("error", "not_finite"):  # of the earlier attempt that this run resumes
        folder.manifest.pop(key, None)
    if folder.writes:
        (folder.path / folders.NOT_FINITE_FILE).unlink(missing_ok=True)
    facts = {**hardware, "learning_rate": config.learning_rate}
    facts |= (
        {"judge": models.reward_source.agreement.to_json()} if isinstance(models.reward_source, JudgeScorer) else {}
    )
    facts |= {"not_fused": unfused_count, "moves": coverage(policy.model, method.trainable()), "processes": world.size}
    folder.update(status="running", fingerprints=fingerprints, data=data.summary(), **facts)


def _is_mended_reward(config: RunConfig, folder: RunFolder, changed: Sequence[str]) -> bool:
    """Whether a run that failed continues with another reward function: the failure may have been a fault in it."""
    is_function = isinstance(config.objective.reward, FunctionRewardConfig)
    return is_function and changed == ["reward"] and folder.manifest.get("status") == "failed"


def _rollouts(
    config: RunConfig,
    policy: Policy,
    objective: Objective,
    data: RunData,
    models: AuxiliaryModels,
    budget: int,
    folder: RunFolder,
) -> RolloutSource | None:
    """The source of generated answers and their rewards; None for an objective that learns from data alone."""
    if objective.rollout is None:
        return None
    source, prompts, chat = models.reward_source, data.train, data.chat
    train = validation = None
    if source is not None and isinstance(prompts, PromptDataset):
        held_out = data.validation if isinstance(data.validation, PromptDataset) else prompts
        train = reward_function(source, chat, prompts, budget)
        validation = reward_function(validation_source(source), chat, held_out, budget)
    return RolloutSource(
        *(policy, objective, objective.rollout, chat.generation_stop_ids, train, validation, config.seed, budget),
        sampler=rollout_sampler(config, policy, folder),
    )


def _pass_gates(trainer: Trainer, data: RunData) -> None:
    """Gates 1 and 2; each is recorded before it is enforced."""
    policy, method = trainer.policy, trainer.method
    trainer.folder.gate(Gate("preflight", "passed", data.preflight.to_json(), "0 failing rows"))
    print_status(f"gate preflight: passed ({data.preflight.failing} of {data.preflight.rows} rows failing; limit 0)")
    # the longest too: what depends on the length of a document shows in short ones least
    by_length = np.argsort(data.train.lengths, kind="stable")
    probe_indices = dict.fromkeys([*by_length[: PROBE_DOCUMENTS - 1].tolist(), *by_length[-1:].tolist()])
    probe = [data.train.examples[i] for i in probe_indices]
    if not probe:
        raise DataError("no training rows are left", hint="look at the counts of: rung data check")
    head_parameters = sum(p.numel() for p in trainer.objective.trainable().values())
    # Packed as the steps are, so that the gates test what trains: into several batches, so that a prefix of all of them
    # runs ahead.
    batches = trainer.pack(probe, max(max(map(len, probe)), sum(map(len, probe)) // 2))
    results = (
        gates.check_trainable(method, trainer.optimizer_state.trained_count(), head_parameters),
        gates.check_identity(policy, method, batches),
        gates.check_reference(policy, method, batches),
        gates.check_packing(policy, batches),
        gates.check_fused(policy, batches),
        gates.check_decoding(policy, probe),
    )
    for gate in filter(None, results):
        trainer.record_gate(gate)


def _report_unusual(policy: Policy, method: Method, config: RunConfig) -> int:
    """Print a line for an untested architecture or device. Returns the number of adapted linears without fusion."""
    if (model_type := policy.model.config.model_type) not in TESTED_MODELS:
        print_status(f"{model_type} is not among the architectures proved by a test; the step-0 gates decide")
    if remark := UNTESTED_DEVICES.get(policy.device.type):
        print_status(f"{policy.device.type}: {remark}")
    count = len(unfused_linears(policy.model, method.linear_params)) if config.model.fused else 0
    if count:
        causes = "dropout, DoRA, a quantized base, a tuner of peft's"
        print_status(f"{count} adapted linears compute through peft's own forward ({causes}): slower, same result")
    return count


def _calibrate(trainer: Trainer, data: RunData, *, resume: bool) -> None:
    """Initialize a method from weights or data. The result is stored, so that a resume starts from the same bits."""
    method, world, stored = trainer.method, trainer.world, trainer.folder.path / "start"
    if not method.sample_size:
        return
    is_stored = world.on_rank0(lambda: resume and stored.is_dir())
    # rank 0 computes and writes, all others load; a sharded base is gathered by all ranks, so all compute
    loads = is_stored or not (world.is_rank0 or world.sharded)
    if not world.is_rank0 and not world.sharded:
        world.barrier()
    rows = data.train.rows
    order = np.random.default_rng([trainer.seed, 3]).permutation(len(rows))[: method.sample_size]
    examples = [example for i in order for example in rows[int(i)]]
    sample = CalibrationBatch(trainer.policy, trainer.objective, examples, trainer.budget)
    if loads and (problem := find_damage(stored)):
        raise CheckpointError(f"the run's start cannot be used: {problem}", where=str(stored))
    with status("reading the start off the base"):
        method.calibrate(sample, stored if loads else None)
    if not is_stored and world.is_rank0:
        write_folder(stored, method.save)
    if world.is_rank0 or world.sharded:
        world.barrier()
    if world.sharded and not is_stored and not world.is_rank0:
        method.calibrate(sample, stored)  # one start for all, whatever their processors round


def _save_artifact(trainer: Trainer, chat: ChatTemplate) -> None:
    """Gate 4: write the artifact with everything that serving needs, completely or not at all.

    Rank 0 writes. A whole model that is shared in parts is gathered tensor by tensor, by all ranks.
    """
    model, in_parts = trainer.policy.model, trainer.world.sharded and trainer.method.artifact == "model"
    if not trainer.world.is_rank0:
        for tensor in model_tensors(model).values() if in_parts else ():
            gather(tensor)
        return

    def fill(staging: Path) -> None:
        if in_parts:
            write_model(staging, model, gather)
        else:
            trainer.method.save(staging)
        pad = None
        if (head := trainer.objective.published_head()) is not None:
            pad = pad_token_outside_stops(chat)
            write_score_head(staging, head, pad)
        write_tokenizer_files(staging, chat, pad)
        write_origin(staging, chat, trainer.policy.base)

    write_folder(trainer.folder.path / trainer.method.artifact, fill)
    trainer.record_gate(Gate("save", "passed", "every tensor finite and not empty, hashes in manifest.json", "all"))


def _resolve_micro_batch_tokens(trainer: Trainer, data: RunData) -> None:
    """Set the token budget. A resumed run keeps its first one: sums in another order would not give the same bits."""
    tokens = trainer.folder.manifest.get("tokens_per_micro_batch")
    if tokens is not None:
        trainer.set_budget(tokens)
    elif trainer.config.tokens_per_micro_batch == "probe":
        with status("measuring micro-batches"):
            # trainer.budget: on a card the largest micro-batch that fits; a processor tries all candidates
            limit = trainer.budget if trainer.policy.device.type == "cuda" else None
            policy, objective, examples = trainer.policy, trainer.objective, data.train.examples
            tokens = measure_micro_batch_tokens(policy, objective, examples, trainer.pack, limit)
        trainer.set_budget(trainer.world.gather(tokens)[0])  # every rank measures, and results may differ
        print_status(f"{trainer.budget} tokens a micro-batch")
    trainer.folder.update(tokens_per_micro_batch=trainer.budget)


def _try_longest(trainer: Trainer, data: RunData) -> None:
    """The last part of gate 2: the longest row of the data, which may be longer than all rows of the first step."""
    if isinstance(data.train, PromptDataset):
        return
    row, policy = data.train.longest_row(), trainer.policy
    reset_peak_memory(policy.device)
    seconds = try_longest(policy, trainer.method, trainer.objective, row, trainer.pack, trainer.budget)
    peak = format_bytes(peak_memory_bytes(policy.device))
    measured = f"{max(map(len, row)):,} tokens in {seconds:.1f} s, {peak} at the peak"
    trainer.record_gate(Gate("step0.longest", "passed", measured, "memory"))


def micro_batch_tokens(config: RunConfig, base: BaseModel) -> int:
    """Tokens of a micro-batch of a run in one process."""
    return _token_budget(config, base, SINGLE_PROCESS)[0]


def _token_budget(config: RunConfig, base: BaseModel, world: World) -> tuple[int, DocumentLimit]:
    """Tokens of a micro-batch as set in the config or as they fit, and the limit of a single document."""
    setting = config.training.tokens_per_micro_batch
    fitting, document_bytes = auto_budget(config, base.shape, checks.local_card(device()), world.size)
    # The cards of the ranks may differ in what is free; the run has one budget, so that a resume can keep it.
    fitting, document_bytes = min(world.gather(fitting)), min(world.gather(document_bytes))
    limit = document_limit(config, base.shape, base.dtype_name, document_bytes, device().type)
    return (setting if isinstance(setting, int) else fitting), limit
