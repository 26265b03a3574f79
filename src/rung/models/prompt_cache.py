"""Keys and values of prompts, from beginnings that earlier prompts left, several prompts in one pass.

A pass over a few tokens costs as much as reading all weights: on two cores 25 ms for SmolLM2-135M, beside 0.7 ms a
token. So prompts that come together are encoded together, where they begin alike; where one would repeat what another
leaves, it waits for it. `models/slot_batch.py` encodes the prompts of its rows here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rung.models.decoding import encoded_together
from rung.models.policy import Policy
from rung.models.tree_attention import KeysValues, KVByLayer, concatenate_kv
from rung.types import Segment

MIN_KEPT_BEGINNING = 8
"""Tokens; encoding a shorter beginning again costs less than looking for it saves."""
PASS_TOKENS = 32
"""Tokens whose encoding takes as long as a pass over the weights takes at least: a prompt that would share so many more
tokens with a kept beginning by itself is encoded in the pass of others all the same."""
Ids = NDArray[np.int64]


@dataclass
class BeginningCache:
    """Keys and values of earlier prompts, by their tokens; the least recently used one goes first.

    Of sorted texts the one that begins most like another stands next to its place, so a lookup compares two of them.
    """

    limit_bytes: int
    entries: OrderedDict[bytes, tuple[Ids, KVByLayer]] = field(default_factory=OrderedDict)
    """By sort key, in the order of their last use."""
    bytes_held: int = 0
    _sorted_keys: list[bytes] = field(default_factory=list)

    def longest(self, ids: Ids) -> tuple[int, KVByLayer | None]:
        """The longest beginning of these tokens that is kept: its length, and keys and values at least as long."""
        place = bisect_left(self._sorted_keys, _sort_key(ids))
        neighbors = self._sorted_keys[max(0, place - 1) : place + 1]
        length, key = max(((common_length(self.entries[key][0], ids), key) for key in neighbors), default=(0, b""))
        if length < MIN_KEPT_BEGINNING:
            return 0, None
        self.entries.move_to_end(key)
        return length, self.entries[key][1]

    def add(self, ids: Ids, kv_by_layer: KVByLayer) -> None:
        """Keep a prompt, unless it alone is larger than the limit."""
        size, key = _kv_bytes(kv_by_layer), _sort_key(ids)
        if len(ids) < MIN_KEPT_BEGINNING or size > self.limit_bytes or key in self.entries:
            return
        self.entries[key] = (ids, kv_by_layer)
        insort(self._sorted_keys, key)
        self.bytes_held += size
        while self.bytes_held > self.limit_bytes:
            oldest_key, (_, oldest) = self.entries.popitem(last=False)
            del self._sorted_keys[bisect_left(self._sorted_keys, oldest_key)]
            self.bytes_held -= _kv_bytes(oldest)


def _sort_key(ids: Ids) -> bytes:
    """Bytes that sort as the tokens do: the highest byte of each token first."""
    return ids.astype(">i8").tobytes()


def _kv_bytes(kv_by_layer: KVByLayer) -> int:
    return sum(part.nbytes for states in kv_by_layer.values() for part in states)


class PassGroup(NamedTuple):
    """Prompts that are encoded in one pass."""

    places: Sequence[int]
    """Of the prompts among those that wait."""
    beginning_tokens: int
    beginning: KVByLayer | None
    """A kept beginning that they share, at least as long."""


class PromptEncoder:
    """Encodes prompts behind a method's virtual tokens, and keeps what it encoded."""

    def __init__(self, policy: Policy, beginnings_bytes: int) -> None:
        self.policy = policy
        self.beginnings = BeginningCache(beginnings_bytes)
        self.encoded_tokens = self.shared_tokens = 0
        """Prompt tokens that were encoded, and those whose keys were kept from earlier prompts."""
        with torch.no_grad(), policy.autocast():
            self.virtual_kv = policy.virtual_kv()

    @torch.no_grad()
    def encode(self, prompts: Sequence[Ids]) -> list[KVByLayer]:
        """Keys and values [1, K, T, D] of each prompt; nothing for a prompt without tokens."""
        states: list[KVByLayer] = [{} for _ in prompts]
        waiting = [i for i, ids in enumerate(prompts) if len(ids)]
        while waiting:
            group = self._next_group([prompts[i] for i in waiting])
            numbers = [waiting[place] for place in group.places]
            encoded = self._encode_group([prompts[i] for i in numbers], group)
            for i, kv_by_layer in zip(numbers, encoded, strict=True):
                states[i] = kv_by_layer
            waiting = [i for i in waiting if i not in numbers]
        return states

    def encode_unkept(self, ids: Ids) -> KVByLayer:
        """Keys and values of some tokens, which the cache does not keep."""
        return self._packed([ids], 0, None)[0]

    def _next_group(self, prompts: Sequence[Ids]) -> PassGroup:
        """The first prompt, and others that lose little by sharing its pass.

        In a pass all prompts start from one kept beginning, so each may lose a part of its own. A prompt that repeats
        much of another in the pass waits: it starts from what that one leaves.
        """
        beginnings = [self.beginnings.longest(ids) for ids in prompts]
        alone = PassGroup([0], *beginnings[0])
        places, shared = [0], alone.beginning_tokens
        for place, ids in enumerate(prompts[1:], start=1):
            length = min(shared, common_length(prompts[0], ids))
            length = length if length >= MIN_KEPT_BEGINNING else 0
            loss = max(beginnings[i][0] for i in (*places, place)) - length
            # where nothing can be kept, waiting would be in vain
            repeats = max(common_length(prompts[i], ids) for i in places) if self.beginnings.limit_bytes else length
            if loss <= PASS_TOKENS and repeats - length <= PASS_TOKENS:
                places, shared = [*places, place], length
        places = places[next(encoded_together([len(prompts[place]) - shared for place in places]))]
        return alone if len(places) == 1 else PassGroup(places, shared, alone.beginning if shared else None)

    def _encode_group(self, prompts: Sequence[Ids], group: PassGroup) -> list[KVByLayer]:
        length, beginning = group.beginning_tokens, None
        self.shared_tokens += length * len(prompts)
        self.encoded_tokens += sum(len(ids) - length for ids in prompts)
        if group.beginning is not None:
            beginning = {layer: _part(states, 0, length) for layer, states in group.beginning.items()}
        encoded: list[KVByLayer] = []
        rests = self._packed([ids[length:] for ids in prompts], length, beginning)
        for ids, rest in zip(prompts, rests, strict=True):
            if not rest:  # a view of the cache: keeping it too would hold the whole
                encoded.append(beginning or {})
                continue
            encoded.append(concatenate_kv(beginning, rest))
            self.beginnings.add(ids, encoded[-1])
        return encoded

    def _packed(self, texts: Sequence[Ids], start: int, beginning: KVByLayer | None) -> Sequence[KVByLayer]:
        """Keys and values of each text behind the virtual tokens and a beginning, all as one packed row."""
        ends = list(accumulate(len(ids) for ids in texts))
        if not ends[-1]:
            return [{} for _ in texts]
        policy, device = self.policy, self.policy.device
        segments = [Segment(end - len(ids), end, None) for end, ids in zip(ends, texts, strict=True)]
        ids = torch.from_numpy(np.concatenate(texts)).to(device)
        positions = torch.cat([torch.arange(len(ids), device=device) for ids in texts])
        positions += start + policy.method.virtual_tokens
        context = self.virtual_kv if beginning is None else concatenate_kv(self.virtual_kv, beginning)
        filled = tuple(segment for segment in segments if segment.end > segment.start)
        with policy.autocast():
            kv_by_layer = policy.packed_kv(policy.embed(ids, None), positions, filled, context)
        if len(texts) == 1:
            return [kv_by_layer]
        return [
            {layer: _copy(states, s.start, s.end) for layer, states in kv_by_layer.items()} if s.end > s.start else {}
            for s in segments
        ]


def common_length(first: Ids, second: Ids) -> int:
    """Tokens that two texts begin with."""
    length = min(len(first), len(second))
    differences = np.flatnonzero(first[:length] != second[:length])
    return int(differences[0]) if len(differences) else length


def _part(states: KeysValues, start: int, end: int) -> KeysValues:
    key, value = (part[:, :, start:end] for part in states)
    return key, value


def _copy(states: KeysValues, start: int, end: int) -> KeysValues:
    # a view that is kept would hold the states of all prompts of its pass
    key, value = (part.clone() for part in _part(states, start, end))
    return key, value
