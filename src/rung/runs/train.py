"""Composes a `RunSpec` into objects and starts it: the only place that sees both tables."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rung.runs import checks
from rung.runs.checks import check_lottery, check_processes, check_tasks
from rung.data.chat import Chat
from rung.data.tokenize import Prompted
from rung.training import gates
from rung.training.micro_batch import probe, try_longest
from rung.training.distributed import ALONE, World
from rung.console import Interrupted
from rung.training.trainer import Trainer
from rung.console import say, stage
from rung.training.run_folder import (
    NOT_FINITE,
    Gate,
    RunFolder,
    peak_memory_bytes,
    read_manifest,
    reset_peak_memory,
    versions,
)
from rung.training.rollout import Judge, Rollouts
from rung.training.step import Sample
from rung.training.run_folder import Watch, nobody, summary
from rung.errors import CheckpointError, DataError, RungError
from rung.evaluation.reward_model import examine
from rung.methods.protocol import Method
from rung.methods.registry import attach
from rung.models.fused_modules import left_alone
from rung.models.base_model import Base
from rung.models.policy import Policy
from rung.models.targets import coverage
from rung.objectives.protocol import Objective
from rung.objectives.distill import Distill
from rung.objectives.ppo import Ppo
from rung.objectives.reward import Reward
from rung.objectives.registry import OBJECTIVES
from rung.runs.load import device, load_base_on_device
from rung.runs.auxiliary_models import Beside, beside, judge
from rung.planning.advise import guessed_work, other_shapes
from rung.planning.memory import memory, tokens_per_micro_batch
from rung.runs.dataset import Data, read_splits, tokenise
from rung.runs.artifact import pad_beside_stops, write_origin, write_text_side
from rung.runs.reward_head import write_score
from rung.config.io import config_to_dict
from rung.config.run import RunSpec
from rung.config.support import NOT_MEASURED, PROVED_MODELS
from rung.files import verify, write_folder

PROBES = 4
"""Training documents that the step-0 gates look at: the shortest, which cost nothing."""


def train_run(
    spec: RunSpec,
    *,
    resume: bool = False,
    overwrite: bool = False,
    beyond_memory: bool = False,
    world: World = ALONE,
) -> dict[str, Any]:
    """Train one run into its folder and return its manifest.

    Nothing is written before data and model have proved usable. `beyond_memory` starts what the plan says does not fit.
    Raises `RungError`s, and `Interrupted` when stopped.
    """
    output = Path(spec.output)

    def finished() -> dict[str, Any] | None:
        RunFolder.check(output, config_to_dict(spec), resume=resume, overwrite=overwrite)
        there = read_manifest(output) if resume and (output / "run.json").exists() else {}
        return there if there.get("status") == "finished" else None

    done: dict[str, Any] | None = world.first_does(finished)
    if done is not None:
        return done
    splits = read_splits(spec)
    if world.size == 1:
        checks.refuse_hopeless(spec, device(), beyond=beyond_memory)
    base = load_base_on_device(spec.model)
    data = world.after_the_first(lambda: tokenise(spec, splits, base))  # the others find it in the cache
    _, folder = train_on(spec, base, data, resume=resume, overwrite=overwrite, beyond_memory=beyond_memory, world=world)
    world.wait()
    return folder.manifest


def dry_run(spec: RunSpec) -> dict[str, Any]:
    """Everything up to the first step: data, model, preflight; writes nothing."""
    splits = read_splits(spec)
    base = load_base_on_device(spec.model)
    data = tokenise(spec, splits, base)
    check_tasks(spec, data)
    check_lottery(spec, len(data.train.rows))
    others = beside(spec, base, data.chat)
    shape, method = base.shape, attach(base.model, spec.method, seed=spec.seed, fused=spec.model.fused)
    heads = _objective(spec, Policy(base, method), others).trainable().values()
    rollout = getattr(spec.objective, "rollout", None)
    steps_per_epoch = -(-len(data.train.rows) // spec.engine.examples_per_step) * (rollout.steps if rollout else 1)
    return {
        **data.summary(),
        "steps_per_epoch": steps_per_epoch,
        "tokens_per_micro_batch": budget_of(spec, base),
        "trainable_parameters": method.declared_parameters() + sum(p.numel() for p in heads),
        "learning_rate": spec.learning_rate,
        "plan": memory(spec, shape, guessed_work(spec, shape, None), other_shapes(spec)).to_json(),
    }


def train_on(
    spec: RunSpec,
    base: Base,
    data: Data,
    *,
    resume: bool = False,
    overwrite: bool = False,
    beyond_memory: bool = False,
    world: World = ALONE,
    watch: Watch = nobody,
) -> tuple[Policy, RunFolder]:
    """Train on data already read; the policy comes back in eval mode with the run's final weights.

    `watch` hears of every validation loss, and says why the run should end there, if it should.
    """
    shape = base.shape
    check_processes(spec, world)
    # first: data or a method that cannot be leave no folder behind
    check_tasks(spec, data)
    check_lottery(spec, len(data.train.rows))
    others = beside(spec, base, data.chat)
    method = attach(base.model, spec.method, seed=spec.seed, fused=spec.model.fused)
    policy = Policy(base, method)
    policy.reference = others.reference
    with closing(_claim(spec, world, resume=resume, overwrite=overwrite)) as folder:
        trainer = _trainer(spec, policy, data, folder, others, world)
        trainer.watch = watch
        try:
            plan = checks.expect(spec, shape, trainer, data, beyond=beyond_memory) if world.size == 1 else None
        except RungError as error:
            folder.update(status="failed", error=str(error))
            raise
        loading = peak_memory_bytes()
        _train(spec, trainer, data, folder, resume=resume)
        if plan is not None:
            folder.update(plan=checks.reality(spec, shape, plan, folder.manifest, loading))
    return policy, folder


def _claim(spec: RunSpec, world: World, *, resume: bool, overwrite: bool) -> RunFolder:
    """The run's folder, which one process writes."""
    path, claimed = Path(spec.output), list[RunFolder]()

    def claim() -> dict[str, Any]:
        claimed.append(RunFolder.claim(path, config_to_dict(spec), resume=resume, overwrite=overwrite))
        return claimed[0].manifest

    manifest = world.first_does(claim)
    return claimed[0] if claimed else RunFolder(path, manifest, writes=False)


