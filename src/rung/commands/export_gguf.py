"""GGUF files of a run: where the weights come from, what proves each file, and what each type costs in score.

A plain LoRA and a full run are streamed from their files; every other method is merged in memory into a folder that is
removed afterwards. The run's log-probabilities are computed before anything is written, so that run and file are never
in memory together. `export.py` calls `write_gguf_files`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rung.commands.compare import paired_scores
from rung.commands.evaluate import evaluation_task
from rung.commands.merge import memory_shortage
from rung.config.evaluation import MetricName
from rung.config.model import ModelConfig
from rung.config.run import RunConfig
from rung.console import ProgressBar, print_status, status
from rung.data.chat import ChatTemplate
from rung.data.parsed_answer import ParsedAnswer
from rung.data.template import for_template
from rung.errors import CheckpointError, ConfigError, GateError, PlanError, RungError
from rung.evaluation.evaluate import PERPLEXITY, Evaluation, score_answers
from rung.evaluation.prompting import PromptFormat
from rung.exporting import llama_cpp_process
from rung.exporting.commands import ADAPTER_ENDING
from rung.exporting.gguf_file import GgufModel, WrittenFile, write_adapter
from rung.exporting.gguf_layout import architecture_of, context_length
from rung.exporting.gguf_vocabulary import GgufVocabulary, general_name, read_vocabulary
from rung.exporting.llama_cpp import LlamaCpp
from rung.exporting.proof import (
    ProofRow,
    RunLogprobs,
    check_texts,
    choose_pre_tokenizer,
    compare_logprobs,
    next_token_logprobs,
    table_gelu,
)
from rung.exporting.quantization import FILE_TYPES, FileType
from rung.exporting.weights import LoraUpdate, ModelWeights, read_updates
from rung.files import require_undamaged
from rung.methods.adapter_files import other_than_plain_lora, read_state
from rung.models.base_model import quiet_transformers
from rung.models.fused_modules import original_forwards
from rung.models.load import base_files, load_end_ids, load_model_config, load_tokenizer, stored_fingerprint
from rung.report.formatting import format_bytes
from rung.results.base import GateResult
from rung.results.exports import ExportedFile
from rung.runs.artifact import KNOWN_CONVERSATION
from rung.runs.dataset import read_splits
from rung.runs.load import (
    LoadedRun,
    dequantize,
    load_base_on_device,
    open_base,
    open_run,
    saved_chat,
    score,
)
from rung.training.run_folder import read_json, read_manifest
from rung.types import Message, Record, Source

DEFAULT_TYPE = "q8_0"
PROOF_ROWS = 6
"""Rows on which a file is compared with the run: about a hundred positions."""
CANDIDATE_ROWS = 64
"""Rows of the run's data of which the shortest are taken: a long prompt proves no more and takes longer."""
PROBE_ANSWER = "In fiscal year 2023 revenue rose to 412 million, and costs fell by 3.5%."
"""Answer to the known conversation, on which a base without data of its own is compared."""
SPARE_SLOTS = 8
"""Slots of llama.cpp's context beyond the tokens of a row."""
FREE_SHARE = 1.02
"""Free disk space needed, over the bytes of the tensors: headers and vocabulary come on top."""


@dataclass(frozen=True)
class GgufRequest:
    """Which files are written."""

    types: tuple[str, ...] = ()
    """Names of `FILE_TYPES`; none is q8_0, which costs no score that can be measured and half the bytes of f16."""
    adapter: bool = False
    """Only the LoRA, as an adapter for the base in GGUF."""
    measure: int | None = None
    """Test questions that each file answers."""

    @property
    def file_types(self) -> dict[str, FileType]:
        """The types by name."""
        return {name.lower(): FILE_TYPES[name.lower()] for name in self.types or (DEFAULT_TYPE,)}


