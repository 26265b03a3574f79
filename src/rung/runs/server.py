"""What a vLLM server can answer for, and the clients of a run: rollouts in training, greedy answers in evaluation.

The server applies a plain LoRA to a base that it has loaded itself. Everything else is refused before a model is
loaded, with what can be done instead: its answers would be those of another model.
"""

from __future__ import annotations

from pathlib import Path

from rung.config.climb import UNTUNED
from rung.config.climb_runs import rung_run_config
from rung.config.run import RunConfig
from rung.console import print_status
from rung.errors import PlanError
from rung.evaluation.server_answers import ServerAnswers
from rung.files import is_run_folder
from rung.inference.vllm_client import AdapterServer
from rung.models.policy import Policy
from rung.planning.architecture import is_adapter_folder
from rung.training.run_folder import RunFolder
from rung.training.server_gate import refuse_changing_frequencies
from rung.training.server_sampler import FOLDER, ServerSampler

ROLLOUT_SERVER, EVALUATION_SERVER = "objective.rollout.server", "evaluation.server"
SERVED_METHODS = "lora, qlora and lottery"
BASE_SETTINGS = {"name", "student_of", "revision", "layers"}
"""Settings of a rung's `model` that make its base another one than that of the ladder."""
MOVABLE_SETTINGS = tuple(
    f"{section}.{name}"
    for section in (ROLLOUT_SERVER, EVALUATION_SERVER)
    for name in ("url", "model", "mount", "concurrency", "timeout")
)
"""Settings that a resumed run may change: where the server is, and how it is asked."""


def refuse_unservable(config: RunConfig, where: str) -> None:
    """Raise `PlanError` for a run whose model a vLLM server cannot be; `where` is the setting that names the server."""
    summary, name = "a vLLM server cannot answer for this run", config.model.name
    if blocker := config.method.server_blocker:
        hint = f"leave {where} out: this process answers"
        given, allowed = f"method.kind: {config.method.kind}", f"{SERVED_METHODS}, plain"
        raise PlanError(f"{summary}: {blocker}", where=where, given=given, allowed=allowed, hint=hint)
    if config.model.student_of is not None:
        hint = f"leave {where} out: this process answers"
        reason = "its base is made here, of some layers of another model"
        raise PlanError(f"{summary}: {reason}", where=where, given=config.model.student_of, hint=hint)
    path = Path(name)
    if is_adapter_folder(path) or (is_run_folder(path) and (path / "adapter").is_dir()):
        hint = f"rung merge {name} FOLDER writes a base for both: serve FOLDER, and name it in model.name"
        raise PlanError(f"{summary}: its base is a merge that exists here alone", where=where, given=name, hint=hint)


def check_servers(config: RunConfig) -> None:
    """Raise a `RungError` for servers that cannot answer for the run, and for one of rollouts that is not there."""
    if config.evaluation.server is not None:
        refuse_unservable(config, EVALUATION_SERVER)
    if (client := _rollout_client(config)) is not None:
        refuse_unservable(config, ROLLOUT_SERVER)
        client.path_there(Path(config.output) / FOLDER)
        client.models()


def _rollout_client(config: RunConfig) -> AdapterServer | None:
    rollout = config.objective.rollout
    if rollout is None or rollout.server is None:
        return None
    return AdapterServer(rollout.server, ROLLOUT_SERVER, "go on with: rung train --resume")


def rollout_sampler(config: RunConfig, policy: Policy, folder: RunFolder) -> ServerSampler | None:
    """The sampler of a run whose rollouts come from a server; None without one. Its earlier adapters are unloaded."""
    if (client := _rollout_client(config)) is None:
        return None
    refuse_changing_frequencies(policy, ROLLOUT_SERVER)
    sampler = ServerSampler(client, policy, folder.path / FOLDER)
    sampler.begin()
    config_of_server = client.config
    print_status(f"{config_of_server.model} at {config_of_server.url} draws the answers: a resumed run gets other ones")
    folder.update(rollout_server=config_of_server.address)
    return sampler


def evaluation_answers(task: RunConfig, run: RunConfig | None, folder: Path | None) -> ServerAnswers | None:
    """The server of a task's answers, for a run with its adapter below `folder` or for a base; None without one.

    Raises `PlanError` for a run that it cannot answer for.
    """
    if task.evaluation.server is None:
        return None
    if run is not None:
        refuse_unservable(run, EVALUATION_SERVER)
    client = AdapterServer(task.evaluation.server, EVALUATION_SERVER, "run the same command again")
    return ServerAnswers(client, None if folder is None else folder / "adapter")


def check_evaluation_server(task: RunConfig, run: RunConfig | None) -> None:
    """Raise a `RungError` for a server of a task's answers that cannot answer for a run, or is not there."""
    if (answers := evaluation_answers(task, run, None)) is not None:
        answers.server.models()


def check_climb_server(config: RunConfig) -> None:
    """Raise a `RungError` for a ladder with a rung that its server cannot answer for, or whose server is not there."""
    if config.evaluation.server is None:
        return
    summary = "one server cannot answer for this ladder"
    if config.climb.on_top:
        given, hint = config.climb.on_top[0].label, "its base is the merge of another rung: leave evaluation.server out"
        raise PlanError(summary, where="climb.on_top", given=given, hint=hint)
    for rung in config.climb.rungs:
        if BASE_SETTINGS & rung.model.keys():
            hint = "a server has one base: leave evaluation.server out, or give the other base a ladder of its own"
            raise PlanError(summary, where="climb.rungs", given=rung.label, hint=hint)
        if rung.kind not in UNTUNED:
            refuse_unservable(rung_run_config(config, rung, config.output, config.seed), EVALUATION_SERVER)
    check_evaluation_server(config, None)
