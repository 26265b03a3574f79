"""Finished runs and bases, ready to answer, and what they are asked: the held-out items of a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rung.config.io import parse_config
from rung.config.method import MethodConfig, inserted_token_ids
from rung.config.model import ModelConfig
from rung.config.objective import RewardConfig
from rung.config.run import RunConfig
from rung.console import status
from rung.data.chat import ChatTemplate
from rung.data.prompt_positions import PromptPositions
from rung.data.records import Records
from rung.data.splits import Splits
from rung.errors import CheckpointError, ConfigError, PlanError
from rung.evaluation.evaluate import Evaluation, evaluate
from rung.evaluation.prompting import PromptFormat
from rung.files import require_undamaged
from rung.methods.lora import Lora
from rung.methods.registry import attach_method
from rung.models.base_model import BaseModel
from rung.models.fused_modules import install_fused_forwards
from rung.models.load import check_fingerprint, load_base, load_tokenizer
from rung.models.policy import NoMethod, Policy
from rung.objectives.reward import RewardObjective, ScoreHead
from rung.runs.artifact import check_origin, check_prompt
from rung.runs.reward_head import read_score_head
from rung.training.run_folder import read_manifest
from rung.types import Record


def device() -> torch.device:
    """Where a run computes. The CUDA path is dispatched but was not measured."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base_on_device(config: ModelConfig) -> BaseModel:
    """The base of a config on the device in use."""
    with status(f"loading {config.student_of or config.name}"):
        return load_base(config, device=device())


def inserted_positions(method: MethodConfig, base: BaseModel) -> PromptPositions | None:
    """The virtual tokens that stand inside a conversation, by ids beyond the base's vocabulary."""
    ids = inserted_token_ids(method, int(base.model.get_input_embeddings().weight.shape[0]))
    return PromptPositions(ids) if ids else None


def open_run(path: Path, base: BaseModel | None = None) -> tuple[Policy, ChatTemplate, RunConfig]:
    """A finished run, ready to answer: its base, or the one given, with its method on top.

    Raises `CheckpointError` on another base, `PlanError` for a reward model, which writes nothing.
    """
    policy, chat, config = _open(path, base)
    if config.objective.kind == "reward":
        raise PlanError(
            "this run is a reward model: it gives scores and writes nothing",
            where=str(path),
            hint="rung eval measures it on held-out pairs",
        )
    return policy, chat, config


def config_of_run(run: Path) -> RunConfig:
    """The config that a run was made by."""
    return parse_config(read_manifest(run)["config"], str(run / "run.json"))


def open_reward_model(
    path: Path, base: BaseModel | None = None
) -> tuple[Policy, ChatTemplate, RewardObjective, RunConfig]:
    """A finished reward model: its base, or the one given, with its method and its head on top.

    Raises `CheckpointError` for other runs, and on another base.
    """
    policy, chat, config = _open(path, base)
    if not isinstance(config.objective, RewardConfig):
        raise CheckpointError(
            "this run is no reward model", where=str(path), given=f"objective.kind: {config.objective.kind}"
        )
    objective, folder = RewardObjective(config.objective), path / ("model" if (path / "model").is_dir() else "adapter")
    objective.head = ScoreHead(read_score_head(folder).to(policy.device))
    return policy, chat, objective, config


def _open(path: Path, base: BaseModel | None) -> tuple[Policy, ChatTemplate, RunConfig]:
    manifest = read_manifest(path)
    if manifest.get("status") != "finished" or not {"adapter", "model"} & {p.name for p in path.iterdir()}:
        raise CheckpointError(
            f"this run is not finished (status {manifest.get('status')})",
            where=str(path),
            hint="go on with: rung train --resume",
        )
    config = parse_config(manifest["config"], str(path / "run.json"))
    if (path / "model").is_dir():  # with its own tokenizer and template
        inside = path
        if config.objective.kind == "reward":  # which is no run to build on: loaded by its folder, and checked here
            inside = path / "model"
            require_undamaged(inside)
        base = load_base_on_device(ModelConfig(name=str(inside), dtype=config.model.dtype))
        chat = ChatTemplate(base.tokenizer)
        check_prompt(path / "model", chat)
        return Policy(base, NoMethod()), chat, config
    require_undamaged(path / "adapter")
    base = load_base_on_device(config.model) if base is None else base
    check_fingerprint(manifest, base, path)
    check_origin(path / "adapter", base)
    method = attach_method(base.model, config.method, seed=config.seed, fused=config.model.fused)
    method.load(path / "adapter")
    tokenizer = load_tokenizer(ModelConfig(name=str(path)))  # with the template trained with
    chat = ChatTemplate(tokenizer, positions=inserted_positions(config.method, base))
    check_prompt(path / "adapter", chat)
    return Policy(base, method), chat, config