@dataclass(frozen=True)
class ExportSource:
    """What is exported."""

    target: str
    config: RunConfig | None
    """None for a base."""

    @property
    def model_config(self) -> ModelConfig:
        """Settings of the base: of a run its own, in float32."""
        model = ModelConfig(name=self.target) if self.config is None else self.config.model
        return model.model_copy(update={"dtype": "float32"})

    @property
    def adapter(self) -> Path | None:
        """The run's adapter; None for bases and for runs that are a whole model."""
        folder = Path(self.target) / "adapter"
        return folder if self.config is not None and folder.is_dir() else None

    @cached_property
    def updates(self) -> dict[str, LoraUpdate] | None:
        """The updates of a plain LoRA; None for other methods, which are merged in memory."""
        if self.adapter is None:
            return {}
        require_undamaged(self.adapter)
        if other_than_plain_lora(read_state(self.adapter), read_json(self.adapter / "adapter_config.json")) is not None:
            return None
        # what was trained is the quantized base, which is in no file
        return None if self.config is not None and self.config.method.kind == "qlora" else read_updates(self.adapter)

    def require_same_base(self) -> None:
        """Raise `CheckpointError` if the base's files are no longer those that the run was trained on."""
        if self.config is None or self.adapter is None:
            return
        stored = stored_fingerprint(self.config.model)
        if stored not in (None, read_manifest(Path(self.target))["fingerprints"]["base"]):
            given = self.config.model.name
            raise CheckpointError("this run was trained on another base", where=self.target, given=given)

    def open(self) -> LoadedRun:
        """The run or base in float32."""
        if self.config is None:
            return open_base(self.model_config)
        if self.adapter is None:
            return open_run(Path(self.target), load_base_on_device(ModelConfig(name=self.target, dtype="float32")))
        return open_run(Path(self.target), load_base_on_device(self.model_config))

    def chat(self) -> ChatTemplate:
        """Template and tokenizer; no weights are loaded."""
        if self.config is not None:
            return saved_chat(Path(self.target))
        return self.base_chat()

    def base_chat(self) -> ChatTemplate:
        """Template and tokenizer of the base as it comes; no weights are loaded."""
        config = ModelConfig(name=self.model_config.name)
        return ChatTemplate.of_model(load_tokenizer(config), config, load_end_ids(config))


@contextmanager
def source_weights(source: ExportSource, scratch: Path) -> Iterator[ModelWeights]:
    """The merged weights, streamed from files where that can be; `scratch` holds a merge in memory and is removed.

    Raises `PlanError` for a method that cannot be merged.
    """
    weights = _streamed_weights(source)
    if weights is None:
        _merge_in_memory(source, scratch)
        weights = ModelWeights(scratch)
    try:
        yield weights
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _streamed_weights(source: ExportSource) -> ModelWeights | None:
    folder = _model_folder(source)
    if folder is None or source.updates is None:
        return None
    source.require_same_base()
    try:
        return ModelWeights(folder, source.updates)
    except PlanError as error:
        print_status(f"merged in memory: {error.summary}")
        return None


def _merge_in_memory(source: ExportSource, folder: Path) -> None:
    model = source.open()
    merged: Any = model.policy.model
    if source.config is not None and source.adapter is not None:
        dequantize(model.policy, source.config)
        merged = model.policy.method.merge()  # type: ignore[attr-defined]
    with quiet_transformers():
        merged.float().save_pretrained(folder)


def _model_folder(source: ExportSource) -> Path | None:
    """The folder of safetensors that the weights are in, or the updates are added to; None if there is none."""
    if source.config is not None and source.adapter is None:
        return Path(source.target) / "model"
    return base_files(source.model_config)


