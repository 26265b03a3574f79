"""Opening runs, bases and reward models, and the held-out items that they are scored on.

The one place that decides what a name stands for: a run, a climb, a server or a base. Everything is checked when it is
opened (fingerprint of the base, hashes of the files, token ids of a known conversation), because a wrong base or
template gives plausible answers and no error. Checking hashes costs one pass over the files. All commands, and
`rung.load`, open models here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch

from rung.config.io import parse_config
from rung.config.model import WITHOUT_RUN_SETTINGS, ModelConfig
from rung.config.objective import RewardConfig
from rung.config.run import RunConfig
from rung.console import status
from rung.data.chat import ChatTemplate
from rung.data.prompt_positions import virtual_token_positions
from rung.data.records import Records
from rung.data.splits import Splits
from rung.errors import CheckpointError, ConfigError, DataError, PlanError
from rung.evaluation.evaluate import Evaluation, evaluate
from rung.evaluation.prompting import PromptFormat
from rung.evaluation.retrieval import Library
from rung.files import MANIFEST, is_run_folder, require_undamaged
from rung.methods.lora import Lora
from rung.methods.qlora import dequantize_base
from rung.methods.registry import attach_method
from rung.models.base_model import BaseModel, compute_dtype
from rung.models.fused_modules import install_fused_forwards
from rung.models.generate import Sampling, generate
from rung.models.load import check_fingerprint, load_base, load_tokenizer
from rung.models.matmul import routine_in_use
from rung.models.matmul_routine import resolve_routine, settle_routine
from rung.models.policy import NoMethod, Policy
from rung.models.weight_files import ShardedLoading, headers_digest, stored_tensor
from rung.objectives.reward import RewardObjective, ScoreHead
from rung.runs.artifact import check_origin, check_prompt, saved_end_ids
from rung.runs.dataset import load_library
from rung.runs.reward_head import HEAD_KEY, OUTPUT_HEADS, read_score_head
from rung.runs.server import evaluation_answers
from rung.scoring.code_answers import CODE
from rung.training.distributed import SINGLE_PROCESS, World
from rung.training.run_folder import finished_artifact, is_climb, read_manifest
from rung.types import Message, Record


def device() -> torch.device:
    """Where a run computes: an NVIDIA card, Apple's GPU or the processor. Only the processor was measured."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_base_on_device(
    config: ModelConfig,
    *,
    stream_linears: bool = False,
    heads: Collection[str] = (),
    sharded: ShardedLoading | None = None,
) -> BaseModel:
    """The base of a config, on the device in use; the other arguments as in `models.load.load_base`."""
    with status(f"loading {config.student_of or config.name}"):
        return load_base(config, device=device(), stream_linears=stream_linears, heads=heads, sharded=sharded)


def load_base_to_train(config: RunConfig, world: World = SINGLE_PROCESS) -> BaseModel:
    """The base of a run. One that the method quantizes stays in its file until then, unless other models share it.

    One that several processes share in parts stays in its files until `training.fsdp.shard_policy` reads the rows.
    """
    if config.model.sharded and world.size > 1:
        return load_base_in_parts(config.model, world, trains_base=config.method.kind == "full")
    return load_base_on_device(config.model, stream_linears=config.method.kind == "qlora" and not config.shares_base)


def load_base_in_parts(model: ModelConfig, world: World, *, trains_base: bool) -> BaseModel:
    """A base whose weights stay in their files; rank 0 hashes them, and the ranks compare the headers that they see."""
    base = load_base_on_device(model, sharded=ShardedLoading(trains_base, world.on_rank0))
    sources = {source.file.parent for p in base.model.parameters() if (source := stored_tensor(p)) is not None}
    world.assert_equal({"base": [headers_digest(folder) for folder in sources]})
    return base


def keep_arithmetic(config: RunConfig, folder: Path) -> RunConfig:
    """The config with the compute type and the matmul routine that the run in `folder` began with."""
    recorded = read_manifest(folder) if is_run_folder(folder) else {}
    return with_arithmetic(config, {**recorded, **recorded.get("fingerprints", {})})


def with_arithmetic(config: RunConfig, recorded: Mapping[str, Any]) -> RunConfig:
    """The config with a recorded compute type and matmul routine, as `hardware_fingerprints` names them.

    Only where the setting is `auto`: other processors choose others, and half a run in each would be a run that nobody
    asked for.
    """
    if config.model.dtype == "auto" and (dtype := recorded.get("compute_dtype")) in ("float32", "bfloat16"):
        config = config.with_model(dtype=dtype)
    if config.model.matmul == "auto" and (routine := recorded.get("matmul")) in ("onednn", "blas"):
        config = config.with_model(matmul=routine)
    return config


