"""`rung generate`: samples answers to the prompts of a data file, for ranking, rejection sampling or a judge.

One row for each prompt is written at the end; until then the answers are kept chunk by chunk in a journal beside the
output, so a stop costs one chunk. Each chunk has a seed of its own, which makes a resumed run draw what an
uninterrupted one draws. A run or a base answers in this process, where a reward run can score the answers and a
reference can give log-ratios; a server gives text alone. The command line and `rung.generate` call `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rung.config.data import DataConfig, Format
from rung.config.io import is_config_name, load_config
from rung.config.model import ModelConfig
from rung.console import print_status
from rung.data.chat import ChatTemplate
from rung.data.formats import LoadedRows, naming_config
from rung.data.messages import expected_text
from rung.data.records import Records
from rung.data.rows import present, prompt_value
from rung.data.splits import load_sets
from rung.data.token_store import describe_notes
from rung.data.tokenize import PromptDataset, tokenize_prompts
from rung.errors import CheckpointError, ConfigError
from rung.evaluation.prompting import PromptFormat
from rung.evaluation.reward_model import SCORING_TOKENS, RewardScorer
from rung.files import is_run_folder, write_json_lines
from rung.inference.ask import Conversation, FailedRequest
from rung.inference.journal import Journal
from rung.inference.local_model import sample_answers
from rung.inference.openai_client import DEFAULT_CONCURRENCY, Server
from rung.models.base_model import BaseModel
from rung.models.document_values import values_by_document
from rung.models.generate import GeneratedAnswer, Sampling
from rung.models.policy import NoMethod, Policy, sum_by_document
from rung.results.evaluation import GenerationResult
from rung.runs.auxiliary_models import open_scorer
from rung.runs.load import (
    config_of_run,
    load_base_on_device,
    open_run,
    open_target,
    share_base_if_same,
    target_kind,
    weight_fingerprints,
)
from rung.types import Example, PackedBatch, Record


@dataclass(frozen=True)
class GenerateRequest:
    """How answers are sampled, filtered and scored."""

    sampling: Sampling = Sampling(256, 1.0, answers_per_prompt=4)
    limit: int | None = None
    """Use at most this many prompts, the first of the file."""
    distinct: bool = False
    """Keep one of several equal answers to a prompt."""
    reward: Path | None = None
    """A reward run, which scores the answers; they are then sorted, best first."""
    reference: str | None = None
    """A run or a base: each answer gets its log-ratio to this model."""
    format: Format = "auto"


def generate(
    target: str,
    data: str,
    output: Path,
    request: GenerateRequest,
    *,
    model: str | None = None,
    concurrency: int | None = None,
) -> GenerationResult:
    """Sample answers to the prompts of a data file and write one row for each prompt to `output`.

    `data` may be a config, whose `data` section then says how the rows are read; its splits and weights do not count.
    `target` is a run, a base, or the URL of an OpenAI-compatible server, which needs `model`, the model's name on it;
    `concurrency` is the number of requests in flight, 8 by default. Generation is saved incrementally: the same call
    resumes it after a stop. Raises `ConfigError` if the output exists already.
    """
    # Options that would have no effect are errors, in both directions.
    if target_kind(target) == "server":
        if model is None:
            raise ConfigError("a server may hold several models", where="--model", hint="name one of them")
        server = Server(target, model, concurrency or DEFAULT_CONCURRENCY)
        return generate_remotely(server, data, output, request)
    if model is not None or concurrency is not None:
        option, value = ("--model", model) if model is not None else ("--concurrency", concurrency)
        summary = "only a server is asked for a model by name, or in several requests"
        raise ConfigError(summary, where=option, given=value)
    return generate_answers(target, data, output, request)


def generate_answers(target: str, data: str, output: Path, request: GenerateRequest) -> GenerationResult:
    """Write one row for each prompt to `output`: prompt, expected answer, sampled answers, and scores if requested.

    Rows with several scores have the format `rated`; prompts whose answers all score the same are counted and left out.
    Log-ratios to a reference are in nats per answer; their mean over answers sampled at temperature 1 estimates the KL
    divergence. A stop loses one chunk at most. Raises `ConfigError` if the output exists already.
    """
    records = load_prompts(output, data, request)
    policy, chat, scorer = _open_models(target, request)
    max_prompt_tokens = policy.base.context - policy.method.virtual_tokens - request.sampling.max_new_tokens
    foreign = chat.with_control_tokens(None)
    prompts = tokenize_prompts(foreign, records, max_length=max_prompt_tokens, overflow="error")
    for name, text in describe_notes(prompts.notes, None).items():
        print_status(f"{name}: {text}")
    with closing(_journal(output, target, policy, prompts, request.sampling)) as journal:
        ids, tasks = [e.ids.tolist() for e in prompts.examples], [e.task for e in prompts.examples]
        answers, _ = sample_answers(policy, chat, ids, tasks, request.sampling, journal)
        documents = _documents(prompts, answers, request.sampling.answers_per_prompt)
        temperature = request.sampling.temperature
        log_ratios = _log_ratios(policy, documents, answers, temperature) if policy.reference else None
        scores = scorer(documents) if scorer else None
        texts = [chat.assistant_text(a.all_tokens).strip() for a in answers]
        lengths, stopped = [len(a.all_tokens) for a in answers], [a.stopped for a in answers]
        generated = GeneratedAnswers(texts, lengths, stopped, scores=scores, log_ratios=log_ratios)
        summary = write_rows(output, prompts.records, generated, request)
        # Only now: until the output is written, the journal is the only copy of the answers.
        journal.remove()
    return summary


def load_prompts(output: Path, data: str, request: GenerateRequest) -> list[Record]:
    """The rows whose prompts are answered. Raises `ConfigError` if the output exists already."""
    # Refused before the data is read: an earlier output may have cost hours and is never overwritten.
    if output.exists():
        raise ConfigError("this file exists already", where="--output", given=output)
    records = Records.concatenate([loaded.records for loaded in _load_rows(data, request)])
    return [records[i] for i in range(min(len(records), request.limit or len(records)))]


def _load_rows(data: str, request: GenerateRequest) -> list[LoadedRows]:
    if is_config_name(data):
        if request.format != "auto":
            hint = "set data.format in the config"
            raise ConfigError("a config says the format itself", where="--format", given=request.format, hint=hint)
        return load_sets(load_config(data).config.data)
    with naming_config("--data CONFIG.yaml", data, "--format does for data.format"):
        return load_sets(DataConfig(path=data, format=request.format))


@dataclass(frozen=True)
class GeneratedAnswers:
    """Sampled answers with their measurements; the answers to one prompt are consecutive."""

    texts: Sequence[str]
    lengths: Sequence[int]
    stopped: Sequence[bool]
    unit: str = "tokens"
    """Unit of the lengths: tokens, or characters for a server that gives text alone."""
    scores: Sequence[float] | None = None
    log_ratios: Sequence[float] | None = None


def write_rows(
    output: Path, records: Sequence[Record], generated: GeneratedAnswers, request: GenerateRequest
) -> GenerationResult:
    """Write one row for each prompt that has answers to compare; returns counts and means over all answers."""
    rows = _answer_rows(records, generated, request)
    write_json_lines(output, rows)
    values_by_name = {generated.unit: generated.lengths, "score": generated.scores, "log_ratio": generated.log_ratios}
    return GenerationResult(
        output=str(output),
        prompts=len(rows),
        answers=sum(len(row["answers"]) for row in rows),
        sampled=len(generated.texts),
        cut=sum(not stopped for stopped in generated.stopped),
        nothing_to_compare=len(records) - len(rows),
        means={name: float(np.mean(values)) for name, values in values_by_name.items() if values},
    )


def _answer_rows(
    records: Sequence[Record], generated: GeneratedAnswers, request: GenerateRequest
) -> list[dict[str, Any]]:
    """One row for each prompt. With scores the best answer is first, and prompts without a preference are left out."""
    rows, answers_per_prompt, scores = [], request.sampling.answers_per_prompt, generated.scores
    columns = {"answers": generated.texts, generated.unit: generated.lengths, "stopped": generated.stopped}
    ratings = {"scores": scores, "log_ratios": generated.log_ratios}
    for i, record in enumerate(records):
        indices = range(i * answers_per_prompt, (i + 1) * answers_per_prompt)
        order = sorted(indices, key=lambda k: -scores[k]) if scores else list(indices)
        # Scored answers become `rated` rows, whose answers are compared, and an answer is not better than itself.
        if request.distinct or (scores and answers_per_prompt > 1):
            first_index: dict[str, int] = {}
            for k in order:
                first_index.setdefault(generated.texts[k], k)
            order = list(first_index.values())
        if scores and answers_per_prompt > 1 and scores[order[0]] == scores[order[-1]]:
            continue
        row = {**_prompt_columns(record), **{name: [values[k] for k in order] for name, values in columns.items()}}
        rows.append({**row, **{n: [round(v[k], 6) for k in order] for n, v in ratings.items() if v is not None}})
    return rows


def parse_format(text: str) -> Format:
    """The name of a data format from the command line. Raises `ConfigError` for another word."""
    if text not in get_args(Format):
        raise ConfigError("no such format", where="--format", given=text, allowed=", ".join(get_args(Format)))
    return text  # type: ignore[return-value]


def _open_models(target: str, request: GenerateRequest) -> tuple[Policy, ChatTemplate, RewardScorer | None]:
    """The model that answers, with its reference, and the scorer; models on the same base share its weights."""
    path = Path(target)
    is_run = is_run_folder(path)
    config = config_of_run(path).model if is_run else ModelConfig(name=target)
    # A full run is loaded from its own folder, so there is no base to share.
    base = None if is_run and (path / "model").is_dir() else load_base_on_device(config)
    # The modules are copied, not the weights: an adapter must not change the base that reference or scorer stand on.
    generator_base = base.share_weights() if base is not None and (request.reward or request.reference) else base
    if is_run or generator_base is None:
        model = open_run(path, generator_base)
        policy, chat = model.policy, model.chat
    else:
        policy = Policy(generator_base, NoMethod())
        chat = ChatTemplate(generator_base.tokenizer, end_ids=generator_base.end_ids)
    if request.reference is not None:
        policy.reference = _reference(request.reference, config, base)
        if policy.reference.base.tokenizer.get_vocab() != chat.tokenizer.get_vocab():
            raise ConfigError("the reference has another vocabulary", where="--reference", given=request.reference)
    if request.reward is None:
        return policy, chat, None
    # Opened and checked before the first answer is sampled.
    return policy, chat, open_scorer(request.reward, chat, share_base_if_same(request.reward, base))[0]


def _reference(name: str, config: ModelConfig, base: BaseModel | None) -> Policy:
    """The reference: a run with its adapter, or a base, which may be the base of the model that answers."""
    # A student has other layers than the model of its name, so that model has to be loaded.
    if base is not None and config.student_of is None and name == config.name:
        return Policy(base.share_weights(), NoMethod())
    shared_base = share_base_if_same(Path(name), base) if is_run_folder(name) else None
    return open_target(name, config, shared_base).policy


def _prompt_columns(record: Record) -> dict[str, Any]:
    """The columns of a prompt, named as Rung's data formats read them."""
    columns: dict[str, Any] = {
        "tools": record.tools or None,
        "context": record.context,
        "expected": expected_text(record) or None,
    }
    columns |= {"references": list(record.references) or None, "group": record.group, "task": record.task}
    return {"prompt": prompt_value(record.messages[:-1]), **present(columns)}