def proof_rows(source: ExportSource, chat: ChatTemplate, context: int) -> list[ProofRow]:
    """Rows of the run's own data that fit into the context, and a known conversation, which is all that a base has."""
    records: Sequence[Record] = ()
    if source.config is not None:
        try:
            records = _own_records(source.target, source.config)
        except RungError as error:
            print_status(f"compared on a known conversation, since the run's data cannot be read: {error.summary}")
    turns = [Message("user", KNOWN_CONVERSATION), Message("assistant", PROBE_ANSWER)]
    known = _proof_row(chat, Record(tuple(turns), Source("known conversation", 1)))
    rows = [_proof_row(chat, record) for record in records if _is_comparable(chat, record)]
    # the known conversation has digits, spaces and characters of one to four bytes
    rows = [*sorted(rows, key=lambda row: len(row.ids))[: PROOF_ROWS - 1], known]
    fitting = [row for row in rows if len(row.ids) + SPARE_SLOTS <= context and len(row.answer)]
    if not fitting:
        raise PlanError("no row fits into the context that llama.cpp shares with this model", given=f"{context} tokens")
    return fitting


def _own_records(target: str, config: RunConfig) -> Sequence[Record]:
    """Test rows with the contexts that the run sees, or training rows where nothing is held out."""
    try:
        return evaluation_task(target, config=None, overrides=(), limit=CANDIDATE_ROWS).records
    except ConfigError:
        train = read_splits(config).train
        return train.select(slice(CANDIDATE_ROWS))


def _is_comparable(chat: ChatTemplate, record: Record) -> bool:
    """Whether a row has an answer, and no text that a server would take for control tokens where the run does not."""
    has_answer = not record.messages or record.messages[-1].role == "assistant"
    return has_answer and not chat.control_text.may_occur_in(record.messages, record.context, record.tools)


def _proof_row(chat: ChatTemplate, record: Record) -> ProofRow:
    if not record.messages:
        # as training reads a document without a template
        bos = [chat.bos_id] if chat.adds_bos and chat.bos_id is not None else []
        ids = [*bos, *chat.encode([record.text or ""])[0]]
        return ProofRow(ids[:1], ids[1:], None, text=record.text or "")
    turns = PromptFormat(None).turns(record)
    prompt = chat.prompt_ids(turns, tools=record.tools)
    answer = chat.encode([chat.split_conversation(record, "answer")[-1].text], mid_document=True)[0]
    tools = None if record.tools is None else json.loads(record.tools)
    return ProofRow(prompt, answer, [for_template(turn) for turn in turns], tools)


def _vocabulary(chat: ChatTemplate, size: int, rows: Sequence[ProofRow]) -> GgufVocabulary:
    """The vocabulary of the file; with llama.cpp its pre-tokenizer is tried on the rows."""
    vocabulary = read_vocabulary(chat, size)
    if not llama_cpp_process.is_installed():
        return vocabulary
    texts = [str(turn["content"]) for row in rows for turn in row.messages or ()]
    texts += [row.text for row in rows]
    return choose_pre_tokenizer(vocabulary, chat, [text for text in texts if text])


def write_gguf_files(
    source: ExportSource, request: GgufRequest, folder: Path, name: str, facts: Mapping[str, str]
) -> tuple[list[ExportedFile], Evaluation | None]:
    """Write every type into `folder`, prove each, and measure what the request asks for; also the run's own evaluation.

    Raises `GateError` for a file that is not the run, `PlanError` for a model that llama.cpp computes otherwise,
    `CheckpointError` for a disk that is too small.
    """
    types = {"f32": FILE_TYPES["f32"]} if request.adapter else request.file_types
    with source_weights(source, folder / ".merged") as weights:
        config = load_model_config(weights.folder)
        context = context_length(config, architecture_of(config))
        chat = source.chat()
        rows = proof_rows(source, chat, context)
        named_facts = {**facts, "name": general_name(chat, name)}
        model = GgufModel(weights, config, _vocabulary(chat, config.vocab_size, rows), named_facts)
        _require_room(folder, sum(model.planned_bytes(file_type) for file_type in types.values()))
        task = None if request.measure is None else _measured_task(source, chat, context, request.measure)
        comparison = Comparison(chat, _reference(source, rows, task))
        if request.adapter:
            return [_write_adapter(model, comparison, folder, name)], comparison.evaluation
        files = []
        for type_name, file_type in types.items():
            with status(f"writing {type_name}"):
                written = model.write(folder / f"{name}-{type_name}.gguf", file_type)
            files.append(comparison.exported(written, type_name))
    return files, comparison.evaluation