def settle_arithmetic(config: RunConfig, world: World = SINGLE_PROCESS) -> None:
    """Choose the matmul routine of a command by its config; all ranks take that of rank 0."""
    if device().type == "cpu" and compute_dtype(config.model.dtype, device()) is torch.float32:
        settle_routine(world.on_rank0(lambda: resolve_routine(config.model.matmul)))


def hardware_fingerprints(base: BaseModel) -> dict[str, str]:
    """What a resume must find again besides data and weights: compute type, type of device, and matmul routine."""
    fingerprints = {"compute_dtype": base.dtype_name, "device": base.model.device.type}
    if fingerprints == {"compute_dtype": "float32", "device": "cpu"}:
        fingerprints["matmul"] = routine_in_use()
    return fingerprints


def library_of_target(name: str | Path) -> Library | None:
    """The library of a run that was trained on retrieved passages; None for other runs and for bases."""
    return _library_of_config(config_of_run(Path(name))) if target_kind(name) == "run" else None


def _library_of_config(config: RunConfig) -> Library | None:
    return load_library(config) if config.evaluation.context == "retrieved" else None


TargetKind = Literal["run", "climb", "server", "base"]
"""What a name in a command, config or call can stand for."""


@dataclass(frozen=True)
class LoadedRun:
    """A model that is ready to answer: a base, or a base with the method of a run."""

    policy: Policy
    chat: ChatTemplate
    config: RunConfig | None = None
    """Config of the run; None for a base."""
    kind: Literal["run", "base"] = "base"
    folder: Path | None = None
    """Folder of the run; None for a base."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks for which the run learned separate parameters; most runs and all bases have none."""
        return self.config.method.tasks if self.config is not None else ()

    @cached_property
    def library(self) -> Library | None:
        """The library of a run that was trained on retrieved passages; None for all others."""
        return None if self.config is None else _library_of_config(self.config)

    def answer(
        self,
        question: str | Sequence[Message],
        *,
        context: str | None = None,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        task: str | None = None,
    ) -> str:
        """Answer a question, or the last turn of a conversation. `temperature` 0 is greedy.

        Without a `context`, a run that was trained on retrieved passages retrieves them, as in `rung chat`. Raises
        `DataError` for a prompt that leaves no room for an answer, `ConfigError` for an unknown task.
        """
        turns = [Message("user", question)] if isinstance(question, str) else list(question)
        if system is not None:
            turns.insert(0, Message("system", system))
        # A model trained with passages and asked without them would be a different model.
        if context is None and self.library is not None:
            turns[-1] = replace(turns[-1], content=self.library.prepend_passages(turns[-1].content))
        if task is not None and task not in self.tasks:
            raise ConfigError("this model learned no such task", given=task, allowed=", ".join(self.tasks) or "none")
        # whatever the training data was: nobody who asks may open turns
        prompt = self.chat.with_control_tokens(None).prompt_ids(turns, context=context)
        room = self.policy.base.context - self.policy.method.virtual_tokens - len(prompt)
        if room < 1:
            raise DataError("the prompt is longer than the model's context", given=f"{len(prompt):,} tokens")
        sampling = Sampling(min(max_new_tokens, room), temperature, seed)
        answers = generate(self.policy, [prompt], stop_ids=self.chat.generation_stop_ids, sampling=sampling, task=task)
        return self.chat.assistant_text(answers[0].ids).strip()


def target_kind(name: str | Path) -> TargetKind:
    """What a name stands for: the folder of a run or climb, the URL of a server, or else a base."""
    if str(name).lower().startswith(("http://", "https://")):
        return "server"
    if not is_run_folder(name):
        return "base"
    return "climb" if is_climb(Path(name)) else "run"


def refuse_climb(name: str | Path, where: str | None = None) -> None:
    """Raise `ConfigError` for a climb, which holds several models."""
    if target_kind(name) == "climb":
        summary = "this is a climb, not a run"
        raise ConfigError(summary, where=where, given=name, hint=f"its runs stand in {Path(name) / 'rungs'}")


def open_target(name: str | Path, model: ModelConfig | None = None, base: BaseModel | None = None) -> LoadedRun:
    """Open a run or a base by its name.

    `model` has the settings under which a base is loaded, `base` is the loaded base of a run with an adapter. Raises
    `ConfigError` for a climb, a server and an unknown name, and as `open_run`.
    """
    refuse_climb(name)
    if target_kind(name) == "server":
        raise ConfigError("a server answers for itself and cannot be opened", given=name, hint="rung generate asks it")
    if target_kind(name) == "run":
        return open_run(Path(name), base)
    model = model or ModelConfig()
    # Revision, student and layers in the settings belong to the model that they name, not to this one.
    if model.name != str(name) or model.student_of is not None:
        model = model.model_copy(update={"name": str(name), **WITHOUT_RUN_SETTINGS})
    return open_base(model)


