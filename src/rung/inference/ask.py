"""One way to ask a model: conversations in, answers out, every answer in a journal before the next is needed.

`AnswerModel` is what can be asked: a model in this process (`inference.local_model`) or one behind a server
(`inference.openai_client`). Both keep what was answered under the content of the request, so a command that is run
again asks only what is missing, in whatever order its stages come. `commands.generate`, `runs.judge` and `synth` ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rung.data.parsed_answer import parse_answer
from rung.inference.journal import Journal
from rung.models.generate import Sampling
from rung.types import Message


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns before the answer that is asked for."""

    turns: tuple[Message, ...]
    tools: str | None = None
    """JSON text of the schemas of the tools offered to the model."""
    task: str | None = None
    """Task of the conversation, for models that learned something per task."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, without the reasoning before it."""

    text: str
    stopped: bool
    """True if the model ended the answer, False if it was truncated."""
    reasoning: str = ""
    """What the model wrote before the answer, where its template marks it."""
    option_logprobs: tuple[float, ...] = ()
    """Log-probabilities of the options in nats, where one of several was to be chosen and the server gives them."""


def without_reasoning(answer: Answer) -> Answer:
    """The answer with the reasoning before it set apart, where it stands in tags that models use.

    A server without a parser of its own gives both in one text; reasoning that is never closed leaves an empty answer.
    """
    parsed = parse_answer(answer.text, "", stopped=answer.stopped, stop_texts=())
    return replace(answer, text=parsed.text, reasoning=answer.reasoning or parsed.reasoning)


@dataclass(frozen=True, slots=True)
class Reply:
    """All answers to one conversation, and what they took."""

    answers: tuple[Answer, ...]
    prompt_tokens: int | None = None
    """Tokens of the prompt; None for a server that does not count them."""
    answer_tokens: int | None = None
    """Tokens of all answers together."""
    seconds: float = 0.0
    """Time of the request; of conversations that are answered in one batch each has an equal share."""

    def to_json(self) -> list[Any]:
        """For a journal."""
        answers = [[a.text, a.stopped, a.reasoning, *filter(None, [a.option_logprobs])] for a in self.answers]
        return [answers, self.prompt_tokens, self.answer_tokens, round(self.seconds, 3)]

    @staticmethod
    def from_json(value: Sequence[Any]) -> Reply:
        """What `to_json` wrote."""
        answers, *costs = value
        read = (
            Answer(text, stopped, reasoning, *map(tuple, logprobs)) for text, stopped, reasoning, *logprobs in answers
        )
        return Reply(tuple(read), *costs)


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A conversation that got no answers."""

    index: int
    """Its place among those asked."""
    reason: str


class Replies(NamedTuple):
    """The replies in the order of the conversations, None for those that failed, and the failures."""

    replies: list[Reply | None]
    failures: list[FailedRequest]


class Choices(NamedTuple):
    """What was chosen among C options in P conversations, and what it took."""

    logprobs_PC: NDArray[np.float64]
    """Log p(option | conversation) in nats, normalized over the options; NaN where nothing can be read."""
    replies: list[Reply | None]
    """What was read and written for each conversation; None for those that failed."""


class AnswerModel(Protocol):
    """A model that can be asked."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What distinguishes this model from others: answers in a journal are valid for this model only."""

    def ask(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        journal: Journal,
        *,
        title: str | None = "ask",
        keep_failures: bool = False,
    ) -> Replies:
        """Answer every conversation; requests that are in the journal are not repeated.

        `title` is that of the progress bar; None shows none. `keep_failures` puts failures into the journal too: what
        follows from them is then the same when a command is run again.

        One conversation that cannot be answered is a failure by name and stops no other. Raises `RungError` for what
        would stop all of them; answers up to then are in the journal.
        """

    def choose(
        self,
        conversations: Sequence[Conversation],
        options: Sequence[str],
        journal: Journal,
        *,
        max_new_tokens: int,
        title: str | None = "choose",
    ) -> Choices:
        """The probabilities of the options as the answer to each conversation.

        A model in this process computes them and writes nothing. A server writes `max_new_tokens` at most; where it
        reports no probabilities, the option that it names has all of it.
        """


def chunk_seed(seed: int, chunk: int) -> int:
    """The seed of one chunk of requests, which depends on no chunk before it."""
    return int(np.random.SeedSequence([seed, chunk]).generate_state(1)[0])