def share_base_if_same(run: Path, base: BaseModel | None) -> BaseModel | None:
    """The weights at hand in modules of their own, where a run's adapter stands on them; None where it does not."""
    if base is None or not (run / "adapter").is_dir():
        return None
    return base.share_weights() if read_manifest(run)["fingerprints"]["base"] == base.fingerprint else None


def open_runs(paths: Sequence[Path]) -> dict[str, tuple[Policy, ChatTemplate]]:
    """Adapters of one base by the names of their folders, its weights held once: each answers by itself.

    Raises `CheckpointError` for runs of another base, `ConfigError` for runs that are whole models or of one name.
    """
    if whole := [path for path in paths if not (path / "adapter").is_dir()]:
        raise ConfigError("a run that is a whole model shares no base", given=whole[0], allowed="runs with an adapter")
    if len({path.name for path in paths}) < len(paths):
        raise ConfigError("two of these runs have one name", given=", ".join(path.name for path in paths))
    if not paths:
        return {}
    base = load_base_on_device(parse_config(read_manifest(paths[0])["config"], str(paths[0])).model)
    opened = {path.name: open_run(path, base.share_weights()) for path in paths}
    return {name: (policy, chat) for name, (policy, chat, _) in opened.items()}


def open_base(config: ModelConfig) -> tuple[Policy, ChatTemplate]:
    """A base alone, ready to answer."""
    base = load_base_on_device(config)
    return Policy(base, NoMethod()), ChatTemplate(base.tokenizer, config.template)


def test_records(config: RunConfig, splits: Splits) -> Records:
    """The held-out items, at most `evaluation.limit` of them in the order of the seed."""
    return _limited_records(config, splits.test, "test")


def validation_records(config: RunConfig, splits: Splits) -> Records:
    """What choices are measured on, taken from the validation split as `test_records` are from the test split."""
    return _limited_records(config, splits.validation, "validation")


def _limited_records(config: RunConfig, part: Records, name: str) -> Records:
    where = f"data.{name}"
    if not part:
        given = getattr(config.data, name)
        raise ConfigError(f"there is no {name} split to score on", where=where, given=given, hint=f"set {where}: 0.1")
    expected = np.flatnonzero([not (record.is_undesirable or record.is_prompt_only) for record in part])
    if not len(expected):  # a bad answer is no answer to expect
        raise ConfigError(f"no row of the {name} split has an answer to expect", where=where)
    order = np.random.default_rng([config.seed, 2]).permutation(len(expected))
    return part.select(expected[np.sort(order[: config.evaluation.limit])])


def dequantize_if_configured(policy: Policy, config: RunConfig) -> None:
    """With `evaluation.dequantize`, hold a quantized base in full width before it answers."""
    if config.evaluation.dequantize:
        dequantize(policy, config)


def dequantize(policy: Policy, config: RunConfig) -> None:
    """Hold a quantized base in full width: the same numbers, in more memory."""
    method = policy.method
    if isinstance(method, Lora) and method.quantized is not None:
        method.quantized.dequantize(policy.model)
        if config.model.fused:
            install_fused_forwards(policy.model, method.linear_params)


def score_policy(
    policy: Policy, chat: ChatTemplate, config: RunConfig, records: Sequence[Record], *, tuned: bool
) -> Evaluation:
    """Score test records as `dataset.with_contexts` gives them; an untuned model gets `evaluation.instruction`."""
    dequantize_if_configured(policy, config)
    return evaluate(
        policy, chat, records, PromptFormat(None if tuned else config.evaluation.instruction), config.evaluation
    )