def open_run(path: Path, base: BaseModel | None = None) -> LoadedRun:
    """A finished run, ready to answer: its method on `base`, or on its own base loaded here.

    Raises `CheckpointError` for another base, `PlanError` for a reward model, which generates nothing.
    """
    policy, chat, config = _load_run(path, base)
    if config.objective.kind == "reward":
        summary = "this run is a reward model: it gives scores and writes nothing"
        raise PlanError(summary, where=str(path), hint="rung eval measures it on held-out pairs")
    return LoadedRun(policy, chat, config, "run", path)


def weight_fingerprints(name: str | Path, policy: Policy) -> list[str]:
    """What identifies the weights of an opened run or base: a run that is trained again gets others."""
    # the manifest in adapter/ or model/ holds the hashes of the files
    manifests = sorted(Path(name).glob(f"[am]*/{MANIFEST}"))
    return [policy.base.fingerprint, *(file.read_text() for file in manifests)]


def config_of_run(run: Path) -> RunConfig:
    """The config of a run, from its manifest."""
    return parse_config(read_manifest(run)["config"], str(run / "run.json"))


def open_reward_model(
    path: Path, base: BaseModel | None = None
) -> tuple[Policy, ChatTemplate, RewardObjective, RunConfig]:
    """A finished reward model: its method and score head on `base`, or on its own base loaded here.

    Raises `CheckpointError` for other runs and for another base.
    """
    policy, chat, config = _load_run(path, base)
    if not isinstance(config.objective, RewardConfig):
        summary = "this run is no reward model"
        raise CheckpointError(summary, where=str(path), given=f"objective.kind: {config.objective.kind}")
    objective, folder = RewardObjective(config.objective), path / ("model" if (path / "model").is_dir() else "adapter")
    objective.head = ScoreHead(read_score_head(folder).to(policy.device))
    return policy, chat, objective, config


def _load_run(path: Path, base: BaseModel | None) -> tuple[Policy, ChatTemplate, RunConfig]:
    manifest = read_manifest(path)
    artifact = finished_artifact(path, manifest)
    config = parse_config(manifest["config"], str(path / "run.json"))
    # A full run is a model of its own, with its own tokenizer and template.
    if artifact.name == "model":
        model_name, heads = path, set[str]()
        # `load_base` refuses a reward run as a base, so its model is named as a plain folder, which is checked here.
        if config.objective.kind == "reward":
            # a classifier has a score in place of the output head
            model_name, heads = artifact, {HEAD_KEY, *OUTPUT_HEADS}
            require_undamaged(model_name)
        settings = ModelConfig(name=str(model_name), dtype=config.model.dtype, matmul=config.model.matmul)
        base = load_base_on_device(settings, heads=heads)
        chat = ChatTemplate(base.tokenizer, end_ids=base.end_ids)
        check_prompt(artifact, chat)
        return Policy(base, NoMethod()), chat.with_control_tokens(config.data.control_tokens), config
    require_undamaged(artifact)
    if base is None:
        base = load_base_on_device(config.model, stream_linears=config.method.kind == "qlora")
    check_fingerprint(manifest, base, path)
    check_origin(artifact, base)
    method = attach_method(base.model, config.method, seed=config.seed, fused=config.model.fused)
    method.load(artifact)
    # The saved tokenizer and not that of the base: its template is the one of the training.
    tokenizer = load_tokenizer(ModelConfig(name=str(path)))
    positions = virtual_token_positions(config.method, base.vocab_size)
    chat = ChatTemplate(tokenizer, positions=positions, end_ids=base.end_ids)
    check_prompt(artifact, chat)
    return Policy(base, method), chat.with_control_tokens(config.data.control_tokens), config


def saved_chat(run: Path) -> ChatTemplate:
    """The template that a finished run was trained with; no weights are loaded."""
    tokenizer = load_tokenizer(ModelConfig(name=str(run)))
    artifact = run / ("model" if (run / "model").is_dir() else "adapter")
    return ChatTemplate(tokenizer, end_ids=saved_end_ids(artifact))


def share_base_if_same(run: Path, base: BaseModel | None) -> BaseModel | None:
    """A base that shares the weights of `base`, if the adapter of the run belongs on it; otherwise None."""
    if base is None or not (run / "adapter").is_dir():
        return None
    # Compared by fingerprint and not by name: the same name may hold other weights today.
    return base.share_weights() if read_manifest(run)["fingerprints"]["base"] == base.fingerprint else None


