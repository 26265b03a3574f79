"""Answers of a model in this process, sampled chunk by chunk, each chunk in the journal before the next.

A chunk has a seed of its own, which makes a command that resumes draw what an uninterrupted one draws. A larger chunk
would lose more at a stop, a smaller one would fill the batch less.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from rung.console import ProgressBar, print_status
from rung.data.chat import ChatTemplate
from rung.errors import RungError
from rung.inference.ask import Answer, Choices, Conversation, FailedRequest, Replies, Reply, chunk_seed
from rung.inference.choose import PROMPTS_PER_UPDATE, choose
from rung.inference.journal import Journal, request_key
from rung.models.generate import GeneratedAnswer, Sampling, generate_by_task
from rung.models.policy import Policy

ANSWERS_PER_BATCH = 64
"""Answers decoded in one batch."""
ANSWERS_PER_CHUNK = 256
"""Answers in one chunk of the journal: what a stop may lose."""


@dataclass(frozen=True)
class LocalModel:
    """A loaded model that answers conversations."""

    policy: Policy
    chat: ChatTemplate
    weights: Sequence[str] = ()
    """Fingerprints of its weights."""
    stop_texts: Sequence[str] = ()
    """Texts that end an answer; the first one and what follows it are not part of the answer."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """The weights: a run that was trained again under the same name is another model."""
        return {"weights": list(self.weights), "stop_texts": list(self.stop_texts)}

    def ask(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        journal: Journal,
        *,
        title: str | None = "ask",
        keep_failures: bool = False,
    ) -> Replies:
        """Answer every conversation; a prompt that leaves no room for an answer, or cannot be rendered, fails.

        It fails again whenever it is asked, so `keep_failures` changes nothing here.
        """
        prompts, failures = self._prompts(conversations, sampling.max_new_tokens)
        tasks = [conversations[i].task for i in prompts]
        answers, seconds = sample_answers(
            *(self.policy, self.chat, list(prompts.values()), tasks, sampling, journal),
            title=title,
            stop_texts=self.stop_texts,
        )
        replies: list[Reply | None] = [None] * len(conversations)
        n = sampling.answers_per_prompt
        for position, (i, prompt) in enumerate(prompts.items()):
            generated = answers[position * n : (position + 1) * n]
            parsed = tuple(map(self._parsed, generated))
            replies[i] = Reply(parsed, len(prompt), sum(len(a.all_tokens) for a in generated), seconds / len(prompts))
        return Replies(replies, failures)

    def choose(
        self,
        conversations: Sequence[Conversation],
        options: Sequence[str],
        journal: Journal,
        *,
        max_new_tokens: int,
        title: str | None = "choose",
    ) -> Choices:
        """Log-probabilities of the options as answers, normalized over them; NaN where none has room."""
        ids = [self.chat.encode([option], mid_document=True)[0] for option in options]
        # the options take the place of an answer
        prompts, _ = self._prompts(conversations, max(map(len, ids)))
        places, logprobs_PC = list(prompts), np.full((len(conversations), len(options)), np.nan)
        replies: list[Reply | None] = [None] * len(conversations)
        with ProgressBar(title, len(places)) as bar:
            for start in range(0, len(places), PROMPTS_PER_UPDATE):
                part = places[start : start + PROMPTS_PER_UPDATE]
                key = request_key([prompts[i] for i in part], ids)
                if (stored := journal.get(key)) is None:
                    start_time = time.perf_counter()
                    rows = choose(self.policy, [prompts[i] for i in part], ids).tolist()
                    stored = {"rows": rows, "seconds": round(time.perf_counter() - start_time, 3)}
                    journal.add(key, stored)
                logprobs_PC[part] = stored["rows"]
                for i in part:
                    replies[i] = Reply((), len(prompts[i]), 0, stored["seconds"] / len(part))
                bar.advance(len(part))
        known = ~np.isnan(logprobs_PC).any(axis=1)
        logprobs_PC[known] -= np.logaddexp.reduce(logprobs_PC[known], axis=1, keepdims=True)
        return Choices(logprobs_PC, replies)

    def _parsed(self, answer: GeneratedAnswer) -> Answer:
        options: Any = {"stopped": answer.stopped, "stop_texts": self.stop_texts}
        parsed = self.chat.parsed_answer(answer.all_tokens, **options)
        return Answer(parsed.text.strip(), answer.stopped, parsed.reasoning)

    def _prompts(
        self, conversations: Sequence[Conversation], max_new_tokens: int
    ) -> tuple[dict[int, list[int]], list[FailedRequest]]:
        """Ids of the prompts by the place of their conversation, and those that cannot be answered."""
        room = self.policy.base.context - self.policy.method.virtual_tokens - max_new_tokens
        chat = self.chat.with_control_tokens(None)  # the texts come from files and models, whatever was trained on
        prompts: dict[int, list[int]] = {}
        failures: list[FailedRequest] = []
        for i, conversation in enumerate(conversations):
            try:
                ids = chat.prompt_ids(conversation.turns, tools=conversation.tools)
            except RungError as error:
                failures.append(FailedRequest(i, str(error)))
                continue
            if len(ids) > room:
                reason = f"the prompt has {len(ids):,} tokens, and the model takes {room:,} before an answer"
                failures.append(FailedRequest(i, reason))
            else:
                prompts[i] = ids
        return prompts, failures


def sample_answers(
    policy: Policy,
    chat: ChatTemplate,
    prompts: Sequence[Sequence[int]],
    tasks: Sequence[str | None],
    sampling: Sampling,
    journal: Journal,
    *,
    title: str | None = "generate",
    stop_texts: Sequence[str] = (),
) -> tuple[list[GeneratedAnswer], float]:
    """Answers to all prompts in order, each ended at the first of `stop_texts`, and the seconds that they took.

    They are sampled chunk by chunk; chunks that the journal has are not sampled again, and count with their seconds.
    """
    prompts_per_chunk = max(1, ANSWERS_PER_CHUNK // sampling.answers_per_prompt)
    starts = range(0, len(prompts), prompts_per_chunk)
    samplings = [replace(sampling, seed=chunk_seed(sampling.seed, number)) for number in range(len(starts))]
    keys = []
    for start, chunk_sampling in zip(starts, samplings, strict=True):
        chunk = slice(start, start + prompts_per_chunk)
        keys.append(
            request_key(list(map(list, prompts[chunk])), list(tasks[chunk]), asdict(chunk_sampling), list(stop_texts))
        )
    known = sum(journal.get(key) is not None for key in keys)
    if known and title is not None:
        print_status(f"going on after {known:,} of {len(keys):,} parts, kept in {journal.path}")
    answers: list[GeneratedAnswer] = []
    seconds = 0.0
    on_token = partial(chat.has_stop_text, stop_texts=stop_texts) if stop_texts else None
    with ProgressBar(title, len(prompts)) as bar:
        for start, chunk_sampling, key in zip(starts, samplings, keys, strict=True):
            chunk = slice(start, start + prompts_per_chunk)
            if (stored := journal.get(key)) is not None:
                answers += [GeneratedAnswer(*fields) for fields in stored["answers"]]
                seconds += stored["seconds"]
                bar.advance(len(prompts[chunk]))
                continue
            start_time = time.perf_counter()
            generated = generate_by_task(
                *(policy, prompts[chunk], tasks[chunk]),
                stop_ids=chat.generation_stop_ids,
                sampling=chunk_sampling,
                batch_size=ANSWERS_PER_BATCH,
                on_batch=bar.advance,
                on_token=on_token,
            )
            chunk_seconds = round(time.perf_counter() - start_time, 3)
            stored_answers = [[a.ids, a.stop, a.logprobs, a.ended_by_caller] for a in generated]
            journal.add(key, {"answers": stored_answers, "seconds": chunk_seconds})
            answers += generated
            seconds += chunk_seconds
    return answers, seconds
