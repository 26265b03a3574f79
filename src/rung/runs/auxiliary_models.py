"""The other models of a run: what its policy is compared with, scored by or taught by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rung.data.chat import Chat
from rung.data.tokenize import Prompted
from rung.console import say
from rung.training.run_folder import read_manifest
from rung.training.rollout import Judge
from rung.errors import ConfigError, PlanError
from rung.evaluation.reward_model import Scorer
from rung.methods.registry import attach
from rung.models.generate import Answer
from rung.models.base_model import Base
from rung.models.policy import Policy, Untouched
from rung.objectives.reward import ScoreHead
from rung.runs.load import load_base_on_device, once_more, open_reward
from rung.planning.advise import require_reward_run
from rung.scoring.verifiers import Verifier, verifier
from rung.config.method import MOVES_BASE, LoraSpec
from rung.config.model import ALONE
from rung.config.objective import DistillSpec, FunctionSpec, ModelRewardSpec, PpoSpec
from rung.config.run import RunSpec
from rung.types import Example, Record


def reference_of(spec: RunSpec, base: Base) -> Policy | None:
    """The model that an objective compares with, where it is not the base with the method off."""
    named = getattr(spec.objective, "against", None)
    if named is None:
        return None
    if named == "base" and spec.method.kind != "full":
        return None
    other = spec.model if named == "base" else spec.model.model_copy(update={"name": named, **ALONE})
    why = "the base moves" if named == "base" else "it is named"
    say(f"the reference is a second model in memory, because {why}")
    found = load_base_on_device(other)
    if found.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ConfigError("the reference has another vocabulary", where="objective.reference", given=named)
    return Policy(found, Untouched())


Worth = Verifier | Scorer
"""What says how much an answer is worth: a function of its text, or a reward model."""


@dataclass(frozen=True)
class Beside:
    """Every other model of a run; most runs have none."""

    reference: Policy | None = None
    worth: Worth | None = None
    critic: Policy | None = None
    teacher: Policy | None = None
    head: ScoreHead | None = None
    """That the value model begins with."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of those that are named: a resumed run must find the very same."""


def beside(spec: RunSpec, base: Base, chat: Chat) -> Beside:
    """Load them, before the method is attached: a copy of the base's weights can only be shared as it was loaded."""
    worth, (critic, head), reference = worth_of(spec, base, chat), critic_of(spec, base), reference_of(spec, base)
    prints = {} if reference is None else {"reference": reference.base.fingerprint}
    if isinstance(worth, Scorer):
        run = Path(spec.objective.reward.run)  # type: ignore[union-attr]
        prints["reward"] = _digest(sorted(run.glob("[am]*/**/*.safetensors")))  # of adapter/ or model/
    elif isinstance(getattr(spec.objective, "reward", None), FunctionSpec):
        prints["reward"] = _digest([Path(spec.objective.reward.path.rpartition(":")[0])])  # type: ignore[union-attr]
    teacher = teacher_of(spec, base)
    if teacher is not None:
        prints["teacher"] = teacher.base.fingerprint
    return Beside(reference, worth, critic, teacher, head, prints)


