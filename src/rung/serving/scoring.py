"""Texts that exist already: log-probabilities of a prompt's tokens, documents for a reward model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rung.data.chat import ChatTemplate
from rung.data.tokenize import tokenize_records
from rung.models.packing import pack_separately
from rung.models.policy import Policy
from rung.models.slot_batch import DrawnToken
from rung.types import Example, Message, Record, Source

ROWS_OF_LOGITS = 256
"""Positions of a prompt whose logits are in memory at once."""


@torch.no_grad()
def prompt_logprobs(policy: Policy, prompt: Sequence[int], top: int) -> list[DrawnToken | None]:
    """The tokens of a prompt with the log-probabilities that the model gives them; None for the first."""
    ids = np.array(prompt, dtype=np.int32)
    (batch,) = pack_separately([Example(ids, np.arange(len(ids)) > 0, Source("request", 0))], policy.device)
    hidden = policy.hidden_states(batch)
    logprobs = policy.logprobs_of(hidden, batch).tolist() if len(ids) > 1 else []
    tops: list[Sequence[tuple[int, float]]] = [()] * len(logprobs)
    if top:
        for start in range(0, len(logprobs), ROWS_OF_LOGITS):
            rows = hidden[batch.loss.source[start : start + ROWS_OF_LOGITS]]
            tops[start : start + len(rows)] = _most_probable(policy.logits(rows), top)
        # the two are rounded otherwise; harnesses ask whether a token is the best one by equality
        found = zip(ids[1:].tolist(), logprobs, tops, strict=True)
        tops = [[(i, own if i == token else other) for i, other in row] for token, own, row in found]
    return [None, *map(DrawnToken, ids[1:].tolist(), logprobs, tops)]


def _most_probable(logits_NV: Tensor, count: int) -> list[Sequence[tuple[int, float]]]:
    values, ids = torch.log_softmax(logits_NV, dim=-1).topk(min(count, logits_NV.shape[1]))
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]


def scored_documents(chat: ChatTemplate, question: str, answers: Sequence[str], limit: int) -> list[Example]:
    """Question and answer as a reward model was trained on them. Raises `DataError` for what is too long or empty."""
    turns = [(Message("user", question), Message("assistant", answer)) for answer in answers]
    records = [Record(pair, Source("request", i)) for i, pair in enumerate(turns, start=1)]
    return list(tokenize_records(chat, records, max_length=limit, overflow="error").examples)
