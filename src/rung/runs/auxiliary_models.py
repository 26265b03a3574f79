"""The other models of a run: what its policy is compared with, scored by or taught by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rung.config.method import BASE_CHANGING_METHODS, LoraConfig
from rung.config.model import WITHOUT_RUN_SETTINGS
from rung.config.objective import DistillConfig, FunctionRewardConfig, ModelRewardConfig, PpoConfig
from rung.config.run import RunConfig
from rung.console import print_status
from rung.data.chat import ChatTemplate
from rung.data.tokenize import PromptDataset
from rung.errors import ConfigError, PlanError
from rung.evaluation.reward_model import RewardScorer
from rung.methods.registry import attach_method
from rung.models.base_model import BaseModel
from rung.models.generate import GeneratedAnswer
from rung.models.policy import NoMethod, Policy
from rung.objectives.registry import ObjectiveModels
from rung.objectives.reward import ScoreHead
from rung.planning.advise import require_reward_run
from rung.runs.load import load_base_on_device, open_reward_model, share_base_if_same
from rung.scoring.verifiers import Verifier, make_verifier
from rung.training.rollout import RewardFunction
from rung.training.run_folder import read_manifest
from rung.types import Example, Record


def load_reference(config: RunConfig, base: BaseModel) -> Policy | None:
    """The model that an objective compares with, where it is not the base with the method off."""
    named = config.objective.reference_model
    if named is None:
        return None
    if named == "base" and config.method.kind != "full":
        return None
    other = config.model if named == "base" else config.model.model_copy(update={"name": named, **WITHOUT_RUN_SETTINGS})
    why = "the base moves" if named == "base" else "it is named"
    print_status(f"the reference is a second model in memory, because {why}")
    found = load_base_on_device(other)
    if found.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ConfigError("the reference has another vocabulary", where="objective.reference", given=named)
    return Policy(found, NoMethod())


RewardSource = Verifier | RewardScorer
"""What says how much an answer is worth: a function of its text, or a reward model."""


@dataclass(frozen=True)
class AuxiliaryModels:
    """Every other model of a run; most runs have none."""

    reference: Policy | None = None
    """What log-probabilities are compared with, where that is not the base with the method off."""
    reward_source: RewardSource | None = None
    objective: ObjectiveModels = ObjectiveModels()
    """The value model and the teacher."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of the models that the config names: a resumed run must find the same weights."""


def load_auxiliary_models(config: RunConfig, base: BaseModel, chat: ChatTemplate) -> AuxiliaryModels:
    """Load them, before the method is attached: a copy of the base's weights can only be shared as it was loaded."""
    reward_source, (value_model, head) = load_reward_source(config, base, chat), load_value_model(config, base)
    reference = load_reference(config, base)
    fingerprints = {} if reference is None else {"reference": reference.base.fingerprint}
    if isinstance(reward_source, RewardScorer):
        run = Path(config.objective.reward.run)  # type: ignore[union-attr]
        fingerprints["reward"] = _digest(sorted(run.glob("[am]*/**/*.safetensors")))  # of adapter/ or model/
    elif isinstance(config.objective.reward, FunctionRewardConfig):
        fingerprints["reward"] = _digest([Path(config.objective.reward.path.rpartition(":")[0])])
    teacher = load_teacher(config, base)
    if teacher is not None:
        fingerprints["teacher"] = teacher.base.fingerprint
    return AuxiliaryModels(reference, reward_source, ObjectiveModels(value_model, head, teacher), fingerprints)


