"""The auxiliary models of a run: reference, reward model, value model and teacher.

They are loaded before the method is attached, because a copy of the base's weights can only be shared as it was loaded.
A model on the run's own base shares its weights, which saves memory and demands that no method changes the base. The
objects are complete when constructed: `runs/train.py` passes them to the policy, the objective and the rollouts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rung.config.method import BASE_CHANGING_METHODS, LoraConfig
from rung.config.model import WITHOUT_RUN_SETTINGS
from rung.config.objective import (
    DistillConfig,
    FunctionRewardConfig,
    JudgeRewardConfig,
    ModelRewardConfig,
    PpoConfig,
)
from rung.config.run import RunConfig
from rung.console import print_status
from rung.data.chat import ChatTemplate
from rung.data.parsed_answer import ParsedAnswer
from rung.data.tokenize import PromptDataset
from rung.data.tool_calls import calls_of_message, canonical_calls
from rung.errors import ConfigError, PlanError
from rung.evaluation.reward_model import RewardScorer
from rung.methods.registry import attach_method
from rung.models.base_model import BaseModel
from rung.models.generate import GeneratedAnswer
from rung.models.policy import NoMethod, Policy
from rung.objectives.registry import ObjectiveModels
from rung.objectives.reward import ScoreHead
from rung.planning.advise import require_reward_run
from rung.runs.dataset import RunData
from rung.runs.judge import AnsweredQuestion, JudgeScorer, open_judge_reward
from rung.runs.load import load_base_in_parts, load_base_on_device, open_reward_model, share_base_if_same
from rung.runs.teacher import load_teacher, require_same_rope_boundary
from rung.scoring.verifiers import Verifier, make_verifier, verify_all
from rung.training.distributed import SINGLE_PROCESS, World
from rung.training.rollout import RewardFunction
from rung.training.run_folder import read_manifest
from rung.types import CodeTests, Example, Record

RewardSource = Verifier | RewardScorer | JudgeScorer
"""What scores an answer: a function of its text, a reward model, or a judge that compares it with others."""


@dataclass(frozen=True)
class AuxiliaryModels:
    """All auxiliary models of a run; most runs have none."""

    reference: Policy | None = None
    """Model of the reference log-probabilities, if it is not the base with the method switched off."""
    reward_source: RewardSource | None = None
    objective: ObjectiveModels = ObjectiveModels()
    """The value model and the teacher."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the models that the config names: a resumed run must find the same weights."""


def load_auxiliary_models(
    config: RunConfig, base: BaseModel, data: RunData, world: World = SINGLE_PROCESS
) -> AuxiliaryModels:
    """Load all auxiliary models of a run. Call it before the method is attached to `base`."""
    # not by `auto`: a run that resumes on another processor keeps the compute type of its base
    config = config.with_model(dtype=base.dtype_name)
    reward_source, (value_model, head) = load_reward_source(config, base, data.chat), load_value_model(config, base)
    reference = load_reference(config, base, world)
    fingerprints = {} if reference is None else {"reference": reference.base.fingerprint}
    if isinstance(config.objective.reward, ModelRewardConfig):
        run = Path(config.objective.reward.run)
        fingerprints["reward"] = _digest(sorted(run.glob("[am]*/**/*.safetensors")))  # of adapter/ or model/
    elif isinstance(config.objective.reward, FunctionRewardConfig):
        fingerprints["reward"] = _digest([Path(config.objective.reward.path.rpartition(":")[0])])
    elif isinstance(reward_source, JudgeScorer) and (weights := reward_source.judge.fingerprints):
        fingerprints["reward"] = hashlib.sha256("".join(weights).encode()).hexdigest()
    teacher = load_teacher(config, base) if isinstance(config.objective, DistillConfig) else None
    if teacher is not None:
        fingerprints["teacher"] = teacher.base.fingerprint
    models = ObjectiveModels(value_model, head, teacher, data.teacher_prompt)
    return AuxiliaryModels(reference, reward_source, models, fingerprints)


