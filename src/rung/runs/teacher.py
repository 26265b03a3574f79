"""The teacher of a distillation: the model, the prompt that it reads, and the answers that it writes.

In prompt distillation (Snell et al. 2022) the teacher reads instruction, worked examples or passages before a question,
and the student learns its distributions from the bare question. Both documents end in the same answer ids. The teacher
may write these answers itself before training, so that rows need none; they are kept in the cache folder, and a run
that resumes finds them again. `runs.train` and the climb call `tokenize_run`, `runs.auxiliary_models` loads the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rung.config.method import BASE_CHANGING_METHODS
from rung.config.model import WITHOUT_RUN_SETTINGS
from rung.config.objective import DistillConfig
from rung.config.run import RunConfig
from rung.console import print_status
from rung.data.chat import ChatTemplate
from rung.data.records import Records
from rung.data.splits import Splits
from rung.errors import ConfigError, DataError
from rung.evaluation.prompting import PromptFormat, choose_shots, nearest_shots
from rung.evaluation.retrieval import Library
from rung.files import cache_folder
from rung.inference.ask import Conversation, Reply
from rung.inference.journal import Journal, request_key
from rung.inference.local_model import LocalModel
from rung.models.base_model import BaseModel
from rung.models.generate import Sampling
from rung.models.policy import NoMethod, Policy
from rung.runs.dataset import RunData, load_library, tokenize_splits, with_contexts
from rung.runs.load import load_base_on_device, weight_fingerprints
from rung.types import Example, Message, Record, Source

ROWS_CHECKED = 64
"""Rows whose teacher prompts are measured before training: those of the longest texts."""


def tokenize_run(
    config: RunConfig,
    splits: Splits,
    base: BaseModel,
    library: Library | None = None,
    example_rows: Records | None = None,
) -> RunData:
    """The tokenized data of a run, with the answers and the prompts of its teacher where the config asks for them.

    `base` must be as it was loaded: the teacher may share its weights. `example_rows` are those of the teacher's worked
    examples; by default the training rows of the run.
    """
    objective = config.objective
    if not isinstance(objective, DistillConfig) or (objective.teacher_sees is None and not objective.asks_teacher):
        return tokenize_splits(config, splits, base, library)
    if library is None and config.retrieves:
        library = load_library(config, splits)
    chat = ChatTemplate.of_model(base.tokenizer, config.model, base.end_ids)
    prompts = TeacherPrompts.of_run(config, splits, chat.with_control_tokens(None), library, example_rows)
    if objective.asks_teacher:
        splits = _with_teacher_answers(config, splits, prompts, base)
    data = tokenize_splits(config, splits, base, library)
    if objective.teacher_sees is None:
        return data
    prompts.check_room(base.context)
    return replace(data, teacher_prompt=prompts)


@dataclass(frozen=True)
class TeacherPrompts:
    """What the teacher reads before each answer; rows are found by their source."""

    records: dict[Source, tuple[Records, int]]
    """The rows with the context that the teacher sees: their records and their place in them."""
    prompt_format: PromptFormat
    chat: ChatTemplate

    @staticmethod
    def of_run(
        config: RunConfig,
        splits: Splits,
        chat: ChatTemplate,
        library: Library | None,
        example_rows: Records | None = None,
    ) -> TeacherPrompts:
        """The prompts of a run's teacher, for training and validation rows; `example_rows` as in `tokenize_run`."""
        objective = config.objective
        sees = objective.teacher_sees if isinstance(objective, DistillConfig) else None
        context = (sees.context if sees is not None else None) or config.evaluation.context
        train, validation = (with_contexts(context, part, library) for part in (splits.train, splits.validation))
        examples = train if example_rows is None else with_contexts(context, example_rows, library)
        prompt_format = PromptFormat()
        if sees is not None:
            instruction = config.evaluation.instruction if sees.instruction else None
            if sees.example_selection == "similarity":
                # one more, because the nearest question to a training row is its own
                prompt_format = PromptFormat(instruction, nearest_shots=nearest_shots(examples, sees.shots + 1))
            else:
                shots = choose_shots(examples, sees.shots, config.seed, sees.example_selection or "random")
                prompt_format = PromptFormat(instruction, shots)
        records: dict[Source, tuple[Records, int]] = {}
        for part in (train, validation):
            for i in range(len(part)):
                records.setdefault(part.source(i), (part, i))
        return TeacherPrompts(records, prompt_format, chat)

    def __call__(self, document: Example) -> NDArray[np.int32]:
        """Ids of the prompt for a document of the student."""
        records, i = self.records[document.source]
        record = records.at(i)
        return np.array(self.chat.prompt_ids(self.turns(record), tools=record.tools), dtype=np.int32)

    def turns(self, record: Record) -> tuple[Message, ...]:
        """The turns before the answer. A row is never a worked example of itself, or its answer could be copied."""
        shots, nearest = self.prompt_format.shots, self.prompt_format.nearest_shots
        if nearest is not None:
            shots = nearest(record)
        others = tuple(shot for shot in shots if shot.source != record.source)
        if nearest is not None:
            others = others[1 - len(shots) :]  # without the farthest where the row itself was not among them
        return PromptFormat(self.prompt_format.instruction, others).turns(record)

    def check_room(self, context: int) -> None:
        """Raise `DataError` for a prompt as long as the teacher's context; only the longest texts are rendered."""
        rows = ((records.at(i), source) for source, (records, i) in self.records.items())
        longest = sorted(rows, key=lambda row: -_characters(row[0]))[:ROWS_CHECKED]
        for record, source in longest:
            ids = self.chat.prompt_ids(self.turns(record), tools=record.tools)
            if len(ids) + 1 >= context:
                summary = f"the teacher's prompt has {len(ids):,} tokens, and its context {context:,}"
                hint = "lower objective.teacher_sees.shots, or retrieve less"
                raise DataError(summary, where=str(source), hint=hint)


