"""A batch whose rows join and leave between any two tokens, each with its own length, sampling and random numbers.

`models/decoding.py` answers a set of prompts that is known beforehand, all sampled in one way. A server does not know
what comes next. Here every row has its own slots of the cache from the first on, so a row that joins waits for nobody;
a row that leaves gives its place to the last one, so that the batch is dense. Beginnings of earlier prompts are kept,
and a prompt that begins with one of them is encoded from there on. `serving/engine.py` drives it; one thread at a time.

Suffixes: B rows of the batch, S slots (without virtual tokens), V vocabulary, K key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from rung.models.base_model import widest_float
from rung.models.decoding import invert_distribution
from rung.models.policy import Policy, model_inputs
from rung.models.slot_layer import SlotLayer, whole_blocks
from rung.models.tree_attention import KeysValues, KVByLayer, concatenate_kv
from rung.models.weight_layout import order_weights
from rung.types import Segment

MIN_KEPT_BEGINNING = 32
"""Tokens; encoding a shorter beginning again costs less than looking for it saves."""


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


@dataclass
class BeginningCache:
    """Keys and values of earlier prompts, by their tokens; the one that was used longest ago goes first."""

    limit_bytes: int
    entries: OrderedDict[bytes, tuple[np.ndarray, KVByLayer]] = field(default_factory=OrderedDict)
    bytes_held: int = 0

    def longest(self, ids: np.ndarray) -> tuple[int, KVByLayer | None]:
        """The longest beginning of these tokens that is kept: its length, and keys and values at least as long."""
        best, found = 0, None
        for key, (kept, _) in self.entries.items():
            length = min(len(kept), len(ids))
            differences = np.flatnonzero(kept[:length] != ids[:length])
            common = int(differences[0]) if len(differences) else length
            if common > best:
                best, found = common, key
        if found is None or best < MIN_KEPT_BEGINNING:
            return 0, None
        self.entries.move_to_end(found)
        return best, self.entries[found][1]

    def add(self, ids: np.ndarray, kv_by_layer: KVByLayer) -> None:
        """Keep a prompt, unless it alone is larger than the limit."""
        size = sum(part.nbytes for states in kv_by_layer.values() for part in states)
        if len(ids) < MIN_KEPT_BEGINNING or size > self.limit_bytes or ids.tobytes() in self.entries:
            return
        self.entries[ids.tobytes()] = (ids, kv_by_layer)
        self.bytes_held += size
        while self.bytes_held > self.limit_bytes:
            _, (_, oldest) = self.entries.popitem(last=False)
            self.bytes_held -= sum(part.nbytes for states in oldest.values() for part in states)


class SlotBatch:
    """The rows of one model."""

    def __init__(self, policy: Policy, *, beginnings_bytes: int = 0) -> None:
        self.policy = policy
        self.rows: list[SlotRow] = []
        self.beginnings = BeginningCache(beginnings_bytes)
        self.encoded_tokens = self.shared_tokens = 0
        """Prompt tokens that were encoded, and those whose keys were kept from earlier prompts."""
        self._layers: list[SlotLayer] = []
        with torch.no_grad(), policy.autocast():
            self._virtual = policy.virtual_kv()
        order_weights(policy.model)

    @property
    def max_tokens(self) -> int:
        """Tokens of prompt and answer together that a row may have."""
        context = self.policy.base.context - self.policy.method.virtual_tokens
        # beyond the boundary the frequencies of all keys change
        boundary = self.policy.rope_boundary
        return context if boundary is None else min(context, boundary - self.policy.method.virtual_tokens)

    @torch.no_grad()
    def join(self, ids: Sequence[int], samplings: Sequence[RowSampling]) -> list[SlotRow]:
        """Encode a prompt up to its last token, and add a row for each sampling.

        Raises `ValueError` for a prompt without tokens or one that leaves no room.
        """
        longest = max(sampling.max_new_tokens for sampling in samplings)
        if not ids or len(ids) + longest > self.max_tokens:
            raise ValueError(f"a prompt of {len(ids)} tokens and {longest} more, where {self.max_tokens} are allowed")
        kv_by_layer = self._encode(np.array(ids[:-1], dtype=np.int64))
        joined = []
        for sampling in samplings:
            generator = torch.Generator().manual_seed(sampling.seed)
            joined.append(SlotRow(sampling, ids[-1], len(ids) - 1, generator))
        if not self._layers:
            states = kv_by_layer or self._packed(np.array(ids[-1:], dtype=np.int64), 0, None)
            self._layers = [SlotLayer(states[layer]) for layer in sorted(states)]
        rows, slots = _buffer_shape([row.end for row in (*self.rows, *joined)])
        for slot_layer in self._layers:
            slot_layer.reserve(rows, slots)
        first = len(self.rows)
        for layer in sorted(kv_by_layer):
            self._layers[layer].write(slice(first, first + len(joined)), kv_by_layer[layer])
        # last: where memory was missing, the batch is what it was
        self.rows += joined
        return joined

    def cache_bytes(self, prompt_tokens: int, samplings: Sequence[RowSampling], *, alone: bool = False) -> int:
        """Bytes of keys and values in the buffers if rows for these samplings joined, or were `alone` in them."""
        ends = [max(0, prompt_tokens - 1) + sampling.max_new_tokens for sampling in samplings]
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
                prefix=self._virtual,
                attention_mask=(torch.arange(slots, device=device) <= slot_B[:, None])[:, None, None],
                row_slots=slot_B,
                use_cache=True,
                logits_to_keep=1,
            )
        drawn = draw(out.logits[:, -1].float(), self.rows)
        for row, token in zip(self.rows, drawn, strict=True):
            row.last_token, row.slot, row.drawn = token.token, row.slot + 1, row.drawn + 1
        return list(zip(self.rows, drawn, strict=True))

    def _encode(self, ids: np.ndarray) -> KVByLayer:
        """Keys and values of a prompt [1, K, T, D], from the longest beginning that is kept."""
        if not len(ids):
            return {}
        kept_tokens, kept = self.beginnings.longest(ids)
        self.shared_tokens += kept_tokens
        self.encoded_tokens += len(ids) - kept_tokens
        beginning = None
        if kept is not None:
            beginning = {layer: _first(states, kept_tokens) for layer, states in kept.items()}
        rest = self._packed(ids[kept_tokens:], kept_tokens, beginning)
        if not rest:  # a view of what is kept: keeping it too would hold the whole
            return beginning or {}
        kv_by_layer = concatenate_kv(beginning, rest)
        self.beginnings.add(ids, kv_by_layer)
        return kv_by_layer

    def _packed(self, ids: np.ndarray, start: int, beginning: KVByLayer | None) -> KVByLayer:
        """Keys and values of tokens behind the virtual ones and a beginning."""
        if not len(ids):
            return {}
        policy, device = self.policy, self.policy.device
        positions = torch.arange(start, start + len(ids), device=device) + policy.method.virtual_tokens
        context = self._virtual if beginning is None else concatenate_kv(self._virtual, beginning)
        with policy.autocast():
            inputs = policy.embed(torch.from_numpy(ids).to(device), None)
            return policy.packed_kv(inputs, positions, (Segment(0, len(ids), None),), context)


def _buffer_shape(ends: Sequence[int]) -> tuple[int, int]:
    """Rows and slots with room for whole answers: buffers that grow with every block would be copied as often."""
    return len(ends), whole_blocks(max(ends))


def _first(states: KeysValues, tokens: int) -> KeysValues:
    key, value = (part[:, :, :tokens] for part in states)
    return key, value


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