def open_runs(paths: Sequence[Path]) -> dict[str, LoadedRun]:
    """Runs with adapters on one base, by folder name; the weights of the base are in memory once.

    Raises `CheckpointError` for runs on different bases, `ConfigError` for full runs and for two runs of one name.
    """
    for path in paths:
        config_of_run(path)  # which says so where a folder holds no run
    if full_runs := [path for path in paths if not (path / "adapter").is_dir()]:
        summary = "a run that is a whole model shares no base"
        raise ConfigError(summary, given=full_runs[0], allowed="runs with an adapter")
    # The result is keyed by folder name, and a second run of one name would hide the first.
    if len({path.name for path in paths}) < len(paths):
        raise ConfigError("two of these runs have one name", given=", ".join(path.name for path in paths))
    if not paths:
        return {}
    # Modules of its own for each run: an adapter that is attached to one must not be seen by another.
    base = load_base_on_device(config_of_run(paths[0]).model)
    return {path.name: open_run(path, base.share_weights()) for path in paths}


def open_base(config: ModelConfig, base: BaseModel | None = None) -> LoadedRun:
    """A base without a run, ready to answer; `base` is what was loaded under this config."""
    base = load_base_on_device(config) if base is None else base
    return LoadedRun(Policy(base, NoMethod()), ChatTemplate.of_model(base.tokenizer, config, base.end_ids))


def test_records(config: RunConfig, splits: Splits) -> Records:
    """The test items, at most `evaluation.limit` of them, drawn by the seed."""
    return _limited_records(config, splits.test, "test")


def validation_records(config: RunConfig, splits: Splits) -> Records:
    """The validation items, on which choices are measured, limited as the test items are."""
    return _limited_records(config, splits.validation, "validation")


def _limited_records(config: RunConfig, split: Records, name: str) -> Records:
    where = f"data.{name}"
    if not split:
        share_or_file = getattr(config.data, name)
        summary = f"there is no {name} split to score on"
        raise ConfigError(summary, where=where, given=share_or_file, hint=f"set {where}: 0.1")
    # An undesirable answer, or one that is not to be learned, is not the expected one; tests expect no answer.
    needs_answer = set(config.evaluation.metrics) != {CODE}
    without_expected = (
        record.is_undesirable or record.is_excluded or (record.is_prompt_only and needs_answer) for record in split
    )
    indices = np.flatnonzero([not is_without for is_without in without_expected])
    if not len(indices):
        raise ConfigError(f"no row of the {name} split has an answer to expect", where=where)
    # The first of one permutation, so that a larger limit adds items to those of a smaller one. Sorted, so that the
    # items keep the order of the data.
    order = np.random.default_rng([config.seed, 2]).permutation(len(indices))
    return split.select(indices[np.sort(order[: config.evaluation.limit])])


def dequantize_if_configured(policy: Policy, config: RunConfig) -> None:
    """With `evaluation.dequantize`, dequantize the base before it answers."""
    if config.evaluation.dequantize:
        dequantize(policy, config)


def dequantize(policy: Policy, config: RunConfig) -> None:
    """Replace quantized weights by the same numbers in full width, which takes more memory."""
    method = policy.method
    if isinstance(method, Lora) and method.kind == "qlora":
        dequantize_base(policy.model)
        # The fused functions were made for the quantized modules that are now replaced.
        if config.model.fused:
            install_fused_forwards(policy.model, method.linear_params)


def score(model: LoadedRun, config: RunConfig, records: Sequence[Record]) -> Evaluation:
    """Score records whose contexts are set by `dataset.with_contexts`; a base gets `evaluation.instruction`."""
    dequantize_if_configured(model.policy, config)
    # A run was trained on bare questions, so an instruction would only disturb it.
    prompt_format = PromptFormat()
    if model.kind == "base":
        choices = config.evaluation.choices
        labels = () if choices is None or choices.labels == "auto" else choices.labels
        prompt_format = PromptFormat(config.evaluation.instruction, choices=labels)
    server = evaluation_answers(config, model.config, model.folder)
    return evaluate(model.policy, model.chat, records, prompt_format, config.evaluation, server=server)


@overload
def load(target: str | Path) -> LoadedRun: ...


@overload
def load(target: list[str | Path] | tuple[str | Path, ...]) -> dict[str, LoadedRun]: ...


def load(target: str | Path | list[str | Path] | tuple[str | Path, ...]) -> LoadedRun | dict[str, LoadedRun]:
    """Load a run or a base that answers, or several runs on one base, by folder name.

    The weights of a shared base are in memory once, and the adapters are independent. A base is a name from `rung
    models`, a transformers folder, a GGUF file or a hub id.

    Raises `CheckpointError` for a run that is not finished, damaged, or on another base than the first.
    """
    if isinstance(target, str | Path):
        return open_target(target)
    return open_runs([Path(run) for run in target])
