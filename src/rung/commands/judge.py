"""Judges put to work: one at hand or one behind a server, checked against people before it is believed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rung.config.judge import JudgeSpec
from rung.config.model import ModelSpec
from rung.console import Bar, say
from rung.evaluation.judge import Ask, Judged, Pair, Said, by_logprob, by_word, judge, read_human
from rung.files import Journal, cache_folder
from rung.inference.openai_client import AT_ONCE, Request, Server
from rung.inference.openai_client import ask as ask_server
from rung.runs.load import open_base, open_run
from rung.scoring.pairwise import Preference, Trust, preference, trust
from rung.types import Message

WORDS = 512
"""Tokens that a judge behind a server may write, reasons included."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge made of pairs, and whether it is to be believed."""

    judged: tuple[Judged, ...]
    preference: Preference
    trust: Trust

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the pairs."""
        return {**self.preference.to_json(), "trust": self.trust.to_json()}

    def lines(self) -> list[str]:
        """The pairs and all that was said of them, a JSON object each."""
        return [json.dumps({**asdict(j), "outcome": j.verdicts.outcome}, ensure_ascii=False) for j in self.judged]


def judge_pairs(spec: JudgeSpec, pairs: Sequence[Pair], seed: int = 0) -> Judgement:
    """Ask the judge of `spec` about pairs, and about those that people have labelled.

    Raises `ConfigError` or `CheckpointError` where it cannot be asked, `DataError` for a file of labels that is none.
    """
    labelled, people = read_human(spec.human) if spec.human else ([], [])
    every = judge([*pairs, *labelled], spec, _asking(spec))
    own, known = every[: len(pairs)], every[len(pairs) :]
    if labelled:
        checked = trust([j.verdicts for j in known], people, [pair.cluster for pair in labelled], spec.kappa)
    else:
        checked = Trust(False, "its agreement with people was not measured: evaluate.judge.human names no file")
    lengths = [(len(pair.first), len(pair.second)) for pair in pairs]
    found = preference([j.verdicts for j in own], lengths, [pair.cluster for pair in pairs], seed)
    return Judgement(tuple(own), found, checked)


def _asking(spec: JudgeSpec) -> Ask:
    if spec.server is not None:
        return _by_server(Server(spec.server, spec.model, spec.concurrency or AT_ONCE))
    path = Path(spec.model)
    if (path / "run.json").exists():
        policy, chat, _ = open_run(path)
    else:
        policy, chat = open_base(ModelSpec(name=spec.model))
    return by_logprob(policy, chat)


def _by_server(server: Server) -> Ask:
    """Verdicts of a server, each kept in the cache as it comes: the same question is never paid for twice."""

    def ask(prompts: Sequence[tuple[Message, ...]]) -> list[Said]:
        settings = {"temperature": 0.0, "max_tokens": WORDS}
        requests = [Request([{"role": m.role, "content": m.content} for m in turns], settings) for turns in prompts]
        about = {"url": server.url, "model": server.model, "requests": [asdict(request) for request in requests]}
        name = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        with closing(Journal(cache_folder() / "judged" / f"{name}.jsonl", about)) as journal:
            if journal.known:
                say(f"{len(journal.known):,} of {len(requests):,} verdicts are known, kept in {journal.path}")
            with Bar("judge", len(requests), len(journal.known)) as bar:
                found, failures = ask_server(server, requests, journal, bar.advance)
        reasons = {failure.prompt: failure.reason for failure in failures}
        return [by_word(found[i][0].text) if i in found else Said(None, reasons[i]) for i in range(len(requests))]

    return ask