def _journal(output: Path, target: str, policy: Policy, prompts: PromptDataset, sampling: Sampling) -> Journal:
    """The journal beside the output, tied to these weights, prompts and sampling settings."""
    rows = [[e.task, e.ids.tolist()] for e in prompts.examples]
    identity = {"weights": weight_fingerprints(target, policy), "prompts": rows, "sampling": asdict(sampling)}
    return Journal(journal_path(output), identity)


def journal_path(output: Path) -> Path:
    """The file that keeps answers until the output is written."""
    return output.with_name(f".{output.name}.journal")


def _documents(prompts: PromptDataset, answers: Sequence[GeneratedAnswer], answers_per_prompt: int) -> list[Example]:
    """One document for each answer: prompt and answer, with the loss on the answer."""
    documents = []
    for i, answer in enumerate(answers):
        prompt = prompts.examples[i // answers_per_prompt]
        ids = np.array([*prompt.ids, *answer.all_tokens], dtype=np.int32)
        documents.append(Example(ids, np.arange(len(ids)) >= len(prompt), prompt.source, task=prompt.task))
    return documents


def _log_ratios(
    policy: Policy, documents: Sequence[Example], answers: Sequence[GeneratedAnswer], temperature: float
) -> list[float]:
    """Log p(answer) - log q(answer) in nats, with q of the reference; both at temperature 1."""

    def policy_sums(batch: PackedBatch) -> list[float]:
        return sum_by_document(batch, policy.logprobs(batch)).double().tolist()

    # At these temperatures the decoder computed log p at temperature 1 itself, which saves a forward pass.
    if temperature in (0.0, 1.0):
        log_p = [sum(a.logprobs) for a in answers]
    else:
        log_p = values_by_document([policy], documents, SCORING_TOKENS, policy_sums)
    log_q = values_by_document([policy], documents, SCORING_TOKENS, lambda b: policy.reference_sums(b).tolist())
    return [p - q for p, q in zip(log_p, log_q, strict=True)]


MAX_NAMED_FAILURES = 5
"""Failed prompts that the error names; the others are counted."""


def generate_remotely(server: Server, data: str, output: Path, request: GenerateRequest) -> GenerationResult:
    """As `generate_answers`, with answers from a server, which cannot be scored.

    Raises `ConfigError` for a request that needs log-probabilities or tokens, `CheckpointError` if prompts got no
    answer: the answers of the others are kept, and the same command asks for the missing ones alone.
    """
    if request.reward or request.reference:
        summary = "a server gives text, not the log-probabilities or tokens that this wants"
        raise ConfigError(summary, where="--reward" if request.reward else "--reference", given=server.url)
    records = load_prompts(output, data, request)
    conversations = [Conversation(PromptFormat().turns(record), record.tools) for record in records]
    asked = [asdict(conversation) for conversation in conversations]
    identity = {**server.identity, "conversations": asked, "sampling": asdict(request.sampling)}
    with closing(Journal(journal_path(output), identity)) as journal:
        replies, failures = server.ask(conversations, request.sampling, journal)
        # No output with gaps: the journal keeps what arrived, and the next call asks for the rest.
        if failures:
            raise _failures_error(records, failures, output)
        answers = [answer for reply in replies if reply is not None for answer in reply.answers]
        # A server reports no token counts per answer, so lengths are in characters.
        texts = [answer.text.strip() for answer in answers]
        generated = GeneratedAnswers(texts, [len(t) for t in texts], [a.stopped for a in answers], unit="characters")
        result = write_rows(output, records, generated, request)
        journal.remove()
    return result


def _failures_error(records: Sequence[Record], failures: Sequence[FailedRequest], output: Path) -> CheckpointError:
    lines = [f"{records[f.index].source}: {f.reason}" for f in failures[:MAX_NAMED_FAILURES]]
    lines += [f"and {len(failures) - MAX_NAMED_FAILURES} more"] if len(failures) > MAX_NAMED_FAILURES else []
    lines += ["the other answers are kept: the same command repeats only the failed requests"]
    summary = f"{len(failures):,} of {len(records):,} prompts got no answer"
    return CheckpointError(summary, where=str(output), hint="\n  ".join(lines))
