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
from transformers.cache_utils import DynamicLayer

from rung.models.base_model import widest_float
from rung.models.decoding import invert_distribution
from rung.models.policy import Policy, model_inputs
from rung.models.tree_attention import KeysValues, KVByLayer, concatenate_kv
from rung.models.weight_layout import order_weights
from rung.types import Segment

SLOT_BLOCK = 64
"""Slots are added in multiples of this."""
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


class _SlotLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of the rows in buffers [capacity, K, S, D], of which the rows and slots in use are shown."""

    def __init__(self, states: KeysValues) -> None:
        super().__init__()
        self.buffers = [part.new_zeros(0, part.shape[1], 0, part.shape[3]) for part in states]
        self.slot_B: Tensor | None = None
        self.shown = (0, 0)
        self.keys, self.values = self.buffers
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def reserve(self, rows: int, slots: int) -> None:
        """Make room; grown buffers keep what they hold."""
        for i, buffer in enumerate(self.buffers):
            if buffer.shape[0] < rows or buffer.shape[2] < slots:
                shape = (max(rows, buffer.shape[0]), buffer.shape[1], max(slots, buffer.shape[2]), buffer.shape[3])
                # zeros: a masked slot has no weight, but no weight times what is not a number is not a number
                larger = buffer.new_zeros(shape)
                larger[: buffer.shape[0], :, : buffer.shape[2]] = buffer
                self.buffers[i] = larger

    def show(self, slot_B: Tensor, slots: int) -> None:
        """Let the next token of each row be written to its slot, and attention read so many slots."""
        self.slot_B, self.shown = slot_B, (len(slot_B), slots)
        self.keys, self.values = (buffer[: len(slot_B), :, :slots] for buffer in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, K, 1, D]; return what is shown."""
        rows = torch.arange(self.shown[0], device=self.device)
        for shown, states in ((self.keys, key_states), (self.values, value_states)):
            shown[rows, :, self.slot_B] = states[:, :, 0]
        return self.keys, self.values


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

    def __init__(self, policy: Policy, *, task: str | None = None, beginnings_bytes: int = 0) -> None:
        self.policy, self.task = policy, task
        self.rows: list[SlotRow] = []
        self.beginnings = BeginningCache(beginnings_bytes)
        self.encoded_tokens = self.shared_tokens = 0
        """Prompt tokens that were encoded, and those whose keys were kept from earlier prompts."""
        self._layers: list[_SlotLayer] = []
        with torch.no_grad(), policy.autocast():
            self._virtual = policy.virtual_kv(task)
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
            self._layers = [_SlotLayer(states[layer]) for layer in sorted(states)]
        rows, slots = self._buffer_shape(joined)
        for slot_layer in self._layers:
            slot_layer.reserve(rows, slots)
        first = len(self.rows)
        for layer in sorted(kv_by_layer):
            for buffer, part in zip(self._layers[layer].buffers, kv_by_layer[layer], strict=True):
                buffer[first : first + len(joined), :, : len(ids) - 1] = part
        # last: where memory was missing, the batch is what it was
        self.rows += joined
        return joined

    def bytes_with(self, prompt_tokens: int, samplings: Sequence[RowSampling]) -> int:
        """Bytes of keys and values in the buffers if these rows joined."""
        return self._bytes(*self._buffer_shape(self._rows_of(prompt_tokens, samplings)))

    def bytes_for(self, prompt_tokens: int, samplings: Sequence[RowSampling]) -> int:
        """The same of these rows alone."""
        rows = self._rows_of(prompt_tokens, samplings)
        return self._bytes(len(rows), max(row.slot + row.sampling.max_new_tokens for row in rows))

    def _rows_of(self, prompt_tokens: int, samplings: Sequence[RowSampling]) -> list[SlotRow]:
        return [SlotRow(s, 0, max(0, prompt_tokens - 1), torch.Generator()) for s in samplings]

    def _bytes(self, rows: int, slots: int) -> int:
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
                for buffer in layer.buffers:
                    buffer[place] = buffer[last]
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
        slots = -(-(max(row.slot for row in self.rows) + 1) // SLOT_BLOCK) * SLOT_BLOCK
        for layer in self._layers:
            layer.show(slot_B, slots)
        last_B1 = torch.tensor([[row.last_token] for row in self.rows], device=device)
        with policy.autocast():
            out = policy.model(
                **model_inputs(policy.embed(last_B1, self.task)),
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

    def _buffer_shape(self, joining: Sequence[SlotRow]) -> tuple[int, int]:
        """Rows and slots with room for whole answers: buffers that grow with every block would be copied as often."""
        rows = [*self.rows, *joining]
        slots = max(row.slot + row.sampling.max_new_tokens - row.drawn for row in rows)
        return len(rows), -(-slots // SLOT_BLOCK) * SLOT_BLOCK

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
            inputs = policy.embed(torch.from_numpy(ids).to(device), self.task)
            return policy.packed_kv(inputs, positions, (Segment(0, len(ids), None),), context)


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
