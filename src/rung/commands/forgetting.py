"""`rung eval RUN --forgetting DATA`: what a run and its base make of other data, item by item."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from rung.commands.compare import paired
from rung.config.data import DataSpec
from rung.config.evaluation import EvaluateSpec
from rung.config.io import load_config
from rung.config.run import RunSpec
from rung.console import say
from rung.data.chat import Chat
from rung.data.formats import load_records
from rung.data.records import Records
from rung.data.tokenize import tokenize_records
from rung.errors import ConfigError
from rung.evaluation.evaluate import PERPLEXITY, Evaluation, Item, evaluate, framed
from rung.evaluation.prompting import Framing
from rung.models.policy import Policy, by_document
from rung.planning.memory import tokens_per_micro_batch
from rung.runs.dataset import as_asked, read_splits
from rung.runs.load import open_base, open_run, spec_of, test_records, widen_if_asked
from rung.training.run_folder import is_climb
from rung.training.step import read
from rung.types import Record

KEPT = "forgetting.json"
"""Beside a tuned rung's result: what it and its base make of other data."""
Reader = tuple[Policy, Chat, AbstractContextManager[None]]
"""A model, how it reads, and what must be in force while it does."""


def forgotten(run: str, data: str, *, limit: int | None) -> dict[str, Any]:
    """Perplexity and scores of a run and of its base on `data`, paired: run minus base.

    `data` is a data file, all of whose rows count, or a config, whose test split does under its own metrics and
    instruction. Both models get the same prompts. Plain text has perplexity alone, over all its tokens; what is longer
    than the model's context is left out and counted. Raises `ConfigError` where `run` is none, `DataError` where
    nothing is left.
    """
    path = Path(run)
    if is_climb(path) or not (path / "run.json").exists():
        hint = f"its runs stand in {path / 'rungs'}" if is_climb(path) else "a base has learned nothing to forget for"
        raise ConfigError("this is not a run", where="--forgetting", given=run, hint=hint)
    tuned, chat, own = open_run(path)
    records, asked, seed = other_task(own, data, limit)
    widen_if_asked(tuned, own)
    room = tuned.base.context - tuned.method.virtual_tokens
    after, before = (_measured(reader, records, asked, room) for reader in _readers(path, tuned, chat))
    if dropped := len(records) - len(after.items):
        say(f"{dropped:,} of {len(records):,} texts are longer than the model's context and left out")
    return {
        "target": run,
        "forgetting": data,
        "metrics": {name: paired(before, after, name, seed) for name in after.metrics},
        "examples": len(after.items),
        "clusters": len(set(after.clusters)),
        "dropped": dropped,
    }


Task = tuple[Records, EvaluateSpec, int]
"""Items, how they are asked and scored, and a seed."""


def other_task(own: RunSpec, data: str, limit: int | None) -> Task:
    """Items of other data, how they are asked and scored, and a seed: a config's own, of a data file those of a run.

    Raises `DataError` and `ConfigError` where there are none.
    """
    if Path(data).suffix in (".yaml", ".yml"):
        task = load_config(data).spec
        if limit is not None:
            task = task.model_copy(update={"evaluate": task.evaluate.model_copy(update={"limit": limit})})
        records, asked, seed = test_records(task, read_splits(task)), task.evaluate, task.seed
    else:
        records, asked, seed = _drawn(load_records(DataSpec(path=data), data).records, limit), own.evaluate, own.seed
        asked = asked.model_copy(update={"instruction": None})
    return records, asked.model_copy(update={"metrics": tuple(dict.fromkeys([*asked.metrics, PERPLEXITY]))}), seed


def read_forgotten(place: Path, data: str | None) -> dict[str, Any]:
    """What was kept of these data; empty where that is still to be measured."""
    try:
        found: dict[str, Any] = json.loads((place / KEPT).read_text())
    except (OSError, ValueError):
        return {}
    return found if found.get("forgetting") == data else {}


def require_room(task: Task, chat: Chat, context: int) -> None:
    """Raise `DataError` for a prompt that leaves no room for its answer; of plain text what is too long is left out."""
    records, asked, _ = task
    if records[0].text is None:
        framed(chat, _seen(records, asked), Framing(asked.instruction), context - asked.max_new_tokens)


def _seen(records: Sequence[Record], asked: EvaluateSpec) -> Sequence[Record]:
    return records if asked.context == "given" else as_asked("withheld", Records.of(records), None)


def _readers(path: Path, tuned: Policy, chat: Chat) -> Iterator[Reader]:
    """The run, then its base: the same weights with the adapter off, or the base itself of a whole model."""
    yield tuned, chat, nullcontext()
    if (path / "adapter").is_dir():
        yield tuned, chat.of_the_base(), tuned.method.disabled()
        return
    base, own = open_base(spec_of(path).model)
    yield base, own, nullcontext()


def _drawn(records: Records, limit: int | None) -> Records:
    """At most so many rows, by a fixed draw, in their order."""
    if limit is None or limit >= len(records):
        return records
    return records.select(np.sort(np.random.default_rng(2).permutation(len(records))[:limit]))


def _measured(reader: Reader, records: Sequence[Record], spec: EvaluateSpec, room: int) -> Evaluation:
    policy, chat, off = reader
    with off:
        if records[0].text is not None:
            return _read(policy, chat, records, room)
        return evaluate(policy, chat, _seen(records, spec), Framing(spec.instruction), spec, title="forgetting")


def _read(policy: Policy, chat: Chat, records: Sequence[Record], room: int) -> Evaluation:
    """Perplexity of plain texts, every token but the first predicted."""
    documents = list(tokenize_records(chat, records, loss_on="all", max_length=room, overflow="drop").examples)
    budget = tokens_per_micro_batch(policy.base.shape, policy.device.type)
    nats = read([policy], documents, budget, lambda batch: by_document(batch, -policy.logprobs(batch)).tolist())
    items = tuple(
        Item(
            source=str(document.source),
            group=document.group,
            question="",
            context=None,
            expected="",
            answer="",
            scores={},
            prompt_tokens=0,
            stopped=True,
            nats=own,
            answer_tokens=document.predictions,
        )
        for document, own in zip(documents, nats, strict=True)
    )
    return Evaluation(items, 0.0, (PERPLEXITY,))
