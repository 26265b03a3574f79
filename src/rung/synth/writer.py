"""A model that writes for `rung synth`, with its sampling, its journal and what it has cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rung.config.synth import PriceConfig, TeacherConfig
from rung.files import cache_folder
from rung.inference.ask import Answer, AnswerModel, Conversation, Reply, without_reasoning
from rung.inference.journal import Journal, request_key
from rung.inference.local_model import LocalModel
from rung.inference.openai_client import DEFAULT_CONCURRENCY, FAILED, Server
from rung.models.generate import Sampling
from rung.results.synth import SynthCost
from rung.runs.load import open_target, weight_fingerprints

JOURNAL_PATTERN = "journal-*.jsonl"


@dataclass(slots=True)
class Cost:
    """What a model was asked, over all attempts."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    uncounted: int = 0
    """Replies of a server that does not count tokens."""
    seconds: float = 0.0
    """Times of all requests together; of concurrent ones more than passed on the clock."""

    def add(self, reply: Reply) -> None:
        """Add a reply."""
        self.requests += 1
        self.prompt_tokens += reply.prompt_tokens or 0
        self.answer_tokens += reply.answer_tokens or 0
        self.uncounted += reply.prompt_tokens is None or reply.answer_tokens is None
        self.seconds += reply.seconds

    def result(self, price: PriceConfig | None) -> SynthCost:
        """The cost with money, where a price is given and all tokens were counted."""
        money = None
        if price is not None and not self.uncounted:
            money = (self.prompt_tokens * price.prompt + self.answer_tokens * price.answer) / 1e6
        return SynthCost(**{**asdict(self), "seconds": round(self.seconds, 1)}, money=money)


def open_writer(config: TeacherConfig) -> AnswerModel:
    """The model that writes: behind a server, or opened here."""
    if config.server is not None:
        return Server(config.server, config.model, config.concurrency or DEFAULT_CONCURRENCY)
    model = open_target(config.model)
    return LocalModel(model.policy, model.chat, weight_fingerprints(config.model, model.policy), config.stop)


def journal_path(folder: Path, model: AnswerModel) -> Path:
    """The journal of a model: another one begins another, and what was paid for stays."""
    return folder / f"journal-{request_key(dict(model.identity))[:8]}.jsonl"


def previews_folder(model: AnswerModel) -> Path:
    """The replies of a model to previews, in the user's cache."""
    return cache_folder() / "synth-previews" / request_key(dict(model.identity))


def previewed_replies(model: AnswerModel) -> dict[str, Any]:
    """Replies of a model to previews, by request; what failed there may succeed now."""
    results: dict[str, Any] = {}
    for file in sorted(previews_folder(model).glob("*.jsonl")):
        results |= Journal.read(file, model.identity)
    return {key: value for key, value in results.items() if FAILED not in value}


@dataclass
class Writer:
    """Asks one model, with the settings of a config."""

    model: AnswerModel
    settings: TeacherConfig
    journal: Journal
    cost: Cost = field(default_factory=Cost)

    def answers(
        self, conversations: Sequence[Conversation], seed: Sequence[int], samples: int = 1
    ) -> list[tuple[Answer, ...] | str]:
        """The answers to each conversation without their reasoning, or the reason why there are none.

        `seed` names the place of this call: equal requests at two places are two samples.
        """
        number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
        sampling = Sampling(self.settings.max_new_tokens, self.settings.temperature, number, samples)
        # a failure is final: asked again it might answer, and change all that follows from it
        replies, failures = self.model.ask(conversations, sampling, self.journal, title=None, keep_failures=True)
        reasons = {failure.index: failure.reason for failure in failures}
        self.cost.failed += len(failures)
        found: list[tuple[Answer, ...] | str] = []
        for i, reply in enumerate(replies):
            if reply is None:
                found.append(reasons.get(i, "no answer"))
            else:
                self.cost.add(reply)
                found.append(tuple(map(without_reasoning, reply.answers)))
        return found

    def choices(self, conversations: Sequence[Conversation], options: Sequence[str]) -> NDArray[np.float64]:
        """Probabilities of the options, [P, C]; NaN where nothing can be read."""
        limit = self.settings.max_new_tokens
        chosen = self.model.choose(conversations, options, self.journal, max_new_tokens=limit, title=None)
        for reply in chosen.replies:
            if reply is None:
                self.cost.failed += 1
            else:
                self.cost.add(reply)
        return np.exp(chosen.logprobs_PC)