def _trainer(spec: RunSpec, policy: Policy, data: Data, folder: RunFolder, others: Beside, world: World) -> Trainer:
    """The loop with all that it needs; the folder says what it stands on."""
    method: Method = policy.method  # type: ignore[assignment]
    objective = _objective(spec, policy, others)
    if not objective.reads_head:
        method.leave_head()
    _begin(spec, policy, data, folder, others, world)
    return Trainer(
        policy,
        method,
        objective=objective,
        spec=spec.engine,
        peak_rate=spec.learning_rate,
        budget=budget_of(spec, policy.base),
        seed=spec.seed,
        folder=folder,
        rollouts=_rollouts(spec, policy, objective, data, others),
        world=world,
        in_parts=spec.model.sharded and world.size > 1,
    )


def _train(spec: RunSpec, trainer: Trainer, data: Data, folder: RunFolder, *, resume: bool) -> None:
    """Gates, steps, files: all that happens in the run's folder."""
    policy, method, objective, world = trainer.policy, trainer.method, trainer.objective, trainer.world
    try:
        _calibrate(trainer, data, folder, resume=resume)
        if not (resume and trainer.restore()):
            folder.trim_log(0)
            _pass_gates(policy, method, trainer, data, folder)
        _settle_budget(trainer, data)
        if trainer.rollouts is not None:
            trainer.rollouts.budget = trainer.budget
        if trainer.progress.step == 0:
            _try_longest(trainer, data, folder)
            torch.manual_seed(spec.seed)  # of dropout: a resumed run goes on with the state it saved
        reset_peak_memory()
        trainer.run(data.train.rows, data.validation.rows if data.validation else ())
        folder.update(**summary(trainer.progress, trainer.moving), **method.statistics())
        trainer.held.let_go()
        trainer.unite()
        if world.first:
            _publish(folder, trainer, data.chat)
        if world.first and isinstance(objective, Reward) and data.validation:
            health = examine(policy, objective, data.validation.examples, trainer.budget)
            folder.update(reward=health.to_json())
            say(str(health))
    except Interrupted:
        folder.update(status="interrupted", **summary(trainer.progress, trainer.moving))
        say(f"saved after step {trainer.progress.step} in {folder.path}; --resume goes on from there")
        raise
    except RungError as error:
        folder.update(status="failed", error=str(error))
        raise
    folder.update(status="finished", metrics={"validation_loss": trainer.progress.validation})