def _characters(record: Record) -> int:
    return len(record.context or "") + sum(len(message.content) for message in record.messages)


def _with_teacher_answers(config: RunConfig, splits: Splits, prompts: TeacherPrompts, base: BaseModel) -> Splits:
    """Training and validation rows with greedy answers of the teacher; rows without a complete one are left out."""
    parts = (splits.train, splits.validation)
    records = [record for part in parts for record in part]
    for record in records:
        if record.tools:
            summary = "the teacher's answers are text, and this row offers tools"
            raise DataError(summary, where=str(record.source), hint="take objective.answers: data")
    teacher = load_teacher(config, base, before_training=True)
    replies = _teacher_replies(config, teacher, prompts, records)
    answered = [_answered(record, reply) for record, reply in zip(records, replies, strict=True)]
    cut = sum(reply is not None and not reply.answers[0].stopped for reply in replies)
    counts = {"rows": len(records), "answered": sum(r is not None for r in answered), "cut": cut}
    print_status(f"teacher's answers: {counts['answered']:,} of {counts['rows']:,} rows, {cut:,} left out as cut")
    if not any(answered[: len(splits.train)]):
        hint = "raise evaluation.max_new_tokens, set evaluation.stop, or give the teacher worked examples"
        raise DataError("the teacher completed no answer", where="objective.teacher", given=str(counts), hint=hint)
    train, validation = answered[: len(splits.train)], answered[len(splits.train) :]
    return replace(
        splits,
        train=Records.from_records(record for record in train if record is not None),
        validation=Records.from_records(record for record in validation if record is not None),
        notes={**splits.notes, "teacher_answers": counts},
    )


def _answered(record: Record, reply: Reply | None) -> Record | None:
    """The record with the teacher's answer; None where it is missing, empty or was cut."""
    if reply is None or not reply.answers[0].stopped or not reply.answers[0].text:
        return None
    message = Message("assistant", reply.answers[0].text, reasoning=reply.answers[0].reasoning or None)
    return replace(record, messages=(*record.messages[:-1], message), references=(), candidates=(), score=None)