def _write_adapter(model: GgufModel, comparison: Comparison, folder: Path, name: str) -> ExportedFile:
    """The LoRA alone; it is proved on its base, which is written for that and removed."""
    if not model.weights.updates:
        summary = "only a plain LoRA is an adapter for llama.cpp"
        raise PlanError(summary, where="--adapter", hint="without --adapter the merged model is written")
    written = write_adapter(folder / f"{name}{ADAPTER_ENDING}", model.weights, model.config, model.facts)
    if comparison.reference is None:
        return comparison.exported(written, "adapter")
    base = folder / ".base.gguf"
    with status("writing the base"):
        replace(model, weights=ModelWeights(model.weights.folder)).write(base, FILE_TYPES["f32"])
    try:
        return comparison.exported(written, "adapter", base=base)
    finally:
        base.unlink()


def _require_room(folder: Path, needed: int) -> None:
    """Raise `CheckpointError` where the files do not fit on the disk: before hours of writing, not after."""
    if needed * FREE_SHARE > (free := shutil.disk_usage(folder).free):
        given, allowed = format_bytes(needed), f"{format_bytes(free)} free"
        where = str(folder.parent)
        raise CheckpointError("the disk is too small for these files", where=where, given=given, allowed=allowed)


@dataclass(frozen=True)
class MeasuredTask:
    """The questions of `--measure`, and the run's own answers once it has answered."""

    task: RunConfig
    records: Sequence[Record]
    prompts: Sequence[Sequence[int]]
    evaluation: Evaluation | None = None

    @property
    def metrics(self) -> list[MetricName]:
        """Metrics of answers."""
        return [name for name in self.task.evaluation.metrics if name != PERPLEXITY]


@dataclass(frozen=True)
class RunReference:
    """What the run says, which files are compared with."""

    rows: Sequence[ProofRow]
    logprobs: RunLogprobs
    task: MeasuredTask | None = None


def no_proof_reason(source: ExportSource) -> str | None:
    """Why files cannot be compared with the run here; None if they can."""
    if not llama_cpp_process.is_installed():
        return "llama.cpp is not installed (pip install 'rung[export]')"
    return memory_shortage(source.model_config)


def _measured_task(source: ExportSource, chat: ChatTemplate, context: int, count: int) -> MeasuredTask:
    """The questions of `--measure`. Raises `ConfigError` where nothing is answered, or a question does not fit."""
    task, _, records, _ = evaluation_task(source.target, config=None, overrides=(), limit=count)
    prompts = [chat.prompt_ids(PromptFormat(None).turns(record), tools=record.tools) for record in records]
    measured = MeasuredTask(task, records, prompts)
    if not measured.metrics:
        allowed = "exact, numeric or another metric of answers in evaluation.metrics"
        raise ConfigError("the run's task has no metric of answers", where="--measure", allowed=allowed)
    room = context - task.evaluation.max_new_tokens - SPARE_SLOTS
    if too_long := sum(len(prompt) > room for prompt in prompts):
        summary = (
            f"{too_long} of the {len(prompts)} questions do not fit into what llama.cpp computes as this model does"
        )
        raise ConfigError(summary, where="--measure", given=f"{max(map(len, prompts))} tokens", allowed=f"{room}")
    return measured


@torch.no_grad()
def _reference(source: ExportSource, rows: Sequence[ProofRow], task: MeasuredTask | None) -> RunReference | None:
    """Open the run, compute what files are compared with, and let it go. None where nothing can be compared."""
    if no_proof_reason(source) is not None:
        return None
    with status("computing the run's own log-probabilities"):
        model = source.open()
        policy, table_logprobs, base_logprobs = model.policy, None, None
        logprobs = next_token_logprobs(policy, rows)
        if architecture_of(policy.model.config).reads_gelu_from_a_table:
            with original_forwards(policy.model), table_gelu(policy.model):
                table_logprobs = next_token_logprobs(policy, rows)
        if source.adapter is not None:
            with policy.method.disabled():
                base_logprobs = next_token_logprobs(policy, rows)
    if task is not None:
        # compared with llama.cpp is this process, wherever else the run is scored
        here = task.task.model_copy(update={"evaluation": task.task.evaluation.model_copy(update={"server": None})})
        task = replace(task, evaluation=score(model, here, task.records))
    return RunReference(rows, RunLogprobs(logprobs, table_logprobs, base_logprobs), task)


