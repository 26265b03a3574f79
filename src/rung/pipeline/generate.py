"""`rung generate`: samples answers, for people or a reward model to rank, for rejection sampling, for a judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rung import opened
from rung.data.chat import Chat
from rung.data.formats import load_records
from rung.data.prompts import Prompted, prompts
from rung.engine.progress import Bar
from rung.errors import ConfigError
from rung.evaluate.rewards import Scorer
from rung.model.generate import Answer, Sampling, generate_by_task
from rung.model.policy import Policy
from rung.others import same_text
from rung.spec.data import DataSpec, Format
from rung.spec.model import ModelSpec
from rung.types import Example, Record

BATCH = 64
"""Answers made at once."""


@dataclass(frozen=True)
class Asked:
    """What is wanted of the answers."""

    sampling: Sampling
    limit: int | None = None
    """At most this many prompts."""
    distinct: bool = False
    """Keep one of equal answers."""
    reward: Path | None = None
    """A reward run: answers come with its scores, best first."""
    format: Format = "auto"


def generate_answers(target: str, data: str, output: Path, asked: Asked) -> dict[str, Any]:
    """Write one row a prompt to `output`: the prompt, what was expected, the answers, scores where a run gives them.

    Rows with scores are of the format `rated`; prompts whose answers score alike are counted and left out. Raises
    `ConfigError` where the output exists already.
    """
    if output.exists():
        raise ConfigError("this file exists already", where="--output", given=output)
    records = load_records(DataSpec(path=data, format=asked.format), data).records
    chosen = [records[i] for i in range(min(len(records), asked.limit or len(records)))]
    policy, chat = _open(target)
    scorer = _scorer(asked.reward, chat) if asked.reward else None
    room = policy.base.context - policy.method.virtual_tokens - asked.sampling.max_new_tokens
    prompted = prompts(chat, chosen, longest=room, overflow="error")
    answers = _answers(policy, chat, prompted, asked.sampling)
    each = asked.sampling.answers
    texts = [chat.assistant_text(a.drawn).strip() for a in answers]
    scores = _scores(scorer, prompted, answers, each) if scorer else None
    lines, kept, alone = [], 0, 0
    for i, record in enumerate(prompted.records):
        own = range(i * each, (i + 1) * each)
        order = sorted(own, key=lambda k: -scores[k]) if scores else list(own)
        if asked.distinct or scores:  # rows of answers that are compared hold each once
            first: dict[str, int] = {}
            for k in order:
                first.setdefault(texts[k], k)
            order = list(first.values())
        if scores and scores[order[0]] == scores[order[-1]]:
            alone += 1
            continue
        kept += len(order)
        row = {**_asked(record), "answers": [texts[k] for k in order], "stopped": [answers[k].stopped for k in order]}
        lines.append({**row, "scores": [round(scores[k], 6) for k in order]} if scores else row)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    cut = sum(not a.stopped for a in answers)
    counts = {"prompts": len(lines), "answers": kept, "made": len(answers), "cut": cut}
    return {"output": str(output), **counts, "nothing_to_compare": alone}


def format_of(text: str) -> Format:
    """A format's name from the command line. Raises `ConfigError` for another word."""
    if text not in get_args(Format):
        raise ConfigError("no such format", where="--format", given=text, allowed=", ".join(get_args(Format)))
    found: Format = text  # type: ignore[assignment]
    return found


def _open(target: str) -> tuple[Policy, Chat]:
    if (Path(target) / "run.json").exists():
        policy, chat, _ = opened.open_run(Path(target))
        return policy, chat
    return opened.open_base(ModelSpec(name=target))


def _asked(record: Record) -> dict[str, Any]:
    """The columns that say the prompt, as Rung's formats read them."""
    turns = record.messages[:-1]
    one = len(turns) == 1 and turns[0].role == "user"
    prompt: Any = turns[0].content if one else [{"role": m.role, "content": m.content} for m in turns]
    tools = {"tools": record.tools} if record.tools else {}
    further = {
        **tools,
        "context": record.context,
        "expected": record.answer or None,
        "group": record.group,
        "task": record.task,
    }
    return {"prompt": prompt, **{name: value for name, value in further.items() if value is not None}}


def _answers(policy: Policy, chat: Chat, prompted: Prompted, sampling: Sampling) -> list[Answer]:
    """As many to each prompt as `sampling` says, in their order."""
    with Bar("generate", len(prompted.examples)) as bar:
        return generate_by_task(
            policy,
            [e.ids.tolist() for e in prompted.examples],
            [e.task for e in prompted.examples],
            stop_ids=chat.stop_ids,
            sampling=sampling,
            batch=BATCH,
            on_batch=bar.advance,
        )


def _scorer(run: Path, ours: Chat) -> Scorer:
    """A reward run, opened and checked before anything is made."""
    policy, chat, objective, _ = opened.open_reward(run)
    same_text(run, chat, ours)
    return Scorer(policy, objective)


def _scores(scorer: Scorer, prompted: Prompted, answers: Sequence[Answer], each: int) -> list[float]:
    documents = []
    for i, answer in enumerate(answers):
        prompt = prompted.examples[i // each]
        ids = np.array([*prompt.ids, *answer.drawn], dtype=np.int32)
        documents.append(Example(ids, np.arange(len(ids)) >= len(prompt), prompt.source, task=prompt.task))
    return scorer(documents, max(4096, *map(len, documents)))