def _objective(spec: RunSpec, policy: Policy, others: Beside) -> Objective:
    """What is minimised, with the heads and the value model that it owns."""
    objective = OBJECTIVES[spec.objective.kind](spec.objective)
    if isinstance(objective, Ppo):
        objective.critic, objective.start = others.critic, others.head
    if isinstance(objective, Distill) and others.teacher is not None:
        objective.teacher = others.teacher
    objective.begin(policy, spec.seed)
    return objective


def _begin(spec: RunSpec, policy: Policy, data: Data, folder: RunFolder, others: Beside, world: World) -> None:
    """Say what the run stands on. Raises `CheckpointError` where that is not what it began with."""
    alone = _say_what_is_unusual(policy, policy.method, spec)  # type: ignore[arg-type]
    fingerprints = {**others.fingerprints, **_fingerprints(policy.base, data)}
    world.agree({**fingerprints, "versions": versions()})
    begun = folder.manifest.get("fingerprints", fingerprints)
    if changed := [name for name, value in fingerprints.items() if begun.get(name) != value]:
        what = f"what this run began with has changed: its {' and '.join(changed)}"
        raise CheckpointError(what, where=spec.output, hint="start anew with --overwrite")
    for told in ("error", "not_finite"):  # of an end that this run goes on from
        folder.manifest.pop(told, None)
    if folder.writes:
        (folder.path / NOT_FINITE).unlink(missing_ok=True)
    folder.update(
        status="running",
        fingerprints=fingerprints,
        data=data.summary(),
        device=policy.device.type,
        compute_dtype=str(policy.base.compute_dtype).removeprefix("torch."),
        learning_rate=spec.learning_rate,
        not_fused=alone,
        moves=coverage(policy.model, policy.method.trainable()),  # type: ignore[attr-defined]
        processes=world.size,
    )


def _rollouts(spec: RunSpec, policy: Policy, objective: Objective, data: Data, others: Beside) -> Rollouts | None:
    """How the policy answers and who says what that is worth, for objectives that learn from it."""
    if objective.rollout is None:
        return None
    worth, own, held, budget = others.worth, data.train, data.validation, budget_of(spec, policy.base)
    judges: list[Judge | None] = [None, None]
    if worth is not None and isinstance(own, Prompted):
        parts = (own, held if isinstance(held, Prompted) else own)
        judges = [judge(worth, data.chat, part, budget) for part in parts]
    return Rollouts(
        policy,
        objective,
        objective.rollout,
        stop_ids=data.chat.stop_ids,
        train=judges[0],
        validation=judges[1],
        seed=spec.seed,
        budget=budget,
    )


def _pass_gates(policy: Policy, method: Method, trainer: Trainer, data: Data, folder: RunFolder) -> None:
    """Gates 1 and 2; each is recorded before it is enforced."""
    folder.gate(Gate("preflight", "passed", data.preflight.to_json(), "0 failing rows"))
    say(f"gate preflight: passed ({data.preflight.failing} of {data.preflight.rows} rows failing; limit 0)")
    shortest = np.argsort(data.train.lengths, kind="stable")[:PROBES]
    probe = [data.train.examples[int(i)] for i in shortest]
    if not probe:
        raise DataError("no training rows are left", hint="look at the counts of: rung data check")
    heads = sum(p.numel() for p in trainer.objective.trainable().values())
    found = [
        gates.check_trainable(method, trainer.held.optimiser, heads),
        gates.check_identity(policy, method, probe),
        gates.check_reference(policy, method, probe),
        gates.check_packing(policy, probe),
        gates.check_fused(policy, probe),
        gates.check_decoding(policy, probe),
    ]
    for gate in found:
        if gate is not None:
            folder.gate(gate)
            say(str(gate))
            gates.enforce(gate)