@dataclass(frozen=True)
class Comparison:
    """Files against the run."""

    chat: ChatTemplate
    reference: RunReference | None
    """None without llama.cpp or the memory for it: files are then written and not proved."""

    @property
    def evaluation(self) -> Evaluation | None:
        """The run's own answers to the questions of `--measure`."""
        return None if self.reference is None or self.reference.task is None else self.reference.task.evaluation

    def exported(self, written: WrittenFile, type_name: str, base: Path | None = None) -> ExportedFile:
        """The file with its proof and, with `--measure`, its scores. `base` is the model of an adapter."""
        file = ExportedFile(
            file=written.path.name,
            type=type_name,
            bytes=written.bytes,
            kinds=dict(written.matrix_bytes),
            gate=GateResult(name="publish.gguf", state="not_reached"),
        )
        if self.reference is None:
            return file
        model, adapter = (written.path, None) if base is None else (base, written.path)
        context = max(len(row.ids) for row in self.reference.rows) + SPARE_SLOTS
        with (
            status(f"comparing {type_name} in llama.cpp"),
            LlamaCpp(model, context, threads=_threads(), adapter=adapter) as llama,
        ):
            ignored_stops = check_texts(llama, self.chat, self.reference.rows)
            kind = "f32" if type_name == "adapter" else type_name
            proof = compare_logprobs(llama, self.reference.rows, self.reference.logprobs, kind)
        if proof.gate.state == "failed":
            summary = f"gate publish.gguf failed: {type_name} is not what the run computes"
            given, allowed = f"{proof.gate.measured:.2g} nats", f"{proof.gate.limit:g} nats"
            raise GateError(summary, where=file.file, given=given, allowed=allowed, hint="the file was removed")
        file = file.replace(
            gate=GateResult(**asdict(proof.gate)),
            largest_difference=proof.largest_difference,
            mean_difference=proof.mean_difference,
            table_difference=proof.table_difference,
            ignored_stops=tuple(ignored_stops),
        )
        return file if self.reference.task is None else self._measure(self.reference.task, file, model, adapter)

    def _measure(self, measured: MeasuredTask, file: ExportedFile, model: Path, adapter: Path | None) -> ExportedFile:
        """The file with its scores on the test questions, one question at a time as one user asks."""
        config, chat, prompts = measured.task.evaluation, self.chat, measured.prompts
        context = max(map(len, prompts)) + config.max_new_tokens + SPARE_SLOTS
        answers: list[tuple[ParsedAnswer, bool]] = []
        with (
            LlamaCpp(model, context, threads=_threads(), adapter=adapter, exact=False) as llama,
            ProgressBar(f"answering with {file.type}", len(prompts)) as bar,
        ):
            start_time = time.perf_counter()
            for prompt in prompts:
                answer = llama.answer(prompt, config.max_new_tokens, stop=config.stop)
                parsed = chat.parsed_answer(answer.ids, stopped=answer.stopped, stop_texts=config.stop)
                answers.append((parsed, answer.stopped))
                bar.advance(1)
            seconds = time.perf_counter() - start_time
        scored = score_answers(
            *(chat, measured.records, prompts, answers, seconds, measured.metrics),
            code_limits=config.code_limits,
            banned=config.banned,
        )
        if measured.evaluation is None:
            return file
        run = measured.evaluation
        scores = {name: paired_scores(run, scored, name, measured.task.seed) for name in measured.metrics}
        return file.replace(scores=scores, seconds_per_query=scored.seconds_per_query)


def _threads() -> int:
    return torch.get_num_threads()