def load_reference(config: RunConfig, base: BaseModel, world: World = SINGLE_PROCESS) -> Policy | None:
    """The reference model, or None where it is the base with the method switched off, or where there is none."""
    name = config.objective.reference_model
    if name is None or (name == "base" and config.method.kind != "full"):
        return None
    model = config.model
    if name != "base":
        model = model.model_copy(update={"name": name, **WITHOUT_RUN_SETTINGS})
    reason = "the base moves" if name == "base" else "it is named"
    print_status(f"the reference is a second model in memory, because {reason}")
    in_parts = config.model.sharded and world.size > 1
    reference = load_base_in_parts(model, world, trains_base=False) if in_parts else load_base_on_device(model)
    if reference.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ConfigError("the reference has another vocabulary", where="objective.reference", given=name)
    require_same_rope_boundary(reference, base, "objective.reference")
    return Policy(reference, NoMethod())


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def load_reward_source(config: RunConfig, base: BaseModel, chat: ChatTemplate) -> RewardSource | None:
    """What rewards answers by the config, if anything; a reward model on the run's own base shares its weights.

    Raises `ConfigError` where it cannot be used, `PlanError` for a reward model that is not healthy and for a judge
    with which people do not agree.
    """
    source = config.objective.reward
    if source is None:
        return None
    if isinstance(source, JudgeRewardConfig):
        _print_judge_requests(config, source)
        return open_judge_reward(source, Path(config.output))
    if not isinstance(source, ModelRewardConfig):
        return make_verifier(source)
    path = Path(source.run)
    require_healthy_reward_run(source, "objective.reward")
    scorer, reward_config = open_scorer(path, chat, _shared_base(path, base, config))
    for name in ("context", *(("retrieve",) if config.evaluation.context == "retrieved" else ())):
        trained_value, value = getattr(reward_config.evaluation, name), getattr(config.evaluation, name)
        if trained_value != value:
            given = f"evaluation.{name}: {trained_value}"
            summary = "this reward model was trained on other prompts"
            raise ConfigError(summary, where=source.run, given=given, allowed=f"{value}")
    if tasks := set(reward_config.method.tasks) - set(config.method.tasks):
        summary = "this reward model learned something for each task, and this run knows other tasks"
        raise ConfigError(summary, where=source.run, given=", ".join(sorted(tasks)))
    return scorer


def require_healthy_reward_run(source: ModelRewardConfig, where: str) -> None:
    """Raise `PlanError` for a reward model whose check on held-out pairs was not passed, unless it is accepted.

    `where` is the setting that names it. Raises `ConfigError` for what is no reward run.
    """
    require_reward_run(source.run, f"{where}.run")
    health = read_manifest(Path(source.run)).get("reward") or {}
    if health.get("verdict") == "healthy":
        return
    verdict = f"{health['verdict']}: {health['reason']}" if health else "never measured: it had no validation pairs"
    if not source.accept:
        hint = f"better pairs or more of them; or {where}.accept: true"
        raise PlanError("this reward model is not fit to be followed", where=source.run, given=verdict, hint=hint)
    print_status(f"the reward model is taken although it is {verdict}")


def _print_judge_requests(config: RunConfig, source: JudgeRewardConfig) -> None:
    """Say how often a judge is asked: the number grows with the square of a group."""
    rollout, prompts = config.objective.rollout, config.training.examples_per_step
    answers = rollout.num_generations if rollout else 1
    # every pair in both orders
    requests = prompts * answers * (answers - 1 if source.against == "group" else 2)
    print_status(f"judge: up to {requests:,} verdicts a rollout, of {prompts:,} prompts with {answers} answers")


def open_scorer(run: Path, chat: ChatTemplate, base: BaseModel | None) -> tuple[RewardScorer, RunConfig]:
    """A reward model that reads answers in the tokens of `chat`, and its config; `base` is the base it may share."""
    policy, reward_chat, objective, config = open_reward_model(run, base)
    _require_same_tokens(run, reward_chat, chat)
    return RewardScorer(policy, objective), config


def _require_same_tokens(reward_run: Path, reward_chat: ChatTemplate, chat: ChatTemplate) -> None:
    """Raise `ConfigError` where a reward model would read other token ids than those it was trained on."""
    if reward_chat.tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        raise ConfigError("the reward model has another vocabulary", given=reward_run)
    if reward_chat.template != chat.template:
        raise ConfigError("the reward model was trained with another chat template", given=reward_run)
    if reward_chat.positions is not None or chat.positions is not None:
        summary = "a reward model and virtual tokens inside the text do not go together: they are other texts to each"
        raise ConfigError(summary, given=reward_run)


