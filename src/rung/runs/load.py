"""Finished runs and bases, ready to answer, and what they are asked: the held-out items of a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rung.data.chat import Chat
from rung.data.prompt_positions import Inserted
from rung.data.records import Records
from rung.data.splits import Splits
from rung.console import stage
from rung.training.run_folder import read_manifest
from rung.errors import CheckpointError, ConfigError, PlanError
from rung.evaluation.prompting import Framing
from rung.evaluation.evaluate import Evaluation, evaluate
from rung.methods.lora import Lora
from rung.methods.registry import attach
from rung.models.fused_modules import fuse
from rung.models.load import check_fingerprint, load_base, load_tokenizer
from rung.models.base_model import Base
from rung.models.policy import Policy, Untouched
from rung.objectives.reward import Reward, ScoreHead
from rung.runs.artifact import check_origin, check_prompt
from rung.runs.reward_head import read_score
from rung.config.io import parse_config
from rung.config.method import MethodSpec, inserted
from rung.config.model import ModelSpec
from rung.config.objective import RewardSpec
from rung.config.run import RunSpec
from rung.types import Record
from rung.files import check_whole


def device() -> torch.device:
    """Where a run computes. The CUDA path is dispatched but was not measured."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base_on_device(spec: ModelSpec) -> Base:
    """The base of a spec on the device in use."""
    with stage(f"loading {spec.student_of or spec.name}"):
        return load_base(spec, device=device())


def inserted_in(method: MethodSpec, base: Base) -> Inserted | None:
    """The virtual tokens that stand inside a conversation, by ids beyond the base's vocabulary."""
    ids = inserted(method, int(base.model.get_input_embeddings().weight.shape[0]))
    return Inserted(ids) if ids else None


def open_run(path: Path, base: Base | None = None) -> tuple[Policy, Chat, RunSpec]:
    """A finished run, ready to answer: its base, or the one given, with its method on top.

    Raises `CheckpointError` on another base, `PlanError` for a reward model, which writes nothing.
    """
    policy, chat, spec = _open(path, base)
    if spec.objective.kind == "reward":
        raise PlanError(
            "this run is a reward model: it gives scores and writes nothing",
            where=str(path),
            hint="rung eval measures it on held-out pairs",
        )
    return policy, chat, spec


def spec_of(run: Path) -> RunSpec:
    """The config that a run was made by."""
    return parse_config(read_manifest(run)["spec"], str(run / "run.json"))


def open_reward(path: Path, base: Base | None = None) -> tuple[Policy, Chat, Reward, RunSpec]:
    """A finished reward model: its base, or the one given, with its method and its head on top.

    Raises `CheckpointError` for other runs, and on another base.
    """
    policy, chat, spec = _open(path, base)
    if not isinstance(spec.objective, RewardSpec):
        raise CheckpointError(
            "this run is no reward model", where=str(path), given=f"objective.kind: {spec.objective.kind}"
        )
    objective, folder = Reward(spec.objective), path / ("model" if (path / "model").is_dir() else "adapter")
    objective.head = ScoreHead(read_score(folder).to(policy.device))
    return policy, chat, objective, spec


def _open(path: Path, base: Base | None) -> tuple[Policy, Chat, RunSpec]:
    manifest = read_manifest(path)
    if manifest.get("status") != "finished" or not {"adapter", "model"} & {p.name for p in path.iterdir()}:
        raise CheckpointError(
            f"this run is not finished (status {manifest.get('status')})",
            where=str(path),
            hint="go on with: rung train --resume",
        )
    spec = parse_config(manifest["spec"], str(path / "run.json"))
    if (path / "model").is_dir():  # with its own tokenizer and template
        inside = path
        if spec.objective.kind == "reward":  # which is no run to build on: loaded by its folder, and checked here
            inside = path / "model"
            check_whole(inside)
        base = load_base_on_device(ModelSpec(name=str(inside), dtype=spec.model.dtype))
        chat = Chat(base.tokenizer)
        check_prompt(path / "model", chat)
        return Policy(base, Untouched()), chat, spec
    check_whole(path / "adapter")
    base = load_base_on_device(spec.model) if base is None else base
    check_fingerprint(manifest, base, path)
    check_origin(path / "adapter", base)
    method = attach(base.model, spec.method, seed=spec.seed, fused=spec.model.fused)
    method.load(path / "adapter")
    tokenizer = load_tokenizer(ModelSpec(name=str(path)))  # with the template trained with
    chat = Chat(tokenizer, inserted=inserted_in(spec.method, base))
    check_prompt(path / "adapter", chat)
    return Policy(base, method), chat, spec


