"""What cannot be begun: a run's parts held against one another, before its folder is there."""

from __future__ import annotations

from rung.engine.distributed import World
from rung.engine.state import total_steps
from rung.errors import ConfigError, DataError, PlanError
from rung.prepared import Data
from rung.spec.objective import ROLLING
from rung.spec.run import RunSpec
from rung.spec.support import refusal_of_processes, refusal_of_shards


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