def load_teacher(config: RunConfig, base: BaseModel) -> Policy | None:
    """What a student follows. Raises `ConfigError` where their tokens are not the same."""
    objective = config.objective
    if not isinstance(objective, DistillConfig):
        return None
    found = load_base_on_device(config.model.model_copy(update={"name": objective.teacher, **WITHOUT_RUN_SETTINGS}))
    own, theirs = base.tokenizer.get_vocab(), found.tokenizer.get_vocab()
    if own != theirs:
        differ = next(t for t, i in sorted(own.items() | theirs.items()) if own.get(t) != theirs.get(t))
        what = f"teacher and student have other tokens: {differ!r} is {theirs.get(differ)} and {own.get(differ)}"
        raise ConfigError(what, where="objective.teacher", given=objective.teacher)
    widths = [int(m.get_input_embeddings().weight.shape[1]) for m in (base.model, found.model)]
    if objective.cosine and widths[0] != widths[1]:
        raise ConfigError("hidden states of other widths have no angle", where="objective.cosine", given=widths)
    return Policy(found, NoMethod())


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def load_reward_source(config: RunConfig, base: BaseModel, chat: ChatTemplate) -> RewardSource | None:
    """Of the config's reward, where it has one; a reward model on the run's own base shares its weights.

    Raises `ConfigError` where it cannot be had, `PlanError` for a reward model that is not healthy.
    """
    source = config.objective.reward
    if source is None:
        return None
    if not isinstance(source, ModelRewardConfig):
        return make_verifier(source)
    path = Path(source.run)
    require_reward_run(source.run)
    manifest = read_manifest(path)
    health = manifest.get("reward") or {}
    if health.get("verdict") != "healthy":
        verdict = f"{health['verdict']}: {health['reason']}" if health else "never measured: it had no validation pairs"
        if not source.accept:
            hint = "better pairs or more of them; or objective.reward.accept: true"
            raise PlanError("this reward model is not fit to be followed", where=source.run, given=verdict, hint=hint)
        print_status(f"the reward model is taken although it is {verdict}")
    policy, theirs, objective, trained = open_reward_model(path, _shared_base(path, base, config))
    require_same_tokens(path, theirs, chat)
    for name in ("context", *(("retrieve",) if config.evaluation.context == "retrieved" else ())):
        learned, asked = getattr(trained.evaluation, name), getattr(config.evaluation, name)
        if learned != asked:
            what = "this reward model was trained on other prompts"
            raise ConfigError(what, where=source.run, given=f"evaluation.{name}: {learned}", allowed=f"{asked}")
    if tasks := set(trained.method.tasks) - set(config.method.tasks):
        what = "this reward model learned something for each task, and this run knows other tasks"
        raise ConfigError(what, where=source.run, given=", ".join(sorted(tasks)))
    return RewardScorer(policy, objective)


def require_same_tokens(reward: Path, theirs: ChatTemplate, ours: ChatTemplate) -> None:
    """A reward model must read the very ids that it was trained on. Raises `ConfigError` with what differs."""
    if theirs.tokenizer.get_vocab() != ours.tokenizer.get_vocab():
        raise ConfigError("the reward model has another vocabulary", given=reward)
    if theirs.template != ours.template:
        raise ConfigError("the reward model was trained with another chat template", given=reward)
    if theirs.positions is not None or ours.positions is not None:
        what = "a reward model and virtual tokens inside the text do not go together: they are other texts to each"
        raise ConfigError(what, given=reward)


def load_value_model(config: RunConfig, base: BaseModel) -> tuple[Policy | None, ScoreHead | None]:
    """The value model: a LoRA of its own on the base's weights, or the reward model's adapter with its head.

    A method that moves the base has none: values are read off the policy's own states.
    """
    objective = config.objective
    if not isinstance(objective, PpoConfig):
        return None, None
    if objective.value == "reward" and isinstance(objective.reward, ModelRewardConfig):
        path = Path(objective.reward.run)
        shared = _shared_base(path, base, config)
        if shared is None:
            what = "the value model can only begin as a reward model with an adapter on the run's own base"
            raise PlanError(what, where="objective.value", given=str(path))
        policy, _, reward, _ = open_reward_model(path, shared)
        return policy, reward.head
    if config.method.kind in BASE_CHANGING_METHODS:
        return None, None
    twin, plain = base.share_weights(), LoraConfig(rank=config.method.adapter_rank or LoraConfig().rank)
    return Policy(twin, attach_method(twin.model, plain, seed=config.seed + 1, fused=config.model.fused)), None


def make_reward_function(
    worth: RewardSource, chat: ChatTemplate, prompted: PromptDataset, budget: int
) -> RewardFunction:
    """What answers to these prompts are worth."""
    if isinstance(worth, RewardScorer):
        return lambda documents, answers: worth(documents, budget)

    def by_text(documents: Sequence[Example], answers: Sequence[GeneratedAnswer]) -> list[float]:
        texts = [chat.assistant_text(a.all_tokens).strip() for a in answers]
        return [worth(text, reward_row(prompted.records[d.row])) for text, d in zip(texts, documents, strict=True)]

    return by_text


def reward_row(record: Record) -> dict[str, Any]:
    """A record as a reward function sees it."""
    return {
        "question": record.question,
        "expected": record.answer,
        "context": record.context,
        "task": record.task,
        "group": record.group,
        "source": str(record.source),
    }


def _shared_base(run: Path, base: BaseModel, config: RunConfig) -> BaseModel | None:
    """The base's weights once more, where a run's adapter stands on them and nothing moves them."""
    return None if config.method.kind in BASE_CHANGING_METHODS else share_base_if_same(run, base)