def _teacher_replies(
    config: RunConfig, teacher: Policy, prompts: TeacherPrompts, records: Sequence[Record]
) -> list[Reply | None]:
    evaluation, objective = config.evaluation, config.objective
    name = objective.teacher if isinstance(objective, DistillConfig) else ""
    model = LocalModel(teacher, prompts.chat, weight_fingerprints(name, teacher), evaluation.stop)
    # greedy: the mode stands for the distribution (Kim and Rush 2016), and a run that resumes draws the same
    sampling = Sampling(evaluation.max_new_tokens)
    # a row with a weight is in the split several times
    distinct = {record.source: record for record in records}
    conversations = {
        source: Conversation(prompts.turns(_record_of(prompts, record)), task=record.task)
        for source, record in distinct.items()
    }
    identity: dict[str, Any] = {**model.identity, "prompts": [asdict(c) for c in conversations.values()]}
    path = cache_folder() / "teacher-answers" / f"{request_key(identity, asdict(sampling))}.jsonl"
    replies: dict[Source, Reply | None] = {}
    with closing(Journal(path, identity)) as journal:
        # apart: one row without one of the worked examples would take their common beginning from all others
        shots = {shot.source for shot in prompts.prompt_format.shots}
        for part in (conversations.keys() - shots, conversations.keys() & shots):
            asked = {source: c for source, c in conversations.items() if source in part}
            answers = model.ask(list(asked.values()), sampling, journal, title="teacher").replies
            replies |= dict(zip(asked, answers, strict=True))
    return [replies[record.source] for record in records]


def _record_of(prompts: TeacherPrompts, record: Record) -> Record:
    records, i = prompts.records[record.source]
    return records.at(i)


def load_teacher(config: RunConfig, base: BaseModel, *, before_training: bool = False) -> Policy:
    """The teacher of a distillation. Before training nothing has moved, so any method shares the base's weights.

    Raises `ConfigError` where teacher and student have other tokens.
    """
    objective = config.objective
    if not isinstance(objective, DistillConfig):
        raise TypeError("this objective has no teacher")
    if objective.teacher == "base":
        if before_training or config.method.kind not in BASE_CHANGING_METHODS:
            return Policy(base.share_weights(), NoMethod())
        print_status("the teacher is a second model in memory, because the base moves")
        return Policy(load_base_on_device(config.model), NoMethod())
    teacher = load_base_on_device(config.model.model_copy(update={"name": objective.teacher, **WITHOUT_RUN_SETTINGS}))
    student_ids, teacher_ids = base.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if student_ids != teacher_ids:
        pairs = sorted(student_ids.items() | teacher_ids.items())
        token = next(t for t, _ in pairs if student_ids.get(t) != teacher_ids.get(t))
        ids = f"{token!r} is {teacher_ids.get(token)} and {student_ids.get(token)}"
        summary = f"teacher and student have other tokens: {ids}"
        raise ConfigError(summary, where="objective.teacher", given=objective.teacher)
    require_same_rope_boundary(teacher, base, "objective.teacher")
    widths = [int(m.get_input_embeddings().weight.shape[1]) for m in (base.model, teacher.model)]
    if objective.cosine and widths[0] != widths[1]:
        raise ConfigError("hidden states of other widths have no angle", where="objective.cosine", given=widths)
    return Policy(teacher, NoMethod())


def require_same_rope_boundary(other: BaseModel, base: BaseModel, where: str) -> None:
    """Raise `ConfigError` for a second model on the same packed rows whose rotary frequencies change elsewhere."""
    if other.rope_boundary not in (None, base.rope_boundary):
        given = f"beyond {other.rope_boundary:,} tokens, and the trained model's {base.rope_boundary or 'never'}"
        raise ConfigError("rotary frequencies of both models change at different lengths", where=where, given=given)