def _say_what_is_unusual(policy: Policy, method: Method, spec: RunSpec) -> int:
    """A shape or a device without proof behind it; how many adapted linears are not computed by our functions."""
    if (shape := policy.model.config.model_type) not in PROVED_MODELS:
        say(f"{shape} is not among the architectures proved by a test; the step-0 gates decide")
    if said := NOT_MEASURED.get(policy.device.type):
        say(f"{policy.device.type}: {said}")
    alone = left_alone(policy.model, method.part) if spec.model.fused else []
    if alone:
        why = "dropout, DoRA, a quantised base, a tuner of peft's"
        say(f"{len(alone)} adapted linears compute through peft's own forward ({why}): slower, same result")
    return len(alone)


def _calibrate(trainer: Trainer, data: Data, folder: RunFolder, *, resume: bool) -> None:
    """A start that is read off weights or data is kept in the run folder: a resume takes up the very same."""
    method, start = trainer.method, folder.path / "start"
    if not method.sample_size:
        return
    again = trainer.world.first_does(lambda: resume and start.is_dir())
    if not trainer.world.first:
        trainer.world.wait()  # until it is written, as it is for a resume
        again = True
    rows = data.train.rows
    order = np.random.default_rng([trainer.seed, 3]).permutation(len(rows))[: method.sample_size]
    examples = [e for i in order for e in rows[int(i)]]
    sample = Sample(trainer.policy, trainer.objective, examples, trainer.budget)
    if again and (problem := verify(start)):
        raise CheckpointError(f"the run's start cannot be used: {problem}", where=str(start))
    with stage("reading the start off the base"):
        method.calibrate(sample, start if again else None)
    if not again:
        write_folder(start, method.save)
    if trainer.world.first:
        trainer.world.wait()


def _publish(folder: RunFolder, trainer: Trainer, chat: Chat) -> None:
    """Gate 4: the artefact with everything serving needs, whole or not at all."""

    def fill(aside: Path) -> None:
        trainer.method.save(aside)
        pad = None
        if (head := trainer.objective.published()) is not None:
            pad = pad_beside_stops(chat)
            write_score(aside, head, pad)
        write_text_side(aside, chat, pad)
        write_origin(aside, chat, trainer.policy.base)

    write_folder(folder.path / trainer.method.artefact, fill)
    gate = Gate("save", "passed", "every tensor finite and not empty, hashes in manifest.json", "all")
    folder.gate(gate)
    say(str(gate))


def _settle_budget(trainer: Trainer, data: Data) -> None:
    """A run keeps the micro-batch it began with: sums in another order would not be the same bits."""
    begun = trainer.folder.manifest.get("tokens_per_micro_batch")
    if begun is not None:
        trainer.budget = begun
    elif trainer.spec.tokens_per_micro_batch == "probe":
        with stage("measuring micro-batches"):
            found = probe(trainer.policy, trainer.objective, data.train.examples, trainer.pack)
        trainer.budget = trainer.world.gather(found)[0]  # processes measure, and might not agree
        say(f"{trainer.budget} tokens a micro-batch")
    trainer.folder.update(tokens_per_micro_batch=trainer.budget)


def _try_longest(trainer: Trainer, data: Data, folder: RunFolder) -> None:
    """Gate 2, last: rows of the data, which may be longer than all that a first step happens to hold."""
    if isinstance(data.train, Prompted):
        return
    row = data.train.longest_row()
    seconds = try_longest(trainer.policy, trainer.method, trainer.objective, row, trainer.pack, trainer.budget)
    gate = Gate("step0.longest", "passed", f"{max(map(len, row)):,} tokens in {seconds:.1f} s", "memory")
    folder.gate(gate)
    say(str(gate))


def budget_of(spec: RunSpec, base: Base) -> int:
    """Tokens computed at once, as far as the config and the base decide it."""
    given = spec.engine.tokens_per_micro_batch
    return given if isinstance(given, int) else tokens_per_micro_batch(base.shape, device().type)


def _fingerprints(base: Base, data: Data) -> dict[str, str]:
    return {
        "base": base.fingerprint,
        "data": data.splits.fingerprint,
        "text": hashlib.sha256(data.chat.identity().encode()).hexdigest(),
    }
