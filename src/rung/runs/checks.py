"""What cannot be begun: a run's parts held against one another, before its folder is there."""

from __future__ import annotations

from rung.training.distributed import World
from rung.training.run_folder import total_steps
from rung.errors import ConfigError, DataError, PlanError
from rung.runs.dataset import Data
from rung.config.objective import ROLLING
from rung.config.run import RunSpec
from rung.config.support import refusal_of_processes, refusal_of_shards
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
import torch
from rung.data.token_store import Tokenised
from rung.data.tokenize import Prompted
from rung.training.trainer import Trainer
from rung.console import say
from rung.training.run_folder import peak_memory_bytes
from rung.errors import PlanError
from rung.planning.advise import advise, compute_type, other_shapes
from rung.planning.memory import FEWEST, Memory, Work, memory
from rung.planning.architecture import Shape, read_shape
from rung.planning.throughput import Amount, keep_rate, token_flops
from rung.report.formatting import memory as in_words




def check_tasks(spec: RunSpec, data: Data) -> None:
    """A method with something of its own for each task must know every task of the data."""
    known = set(getattr(spec.method, "tasks", ()))
    if not known:
        return
    learned = {record.task for record in data.splits.train}
    found = learned | {record.task for part in (data.splits.validation, data.splits.test) for record in part}
    if unknown := sorted(map(str, found - known)):
        hint = "name the column in data.task, or a task for each set in data.path" if found == {None} else None
        raise DataError(
            "the data have a task that method.tasks does not name",
            given=", ".join(unknown),
            allowed=", ".join(sorted(known)),
            hint=hint,
        )
    if idle := sorted(known - learned):
        what = "method.tasks names a task without training rows: nothing would be learned for it"
        raise DataError(what, given=", ".join(idle))


def check_processes(spec: RunSpec, world: World) -> None:
    """What several processes cannot share, or have not been tested to."""
    own = spec.objective.kind in ROLLING or getattr(spec.objective, "on_policy", 0.0) > 0.0
    if world.size > 1 and (why := refusal_of_processes(spec.method.kind, own_answers=own)):
        raise PlanError(why, where="WORLD_SIZE", given=world.size, hint="run it in one process")
    if world.size > 1 and spec.model.sharded:
        named = getattr(spec.objective, "reference", None)
        moments = spec.engine.optimiser.moments
        if why := refusal_of_shards(spec.method.kind, spec.objective.kind, reference=named, moments=moments):
            raise PlanError(why, where="model.sharded", hint="leave model.sharded out: replicas do")


def check_lottery(spec: RunSpec, rows: int) -> None:
    """A run that ends while all layers still move would be a plain lora without a word."""
    rollout = getattr(spec.objective, "rollout", None)
    scouting = getattr(spec.method, "scout_steps", 0)
    total = total_steps(spec.engine, rows, rollout.steps if rollout else 1)
    if scouting >= total:
        raise ConfigError(
            "the run ends before the lottery is drawn",
            where="method.scout_steps",
            given=scouting,
            allowed=f"below the run's {total} steps",
        )


WINDOWS = 16
"""Steps whose rows are packed beforehand to see how large a micro-batch becomes."""
TELLING = 30.0
"""Seconds of training after which a run's speed says something about the machine."""


class DoesNotFitError(PlanError):
    """What a run needs is not there."""


def available(device: torch.device) -> int | None:
    """Bytes that are free for a run, with what the process holds already; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        said = Path("/proc/meminfo").read_text()
        free = int(said.split("MemAvailable:")[1].split()[0]) * 1024
        held = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return None
    return free + held


def refuse_hopeless(spec: RunSpec, device: torch.device, *, beyond: bool) -> None:
    """Before anything is loaded: raise `PlanError` where not even the smallest micro-batch could be computed."""
    if device.type != "cpu":
        return
    shape = read_shape(spec.model)
    compute = compute_type(spec.model, None)
    least = memory(spec, shape, Work(compute, FEWEST, FEWEST // 2), other_shapes(spec))
    _refuse(spec, least, available(device), beyond=beyond)


def expect(spec: RunSpec, shape: Shape, trainer: Trainer, data: Data, *, beyond: bool) -> tuple[Memory, Work]:
    """What the run will hold, from its own rows, and what it computes at once.

    Raises `DoesNotFitError` where there is less, unless told to go on.
    """
    compute = str(trainer.policy.base.compute_dtype).removeprefix("torch.")
    if isinstance(data.train, Prompted):  # its documents are made as it goes
        work = Work(compute, trainer.budget, trainer.budget // 2, device=trainer.policy.device.type)
    else:
        work = _work(trainer, data.train, compute)
    found = memory(spec, shape, work, other_shapes(spec))
    _refuse(spec, found, available(trainer.policy.device), beyond=beyond)
    return found, work


def _work(trainer: Trainer, data: Tokenised, compute: str) -> Work:
    """The largest micro-batch of the first steps, and of the longest row; what of their tokens is computed at all."""
    rows, steps = data.rows, -(-len(data.rows) // trainer.spec.examples_per_step)
    windows = [trainer.pack(trainer.window(rows, step), trainer.budget) for step in range(min(WINDOWS, steps))]
    every = [batch for window in windows for batch in window]
    largest = max([*every, *trainer.pack(data.longest_row(), trainer.budget)], key=lambda batch: len(batch.ids))
    ahead = {id(batch.prefix): len(batch.prefix.ids) for batch in every if batch.prefix is not None}
    computed = sum(len(batch.ids) for batch in every) + sum(ahead.values())
    share = computed / sum(batch.document_tokens for batch in every)
    return Work(
        compute,
        tokens=len(largest.ids),
        learned=len(largest.loss.target),
        computed=share,
        documents=len(largest.documents),
        batches=min(map(len, windows)),
        device=trainer.policy.device.type,
    )


def _refuse(spec: RunSpec, found: Memory, there: int | None, *, beyond: bool) -> None:
    if there is None or found.needed <= there:
        return
    what = f"this run needs {in_words(found.needed)} at its peak"
    if beyond:
        say(f"{what}, and {in_words(there)} are free: it goes on because of --beyond-memory")
        return
    change = advise(spec, limit=there).change
    fitting = f"the cheapest change that fits: {shlex.join(change.overrides)}" if change else "see: rung plan CONFIG"
    hint = f"{fitting}; or start it with --beyond-memory"
    raise DoesNotFitError(what, where="memory", given=f"{in_words(there)} free", hint=hint)


def reality(
    spec: RunSpec, shape: Shape, plan: tuple[Memory, Work], manifest: Mapping[str, Any], loading: int
) -> dict[str, Any]:
    """The plan with what was measured, for `run.json`; a long run's speed is kept for later plans of this machine."""
    found, work = plan
    seconds, tokens = manifest.get("train_seconds") or 0.0, manifest.get("tokens") or 0
    if seconds >= TELLING and tokens and spec.objective.kind == "sft" and "trunk" not in manifest:
        train = manifest.get("data", {}).get("train", {})
        rows = max(1, int(train.get("examples", 0) or 1))
        amount = Amount(tokens, train["supervised_tokens"] / train["tokens"], train["tokens"] / rows, known=True)
        rate = token_flops(spec, shape, amount) * tokens * work.computed / seconds
        keep_rate(str(manifest.get("compute_dtype")), rate, f"{spec.method.kind} on {spec.model.name}")
    measured = {"loading": loading, "steps": manifest.get("peak_memory_bytes"), "saving": peak_memory_bytes()}
    return {**found.to_json(), "measured": measured}