def once_more(run: Path, base: Base | None) -> Base | None:
    """The weights at hand in modules of their own, where a run's adapter stands on them; None where it does not."""
    if base is None or not (run / "adapter").is_dir():
        return None
    return base.twin() if read_manifest(run)["fingerprints"]["base"] == base.fingerprint else None


def open_runs(paths: Sequence[Path]) -> dict[str, tuple[Policy, Chat]]:
    """Adapters of one base by the names of their folders, its weights held once: each answers by itself.

    Raises `CheckpointError` for runs of another base, `ConfigError` for runs that are whole models or of one name.
    """
    if whole := [path for path in paths if not (path / "adapter").is_dir()]:
        raise ConfigError("a run that is a whole model shares no base", given=whole[0], allowed="runs with an adapter")
    if len({path.name for path in paths}) < len(paths):
        raise ConfigError("two of these runs have one name", given=", ".join(path.name for path in paths))
    if not paths:
        return {}
    base = load_base_on_device(parse_config(read_manifest(paths[0])["spec"], str(paths[0])).model)
    opened = {path.name: open_run(path, base.twin()) for path in paths}
    return {name: (policy, chat) for name, (policy, chat, _) in opened.items()}


def open_base(spec: ModelSpec) -> tuple[Policy, Chat]:
    """A base alone, ready to answer."""
    base = load_base_on_device(spec)
    return Policy(base, Untouched()), Chat(base.tokenizer, spec.template)


def test_records(spec: RunSpec, splits: Splits) -> Records:
    """The held-out items, at most `evaluate.limit` of them in the order of the seed."""
    return _to_answer(spec, splits.test, "test")


def validation_records(spec: RunSpec, splits: Splits) -> Records:
    """What choices are measured on, taken from the validation split as `test_records` are from the test split."""
    return _to_answer(spec, splits.validation, "validation")


def _to_answer(spec: RunSpec, part: Records, name: str) -> Records:
    where = f"data.{name}"
    if not part:
        given = getattr(spec.data, name)
        raise ConfigError(f"there is no {name} split to score on", where=where, given=given, hint=f"set {where}: 0.1")
    expected = np.flatnonzero([not (record.bad or record.unanswered) for record in part])
    if not len(expected):  # a bad answer is no answer to expect
        raise ConfigError(f"no row of the {name} split has an answer to expect", where=where)
    order = np.random.default_rng([spec.seed, 2]).permutation(len(expected))
    return part.select(expected[np.sort(order[: spec.evaluate.limit])])


def widen_if_asked(policy: Policy, spec: RunSpec) -> None:
    """With `evaluate.dequantise`, hold a quantised base in full width before it answers."""
    if spec.evaluate.dequantise:
        widen(policy, spec)


def widen(policy: Policy, spec: RunSpec) -> None:
    """Hold a quantised base in full width: the same numbers, in more memory."""
    method = policy.method
    if isinstance(method, Lora) and method.quantised is not None:
        method.quantised.widen(policy.model)
        if spec.model.fused:
            fuse(policy.model, method.part)


def score_policy(policy: Policy, chat: Chat, spec: RunSpec, records: Sequence[Record], *, tuned: bool) -> Evaluation:
    """Score test records as they are asked (`prepared.as_asked`); an untuned model gets `evaluate.instruction`."""
    widen_if_asked(policy, spec)
    return evaluate(policy, chat, records, Framing(None if tuned else spec.evaluate.instruction), spec.evaluate)