def teacher_of(spec: RunSpec, base: Base) -> Policy | None:
    """What a student follows. Raises `ConfigError` where their tokens are not the same."""
    objective = spec.objective
    if not isinstance(objective, DistillSpec):
        return None
    found = load_base_on_device(spec.model.model_copy(update={"name": objective.teacher, **ALONE}))
    own, theirs = base.tokenizer.get_vocab(), found.tokenizer.get_vocab()
    if own != theirs:
        differ = next(t for t, i in sorted(own.items() | theirs.items()) if own.get(t) != theirs.get(t))
        what = f"teacher and student have other tokens: {differ!r} is {theirs.get(differ)} and {own.get(differ)}"
        raise ConfigError(what, where="objective.teacher", given=objective.teacher)
    widths = [int(m.get_input_embeddings().weight.shape[1]) for m in (base.model, found.model)]
    if objective.cosine and widths[0] != widths[1]:
        raise ConfigError("hidden states of other widths have no angle", where="objective.cosine", given=widths)
    return Policy(found, Untouched())


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def worth_of(spec: RunSpec, base: Base, chat: Chat) -> Worth | None:
    """Of the config's reward, where it has one; a reward model on the run's own base shares its weights.

    Raises `ConfigError` where it cannot be had, `PlanError` for a reward model that is not healthy.
    """
    source = getattr(spec.objective, "reward", None)
    if source is None:
        return None
    if not isinstance(source, ModelRewardSpec):
        return verifier(source)
    path = Path(source.run)
    require_reward_run(source.run)
    manifest = read_manifest(path)
    health = manifest.get("reward") or {}
    if health.get("verdict") != "healthy":
        verdict = f"{health['verdict']}: {health['reason']}" if health else "never measured: it had no validation pairs"
        if not source.accept:
            hint = "better pairs or more of them; or objective.reward.accept: true"
            raise PlanError("this reward model is not fit to be followed", where=source.run, given=verdict, hint=hint)
        say(f"the reward model is taken although it is {verdict}")
    policy, theirs, objective, trained = open_reward(path, _shared(path, base, spec))
    same_text(path, theirs, chat)
    for name in ("context", *(("retrieve",) if spec.evaluate.context == "retrieved" else ())):
        learned, asked = getattr(trained.evaluate, name), getattr(spec.evaluate, name)
        if learned != asked:
            what = "this reward model was trained on other prompts"
            raise ConfigError(what, where=source.run, given=f"evaluate.{name}: {learned}", allowed=f"{asked}")
    if tasks := set(getattr(trained.method, "tasks", ())) - set(getattr(spec.method, "tasks", ())):
        what = "this reward model learned something for each task, and this run knows other tasks"
        raise ConfigError(what, where=source.run, given=", ".join(sorted(tasks)))
    return Scorer(policy, objective)


def same_text(reward: Path, theirs: Chat, ours: Chat) -> None:
    """A reward model must read the very ids that it was trained on. Raises `ConfigError` with what differs."""
    if theirs.tokenizer.get_vocab() != ours.tokenizer.get_vocab():
        raise ConfigError("the reward model has another vocabulary", given=reward)
    if theirs.template != ours.template:
        raise ConfigError("the reward model was trained with another chat template", given=reward)
    if theirs.inserted is not None or ours.inserted is not None:
        what = "a reward model and virtual tokens inside the text do not go together: they are other texts to each"
        raise ConfigError(what, given=reward)


def critic_of(spec: RunSpec, base: Base) -> tuple[Policy | None, ScoreHead | None]:
    """The value model: a LoRA of its own on the base's weights, or the reward model's adapter with its head.

    A method that moves the base has none: values are read off the policy's own states.
    """
    objective = spec.objective
    if not isinstance(objective, PpoSpec):
        return None, None
    if objective.value == "reward" and isinstance(objective.reward, ModelRewardSpec):
        path = Path(objective.reward.run)
        shared = _shared(path, base, spec)
        if shared is None:
            what = "the value model can only begin as a reward model with an adapter on the run's own base"
            raise PlanError(what, where="objective.value", given=str(path))
        policy, _, reward, _ = open_reward(path, shared)
        return policy, reward.head
    if spec.method.kind in MOVES_BASE:
        return None, None
    twin, plain = base.twin(), LoraSpec(rank=getattr(spec.method, "rank", LoraSpec().rank))
    return Policy(twin, attach(twin.model, plain, seed=spec.seed + 1, fused=spec.model.fused)), None


def judge(worth: Worth, chat: Chat, prompted: Prompted, budget: int) -> Judge:
    """What answers to these prompts are worth."""
    if isinstance(worth, Scorer):
        return lambda documents, answers: worth(documents, budget)

    def by_text(documents: Sequence[Example], answers: Sequence[Answer]) -> list[float]:
        texts = [chat.assistant_text(a.drawn).strip() for a in answers]
        return [worth(text, row_of(prompted.records[d.row])) for text, d in zip(texts, documents, strict=True)]

    return by_text


def row_of(record: Record) -> dict[str, Any]:
    """A record as a reward function sees it."""
    return {
        "question": record.question,
        "expected": record.answer,
        "context": record.context,
        "task": record.task,
        "group": record.group,
        "source": str(record.source),
    }


def _shared(run: Path, base: Base, spec: RunSpec) -> Base | None:
    """The base's weights once more, where a run's adapter stands on them and nothing moves them."""
    return None if spec.method.kind in MOVES_BASE else once_more(run, base)
