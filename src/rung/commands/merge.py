"""`rung merge`: folds a run's adapter into its base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rung.commands.merge_shards import merge_shards, read_updates
from rung.config.io import parse_config
from rung.config.method import LoraSpec
from rung.config.model import ModelSpec
from rung.config.run import RunSpec
from rung.console import say
from rung.data.chat import Chat
from rung.errors import CheckpointError, ConfigError, GateError, PlanError
from rung.files import check_whole, write_folder
from rung.methods.protocol import Method
from rung.methods.registry import attach
from rung.models.base_model import fingerprint
from rung.models.load import base_files, load_tokenizer
from rung.models.policy import Policy
from rung.planning.architecture import read_shape
from rung.planning.memory import FOOTPRINT
from rung.report.formatting import memory
from rung.runs.artifact import check_parity, check_prompt, reload_logprobs, write_text_side
from rung.runs.checks import available
from rung.runs.load import load_base_on_device, open_run, widen
from rung.training import gates
from rung.training.packing import pack_separately
from rung.training.run_folder import Gate, read_manifest
from rung.types import Example, Source

PROBE = "In fiscal year 2023 revenue rose to 412 million, and costs fell by 3.5%. What changed?"


Onto = Literal["trained", "original"]


def merge_run(run: Path, folder: Path, onto: Onto = "trained", *, by_shard: bool = False) -> dict[str, Any]:
    """Write the merged model and prove it (gate 5). In float32, from the pristine base.

    `onto` the base that it was `trained` on, or the `original` that was quantised for training: another model, and
    the result says by how much. `by_shard`, and where the whole model would not fit into memory, a plain LoRA is added
    to its base tensor by tensor, and each matrix is proved instead of the answers.

    Raises `CheckpointError` when there is nothing to merge or the folder is taken, `ConfigError` when a run that
    was not quantised is to go onto the original, `GateError` when the written model is not what it was made from.
    """
    read_manifest(run)  # which says so where there is no run at all
    if not (run / "adapter").is_dir():
        raise CheckpointError(
            "this run has no adapter to merge", where=str(run), hint="a full or head run is merged already"
        )
    if folder.exists():
        raise CheckpointError("this folder exists already", where=str(folder))
    if by_shard or _too_large(run):
        try:
            return _by_shard(run, folder, onto)
        except PlanError as error:
            if by_shard:
                raise
            say(f"merged whole all the same: {error.summary}")
    policy, chat, spec = _open(run)
    if getattr(spec.method, "tasks", ()):
        policy.method.merge()  # type: ignore[attr-defined]  # which says why it cannot be
    rows = _rows(chat)
    ours, from_run = _logprobs(policy, rows), {}
    if spec.method.kind == "qlora":
        trained = ours
        if onto == "original":
            policy = _on_the_original(run, spec)
        else:
            widen(policy, spec)
        ours = _logprobs(policy, rows)
        from_run = {"moved_from_run": _largest(ours, trained)}
    elif onto == "original":
        raise ConfigError(
            "this run was trained on the original base", where="--original", given=spec.method.kind, allowed="qlora"
        )
    base = _reference(policy, rows)
    if _largest(base, ours) == 0:
        what = "the run says what its base says: nothing was learned, or the adapter is lost"
        raise GateError(what, where=str(run))
    _write_merged(policy.method, folder, chat)  # type: ignore[arg-type]
    del policy  # one model at a time: the reload holds another
    try:
        theirs = reload_logprobs(folder, rows)
        gate = gates.enforce(check_parity(ours, theirs))
    except GateError:
        shutil.rmtree(folder)  # a model that is not the run's must not lie around as if it were
        raise
    moved = {"moved_from_base": _largest(base, theirs), **from_run}
    measured = {"measure": "largest difference of log-probabilities", "difference": gate.measured, "limit": gate.limit}
    return {"path": str(folder), **measured, **moved}


def _too_large(run: Path) -> bool:
    """Whether the base in float32, and then the reloaded model, is more than there is memory for."""
    there = available(torch.device("cpu"))
    needed = (
        4 * read_shape(parse_config(read_manifest(run)["spec"], str(run / "run.json")).model).parameters + FOOTPRINT
    )
    if there is None or needed <= there:
        return False
    say(f"the whole model needs {memory(needed)}, and {memory(there)} are free: merged tensor by tensor if that can be")
    return True


def _by_shard(run: Path, folder: Path, onto: Onto) -> dict[str, Any]:
    manifest = read_manifest(run)
    spec = parse_config(manifest["spec"], str(run / "run.json"))
    if spec.method.kind == "qlora" or onto == "original":
        raise PlanError("a quantised base is widened first, which only a whole merge does", where=str(run))
    base = base_files(spec.model)
    if base is None:
        what = "the base is no folder of safetensors (but a hub id, a GGUF file, a student or a run with an adapter)"
        raise PlanError(what, where=str(run), given=spec.model.name)
    check_whole(run / "adapter")
    if fingerprint(base, None) != manifest["fingerprints"]["base"]:
        raise CheckpointError("this adapter was trained on another base", where=str(run), given=str(base))
    updates, chat = read_updates(run / "adapter"), Chat(load_tokenizer(ModelSpec(name=str(run))))
    check_prompt(run / "adapter", chat)
    proved: list[tuple[Gate, float]] = []

    def fill(aside: Path) -> None:
        proved.append(merge_shards(base, updates, aside))
        gates.enforce(proved[0][0])
        write_text_side(aside, chat)

    write_folder(folder, fill)
    gate, moved = proved[0]
    files = len(list(folder.glob("*.safetensors")))
    return {
        "path": str(folder),
        "measure": "largest error, over what rounding to float32 allows",
        "difference": gate.measured,
        "limit": gate.limit,
        "largest_change": moved,
        "files": files,
    }


def _write_merged(method: Method, folder: Path, chat: Chat) -> None:
    merged = method.merge().float()

    def fill(aside: Path) -> None:
        merged.save_pretrained(aside)  # type: ignore[operator]
        write_text_side(aside, chat)

    write_folder(folder, fill)


def _open(run: Path) -> tuple[Policy, Chat, RunSpec]:
    """The run in float32, whatever it computed in: what is merged is compared with a plain float32 model."""
    spec = parse_config(read_manifest(run)["spec"], str(run / "run.json"))
    return open_run(run, load_base_on_device(spec.model.model_copy(update={"dtype": "float32"})))


def _on_the_original(run: Path, spec: RunSpec) -> Policy:
    """The saved adapter as a plain LoRA on the base in full width."""
    if getattr(spec.method, "init", None) == "loftq":
        raise ConfigError(
            "an adapter begun by loftq holds what quantising took away: on the original base it would count twice",
            where="--original",
            hint="merge it onto the base it was trained on",
        )
    base = load_base_on_device(spec.model.model_copy(update={"dtype": "float32"}))
    known = {key: value for key, value in spec.method.model_dump().items() if key in LoraSpec.model_fields}
    plain = LoraSpec.model_validate({**known, "kind": "lora", "init": "default"})
    method = attach(base.model, plain, seed=spec.seed, fused=spec.model.fused)
    method.load(run / "adapter")
    return Policy(base, method)


def _largest(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def _rows(chat: Chat) -> list[list[int]]:
    return [chat.encode([PROBE])[0], chat.encode([PROBE[::-1]])[0]]


@torch.no_grad()
def _logprobs(policy: Policy, rows: list[list[int]]) -> list[torch.Tensor]:
    examples = [
        Example(np.array(r, dtype=np.int32), np.arange(len(r)) > 0, Source("probe", i)) for i, r in enumerate(rows)
    ]
    return [policy.logprobs(batch).float().cpu() for batch in pack_separately(examples, policy.device)]


def _reference(policy: Policy, rows: list[list[int]]) -> list[torch.Tensor]:
    with policy.method.disabled():
        return _logprobs(policy, rows)
