"""What a vLLM server can answer for, and the clients of a run: rollouts in training, greedy answers in evaluation.

The server applies a plain LoRA to a base that it has loaded itself. Everything else is refused before a model is
loaded, with what can be done instead: its answers would be those of another model.
"""

from __future__ import annotations

from pathlib import Path

from rung.config.run import RunConfig
from rung.console import print_status
from rung.errors import PlanError
from rung.files import is_run_folder
from rung.inference.vllm_client import AdapterServer
from rung.models.policy import Policy
from rung.planning.architecture import is_adapter_folder
from rung.training.run_folder import RunFolder
from rung.training.server_sampler import FOLDER, ServerSampler, refuse_changing_frequencies

ROLLOUT_SERVER, EVALUATION_SERVER = "objective.rollout.server", "evaluation.server"
SERVED_METHODS = "lora, qlora and lottery"
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


def check_rollout_server(config: RunConfig) -> None:
    """Raise a `RungError` for a server of rollouts that cannot answer for the run, or is not there."""
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
    url, model = client.config.url, client.config.model
    print_status(f"answers come from {model} at {url}: a resumed run draws other ones")
    folder.update(rollout_server={"url": url, "model": model})
    return sampler
