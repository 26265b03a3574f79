"""`rung generate http://...`: answers of a model behind a server, in the same rows as those of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rung.data.turns import for_template
from rung.engine.progress import Bar, say
from rung.errors import CheckpointError, ConfigError
from rung.evaluate.baselines import Framing
from rung.held import Journal
from rung.pipeline.generate import Asked, Made, journal_of, records_for, seed_of, write_rows
from rung.synth.remote import Failure, Request, Server, ask
from rung.types import Record

SHOWN = 5
"""Failures that are named."""


def generate_remotely(server: Server, data: str, output: Path, asked: Asked) -> dict[str, Any]:
    """As `generate_answers`, with the answers of a server; nothing of them is scored.

    Raises `ConfigError` for a request that only a run can serve, `CheckpointError` where prompts got no answer: the
    others are kept, and the same command asks for those alone.
    """
    if asked.reward or asked.reference:
        what = "a server gives text, not the log-probabilities or tokens that this wants"
        raise ConfigError(what, where="--reward" if asked.reward else "--reference", given=server.url)
    chosen = records_for(output, data, asked)
    requests = [_request(record, number, asked) for number, record in enumerate(chosen)]
    about = {"model": server.model, "requests": [asdict(request) for request in requests]}
    with closing(Journal(journal_of(output), about)) as journal:
        if journal.known:
            say(f"going on after {len(journal.known):,} of {len(requests):,} prompts, kept in {journal.path}")
        with Bar("ask", len(requests), len(journal.known)) as bar:
            found, failures = ask(server, requests, journal, bar.advance)
        if failures:
            raise _failed(chosen, failures, output)
        answers = [answer for number in range(len(requests)) for answer in found[number]]
        texts = [answer.text.strip() for answer in answers]
        made = Made(texts, [len(text) for text in texts], [answer.stopped for answer in answers], unit="characters")
        told = write_rows(output, chosen, made, asked)
        journal.remove()
    return told


def _request(record: Record, number: int, asked: Asked) -> Request:
    """One prompt, its context in front of the question, as a run would be asked."""
    sampling = asked.sampling
    turns = Framing().turns(record)
    settings: dict[str, Any] = {
        "n": sampling.answers,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
        "seed": seed_of(sampling.seed, number) % 2**31,
    }
    if record.tools:
        settings["tools"] = json.loads(record.tools)
    return Request([for_template(turn) for turn in turns], settings)


def _failed(records: Sequence[Record], failures: Sequence[Failure], output: Path) -> CheckpointError:
    told = [f"{records[f.prompt].source}: {f.reason}" for f in failures[:SHOWN]]
    told += [f"and {len(failures) - SHOWN} more"] if len(failures) > SHOWN else []
    told += ["the others are kept: the same command asks for these alone"]
    what = f"{len(failures):,} of {len(records):,} prompts got no answer"
    return CheckpointError(what, where=str(output), hint="\n  ".join(told))
