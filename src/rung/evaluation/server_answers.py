"""Greedy answers of a run or a base that a vLLM server generates, held to the model in this process.

Only the decoding moves: prompts, stop tokens, stop texts and scores are those of this process, and some of the answers
are read here again, because a server with another base or without the adapter would be scored without an error. A stop
text is looked for here and not by the server, which searches reasoning and leading white space too.
`evaluation.evaluate` calls `ServerAnswers` in the place of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rung.console import print_status
from rung.inference.vllm_client import AdapterServer
from rung.models.decoding import OnAnswered, OnToken
from rung.models.document_values import token_values_by_document
from rung.models.generate import GeneratedAnswer, Sampling
from rung.models.policy import Policy
from rung.planning.memory import tokens_per_micro_batch
from rung.training.gates import enforce
from rung.training.server_gate import PROBED_DOCUMENTS, DrawnAnswers, check_sampler, refuse_changing_frequencies
from rung.types import Example, Source

GATE = "evaluation.server"


@dataclass(frozen=True)
class ServerAnswers:
    """A server that answers for a run, or for its base."""

    server: AdapterServer
    adapter: Path | None
    """Folder of the run's adapter, which is loaded for the time of the questions; None: the base answers."""

    def answer(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        *,
        on_token: OnToken | None = None,
        on_batch: OnAnswered | None = None,
    ) -> list[GeneratedAnswer]:
        """Greedy answers in the order of the prompts; the other arguments as in `models.generate.generate`.

        `policy` is the model in this process. Raises `GateError` where the server is another one, `CheckpointError`
        where it fails.
        """
        refuse_changing_frequencies(policy, self.server.where)
        name: str = self.server.config.model
        loaded: AbstractContextManager[None] = nullcontext()
        if self.adapter is not None:
            self.server.unload_stale(self.server.adapter_prefix(self.adapter))
            name = self.server.adapter_name(self.adapter)
            loaded = self.server.adapter(name, self.adapter)
        sampling, vocab_size = Sampling(max_new_tokens), policy.base.vocab_size
        with loaded:
            answers = self.server.complete(name, prompts, stop_ids, sampling, vocab_size, on_answered=on_batch)
        self._check(policy, prompts, answers)
        return answers if on_token is None else [_cut_where_ended(answer, on_token) for answer in answers]

    def _check(self, policy: Policy, prompts: Sequence[Sequence[int]], answers: Sequence[GeneratedAnswer]) -> None:
        """Read some of the answers in this process and compare their log-probabilities."""
        chosen = dict.fromkeys(np.linspace(0, len(answers) - 1, min(PROBED_DOCUMENTS, len(answers))).astype(int))
        documents = [_document(prompts[i], answers[i], i) for i in chosen]
        if not documents:
            return
        budget = tokens_per_micro_batch(policy.base.shape, policy.device.type)

        def evaluate(documents: Sequence[Example], value: Any) -> list[np.ndarray]:
            return token_values_by_document([policy], documents, budget, value)

        sampler_logprobs = [np.array(answers[i].logprobs) for i in chosen]
        drawn = DrawnAnswers(documents, evaluate(documents, policy.logprobs), sampler_logprobs)
        gate = check_sampler(GATE, policy, drawn, self.server.config.dtype, evaluate)
        print_status(str(gate))
        enforce(gate)


def _document(prompt: Sequence[int], answer: GeneratedAnswer, number: int) -> Example:
    ids = np.array([*prompt, *answer.all_tokens], dtype=np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt), Source("answer", number))


def _cut_where_ended(answer: GeneratedAnswer, on_token: Callable[[Sequence[int]], bool]) -> GeneratedAnswer:
    """The answer up to the token after which `on_token` ends it, as the decoder would have ended it."""
    for length in range(1, len(answer.ids) + 1):
        if on_token(answer.ids[:length]):
            return GeneratedAnswer(answer.ids[:length], None, answer.logprobs[:length], ended_by_caller=True)
    return answer
