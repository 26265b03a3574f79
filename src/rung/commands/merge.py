"""`rung merge`: folds the adapter of a run into its base and proves that the written model is the run.

The merge is done in float32 from the base as it was loaded, whatever the run computed in, so the files are twice as
large as those of a bfloat16 base. The proof loads the written folder with plain transformers in a fresh process and
compares log-probabilities, which needs memory for two models in turn. A plain LoRA whose base does not fit is merged
tensor by tensor (`merge_shards.py`). `cli` and `rung.merge` call `merge`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from rung.commands.merge_shards import merge_shards
from rung.config.method import LoraConfig, LowRankConfig
from rung.config.model import ModelConfig
from rung.config.run import RunConfig
from rung.console import print_status
from rung.data.chat import ChatTemplate
from rung.errors import CheckpointError, ConfigError, GateError, PlanError
from rung.exporting.weights import read_updates
from rung.files import require_undamaged, write_folder
from rung.methods.protocol import Method
from rung.methods.registry import attach_method
from rung.models.base_model import BaseModel, quiet_transformers
from rung.models.load import base_files, stored_fingerprint
from rung.models.packing import pack_separately
from rung.models.policy import Policy
from rung.planning.architecture import read_shape
from rung.planning.memory import BASELINE_RSS
from rung.report.formatting import format_bytes
from rung.results.exports import MergeResult
from rung.runs.artifact import check_parity, check_prompt, logprobs_in_fresh_process, write_tokenizer_files
from rung.runs.load import config_of_run, dequantize, load_base_on_device, open_run, saved_chat
from rung.training import gates
from rung.training.memory_use import free_memory
from rung.training.run_folder import Gate, read_manifest
from rung.types import Example, Source

PROBE_TEXT = "In fiscal year 2023 revenue rose to 412 million, and costs fell by 3.5%. What changed?"
"""Text on which the run and the merged model are compared."""
MergeBase = Literal["trained", "original"]


def merge(run: Path, folder: Path, onto: MergeBase = "trained", *, by_shard: bool = False) -> MergeResult:
    """Write the merged model in float32 and prove it (gate 5).

    `onto` is the base that was `trained` on, or the `original` that was quantized for training: a different model, and
    the result says by how much. With `by_shard`, or if the model does not fit into memory, a plain LoRA is added to its
    base tensor by tensor, and each matrix is proved instead of the answers.

    Raises `CheckpointError` if there is nothing to merge or the folder exists, `ConfigError` for `original` with a run
    that was not quantized, `GateError` if the written model differs from the run.
    """
    _require_adapter(run, folder)
    if by_shard or _needs_shards(run):
        try:
            return _merge_by_shard(run, folder, onto)
        except PlanError as error:
            # Shards were only this function's own choice, so a merge in memory is still worth a try.
            if by_shard:
                raise
            print_status(f"merged whole all the same: {error.summary}")
    config = config_of_run(run)
    model = open_run(run, _float32_base(config))
    policy, chat = model.policy, model.chat
    # One merged model cannot hold something for each task; the method's own error explains it.
    if config.method.tasks:
        policy.method.merge()  # type: ignore[attr-defined]
    rows = _probe_rows(chat)
    adapter_logprobs, change_from_run = _logprobs(policy, rows), {}
    if config.method.kind == "qlora":
        run_logprobs = adapter_logprobs
        if onto == "original":
            policy = _merge_onto_original(run, config)
        else:
            dequantize(policy, config)
        adapter_logprobs = _logprobs(policy, rows)
        change_from_run = {"moved_from_run": _largest_difference(adapter_logprobs, run_logprobs)}
    elif onto == "original":
        given = config.method.kind
        raise ConfigError("this run was trained on the original base", where="--original", given=given, allowed="qlora")
    with policy.method.disabled():
        base_logprobs = _logprobs(policy, rows)
    # A lost adapter would pass the parity check below: two copies of the base agree perfectly (FAILURES 16).
    if _largest_difference(base_logprobs, adapter_logprobs) == 0:
        summary = "the run says what its base says: nothing was learned, or the adapter is lost"
        raise GateError(summary, where=str(run))
    _write_merged(policy.method, folder, chat)  # type: ignore[arg-type]
    # To free the memory of this model before the fresh process loads another.
    del model, policy
    try:
        merged_logprobs = logprobs_in_fresh_process(folder, rows)
        gate = gates.enforce(check_parity(adapter_logprobs, merged_logprobs))
    except GateError:
        # A model that is not the run must not lie around as if it were.
        shutil.rmtree(folder)
        raise
    changes = {"moved_from_base": _largest_difference(base_logprobs, merged_logprobs), **change_from_run}
    return _result(folder, "largest difference of log-probabilities", gate, changes)


def _result(folder: Path, measure: str, gate: Gate, facts: Mapping[str, float]) -> MergeResult:
    return MergeResult(path=str(folder), measure=measure, difference=gate.measured, limit=gate.limit).replace(**facts)


def _require_adapter(run: Path, folder: Path) -> None:
    """Raise `CheckpointError` if there is no adapter to merge, or the folder exists."""
    # First, since its error says that there is no run at all.
    read_manifest(run)
    if not (run / "adapter").is_dir():
        summary = "this run has no adapter to merge"
        raise CheckpointError(summary, where=str(run), hint="a full or head run is merged already")
    if folder.exists():
        raise CheckpointError("this folder exists already", where=str(folder))


def memory_shortage(config: ModelConfig) -> str | None:
    """Why the base in float32 does not fit into the free memory; None if it does, and where that is not known."""
    available = free_memory(torch.device("cpu"))
    # 4 bytes per parameter in float32.
    needed = 4 * read_shape(config).parameters + BASELINE_RSS
    if available is None or needed <= available:
        return None
    return f"the whole model needs {format_bytes(needed)}, and {format_bytes(available)} are free"


def _needs_shards(run: Path) -> bool:
    """Whether the base does not fit. The reloaded model needs the same memory, but later."""
    if shortage := memory_shortage(config_of_run(run).model):
        print_status(f"{shortage}: merged tensor by tensor if that can be")
    return shortage is not None


def _merge_by_shard(run: Path, folder: Path, onto: MergeBase) -> MergeResult:
    manifest = read_manifest(run)
    config = config_of_run(run)
    if config.method.kind == "qlora" or onto == "original":
        raise PlanError("a quantized base is widened first, which only a whole merge does", where=str(run))
    base = base_files(config.model)
    if base is None:
        summary = "the base is no folder of safetensors (but a hub id, a GGUF file, a student or a run with an adapter)"
        raise PlanError(summary, where=str(run), given=config.model.name)
    require_undamaged(run / "adapter")
    # The model is never loaded here, so the files themselves are compared with the run's base.
    if stored_fingerprint(config.model) != manifest["fingerprints"]["base"]:
        raise CheckpointError("this adapter was trained on another base", where=str(run), given=str(base))
    updates, chat = read_updates(run / "adapter"), saved_chat(run)
    check_prompt(run / "adapter", chat)
    # `write_folder` renames the folder only after `fill`, so a failed gate leaves nothing behind.
    proofs: list[tuple[Gate, float]] = []

    def fill(staging: Path) -> None:
        proofs.append(merge_shards(base, updates, staging))
        gates.enforce(proofs[0][0])
        write_tokenizer_files(staging, chat)

    write_folder(folder, fill, replaces=False)
    gate, largest_change = proofs[0]
    facts = {"largest_change": largest_change, "files": len(list(folder.glob("*.safetensors")))}
    return _result(folder, "largest error, over what rounding to float32 allows", gate, facts)


def _write_merged(method: Method, folder: Path, chat: ChatTemplate) -> None:
    merged = method.merge().float()

    def fill(staging: Path) -> None:
        with quiet_transformers():
            merged.save_pretrained(staging)  # type: ignore[operator]
        write_tokenizer_files(staging, chat)

    write_folder(folder, fill, replaces=False)


def _float32_base(config: RunConfig) -> BaseModel:
    """The base in float32, whatever the run computed in: the merge is compared with a plain float32 model."""
    return load_base_on_device(config.model.model_copy(update={"dtype": "float32"}))


def _merge_onto_original(run: Path, config: RunConfig) -> Policy:
    """The saved adapter as a plain LoRA on the unquantized base."""
    if isinstance(config.method, LowRankConfig) and config.method.init == "loftq":
        summary = "an adapter begun by loftq holds what quantizing took away: on the original base it would count twice"
        raise ConfigError(summary, where="--original", hint="merge it onto the base it was trained on")
    base = _float32_base(config)
    # `init` is reset: the saved factors replace whatever an initialization gives.
    lora_fields = {key: value for key, value in config.method.model_dump().items() if key in LoraConfig.model_fields}
    lora_config = LoraConfig.model_validate({**lora_fields, "kind": "lora", "init": "default"})
    method = attach_method(base.model, lora_config, seed=config.seed, fused=config.model.fused)
    method.load(run / "adapter")
    return Policy(base, method)


def _largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def _probe_rows(chat: ChatTemplate) -> list[list[int]]:
    # Fluent text and the same characters reversed, so that likely and unlikely tokens are both compared.
    return [chat.encode([PROBE_TEXT])[0], chat.encode([PROBE_TEXT[::-1]])[0]]


@torch.no_grad()
def _logprobs(policy: Policy, rows: list[list[int]]) -> list[torch.Tensor]:
    examples = [Example(np.array(r, np.int32), np.arange(len(r)) > 0, Source("probe", i)) for i, r in enumerate(rows)]
    return [policy.logprobs(batch).float().cpu() for batch in pack_separately(examples, policy.device)]
