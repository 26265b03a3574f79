"""A batch whose rows join and leave between any two tokens, each with its own length, sampling and random numbers.

`models/decoding.py` answers a set of prompts that is known beforehand, all sampled in one way. A server does not know
what comes next. Here every row has its own slots of the cache from the first on, so a row that joins waits for nobody;
a row that leaves gives its place to the last one, so that the batch is dense. Prompts are encoded by
`models/prompt_cache.py`, which keeps beginnings of earlier ones. `serving/engine.py` drives it; one thread at a time.

Suffixes: B rows of the batch, S slots (without virtual tokens), V vocabulary, K key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from rung.models.base_model import widest_float
from rung.models.decoding import invert_distribution
from rung.models.policy import Policy, model_inputs
from rung.models.prompt_cache import PromptEncoder
from rung.models.slot_layer import SlotLayer, whole_blocks
from rung.models.weight_layout import order_weights


@dataclass(frozen=True)
class RowSampling:
    """How the tokens of one row are drawn. Temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    """Tokens are drawn from the smallest set with at least this probability (Holtzman et al. 2020, section 3.1)."""
    seed: int = 0
    top_logprobs: int = 0
    """Most probable tokens to report beside each token."""


class DrawnToken(NamedTuple):
    """A token of a row; log-probabilities are those of the model at temperature 1, in nats."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]
    """The most probable tokens, best first."""


@dataclass(eq=False)
class SlotRow:
    """A row of the batch."""

    sampling: RowSampling
    last_token: int
    slot: int
    """Where the keys of the last token go."""
    generator: torch.Generator
    drawn: int = 0

    @property
    def is_full(self) -> bool:
        """Whether the row has drawn as many tokens as it may."""
        return self.drawn >= self.sampling.max_new_tokens

    @property
    def end(self) -> int:
        """Slots that the prompt and the longest answer take."""
        return self.slot + self.sampling.max_new_tokens - self.drawn


class SlotPrompt(NamedTuple):
    """A prompt, and one sampling for each answer to it."""

    ids: Sequence[int]
    samplings: Sequence[RowSampling]


class SlotBatch:
    """The rows of one model."""

    def __init__(self, policy: Policy, *, beginnings_bytes: int = 0) -> None:
        self.policy = policy
        self.rows: list[SlotRow] = []
        self.encoder = PromptEncoder(policy, beginnings_bytes)
        self._layers: list[SlotLayer] = []
        order_weights(policy.model)

    @property
    def max_tokens(self) -> int:
        """Tokens of prompt and answer together that a row may have."""
        context = self.policy.base.context - self.policy.method.virtual_tokens
        # beyond the boundary the frequencies of all keys change
        boundary = self.policy.rope_boundary
        return context if boundary is None else min(context, boundary - self.policy.method.virtual_tokens)

    def join(self, ids: Sequence[int], samplings: Sequence[RowSampling]) -> list[SlotRow]:
        """Add a row for each answer to a prompt. Raises as `join_all`."""
        return self.join_all([SlotPrompt(ids, samplings)])[0]

    @torch.no_grad()
    def join_all(self, prompts: Sequence[SlotPrompt]) -> list[list[SlotRow]]:
        """Encode prompts up to their last token, and add a row for each sampling, by prompt.

        Raises `ValueError` for a prompt without tokens or one that leaves no room; then none of them has joined.
        """
        for ids, samplings in prompts:
            longest = max(sampling.max_new_tokens for sampling in samplings)
            if not ids or len(ids) + longest > self.max_tokens:
                given = f"a prompt of {len(ids)} tokens and {longest} more"
                raise ValueError(f"{given}, where {self.max_tokens} are allowed")
        encoded = self.encoder.encode([np.array(ids[:-1], dtype=np.int64) for ids, _ in prompts])
        joined = [[_new_row(ids, sampling) for sampling in samplings] for ids, samplings in prompts]
        if not self._layers:
            states = next((kv for kv in encoded if kv), None)
            states = states or self.encoder.encode_unkept(np.array(prompts[0].ids[-1:], dtype=np.int64))
            self._layers = [SlotLayer(states[layer]) for layer in sorted(states)]
        added = [row for rows in joined for row in rows]
        capacity, slots = _buffer_shape([row.end for row in (*self.rows, *added)])
        for slot_layer in self._layers:
            slot_layer.reserve(capacity, slots)
        first = len(self.rows)
        for kv_by_layer, rows in zip(encoded, joined, strict=True):
            for layer in sorted(kv_by_layer):
                self._layers[layer].write(slice(first, first + len(rows)), kv_by_layer[layer])
            first += len(rows)
        # last: where memory was missing, the batch is what it was
        self.rows += added
        return joined

    def cache_bytes(self, prompts: Sequence[SlotPrompt], *, alone: bool = False) -> int:
        """Bytes of keys and values in the buffers if rows for these prompts joined, or were `alone` in them."""
        ends = [max(0, len(ids) - 1) + sampling.max_new_tokens for ids, all_ in prompts for sampling in all_]
        rows, slots = _buffer_shape(ends if alone else [*ends, *(row.end for row in self.rows)])
        shape = self.policy.base.shape
        return 2 * rows * slots * shape.layers * shape.kv * self.policy.base.compute_dtype.itemsize

    def clear(self) -> None:
        """Drop all rows and their buffers."""
        self.rows, self._layers = [], []

    def leave(self, row: SlotRow) -> None:
        """Remove a row; the last one takes its place."""
        place, last = self.rows.index(row), len(self.rows) - 1
        if place != last:
            for layer in self._layers:
                layer.copy_row(last, place)
            self.rows[place] = self.rows[last]
        self.rows.pop()
        if not self.rows:  # one long answer must not hold its memory for ever
            self.clear()

    @torch.no_grad()
    def step(self) -> list[tuple[SlotRow, DrawnToken]]:
        """One token for every row."""
        if not self.rows:
            return []
        policy, device = self.policy, self.policy.device
        slot_B = torch.tensor([row.slot for row in self.rows], device=device)
        slots = whole_blocks(max(row.slot for row in self.rows) + 1)
        for layer in self._layers:
            layer.show(slot_B, slots)
        last_B1 = torch.tensor([[row.last_token] for row in self.rows], device=device)
        with policy.autocast():
            out = policy.model(
                **model_inputs(policy.embed(last_B1, None)),
                position_ids=(slot_B + policy.method.virtual_tokens)[:, None],
                past_key_values=Cache(layers=self._layers),
                prefix=self.encoder.virtual_kv,
                attention_mask=(torch.arange(slots, device=device) <= slot_B[:, None])[:, None, None],
                row_slots=slot_B,
                use_cache=True,
                logits_to_keep=1,
            )
        drawn = draw(out.logits[:, -1].float(), self.rows)
        for row, token in zip(self.rows, drawn, strict=True):
            row.last_token, row.slot, row.drawn = token.token, row.slot + 1, row.drawn + 1
        return list(zip(self.rows, drawn, strict=True))


def _new_row(ids: Sequence[int], sampling: RowSampling) -> SlotRow:
    return SlotRow(sampling, ids[-1], len(ids) - 1, torch.Generator().manual_seed(sampling.seed))


def _buffer_shape(ends: Sequence[int]) -> tuple[int, int]:
    """Rows and slots with room for whole answers: buffers that grow with every block would be copied as often."""
    return len(ends), whole_blocks(max(ends, default=0))


def draw(logits_BV: Tensor, rows: Sequence[SlotRow]) -> list[DrawnToken]:
    """The next token of each row, by its own sampling. Raises `FloatingPointError` for logits that are no numbers."""
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    tokens_B = logprobs_BV.argmax(dim=-1)
    sampled = [i for i, row in enumerate(rows) if row.sampling.temperature > 0.0]
    if sampled:
        options: Any = {"dtype": widest_float(logits_BV.device)}
        # each row has random numbers of its own, so that an answer does not depend on its neighbors
        uniform = torch.cat([torch.rand(1, 1, generator=rows[i].generator, dtype=torch.float64) for i in sampled])
        temperature = torch.tensor([[rows[i].sampling.temperature] for i in sampled], device=logits_BV.device)
        weights = torch.softmax(logits_BV[sampled] / temperature, dim=-1)
        for k, i in enumerate(sampled):
            if rows[i].sampling.top_p < 1.0:
                weights[k] = nucleus(weights[k], rows[i].sampling.top_p)
        tokens_B[sampled] = invert_distribution(weights, uniform.to(device=logits_BV.device, **options))
    chosen = logprobs_BV.gather(1, tokens_B[:, None])[:, 0].tolist()
    if any(math.isnan(logprob) for logprob in chosen):
        raise FloatingPointError("the model's output is not finite")
    tops: list[list[tuple[int, float]]] = [[] for _ in rows]
    for i, row in enumerate(rows):
        if row.sampling.top_logprobs:
            values, ids = logprobs_BV[i].topk(min(row.sampling.top_logprobs, logprobs_BV.shape[1]))
            tops[i] = list(zip(ids.tolist(), values.tolist(), strict=True))
    return [DrawnToken(*parts) for parts in zip(tokens_B.tolist(), chosen, tops, strict=True)]


def nucleus(weights_V: Tensor, top_p: float) -> Tensor:
    """The weights with all tokens set to 0 but the most probable ones that together reach `top_p`."""
    ordered, order = weights_V.sort(descending=True, stable=True)
    # a token stays while those before it have not reached the share; the first always does
    before = ordered.cumsum(0) - ordered
    return torch.zeros_like(weights_V).scatter(0, order, ordered.masked_fill(before >= top_p, 0.0))