def load_value_model(config: RunConfig, base: BaseModel) -> tuple[Policy | None, ScoreHead | None]:
    """The value model of PPO: a new LoRA on the base's weights, or the reward model's adapter with its head.

    None for a method that changes the base: the value head then reads the policy's hidden states.
    """
    objective = config.objective
    if not isinstance(objective, PpoConfig):
        return None, None
    if objective.value == "reward" and isinstance(objective.reward, ModelRewardConfig):
        path = Path(objective.reward.run)
        shared_base = _shared_base(path, base, config)
        if shared_base is None:
            summary = "the value model can only begin as a reward model with an adapter on the run's own base"
            raise PlanError(summary, where="objective.value", given=str(path))
        policy, _, reward, _ = open_reward_model(path, shared_base)
        return policy, reward.head
    if config.method.kind in BASE_CHANGING_METHODS:
        return None, None
    value_base, lora = base.share_weights(), LoraConfig(rank=config.method.adapter_rank or LoraConfig().rank)
    method = attach_method(value_base.model, lora, seed=config.seed + 1, fused=config.model.fused)
    return Policy(value_base, method), None


def reward_function(source: RewardSource, chat: ChatTemplate, prompts: PromptDataset, budget: int) -> RewardFunction:
    """The reward of answers to these prompts."""
    if isinstance(source, RewardScorer):
        return lambda documents, answers: source(documents, budget)
    if isinstance(source, JudgeScorer):
        return _judge_function(source, chat, prompts)

    expected_calls: dict[int, str | None] = {}

    def verify(documents: Sequence[Example], answers: Sequence[GeneratedAnswer]) -> list[float]:
        texts, rows = [], []
        for document, generated in zip(documents, answers, strict=True):
            record = prompts.records[document.row]
            if document.row not in expected_calls:
                # a function of the user's may read calls that Rung cannot; other rewards were refused before the run
                expected_calls[document.row] = chat.expected_calls(record) if chat.reads_tool_calls else None
            answer = chat.parsed_answer(generated.all_tokens, stopped=generated.stopped)
            calls = chat.canonical_calls(answer.text) if expected_calls[document.row] else None
            texts.append(answer.text)
            rows.append(reward_row(record, answer, expected_calls[document.row], calls))
        return verify_all(source, texts, rows)

    return verify


def validation_source(source: RewardSource) -> RewardSource:
    """The reward of held-out answers, one to a prompt: a judge compares each with the expected answer of its row."""
    return replace(source, against="expected") if isinstance(source, JudgeScorer) else source


def _judge_function(scorer: JudgeScorer, chat: ChatTemplate, prompts: PromptDataset) -> RewardFunction:
    """The judge's scores of the answers to each prompt, without their reasoning."""

    def judge(documents: Sequence[Example], answers: Sequence[GeneratedAnswer]) -> list[float]:
        groups: dict[int, list[int]] = {}
        for i, document in enumerate(documents):
            groups.setdefault(document.row, []).append(i)
        texts = [chat.parsed_answer(answer.all_tokens, stopped=answer.stopped).text for answer in answers]
        questions = [AnsweredQuestion(prompts.records[row], [texts[i] for i in group]) for row, group in groups.items()]
        scores = {
            i: score
            for group, part in zip(groups.values(), scorer(questions), strict=True)
            for i, score in zip(group, part, strict=True)
        }
        return [scores[i] for i in range(len(documents))]

    return judge


def reward_row(record: Record, answer: ParsedAnswer, expected_calls: str | None, calls: str | None) -> dict[str, Any]:
    """The fields of a record that a reward function gets, with the parts of the answer that its text does not show.

    `expected_calls` and `calls` are the canonical tool calls of the record and of the answer. Where the template's
    calls cannot be read, `expected` has those of the record and `calls` is None.
    """
    fields = {name: getattr(record, name) for name in ("question", "references", "context", "task", "group")}
    tool_calls = record.messages[-1].tool_calls
    if tool_calls and expected_calls is None:
        expected_calls = canonical_calls(calls_of_message(tool_calls))
    tests = record.tests or CodeTests("")
    return {
        **fields,
        "tests": tests.source or None,
        "test_setup": tests.setup or None,
        "expected": record.answer if expected_calls is None else expected_calls,
        "expects_calls": bool(tool_calls),
        "calls": calls,
        "reasoning": answer.reasoning,
        "source": str(record.source),
    }


def _shared_base(run: Path, base: BaseModel, config: RunConfig) -> BaseModel | None:
    """The base's weights shared with the adapter of `run`, if it belongs to them and no method changes them."""
    return None if config.method.kind in BASE_CHANGING_METHODS else share_base_if_same(run, base)
